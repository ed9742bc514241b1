//! Memory of processes and of files on tmpfs.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// Bytes of a block as `stat` counts them, whatever the file system's own are.
const BLOCK_BYTES: u64 = 512;

/// Memory that files on tmpfs take, holes left out, in bytes.
///
/// # Errors
/// A file is not there.
pub fn allocated_bytes(files: &[PathBuf]) -> Result<u64> {
    let of = |path: &PathBuf| {
        let about = std::fs::metadata(path);
        Ok(about.with_context(|| format!("No {}", path.display()))?.blocks() * BLOCK_BYTES)
    };
    files.iter().map(of).sum()
}

/// The most memory that a process has had resident so far, in bytes, from /proc/PID/status.
///
/// # Errors
/// The process is gone.
pub fn peak_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
    high_water_bytes(&text).with_context(|| format!("{path} tells no peak: the process has ended"))
}

fn high_water_bytes(status: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = rest.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_line() {
        let status = "Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t   12 kB\nVmRSS:\t   8 kB\n";
        assert_eq!(high_water_bytes(status), Some(12 * 1024));
        assert_eq!(high_water_bytes("Name:\tx\n"), None);
    }

    #[test]
    fn grows_with_what_is_touched() {
        let before = peak_bytes(std::process::id()).unwrap();
        let touched = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert!(peak_bytes(std::process::id()).unwrap() >= before + (48 << 20));
        drop(touched);
        assert!(peak_bytes(u32::MAX).is_err());
    }
}
