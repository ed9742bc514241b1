//! What each side knows of every page.
//!
//! The source keeps a version (4 bytes) and, where direct I/O may write behind the tracking's back,
//! a keyed content hash (8 bytes) of what it last sent. The destination keeps a version (4 bytes).
//! Both tables can be used by several threads at once; a page belongs to one lane and a lane to one
//! thread at a time, so relaxed atomics suffice.
//!
//! Invariants:
//! - Version 0 means "never sent": the page reads as zeros at the destination.
//! - Every sending raises the version by exactly 1; the destination refuses anything else, which
//!   catches repeated, lost and reordered pages (correctness rule 3).
//! - Both ends agree on all versions at hand-over: [`SourcePages::digest`] equals
//!   [`DestinationPages::digest`].

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thiserror::Error;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64_with_seed};

use crate::batch::PageRun;
use crate::error::{Classify, ErrorBin};
use crate::layout::PageIndex;

/// What to do with a page whose content was just read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageVerdict {
    /// Nothing to send: the destination already reads the same.
    Keep,
    /// Tell the destination that the page reads as zeros, as this version.
    Zero(u32),
    /// Send the content as this version.
    Raw(u32),
}

/// Why a page is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It was reported written: send it whatever it holds.
    Dirty,
    /// It may have changed without a report: send it only if its content differs.
    Look,
}

/// The source's knowledge of every page.
#[derive(Debug)]
pub struct SourcePages {
    versions: Vec<AtomicU32>,
    hashes: Option<Vec<AtomicU64>>,
    hash_seed: u64,
}

impl SourcePages {
    /// A table in which no page was sent yet.
    ///
    /// `hash_seed` must be unpredictable for the guest: with it, contents that collide cannot be
    /// made on purpose. With `keep_hashes` the table can answer [`Reason::Look`].
    pub fn new(pages: u64, keep_hashes: bool, hash_seed: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self {
            versions: (0..count).map(|_| AtomicU32::new(0)).collect(),
            hashes: keep_hashes.then(|| (0..count).map(|_| AtomicU64::new(0)).collect()),
            hash_seed,
        }
    }

    /// Decides about a page from a private copy of its content (correctness rule 2) and records the
    /// decision as sent. Pages outside the table are kept.
    pub fn judge(&self, page: PageIndex, content: &[u8], reason: Reason) -> PageVerdict {
        let index = page.0 as usize;
        let Some(slot) = self.versions.get(index) else { return PageVerdict::Keep };
        let version = slot.load(Ordering::Relaxed);
        let zero = is_zero(content);
        if zero && version == 0 {
            return PageVerdict::Keep;
        }
        if let Some(hash_slot) = self.hashes.as_ref().and_then(|hashes| hashes.get(index)) {
            let hash = xxh3_64_with_seed(content, self.hash_seed);
            if version > 0 && reason == Reason::Look && hash_slot.load(Ordering::Relaxed) == hash {
                return PageVerdict::Keep;
            }
            hash_slot.store(hash, Ordering::Relaxed);
        }
        let next = version.wrapping_add(1);
        slot.store(next, Ordering::Relaxed);
        if zero { PageVerdict::Zero(next) } else { PageVerdict::Raw(next) }
    }

    /// Digest of all versions, comparable with [`DestinationPages::digest`].
    pub fn digest(&self) -> u64 {
        digest(&self.versions)
    }

    /// Bytes of memory that the table occupies.
    pub fn memory_bytes(&self) -> usize {
        self.versions.len() * size_of::<AtomicU32>()
            + self.hashes.as_ref().map_or(0, |hashes| hashes.len() * size_of::<AtomicU64>())
    }
}

/// A run that does not continue what was received before.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VersionError {
    /// The page lies outside the agreed RAM.
    #[error("{page} lies outside the guest's RAM of {pages} pages")]
    OutOfRange {
        /// The page named.
        page: PageIndex,
        /// Number of pages that exist.
        pages: u64,
    },
    /// The version does not follow the one held.
    #[error("{page} came as version {got}, version {want} was due: repeated, lost or reordered")]
    OutOfOrder {
        /// The page named.
        page: PageIndex,
        /// Version that came.
        got: u32,
        /// Version that was due.
        want: u32,
    },
}

impl Classify for VersionError {
    fn bin(&self) -> ErrorBin {
        ErrorBin::PeerMisbehaved
    }
}

/// The destination's knowledge of every page.
#[derive(Debug)]
pub struct DestinationPages {
    versions: Vec<AtomicU32>,
}

impl DestinationPages {
    /// A table in which no page arrived yet.
    pub fn new(pages: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self { versions: (0..count).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Checks that a run from the wire continues what is held, and records it.
    ///
    /// # Errors
    /// [`VersionError`] if a page does not exist or its version is not the next one. Pages of the
    /// run before the offending one are recorded; the session must end.
    pub fn accept(&self, run: &PageRun) -> Result<(), VersionError> {
        for page in (run.first.0..).take(usize::from(run.pages)) {
            let slot = usize::try_from(page).ok().and_then(|index| self.versions.get(index));
            let page = PageIndex(page);
            let slot =
                slot.ok_or(VersionError::OutOfRange { page, pages: self.versions.len() as u64 })?;
            let want = slot.load(Ordering::Relaxed).wrapping_add(1);
            if run.version != want {
                return Err(VersionError::OutOfOrder { page, got: run.version, want });
            }
            slot.store(want, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Digest of all versions, comparable with [`SourcePages::digest`].
    pub fn digest(&self) -> u64 {
        digest(&self.versions)
    }
}

/// Whether a page reads as zeros.
pub fn is_zero(content: &[u8]) -> bool {
    let (blocks, tail) = content.as_chunks::<64>();
    let words = |block: &[u8; 64]| block.iter().fold(0u8, |all, byte| all | byte) == 0;
    blocks.iter().all(words) && tail.iter().all(|byte| *byte == 0)
}

fn digest(versions: &[AtomicU32]) -> u64 {
    let mut hasher = Xxh3Default::new();
    let mut buffer = [0u8; 4096];
    for group in versions.chunks(buffer.len() / 4) {
        for (bytes, version) in buffer.as_chunks_mut::<4>().0.iter_mut().zip(group) {
            *bytes = version.load(Ordering::Relaxed).to_le_bytes();
        }
        hasher.update(buffer.get(..group.len() * 4).unwrap_or(&[]));
    }
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::batch::RunKind;
    use crate::layout::PAGE_BYTES;

    #[test]
    fn never_sent_zero_pages_are_not_sent() {
        let table = SourcePages::new(1, true, 1);
        assert_eq!(table.judge(PageIndex(0), &[0; PAGE_BYTES], Reason::Dirty), PageVerdict::Keep);
        assert_eq!(table.judge(PageIndex(9), &[1; PAGE_BYTES], Reason::Dirty), PageVerdict::Keep);
    }

    #[test]
    fn a_page_that_became_zero_is_told() {
        let table = SourcePages::new(1, true, 1);
        assert_eq!(table.judge(PageIndex(0), &[1; PAGE_BYTES], Reason::Dirty), PageVerdict::Raw(1));
        assert_eq!(table.judge(PageIndex(0), &[0; PAGE_BYTES], Reason::Look), PageVerdict::Zero(2));
        assert_eq!(table.judge(PageIndex(0), &[0; PAGE_BYTES], Reason::Look), PageVerdict::Keep);
        assert_eq!(
            table.judge(PageIndex(0), &[0; PAGE_BYTES], Reason::Dirty),
            PageVerdict::Zero(3)
        );
    }

    #[test]
    fn repeats_and_gaps_are_refused() {
        let table = DestinationPages::new(2);
        let run = |version| PageRun { first: PageIndex(1), pages: 1, kind: RunKind::Raw, version };
        table.accept(&run(1)).unwrap();
        assert!(matches!(table.accept(&run(1)), Err(VersionError::OutOfOrder { want: 2, .. })));
        assert!(matches!(table.accept(&run(3)), Err(VersionError::OutOfOrder { .. })));
        let outside = PageRun { first: PageIndex(1), pages: 2, kind: RunKind::Zero, version: 2 };
        assert!(matches!(table.accept(&outside), Err(VersionError::OutOfRange { .. })));
    }

    /// The model: a guest of a few pages, each holding one byte value; random writes, some of them
    /// unseen by the tracking, sends and looks. What the destination holds must equal the guest.
    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, u8),
        WriteUnseen(u64, u8),
        Send,
        Look,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0u64..8, 0u8..3).prop_map(|(page, value)| Op::Write(page, value)),
            (0u64..8, 0u8..3).prop_map(|(page, value)| Op::WriteUnseen(page, value)),
            Just(Op::Send),
            Just(Op::Look),
        ]
    }

    fn transfer(
        source: &SourcePages,
        destination: &DestinationPages,
        guest: &[u8; 8],
        there: &mut [u8; 8],
        page: u64,
        reason: Reason,
    ) {
        let content = [guest[page as usize]; PAGE_BYTES];
        let (kind, version) = match source.judge(PageIndex(page), &content, reason) {
            PageVerdict::Keep => return,
            PageVerdict::Zero(version) => (RunKind::Zero, version),
            PageVerdict::Raw(version) => (RunKind::Raw, version),
        };
        destination.accept(&PageRun { first: PageIndex(page), pages: 1, kind, version }).unwrap();
        there[page as usize] = if kind == RunKind::Zero { 0 } else { content[0] };
    }

    proptest! {
        #[test]
        fn the_destination_equals_the_guest(ops in prop::collection::vec(op(), 0..80)) {
            let (source, destination) = (SourcePages::new(8, true, 42), DestinationPages::new(8));
            let (mut guest, mut there, mut dirty) = ([0u8; 8], [0u8; 8], [false; 8]);
            for op in ops.into_iter().chain([Op::Send, Op::Look]) {
                match op {
                    Op::Write(page, value) => {
                        guest[page as usize] = value;
                        dirty[page as usize] = true;
                    }
                    Op::WriteUnseen(page, value) => guest[page as usize] = value,
                    Op::Send => for page in 0..8 {
                        if std::mem::take(&mut dirty[page as usize]) {
                            transfer(&source, &destination, &guest, &mut there, page, Reason::Dirty);
                        }
                    },
                    Op::Look => for page in 0..8 {
                        transfer(&source, &destination, &guest, &mut there, page, Reason::Look);
                    },
                }
            }
            prop_assert_eq!(guest, there);
            prop_assert_eq!(source.digest(), destination.digest());
        }
    }
}
