//! Which pages leave the RAM file, and what becomes of their copies.
//!
//! Cold pages, as introspection tells, go first, as long as no fault shows that they are used. The others leave as in 2Q (Johnson and Shasha, VLDB
//! 1994): pages used for the first time pass through a short queue, pages that come back soon after
//! they were evicted stay in a long one, and what was read ahead has a shorter one than both. How long they are
//! follows what comes back ([`super::ghosts`]). A write
//! that is seen puts its page to the end of its queue (second chance); reads are not seen.
//!
//! ```text
//!   victims:  protect, copy ──► put sent ──► put_done ──► Punch    unchanged
//!                                  │            ├──────► Changed   written behind the protection's back
//!                                  │            ├──────► NotYet    direct I/O may still land: finish_put
//!                                  │            ├──────► Cancelled written
//!                                  │            └──────► Keep      it was only flushed: `flush`
//!                                  └─ put_failed: another server, or back
//! ```
//!
//! Clean pages go at once, also where there is direct I/O: to be its target a page is written to, which
//! is a fault under protection, and a clean page has been protected ever since it was placed.
//!
//! Every put is answered once by `put_done` or `put_failed` for each server, also where the server is
//! gone or the eviction was cancelled; `NotYet` and `Enough` once more by `finish_put`.
//!
//! An eviction takes over the put of a page that is being flushed.
//!
//! Invariant: no page is put for an eviction while any put of it is unanswered.

use std::ops::Range;
use std::time::Duration;

use super::faults::runs_of;
use super::pages::{Class, State};
use super::servers::{Mask, Transfer};
use super::{Remote, ServerPhase};
use crate::pageset::PageSet;

/// Most queue heads that are passed over in the search for one page.
pub(super) const LOOKS_MAX: usize = 256;

/// Part of the limit that pages read ahead have for themselves, at least.
const AHEAD_SHARE: u64 = 16;

/// And at most.
const AHEAD_SHARE_MAX: u64 = 4;

/// Pages that are to leave the RAM file. Both in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Victims {
    /// Punch them: servers have them.
    pub clean: Vec<u64>,
    /// Protect them, then copy and put them to [`Remote::put_to`].
    pub dirty: Vec<u64>,
}

/// What to do with a page of which a put was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutDone {
    /// Other servers have not answered.
    More,
    /// Punch it and wake who waits for it.
    Punch,
    /// Servers have it and it stays, protected: nothing to do.
    Keep,
    /// Data of direct I/O may still arrive: call [`Remote::finish_put`] at this time.
    NotYet(Duration),
    /// Data arrived in it without a fault, or its copies cannot stay: it stays. Remove its protection.
    Changed,
    /// It was written, or its put was given up otherwise: nothing to do.
    Cancelled,
}

/// Why a server did not take a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutFailure {
    /// It has no room, contrary to what it reserved.
    Full,
    /// It does not answer, or refuses.
    Gone,
}

/// What to do with a page that a server did not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutFailed {
    /// Put it to this server.
    Another(usize),
    /// Other servers have not answered.
    More,
    /// The servers that took it suffice: call [`Remote::finish_put`].
    Enough,
    /// No server takes it: it stays. Remove its protection.
    Back,
    /// It was written, or its put was given up otherwise: nothing to do.
    Cancelled,
}

/// Copies that a server is to drop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// The server, by its number.
    pub server: usize,
    /// The pages.
    pub runs: Vec<Range<u64>>,
}

/// Pages that introspection found cold.
#[derive(Debug)]
pub(super) struct Cold {
    dirty: PageSet,
    clean: PageSet,
    /// Where the search in each of them goes on.
    cursors: [u64; 2],
}

impl Cold {
    pub(super) fn new(pages: u64) -> Self {
        Self { dirty: PageSet::new(pages), clean: PageSet::new(pages), cursors: [0; 2] }
    }

    /// The page came, left or was used.
    pub(super) fn touched(&mut self, page: u64) {
        for set in [&mut self.dirty, &mut self.clean] {
            if set.contains(page) {
                set.remove(page);
            }
        }
    }

    /// A dirty page became clean without being used.
    pub(super) fn cleaned(&mut self, page: u64) {
        if self.dirty.contains(page) {
            self.dirty.remove(page);
            self.clean.insert(page);
            let [_, of_clean] = &mut self.cursors;
            *of_clean = page.min(*of_clean);
        }
    }

    /// Takes a page out that was clean, or dirty.
    fn take(&mut self, clean: bool) -> Option<u64> {
        let [of_dirty, of_clean] = &mut self.cursors;
        let (set, cursor) =
            if clean { (&mut self.clean, of_clean) } else { (&mut self.dirty, of_dirty) };
        let page = set.first_in(*cursor..set.size());
        *cursor = page.unwrap_or_else(|| set.size());
        set.remove(page?);
        page
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.dirty.memory_bytes() + self.clean.memory_bytes()
    }
}

impl Remote {
    /// Pages that have to be evicted to keep the slack free for faults, besides those that are leaving.
    /// Costs nothing.
    pub fn wanted_evictions(&self) -> u64 {
        let Some(limit) = self.limit_pages else { return 0 };
        let low = limit - self.slack();
        let wanted = self.pages.taken() + self.queued.len() as u64;
        wanted.saturating_sub(low).saturating_sub(self.pages.count(State::Leaving))
    }

    /// Whether faults wait for room that no eviction makes, since the servers are full: add a server,
    /// raise the limit, or merge.
    pub fn is_stuck(&self) -> bool {
        let under_way = [State::Coming, State::Leaving, State::Dropping, State::Flushing];
        let clean_pages: u64 = [Class::Ahead, Class::Recent, Class::Long]
            .map(|c| self.queues.clean_len(c))
            .iter()
            .sum();
        let waits = |page: &u64| {
            let is_away = matches!(self.pages.state(*page), State::Empty | State::Remote);
            is_away && self.waits.contains_key(page)
        };
        clean_pages == 0
            && self.room() == 0
            && self.servers.free_pages() == 0
            && under_way.iter().all(|state| self.pages.count(*state) == 0)
            && self.queued.iter().any(waits)
    }

    /// At most `want` pages to evict: carry out the punches and protections before letting go of the
    /// lock. There are fewer if the rest is pinned, leaving, being flushed, or has no room on servers;
    /// one whose put is only taken over from a flush is not named.
    pub fn victims(&mut self, want: usize, now: Duration) -> Victims {
        let mut victims = Victims::default();
        if self.is_merging() {
            return victims;
        }
        for _ in 0..want {
            let dirty_fits = self.servers.free_pages() > 0;
            let Some(page) = self.pick(dirty_fits) else { break };
            match self.pages.state(page) {
                State::Clean => {
                    self.make_remote(page);
                    self.counts.evicted.clean += 1;
                    victims.clean.push(page);
                }
                State::Flushing => self.turn(page, State::Leaving, self.pages.class(page)),
                _ if self.begin_put(page, State::Leaving, now) => victims.dirty.push(page),
                _ => {}
            }
        }
        victims.clean.sort_unstable();
        victims.dirty.sort_unstable();
        victims
    }

    /// The dirty page is leaving, or being flushed, from now on, if any server has room for it.
    pub(super) fn begin_put(&mut self, page: u64, state: State, now: Duration) -> bool {
        let targets = self.servers.targets(page);
        if targets.is_empty() {
            return false;
        }
        let mut transfer = Transfer::new(now, None);
        for server in targets {
            transfer.begin(server, self.servers.put_began(page, server));
        }
        self.servers.transfers.insert(page, transfer);
        self.turn(page, state, self.pages.class(page));
        true
    }

    /// The page that is missed least, a clean one or, if they fit on servers, a dirty one.
    fn pick(&mut self, dirty: bool) -> Option<u64> {
        for _ in 0..LOOKS_MAX {
            let page = self.candidate(dirty)?;
            let (state, class) = (self.pages.state(page), self.pages.class(page));
            let is_busy = state == State::Dirty && self.servers.transfers.contains_key(&page);
            match state {
                State::Dirty | State::Clean | State::Flushing if class == Class::None => {}
                State::Dirty | State::Clean if self.is_pinned(page) => {
                    self.turn(page, state, Class::None);
                }
                State::Dirty | State::Clean if !is_busy => return Some(page),
                // A cold one, since those in flight are in no queue.
                State::Flushing if dirty => return Some(page),
                // Its last put was not answered: it goes to the end of its queue.
                State::Dirty => self.turn(page, state, class),
                _ => {}
            }
        }
        None
    }

    fn candidate(&mut self, dirty: bool) -> Option<u64> {
        let cold = self.cold.take(true).or_else(|| dirty.then(|| self.cold.take(false)).flatten());
        if cold.is_some() {
            return cold;
        }
        let limit = self.limit_pages.unwrap_or(u64::MAX);
        let ahead_pages =
            (2 * self.read_ahead_pages_max).max(limit / AHEAD_SHARE).min(limit / AHEAD_SHARE_MAX);
        let beyond = |class, pages| (self.queues.len(class) > pages).then_some(class);
        let order = [
            beyond(Class::Ahead, ahead_pages),
            beyond(Class::Recent, self.ghosts.recent_pages()),
            Some(Class::Long),
            Some(Class::Recent),
            Some(Class::Ahead),
        ];
        order.into_iter().flatten().find_map(|class| self.queues.oldest(class, dirty))
    }

    /// Gives up to `count` clean pages up, to be punched at once; returns how many.
    pub(super) fn give_up_clean(&mut self, count: u64, punch: &mut Vec<u64>) -> u64 {
        for given_up in 0..count {
            let Some(page) = self.pick(false) else { return given_up };
            self.make_remote(page);
            self.counts.evicted.clean += 1;
            punch.push(page);
        }
        count
    }

    /// Whether there is room for `count` more pages, clean ones being given up for them.
    pub(super) fn make_room(&mut self, count: u64, punch: &mut Vec<u64>) -> bool {
        let Some(limit) = self.limit_pages else { return true };
        let beyond = (self.pages.taken() + count).saturating_sub(limit);
        self.give_up_clean(beyond.min(LOOKS_MAX as u64), punch);
        self.room() >= count
    }

    /// The servers that a page is being put to, or where another would be put, primary first.
    pub fn put_to(&self, page: u64) -> Vec<usize> {
        match self.servers.transfers.get(&page) {
            Some(transfer) => self.servers.in_order(page, transfer.pending.or(transfer.done)),
            None => self.servers.targets(page),
        }
    }

    /// A server has taken a page. `is_unchanged` compares the page with what was put; it is
    /// asked only if all that decides is the content. Carry the answer out before letting go of the
    /// lock.
    pub fn put_done(
        &mut self,
        page: u64,
        server: usize,
        now: Duration,
        is_unchanged: impl FnOnce() -> bool,
    ) -> PutDone {
        let Some(transfer) = self.servers.transfers.get_mut(&page) else {
            return PutDone::Cancelled;
        };
        transfer.arrived(server);
        self.finish_put(page, now, is_unchanged)
    }

    /// The same where all servers have answered, after [`PutDone::NotYet`] or [`PutFailed::Enough`].
    pub fn finish_put(
        &mut self,
        page: u64,
        now: Duration,
        is_unchanged: impl FnOnce() -> bool,
    ) -> PutDone {
        let window = self.direct_io_window_now();
        let Some(transfer) = self.servers.transfers.get_mut(&page) else {
            return PutDone::Cancelled;
        };
        if !transfer.pending.is_empty() || transfer.copied_from.is_some() {
            return PutDone::More;
        }
        let ripe = transfer.since.saturating_add(window);
        if !transfer.cancelled && now < ripe {
            return PutDone::NotYet(ripe);
        }
        let was_cancelled = transfer.cancelled;
        transfer.cancelled = was_cancelled || !is_unchanged();
        let is_cancelled = transfer.cancelled;
        self.servers.settle(page);
        let is_leaving = self.pages.state(page) == State::Leaving;
        if was_cancelled {
            return PutDone::Cancelled;
        }
        if is_cancelled {
            self.counts.evicted.cancelled += u64::from(is_leaving);
            self.make_dirty(page, self.class_again(page));
            return PutDone::Changed;
        }
        if !is_leaving {
            return self.end_flush_of(page);
        }
        self.counts.evicted.dirty += 1;
        self.make_remote(page);
        PutDone::Punch
    }

    /// A server did not take a page.
    pub fn put_failed(&mut self, page: u64, server: usize, failure: PutFailure) -> PutFailed {
        if !self.servers.put_failed(page, server, failure) {
            // Given up when the server was lost.
            return PutFailed::Cancelled;
        }
        let Some(transfer) = self.servers.transfers.get(&page) else { return PutFailed::Cancelled };
        let (pending, done) = (transfer.pending, transfer.done);
        if transfer.cancelled {
            if !pending.is_empty() {
                return PutFailed::More;
            }
            self.servers.settle(page);
            return PutFailed::Cancelled;
        }
        let tried = pending.or(done).or(transfer.failed);
        if let Some(another) = self.servers.next_target(page, tried) {
            let replaces = self.servers.put_began(page, another);
            if let Some(transfer) = self.servers.transfers.get_mut(&page) {
                transfer.begin(another, replaces);
            }
            return PutFailed::Another(another);
        }
        if !pending.is_empty() {
            return PutFailed::More;
        }
        if !done.is_empty() {
            return PutFailed::Enough;
        }
        self.servers.settle(page);
        self.stay(page);
        PutFailed::Back
    }

    /// At most `pages_max` copies that are out of date. Send the drops over the evictor's connections,
    /// before any put that is named later.
    pub fn stale(&mut self, pages_max: usize) -> Vec<Stale> {
        let mut left = pages_max;
        let mut drops = Vec::new();
        for (number, server) in self.servers.list.iter_mut().enumerate() {
            let pages: Vec<u64> = server.stale.iter().take(left).collect();
            if pages.is_empty() || server.phase == ServerPhase::Gone {
                continue;
            }
            left -= pages.len();
            let runs = runs_of(pages.iter().copied());
            for run in &runs {
                server.stale.remove_range(run.clone());
            }
            server.stored_pages = server.stored_pages.saturating_sub(pages.len() as u64);
            drops.push(Stale { server: number, runs });
        }
        drops
    }

    /// What introspection found: `cold` pages leave first, but for those that are known to have been used here: a
    /// guest's kernel notes uses when it is short of memory, and faults tell more. `pinned` ones, which introspection
    /// itself reads, stay, up to half of the limit. Linear in these sets.
    pub fn set_cold(&mut self, cold: &PageSet, pinned: &PageSet) {
        let mut unpinned = std::mem::replace(&mut self.pinned, pinned.clone());
        unpinned.subtract(pinned);
        unpinned.intersect(self.pages.resident());
        for page in unpinned.iter() {
            if self.pages.class(page) == Class::None {
                self.turn(page, self.pages.state(page), Class::Recent);
            }
        }
        let mut dirty = cold.clone();
        dirty.intersect(self.pages.resident());
        dirty.subtract(pinned);
        dirty.subtract(&self.used);
        let mut clean = PageSet::new(dirty.size());
        for server in &self.servers.list {
            clean.union_with(&server.held);
        }
        clean.intersect(&dirty);
        dirty.subtract(&clean);
        self.cold = Cold { dirty, clean, cursors: [0; 2] };
    }
}

impl Transfer {
    pub(super) fn new(since: Duration, copied_from: Option<usize>) -> Self {
        let none = Mask::default();
        let (pending, done, failed, replaces) = (none, none, none, none);
        Self { since, pending, done, failed, replaces, cancelled: false, copied_from }
    }

    /// A put to this server is under way.
    pub(super) fn begin(&mut self, server: usize, replaces: bool) {
        self.pending.insert(server);
        if replaces {
            self.replaces.insert(server);
        }
    }

    /// The server took it.
    pub(super) fn arrived(&mut self, server: usize) {
        if self.pending.contains(server) {
            self.pending.remove(server);
            self.done.insert(server);
        }
    }
}
