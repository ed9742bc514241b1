//! Remote paging: a split guest runs on its main host while a part of its memory lies on memory servers.
//!
//! ```text
//!              fault: zeros                        arrived, guest writes it
//!   Empty ────────────────────────► Dirty ◄──────────────────────────────┐
//!     ▲                             │   ▲  ▲                             │
//!     │ reclaimed            victim │   │  └───────── write ───┐         │
//!     ├──────── Dropping ◄──┐       ▼   │ write                │         │
//!     │                     └──── Leaving                    Clean ◄── Coming ──► Lost
//!     │                             │ put done, unchanged      │ victim   ▲  no copy left
//!     │ reclaimed                   ▼                          ▼          │
//!     └────────────────────────── Remote ◄─────────────────────┘          │
//!                                   └──────────── fault, read ahead ──────┘
//! ```
//!
//! A dirty page that is flushed becomes clean:
//!
//! ```text
//!              next_to_flush               put done, unchanged
//!   Dirty ────────────────────► Flushing ──────────────────────► Clean
//!     ▲         write, lost server │ │ victim
//!     └────────────────────────────┘ └────────► Leaving
//! ```
//!
//! Empty pages are holes of the RAM file; dirty, clean, leaving, dropping and flushing ones are in it,
//! all but the dirty ones under write protection; the others are on servers.
//!
//! One lock holds a [`Remote`]. Whoever calls it carries out, before it lets go of the lock, what has
//! to be one with the decision: placing zeros or a page, punching, write protection and its removal.
//! Copying, sending and waiting are done without the lock.
//!
//! Order at a server: requests on one connection are processed in order. The evictor's connection
//! carries all puts (those of [`Remote::next_to_move`] included) and all drops, sent in the order in
//! which [`Remote`] named them. A copy is named stale only when no put of that page to that server is
//! under way, and a page is put again only after its last put was answered; so a drop never meets the
//! content of a later put. Faults ask over other connections; a page is asked for only when its put
//! was answered, and at most once at a time.
//!
//! Invariants:
//! - A page that has content is read from where its last content is: never as zeros, never as an older
//!   copy.
//! - Pages in the RAM file and pages that are coming never exceed the resident limit together.
//! - A page leaves the RAM file only if a server has the content it has at that moment, or if the guest
//!   does not use it.
//! - What is done for one fault depends on the read-ahead window, never on the guest's size.

mod eviction;
mod faults;
mod flush;
mod ghosts;
mod merge;
mod pages;
mod placement;
mod queues;
mod reclaim;
mod servers;
mod stats;
#[cfg(test)]
mod tests;

pub use eviction::{PutDone, PutFailed, PutFailure, Stale, Victims};
pub use faults::{Arrived, FaultAnswer, Fetch, MissingFault, WriteFault, runs_of};
pub use merge::{Move, MoveFailure};
pub use placement::{CHUNK_PAGES, Placement, PlacementError, place, server_of, slack_pages};
pub use reclaim::ReclaimDone;
pub use servers::SERVERS_MAX;
pub use stats::{EvictionCounts, FaultCounts, RemoteStats, ServerPhase, ServerStats};

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use thiserror::Error;

use crate::error::{Classify, ErrorBin};
use crate::pageset::PageSet;
use crate::postcopy::stalls::Stalls;
use crate::postcopy::window::Windows;

use eviction::Cold;
use faults::Wait;
use ghosts::Ghosts;
use pages::{Class, Pages, State};
use queues::Queues;
use servers::Servers;
use stats::Counts;

/// Most pages that one [`Fetch`] asks for.
pub const FETCH_PAGES_MAX: u64 = 256;

/// Most pages of zeros that are provided for one fault.
const ZERO_PAGES_MAX: u64 = 64;

/// Room on a memory server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerRoom {
    /// Pages that it keeps free for the guest.
    pub reserve_pages: u64,
}

/// How a split guest is paged.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// Most pages that the main host may hold.
    pub resident_pages_max: u64,
    /// Servers that each page is put to: 1 or 2.
    pub copies: usize,
    /// The servers, by number.
    pub servers: Vec<ServerRoom>,
    /// Most pages to ask for with one fault, the faulting one included; beyond [`FETCH_PAGES_MAX`] it
    /// counts as that.
    pub read_ahead_pages_max: u64,
    /// For a guest with direct I/O, the longest plausible time from pinning a page until its data
    /// arrives. Data may reach a page for as long after it was protected.
    pub direct_io_window: Option<Duration>,
}

/// Why a guest cannot be paged.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The servers or the copies are wrong.
    #[error(transparent)]
    Servers(#[from] PlacementError),
    /// The guest is larger than the tables can number.
    #[error("A guest of {0} pages cannot be split; 16 TiB is the most")]
    TooLarge(u64),
    /// The main host may hold too little.
    #[error("A resident limit of {0} pages is too small; the least is 2")]
    LimitTooSmall(u64),
    /// The main host holds more than it may.
    #[error(
        "{resident} pages are resident, and the limit is {limit}; raise it or leave more to the servers"
    )]
    TooManyResident {
        /// Pages given as resident.
        resident: u64,
        /// The limit in pages.
        limit: u64,
    },
    /// A server is said to hold more than it has room for.
    #[error(
        "Memory server {server} is to hold {pages} pages and reserves {reserve}; reserve more on it"
    )]
    TooManyRemote {
        /// The server.
        server: usize,
        /// Pages given for it.
        pages: u64,
        /// Its room in pages.
        reserve: u64,
    },
    /// A set is for another amount of RAM, or there are not as many sets as servers.
    #[error("The placement is not that of this guest; split it again")]
    WrongPlacement,
    /// A page has two places, or more copies than it may have.
    #[error("Page {0} was placed more than once; split the guest again")]
    PlacedTwice(u64),
    /// There are as many servers as can be told apart.
    #[error(
        "A guest can have {SERVERS_MAX} memory servers over its time; merge it and split it again"
    )]
    TooManyServers,
}

impl Classify for RemoteError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::WrongPlacement | Self::PlacedTwice(_) => ErrorBin::PeerMisbehaved,
            Self::Servers(error) => error.bin(),
            _ => ErrorBin::CallerMisuse,
        }
    }
}

/// The state of a split guest's memory.
#[derive(Debug)]
pub struct Remote {
    pages: Pages,
    queues: Queues,
    servers: Servers,
    windows: Windows,
    /// The same for memory that holds nothing.
    zero_windows: Windows,
    read_ahead_pages_max: u64,
    /// Which server each coming page was asked from.
    coming: BTreeMap<u64, usize>,
    /// Pages that the guest waits for.
    waits: BTreeMap<u64, Wait>,
    /// Of those, pages that wait for room, in the order of their faults. Some may have been served.
    queued: VecDeque<u64>,
    /// Asked for ahead of the guest, not yet handed out.
    ahead: Vec<Fetch>,
    cold: Cold,
    /// Pages that the guest used since they came here, as its faults show.
    used: PageSet,
    pinned: PageSet,
    ghosts: Ghosts,
    /// Remote pages that have fewer copies than asked for.
    under_copied: PageSet,
    /// Pages that became remote since the last reclaim began.
    returned: Option<PageSet>,
    /// Pages about which the guest's kernel is being asked again, those included that were written since.
    candidates: BTreeSet<u64>,
    /// Nothing when all are to come back.
    limit_pages: Option<u64>,
    direct_io_window: Duration,
    /// Resident pages get copies while they stay.
    is_flushing: bool,
    /// The guest stands still.
    is_stopped: bool,
    merge_cursor: u64,
    stalls: Stalls,
    counts: Counts,
}

impl Remote {
    /// For a guest of `pages` pages of 4096 bytes, of which `resident` are in the RAM file, and those
    /// of `remote` at the server of the same number; with two copies a page is in two of these sets.
    /// All others are empty.
    ///
    /// # Errors
    /// If the limits do not fit or the sets contradict them or one another.
    pub fn new(
        pages: u64,
        config: RemoteConfig,
        resident: &PageSet,
        remote: Vec<PageSet>,
    ) -> Result<Self, RemoteError> {
        check(pages, &config, resident, &remote)?;
        let limit = config.resident_pages_max;
        let read_ahead_pages_max = config.read_ahead_pages_max.clamp(1, FETCH_PAGES_MAX);
        let none = || PageSet::new(pages);
        let mut new = Self {
            pages: Pages::new(pages),
            queues: Queues::new(pages),
            servers: Servers::new(pages, config.copies),
            windows: Windows::new(read_ahead_pages_max),
            zero_windows: Windows::new(ZERO_PAGES_MAX),
            read_ahead_pages_max,
            coming: BTreeMap::new(),
            waits: BTreeMap::new(),
            queued: VecDeque::new(),
            ahead: Vec::new(),
            cold: Cold::new(pages),
            used: none(),
            pinned: none(),
            ghosts: Ghosts::new(pages, limit),
            under_copied: none(),
            returned: None,
            candidates: BTreeSet::new(),
            limit_pages: Some(limit),
            direct_io_window: config.direct_io_window.unwrap_or_default(),
            is_flushing: false,
            is_stopped: false,
            merge_cursor: 0,
            stalls: Stalls::new(),
            counts: Counts::default(),
        };
        // They were chosen as the hottest, so that they count as used again and again.
        for page in resident.iter() {
            new.turn(page, State::Dirty, Class::Long);
        }
        for (room, held) in config.servers.into_iter().zip(remote) {
            for page in held.iter() {
                new.pages.set(page, State::Remote, Class::None);
            }
            new.servers.add(room, held);
        }
        for page in new.pages.remote().iter() {
            if new.servers.holders(page).len() < config.copies {
                new.under_copied.insert(page);
            }
        }
        Ok(new)
    }

    /// Changes a page and the queue it is in; a page that was in a queue goes to the end of its new
    /// one.
    fn turn(&mut self, page: u64, state: State, class: Class) {
        let (before, before_class) = (self.pages.state(page), self.pages.class(page));
        let is_resident = |state| matches!(state, State::Dirty | State::Clean);
        if is_resident(before) {
            self.queues.take(page, before_class, before == State::Clean);
        }
        self.pages.set(page, state, class);
        if is_resident(state) {
            self.queues.push(page, class, state == State::Clean);
        }
    }

    /// The class of a page that is resident from now on: none if it is pinned. Pinned pages may take
    /// at most half of the limit, so that there is always something to evict.
    fn class_for(&self, page: u64, class: Class) -> Class {
        if self.is_pinned(page) { Class::None } else { class }
    }

    fn is_pinned(&self, page: u64) -> bool {
        let pinned_pages_max = self.limit_pages.unwrap_or(u64::MAX) / 2;
        self.queues.len(Class::None) < pinned_pages_max && self.pinned.contains(page)
    }

    /// The class of a page that was in no queue for a while and stays; it may have been pinned then.
    fn class_again(&self, page: u64) -> Class {
        match self.pages.class(page) {
            Class::None => self.class_for(page, Class::Recent),
            class => self.class_for(page, class),
        }
    }

    /// Whether a page that is here may be clean: not if its copies are to go, or if there are none.
    fn may_be_clean(&self, page: u64) -> bool {
        !self.is_merging()
            && !self.servers.is_on_draining(page)
            && !self.servers.holders(page).is_empty()
    }

    /// The page's content changed or is no longer needed on servers: it is dirty from now on.
    fn make_dirty(&mut self, page: u64, class: Class) {
        self.servers.give_up(page);
        self.turn(page, State::Dirty, self.class_for(page, class));
        self.cold.touched(page);
    }

    /// The page leaves the RAM file; servers have its content.
    fn make_remote(&mut self, page: u64) {
        let class = self.pages.class(page);
        self.turn(page, State::Remote, Class::None);
        self.cold.touched(page);
        self.used.remove(page);
        self.ghosts.evicted(page, class);
        if let Some(returned) = &mut self.returned {
            returned.insert(page);
        }
        self.note_copies(page);
    }

    /// Notes whether a page should be copied again.
    fn note_copies(&mut self, page: u64) {
        if self.servers.holders(page).len() < self.servers.copies {
            self.under_copied.insert(page);
        } else {
            self.under_copied.remove(page);
        }
    }

    /// A server does not have the page any more.
    fn note_copy_gone(&mut self, page: u64) {
        let is_gone = self.servers.holders(page).is_empty();
        match self.pages.state(page) {
            State::Remote if is_gone => self.lose(page),
            State::Remote => self.note_copies(page),
            State::Clean if is_gone => self.make_dirty(page, self.pages.class(page)),
            _ => {}
        }
    }

    /// No server has the page any more.
    fn lose(&mut self, page: u64) {
        self.coming.remove(&page);
        self.servers.give_up(page);
        self.under_copied.remove(page);
        self.turn(page, State::Lost, Class::None);
    }

    /// Pages that may still come into the RAM file.
    fn room(&self) -> u64 {
        self.limit_pages.unwrap_or(u64::MAX).saturating_sub(self.pages.taken())
    }

    fn slack(&self) -> u64 {
        self.limit_pages.map_or(0, slack_pages)
    }

    fn is_merging(&self) -> bool {
        self.limit_pages.is_none()
    }

    /// Whether reading a page here tells what the guest would read: it is in the RAM file or empty.
    pub fn is_here(&self, page: u64) -> bool {
        !matches!(self.pages.state(page), State::Remote | State::Coming | State::Lost)
    }

    /// Pages that no server has any more. If there are any, the guest is to be stopped: it could not go
    /// on when it needs one.
    pub fn lost_pages(&self) -> &PageSet {
        self.pages.lost()
    }

    /// Whether any page is lost. Costs nothing.
    pub fn is_lost(&self) -> bool {
        self.pages.count(State::Lost) > 0
    }

    /// Changes the resident limit of a guest that is not being merged. Above a lower one the guest is
    /// not let in until enough was evicted, for which pinned pages beyond half of it are let go.
    ///
    /// # Errors
    /// If it is below 2.
    pub fn set_resident_pages_max(&mut self, pages: u64) -> Result<(), RemoteError> {
        if pages < 2 {
            return Err(RemoteError::LimitTooSmall(pages));
        }
        if self.is_merging() {
            return Ok(());
        }
        self.limit_pages = Some(pages);
        self.ghosts.set_limit(pages);
        while self.queues.len(Class::None) > pages / 2
            && let Some(page) = self.queues.oldest(Class::None, true)
        {
            self.turn(page, self.pages.state(page), Class::Recent);
        }
        Ok(())
    }

    /// Pages that were evicted so far. Costs nothing.
    pub fn evicted_pages(&self) -> u64 {
        self.counts.evicted.pages()
    }

    /// What was done so far. Linear in the servers' sets.
    pub fn stats(&self) -> RemoteStats {
        let times = self.stalls.stats();
        let servers = self.servers.list.iter().map(|server| ServerStats {
            pages: server.held.len(),
            stale_pages: server.stale.len(),
            reserve_pages: server.reserve_pages,
            state: server.phase,
        });
        RemoteStats {
            resident_limit_pages: self.limit_pages,
            resident_pages: self.pages.in_file(),
            clean_pages: self.pages.count(State::Clean),
            coming_pages: self.pages.count(State::Coming),
            remote_pages: self.pages.count(State::Remote),
            servers: servers.collect(),
            under_copied_pages: self.under_copied.len(),
            lost_pages: self.pages.count(State::Lost),
            faults: self.counts.faults,
            read_ahead_pages: self.counts.read_ahead_pages,
            read_ahead_used_pages: self.windows.used_pages(),
            zeros_ahead_pages: self.counts.zeros_ahead_pages,
            evicted: self.counts.evicted,
            refaults: self.counts.refaults,
            reclaimed_pages: self.counts.reclaimed_pages,
            p50_us: times.p50_us,
            p99_us: times.p99_us,
            max_us: times.max_us,
        }
    }

    /// Bytes of memory in use, parts of tables included that were never touched.
    pub fn memory_bytes(&self) -> usize {
        let sets = [&self.used, &self.pinned, &self.under_copied];
        self.pages.memory_bytes()
            + self.queues.memory_bytes()
            + self.servers.memory_bytes()
            + self.cold.memory_bytes()
            + self.ghosts.memory_bytes()
            + sets.map(PageSet::memory_bytes).iter().sum::<usize>()
    }
}

/// Checks what [`Remote::new`] is given.
fn check(
    pages: u64,
    config: &RemoteConfig,
    resident: &PageSet,
    remote: &[PageSet],
) -> Result<(), RemoteError> {
    placement::check_servers(config.servers.len(), config.copies)?;
    if pages > queues::PAGES_MAX {
        return Err(RemoteError::TooLarge(pages));
    }
    let limit = config.resident_pages_max;
    if limit < 2 {
        return Err(RemoteError::LimitTooSmall(limit));
    }
    let sizes = remote.iter().all(|set| set.size() == pages) && resident.size() == pages;
    if !sizes || remote.len() != config.servers.len() {
        return Err(RemoteError::WrongPlacement);
    }
    let resident_pages = resident.len();
    if resident_pages > limit {
        return Err(RemoteError::TooManyResident { resident: resident_pages, limit });
    }
    // By how many servers a page is held at least.
    let mut held = vec![PageSet::new(pages); config.copies];
    for (server, (set, room)) in remote.iter().zip(&config.servers).enumerate() {
        let (pages, reserve) = (set.len(), room.reserve_pages);
        if pages > reserve {
            return Err(RemoteError::TooManyRemote { server, pages, reserve });
        }
        let mut again = set.clone();
        for level in &mut held {
            let mut next = again.clone();
            next.intersect(level);
            level.union_with(&again);
            again = next;
        }
        again.union_with(&{
            let mut both = set.clone();
            both.intersect(resident);
            both
        });
        if let Some(page) = again.iter().next() {
            return Err(RemoteError::PlacedTwice(page));
        }
    }
    Ok(())
}
