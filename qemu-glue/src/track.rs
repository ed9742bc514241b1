//! Which pages of guest RAM were written: write protection that the kernel resolves by itself
//! (UFFD_FEATURE_WP_ASYNC), asked with PAGEMAP_SCAN.
//!
//! ```text
//! arm ----> every page clean ----> the guest writes: page marked ----> scan: reported and clean
//!                ^                                                            |
//!                +------------------------------------------------------------+
//! ```
//!
//! Invariants:
//! - A page is protected again in the step that reports it: a write after the report is found by
//!   the next scan, so read contents after the scan (design rule 1).
//! - Pages that were never populated are tracked too: protected (WP_UNPOPULATED) where there is data
//!   nearby, else looked for in the file (armed.rs).
//! - A page that was written and then became a hole (balloon) is reported. A clean one is not: the
//!   kernel keeps its protection (measured on 6.18). [`GuestRam::vanished`] finds those (rule 14).
//! - On hugetlbfs all parts of a written large page are reported (rule 15).
//! - A block that is no longer mapped as it was when tracking began is an error, never silence.
//! - Dropping the tracker ends all registrations and closes the descriptor. If the engine is killed
//!   instead, the kernel does the same, provided QEMU holds no copy (rule 12).
//!
//! Not seen: DMA that lands after its page was reported (rule 6), writes by other processes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;
use userfaultfd::RegisterMode;

use crate::error::ProcError;
pub use crate::error::TrackError;
use crate::mapped;
use crate::pagemap::{Pagemap, ScanMode};
use crate::procfs::Identity;
use crate::ram::{Backing, GuestRam, RamRegion, seek_data};
use crate::uffd::{Features, RegisterError, TargetUffd};

mod armed;

use armed::Armed;

const PAGE: u64 = PAGE_BYTES as u64;

/// What a scan found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanReport {
    /// Pages of [`PAGE_BYTES`] that the kernel reported written, whether or not they were in the
    /// set before.
    pub pages: u64,
    /// How long the scan took.
    pub took: Duration,
}

#[derive(Debug)]
struct Tracked {
    region: RamRegion,
    backing: Backing,
    file: File,
    /// First page number in the layout.
    first_page: u64,
    armed: Armed,
}

impl Tracked {
    /// Adds the pages at these addresses of the block to a set; returns how many.
    fn insert(&self, addresses: &Range<u64>, into: &mut PageSet) -> u64 {
        let first = self.first_page + (addresses.start - self.region.hva) / PAGE;
        let count = (addresses.end - addresses.start) / PAGE;
        into.insert_range(first..first + count);
        count
    }

    /// Calls `found` with the addresses of the pages within `addresses` that are no holes; where the kernel does not
    /// tell them, with all.
    fn data(&self, addresses: &Range<u64>, mut found: impl FnMut(&Range<u64>)) -> io::Result<()> {
        if self.backing.huge {
            found(addresses);
            return Ok(());
        }
        let shift = self.region.hva.wrapping_sub(self.backing.offset_bytes);
        let range = addresses.start.wrapping_sub(shift)..addresses.end.wrapping_sub(shift);
        seek_data(&self.file, range, |start, end| {
            found(&(start.wrapping_add(shift)..end.next_multiple_of(PAGE).wrapping_add(shift)));
        })
    }

    /// The stretches that hold data and are not armed.
    fn fresh(&self) -> io::Result<Armed> {
        let mut fresh = Armed::nothing(self.region.addresses());
        for gap in self.armed.gaps() {
            self.data(&gap, |data| fresh.add(data))?;
        }
        Ok(fresh)
    }

    /// Adds the written pages to `dirty`; returns how many.
    fn scan(
        &mut self,
        pagemap: &mut Pagemap,
        mode: ScanMode,
        dirty: &mut PageSet,
    ) -> io::Result<u64> {
        let mut pages = 0;
        let block = self.region.addresses();
        // The kernel answers in pages of the mapping, which a block is made of.
        let clip = |found: Range<u64>| {
            found.start.clamp(block.start, block.end)..found.end.clamp(block.start, block.end)
        };
        let fresh = self.fresh()?;
        for range in self.armed.ranges() {
            pagemap.scan(&range, mode, |found| pages += self.insert(&clip(found), dirty))?;
        }
        for range in fresh.ranges() {
            let mut reported = vec![];
            pagemap.scan(&range, mode, |found| reported.push(clip(found)))?;
            for part in reported {
                self.data(&part, |data| pages += self.insert(data, dirty))?;
            }
        }
        if mode == ScanMode::Rearm {
            self.armed.add_all(&fresh);
        }
        Ok(pages)
    }
}

/// Dirty tracking of a QEMU process's RAM.
#[derive(Debug)]
pub struct DirtyTracker {
    pid: i32,
    identity: Identity,
    uffd: TargetUffd,
    pagemap: Pagemap,
    maps: File,
    blocks: Vec<Tracked>,
    /// How many of `blocks` are registered; the rest never was.
    registered: usize,
    pages: u64,
}

impl DirtyTracker {
    /// Registers all blocks with a fresh userfaultfd of the process and marks every page clean.
    ///
    /// # Errors
    /// [`TrackError::Busy`] if another userfaultfd holds a block, [`TrackError::Changed`] if one
    /// is no longer mapped as `ram` found it, [`TrackError::Unsupported`] on old kernels. What was
    /// registered by then is undone.
    pub fn arm(pid: i32, uffd: OwnedFd, ram: &GuestRam) -> Result<Self, TrackError> {
        let proc_failed = |source| TrackError::Proc { pid, source };
        ram.identity().check().map_err(proc_failed)?;
        let identity = Identity::of(pid).map_err(proc_failed)?;
        if identity.start_ticks() != ram.identity().start_ticks() {
            return Err(proc_failed(ProcError::Replaced { pid }));
        }
        let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        let pagemap = Pagemap::open(pid).map_err(|source| TrackError::Pagemap { path, source })?;
        let path = PathBuf::from(format!("/proc/{pid}/maps"));
        let maps = File::open(&path).map_err(|source| TrackError::Pagemap { path, source })?;
        if !Pagemap::supported() {
            return Err(TrackError::Unsupported { what: "PAGEMAP_SCAN" });
        }
        let supported = crate::uffd::supported().unwrap_or(Features::TRACKING);
        if !supported.contains(Features::TRACKING) {
            return Err(TrackError::Unsupported { what: "UFFD_FEATURE_WP_ASYNC" });
        }
        let uffd = TargetUffd::initialise(uffd, Features::TRACKING)
            .map_err(|source| TrackError::Handshake { pid, source })?;
        let blocks = ram.regions().zip(ram.backings()).zip(ram.files()).enumerate();
        let blocks = blocks.map(|(index, ((region, backing), file))| {
            let file = file.try_clone().map_err(|source| {
                let block = region.name.clone();
                TrackError::Block { what: "open the file of", block, pid, source }
            })?;
            Ok(Tracked {
                region: region.clone(),
                backing,
                file,
                first_page: ram.layout().block_pages(index).start,
                armed: Armed::nothing(region.addresses()),
            })
        });
        let pages = ram.layout().pages();
        let blocks = blocks.collect::<Result<_, TrackError>>()?;
        let mut tracker = Self { pid, identity, uffd, pagemap, maps, blocks, registered: 0, pages };
        tracker.check_mapped()?;
        // From here on dropping the tracker undoes what was done.
        tracker.register_all()?;
        tracker.check_mapped()?;
        Ok(tracker)
    }

    fn register_all(&mut self) -> Result<(), TrackError> {
        for block in &mut self.blocks {
            let (name, pid) = (block.region.name.clone(), self.pid);
            let range = block.region.addresses();
            match self.uffd.register(&range, RegisterMode::WRITE_PROTECT) {
                Ok(()) => {}
                Err(RegisterError::Busy) => {
                    return Err(TrackError::Busy { block: name, pid });
                }
                Err(RegisterError::Other(source)) => {
                    return Err(TrackError::Block { what: "register", block: name, pid, source });
                }
            }
            self.registered += 1;
            let protected = block.fresh().and_then(|armed| {
                block.armed = armed;
                block.armed.ranges().iter().try_for_each(|range| self.uffd.write_protect(range))
            });
            protected.map_err(|source| TrackError::Block {
                what: "write-protect",
                block: name,
                pid,
                source,
            })?;
        }
        Ok(())
    }

    /// Adds all pages to `dirty` that were written since they were last reported (or armed), and
    /// marks them clean.
    ///
    /// # Errors
    /// [`TrackError::Changed`] if a block vanished or was mapped anew; [`TrackError::WrongSet`].
    /// After an error the set may miss pages: end the migration.
    pub fn scan(&mut self, dirty: &mut PageSet) -> Result<ScanReport, TrackError> {
        self.walk(ScanMode::Rearm, dirty)
    }

    /// As [`scan`](Self::scan), but leaves the marks: the next scan reports the pages again.
    ///
    /// # Errors
    /// As [`scan`](Self::scan).
    pub fn peek(&mut self, dirty: &mut PageSet) -> Result<ScanReport, TrackError> {
        self.walk(ScanMode::Peek, dirty)
    }

    fn walk(&mut self, mode: ScanMode, dirty: &mut PageSet) -> Result<ScanReport, TrackError> {
        let began = Instant::now();
        if dirty.size() != self.pages {
            return Err(TrackError::WrongSet { found: dirty.size(), expected: self.pages });
        }
        let mut pages = 0u64;
        for block in &mut self.blocks {
            let found = block.scan(&mut self.pagemap, mode, dirty);
            pages += found.map_err(|source| scan_failed(&block.region.name, self.pid, source))?;
        }
        // After the walk: a block that was unmapped before or during it gave no report.
        self.check_mapped()?;
        Ok(ScanReport { pages, took: began.elapsed() })
    }

    /// Checks that every block is still mapped from its file, without gaps.
    fn check_mapped(&self) -> Result<(), TrackError> {
        for block in &self.blocks {
            if !self.intact(block)? {
                return Err(self.changed(block));
            }
        }
        Ok(())
    }

    fn intact(&self, block: &Tracked) -> Result<bool, TrackError> {
        let intact = mapped::intact(self.pid, &self.maps, &block.region, &block.backing);
        intact.map_err(|source| TrackError::Proc { pid: self.pid, source })
    }

    fn changed(&self, block: &Tracked) -> TrackError {
        TrackError::Changed { block: block.region.name.clone(), pid: self.pid }
    }

    /// Number of pages that a set passed to [`scan`](Self::scan) must hold.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The process whose writes are tracked.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends tracking and reports what could not be undone. Dropping does the same in silence.
    ///
    /// # Errors
    /// [`TrackError::Block`] for the first block whose registration could not be ended; closing the
    /// descriptor ends it all the same unless QEMU holds a copy. A process that ended is no error.
    pub fn disarm(mut self) -> Result<(), TrackError> {
        self.unregister_all()
    }

    fn unregister_all(&mut self) -> Result<(), TrackError> {
        let mut result = Ok(());
        for block in self.blocks.iter().take(std::mem::take(&mut self.registered)) {
            let Err(source) = self.uffd.unregister(&block.region.addresses()) else { continue };
            // With the process or its mapping the registration went away.
            let gone = self.identity.check().is_err() || matches!(self.intact(block), Ok(false));
            if !gone && result.is_ok() {
                result = Err(TrackError::Block {
                    what: "end the registration of",
                    block: block.region.name.clone(),
                    pid: self.pid,
                    source,
                });
            }
        }
        result
    }
}

fn scan_failed(block: &str, pid: i32, source: io::Error) -> TrackError {
    let block = block.to_owned();
    match source.raw_os_error() {
        // PM_SCAN_CHECK_WPASYNC: something else is mapped there now.
        Some(libc::EPERM) => TrackError::Changed { block, pid },
        _ => TrackError::Block { what: "scan", block, pid, source },
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        if let Err(error) = self.unregister_all() {
            tracing::debug!(pid = self.pid, %error, "dirty tracking ended by closing alone");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
