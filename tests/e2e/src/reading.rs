//! Guests that read a slow disk with O_DIRECT all the time and check what they read.
//!
//! The disk is made slow, so that data arrives long after a page was armed, protected or copied, and a buffer
//! is not read into again for a while, so that such a page is not put right by the next read.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use framework::{QemuKind, SlowDisk, Vm, VmSpec, disk, guest, wait};

use crate::Rig;

const DISK_MIB: u64 = 512;
const DISK_SEED: u64 = 11;

/// Slow enough for a request of 4 MiB to be in flight for tens of milliseconds, and several at once.
const DISK_BYTES_PER_S: u64 = 100 << 20;

/// A guest of 512 MiB that reads the disk at `path`; QEMU's cache and I/O modes for it.
#[must_use]
pub fn reading(path: &Path, kind: QemuKind, cache: &str, aio: &str) -> VmSpec {
    let words =
        format!("godwit.diskread=threads=4,request=4096,buffers=6,every=2,seed={DISK_SEED}");
    VmSpec::new("reading", kind).memory_mib(512).smp(2).disk(path, cache, aio).with(&words)
}

/// Such a disk in the rig's folder, and what makes it slow for the processes added.
///
/// # Errors
/// No space, or the kernel has no block throttling.
pub fn slow_disk(rig: &Rig) -> Result<(PathBuf, SlowDisk)> {
    let image = rig.folder.path().join("disk.img");
    disk::create(&image, DISK_MIB, DISK_SEED)?;
    let slow = SlowDisk::new(&image, DISK_BYTES_PER_S)?;
    Ok((image, slow))
}

/// Waits until a guest has read so many further blocks.
///
/// # Errors
/// It does not within `timeout`.
pub fn wait_blocks(vm: &mut Vm, blocks: u64, timeout: Duration) -> Result<()> {
    let read = |vm: &mut Vm| guest::number(&vm.ask("diskread report")?, "blocks");
    let first = read(vm)?;
    wait::until(&format!("{blocks} blocks of the disk"), timeout, || {
        Ok((read(vm)? >= first + blocks).then_some(()))
    })
}
