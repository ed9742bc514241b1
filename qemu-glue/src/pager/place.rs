//! Putting pages in place.

use std::io;
use std::ops::Range;

use migrate_core::layout::PageIndex;

use super::{PAGE, Paged, Pager, PagerError};
use crate::uffd::{Filled, TargetUffd};

/// Most bytes that one system call fills, unless a host page is larger: the kernel wakes who waits
/// for any of them only when all are there (0.1 to 0.3 ms were measured).
const FILL_BYTES_MAX: u64 = 256 << 10;

/// What placing did, in pages of [`PAGE_BYTES`](migrate_core::layout::PAGE_BYTES).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placement {
    /// Put in place.
    pub placed: u64,
    /// There already, and left alone.
    pub present: u64,
}

impl Pager {
    /// Puts whole host pages in place, from `first` on, and wakes who waits for them. A page that is
    /// there is left alone, who waits for it is woken, and placing goes on behind it.
    ///
    /// # Errors
    /// [`PagerError::OutOfRange`] if these are no whole host pages of one block;
    /// [`PagerError::Full`]; [`PagerError::NotRegistered`] after [`end`](Self::end);
    /// [`PagerError::Gone`]. What was placed before the error stays: the same call may be made again.
    pub fn place(&self, first: PageIndex, content: &[u8]) -> Result<Placement, PagerError> {
        self.place_by(first, content, TargetUffd::copy)
    }

    fn place_by(
        &self,
        first: PageIndex,
        content: &[u8],
        copy: impl Fn(&TargetUffd, u64, &[u8]) -> io::Result<Filled>,
    ) -> Result<Placement, PagerError> {
        let (block, range) = self.locate(first, content.len() as u64)?;
        self.fill(block, &range, |part| {
            let at = |address: u64| usize::try_from(address - range.start).unwrap_or(usize::MAX);
            let content = content.get(at(part.start)..at(part.end)).unwrap_or_default();
            copy(&self.uffd, part.start, content)
        })
    }

    /// As [`place`](Self::place); the pages are protected as by [`protect`](Self::protect) before anybody can write
    /// to them. Those that were there are left as they are.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_protected(
        &self,
        first: PageIndex,
        content: &[u8],
    ) -> Result<Placement, PagerError> {
        self.place_by(first, content, TargetUffd::copy_protected)
    }

    /// As [`place`](Self::place), with zeros. Each takes memory: a page that is zero and for which
    /// nobody waits may as well stay missing until the [`end`](Self::end).
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zeros(&self, first: PageIndex, pages: u64) -> Result<Placement, PagerError> {
        let (block, range) = self.locate(first, pages.saturating_mul(PAGE))?;
        if !block.backing.huge {
            return self.fill(block, &range, |part| self.uffd.zero(part));
        }
        // Fresh memory that is only read takes no room.
        let zeros = vec![0; usize::try_from(block.region.page_bytes).unwrap_or(0)];
        self.fill(block, &range, |part| self.uffd.copy(part.start, &zeros))
    }

    /// The block and QEMU's addresses of whole host pages.
    pub(super) fn locate(
        &self,
        first: PageIndex,
        bytes: u64,
    ) -> Result<(&Paged, Range<u64>), PagerError> {
        let located = self.layout.locate(first);
        let block = located.and_then(|location| self.blocks.get(location.block));
        let page_bytes = block.map_or(0, |block| block.region.page_bytes);
        let outside = || PagerError::OutOfRange { first, bytes, page_bytes };
        let (location, block) = located.zip(block).ok_or_else(outside)?;
        let left = block.region.length_bytes.saturating_sub(location.offset_bytes);
        let whole = |bytes: u64| bytes.is_multiple_of(page_bytes);
        if bytes == 0 || bytes > left || !whole(bytes) || !whole(location.offset_bytes) {
            return Err(outside());
        }
        let start = block.region.hva + location.offset_bytes;
        Ok((block, start..start + bytes))
    }

    /// Fills a range part by part. `part` fills from the start of what it is given, as far as it can.
    fn fill(
        &self,
        block: &Paged,
        range: &Range<u64>,
        part: impl Fn(&Range<u64>) -> io::Result<Filled>,
    ) -> Result<Placement, PagerError> {
        let page = block.region.page_bytes;
        let limit = FILL_BYTES_MAX.max(page);
        let failed = |source| self.fill_failed("put pages in place in", block, source);
        let mut placement = Placement::default();
        let (mut at, mut most) = (range.start, limit);
        while at < range.end {
            let end = range.end.min(at.saturating_add(most));
            match part(&(at..end)) {
                Ok(Filled::Bytes(bytes)) => {
                    placement.placed += bytes / PAGE;
                    at += bytes;
                    most = limit;
                }
                Ok(Filled::Present) => {
                    self.uffd.wake(&(at..at + page)).map_err(failed)?;
                    placement.present += page / PAGE;
                    at += page;
                    most = limit;
                }
                // Also the answer if the block's mapping is split within the range.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) && end - at > page => {
                    most = ((end - at) / 2).next_multiple_of(page);
                }
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(placement)
    }
}
