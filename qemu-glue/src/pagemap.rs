//! PAGEMAP_SCAN: which pages of another process were written, and PROCMAP_QUERY: what is mapped.
//!
//! The scan's `walk_end` can be stale (the kernel updates it only when its own buffer of 512
//! regions is flushed), so the loop is driven by the number of regions that came back: a buffer
//! that is not full means that the walk is over. A full one is continued at the end of its last
//! region; pages behind it that the kernel had already passed had nothing to report.
//!
//! Source: Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c (Linux 6.7 and newer;
//! PROCMAP_QUERY 6.11 and newer).
#![expect(unsafe_code, reason = "two ioctls that no crate offers")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use linux_raw_sys::general::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
    procmap_query, procmap_query_flags,
};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, opcode};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);
const PROCMAP_QUERY: Opcode = opcode::read_write::<procmap_query>(b'f', 17);
const _: () = assert!(size_of::<pm_scan_arg>() == 96 && size_of::<page_region>() == 24);
const _: () = assert!(size_of::<procmap_query>() == 104);

/// Regions that one call may return: 384 KiB of memory, a full one costs another call.
const REGIONS: usize = 16_384;

/// Most calls for one scan: as many as there are regions in 64 TiB with every other page written.
const CALLS_MAX: u64 = 1 << 20;

/// What a scan does to the pages that it reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanMode {
    /// Protects them again in the same step, so that the next write is found by the next scan.
    Rearm,
    /// Leaves them as they are.
    Peek,
}

/// A process's page map, opened for scanning.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<page_region>,
}

/// The ioctl with its return value, which rustix's `Updater` throws away.
struct Scan<'a>(&'a mut pm_scan_arg);

// SAFETY: the opcode is PAGEMAP_SCAN, for which the kernel reads and writes one pm_scan_arg; the
// pointer is to one that lives as long as the request.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(out).unwrap_or(0))
    }
}

impl Pagemap {
    /// Opens /proc/PID/pagemap.
    ///
    /// # Errors
    /// The kernel's answer; the same access right as for ptrace is needed.
    pub fn open(pid: i32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let empty = page_region { start: 0, end: 0, categories: 0 };
        Ok(Self { file, regions: vec![empty; REGIONS] })
    }

    /// Whether this kernel has PAGEMAP_SCAN: an empty range of the calling process is scanned.
    pub fn supported() -> bool {
        Self::open(i32::try_from(std::process::id()).unwrap_or(0))
            .and_then(|mut map| map.call(&(0x1000..0x2000), 0))
            .is_ok()
    }

    /// Reports the address ranges within `range` that were written since they were last protected.
    /// The range must be registered with a userfaultfd that has WP_ASYNC.
    ///
    /// # Errors
    /// `EPERM` if part of the range is mapped but not registered so; `ESRCH` if the process ended.
    pub fn scan(
        &mut self,
        range: &Range<u64>,
        mode: ScanMode,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let flags = match mode {
            ScanMode::Rearm => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            ScanMode::Peek => PM_SCAN_CHECK_WPASYNC,
        };
        let mut start = range.start;
        for _ in 0..CALLS_MAX {
            let count = self.call(&(start..range.end), u64::from(flags))?;
            let regions = self.regions.get(..count).unwrap_or(&self.regions);
            for region in regions {
                found(region.start..region.end);
            }
            let Some(last) = regions.last().filter(|_| count >= self.regions.len()) else {
                return Ok(());
            };
            if last.end >= range.end {
                return Ok(());
            }
            start = last.end.max(start);
        }
        Err(io::Error::other("the scan does not come to an end"))
    }

    fn call(&mut self, range: &Range<u64>, flags: u64) -> io::Result<usize> {
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags,
            start: range.start,
            end: range.end,
            walk_end: 0,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: u64::from(PAGE_IS_WRITTEN),
            category_anyof_mask: 0,
            return_mask: u64::from(PAGE_IS_WRITTEN),
        };
        // SAFETY: `vec` and `vec_len` describe `self.regions`, which is borrowed mutably for the
        // call and has the kernel's element type.
        let count = unsafe { rustix::ioctl::ioctl(&self.file, Scan(&mut argument)) }?;
        Ok(count.min(self.regions.len()))
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What is mapped at an address, asked of the kernel without reading the whole list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmaAt {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Offset of `start` in the file, in bytes.
    pub offset_bytes: u64,
    /// Device as st_dev has it.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Whether it is a shared mapping.
    pub shared: bool,
}

/// Asks /proc/PID/maps (opened as `maps`) what is mapped at an address; nothing if nothing is.
///
/// # Errors
/// `ENOTTY` before Linux 6.11; `ESRCH` if the process is gone.
pub fn vma_at(maps: &File, address: u64) -> io::Result<Option<VmaAt>> {
    let mut query = procmap_query {
        size: size_of::<procmap_query>() as u64,
        query_flags: 0,
        query_addr: address,
        vma_start: 0,
        vma_end: 0,
        vma_flags: 0,
        vma_page_size: 0,
        vma_offset: 0,
        inode: 0,
        dev_major: 0,
        dev_minor: 0,
        vma_name_size: 0,
        build_id_size: 0,
        vma_name_addr: 0,
        build_id_addr: 0,
    };
    // SAFETY: PROCMAP_QUERY reads and writes exactly one procmap_query (size asserted above); no
    // name and no build id are asked for, so no other memory is written.
    let request = unsafe { Updater::<PROCMAP_QUERY, procmap_query>::new(&mut query) };
    // SAFETY: the request's pointer is to `query`, which outlives the call.
    match unsafe { rustix::ioctl::ioctl(maps, request) } {
        Ok(()) => Ok(Some(VmaAt {
            start: query.vma_start,
            end: query.vma_end,
            offset_bytes: query.vma_offset,
            device: rustix::fs::makedev(query.dev_major, query.dev_minor),
            inode: query.inode,
            shared: query.vma_flags & procmap_query_flags::PROCMAP_QUERY_VMA_SHARED as u64 != 0,
        })),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs;

    #[test]
    fn this_kernel_scans() {
        assert!(Pagemap::supported());
    }

    #[test]
    fn an_unregistered_range_is_refused() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let memory = vec![1u8; 1 << 20];
        let start = (memory.as_ptr() as u64).next_multiple_of(4096);
        let mut map = Pagemap::open(pid).unwrap();
        let error = map.scan(&(start..start + 65536), ScanMode::Rearm, |_| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn the_kernel_names_the_same_mappings_as_the_list() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let maps = File::open(format!("/proc/{pid}/maps")).unwrap();
        let code = procfs::mappings(pid).unwrap();
        let mapping = code.iter().find(|mapping| mapping.execute && mapping.inode != 0).unwrap();
        let vma = vma_at(&maps, mapping.start + 1).unwrap().unwrap();
        assert_eq!((vma.start, vma.end), (mapping.start, mapping.end));
        assert_eq!((vma.device, vma.inode), (mapping.device, mapping.inode));
        assert_eq!(vma.offset_bytes, mapping.offset_bytes);
        assert!(!vma.shared);
        assert_eq!(vma_at(&maps, 1).unwrap(), None);
    }
}
