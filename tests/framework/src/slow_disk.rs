//! A disk that is slow for some processes: reads stay in flight for tens of milliseconds.
//!
//! The kernel's block throttling holds a request back after the reader's pages were pinned, which is
//! the state that tests of direct I/O want to catch. Both cgroup versions are known.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};

/// A cgroup whose members read slowly from one disk. Removed on drop.
#[derive(Debug)]
pub struct SlowDisk {
    folder: PathBuf,
    parent: PathBuf,
}

impl SlowDisk {
    /// Limits reads from the disk under `file` to `bytes_per_s` for the processes added.
    ///
    /// # Errors
    /// The kernel has no block throttling, or the file lies on no disk.
    pub fn new(file: &Path, bytes_per_s: u64) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let disk = disk_of(file)?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("godwit-test-{}-{number}", std::process::id());
        let (parent, limit, line) = if Path::new("/sys/fs/cgroup/blkio").is_dir() {
            let line = format!("{disk} {bytes_per_s}");
            (PathBuf::from("/sys/fs/cgroup/blkio"), "blkio.throttle.read_bps_device", line)
        } else {
            let root = PathBuf::from("/sys/fs/cgroup");
            write(&root.join("cgroup.subtree_control"), "+io")?;
            (root, "io.max", format!("{disk} rbps={bytes_per_s}"))
        };
        let folder = parent.join(name);
        fs::create_dir(&folder).with_context(|| format!("No cgroup {}", folder.display()))?;
        let slow = Self { folder, parent };
        write(&slow.folder.join(limit), &line)?;
        Ok(slow)
    }

    /// Makes the disk slow for a process.
    ///
    /// # Errors
    /// The process is gone.
    pub fn add(&self, pid: u32) -> Result<()> {
        write(&self.folder.join("cgroup.procs"), &pid.to_string())
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let members = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            // One that has ended meanwhile needs no moving.
            drop(write(&self.parent.join("cgroup.procs"), pid));
        }
        drop(fs::remove_dir(&self.folder));
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("Cannot write {text:?} to {}", path.display()))
}

/// Number of the whole disk that holds a file, as `major:minor`.
fn disk_of(file: &Path) -> Result<String> {
    let device = fs::metadata(file).with_context(|| format!("No {}", file.display()))?.dev();
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xfff00));
    let sys = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let sys = fs::canonicalize(&sys)
        .with_context(|| format!("{} lies on no block device", file.display()))?;
    let whole =
        if sys.join("partition").exists() { sys.parent().map(Path::to_owned) } else { Some(sys) };
    let Some(whole) = whole else { bail!("{} lies on no disk", file.display()) };
    Ok(fs::read_to_string(whole.join("dev")).context("The disk has no number")?.trim().to_owned())
}
