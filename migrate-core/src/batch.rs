//! What travels on a lane: a batch of runs of pages with their versions.
//!
//! A run is a number of consecutive pages that share a kind and a version. The contents of all runs
//! follow one another in run order; packed ([`crate::codec`]) they are the batch's payload. All versions of a page travel on
//! the same lane ([`lane_of`]), so the last one wins; the version proves it (correctness rule 3).

use serde::{Deserialize, Serialize};

use crate::delta::delta_bytes;
use crate::layout::{PAGE_BYTES, PageIndex};

/// Pages in a chunk: all pages of a chunk travel on one lane. 256 KiB keeps writes at the
/// destination long while a few thousand chunks still spread evenly.
pub const CHUNK_PAGES: u64 = 64;

/// Most runs in a batch.
pub const BATCH_RUNS_MAX: usize = 1024;

/// Most bytes of contents in a batch, packed or not.
pub const BATCH_PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Most pages that one run may cover.
pub const RUN_PAGES_MAX: u16 = 1 << 15;

/// Bytes of a reference: the number of a page, little-endian.
pub const REFERENCE_BYTES: usize = size_of::<u64>();

/// Version of a page that left after the guest stopped for good (post-copy): whoever brings it, there
/// is no later one.
pub const LAST_VERSION: u32 = u32::MAX;

/// Most lanes of a session.
pub const LANES_MAX: usize = 64;

/// Bytes of a batch's header on the wire.
pub const BATCH_HEADER_BYTES: usize = 32;

/// Bytes of a run's description on the wire.
pub const RUN_BYTES: usize = 16;

/// Bytes that a batch occupies on its lane. Both ends count with it what is under way.
pub fn wire_bytes(runs: usize, payload_bytes: usize) -> u64 {
    (BATCH_HEADER_BYTES + runs * RUN_BYTES + payload_bytes) as u64
}

/// How a run's pages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RunKind {
    /// Contents follow, [`PAGE_BYTES`] a page.
    Raw,
    /// The pages read as zeros; the destination makes them holes where it can. Also sent for a page
    /// that became a hole or unused after an older version was sent (rules 4 and 14).
    Zero,
    /// Deltas against the version before follow, one a page ([`crate::delta`]).
    Delta,
    /// References follow, [`REFERENCE_BYTES`] a page: the page takes the content that the page named,
    /// another one of the same lane, has at this point of the lane ([`crate::duplicates`]).
    Same,
}

/// Consecutive pages of one kind and version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// First page.
    pub first: PageIndex,
    /// Number of pages, at least 1.
    pub pages: u16,
    /// How they travel.
    pub kind: RunKind,
    /// Version of each of them: 0 is "never sent", the first sending is 1; [`LAST_VERSION`] after the
    /// hand-over.
    pub version: u32,
}

impl PageRun {
    /// Fewest and most bytes that this run takes of the batch's contents.
    pub fn content_bytes(&self) -> (usize, usize) {
        let pages = usize::from(self.pages);
        match self.kind {
            RunKind::Raw => (pages * PAGE_BYTES, pages * PAGE_BYTES),
            RunKind::Zero => (0, 0),
            RunKind::Delta => (pages * delta_bytes(1), pages * delta_bytes(u64::MAX)),
            RunKind::Same => (pages * REFERENCE_BYTES, pages * REFERENCE_BYTES),
        }
    }
}

/// The lane that carries all versions of `page`.
pub fn lane_of(page: PageIndex, lanes: usize) -> usize {
    usize::try_from((page.0 / CHUNK_PAGES) % lanes.max(1) as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_stays_on_its_lane() {
        for page in 0..CHUNK_PAGES {
            assert_eq!(lane_of(PageIndex(page), 3), 0);
        }
        assert_eq!(lane_of(PageIndex(CHUNK_PAGES), 3), 1);
        assert_eq!(lane_of(PageIndex(CHUNK_PAGES), 0), 0);
    }
}
