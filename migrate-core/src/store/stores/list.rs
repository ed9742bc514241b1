//! What a store holds, listed part by part with versions.
//!
//! A list of a large store takes a while. So a part ends after so many entries or pages, and the store's
//! lock is given back in between: what others put and drop meanwhile may be listed or not.
//!
//! Invariants: a part's pages are in ascending order, and none is in it twice; a part with which the list
//! does not end has an entry.

use std::time::Duration;

use super::OpenStore;
use crate::store::error::StoreError;
use crate::store::names::{Extent, LIST_ENTRIES_MAX};

/// Pages that are listed under one lock.
const LOCK_PAGES: usize = 1024;

/// Locks that one part takes: it ends after 2^20 pages, within the time that callers wait.
const LOCKS_MAX: usize = 1024;

/// A part of the list of a store's pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Pages in ascending order and their version; those that follow one another with one version share
    /// an entry.
    pub entries: Vec<(Extent, u64)>,
    /// Where to go on, if there is more.
    pub next_page: Option<u64>,
}

impl Listing {
    /// Adds a page behind all others. False, and it is not added, if that takes one entry too many.
    fn add(&mut self, page: u64, version: u64) -> bool {
        if let Some((last, of_last)) = self.entries.last_mut()
            && (last.end(), *of_last) == (page, version)
            && last.pages < u32::MAX
        {
            last.pages += 1;
            return true;
        }
        let has_room = self.entries.len() < LIST_ENTRIES_MAX;
        if has_room {
            self.entries.push((Extent::new(page, 1), version));
        }
        has_room
    }
}

impl OpenStore<'_> {
    /// Lists pages from `from_page` on with their versions, in [`LIST_ENTRIES_MAX`] entries at most.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`] if no page can have that number.
    pub fn list(&self, from_page: u64, now: Duration) -> Result<Listing, StoreError> {
        self.check_range(&[Extent::new(from_page, 1)])?;
        let mut listing = Listing { entries: vec![], next_page: Some(from_page) };
        for _ in 0..LOCKS_MAX {
            let Some(from_page) = listing.next_page else { break };
            let inner = self.enter(now)?;
            let mut stored = inner.shelf.versions(from_page);
            let mut some = stored.by_ref().take(LOCK_PAGES);
            let beyond = some.find(|(page, version)| !listing.add(*page, *version));
            let is_full = beyond.is_some();
            listing.next_page = beyond.or_else(|| stored.next()).map(|(page, _)| page);
            if is_full {
                break;
            }
        }
        Ok(listing)
    }
}
