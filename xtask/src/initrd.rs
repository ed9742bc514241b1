//! The guest's initramfs: our static programs, busybox and modules, as a gzip-compressed cpio
//! archive in the `newc` format of the kernel's Documentation/driver-api/early-userspace/buffer-format.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};

use crate::kernel::Kernel;
use crate::run::{cargo, run};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const BUSYBOX: &str = "/bin/busybox";

/// Builds the guest's programs, linked statically, in a target folder of their own.
pub(crate) fn build_programs(root: &Path) -> Result<PathBuf> {
    let folder = root.join("target/guest");
    let mut command = cargo(root);
    command
        .args(["build", "--quiet", "--release", "-p", "guest-programs", "--target", TARGET])
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    run(&mut command).context("The guest's programs cannot be built")?;
    Ok(folder.join(TARGET).join("release/guest-programs"))
}

/// A cpio archive in memory.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len()).context("A file of 4 GiB does not fit in cpio")?;
        self.entries += 1;
        let name_bytes = name.len() as u32 + 1;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields =
            [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_bytes, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Adds a folder.
    pub(crate) fn folder(&mut self, name: &str) -> Result<()> {
        self.add(name, 0o040_755, (0, 0), &[])
    }

    /// Adds a file that may be run.
    pub(crate) fn program(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.add(name, 0o100_755, (0, 0), data)
    }

    fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.add(name, 0o120_777, (0, 0), target.as_bytes())
    }

    /// Ends it.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}

/// `modules` is the folder of the kernel's; without it none is loaded.
fn archive(programs: &Path, modules: Option<&Path>) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("Cannot read {path:?}"));
    let mut archive = Archive::default();
    for name in ["bin", "dev", "proc", "sys", "tmp", "lib", "lib/modules"] {
        archive.folder(name)?;
    }
    // The kernel opens it for PID 1 before anything is mounted.
    archive.add("dev/console", 0o020_600, (5, 1), &[])?;
    archive.program("init", &read(programs)?)?;
    archive.program("bin/busybox", &read(Path::new(BUSYBOX))?)?;
    for name in ["sh", "cat", "ls", "mount", "dmesg", "free", "ip", "dd"] {
        archive.link(&format!("bin/{name}"), "busybox")?;
    }
    let mut paths = String::new();
    if let Some(modules) = modules {
        let list = fs::read_to_string(modules.join("modules.list"));
        for file in list.context("Cannot read modules.list")?.lines() {
            let at = format!("lib/modules/{file}");
            archive.add(&at, 0o100_644, (0, 0), &read(&modules.join(file))?)?;
            paths.push_str(&format!("/{at}\n"));
        }
    }
    archive.add("lib/modules.list", 0o100_644, (0, 0), paths.as_bytes())?;
    archive.finish()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

/// The initramfs with the kernel's modules, and one for any kernel, without.
#[derive(Debug)]
pub(crate) struct Initrds {
    pub(crate) with_modules: PathBuf,
    pub(crate) plain: PathBuf,
}

/// Writes the two unless they are newer than all that goes into them.
pub(crate) fn provide(root: &Path, godwit: &Path, kernel: &Kernel) -> Result<Initrds> {
    let programs = build_programs(root)?;
    let initrds =
        Initrds { with_modules: godwit.join("initrd.gz"), plain: godwit.join("initrd-plain.gz") };
    write(&initrds.with_modules, &programs, Some(&kernel.modules))?;
    write(&initrds.plain, &programs, None)?;
    Ok(initrds)
}

fn write(initrd: &Path, programs: &Path, modules: Option<&Path>) -> Result<()> {
    let mut inputs = vec![programs.to_owned(), BUSYBOX.into()];
    inputs.extend(modules.map(|modules| modules.join("modules.list")));
    if let Some(written) = modified(initrd)
        && inputs.iter().all(|input| modified(input).is_some_and(|time| time < written))
    {
        return Ok(());
    }
    println!("   writing {}", initrd.display());
    compress(&archive(programs, modules)?, initrd)
}

/// Writes bytes compressed by gzip; the file is there once it is whole.
pub(crate) fn compress(bytes: &[u8], path: &Path) -> Result<()> {
    let draft = path.with_extension("draft");
    let output = File::create(&draft).with_context(|| format!("Cannot create {draft:?}"))?;
    let mut gzip = Command::new("gzip")
        .args(["-c", "-n"])
        .stdin(Stdio::piped())
        .stdout(output)
        .spawn()
        .context("Cannot start gzip")?;
    if let Some(mut stdin) = gzip.stdin.take() {
        stdin.write_all(bytes).context("Cannot feed gzip")?;
    }
    let status = gzip.wait().context("Cannot wait for gzip")?;
    if !status.success() {
        bail!("gzip ended with {status}");
    }
    fs::rename(&draft, path).with_context(|| format!("Cannot put {path:?} in place"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_newc_format() {
        let mut archive = Archive::default();
        archive.folder("dev").unwrap();
        archive.add("dev/console", 0o020_600, (5, 1), &[]).unwrap();
        archive.program("init", b"12345").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"07070100000001000041ed"));
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("00000005000000010000000c00000000dev/console\0"));
        assert!(text.contains("init\0\0"));
        assert!(text.ends_with("TRAILER!!!\0\0\0\0") || text.contains("TRAILER!!!\0"));
    }

    #[test]
    fn cpio_reads_it_back() {
        let mut archive = Archive::default();
        archive.folder("lib").unwrap();
        archive.program("lib/one", b"content").unwrap();
        archive.link("lib/two", "one").unwrap();
        let bytes = archive.finish().unwrap();
        let Ok(mut child) = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "lib\nlib/one\nlib/two\n");
    }
}
