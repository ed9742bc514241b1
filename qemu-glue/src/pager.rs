//! Demand paging of a QEMU process's RAM from outside: what is missing is put in place when the guest
//! touches it, or before.
//!
//! ```text
//!                       the guest touches it
//!   missing (a hole) ------------------------> held: the thread waits, the fault is reported
//!      |     ^                                    |
//!      |     | punched (balloon)                  |
//!      v     |                                    v
//!   in place <------------ place, place_zeros ----+        end: missing pages read as zeros
//! ```
//!
//! With [`Duty::Evict`] pages are taken away as well ([`Pager::protect`], [`Pager::evict`]):
//!
//! ```text
//!   in place ── protect ──► protected ── evict ──► missing
//!      ▲                        │ the guest writes: the fault is reported
//!      └────── unprotect ───────┘
//! ```
//!
//! A page is missing if the file that backs the block does not hold it. What was written into the
//! file before ([`GuestRam::write`](crate::ram::GuestRam::write)) is in place and raises no fault.
//!
//! Invariants:
//! - A page that is there is never overwritten: what the guest has written stays.
//! - A guest thread sees a page whole or not at all.
//! - **Dropping the pager ends nothing**, and must not: QEMU keeps a copy of the descriptor
//!   ([`CloseRemote::No`](crate::attach::CloseRemote)), and threads wait for the next engine, which takes the
//!   descriptor again ([`take_descriptor`](crate::attach::take_descriptor)) and calls [`Pager::resume`].
//!   When the last copy is closed the kernel lets waiting threads through to zeros, which is wrong
//!   data (design rule 12): first [`Pager::end`], then
//!   [`close_descriptor`](crate::attach::close_descriptor).
//! - Faults that the kernel takes on behalf of QEMU (a read(2) into guest RAM, KVM, vhost) are served
//!   as well. A descriptor that was created with UFFD_USER_MODE_ONLY would turn them into errors for
//!   QEMU, and nothing in /proc tells such a descriptor apart; [`attach`](crate::attach) never makes
//!   one and fails instead.
//! - Once the guest may run, missing pages are filled by the pager alone: a write to the file does
//!   not wake who waits, and a page that fallocate(2) made counts as there although it was never
//!   written.
//!
//! What the caller must expect: the same page may be reported several times, and after it was placed.
//! A page that was in place and is reported again was punched: zeros are what the guest expects. The
//! end of QEMU shows on its pidfd, not here: reading faults then just finds none.

mod error;
mod evict;
mod page_cache;
mod place;
mod register;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use migrate_core::layout::{PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::pageset::PageSet;
use userfaultfd::{Event, EventBuffer, FaultKind, ReadWrite, RegisterMode};

pub use self::error::PagerError;
pub use self::place::Placement;
use crate::mapped;
use crate::procfs::Identity;
use crate::ram::{self, Backing, GuestRam, RamRegion};
use crate::uffd::{self, Features, TargetUffd};

const PAGE: u64 = PAGE_BYTES as u64;

/// Most faults that one [`Pager::read_faults`] takes: as many vCPUs as a large guest has.
const FAULTS_MAX: usize = 256;

/// A thread of QEMU waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// First page of [`PAGE_BYTES`] of the host page that is missing.
    pub page: PageIndex,
    /// Pages of [`PAGE_BYTES`] in that host page: 1, or 512 and more on hugetlbfs.
    pub pages: u64,
    /// Whether the thread wants to write.
    pub is_write: bool,
    /// Whether the page was there when the thread touched it, and write-protected.
    pub is_protected: bool,
}

/// What a pager does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// Puts pages in place.
    Fill,
    /// Takes pages away as well: write faults on pages that it protected are reported.
    Evict,
}

impl Duty {
    /// Whether it can be done in this memory: pages are taken away one by one, which larger ones do not allow.
    ///
    /// # Errors
    /// [`PagerError::LargePages`] with the first block that has them.
    pub fn check(self, ram: &GuestRam) -> Result<(), PagerError> {
        match ram.regions().find(|region| region.page_bytes != PAGE) {
            Some(RamRegion { name, page_bytes, .. }) if self == Self::Evict => {
                Err(PagerError::LargePages { block: name.clone(), page_bytes: *page_bytes })
            }
            _ => Ok(()),
        }
    }

    fn features(self) -> Features {
        match self {
            Self::Fill => Features::PAGING,
            Self::Evict => Features::EVICTING,
        }
    }

    fn mode(self) -> RegisterMode {
        match self {
            Self::Fill => RegisterMode::MISSING,
            Self::Evict => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        }
    }
}

#[derive(Debug)]
struct Paged {
    region: RamRegion,
    backing: Backing,
    file: File,
    /// Page numbers in the layout.
    pages: Range<u64>,
}

/// Demand paging of a QEMU process's RAM. To be shared by threads: every operation takes `&self`, and
/// any number may be under way.
#[derive(Debug)]
pub struct Pager {
    pid: i32,
    identity: Identity,
    duty: Duty,
    uffd: TargetUffd,
    maps: File,
    layout: RamLayout,
    blocks: Vec<Paged>,
}

const _: () = {
    const fn shared_by_threads<T: Send + Sync>() {}
    shared_by_threads::<Pager>();
};

impl Pager {
    /// Reads the faults that wait now and adds them to `out`, never blocking. Returns whether it
    /// stopped at its own limit, so that more may wait.
    ///
    /// # Errors
    /// [`PagerError::Descriptor`].
    pub fn read_faults(&self, out: &mut Vec<Fault>) -> Result<bool, PagerError> {
        let mut buffer = EventBuffer::new(FAULTS_MAX);
        let events = self.uffd.uffd().read_events(&mut buffer).map_err(|error| {
            let source = uffd::io_error(error);
            PagerError::Descriptor { what: "read faults from", pid: self.pid, source }
        })?;
        let mut count = 0;
        for event in events {
            count += 1;
            match event.ok().and_then(|event| self.fault(&event)) {
                Some(fault) => out.push(fault),
                None => tracing::debug!(pid = self.pid, "an event of no block is passed over"),
            }
        }
        Ok(count == FAULTS_MAX)
    }

    fn fault(&self, event: &Event) -> Option<Fault> {
        let Event::Pagefault { kind, rw, addr, .. } = event else { return None };
        let is_protected = match kind {
            FaultKind::Missing => false,
            FaultKind::WriteProtected => true,
            FaultKind::Minor => return None,
        };
        let address = addr.addr() as u64;
        let block = self.blocks.iter().find(|b| b.region.addresses().contains(&address))?;
        let pages = block.region.page_bytes / PAGE;
        let host_page = (address - block.region.hva) / block.region.page_bytes;
        let page = PageIndex(block.pages.start + host_page * pages);
        Some(Fault { page, pages, is_write: *rw == ReadWrite::Write, is_protected })
    }

    fn intact(&self, block: &Paged) -> Result<bool, PagerError> {
        mapped::intact(self.pid, &self.maps, &block.region, &block.backing)
            .map_err(|source| PagerError::Proc { pid: self.pid, source })
    }

    fn fill_failed(&self, what: &'static str, block: &Paged, source: io::Error) -> PagerError {
        let (name, pid) = (block.region.name.clone(), self.pid);
        match source.raw_os_error() {
            Some(libc::ESRCH) => PagerError::Gone { pid },
            Some(libc::ENOENT) => PagerError::NotRegistered { block: name, pid },
            Some(libc::ENOMEM | libc::ENOSPC) => PagerError::Full { block: name, pid, source },
            _ => self.failed(what, block, source),
        }
    }

    fn failed(&self, what: &'static str, block: &Paged, source: io::Error) -> PagerError {
        PagerError::Block { what, block: block.region.name.clone(), pid: self.pid, source }
    }

    /// The pages of [`PAGE_BYTES`] that are in place now: those that the files hold, whoever put them
    /// there and whether or not QEMU has touched them since. That is what decides whether a fault is
    /// raised; QEMU's page tables do not (they know nothing of what was written into the file, and
    /// may have forgotten what the file still holds).
    ///
    /// # Errors
    /// [`PagerError::Block`]. On hugetlbfs the files are mapped for a moment and tried page by page.
    pub fn present(&self) -> Result<PageSet, PagerError> {
        let mut set = PageSet::new(self.layout.pages());
        for block in &self.blocks {
            let first = block.backing.offset_bytes;
            let range = first..first + block.region.length_bytes;
            let insert = |start: u64, end: u64| {
                let page = |offset: u64| block.pages.start + (offset - first) / PAGE;
                set.insert_range(page(start)..page(end));
            };
            let page_bytes = block.region.page_bytes;
            let result = if block.backing.huge {
                page_cache::huge_pages(&block.file, &range, page_bytes, insert)
            } else {
                ram::seek_data(&block.file, range, insert)
            };
            result.map_err(|source| self.failed("look for the pages of", block, source))?;
        }
        Ok(set)
    }

    /// Ends the registration of every block: from here on a missing page reads as zeros, and threads
    /// that wait go on. For when everything is in place that is not zero. QEMU's copy of the
    /// descriptor stays; close it ([`close_descriptor`](crate::attach::close_descriptor)) afterwards.
    ///
    /// # Errors
    /// [`PagerError::Block`] for the first block whose registration could not be ended; the others'
    /// are. A process that ended and a block that is gone are no error.
    pub fn end(&self) -> Result<(), PagerError> {
        let mut result = Ok(());
        for block in &self.blocks {
            let Err(source) = self.uffd.unregister(&block.region.addresses()) else { continue };
            // With the process or its mapping the registration went away.
            let gone = self.identity.check().is_err() || matches!(self.intact(block), Ok(false));
            if !gone && result.is_ok() {
                result = Err(self.failed("end the registration of", block, source));
            }
        }
        result
    }

    /// The process whose memory is paged.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The blocks and the numbering of their pages.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }
}

/// The userfaultfd, for poll(2): readable while faults wait to be read.
impl AsFd for Pager {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

#[cfg(test)]
mod tests;
