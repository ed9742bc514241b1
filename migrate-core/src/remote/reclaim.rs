//! Freed memory: what the guest does not use is dropped instead of paged.
//!
//! ```text
//!   on servers:   begin_reclaim ──► the guest's kernel is asked ──► reclaim_remote
//!                 └──────── remote all the time: no content is needed ────────┘
//!   resident:     the guest's kernel is asked ──► reclaim_candidates: protect ──► it is asked again
//!                                                                  └─ not written ─► reclaim_done: punch
//! ```
//!
//! Why this order is safe: a page was unused at some moment when the kernel was asked. Whoever uses it
//! later has to write it before its content means anything. A page that is on servers cannot be written
//! without coming back first; so one that was there from before the question until now was not written
//! since, and reads as well as zeros. That a page is remote now does not suffice: it may have been
//! taken, written and evicted after the kernel was asked, which is why pages that became remote since
//! `begin_reclaim` are left alone. A resident page can be written unseen until it is protected; it is
//! asked about again after that, and a write from then on is a fault that cancels the drop.

use std::ops::Range;

use super::pages::{Class, State};
use super::{Fetch, Remote};
use crate::pageset::PageSet;

/// What to do with a page that was about to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReclaimDone {
    /// Punch it and wake who waits for it.
    Punch,
    /// It stays, and is dirty: remove its protection.
    Unprotect,
    /// It stays, and is clean: leave it protected.
    Keep,
    /// It was written meanwhile: nothing to do.
    Cancelled,
}

impl Remote {
    /// Asks for those of the `pages` that are elsewhere, where the guest's kernel describes its memory: as many as there
    /// is room for besides faults that wait for some. Nothing is given up for them.
    pub fn fetch_to_read(&mut self, pages: Range<u64>) -> Vec<Fetch> {
        let room = self.room().saturating_sub(self.queued.len() as u64);
        let remote = pages.filter(|page| self.pages.state(*page) == State::Remote);
        let wanted: Vec<(usize, u64)> = remote
            .filter_map(|page| Some((self.servers.holder(page)?, page)))
            .take(usize::try_from(room).unwrap_or(usize::MAX))
            .collect();
        for (server, page) in &wanted {
            self.ask(*page, *server, Class::Recent);
        }
        self.fetches(wanted)
    }

    /// Call before the guest's kernel is asked what it does not use.
    pub fn begin_reclaim(&mut self) {
        self.returned = Some(PageSet::new(self.pages.len()));
    }

    /// Drops the pages that are `unused`, as the guest's kernel said after [`Self::begin_reclaim`], and
    /// were on servers since then; ends what was begun. Returns how many copies each server is to drop
    /// for it; [`Self::stale`] names them. Linear in the servers' sets.
    pub fn reclaim_remote(&mut self, unused: &PageSet) -> Vec<u64> {
        let Some(returned) = self.returned.take() else {
            return vec![0; self.servers.list.len()];
        };
        let mut dropped = self.pages.remote().clone();
        dropped.intersect(unused);
        dropped.subtract(&returned);
        // Someone uses them already.
        for page in self.waits.keys() {
            dropped.remove(*page);
        }
        self.counts.reclaimed_pages += dropped.len();
        self.pages.empty_remote(&dropped);
        self.under_copied.subtract(&dropped);
        self.servers.give_up_all(&dropped)
    }

    /// At most `pages_max` resident pages that are `unused`, as the guest's kernel said. Protect them
    /// before letting go of the lock, ask the kernel again, then call [`Self::reclaim_done`] once for
    /// each.
    pub fn reclaim_candidates(&mut self, unused: &PageSet, pages_max: usize) -> Vec<u64> {
        let mut resident = self.pages.resident().clone();
        resident.intersect(unused);
        resident.subtract(&self.pinned);
        // One that was written since it was named may still be answered for, by what is no longer true.
        let is_free = |page: &u64| {
            !self.servers.transfers.contains_key(page) && !self.candidates.contains(page)
        };
        let pages: Vec<u64> = resident.iter().filter(is_free).take(pages_max).collect();
        for page in &pages {
            self.turn(*page, State::Dropping, self.pages.class(*page));
            self.candidates.insert(*page);
        }
        pages
    }

    /// The guest's kernel was asked again. Carry the answer out before letting go of the lock.
    pub fn reclaim_done(&mut self, page: u64, still_unused: bool) -> ReclaimDone {
        if !self.candidates.remove(&page) || self.pages.state(page) != State::Dropping {
            return ReclaimDone::Cancelled;
        }
        if still_unused {
            self.servers.give_up(page);
            self.used.remove(page);
            self.turn(page, State::Empty, Class::None);
            self.counts.reclaimed_pages += 1;
            return ReclaimDone::Punch;
        }
        let class = self.pages.class(page);
        if !self.may_be_clean(page) {
            self.make_dirty(page, class);
            return ReclaimDone::Unprotect;
        }
        self.turn(page, State::Clean, self.class_for(page, class));
        ReclaimDone::Keep
    }
}
