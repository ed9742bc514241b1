//! What each side knows of every page.
//!
//! The source keeps a version (4 bytes) and, where direct I/O may write behind the tracking's back,
//! a keyed content hash (8 bytes) of what it last sent; what it remembers for deltas is in
//! [`crate::bases`], for references to equal pages in [`crate::duplicates`]. The destination keeps a
//! version (4 bytes).
//! Both tables can be used by several threads at once; a page belongs to one lane and a lane to one
//! thread at a time, so relaxed atomics suffice.
//!
//! Invariants:
//! - Version 0 means "never sent": the page reads as zeros at the destination.
//! - A page that was rewritten with what the destination holds already is not sent again; that it is
//!   the same is said by 64-bit hashes keyed with a secret of the engine.
//! - Every sending raises the version by exactly 1; the destination refuses anything else, which
//!   catches repeated, lost and reordered pages (correctness rule 3).
//! - Both ends agree on all versions at hand-over: [`SourcePages::digest`] equals
//!   [`DestinationPages::digest`]. Each sending adds to the digest, so that asking for it costs nothing
//!   while the guest is stopped.
//! - Entries of pages that were never sent take no memory: the tables begin as zeros of the kernel's.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use thiserror::Error;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::bases::Bases;
use crate::batch::PageRun;
use crate::delta::LINES_CHANGED_MAX;
use crate::duplicates::Duplicates;
use crate::error::{Classify, ErrorBin};
use crate::layout::PageIndex;

/// What to do with a page whose content was just read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageVerdict {
    /// Nothing to send: it was never sent and reads as zeros.
    Keep,
    /// Nothing to send: the destination already holds the same.
    Unchanged,
    /// Tell the destination that the page reads as zeros, as this version.
    Zero(u32),
    /// Send the content as this version.
    Raw(u32),
    /// Send the lines in the mask as this version.
    Delta(u32, u64),
    /// Send a reference to this page as this version.
    Same(u32, PageIndex),
}

/// Bytes a guest page that finding equal pages may take, and the same where every page has a hash:
/// with all other tables of the source they stay below 16.
const DUPLICATES_BYTES_A_PAGE: [u64; 2] = [8, 1];

/// The source's knowledge of every page.
#[derive(Debug)]
pub struct SourcePages {
    versions: Vec<AtomicU32>,
    digest: AtomicU64,
    hashes: Option<Vec<AtomicU64>>,
    hash_seed: u64,
    bases: Option<Bases>,
    duplicates: Option<Duplicates>,
    tells_zeros: bool,
}

impl SourcePages {
    /// A table in which no page was sent yet.
    ///
    /// `hash_seed` must be unpredictable for the guest: with it, contents that collide cannot be
    /// made on purpose. With `keep_hashes` every page has a hash, so that pages that are looked at
    /// again are found unchanged for certain.
    pub fn new(pages: u64, keep_hashes: bool, hash_seed: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self {
            versions: bytemuck::allocation::zeroed_vec(count),
            digest: AtomicU64::new(0),
            hashes: keep_hashes.then(|| bytemuck::allocation::zeroed_vec(count)),
            hash_seed,
            bases: None,
            duplicates: None,
            tells_zeros: false,
        }
    }

    /// The same, but pages of zeros are told of when they come for the first time, too: who is at the
    /// other end does not know by itself what was never sent.
    #[must_use]
    pub fn with_zeros(self) -> Self {
        Self { tells_zeros: true, ..self }
    }

    /// The same versions, but nothing is known of contents any more: whatever page comes next travels
    /// whole, or as zeros, as if it had never been sent (post-copy drops pages at the destination).
    #[must_use]
    pub fn forgetting(self) -> Self {
        Self { hashes: None, bases: None, duplicates: None, tells_zeros: true, ..self }
    }

    /// The same, but pages that travel again on one of `lanes` lanes do so as deltas, for which at
    /// most `bytes_max` bytes of memory are used.
    #[must_use]
    pub fn with_deltas(self, lanes: usize, bytes_max: u64) -> Self {
        let pages = self.versions.len() as u64;
        let bases = Bases::new(pages, lanes, bytes_max, self.hash_seed);
        Self { bases: Some(bases), ..self }
    }

    /// The same, but pages that would travel whole do so as references if they are equal to a page
    /// that was sent before on the same one of `lanes` lanes. Takes 8 bytes of memory a page, 1 if
    /// every page has a hash, and at most [`DUPLICATES_BYTES_MAX`](crate::duplicates::DUPLICATES_BYTES_MAX).
    #[must_use]
    pub fn with_duplicates(self, lanes: usize) -> Self {
        let [alone, beside_hashes] = DUPLICATES_BYTES_A_PAGE;
        let a_page = if self.hashes.is_some() { beside_hashes } else { alone };
        let duplicates = Duplicates::new(lanes, self.versions.len() as u64 * a_page);
        Self { duplicates: Some(duplicates), ..self }
    }

    /// Decides about a page from a private copy of its content (correctness rule 2) and records the
    /// decision as sent. `is_equal` says whether another page has the same content now; it is asked
    /// only if that page was sent with a content of the same hash. Pages outside the table are kept.
    pub fn judge(
        &self,
        page: PageIndex,
        content: &[u8],
        is_equal: impl FnOnce(PageIndex) -> bool,
    ) -> PageVerdict {
        let index = page.0 as usize;
        let Some(slot) = self.versions.get(index) else { return PageVerdict::Keep };
        let version = slot.load(Ordering::Relaxed);
        let zero = is_zero(content);
        let sent = version > 0;
        if zero && !sent && !self.tells_zeros {
            return PageVerdict::Keep;
        }
        // What never held anything needs no base.
        let bases = self.bases.as_ref().filter(|_| sent || !zero);
        let changed = bases.and_then(|bases| bases.replace(page, content, sent));
        let hash = self.hashes.is_some().then(|| self.hash(content));
        let same_hash = hash.is_some_and(|hash| self.replace_hash(index, hash));
        if sent && (same_hash || changed == Some(0)) {
            return PageVerdict::Unchanged;
        }
        let next = version.wrapping_add(1);
        slot.store(next, Ordering::Relaxed);
        self.digest.fetch_add(sending(page, next), Ordering::Relaxed);
        match changed {
            _ if zero => PageVerdict::Zero(next),
            Some(mask) if sent && mask.count_ones() <= LINES_CHANGED_MAX => {
                PageVerdict::Delta(next, mask)
            }
            _ => {
                let hash = || hash.unwrap_or_else(|| self.digest_of(page, content));
                let equal = self.find_equal(page, next, hash, is_equal);
                equal.map_or(PageVerdict::Raw(next), |of| PageVerdict::Same(next, of))
            }
        }
    }

    /// Whether any version of a page was sent.
    pub fn was_sent(&self, page: PageIndex) -> bool {
        let slot = usize::try_from(page.0).ok().and_then(|index| self.versions.get(index));
        slot.is_some_and(|version| version.load(Ordering::Relaxed) > 0)
    }

    /// A page that stands for `page`, which is sent as `version`, at the destination; if there is none,
    /// `page` will for others.
    fn find_equal(
        &self,
        page: PageIndex,
        version: u32,
        hash: impl FnOnce() -> u64,
        is_equal: impl FnOnce(PageIndex) -> bool,
    ) -> Option<PageIndex> {
        let duplicates = self.duplicates.as_ref()?;
        duplicates.find_or_keep(page, version, hash(), |of, sent_as| {
            let held = self.versions.get(of.0 as usize).map(|slot| slot.load(Ordering::Relaxed));
            held == Some(sent_as) && is_equal(of)
        })
    }

    /// A hash of a page's content, made of those of its lines where there are any: equal pages of
    /// which only one has them are not found.
    fn digest_of(&self, page: PageIndex, content: &[u8]) -> u64 {
        let digest = self.bases.as_ref().and_then(|bases| bases.digest(page));
        digest.unwrap_or_else(|| self.hash(content))
    }

    fn hash(&self, content: &[u8]) -> u64 {
        xxh3_64_with_seed(content, self.hash_seed)
    }

    /// Keeps the hash of what is sent; says whether it is the one kept before.
    fn replace_hash(&self, index: usize, hash: u64) -> bool {
        let Some(slot) = self.hashes.as_ref().and_then(|hashes| hashes.get(index)) else {
            return false;
        };
        let before = slot.load(Ordering::Relaxed);
        slot.store(hash, Ordering::Relaxed);
        before == hash
    }

    /// Digest of all versions, comparable with [`DestinationPages::digest`].
    pub fn digest(&self) -> u64 {
        self.digest.load(Ordering::Relaxed)
    }

    /// Bytes of memory that deltas take at this moment.
    pub fn delta_memory_bytes(&self) -> u64 {
        self.bases.as_ref().map_or(0, Bases::memory_bytes)
    }

    /// Bytes of memory that the table occupies, without what deltas take.
    pub fn memory_bytes(&self) -> usize {
        self.versions.len() * size_of::<AtomicU32>()
            + self.hashes.as_ref().map_or(0, |hashes| hashes.len() * size_of::<AtomicU64>())
            + self.duplicates.as_ref().map_or(0, Duplicates::memory_bytes)
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
    digest: AtomicU64,
}

impl DestinationPages {
    /// A table in which no page arrived yet.
    pub fn new(pages: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self { versions: bytemuck::allocation::zeroed_vec(count), digest: AtomicU64::new(0) }
    }

    /// Checks that a run from the wire continues what is held, and records it.
    ///
    /// # Errors
    /// [`VersionError`] if a page does not exist or its version is not the next one. Pages of the
    /// run before the offending one are recorded; the session must end.
    pub fn accept(&self, run: &PageRun) -> Result<(), VersionError> {
        let mut digest = 0u64;
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
            digest = digest.wrapping_add(sending(page, want));
        }
        self.digest.fetch_add(digest, Ordering::Relaxed);
        Ok(())
    }

    /// The version held of a page: 0 if it never came, nothing if it lies outside the agreed RAM.
    pub fn version(&self, page: PageIndex) -> Option<u32> {
        let slot = usize::try_from(page.0).ok().and_then(|index| self.versions.get(index))?;
        Some(slot.load(Ordering::Relaxed))
    }

    /// Digest of all versions, comparable with [`SourcePages::digest`].
    pub fn digest(&self) -> u64 {
        self.digest.load(Ordering::Relaxed)
    }
}

/// Whether a page reads as zeros.
pub fn is_zero(content: &[u8]) -> bool {
    let (blocks, tail) = content.as_chunks::<64>();
    let words = |block: &[u8; 64]| block.iter().fold(0u8, |all, byte| all | byte) == 0;
    blocks.iter().all(words) && tail.iter().all(|byte| *byte == 0)
}

/// What sending a page as this version adds to the digest of all versions.
fn sending(page: PageIndex, version: u32) -> u64 {
    let mut bytes = [0; size_of::<u64>() + size_of::<u32>()];
    let (number, rest) = bytes.split_at_mut(size_of::<u64>());
    number.copy_from_slice(&page.0.to_le_bytes());
    rest.copy_from_slice(&version.to_le_bytes());
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bases::SLOT_BYTES;
    use crate::batch::{RunKind, lane_of};
    use crate::delta::{LINE_BYTES, LINES};
    use crate::layout::PAGE_BYTES;

    /// Judges with the word that pages with the same hash are equal.
    fn judge(table: &SourcePages, page: u64, content: &[u8]) -> PageVerdict {
        table.judge(PageIndex(page), content, |_| true)
    }

    #[test]
    fn never_sent_zero_pages_are_not_sent() {
        let table = SourcePages::new(1, true, 1);
        assert_eq!(judge(&table, 0, &[0; PAGE_BYTES]), PageVerdict::Keep);
        assert_eq!(judge(&table, 9, &[1; PAGE_BYTES]), PageVerdict::Keep);
    }

    #[test]
    fn a_page_that_became_zero_is_told_once() {
        for table in
            [SourcePages::new(1, true, 1), SourcePages::new(1, false, 1).with_deltas(1, 1 << 20)]
        {
            assert_eq!(judge(&table, 0, &[1; PAGE_BYTES]), PageVerdict::Raw(1));
            assert_eq!(judge(&table, 0, &[0; PAGE_BYTES]), PageVerdict::Zero(2));
            assert_eq!(judge(&table, 0, &[0; PAGE_BYTES]), PageVerdict::Unchanged);
        }
        // Without a memory of contents it is told again.
        let table = SourcePages::new(1, false, 1);
        judge(&table, 0, &[1; PAGE_BYTES]);
        assert_eq!(judge(&table, 0, &[0; PAGE_BYTES]), PageVerdict::Zero(2));
        assert_eq!(judge(&table, 0, &[0; PAGE_BYTES]), PageVerdict::Zero(3));
    }

    #[test]
    fn few_changed_lines_travel_alone() {
        let table = SourcePages::new(1, false, 1).with_deltas(1, 1 << 20);
        let mut content = [1; PAGE_BYTES];
        assert_eq!(judge(&table, 0, &content), PageVerdict::Raw(1));
        content[70] = 2;
        content[4095] = 2;
        let mask = 1 << 1 | 1 << 63;
        assert_eq!(judge(&table, 0, &content), PageVerdict::Delta(2, mask));
        assert_eq!(judge(&table, 0, &content), PageVerdict::Unchanged);
        assert_eq!(judge(&table, 0, &[3; PAGE_BYTES]), PageVerdict::Raw(3));
        assert_eq!(judge(&table, 0, &[0; PAGE_BYTES]), PageVerdict::Zero(4));
        // The destination reads zeros, which is a base as any other.
        let mut content = [0; PAGE_BYTES];
        content[0] = 1;
        assert_eq!(judge(&table, 0, &content), PageVerdict::Delta(5, 1));
    }

    #[test]
    fn what_was_forgotten_travels_whole_again() {
        let table = SourcePages::new(2, true, 1).with_deltas(1, 1 << 20).with_duplicates(1);
        let content = [1; PAGE_BYTES];
        assert_eq!(judge(&table, 0, &content), PageVerdict::Raw(1));
        assert_eq!(judge(&table, 0, &content), PageVerdict::Unchanged);
        let digest = table.digest();
        let table = table.forgetting();
        assert_eq!(table.digest(), digest);
        assert_eq!(judge(&table, 0, &content), PageVerdict::Raw(2));
        assert_eq!(judge(&table, 1, &content), PageVerdict::Raw(1));
        let table = table.forgetting();
        assert_eq!(judge(&table, 1, &[0; PAGE_BYTES]), PageVerdict::Zero(2));
        assert_eq!(judge(&table, 1, &[0; PAGE_BYTES]), PageVerdict::Zero(3));
        assert_eq!(table.delta_memory_bytes(), 0);
    }

    #[test]
    fn a_reference_names_a_page_that_still_holds_the_content() {
        for hashes in [false, true] {
            let table = SourcePages::new(1 << 10, hashes, 1).with_duplicates(1);
            let one = [1; PAGE_BYTES];
            assert_eq!(judge(&table, 0, &one), PageVerdict::Raw(1));
            assert_eq!(judge(&table, 1, &one), PageVerdict::Same(1, PageIndex(0)));
            // The guest has written page 0 meanwhile: who knows what it holds there.
            let written = table.judge(PageIndex(2), &one, |of| {
                assert_eq!(of, PageIndex(0));
                false
            });
            assert_eq!(written, PageVerdict::Raw(1), "it stands for the content from now on");
            assert_eq!(judge(&table, 3, &one), PageVerdict::Same(1, PageIndex(2)));
            // Page 2 was sent since, so nobody is asked.
            assert_eq!(judge(&table, 2, &[2; PAGE_BYTES]), PageVerdict::Raw(2));
            assert_eq!(judge(&table, 4, &one), PageVerdict::Raw(1));
            assert_eq!(judge(&table, 4, &[0; PAGE_BYTES]), PageVerdict::Zero(2));
            assert_eq!(judge(&table, 3, &[3; PAGE_BYTES]), PageVerdict::Raw(2));
            // Its own entry is of an earlier version, and the zeros that it became are no entry.
            assert_eq!(judge(&table, 4, &one), PageVerdict::Raw(3));
            assert_eq!(judge(&table, 3, &[0; PAGE_BYTES]), PageVerdict::Zero(3));
            assert_eq!(judge(&table, 5, &[2; PAGE_BYTES]), PageVerdict::Same(1, PageIndex(2)));
        }
    }

    #[test]
    fn tables_keep_within_sixteen_bytes_a_page() {
        const PAGES: u64 = 1 << 16;
        // Heat, and at most 15 sets of a bit a page, are kept elsewhere.
        let elsewhere = 1.0 + 15.0 / 8.0;
        for hashes in [false, true] {
            let table = SourcePages::new(PAGES, hashes, 1).with_duplicates(4);
            let bytes = table.memory_bytes() as f64 / PAGES as f64;
            assert!(bytes + elsewhere <= 16.0 && bytes > 12.0 - 0.1, "{bytes} of {hashes}");
        }
    }

    #[test]
    fn the_digest_tells_which_pages_came_how_often() {
        let digest = |runs: &[(u64, u16, u32)]| {
            let table = DestinationPages::new(8);
            for (first, pages, version) in runs.iter().copied() {
                let first = PageIndex(first);
                table.accept(&PageRun { first, pages, kind: RunKind::Zero, version }).unwrap();
            }
            table.digest()
        };
        assert_eq!(digest(&[]), 0);
        assert_eq!(digest(&[(0, 2, 1), (1, 1, 2)]), digest(&[(1, 1, 1), (1, 1, 2), (0, 1, 1)]));
        let others = [digest(&[(0, 1, 1)]), digest(&[(1, 1, 1)]), digest(&[(0, 1, 1), (0, 1, 2)])];
        assert!(others[0] != others[1] && others[1] != others[2] && others[0] != others[2]);
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
        assert_eq!([0, 1, 2].map(|page| table.version(PageIndex(page))), [Some(0), Some(2), None]);
    }

    /// The model: a guest of a few pages, of which each line holds one byte value; random writes,
    /// some of them unseen by the tracking, sends and looks. What the destination holds must equal
    /// the guest.
    #[derive(Debug, Clone)]
    enum Op {
        Write { page: usize, lines: std::ops::Range<usize>, value: u8, seen: bool },
        Send,
        Look,
    }

    fn op() -> impl Strategy<Value = Op> {
        let write = (0..PAGES, 0..LINES, 1..=LINES, 0u8..3, any::<bool>());
        let write = write.prop_map(|(page, first, lines, value, seen)| Op::Write {
            page,
            lines: first..(first + lines).min(LINES),
            value,
            seen,
        });
        prop_oneof![2 => write, 1 => Just(Op::Send), 1 => Just(Op::Look)]
    }

    const PAGES: usize = 130;

    type Memory = Vec<[u8; LINES]>;

    fn transfer(
        source: &SourcePages,
        destination: &DestinationPages,
        guest: &Memory,
        there: &mut Memory,
        page: usize,
    ) {
        let content: Vec<u8> = guest[page].iter().flat_map(|value| [*value; LINE_BYTES]).collect();
        let index = PageIndex(page as u64);
        let (kind, version, mask) =
            match source.judge(index, &content, |of| guest[of.0 as usize] == guest[page]) {
                PageVerdict::Keep | PageVerdict::Unchanged => return,
                PageVerdict::Zero(version) => (RunKind::Zero, version, u64::MAX),
                PageVerdict::Raw(version) => (RunKind::Raw, version, u64::MAX),
                PageVerdict::Delta(version, mask) => (RunKind::Delta, version, mask),
                PageVerdict::Same(version, of) => {
                    assert!(destination.version(of) > Some(0) && of != index);
                    assert_eq!(lane_of(of, 2), lane_of(index, 2));
                    destination
                        .accept(&PageRun { first: index, pages: 1, kind: RunKind::Same, version })
                        .unwrap();
                    there[page] = there[of.0 as usize];
                    return;
                }
            };
        destination.accept(&PageRun { first: index, pages: 1, kind, version }).unwrap();
        for line in (0..LINES).filter(|line| mask >> line & 1 == 1) {
            there[page][line] = if kind == RunKind::Zero { 0 } else { guest[page][line] };
        }
    }

    proptest! {
        #[test]
        fn the_destination_equals_the_guest(
            ops in prop::collection::vec(op(), 0..80),
            hashes in any::<bool>(),
            slots in 0u64..5,
            duplicates in any::<bool>(),
        ) {
            let source = SourcePages::new(PAGES as u64, hashes, 42);
            let mut source = source.with_deltas(2, slots * SLOT_BYTES);
            if duplicates {
                source = source.with_duplicates(2);
            }
            let destination = DestinationPages::new(PAGES as u64);
            let mut guest: Memory = vec![[0; LINES]; PAGES];
            let (mut there, mut dirty) = (guest.clone(), [false; PAGES]);
            for op in ops.into_iter().chain([Op::Send, Op::Look]) {
                match op {
                    Op::Write { page, lines, value, seen } => {
                        guest[page][lines].fill(value);
                        dirty[page] |= seen;
                    }
                    Op::Send => for (page, dirty) in dirty.iter_mut().enumerate() {
                        if std::mem::take(dirty) {
                            transfer(&source, &destination, &guest, &mut there, page);
                        }
                    },
                    Op::Look => for page in 0..PAGES {
                        transfer(&source, &destination, &guest, &mut there, page);
                    },
                }
            }
            prop_assert_eq!(guest, there);
            prop_assert_eq!(source.digest(), destination.digest());
        }
    }
}
