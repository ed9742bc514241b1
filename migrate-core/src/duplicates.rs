//! Which page was sent last with which content, so that a page that is equal to one already sent
//! travels as a reference to it ([`RunKind::Same`](crate::batch::RunKind::Same)).
//!
//! ```text
//!   hash of a content ─► set of 4 entries (a cache line), the one found last in front
//!                        entry = hash | page | version as which the page was sent
//! ```
//!
//! A reference names a page and means its content as the destination holds it when it comes to the
//! reference. It is made only if all of this is so:
//!
//! - The page named travels on the same lane. A lane's batches are applied in order, and so are the
//!   pages of a batch, so what came before on the lane is in place and nothing else of it is.
//! - It was not sent since: its version is still the one of the entry. An entry of the page that is
//!   to travel is of an earlier version, so no page refers to itself.
//! - It has the same hash, keyed with a secret of the engine, and its content is now the same byte
//!   by byte. What it is now may be newer than what was sent; then the hash speaks for what was sent,
//!   as it does for pages that are called unchanged ([`crate::page_table`]). Where the lines of a page
//!   are hashed anyway ([`crate::bases`]) the hash is one of theirs.
//!
//! Pages that read as zeros are neither kept nor looked for, and a page that became a hole since has
//! another content now. Pages that the destination drops before a hand-over with pages missing are
//! no danger: it has confirmed all batches by then (`Sync`), and no reference is made any more.
//!
//! Invariants: each shard holds the pages of one lane, so encoder threads do not wait for one
//! another; memory is taken once and bounded. An entry that is driven out costs a whole page, which
//! is packed like any other.

use std::sync::{Mutex, PoisonError};

use crate::batch::lane_of;
use crate::layout::PageIndex;

/// Most bytes that the table takes.
pub const DUPLICATES_BYTES_MAX: u64 = 16 << 20;

/// Entries among which the one for a content is looked for.
const WAYS: usize = 4;

/// A page as it was sent. Version 0 is no entry.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    hash: u64,
    /// Pages from 2^32 on (16 TiB) are not kept.
    page: u32,
    version: u32,
}

#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Set([Entry; WAYS]);

const _: () = assert!(size_of::<Set>() == WAYS * size_of::<Entry>(), "a cache line, no padding");

/// What was sent last, by content.
#[derive(Debug)]
pub struct Duplicates {
    shards: Vec<Mutex<Vec<Set>>>,
    memory_bytes: usize,
}

impl Duplicates {
    /// A table for pages that travel on `lanes` lanes, in at most `bytes_max` bytes and
    /// [`DUPLICATES_BYTES_MAX`]; with fewer than 64 bytes a lane no page is found.
    pub fn new(lanes: usize, bytes_max: u64) -> Self {
        let lanes = lanes.max(1);
        let bytes = usize::try_from(bytes_max.min(DUPLICATES_BYTES_MAX)).unwrap_or(0);
        let sets = bytes / size_of::<Set>() / lanes;
        let shards = (0..lanes).map(|_| Mutex::new(vec![Set::default(); sets])).collect();
        Self { shards, memory_bytes: lanes * sets * size_of::<Set>() }
    }

    /// Finds a page of the same lane that was sent with a content of this hash, if it `stands`, which
    /// is asked with its number and version. Else remembers `page`, which is sent as `version`.
    pub fn find_or_keep(
        &self,
        page: PageIndex,
        version: u32,
        hash: u64,
        stands: impl FnOnce(PageIndex, u32) -> bool,
    ) -> Option<PageIndex> {
        let number = u32::try_from(page.0).ok()?;
        let shard = self.shards.get(lane_of(page, self.shards.len()))?;
        let mut sets = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (u128::from(hash) * sets.len() as u128) >> u64::BITS;
        let Set(entries) = sets.get_mut(usize::try_from(at).ok()?)?;
        let known = entries.iter().position(|entry| entry.version > 0 && entry.hash == hash);
        entries.get_mut(..=known.unwrap_or(WAYS - 1))?.rotate_right(1);
        let front = entries.first_mut()?;
        let found = PageIndex(u64::from(front.page));
        if known.is_some() && stands(found, front.version) {
            return Some(found);
        }
        *front = Entry { hash, page: number, version };
        None
    }

    /// Bytes of memory that the table occupies.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// What stands for a content of this hash, or else the page from now on.
    fn send(table: &Duplicates, page: u64, version: u32, hash: u64) -> Option<u64> {
        table.find_or_keep(PageIndex(page), version, hash, |_, _| true).map(|page| page.0)
    }

    proptest! {
        /// With room for few contents, whatever is asked about was sent so, on the same lane.
        #[test]
        fn what_is_found_was_sent_so(sends in prop::collection::vec(
            (0u64..256, 0u64..40, any::<bool>()), 1..400)
        ) {
            let table = Duplicates::new(2, 4 * 64);
            let mut sent: HashMap<(u64, u32), u64> = HashMap::new();
            for (version, (page, content, stands)) in (1..).zip(sends) {
                let hash = content.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut asked = None;
                let found = table.find_or_keep(PageIndex(page), version, hash, |page, version| {
                    asked = Some((page, version));
                    stands
                });
                prop_assert_eq!(found, asked.map(|(page, _)| page).filter(|_| stands));
                if let Some((of, version)) = asked {
                    prop_assert_eq!(sent.get(&(of.0, version)), Some(&hash));
                    prop_assert_eq!(lane_of(of, 2), lane_of(PageIndex(page), 2));
                }
                sent.insert((page, version), hash);
            }
        }
    }

    #[test]
    fn the_first_of_equal_pages_stands_for_them_until_it_does_not() {
        let table = Duplicates::new(1, 1 << 12);
        assert_eq!((send(&table, 3, 1, 77), send(&table, 4, 1, 77)), (None, Some(3)));
        assert_eq!(send(&table, 5, 1, 78), None, "another content");
        assert_eq!(table.find_or_keep(PageIndex(6), 2, 77, |_, _| false), None);
        let asked = |page, version| (page, version) == (PageIndex(6), 2);
        assert_eq!(table.find_or_keep(PageIndex(7), 1, 77, asked), Some(PageIndex(6)));
    }

    #[test]
    fn what_is_found_stays_and_what_is_not_is_driven_out() {
        let table = Duplicates::new(1, 64);
        assert_eq!(send(&table, 0, 1, 100), None);
        for other in 1..50 {
            assert_eq!(send(&table, other, 1, 100 + other), None);
            assert_eq!(send(&table, 99, 1, 100), Some(0), "after {other} others");
        }
        assert_eq!(send(&table, 99, 1, 149), Some(49));
        assert_eq!(send(&table, 99, 1, 101), None, "driven out");
    }

    #[test]
    fn memory_is_bounded() {
        assert_eq!(Duplicates::new(3, 1 << 40).memory_bytes(), (16 << 20) / 192 * 192);
        assert_eq!(Duplicates::new(4, 8 * 1000).memory_bytes(), 31 * 4 * 64);
        let none = Duplicates::new(4, 255);
        assert_eq!(
            (none.memory_bytes(), send(&none, 0, 1, 9), send(&none, 1, 1, 9)),
            (0, None, None)
        );
        // Page numbers that do not fit are not kept.
        let table = Duplicates::new(1, 1 << 12);
        let far = 1 << 32;
        assert_eq!((send(&table, far, 1, 9), send(&table, far + 1, 1, 9)), (None, None));
    }
}
