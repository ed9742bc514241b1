//! Which pages a file on hugetlbfs holds.
//!
//! hugetlbfs has neither SEEK_DATA nor cachestat(2), and mincore(2) and /proc/PID/pagemap tell of one
//! process's page tables, not of the file. But UFFDIO_CONTINUE maps a page if, and only if, the file
//! holds it: so the file is mapped here for a moment and every page is tried. Nothing is allocated.
//!
//! Source: mm/hugetlb.c, hugetlb_mfill_atomic_pte.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::MmapOptions;
use userfaultfd::RegisterMode;

use crate::uffd::{Cached, Features, RegisterError, TargetUffd, create_local};

/// Calls `found` with the start and end of every stretch of pages within a range of a file, which
/// is open for writing and is aligned to its pages.
///
/// # Errors
/// The kernel's answer; `EPERM` if the file is open for reading only.
pub(super) fn huge_pages(
    file: &File,
    range: &Range<u64>,
    page_bytes: u64,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut options = MmapOptions::new();
    let map = options.offset(range.start).len(length).no_reserve_swap().map_raw_read_only(file)?;
    let mapped = map.as_ptr().addr() as u64;
    let here = mapped..mapped + (range.end - range.start);
    let uffd = TargetUffd::initialise(create_local()?, Features::MINOR_HUGETLBFS)?;
    uffd.register(&here, RegisterMode::MINOR).map_err(|error| match error {
        RegisterError::Busy => io::Error::from_raw_os_error(libc::EBUSY),
        RegisterError::Other(error) => error,
    })?;
    let mut at = here.start;
    while at < here.end {
        let bytes = match uffd.map_cached(&(at..here.end))? {
            Cached::Bytes(bytes) => bytes,
            Cached::Mapped => page_bytes,
            Cached::Missing => {
                at += page_bytes;
                continue;
            }
        };
        let start = range.start + (at - here.start);
        found(start, (start + bytes).min(range.end));
        at += bytes;
    }
    Ok(())
}
