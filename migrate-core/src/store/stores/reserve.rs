//! Changing a store's reservation.
//!
//! ```text
//!   up     server has it? host has it left? ─► promised ─► pages may come
//!   down   no more pages may come ─► chunks are emptied and given back, a few slots at a time ─► free
//! ```
//!
//! Invariant: what is free for others is so when the kernel has the memory back. What a store gives back
//! is its own until then, even if it is deleted meanwhile.

use std::time::Duration;

use parking_lot::MutexGuard;

use super::{OpenStore, bytes_of};
use crate::store::error::StoreError;
use crate::store::names::check_reserve;

impl OpenStore<'_> {
    /// Changes how many pages the store may hold. Where pages were dropped here and there, giving memory
    /// back takes a while, in which others may use the store.
    ///
    /// # Errors
    /// The reservation then stays: [`StoreError::Reserved`] with fewer pages than are stored or being
    /// put, [`StoreError::Full`] or [`StoreError::HostFull`] if the server or the share of the host that
    /// created the store has not got what is wanted besides, [`StoreError::Field`] for no page, or more
    /// than the guest has.
    pub fn reserve(&self, pages: u64, now: Duration) -> Result<(), StoreError> {
        check_reserve(pages, self.store.pages)?;
        let less_pages = self.set_reserve(pages, now)?;
        self.fit();
        let mut all = self.stores.all.lock();
        all.ledger.give_back(&self.store.creator, bytes_of(less_pages));
        Ok(())
    }

    /// Gives back memory beyond the reservation. A store that is gone meanwhile has none.
    fn fit(&self) {
        let mut goes_on = true;
        while goes_on {
            let mut inner = self.store.inner.lock();
            // Others may have changed it again.
            let pages_max = inner.reserve_pages;
            goes_on = inner.shelf.fit(pages_max);
            MutexGuard::unlock_fair(inner);
        }
    }

    /// Returns how many pages fewer these are.
    fn set_reserve(&self, pages: u64, now: Duration) -> Result<u64, StoreError> {
        let mut all = self.stores.all.lock();
        let mut inner = self.enter(now)?;
        let wanted_pages = inner.shelf.len() + inner.claimed_pages;
        if pages < wanted_pages {
            return Err(StoreError::Reserved { reserve_pages: pages, wanted_pages });
        }
        let more_pages = pages.saturating_sub(inner.reserve_pages);
        all.ledger.reserve(&self.store.creator, bytes_of(more_pages))?;
        let less_pages = inner.reserve_pages.saturating_sub(pages);
        inner.reserve_pages = pages;
        Ok(less_pages)
    }
}
