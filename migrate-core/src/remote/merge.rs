//! Bringing all pages back, and servers that come, are drained or die.
//!
//! ```text
//!   Serving ──── drain ────► Draining ── next_to_move, moved ──► is_drained
//!      └───── server_lost ─────┴──► Gone: other copies go on, next_to_move makes new ones
//! ```
//!
//! Invariants: nothing new goes to a server that is being drained; a copy that moves is dropped at its
//! old place only after it arrived at the new one; after [`Remote::begin_merge`] no page leaves.

use std::time::Duration;

use super::pages::{Class, State};
use super::servers::{Mask, Transfer};
use super::{Fetch, PutFailure, Remote, RemoteError, SERVERS_MAX, ServerPhase, ServerRoom};
use crate::pageset::PageSet;

/// A page whose copy is to be made at another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The page.
    pub page: u64,
    /// Get it from this server.
    pub from: usize,
    /// Put it to this one, over the evictor's connection.
    pub to: usize,
}

/// Why a copy was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveFailure {
    /// The server that should have the page does not.
    NotStored,
    /// The other one did not take it.
    NotTaken(PutFailure),
}

impl Remote {
    /// All pages are to come back: nothing is evicted any more, the resident limit is lifted, and what
    /// is here needs no copies. Evictions under way are given up, and so is a flush. Linear in the
    /// resident pages.
    pub fn begin_merge(&mut self) {
        self.limit_pages = None;
        self.is_flushing = false;
        let leaving: Vec<u64> = self.servers.transfers.keys().copied().collect();
        for page in leaving {
            match self.pages.state(page) {
                State::Leaving | State::Flushing => self.stay(page),
                _ => self.servers.give_up_transfer(page),
            }
        }
        self.make_clean_dirty(None);
    }

    /// Clean pages become dirty: all, or those that have a copy at this server.
    fn make_clean_dirty(&mut self, at: Option<usize>) {
        let is_meant = |page: &u64| {
            let there = at.is_none_or(|server| self.servers.has(server, *page));
            there && self.pages.state(*page) == State::Clean
        };
        let pages: Vec<u64> = self.pages.resident().iter().filter(is_meant).collect();
        for page in pages {
            self.make_dirty(page, self.pages.class(page));
        }
    }

    /// While merging, at most `pages_max` more pages to ask for; nothing else.
    pub fn next_to_fetch(&mut self, pages_max: usize) -> Vec<Fetch> {
        let mut wanted = Vec::new();
        if !self.is_merging() {
            return self.fetches(wanted);
        }
        while wanted.len() < pages_max {
            let all = self.pages.len();
            let remote = self.pages.remote();
            let next = remote.first_in(self.merge_cursor..all).or_else(|| remote.first_in(0..all));
            let Some(page) = next else { break };
            self.merge_cursor = page + 1;
            match self.servers.holder(page) {
                Some(server) => {
                    self.ask(page, server, Class::Recent);
                    wanted.push((server, page));
                }
                None => self.lose(page),
            }
        }
        self.fetches(wanted)
    }

    /// Whether all pages are back, no put is under way, and every copy was named by [`Self::stale`].
    pub fn is_merged(&self) -> bool {
        let elsewhere = [State::Remote, State::Coming, State::Lost];
        self.is_merging()
            && elsewhere.iter().all(|state| self.pages.count(*state) == 0)
            && self.servers.are_empty()
    }

    /// One more server; returns its number.
    ///
    /// # Errors
    /// If there are too many.
    pub fn add_server(&mut self, room: ServerRoom) -> Result<usize, RemoteError> {
        if self.servers.list.len() >= SERVERS_MAX {
            return Err(RemoteError::TooManyServers);
        }
        Ok(self.servers.add(room, PageSet::new(self.pages.len())))
    }

    /// A server is gone with all it had. Pages of it that arrive from now on are not to be reported;
    /// puts that it did not answer are, by [`Self::put_failed`] and [`Self::move_failed`].
    /// Returns what to ask others for. Pages without another copy are lost ([`Self::lost_pages`]);
    /// others are copied again by [`Self::next_to_move`]. Linear in what the server had.
    pub fn server_lost(&mut self, server: usize) -> Vec<Fetch> {
        if !self.servers.is_there(server) {
            return Vec::new();
        }
        let held = self.servers.lose(server);
        self.ahead.retain(|fetch| fetch.server != server);
        self.give_up_transfers_to(server);
        let mut again = Vec::new();
        let asked = self.coming.iter().filter(|(_, from)| **from == server);
        for page in asked.map(|(page, _)| *page).collect::<Vec<_>>() {
            self.ask_another(page, &mut again);
        }
        for page in held.iter() {
            self.note_copy_gone(page);
        }
        self.fetches(again)
    }

    /// Whether no page would be lost with a server: each that is not here is on one of these `others` as well. Linear in
    /// what they have.
    pub fn can_lose(&self, server: usize, others: &[usize]) -> bool {
        let Some(found) = self.servers.list.get(server) else { return true };
        let mut only = found.held.clone();
        only.subtract(self.pages.resident());
        let others = others.iter().filter(|other| **other != server);
        for other in others.filter_map(|other| self.servers.list.get(*other)) {
            only.subtract(&other.held);
        }
        only.is_empty()
    }

    /// Evictions and flushes that count on a server that is gone are given up; they end as all do, with
    /// the caller's word about each put.
    fn give_up_transfers_to(&mut self, server: usize) {
        let counts_on = |transfer: &Transfer| transfer.pending.or(transfer.done).contains(server);
        let transfers = self.servers.transfers.iter();
        let pages = transfers.filter(|(_, transfer)| counts_on(transfer)).map(|(page, _)| *page);
        for page in pages.collect::<Vec<_>>() {
            match self.pages.state(page) {
                State::Leaving | State::Flushing => self.stay(page),
                _ => self.servers.give_up_transfer(page),
            }
        }
    }

    /// Nothing new goes to a server, and [`Self::next_to_move`] takes away what it has. Linear in the
    /// resident pages.
    pub fn drain(&mut self, server: usize) {
        match self.servers.get_mut(server) {
            Some(found) if found.phase == ServerPhase::Serving => {
                found.phase = ServerPhase::Draining;
            }
            _ => return,
        }
        // They are put elsewhere when they leave, which is cheaper than moving their copies.
        self.make_clean_dirty(Some(server));
    }

    /// Whether a server that is being drained has nothing more of the guest.
    pub fn is_drained(&self, server: usize) -> bool {
        let in_transfer = |transfer: &Transfer| transfer.pending.or(transfer.done).contains(server);
        self.servers.list.get(server).is_some_and(|found| {
            found.phase != ServerPhase::Serving
                && found.held.is_empty()
                && found.stale.is_empty()
                && !self.servers.transfers.values().any(in_transfer)
        })
    }

    /// At most `pages_max` copies to make: of pages on servers that are being drained, then of pages
    /// that have fewer copies than asked for. Report each by [`Self::moved`] or
    /// [`Self::move_failed`].
    pub fn next_to_move(&mut self, pages_max: usize, now: Duration) -> Vec<Move> {
        let mut moves = Vec::new();
        if self.is_merging() {
            return moves;
        }
        for server in 0..self.servers.list.len() {
            let drained = self.servers.list.get(server);
            let drained = drained.filter(|server| server.phase == ServerPhase::Draining);
            let Some(held) = drained.map(|server| &server.held) else { continue };
            let pages = self.movable(held, pages_max - moves.len());
            for page in pages {
                let elsewhere = self.servers.serving_holders(page);
                if elsewhere.len() >= self.servers.copies_wanted() && !elsewhere.is_empty() {
                    self.servers.give_up_at(page, server);
                    self.note_copies(page);
                } else if let Some(order) = self.begin_move(page, server, now) {
                    moves.push(order);
                }
            }
        }
        let pages = self.movable(&self.under_copied, pages_max - moves.len());
        for page in pages {
            if self.servers.holders(page).len() >= self.servers.copies_wanted() {
                continue;
            }
            let Some(from) = self.servers.holder(page) else { continue };
            moves.extend(self.begin_move(page, from, now));
        }
        moves
    }

    /// Of these pages, those that are remote and not being copied already.
    fn movable(&self, pages: &PageSet, pages_max: usize) -> Vec<u64> {
        let is_free = |page: &u64| {
            self.pages.state(*page) == State::Remote && !self.servers.transfers.contains_key(page)
        };
        pages.iter().filter(is_free).take(pages_max).collect()
    }

    fn begin_move(&mut self, page: u64, from: usize, now: Duration) -> Option<Move> {
        let to = self.servers.next_target(page, self.servers.holders(page))?;
        let mut transfer = Transfer::new(now, Some(from));
        transfer.begin(to, self.servers.put_began(page, to));
        self.servers.transfers.insert(page, transfer);
        Some(Move { page, from, to })
    }

    /// The copy of a page named by [`Self::next_to_move`] arrived.
    pub fn moved(&mut self, page: u64) {
        let Some(transfer) = self.servers.transfers.get_mut(&page) else { return };
        let Some(from) = transfer.copied_from else { return };
        let cancelled = transfer.cancelled;
        transfer.pending.iter().for_each(|server| transfer.done.insert(server));
        transfer.pending = Mask::default();
        self.servers.settle(page);
        if !cancelled {
            if self.servers.list.get(from).is_some_and(|from| from.phase == ServerPhase::Draining) {
                self.servers.give_up_at(page, from);
            }
            if self.pages.state(page) == State::Remote {
                self.note_copies(page);
            }
        }
    }

    /// The copy of a page named by [`Self::next_to_move`] was not made. If it is not where it should
    /// be and nowhere else, it is lost.
    pub fn move_failed(&mut self, page: u64, failure: MoveFailure) {
        let Some(transfer) = self.servers.transfers.get(&page) else { return };
        let Some(from) = transfer.copied_from else { return };
        let why = match failure {
            MoveFailure::NotStored => PutFailure::Gone,
            MoveFailure::NotTaken(why) => why,
        };
        for server in transfer.pending.iter().collect::<Vec<_>>() {
            self.servers.put_failed(page, server, why);
        }
        self.servers.settle(page);
        if failure == MoveFailure::NotStored {
            self.servers.not_there(page, from);
            self.note_copy_gone(page);
        }
    }
}
