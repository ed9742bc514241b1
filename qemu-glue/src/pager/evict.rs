//! Taking pages away from a running guest.
//!
//! What a caller does: protect pages, copy them, keep the copy safe, and evict those that no fault was reported
//! of. A thread that writes to a protected page waits and its fault is reported; it goes on by
//! [`Pager::unprotect`], or, once the page is evicted, by [`Pager::wake`], after which it faults on the missing page.
//!
//! Direct I/O that was under way before a page was protected still reaches it, and nothing tells (design rule 6):
//! who pages a VM that has such I/O waits before it copies.

use std::ops::Range;

use migrate_core::layout::PageIndex;
use rustix::fs::FallocateFlags;

use super::{PAGE, Paged, Pager, PagerError};
use crate::uffd::TargetUffd;

impl Pager {
    /// Write-protects pages of one block. Those that are missing are protected as well, until they are placed.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn protect(&self, first: PageIndex, pages: u64) -> Result<(), PagerError> {
        self.on_range("protect pages of", first, pages, TargetUffd::write_protect)
    }

    /// Makes pages of one block writable, and wakes who waits for that.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn unprotect(&self, first: PageIndex, pages: u64) -> Result<(), PagerError> {
        self.on_range("unprotect pages of", first, pages, TargetUffd::unprotect)
    }

    /// Wakes who waits for pages of one block: each looks again.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn wake(&self, first: PageIndex, pages: u64) -> Result<(), PagerError> {
        self.on_range("wake who waits for pages of", first, pages, TargetUffd::wake)
    }

    /// Takes pages of one block away: they are missing from here on, and their memory is free. Who waits to write
    /// to them is not woken.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn evict(&self, first: PageIndex, pages: u64) -> Result<(), PagerError> {
        let bytes = pages.saturating_mul(PAGE);
        let (block, range) = self.locate(first, bytes)?;
        let offset = block.backing.offset_bytes + (range.start - block.region.hva);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched =
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(&block.file, flags, offset, bytes));
        punched.map_err(|error| self.failed("take pages away from", block, error.into()))
    }

    fn on_range(
        &self,
        what: &'static str,
        first: PageIndex,
        pages: u64,
        act: impl Fn(&TargetUffd, &Range<u64>) -> std::io::Result<()>,
    ) -> Result<(), PagerError> {
        let (block, range): (&Paged, _) = self.locate(first, pages.saturating_mul(PAGE))?;
        act(&self.uffd, &range).map_err(|source| self.fill_failed(what, block, source))
    }
}
