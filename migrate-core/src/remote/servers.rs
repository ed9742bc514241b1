//! What lies on which server, and how much room each has.
//!
//! ```text
//!   copies of a page at one server
//!
//!            put sent            put done               content changed
//!   nothing ──────────► under way ───────► held ───────────────────────► stale ──► drop sent
//!                           │ ▲                                            ▲ │
//!                           │ └────────────────── put sent ────────────────┼─┘
//!                           └─────────────── put done, but cancelled ──────┘
//! ```
//!
//! Invariants: a page is under way to, held by or stale at a server, never two of these; it counts
//! for the room of the server in each of them. What is under way is known to `transfers`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::placement::best_server;
use super::{PutFailure, ServerPhase, ServerRoom};
use crate::pageset::PageSet;

/// Most servers a guest can have over its time, those included that are gone.
pub const SERVERS_MAX: usize = 64;

/// Servers, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Mask(u64);

impl Mask {
    pub(super) fn contains(self, server: usize) -> bool {
        server < SERVERS_MAX && self.0 >> server & 1 == 1
    }

    pub(super) fn insert(&mut self, server: usize) {
        if server < SERVERS_MAX {
            self.0 |= 1 << server;
        }
    }

    pub(super) fn remove(&mut self, server: usize) {
        if server < SERVERS_MAX {
            self.0 &= !(1 << server);
        }
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub(super) fn iter(self) -> impl Iterator<Item = usize> {
        (0..SERVERS_MAX).filter(move |server| self.contains(*server))
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One server.
#[derive(Debug)]
pub(super) struct Server {
    /// What it was last said to have room for: its weight in the choice of servers.
    pub(super) weight: u64,
    /// What it has room for, by all that is known.
    pub(super) reserve_pages: u64,
    /// What it stores or will: held, stale, or under way.
    pub(super) stored_pages: u64,
    pub(super) held: PageSet,
    pub(super) stale: PageSet,
    pub(super) phase: ServerPhase,
}

/// A page that is being put to servers.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) since: Duration,
    /// Servers that have not answered.
    pub(super) pending: Mask,
    /// Servers that have it.
    pub(super) done: Mask,
    /// Servers that would not take it.
    pub(super) failed: Mask,
    /// Of those that have not answered, which hold an old copy that the put replaces.
    pub(super) replaces: Mask,
    /// The content changed since: what arrives is stale.
    pub(super) cancelled: bool,
    /// Its copies move between servers, the page itself stays as it is: from this one.
    pub(super) copied_from: Option<usize>,
}

/// All servers.
#[derive(Debug)]
pub(super) struct Servers {
    pub(super) list: Vec<Server>,
    pub(super) copies: usize,
    pub(super) transfers: BTreeMap<u64, Transfer>,
    pages: u64,
}

impl Servers {
    pub(super) fn new(pages: u64, copies: usize) -> Self {
        Self { list: Vec::new(), copies, transfers: BTreeMap::new(), pages }
    }

    /// A server with these pages; returns its number.
    pub(super) fn add(&mut self, room: ServerRoom, held: PageSet) -> usize {
        self.list.push(Server {
            weight: room.reserve_pages,
            reserve_pages: room.reserve_pages,
            stored_pages: held.len(),
            held,
            stale: PageSet::new(self.pages),
            phase: ServerPhase::Serving,
        });
        self.list.len() - 1
    }

    pub(super) fn get_mut(&mut self, server: usize) -> Option<&mut Server> {
        self.list.get_mut(server)
    }

    fn is(&self, server: usize, phase: ServerPhase) -> bool {
        self.list.get(server).is_some_and(|server| server.phase == phase)
    }

    /// Whether a server answers.
    pub(super) fn is_there(&self, server: usize) -> bool {
        self.list.get(server).is_some_and(|server| server.phase != ServerPhase::Gone)
    }

    /// Whether a server has a valid copy of a page.
    pub(super) fn has(&self, server: usize, page: u64) -> bool {
        self.list.get(server).is_some_and(|server| server.held.contains(page))
    }

    /// Servers with a valid copy of a page.
    pub(super) fn holders(&self, page: u64) -> Mask {
        let mut holders = Mask::default();
        for (number, server) in self.list.iter().enumerate() {
            if server.held.contains(page) {
                holders.insert(number);
            }
        }
        holders
    }

    /// The server to fetch a page from: the one that it would be put to first, if it has it.
    pub(super) fn holder(&self, page: u64) -> Option<usize> {
        let holders = self.holders(page);
        let weights = holders.iter().filter_map(|n| Some((n, self.list.get(n)?.weight.max(1))));
        best_server(page, weights)
    }

    /// The same servers, those first that the page would be put to first.
    pub(super) fn in_order(&self, page: u64, servers: Mask) -> Vec<usize> {
        let (mut left, mut order) = (servers, Vec::new());
        let weight = |n: usize| self.list.get(n).map_or(1, |server| server.weight.max(1));
        while let Some(next) = best_server(page, left.iter().map(|n| (n, weight(n)))) {
            left.remove(next);
            order.push(next);
        }
        order
    }

    /// Servers with a valid copy that stays.
    pub(super) fn serving_holders(&self, page: u64) -> Mask {
        let mut holders = self.holders(page);
        for server in holders.iter().filter(|server| !self.is(*server, ServerPhase::Serving)) {
            holders.remove(server);
        }
        holders
    }

    /// Whether a server that is being drained has a copy.
    pub(super) fn is_on_draining(&self, page: u64) -> bool {
        self.holders(page).iter().any(|server| self.is(server, ServerPhase::Draining))
    }

    /// Number of servers a page should be on: fewer than asked for if there are not as many.
    pub(super) fn copies_wanted(&self) -> usize {
        let serving = self.list.iter().filter(|server| server.phase == ServerPhase::Serving);
        self.copies.min(serving.count())
    }

    /// The server that a page goes to next, `except` those.
    pub(super) fn next_target(&self, page: u64, except: Mask) -> Option<usize> {
        let open = self.list.iter().enumerate().filter(|(number, server)| {
            let has_room =
                server.stored_pages < server.reserve_pages || server.stale.contains(page);
            server.phase == ServerPhase::Serving && has_room && !except.contains(*number)
        });
        best_server(page, open.map(|(number, server)| (number, server.weight)))
    }

    /// Servers that a page would be put to, primary first.
    pub(super) fn targets(&self, page: u64) -> Vec<usize> {
        let (mut targets, mut taken) = (Vec::with_capacity(self.copies), Mask::default());
        while targets.len() < self.copies
            && let Some(server) = self.next_target(page, taken)
        {
            taken.insert(server);
            targets.push(server);
        }
        targets
    }

    /// Pages for which the servers have room, every copy counted.
    pub(super) fn free_pages(&self) -> u64 {
        let serving = self.list.iter().filter(|server| server.phase == ServerPhase::Serving);
        serving.map(|server| server.reserve_pages.saturating_sub(server.stored_pages)).sum()
    }

    /// Room in pages of each server that takes pages, once it has dropped what is out of date, and what
    /// will be when it arrives. Linear in the servers' sets.
    pub(super) fn rooms(&self) -> Vec<u64> {
        let room = |(number, server): (usize, &Server)| {
            let is_in_vain = |transfer: &&Transfer| {
                transfer.cancelled && transfer.pending.or(transfer.done).contains(number)
            };
            let in_vain = self.transfers.values().filter(is_in_vain).count() as u64;
            let kept_pages = server.stored_pages.saturating_sub(server.stale.len() + in_vain);
            server.reserve_pages.saturating_sub(kept_pages)
        };
        let list = self.list.iter().enumerate();
        list.filter(|(_, server)| server.phase == ServerPhase::Serving).map(room).collect()
    }

    /// A put to `server` is under way from now on; says whether it replaces an old copy.
    pub(super) fn put_began(&mut self, page: u64, server: usize) -> bool {
        let Some(server) = self.list.get_mut(server) else { return false };
        let replaces = server.stale.contains(page);
        if replaces {
            server.stale.remove(page);
        } else {
            server.stored_pages += 1;
        }
        replaces
    }

    /// A put was not taken: what it would have replaced is still there. Returns whether it was under way.
    pub(super) fn put_failed(&mut self, page: u64, number: usize, failure: PutFailure) -> bool {
        let Some(transfer) = self.transfers.get_mut(&page) else { return false };
        if !transfer.pending.contains(number) {
            return false;
        }
        transfer.pending.remove(number);
        transfer.failed.insert(number);
        let replaces = transfer.replaces.contains(number);
        let Some(server) = self.list.get_mut(number) else { return true };
        if server.phase == ServerPhase::Gone {
            return true;
        }
        if replaces {
            server.stale.insert(page);
        } else {
            server.stored_pages = server.stored_pages.saturating_sub(1);
        }
        if failure == PutFailure::Full {
            server.reserve_pages = server.reserve_pages.min(server.stored_pages);
        }
        true
    }

    /// The server has a copy, which is valid or was out of date when it arrived.
    fn put_arrived(&mut self, page: u64, server: usize, valid: bool) {
        let Some(server) = self.list.get_mut(server) else { return };
        match server.phase {
            ServerPhase::Gone => {}
            _ if valid => server.held.insert(page),
            _ => server.stale.insert(page),
        }
    }

    /// All copies of a page are out of date, those included that are under way.
    pub(super) fn give_up(&mut self, page: u64) {
        for server in &mut self.list {
            if server.held.contains(page) {
                server.held.remove(page);
                server.stale.insert(page);
            }
        }
        self.give_up_transfer(page);
    }

    /// What is under way will be out of date when it arrives.
    pub(super) fn give_up_transfer(&mut self, page: u64) {
        if let Some(transfer) = self.transfers.get_mut(&page) {
            transfer.cancelled = true;
        }
    }

    /// The same as [`Self::give_up`] for many pages; returns the number of copies at each server.
    pub(super) fn give_up_all(&mut self, pages: &PageSet) -> Vec<u64> {
        for (page, transfer) in &mut self.transfers {
            transfer.cancelled |= pages.contains(*page);
        }
        let give_up = |server: &mut Server| {
            let mut copies = server.held.clone();
            copies.intersect(pages);
            server.held.subtract(&copies);
            server.stale.union_with(&copies);
            copies.len()
        };
        self.list.iter_mut().map(give_up).collect()
    }

    /// The copy at one server is out of date.
    pub(super) fn give_up_at(&mut self, page: u64, server: usize) {
        if let Some(server) = self.list.get_mut(server)
            && server.held.contains(page)
        {
            server.held.remove(page);
            server.stale.insert(page);
        }
    }

    /// The server turned out not to have a copy.
    pub(super) fn not_there(&mut self, page: u64, server: usize) {
        if let Some(server) = self.list.get_mut(server)
            && server.held.contains(page)
        {
            server.held.remove(page);
            server.stored_pages = server.stored_pages.saturating_sub(1);
        }
    }

    /// A transfer that all servers have answered is over: where it arrived it is held, or stale.
    pub(super) fn settle(&mut self, page: u64) {
        let Some(transfer) = self.transfers.remove(&page) else { return };
        for server in transfer.done.iter() {
            self.put_arrived(page, server, !transfer.cancelled);
        }
    }

    /// A server and all it had are gone; returns what it held.
    pub(super) fn lose(&mut self, server: usize) -> PageSet {
        let none = PageSet::new(self.pages);
        let Some(server) = self.list.get_mut(server) else { return none };
        server.phase = ServerPhase::Gone;
        (server.stored_pages, server.reserve_pages) = (0, 0);
        server.stale.clear();
        std::mem::replace(&mut server.held, none)
    }

    /// Whether no server has anything of the guest, nor will.
    pub(super) fn are_empty(&self) -> bool {
        let nothing = |server: &Server| server.held.is_empty() && server.stale.is_empty();
        self.transfers.is_empty() && self.list.iter().all(nothing)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let sets = |server: &Server| server.held.memory_bytes() + server.stale.memory_bytes();
        self.list.iter().map(sets).sum()
    }
}
