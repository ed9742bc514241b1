//! Copies of what lies only here, made while the guest runs and uses it, so that it can go on at
//! another main host.
//!
//! ```text
//!   begin_flush ─► next_to_flush: protect, copy ─► put ─► put_done ─► Keep      clean, stays protected
//!                      ▲                                    ├───────► Changed   written behind the protection's back
//!                      └───── dirty again ◄── write ────────┴───────► Cancelled written
//!
//!   few are left ─► the guest stands still ─► stopped ─► the rest ─► is_flushed
//! ```
//!
//! Pages go in the order in which they came or were last seen to be written, the oldest first: the next
//! write to one of these is the farthest. Being flushed is no use: a page keeps its place in the order of
//! eviction.
//!
//! A flush and an eviction of one page share one put. A page that is leaving is not flushed; a cold one
//! that is being flushed may be made to leave, its put going on. Any other leaves once it is clean.
//!
//! Pinned pages are flushed too, but only if the servers have room for all, or the guest stands still:
//! they never leave, so that their copies would take the room that others need for that.
//!
//! Invariants: a page is clean only if servers have what it has, for as long as direct I/O may have
//! reached it after it was protected; a page in flight is in no queue; [`Remote::is_flushed`] holds only
//! if whoever reads the servers, each of which has dropped what it was told to, finds what the guest has,
//! and nothing else.

use std::time::Duration;

use super::eviction::LOOKS_MAX;
use super::pages::{Class, State};
use super::{PutDone, Remote};
use crate::pageset::PageSet;

/// States of pages that are not, or not only, on servers.
const UNFLUSHED: [State; 5] =
    [State::Dirty, State::Leaving, State::Flushing, State::Dropping, State::Coming];

impl Remote {
    /// From now on resident pages get copies while they stay. Not while all are to come back.
    pub fn begin_flush(&mut self) {
        self.is_flushing = !self.is_merging();
    }

    /// Not any more. What is under way ends as it began.
    pub fn end_flush(&mut self) {
        self.is_flushing = false;
    }

    /// Whether resident pages get copies.
    pub fn is_flushing(&self) -> bool {
        self.is_flushing
    }

    /// At most `want` dirty pages to copy: protect them before letting go of the lock, then copy and put
    /// them to [`Self::put_to`], as the dirty ones of [`Self::victims`]. Costs little if there are none.
    pub fn next_to_flush(&mut self, want: usize, now: Duration) -> Vec<u64> {
        let mut pages = Vec::new();
        if !self.is_flushing || self.servers.free_pages() == 0 {
            return pages;
        }
        let mut heads = self.flush_heads();
        let mut looks = LOOKS_MAX;
        while pages.len() < want && looks > 0 && self.servers.free_pages() > 0 {
            let age = |head: &Option<u64>| head.map(|page| self.queues.age(page));
            let Some(head) = heads.iter_mut().filter(|head| head.is_some()).max_by_key(|h| age(h))
            else {
                break;
            };
            let Some(page) = *head else { break };
            *head = self.queues.after(page);
            if self.servers.transfers.contains_key(&page) {
                // Its last put was not answered.
                looks -= 1;
            } else if self.begin_put(page, State::Flushing, now) {
                pages.push(page);
            }
        }
        pages.sort_unstable();
        pages
    }

    /// The dirty pages to be flushed first, by class.
    fn flush_heads(&self) -> [Option<u64>; 4] {
        let classes = [Class::Ahead, Class::Recent, Class::Long, Class::None];
        let mut heads = classes.map(|class| self.queues.first_dirty(class));
        if let [.., pinned @ Some(_)] = &mut heads
            && !self.is_stopped
            && self.flush_room_lacking() > 0
        {
            *pinned = None;
        }
        heads
    }

    /// Servers have a page that was only to be flushed.
    pub(super) fn end_flush_of(&mut self, page: u64) -> PutDone {
        if !self.may_be_clean(page) {
            // A server that took it is being drained.
            self.stay_unflushed(page);
            return PutDone::Changed;
        }
        self.turn_back(page, State::Clean);
        self.cold.cleaned(page);
        PutDone::Keep
    }

    /// A page that was being put stays, though nobody wrote it.
    pub(super) fn stay(&mut self, page: u64) {
        if self.pages.state(page) == State::Flushing {
            return self.stay_unflushed(page);
        }
        self.counts.evicted.cancelled += 1;
        self.make_dirty(page, self.class_again(page));
    }

    /// A page that was being flushed is dirty, as before.
    fn stay_unflushed(&mut self, page: u64) {
        self.servers.give_up(page);
        self.turn_back(page, State::Dirty);
    }

    /// A page that was being flushed is resident, at its old place.
    fn turn_back(&mut self, page: u64, state: State) {
        let class = self.class_again(page);
        self.pages.set(page, state, class);
        self.queues.put_back(page, class, state == State::Clean);
    }

    /// Pages whose content is not on servers yet: dirty, being put, being asked about, or arriving. Lost
    /// ones are not among them. Costs nothing.
    pub fn unflushed_pages(&self) -> u64 {
        UNFLUSHED.iter().map(|state| self.pages.count(*state)).sum()
    }

    /// Whether all content lies on servers: the guest stands still ([`Self::stopped`]), no page is on its
    /// way anywhere or lost, and every copy that is out of date was named by [`Self::stale`].
    pub fn is_flushed(&self) -> bool {
        self.is_stopped
            && self.unflushed_pages() == 0
            && !self.is_lost()
            && self.servers.transfers.is_empty()
            && self.servers.list.iter().all(|server| server.stale.is_empty())
    }

    /// The guest stands still and its disks are drained: no data of direct I/O arrives late from now on.
    /// What [`PutDone::NotYet`] told to wait for can be finished at once.
    pub fn stopped(&mut self) {
        self.is_stopped = true;
    }

    /// The guest may run from now on.
    pub fn resumed(&mut self) {
        self.is_stopped = false;
    }

    /// How long data of direct I/O may arrive in a page after it was protected.
    pub(super) fn direct_io_window_now(&self) -> Duration {
        if self.is_stopped { Duration::ZERO } else { self.direct_io_window }
    }

    /// Pages of which a server has a valid copy.
    pub fn held(&self, server: usize) -> Option<&PageSet> {
        self.servers.list.get(server).map(|server| &server.held)
    }

    /// Room that lacks on the servers for a flush, in copies of pages: 0 if every page that would be
    /// flushed now finds as many servers as it should. Copies that [`Self::next_to_move`] makes come on
    /// top. Linear in the servers' sets.
    pub fn flush_room_lacking(&self) -> u64 {
        let is_bare = |page: &&u64| {
            self.pages.state(**page) == State::Dropping && self.servers.holders(**page).is_empty()
        };
        let dropping = self.candidates.iter().filter(is_bare).count() as u64;
        let pages = self.pages.count(State::Dirty) + dropping;
        let copies = self.servers.copies_wanted().max(1) as u64;
        // One server is of no use beyond a copy of each.
        let places: u64 = self.servers.rooms().iter().map(|room| *room.min(&pages)).sum();
        pages.saturating_mul(copies).saturating_sub(places)
    }

    /// A server keeps this much room for the guest from now on, in pages, those included that it stores.
    pub fn set_reserve(&mut self, server: usize, reserve_pages: u64) {
        if self.servers.is_there(server)
            && let Some(server) = self.servers.get_mut(server)
        {
            (server.weight, server.reserve_pages) = (reserve_pages, reserve_pages);
        }
    }
}
