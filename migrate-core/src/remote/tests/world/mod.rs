//! A guest, its RAM file and servers, and an interpreter of all decisions.
//!
//! ```text
//!   vCPUs ──► faults (queue) ──► Remote ──► gets ────────────────► server ──► answers ──► Remote
//!                                  └──► evictor's queue (in order) ─► server ──► answers ──► Remote
//! ```
//!
//! Each arrow takes its time: an operation moves one thing by one step. A page's content is one word;
//! what the guest last wrote is kept beside, to compare every read with.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

mod evictor;
mod flush;
mod servers_change;

use super::*;

pub(super) const PAGES: u64 = 1100;

/// Content of a page: zero where it reads as zeros.
type Word = u64;

#[derive(Debug, Clone, Copy)]
pub(super) struct FilePage {
    pub(super) word: Word,
    pub(super) protected: bool,
}

/// What the evictor sends, in this order.
#[derive(Debug, Clone)]
enum Out {
    Put { page: u64, server: usize },
    Drop { server: usize, page: u64 },
}

/// A request at a server.
#[derive(Debug, Clone)]
enum Request {
    Put { page: u64, word: Word },
    Drop { page: u64 },
}

#[derive(Debug, Clone, Copy)]
enum PutAnswer {
    Done(u64),
    Full(u64),
}

#[derive(Debug, Default)]
pub(super) struct Server {
    pub(super) gone: bool,
    pub(super) capacity_pages: usize,
    pub(super) stored: BTreeMap<u64, Word>,
    requests: VecDeque<Request>,
    answers: VecDeque<PutAnswer>,
    /// Pages asked for by the fault thread, and by who moves copies.
    gets: VecDeque<u64>,
    got: VecDeque<(u64, Option<Word>)>,
}

/// A put, as the evictor or who moves copies remembers it.
#[derive(Debug)]
struct Job {
    /// Copied when the first put is sent.
    word: Option<Word>,
    unanswered: BTreeSet<usize>,
    /// A copy that moves from this server.
    from: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Access {
    page: u64,
    write: Option<Word>,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) remote: Remote,
    pub(super) limit: u64,
    /// Most pages that may be here: more than the limit after it was lowered.
    bound: u64,
    pub(super) file: BTreeMap<u64, FilePage>,
    /// What the guest wrote last; nothing where the content means nothing to it.
    pub(super) truth: Vec<Option<Word>>,
    pub(super) servers: Vec<Server>,
    faults: VecDeque<(u64, bool, bool)>,
    blocked: Vec<Access>,
    out: VecDeque<Out>,
    jobs: BTreeMap<u64, Job>,
    later: BTreeSet<(Duration, u64)>,
    /// Moves whose page was not fetched yet.
    moves: VecDeque<Move>,
    pub(super) window: Option<Duration>,
    /// Direct I/O under way: page, content, when it lands.
    dma: Vec<(u64, Word, Duration)>,
    pub(super) free: BTreeSet<u64>,
    unused: Option<PageSet>,
    dropping: VecDeque<(u64, bool)>,
    pub(super) merging: bool,
    /// The guest stands still; accesses that wait for a page may still end.
    pub(super) stopped: bool,
    pub(super) killed: usize,
    /// Pages that were on their way from a server when it died: they may count as lost too early.
    interrupted: BTreeSet<u64>,
    pub(super) now: Duration,
    next_word: Word,
    /// What was done, to know that the histories reach everything.
    pub(super) punched: u64,
}

impl World {
    /// Pages below `used` have content; what the main host has no room for is on the servers.
    pub(super) fn new(setup: &Setup) -> Self {
        let mut in_use = PageSet::new(PAGES);
        in_use.insert_range(0..setup.used);
        let hot = PageSet::new(PAGES);
        let rooms: Vec<ServerRoom> =
            setup.rooms.iter().map(|room| ServerRoom { reserve_pages: *room }).collect();
        let placement = place(&in_use, &hot, |_| 0, setup.limit, &rooms, setup.copies).unwrap();
        let config = RemoteConfig {
            resident_pages_max: setup.limit,
            copies: setup.copies,
            servers: rooms,
            read_ahead_pages_max: 16,
            direct_io_window: setup.window,
        };
        let word = |page: u64| page + 1;
        let protected = false;
        let file = placement.main.iter().map(|p| (p, FilePage { word: word(p), protected }));
        let servers = placement.servers.iter().zip(&setup.rooms).map(|(set, room)| Server {
            stored: set.iter().map(|page| (page, word(page))).collect(),
            // A server may break its promise.
            capacity_pages: (*room as usize)
                .saturating_sub(setup.missing_room)
                .max(set.len() as usize),
            ..Server::default()
        });
        Self {
            limit: setup.limit,
            bound: setup.limit,
            file: file.collect(),
            truth: (0..PAGES).map(|p| Some(if p < setup.used { word(p) } else { 0 })).collect(),
            servers: servers.collect(),
            remote: Remote::new(PAGES, config, &placement.main, placement.servers).unwrap(),
            faults: VecDeque::new(),
            blocked: Vec::new(),
            out: VecDeque::new(),
            jobs: BTreeMap::new(),
            later: BTreeSet::new(),
            moves: VecDeque::new(),
            window: setup.window,
            dma: Vec::new(),
            free: BTreeSet::new(),
            unused: None,
            dropping: VecDeque::new(),
            merging: false,
            stopped: false,
            killed: 0,
            interrupted: BTreeSet::new(),
            now: Duration::ZERO,
            next_word: 1 << 32,
            punched: 0,
        }
    }

    fn new_word(&mut self) -> Word {
        self.next_word += 1;
        self.next_word
    }

    /// A vCPU reads or writes.
    pub(super) fn access(&mut self, page: u64, is_write: bool) {
        if self.stopped {
            return;
        }
        let write = is_write.then(|| self.new_word());
        self.attempt(Access { page, write });
    }

    fn attempt(&mut self, access: Access) {
        let page = access.page;
        match (self.file.get_mut(&page), access.write) {
            (None, write) => {
                self.faults.push_back((page, false, write.is_some()));
                self.blocked.push(access);
            }
            (Some(found), Some(_)) if found.protected => {
                self.faults.push_back((page, true, true));
                self.blocked.push(access);
            }
            (Some(found), Some(word)) => {
                found.word = word;
                self.truth[page as usize] = Some(word);
                self.free.remove(&page);
            }
            (Some(found), None) => {
                if let Some(truth) = self.truth[page as usize] {
                    assert_eq!(found.word, truth, "page {page} reads wrong");
                }
            }
        }
    }

    fn wake(&mut self, page: u64) {
        let (woken, blocked) =
            std::mem::take(&mut self.blocked).into_iter().partition(|access| access.page == page);
        self.blocked = blocked;
        let woken: Vec<Access> = woken;
        woken.into_iter().for_each(|access| self.attempt(access));
    }

    /// The fault thread looks at one fault.
    pub(super) fn fault(&mut self) {
        let Some((page, is_protection, is_write)) = self.faults.pop_front() else { return };
        if is_protection {
            match self.remote.write_fault(page) {
                WriteFault::Unprotect => self.unprotect(page),
                WriteFault::Wake => {
                    assert!(!self.file.contains_key(&page), "page {page} is there");
                    self.wake(page);
                }
            }
            return;
        }
        let fault = self.remote.missing_fault(page, is_write, self.now);
        self.answer(page, fault);
        self.read_ahead();
    }

    fn unprotect(&mut self, page: u64) {
        if let Some(found) = self.file.get_mut(&page) {
            found.protected = false;
        }
        self.wake(page);
    }

    fn answer(&mut self, page: u64, fault: MissingFault) {
        for page in fault.punch {
            self.punch(page);
        }
        match fault.answer {
            FaultAnswer::Zeros(run) => {
                assert!(run.contains(&page), "{page} is waited for, not {run:?}");
                run.for_each(|page| self.place(page, 0, false));
            }
            FaultAnswer::Fetch(fetch) => {
                assert_eq!(fetch.runs[0].start, page, "the page that is waited for comes first");
                self.send_fetches(vec![fetch]);
            }
            FaultAnswer::Wait | FaultAnswer::NoRoom => {}
            FaultAnswer::Present if self.file.contains_key(&page) => self.wake(page),
            FaultAnswer::Present => {
                self.file.insert(page, FilePage { word: 0, protected: false });
                self.remote.given_back(page);
                self.wake(page);
            }
            FaultAnswer::Lost => {
                assert!(self.remote.lost_pages().contains(page) && self.remote.is_lost());
                self.blocked.retain(|access| access.page != page);
            }
        }
    }

    fn place(&mut self, page: u64, word: Word, protected: bool) {
        assert!(self.file.insert(page, FilePage { word, protected }).is_none(), "{page} is there");
        let pages = self.file.len() as u64;
        assert!(self.merging || pages <= self.bound, "{pages} pages are resident");
        self.wake(page);
    }

    /// A page goes: a server that lives must have what is in the file.
    fn punch(&mut self, page: u64) {
        let Some(found) = self.file.remove(&page) else {
            return assert_eq!(self.truth[page as usize], None, "page {page} is not there");
        };
        assert!(found.protected, "page {page} may be written while it goes");
        self.assert_stored(page, found.word);
        self.punched += 1;
        self.wake(page);
    }

    fn assert_stored(&self, page: u64, word: Word) {
        let is_there = |server: &Server| !server.gone && server.stored.get(&page) == Some(&word);
        assert!(self.servers.iter().any(is_there), "no server has page {page}");
    }

    pub(super) fn send_fetches(&mut self, fetches: Vec<Fetch>) {
        for fetch in fetches {
            let count: u64 = fetch.runs.iter().map(|run| run.end - run.start).sum();
            assert!((1..=FETCH_PAGES_MAX).contains(&count));
            let server = &mut self.servers[fetch.server];
            assert!(!server.gone);
            for page in fetch.runs.into_iter().flatten() {
                assert!(!server.gets.contains(&page), "page {page} is asked for twice");
                assert!(!self.file.contains_key(&page));
                server.gets.push_back(page);
            }
        }
    }

    fn read_ahead(&mut self) {
        let fetches = self.remote.read_ahead();
        self.send_fetches(fetches);
    }

    /// A server works on one request of the evictor, and on one page of the fault thread.
    pub(super) fn serve(&mut self, server: usize, puts: bool) {
        let Some(server) = self.servers.get_mut(server).filter(|server| !server.gone) else {
            return;
        };
        if !puts {
            if let Some(page) = server.gets.pop_front() {
                server.got.push_back((page, server.stored.get(&page).copied()));
            }
            return;
        }
        match server.requests.pop_front() {
            Some(Request::Put { page, word }) => {
                let fits = server.stored.len() < server.capacity_pages;
                let answer = if fits || server.stored.contains_key(&page) {
                    server.stored.insert(page, word);
                    PutAnswer::Done(page)
                } else {
                    PutAnswer::Full(page)
                };
                server.answers.push_back(answer);
            }
            Some(Request::Drop { page }) => {
                assert!(server.stored.remove(&page).is_some(), "page {page} is dropped in vain");
            }
            None => {}
        }
    }

    /// An answer of a server is looked at.
    pub(super) fn hear(&mut self, number: usize, puts: bool) {
        let Some(server) = self.servers.get_mut(number) else { return };
        if puts {
            let answer = server.answers.pop_front();
            self.put_answered(number, answer);
            return;
        }
        let Some((page, word)) = server.got.pop_front() else { return };
        let Some(word) = word else {
            let again = self.remote.fetch_failed(number, &[page]);
            return self.send_fetches(again);
        };
        match self.remote.arrived(page, number, self.now) {
            Arrived::Place { protect } => self.place(page, word, protect),
            Arrived::Ignore => {}
        }
        self.read_ahead();
    }

    fn waiting(&mut self) {
        for (page, fault) in self.remote.waiting_with_room(self.now) {
            assert!(fault.answer != FaultAnswer::NoRoom || !fault.punch.is_empty());
            self.answer(page, fault);
        }
        self.read_ahead();
    }

    /// Time passes: direct I/O lands, puts become final.
    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        let (landed, dma) =
            std::mem::take(&mut self.dma).into_iter().partition(|(.., at)| *at <= now);
        self.dma = dma;
        self.land(landed);
        while let Some((until, page)) = self.later.first().copied().filter(|(at, _)| *at <= now) {
            self.later.remove(&(until, page));
            self.finish_put(page);
        }
    }

    fn land(&mut self, dma: Vec<(u64, Word, Duration)>) {
        for (page, word, _) in dma {
            self.file.get_mut(&page).expect("the page went before its data came").word = word;
            self.truth[page as usize] = Some(word);
        }
    }

    /// A device begins to write a page, which pins it as a write does.
    pub(super) fn begin_dma(&mut self, page: u64, after: Duration) {
        let Some(window) = self.window.filter(|_| !self.stopped) else { return };
        self.access(page, true);
        let writable = self.file.get(&page).is_some_and(|found| !found.protected);
        let waits = self.blocked.iter().any(|access| access.page == page);
        if writable && !waits && !self.free.contains(&page) {
            let word = self.new_word();
            self.dma.push((page, word, self.now + after.min(window)));
        }
    }

    fn is_in_use(&self, page: u64) -> bool {
        self.blocked.iter().any(|access| access.page == page)
            || self.dma.iter().any(|(target, ..)| *target == page)
    }

    /// The guest frees a page.
    pub(super) fn free(&mut self, page: u64) {
        if !self.stopped && !self.is_in_use(page) {
            self.truth[page as usize] = None;
            self.free.insert(page);
        }
    }

    /// The guest's balloon gives a page back behind the pager's back.
    pub(super) fn balloon(&mut self, page: u64) {
        if !self.stopped && !self.is_in_use(page) && self.free.contains(&page) {
            self.file.remove(&page);
        }
    }

    pub(super) fn begin_reclaim(&mut self) {
        self.remote.begin_reclaim();
        self.unused = None;
    }

    /// The guest's kernel is asked.
    pub(super) fn ask_unused(&mut self) {
        let mut unused = PageSet::new(PAGES);
        self.free.iter().for_each(|page| unused.insert(*page));
        self.unused = Some(unused);
    }

    pub(super) fn reclaim_remote(&mut self) {
        if let Some(unused) = &self.unused {
            self.remote.reclaim_remote(unused);
        }
    }

    /// Candidates are protected, and the kernel asked again.
    pub(super) fn reclaim_candidates(&mut self, pages_max: usize) {
        let Some(unused) = &self.unused else { return };
        for page in self.remote.reclaim_candidates(unused, pages_max) {
            if let Some(found) = self.file.get_mut(&page) {
                found.protected = true;
            }
            self.dropping.push_back((page, self.free.contains(&page)));
        }
    }

    pub(super) fn reclaim_done(&mut self) {
        let Some((page, unused)) = self.dropping.pop_front() else { return };
        match self.remote.reclaim_done(page, unused) {
            ReclaimDone::Punch => {
                self.file.remove(&page);
                self.wake(page);
                self.waiting();
            }
            ReclaimDone::Unprotect => self.unprotect(page),
            ReclaimDone::Keep | ReclaimDone::Cancelled => {}
        }
    }

    /// What must hold at any time.
    pub(super) fn check(&mut self) {
        let stats = self.remote.stats();
        let resident = stats.resident_pages;
        let taken = resident + stats.coming_pages;
        assert!(self.merging || taken <= self.bound);
        self.bound = self.limit.max(self.bound.min(taken));
        assert!(self.file.len() as u64 <= resident, "more is in the file than is known");
        for (page, found) in &self.file {
            let state = self.remote.pages.state(*page);
            assert!(found.protected || state == State::Dirty, "{state:?} page {page} is writable");
        }
        self.remote.check();
        self.check_flushed();
    }

    /// Pages of which no server that lives has what the guest wrote last, though the file does not
    /// have it either.
    pub(super) fn assert_lost(&self) {
        for page in self.remote.lost_pages().iter() {
            let truth = self.truth[page as usize];
            // What is stale is not counted on, though it may still be right.
            let has = |(number, server): (usize, &Server)| {
                let is_stale = self.remote.servers.list[number].stale.contains(page);
                let is_dropped = |out: &Out| matches!(out, Out::Drop { server, page: dropped } if *server == number && *dropped == page);
                let is_dropping = |request: &Request| matches!(request, Request::Drop { page: dropped } if *dropped == page);
                let is_stale = is_stale
                    || self.out.iter().any(is_dropped)
                    || server.requests.iter().any(is_dropping);
                truth.is_some() && !is_stale && server.stored.get(&page) == truth.as_ref()
            };
            let is_there = self.servers.iter().enumerate().any(has);
            assert!(self.interrupted.contains(&page) || !is_there, "page {page} is not lost");
            assert!(!self.file.contains_key(&page), "page {page} is here");
        }
    }
}
