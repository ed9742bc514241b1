//! Copies on servers: those that are out of date are dropped, missing ones made, and all fetched when the guest is
//! merged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use migrate_core::layout::PAGE_BYTES;
use migrate_core::remote::{Fetch, Move, MoveFailure, PutFailure, Stale};
use transport::pages::wire::{DROP_EXTENTS_MAX, REQUEST_PAGES_MAX};
use transport::pages::{Extent, PageAnswer, PageRequest, StoreError};

use super::{Failed, Keeper, put_of};
use crate::error::EngineError;

/// Copies that are dropped at a time.
const STALE_PAGES: usize = 16_384;

/// Copies that are made at a time: pages that are to leave wait meanwhile.
const MOVE_PAGES: usize = REQUEST_PAGES_MAX as usize;

/// Pages that are fetched at a time while merging.
const MERGE_PAGES: usize = 4 * REQUEST_PAGES_MAX as usize;

/// Why pages were not copied.
#[derive(Debug, Clone, Copy)]
enum Uncopied {
    /// This page is not where it should be.
    NotStored(u64),
    /// One of the two servers did not do its part.
    NotTaken(PutFailure),
}

impl Keeper {
    /// Drops copies that are out of date and makes missing ones, unless the guest's last main host may need what there
    /// is. Says whether there was anything to do.
    pub(super) fn tend_copies(&mut self) -> bool {
        let is_settled = self.shared.is_settled.load(Ordering::Acquire);
        is_settled && self.drop_stale() | self.copy_again()
    }

    /// Has servers drop copies that are out of date. Says whether there were any.
    fn drop_stale(&mut self) -> bool {
        // After a failure what is out of date may be all that there is.
        if self.shared.is_over.load(Ordering::Acquire) {
            return false;
        }
        let stale = self.shared.remote.lock().stale(STALE_PAGES);
        let any = !stale.is_empty();
        for Stale { server, runs } in stale {
            let extents = Extent::join(runs.into_iter().flatten());
            for extents in extents.chunks(DROP_EXTENTS_MAX) {
                let extents = extents.to_vec();
                let dropped = self.call(server, &PageRequest::Drop { extents: extents.clone() });
                if dropped.is_err() {
                    // Before anything else is put there.
                    self.undropped.entry(server).or_default().extend(extents);
                }
            }
        }
        any
    }

    /// Makes copies of pages that have too few, or are on a server that is drained. Says whether any were made.
    fn copy_again(&mut self) -> bool {
        let moves = self.shared.remote.lock().next_to_move(MOVE_PAGES, self.shared.now());
        let mut by_way: BTreeMap<(usize, usize), Vec<u64>> = BTreeMap::new();
        for Move { page, from, to } in moves {
            by_way.entry((from, to)).or_default().push(page);
        }
        let mut any = false;
        for ((from, to), pages) in by_way {
            for pages in pages.chunks(REQUEST_PAGES_MAX as usize) {
                any |= self.copy_over(from, to, pages);
            }
        }
        any
    }

    /// Copies pages from one server to another. Says whether they were.
    fn copy_over(&mut self, from: usize, to: usize, pages: &[u64]) -> bool {
        let failed = self.copy_between(from, to, pages).err();
        let mut remote = self.shared.remote.lock();
        for page in pages {
            match failed {
                None => remote.moved(*page),
                Some(Uncopied::NotStored(missing)) if missing == *page => {
                    remote.move_failed(*page, MoveFailure::NotStored);
                }
                // Of the others nothing was said: they are tried again.
                Some(Uncopied::NotStored(_)) => {
                    remote.move_failed(*page, MoveFailure::NotTaken(PutFailure::Gone));
                }
                Some(Uncopied::NotTaken(why)) => {
                    remote.move_failed(*page, MoveFailure::NotTaken(why));
                }
            }
        }
        failed.is_none()
    }

    fn copy_between(&mut self, from: usize, to: usize, pages: &[u64]) -> Result<(), Uncopied> {
        let extents = Extent::join(pages.iter().copied());
        let got = self.call(from, &PageRequest::Get { extents, take: false, packed: true });
        let (extents, contents) = match got {
            Ok(PageAnswer::Pages { extents, contents, .. }) => (extents, contents),
            Err(Failed::Refused(StoreError::NotStored { page })) => {
                return Err(Uncopied::NotStored(page));
            }
            Ok(_) | Err(_) => return Err(Uncopied::NotTaken(PutFailure::Gone)),
        };
        // The next pager must not take one copy for older than the other.
        let versions = self.versions_of(from, pages)?;
        let mut puts: BTreeMap<u64, (Vec<u64>, Vec<u8>)> = BTreeMap::new();
        let got = extents.iter().flat_map(Extent::iter).zip(contents.chunks(PAGE_BYTES));
        for (page, content) in got {
            let version = versions.get(&page).ok_or(Uncopied::NotStored(page))?;
            let (pages, contents) = puts.entry(*version).or_default();
            pages.push(page);
            contents.extend_from_slice(content);
        }
        for (version, (pages, contents)) in puts {
            let put = put_of(&pages, contents, version);
            self.call(to, &put).map_err(|why| Uncopied::NotTaken((&why).into()))?;
        }
        Ok(())
    }

    /// The versions of pages, in ascending order, at a server.
    fn versions_of(
        &mut self,
        server: usize,
        pages: &[u64],
    ) -> Result<BTreeMap<u64, u64>, Uncopied> {
        let mut versions = BTreeMap::new();
        let (Some(first), Some(last)) = (pages.first(), pages.last()) else { return Ok(versions) };
        let mut next = Some(*first);
        while let Some(from_page) = next.filter(|page| page <= last) {
            let listed = self.call(server, &PageRequest::List { from_page });
            let Ok(PageAnswer::Listed { entries, next_page, .. }) = listed else {
                return Err(Uncopied::NotTaken(PutFailure::Gone));
            };
            for (extent, version) in entries {
                let end = extent.first_page + u64::from(extent.pages);
                let from = pages.partition_point(|page| *page < extent.first_page);
                let to = pages.partition_point(|page| *page < end);
                let within = pages.get(from..to).unwrap_or_default();
                versions.extend(within.iter().map(|page| (*page, version)));
            }
            next = next_page;
        }
        Ok(versions)
    }

    /// While merging, fetches what is elsewhere. Says whether there was anything.
    pub(super) fn merge(&mut self) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        if !shared.is_merging.load(Ordering::Acquire) {
            return Ok(false);
        }
        let is_all_reached = shared.traffic.lost.lock().is_empty();
        let mut fetches = {
            let mut remote = shared.remote.lock();
            shared.serve_waiting(&mut remote, &mut self.fetches)?;
            if remote.is_merged() {
                shared.is_merged.store(true, Ordering::Release);
                shared.changed.notify_waiters();
            }
            // What a server that is away has is asked for later.
            if is_all_reached { remote.next_to_fetch(MERGE_PAGES) } else { vec![] }
        };
        if is_all_reached {
            fetches.append(&mut self.postponed);
        }
        self.hand_over_fetches();
        let mut any = false;
        for Fetch { server, runs } in fetches {
            any |= self.fetch_now(server, runs.into_iter().flatten().collect())?;
        }
        self.hand_over_fetches();
        Ok(any)
    }

    /// Fetches pages and places them. Says whether they came.
    fn fetch_now(&mut self, server: usize, mut pages: Vec<u64>) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        let extents = Extent::join(pages.iter().copied());
        match self.call(server, &PageRequest::Get { extents, take: false, packed: true }) {
            Ok(PageAnswer::Pages { contents, .. }) => {
                shared.arrived(server, pages.into_iter(), &contents, &mut self.fetches)?;
                return Ok(true);
            }
            Err(Failed::Refused(StoreError::NotStored { page })) => {
                pages.retain(|one| *one != page);
                let again = shared.remote.lock().fetch_failed(server, &[page]);
                self.fetches.extend(again);
                shared.changed.notify_waiters();
            }
            Ok(_) | Err(_) => {}
        }
        if !pages.is_empty() {
            self.postponed.push(Fetch::of(server, pages));
        }
        Ok(false)
    }
}
