//! Faults of the guest, pages that arrive, and what to read ahead.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::pages::{Class, State};
use super::{FETCH_PAGES_MAX, Remote};
use crate::postcopy::HostPage;
use crate::postcopy::window::{Ahead, Direction, REACH_PAGES};

/// Part of the free room that one fault may fill with neighbours.
const NEIGHBOURS_SHARE: u64 = 2;

/// Part of the clean pages of short use that one fault may give up for neighbours.
const GIVEN_UP_SHARE: u64 = 4;

/// Pages to ask a server for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetch {
    /// The server, by its number.
    pub server: usize,
    /// At most [`FETCH_PAGES_MAX`] pages, in this order: a page that the guest waits for comes first.
    pub runs: Vec<Range<u64>>,
}

impl Fetch {
    /// Of these pages, in their order.
    pub fn of(server: usize, pages: impl IntoIterator<Item = u64>) -> Self {
        Self { server, runs: runs_of(pages) }
    }
}

/// What to do about a fault on a missing page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingFault {
    /// Punch these clean pages out of the RAM file first: they make room, and servers have them.
    pub punch: Vec<u64>,
    /// What the guest gets.
    pub answer: FaultAnswer,
}

/// What the guest gets for a fault on a missing page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultAnswer {
    /// Place zeros in these pages, not protected: the faulting one and neighbours that hold nothing either.
    Zeros(Range<u64>),
    /// Ask for the page, and with it for the others named.
    Fetch(Fetch),
    /// It is under way; placing it wakes the guest.
    Wait,
    /// There is no room; [`Remote::waiting_with_room`] names it once there is.
    NoRoom,
    /// It is in the RAM file. Place a zero page all the same: mostly there is something already
    /// (`EEXIST`), then wake the guest. If there was nothing, the guest has given the page back behind
    /// our back (a balloon): call [`Remote::given_back`].
    Present,
    /// No server has it any more, or it is none of the guest's pages: the guest has to be stopped.
    Lost,
}

/// What to do about a write to a protected page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteFault {
    /// Remove the protection, which wakes the guest.
    Unprotect,
    /// The page is not in the RAM file any more: wake the guest, which will fault on it as missing.
    Wake,
}

/// What to do with a page that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrived {
    /// Place it.
    Place {
        /// Under write protection: its copies stay valid.
        protect: bool,
    },
    /// It is not waited for from this server.
    Ignore,
}

/// Someone waits for a page.
#[derive(Debug)]
pub(super) struct Wait {
    since: Duration,
    /// To write it.
    is_write: bool,
    /// A fault on it found no room.
    found_no_room: bool,
}

impl Remote {
    /// The guest faulted on a page that is not mapped and not in the RAM file.
    ///
    /// Carry the answer out, all but sending, before letting go of the lock. Call [`Self::read_ahead`]
    /// afterwards.
    pub fn missing_fault(&mut self, page: u64, is_write: bool, now: Duration) -> MissingFault {
        let queued_before = self.waits.contains_key(&page);
        self.used.insert(page);
        let fault = self.answer(page, is_write, now);
        if fault.answer == FaultAnswer::NoRoom {
            let wait = self.note_wait(page, is_write, now);
            wait.found_no_room = true;
            if !queued_before {
                self.queued.push_back(page);
            }
        }
        fault
    }

    fn answer(&mut self, page: u64, is_write: bool, now: Duration) -> MissingFault {
        let mut punch = Vec::new();
        let answer = match self.pages.state(page) {
            State::Empty => self.zeros(page, now, &mut punch),
            State::Remote => self.fetch(page, is_write, now, &mut punch),
            State::Coming => self.wait(page, is_write, now),
            State::Dirty | State::Clean | State::Leaving | State::Dropping | State::Flushing => {
                FaultAnswer::Present
            }
            State::Lost => FaultAnswer::Lost,
        };
        MissingFault { punch, answer }
    }

    fn zeros(&mut self, page: u64, now: Duration, punch: &mut Vec<u64>) -> FaultAnswer {
        if !self.make_room(1, punch) {
            return FaultAnswer::NoRoom;
        }
        self.turn(page, State::Dirty, self.class_for(page, Class::Recent));
        self.counts.faults.zero += 1;
        self.ghosts.forget(page);
        self.end_wait(page, now);
        let run = self.zeros_beside(page);
        for neighbour in run.clone().filter(|neighbour| *neighbour != page) {
            self.turn(neighbour, State::Dirty, self.class_for(neighbour, Class::Recent));
            self.counts.zeros_ahead_pages += 1;
        }
        self.zero_windows.answered(&run);
        FaultAnswer::Zeros(run)
    }

    /// The page with neighbours that hold nothing and that the guest will use next, if it goes on as it did: what
    /// is allocated for something large lies side by side.
    fn zeros_beside(&mut self, page: u64) -> Range<u64> {
        let fault = self.host_page(page);
        let window = self.zero_windows.fault(&fault, &self.pages);
        // What is provided needlessly has to leave again, and others may wait for the room.
        let has_servers = self.servers.free_pages() > 0 || self.is_merging();
        let room = self.room().saturating_sub(self.queued.len() as u64) / NEIGHBOURS_SHARE;
        let count = window.pages.saturating_sub(1).min(if has_servers { room } else { 0 });
        let is_free =
            |page: &u64| self.pages.state(*page) == State::Empty && !self.waits.contains_key(page);
        match window.direction {
            Direction::Forward => {
                let reach = page + 1..page.saturating_add(1 + count).min(self.pages.len());
                page..page + 1 + reach.take_while(is_free).count() as u64
            }
            Direction::Backward => {
                let reach = page.saturating_sub(count)..page;
                page - reach.rev().take_while(is_free).count() as u64..page + 1
            }
        }
    }

    fn fetch(
        &mut self,
        page: u64,
        is_write: bool,
        now: Duration,
        punch: &mut Vec<u64>,
    ) -> FaultAnswer {
        let Some(server) = self.servers.holder(page) else {
            self.lose(page);
            return FaultAnswer::Lost;
        };
        if !self.make_room(1, punch) {
            return FaultAnswer::NoRoom;
        }
        let class = self.class_of_fault(page);
        self.ask(page, server, class);
        self.note_wait(page, is_write, now);
        self.counts.faults.fetch += 1;
        let window = self.windows.fault(&self.host_page(page), self.pages.remote());
        let count = window.pages.saturating_sub(1);
        let mut neighbours = self.neighbours(page..page + 1, window.direction, count, server);
        let free = self.room() / NEIGHBOURS_SHARE;
        let wanted = (neighbours.len() as u64).saturating_sub(free);
        let spare = self.queues.clean_len(Class::Ahead) + self.queues.clean_len(Class::Recent);
        let given_up = self.give_up_clean(wanted.min(spare / GIVEN_UP_SHARE), punch);
        neighbours.truncate(usize::try_from(free.saturating_add(given_up)).unwrap_or(usize::MAX));
        self.ask_neighbours(&mut neighbours, server);
        neighbours.insert(0, page);
        FaultAnswer::Fetch(Fetch::of(server, neighbours))
    }

    fn wait(&mut self, page: u64, is_write: bool, now: Duration) -> FaultAnswer {
        self.note_wait(page, is_write, now);
        self.counts.faults.wait += 1;
        if self.pages.class(page) == Class::Ahead {
            let class = self.class_of_fault(page);
            self.turn(page, State::Coming, class);
        }
        self.windows.late(&self.host_page(page), self.pages.remote());
        if let Some(ahead) = self.windows.reached(page, true) {
            self.ask_ahead(&ahead);
        }
        FaultAnswer::Wait
    }

    /// Whether a page that is used now was evicted too early.
    fn class_of_fault(&mut self, page: u64) -> Class {
        if self.ghosts.returned(page) {
            self.counts.refaults += 1;
            Class::Long
        } else {
            Class::Recent
        }
    }

    /// The guest wrote to a write-protected page. Carry the answer out before letting go of the lock.
    pub fn write_fault(&mut self, page: u64) -> WriteFault {
        match self.pages.state(page) {
            State::Dirty => return WriteFault::Unprotect,
            State::Leaving => self.counts.evicted.cancelled += 1,
            State::Clean | State::Dropping | State::Flushing => {}
            State::Empty | State::Remote | State::Coming | State::Lost => return WriteFault::Wake,
        }
        let class = match self.pages.class(page) {
            Class::Long => Class::Long,
            Class::None | Class::Ahead | Class::Recent => Class::Recent,
        };
        self.used.insert(page);
        self.make_dirty(page, class);
        WriteFault::Unprotect
    }

    /// A hole was found where a page should be in the RAM file, and a zero page was placed there: the
    /// guest gave the page back and uses it anew.
    pub fn given_back(&mut self, page: u64) {
        // What is known of the copies is no longer true.
        let protected = [State::Clean, State::Leaving, State::Dropping, State::Flushing];
        if protected.contains(&self.pages.state(page)) {
            self.make_dirty(page, Class::Recent);
        }
    }

    /// A page arrived from a server. Place it before letting go of the lock; an answer of a server
    /// that was reported lost must not be reported.
    pub fn arrived(&mut self, page: u64, server: usize, now: Duration) -> Arrived {
        if self.coming.get(&page) != Some(&server) {
            return Arrived::Ignore;
        }
        self.coming.remove(&page);
        let is_write = self.end_wait(page, now);
        let class = self.class_for(page, self.pages.class(page));
        let protect = !is_write && self.keeps_copies(page);
        if protect {
            self.turn(page, State::Clean, class);
        } else {
            self.servers.give_up(page);
            self.turn(page, State::Dirty, class);
        }
        if let Some(ahead) = self.windows.reached(page, false) {
            self.ask_ahead(&ahead);
        }
        Arrived::Place { protect }
    }

    /// Whether the copies of a page that arrives stay: not if all are to come back, if the server is to
    /// be drained, or if the servers are nearly full, so that what is evicted finds room. A flush would
    /// only have to make them again.
    fn keeps_copies(&self, page: u64) -> bool {
        let copies = self.servers.copies as u64;
        let has_room = self.servers.free_pages() > self.slack().saturating_mul(copies);
        self.may_be_clean(page) && (has_room || self.is_flushing)
    }

    /// A server answered that it does not have these pages. Returns what to ask others for; pages that
    /// no other has are lost ([`Self::lost_pages`]).
    pub fn fetch_failed(&mut self, server: usize, pages: &[u64]) -> Vec<Fetch> {
        let mut again = Vec::new();
        for page in pages {
            if self.coming.get(page) == Some(&server) {
                self.servers.not_there(*page, server);
                self.ask_another(*page, &mut again);
            }
        }
        self.fetches(again)
    }

    /// Asks for a coming page again, from a server that has it.
    pub(super) fn ask_another(&mut self, page: u64, again: &mut Vec<(usize, u64)>) {
        match self.servers.holder(page) {
            Some(server) => {
                self.coming.insert(page, server);
                again.push((server, page));
            }
            None => self.lose(page),
        }
    }

    /// Puts pages to be asked for together by server, those first that the guest waits for.
    pub(super) fn fetches(&self, mut pages: Vec<(usize, u64)>) -> Vec<Fetch> {
        pages.sort_by_key(|(server, page)| (!self.waits.contains_key(page), *server, *page));
        let mut by_server: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for (server, page) in pages {
            by_server.entry(server).or_default().push(page);
        }
        let mut fetches = Vec::new();
        for (server, pages) in by_server {
            for part in pages.chunks(FETCH_PAGES_MAX as usize) {
                fetches.push(Fetch::of(server, part.iter().copied()));
            }
        }
        fetches
    }

    /// Serves faults that waited for room, as far as there is some now. Call after pages left the RAM
    /// file and after the limit rose; carry the answers out in order before letting go of the lock. The
    /// last one may still find none ([`FaultAnswer::NoRoom`]), but have pages to punch.
    pub fn waiting_with_room(&mut self, now: Duration) -> Vec<(u64, MissingFault)> {
        let mut served = Vec::new();
        while let Some(page) = self.queued.front().copied() {
            let waiting = matches!(self.pages.state(page), State::Empty | State::Remote);
            let is_write = self.waits.get(&page).map(|wait| wait.is_write);
            if let Some(is_write) = is_write.filter(|_| waiting) {
                let fault = self.answer(page, is_write, now);
                if fault.answer == FaultAnswer::NoRoom {
                    // What it gave up counts as gone.
                    served.extend((!fault.punch.is_empty()).then_some((page, fault)));
                    break;
                }
                served.push((page, fault));
            }
            self.queued.pop_front();
        }
        served
    }

    /// What to ask for before the guest faults on it. Call after faults and arrivals; costs nothing
    /// when there is nothing to ask for.
    pub fn read_ahead(&mut self) -> Vec<Fetch> {
        std::mem::take(&mut self.ahead)
    }

    fn note_wait(&mut self, page: u64, is_write: bool, now: Duration) -> &mut Wait {
        if !self.waits.contains_key(&page) {
            self.stalls.began(now);
        }
        let new = || Wait { since: now, is_write: false, found_no_room: false };
        let wait = self.waits.entry(page).or_insert_with(new);
        wait.is_write |= is_write;
        wait
    }

    /// Nobody waits for the page from now on; says whether someone waited to write it.
    fn end_wait(&mut self, page: u64, now: Duration) -> bool {
        let Some(wait) = self.waits.remove(&page) else { return false };
        self.stalls.ended(wait.since, now);
        self.counts.faults.no_room += u64::from(wait.found_no_room);
        wait.is_write
    }

    /// One page, with all pages as its block: neighbours in another block do no harm.
    fn host_page(&self, page: u64) -> HostPage {
        HostPage { pages: page..page + 1, block: 0..self.pages.len() }
    }

    pub(super) fn ask(&mut self, page: u64, server: usize, class: Class) {
        self.turn(page, State::Coming, class);
        self.under_copied.remove(page);
        self.coming.insert(page, server);
    }

    /// At most `count` remote pages on one side of `from`, the nearest first, up to the first that
    /// this server does not have: there the stream goes on with another fault.
    fn neighbours(
        &self,
        from: Range<u64>,
        direction: Direction,
        count: u64,
        server: usize,
    ) -> Vec<u64> {
        let remote = self.pages.remote();
        let mut side = match direction {
            Direction::Forward => from.end..from.end.saturating_add(REACH_PAGES),
            Direction::Backward => from.start.saturating_sub(REACH_PAGES)..from.start,
        };
        let mut found = Vec::new();
        while (found.len() as u64) < count {
            let next = match direction {
                Direction::Forward => remote.first_in(side.clone()),
                Direction::Backward => remote.last_in(side.clone()),
            };
            let Some(page) = next.filter(|page| self.servers.has(server, *page)) else {
                break;
            };
            match direction {
                Direction::Forward => side.start = page + 1,
                Direction::Backward => side.end = page,
            }
            found.push(page);
        }
        found
    }

    /// Asks for pages ahead of the guest, which are put in ascending order.
    fn ask_neighbours(&mut self, pages: &mut [u64], server: usize) {
        pages.sort_unstable();
        for page in &*pages {
            let is_back = self.ghosts.returned(*page);
            self.ask(*page, server, if is_back { Class::Recent } else { Class::Ahead });
            self.windows.answered(&(*page..page + 1));
        }
        self.counts.read_ahead_pages += pages.len() as u64;
    }

    /// Asks for a stream's next window. Nothing is evicted for it: it would take the place of pages
    /// that the guest is known to have used.
    fn ask_ahead(&mut self, ahead: &Ahead) {
        let direction = ahead.window.direction;
        let remote = self.pages.remote();
        let first = match direction {
            Direction::Forward => {
                remote.first_in(ahead.span.end..ahead.span.end.saturating_add(REACH_PAGES))
            }
            Direction::Backward => {
                remote.last_in(ahead.span.start.saturating_sub(REACH_PAGES)..ahead.span.start)
            }
        };
        let Some(server) = first.and_then(|page| self.servers.holder(page)) else { return };
        let count = ahead.window.pages.min(self.room() / NEIGHBOURS_SHARE);
        let mut pages = self.neighbours(ahead.span.clone(), direction, count, server);
        self.ask_neighbours(&mut pages, server);
        if !pages.is_empty() {
            self.ahead.push(Fetch::of(server, pages));
        }
    }
}

/// Pages as runs, in their order.
pub fn runs_of(pages: impl IntoIterator<Item = u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}
