//! Storing pages.
//!
//! ```text
//!   claim room for all that are new ─► pack 64 KiB ─► lock, copy, unlock ─► pack 64 KiB ─► ... ─► claim ends
//! ```
//!
//! Invariant: pages that are stored and those that are claimed never exceed the reservation together. So a
//! put that began finds room for what is new, however many others put, and whatever becomes of the
//! reservation.

use std::time::Duration;

use super::{Inner, OpenStore, PIECE_PAGES};
use crate::layout::PAGE_BYTES;
use crate::store::error::StoreError;
use crate::store::names::Extent;

impl OpenStore<'_> {
    /// Puts pages of one version, in the place of those with the same numbers, whatever their versions.
    /// `contents` has 4096 bytes for each.
    ///
    /// # Errors
    /// [`StoreError::Reserved`] or [`StoreError::OutOfRange`] before anything is put;
    /// [`StoreError::NoMemory`], or [`StoreError::Reserved`] where others drop and put the same pages
    /// meanwhile, after some of the pages.
    pub fn put(
        &mut self,
        extents: &[Extent],
        contents: &[u8],
        version: u64,
        now: Duration,
    ) -> Result<(), StoreError> {
        self.check_range(extents)?;
        let pages: Vec<u64> = extents.iter().flat_map(Extent::iter).collect();
        if contents.len() != pages.len().saturating_mul(PAGE_BYTES) {
            let bytes = contents.len() as u64;
            return Err(StoreError::field("contents", bytes, "4096 bytes a page are needed"));
        }
        let mut claimed = self.claim(&pages, now)?;
        let pieces = pages.chunks(PIECE_PAGES).zip(contents.chunks(PIECE_PAGES * PAGE_BYTES));
        let mut put = Ok(());
        for (pages, contents) in pieces {
            let kept = self.packing.pack(contents);
            put = self.store.enter(&self.host).and_then(|mut inner| {
                let pages = pages.iter().copied().zip(kept);
                put_piece(&mut inner, pages, version, &mut claimed)
            });
            if put.is_err() {
                break;
            }
        }
        self.store.inner.lock().claimed_pages -= claimed;
        put
    }

    /// Makes sure that all of these pages find a place, however many threads put at once.
    fn claim(&self, pages: &[u64], now: Duration) -> Result<u64, StoreError> {
        let mut inner = self.enter(now)?;
        let new = pages.iter().filter(|page| !inner.shelf.contains(**page)).count() as u64;
        let wanted_pages = inner.shelf.len() + inner.claimed_pages + new;
        let reserve_pages = inner.reserve_pages;
        if wanted_pages > reserve_pages {
            return Err(StoreError::Reserved { reserve_pages, wanted_pages });
        }
        inner.claimed_pages += new;
        Ok(new)
    }
}

/// Puts a piece; pages that are new use up what was `claimed`.
fn put_piece<'a>(
    inner: &mut Inner,
    pages: impl Iterator<Item = (u64, &'a [u8])>,
    version: u64,
    claimed: &mut u64,
) -> Result<(), StoreError> {
    for (page, kept) in pages {
        if !inner.shelf.contains(page) {
            let reserve_pages = inner.reserve_pages;
            let wanted_pages = inner.shelf.len() + inner.claimed_pages + 1;
            match claimed.checked_sub(1) {
                Some(rest) => {
                    *claimed = rest;
                    inner.claimed_pages -= 1;
                }
                // It was there when this began, and somebody has dropped it since.
                None if wanted_pages > reserve_pages => {
                    return Err(StoreError::Reserved { reserve_pages, wanted_pages });
                }
                None => {}
            }
        }
        inner.shelf.put(page, kept, version).map_err(|_| StoreError::NoMemory)?;
    }
    inner.shelf.tidy();
    Ok(())
}
