//! A tmpfs of its own for RAM files of large guests: /dev/shm holds half of the machine's memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

/// Mount points of ours begin with this, then the id of the test's process.
const STEM: &str = "godwit-ram";

/// A mounted tmpfs; unmounted and removed on drop, which has to come after its VMs are gone.
#[derive(Debug)]
pub struct RamDisk {
    mount: TempDir,
}

impl RamDisk {
    /// Mounts one that takes up to `mib` MiB. It costs what its files hold.
    ///
    /// # Errors
    /// Not root.
    pub fn mount(mib: u64) -> Result<Self> {
        sweep();
        let mount = tempfile::Builder::new()
            .prefix(&format!("{STEM}-{}-", std::process::id()))
            .tempdir()
            .context("Cannot create a folder to mount at")?;
        let options = format!("size={mib}m,mode=700");
        run_mount(&["-t", "tmpfs", "-o", &options, "none"], mount.path())?;
        Ok(Self { mount })
    }

    /// From now on it takes up to `mib` MiB.
    ///
    /// # Errors
    /// It holds more.
    pub fn resize(&self, mib: u64) -> Result<()> {
        run_mount(&["-o", &format!("remount,size={mib}m")], self.path())
    }

    /// Where to create files.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.path()
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        unmount(self.mount.path());
    }
}

fn run_mount(arguments: &[&str], at: &Path) -> Result<()> {
    let output = Command::new("mount").args(arguments).arg(at).output();
    let output = output.context("Cannot start `mount`")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("mount {arguments:?} failed (are we root?): {}", text.trim());
    }
    Ok(())
}

/// Its memory is free as soon as the last process that has a file open is gone.
fn unmount(path: &Path) {
    match Command::new("umount").arg("--lazy").arg(path).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => eprintln!("{}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => eprintln!("Cannot start `umount`: {error}"),
    }
}

/// Unmounts what test processes that were killed left: it holds memory.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for path in left(&mounts, |pid| Path::new(&format!("/proc/{pid}")).exists()) {
            unmount(&path);
            drop(std::fs::remove_dir(&path));
        }
    });
}

/// Mount points of ours whose process does not run.
fn left(mounts: &str, runs: impl Fn(u32) -> bool) -> Vec<PathBuf> {
    let paths = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let is_left = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        let rest = name.and_then(|name| name.strip_prefix(STEM)?.strip_prefix('-'));
        let pid = rest.and_then(|rest| rest.split('-').next()?.parse().ok());
        pid.is_some_and(|pid| !runs(pid))
    };
    paths.filter(is_left).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_dead_tests_are_left() {
        let mounts = "none /tmp/godwit-ram-7-ab tmpfs rw 0 0\nnone /tmp/godwit-ram-8-cd tmpfs rw\n\
                      none /tmp/godwit-ram-x tmpfs rw 0 0\n/dev/vda / ext4 rw 0 0\n";
        assert_eq!(left(mounts, |pid| pid == 8), [PathBuf::from("/tmp/godwit-ram-7-ab")]);
    }

    #[test]
    fn holds_what_was_asked_for_and_vanishes() {
        let disk = RamDisk::mount(2).unwrap();
        let path = disk.path().to_owned();
        std::fs::write(path.join("fits"), vec![1; 1 << 20]).unwrap();
        assert!(std::fs::write(path.join("too-large"), vec![1; 2 << 20]).is_err());
        drop(disk);
        assert!(!path.exists());
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(path.to_str().unwrap()));
    }
}
