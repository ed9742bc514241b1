//! Post-copy: the guest runs at the destination, and its last pages follow.
//!
//! At the hand-over the source's memory is frozen, and both ends know the set of pages that the
//! destination lacks. A page outside of it reads as what the destination has, or as zeros. The
//! guest's faults are asked for, the rest is pushed meanwhile (post-copy as Hines and Gopalan,
//! VEE 2009, with their bubbling around the latest faults).
//!
//! ```text
//!   source: PushPlan                             destination: Fetch
//!   requested ◄── request (control stream) ────  fault: Ask
//!       └──────── answer (urgent lane) ───────►  arrived ─► place, wake
//!   next ──────── push (bulk lanes) ──────────►  arrived ─► place, wake
//!                        ╳ link lost
//!   wanted ◄───── what is still missing ───────  reconnected: ask again
//! ```
//!
//! ```text
//!   a host page at the source          a host page at the destination
//!
//!          requested, next                     fault            all parts arrived
//!   unsent ───────────────► sent        missing ────► waiting ─────────────────► arrived
//!      ▲         wanted      │             │                                        ▲
//!      └─────────────────────┘             └────────────────────────────────────────┘
//! ```
//!
//! Invariants: all sets consist of whole host pages (what one `UFFDIO_COPY` places: 4096 bytes, or
//! a page of hugetlbfs). The source sends a page once for each [`PushPlan::new`] or
//! [`PushPlan::wanted`]. The destination asks for no page that is not missing, and says of each page
//! once that it is complete. A host page larger than a batch arrives in parts; its parts are
//! forgotten when the link is lost, since it is wanted as a whole.

mod budget;
mod fetch;
mod push;
pub(crate) mod stalls;
#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one run is meant")]
mod tests;
pub(crate) mod window;

pub use budget::Budget;
pub use fetch::{Arrival, FaultAction, Fetch};
pub use push::{Answer, PushConfig, PushCounts, PushPlan};
pub use stalls::FetchStats;

use std::ops::Range;

use thiserror::Error;

use crate::error::{Classify, ErrorBin};
use crate::layout::{PAGE_BYTES, PageIndex, RamLayout};
use crate::pageset::PageSet;

/// What cannot be part of a post-copy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PostcopyError {
    /// The destination asked for a page that was not missing at the hand-over.
    #[error("{0} was asked for, which is not missing")]
    UnexpectedRequest(PageIndex),
    /// The source sent a page that was not missing, or that no RAM block holds.
    #[error("{0} arrived, which is not missing")]
    UnexpectedPage(PageIndex),
    /// The set of missing pages is for another amount of RAM.
    #[error("The missing pages are of a guest with {set} pages; this one has {ram}")]
    WrongSize {
        /// Pages that the set can hold.
        set: u64,
        /// Pages of the guest.
        ram: u64,
    },
    /// The set of missing pages holds parts of larger pages.
    #[error("The missing pages are not whole host pages")]
    PartialPages,
    /// A fault was reported for a page that no RAM block holds.
    #[error("No RAM block holds {0}")]
    NoSuchPage(PageIndex),
}

impl Classify for PostcopyError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::NoSuchPage(_) => ErrorBin::CallerMisuse,
            _ => ErrorBin::PeerMisbehaved,
        }
    }
}

/// A page of the size that backs its block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPage {
    /// Its pages of [`PAGE_BYTES`].
    pub(crate) pages: Range<u64>,
    /// All pages of its block.
    pub(crate) block: Range<u64>,
}

impl HostPage {
    /// Number of pages of [`PAGE_BYTES`].
    fn len(&self) -> u64 {
        self.pages.end - self.pages.start
    }
}

/// Which pages belong to one host page.
#[derive(Debug, Clone)]
struct HostPages {
    layout: RamLayout,
}

impl HostPages {
    fn new(layout: &RamLayout) -> Self {
        Self { layout: layout.clone() }
    }

    /// The host page that holds `page`, if there is one.
    fn of(&self, page: u64) -> Option<HostPage> {
        let page = PageIndex(page);
        let block = self.layout.block_pages(self.layout.locate(page)?.block);
        Some(HostPage { pages: self.layout.host_page(page)?, block })
    }

    /// The same pages and what their host pages hold besides. Pages outside RAM are left out.
    fn round_up(&self, set: PageSet) -> PageSet {
        let mut rounded = set;
        if rounded.size() != self.layout.pages() {
            let given = rounded;
            rounded = PageSet::new(self.layout.pages());
            given.iter().for_each(|page| rounded.insert(page));
        }
        for (index, spec) in self.layout.blocks().iter().enumerate() {
            let (block, size) =
                (self.layout.block_pages(index), spec.page_bytes / PAGE_BYTES as u64);
            if size == 1 {
                continue;
            }
            let mut next = block.start;
            while let Some(page) = rounded.first_in(next..block.end) {
                let start = page - (page - block.start) % size;
                next = start + size;
                rounded.insert_range(start..next);
            }
        }
        rounded
    }
}

/// Adds `run` to `runs`, joined with the last one if they touch.
pub(crate) fn append(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        Some(last) if run.end == last.start => last.start = run.start,
        _ => runs.push(run),
    }
}
