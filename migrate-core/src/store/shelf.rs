//! The pages of one guest: where each lies, and what they take.
//!
//! Invariant: a page is on the shelf with one content and its version, those that were put last.

use std::collections::BTreeMap;
use std::ops::Range;

use super::arena::{Arena, NoMemory, Slot};
use crate::layout::PAGE_BYTES;

/// Bytes that one call moves to give memory back, at most.
const TIDY_BYTES: usize = 64 << 10;

/// Where a page's content lies, how long it is, its version, and when it was put.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Nothing for a page of zeros.
    slot: Option<Slot>,
    bytes: u16,
    stamp: Stamp,
    version: u64,
}

/// Tells contents of a page that were put at different times apart, unless 2^32 were put in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamp(u32);

/// The pages of one guest.
#[derive(Debug)]
pub struct Shelf {
    entries: BTreeMap<u64, Entry>,
    arena: Arena,
    stamp: Stamp,
    content_bytes: u64,
}

impl Shelf {
    /// An empty shelf for at most `pages_max` pages; who puts them sees to that.
    pub fn new(pages_max: u64) -> Self {
        Self {
            entries: BTreeMap::new(),
            arena: Arena::new(bytes_of(pages_max)),
            stamp: Stamp::default(),
            content_bytes: 0,
        }
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the contents as they are kept.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Bytes of memory for contents, with what is free in between.
    pub fn memory_bytes(&self) -> u64 {
        self.arena.memory_bytes()
    }

    /// Whether a page is there.
    pub fn contains(&self, page: u64) -> bool {
        self.entries.contains_key(&page)
    }

    /// Puts a page's content as it is kept (see [`super::content`]) and its version, in the place of
    /// earlier ones, even of a higher version.
    ///
    /// # Errors
    /// [`NoMemory`]; the page is not there then.
    pub fn put(&mut self, page: u64, kept: &[u8], version: u64) -> Result<(), NoMemory> {
        self.remove(page);
        let entries = &mut self.entries;
        let slot = match kept.len() {
            0 => None,
            bytes => Some(self.arena.allocate(page, bytes, |page, slot| {
                move_entry(entries, page, slot);
            })?),
        };
        if let Some(slot) = slot
            && let Some(place) = self.arena.bytes_mut(slot).get_mut(..kept.len())
        {
            place.copy_from_slice(kept);
        }
        self.stamp = Stamp(self.stamp.0.wrapping_add(1));
        self.content_bytes += kept.len() as u64;
        let bytes = u16::try_from(kept.len()).map_err(|_| NoMemory)?;
        self.entries.insert(page, Entry { slot, bytes, stamp: self.stamp, version });
        Ok(())
    }

    /// When a page was put, if it is there.
    pub fn stamp(&self, page: u64) -> Option<Stamp> {
        self.entries.get(&page).map(|entry| entry.stamp)
    }

    /// The pages from `from_page` on in ascending order, each with its version.
    pub fn versions(&self, from_page: u64) -> impl Iterator<Item = (u64, u64)> {
        self.entries.range(from_page..).map(|(page, entry)| (*page, entry.version))
    }

    /// A page's content as it is kept, if it is there.
    pub fn get(&self, page: u64) -> Option<&[u8]> {
        let entry = self.entries.get(&page)?;
        let Some(slot) = entry.slot else { return Some(&[]) };
        self.arena.bytes(slot).get(..usize::from(entry.bytes))
    }

    /// Drops a page. Whether it was there.
    pub fn remove(&mut self, page: u64) -> bool {
        let Some(entry) = self.entries.remove(&page) else { return false };
        if let Some(slot) = entry.slot {
            self.arena.free(slot);
        }
        self.content_bytes -= u64::from(entry.bytes);
        true
    }

    /// Drops pages of a range, `most` at most. Returns from where on it is to go on, if it is.
    pub fn remove_some(&mut self, range: Range<u64>, most: usize) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        let pages: Vec<u64> =
            self.entries.range(range.clone()).take(most).map(|(page, _)| *page).collect();
        pages.iter().for_each(|page| {
            self.remove(*page);
        });
        let next = pages.last()?.saturating_add(1);
        (pages.len() == most && next < range.end).then_some(next)
    }

    /// Gives memory back where much of it is free, a little at a time.
    pub fn tidy(&mut self) {
        for _ in 0..TIDY_BYTES / PAGE_BYTES {
            let Some((page, slot)) = self.arena.tidy() else { return };
            move_entry(&mut self.entries, page, slot);
        }
    }

    /// Changes how many pages there may be, no fewer than there are, and gives back memory that is too
    /// much for them, a little at a time. Whether this is to be called again.
    #[must_use]
    pub fn fit(&mut self, pages_max: u64) -> bool {
        for _ in 0..TIDY_BYTES / PAGE_BYTES {
            let Some((page, slot)) = self.arena.fit(bytes_of(pages_max)) else { return false };
            move_entry(&mut self.entries, page, slot);
        }
        true
    }
}

fn bytes_of(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES as u64)
}

fn move_entry(entries: &mut BTreeMap<u64, Entry>, page: u64, slot: Slot) {
    if let Some(entry) = entries.get_mut(&page) {
        entry.slot = Some(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::super::arena::{CHUNK_BYTES, SLACK_BYTES};
    use super::*;

    /// A content of a length that no other page has at the same time.
    fn kept(page: u64, bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (page as usize * 7 + at * 3 + bytes) as u8).collect()
    }

    fn check(shelf: &Shelf, expected: &BTreeMap<u64, usize>) {
        assert_eq!(shelf.len(), expected.len() as u64);
        assert_eq!(shelf.content_bytes(), expected.values().map(|bytes| *bytes as u64).sum());
        for (page, bytes) in expected {
            assert_eq!(shelf.get(*page).unwrap(), kept(*page, *bytes), "page {page}");
        }
    }

    #[test]
    fn dropped_memory_is_given_back() {
        let mut shelf = Shelf::new(10_000);
        let mut expected = BTreeMap::new();
        for page in 0..4096 {
            shelf.put(page, &kept(page, PAGE_BYTES), 1).unwrap();
            expected.insert(page, PAGE_BYTES);
        }
        assert_eq!(shelf.memory_bytes(), 4096 * PAGE_BYTES as u64);
        check(&shelf, &expected);
        // Here and there: no chunk is empty by itself.
        for page in (0..4096).filter(|page| page % 8 != 3) {
            assert!(shelf.remove(page));
            expected.remove(&page);
            shelf.tidy();
        }
        check(&shelf, &expected);
        assert!(shelf.memory_bytes() <= 4 * CHUNK_BYTES as u64, "{}", shelf.memory_bytes());
        let mut next = Some(0);
        while let Some(from) = next {
            next = shelf.remove_some(from..10_000, 100);
        }
        assert_eq!((shelf.len(), shelf.content_bytes(), shelf.memory_bytes()), (0, 0, 0));
    }

    /// Contents of one length after those of another leave holes that no other length fills.
    #[test]
    fn memory_stays_within_what_is_reserved() {
        const PAGES: u64 = 4096;
        let mut shelf = Shelf::new(PAGES);
        let mut expected = BTreeMap::new();
        let mut most = 0;
        for (round, bytes) in [400, 900, 1500, 2000, 3000, 4096, 3000, 700].into_iter().enumerate()
        {
            // One in a chunk's worth stays.
            for page in (0..PAGES).filter(|page| page % 511 != round as u64) {
                shelf.put(page, &kept(page, bytes), 1).unwrap();
                expected.insert(page, bytes);
                most = most.max(shelf.memory_bytes());
            }
            check(&shelf, &expected);
        }
        assert!(most <= PAGES * PAGE_BYTES as u64 + SLACK_BYTES, "{most}");
    }

    #[test]
    fn a_page_that_was_put_again_has_another_stamp() {
        let mut shelf = Shelf::new(10);
        shelf.put(3, &[1; 100], 1).unwrap();
        let first = shelf.stamp(3).unwrap();
        shelf.put(4, &[1; 100], 1).unwrap();
        assert_eq!(shelf.stamp(3), Some(first));
        shelf.remove(3);
        assert_eq!(shelf.stamp(3), None);
        shelf.put(3, &[], 1).unwrap();
        assert_ne!(shelf.stamp(3), Some(first));
        assert_eq!((shelf.get(3), shelf.get(5)), (Some(&[][..]), None));
    }
}
