//! The thread that keeps a split guest within its limit, and everything else that no guest waits for.
//!
//! ```text
//!   wait ─► evict ─► drop copies that are out of date ─► make copies again ─► fetch (merging) ─► reach servers ─┐
//!     ▲                                                                                                         │
//!     └─────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Its connections carry all puts and drops, in the order in which they were decided.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::remote::{
    Fetch, Move, MoveFailure, PutDone, PutFailed, PutFailure, Remote, Stale,
};
use parking_lot::Mutex;
use transport::messages::Store;
use transport::pages::wire::{DROP_EXTENTS_MAX, REQUEST_PAGES_MAX};
use transport::pages::{Extent, PageAnswer, PageClient, PageRequest, StoreError};

use super::Shared;
use super::faults::{Command, FaultHandle};
use crate::blocking::join;
use crate::error::EngineError;
use crate::stores;

/// Longest time without a look at what there is to do.
const TICK: Duration = Duration::from_millis(50);

/// Pages that are evicted at a time.
const EVICT_PAGES: usize = REQUEST_PAGES_MAX as usize;

/// Copies that are dropped at a time.
const STALE_PAGES: usize = 16_384;

/// Pages that are fetched at a time while merging.
const MERGE_PAGES: usize = 4 * REQUEST_PAGES_MAX as usize;

/// Pause between attempts to reach a server again.
const RECONNECT_EVERY: Duration = Duration::from_millis(500);

/// How long a server whose pages are on another as well may be away before they are copied anew.
const AWAY_MAX: Duration = Duration::from_secs(3);

/// Bytes over the connections of one thread, by server.
#[derive(Debug, Default)]
pub(super) struct Meter {
    /// Over connections that have ended, and over that in use.
    servers: Mutex<BTreeMap<usize, [(u64, u64); 2]>>,
}

impl Meter {
    /// The connection to a server has carried so much.
    pub(super) fn note(&self, server: usize, sent: u64, received: u64) {
        self.servers.lock().entry(server).or_default()[1] = (sent, received);
    }

    /// It has ended.
    pub(super) fn ended(&self, server: usize) {
        let mut servers = self.servers.lock();
        let [ended, live] = servers.entry(server).or_default();
        *ended = (ended.0 + live.0, ended.1 + live.1);
        *live = (0, 0);
    }

    fn bytes(&self) -> (u64, u64) {
        let servers = self.servers.lock();
        let all = servers.values().flatten();
        all.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

/// What goes to servers and comes from them, and which are not reached.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) faults: Meter,
    keeper: Meter,
    /// Servers of which a connection has ended, and since when.
    lost: Mutex<BTreeMap<usize, Instant>>,
    /// Servers that are not sought any more.
    gone: Mutex<BTreeSet<usize>>,
}

impl Traffic {
    /// A connection to a server has ended.
    pub(super) fn lost(&self, server: usize) {
        if !self.gone.lock().contains(&server) {
            self.lost.lock().entry(server).or_insert_with(Instant::now);
        }
    }

    /// Bytes sent and received.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let (faults, keeper) = (self.faults.bytes(), self.keeper.bytes());
        (faults.0 + keeper.0, faults.1 + keeper.1)
    }

    /// Whether a server is reached.
    pub(super) fn is_reached(&self, server: usize) -> bool {
        !self.lost.lock().contains_key(&server)
    }
}

/// A connection a server, and the version of the next pages that are put.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) list: Vec<PageClient>,
    pub(super) version: u64,
}

/// The thread's owner.
#[derive(Debug)]
pub(super) struct KeeperThread {
    thread: JoinHandle<()>,
    clients: Arc<Mutex<Vec<Option<PageClient>>>>,
}

impl KeeperThread {
    /// Begins to keep the guest within its limit, over a connection a server.
    pub(super) fn start(shared: Arc<Shared>, clients: Clients, faults: FaultHandle) -> Self {
        let Clients { list, version } = clients;
        let clients: Vec<_> = list.into_iter().map(Some).collect();
        let left = Arc::new(Mutex::new(vec![]));
        let leaves = Arc::clone(&left);
        let mut keeper = Keeper {
            shared,
            clients,
            faults,
            version,
            fetches: vec![],
            later: BTreeMap::new(),
            postponed: vec![],
            undropped: BTreeMap::new(),
            reaching: None,
            reached_last: 0,
            reach_at: Instant::now(),
        };
        let thread = thread::spawn(move || {
            if let Err(error) = keeper.run() {
                keeper.shared.fail(error);
            }
            *leaves.lock() = std::mem::take(&mut keeper.clients);
        });
        Self { thread, clients: left }
    }

    /// Waits for the thread, which was told to end, and returns its connections.
    pub(super) fn stop(self) -> Vec<Option<PageClient>> {
        join(self.thread, None);
        std::mem::take(&mut *self.clients.lock())
    }
}

/// Deletes a guest's stores, where their servers answer. Blocks.
pub(super) fn delete_stores(stores: &[Store], clients: Vec<Option<PageClient>>) {
    for (store, client) in stores.iter().zip(clients) {
        let Some(mut client) = client else { continue };
        if let Err(error) = stores::ask(&mut client, &store.address, &PageRequest::Delete) {
            tracing::warn!(error = %error.tell(), "a store was not deleted");
        }
    }
}

#[derive(Debug)]
struct Keeper {
    shared: Arc<Shared>,
    clients: Vec<Option<PageClient>>,
    faults: FaultHandle,
    /// Of the next pages that are put.
    version: u64,
    /// For the fault thread to ask for.
    fetches: Vec<Fetch>,
    /// Pages that servers have taken, but that direct I/O may still reach, and until when.
    later: BTreeMap<u64, (Duration, Vec<u8>)>,
    /// To be fetched once all servers are reached.
    postponed: Vec<Fetch>,
    /// Copies that servers were to drop while they were away.
    undropped: BTreeMap<usize, Vec<Extent>>,
    /// A server that is being reached again.
    reaching: Option<Reaching>,
    /// The last one that was, and when the next may be.
    reached_last: usize,
    reach_at: Instant,
}

/// An attempt to reach a server, which may take a while.
#[derive(Debug)]
struct Reaching {
    server: usize,
    attempt: JoinHandle<Result<[PageClient; 2], EngineError>>,
}

/// Why something was not done at a server.
enum Failed {
    /// It is not reached.
    Away,
    /// It refuses.
    Refused(StoreError),
}

impl Keeper {
    fn run(&mut self) -> Result<(), EngineError> {
        while !self.shared.is_over.load(Ordering::Acquire) {
            let is_short = self.shared.remote.lock().wanted_evictions() > 0;
            let busy = self.finish_later()?
                | self.evict()?
                | self.drop_stale()
                | self.copy_again()?
                | self.merge()?;
            self.hand_over_fetches();
            self.reconnect();
            if !busy {
                let mut remote = self.shared.remote.lock();
                // Nothing to be done before something changes, or something to be done since the last look.
                if is_short || remote.wanted_evictions() == 0 {
                    let _timed_out = self.shared.keeper.wait_for(&mut remote, TICK);
                }
            }
        }
        Ok(())
    }

    /// Takes pages away. Says whether there were any.
    fn evict(&mut self) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        let (dirty, is_any_clean) = {
            let mut remote = shared.remote.lock();
            let want = usize::try_from(remote.wanted_evictions()).unwrap_or(usize::MAX);
            if want == 0 {
                return Ok(false);
            }
            let victims = remote.victims(want.min(EVICT_PAGES), shared.now());
            shared.punch(&victims.clean)?;
            shared.protect(&victims.dirty, true)?;
            shared.serve_waiting(&mut remote, &mut self.fetches)?;
            if victims.clean.is_empty() && victims.dirty.is_empty() {
                return Ok(false);
            }
            (victims.dirty, !victims.clean.is_empty())
        };
        self.hand_over_fetches();
        // What no server takes is tried again later, not at once.
        Ok(self.put(dirty)? || is_any_clean)
    }

    /// Puts protected pages to their servers and punches those that were not written meanwhile.
    /// Says whether any server took any.
    fn put(&mut self, pages: Vec<u64>) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        let version = self.next_version();
        let mut copies = BTreeMap::new();
        let mut todo: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        let mut any = false;
        for page in pages {
            copies.insert(page, shared.copy(page)?);
        }
        {
            let remote = shared.remote.lock();
            for page in copies.keys() {
                for server in remote.put_to(*page) {
                    todo.entry(server).or_default().push(*page);
                }
            }
        }
        while !todo.is_empty() {
            let mut again: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
            for (server, pages) in std::mem::take(&mut todo) {
                let put = self.put_to(server, &pages, &copies, version);
                any |= put.is_ok();
                for page in pages {
                    let Some(copy) = copies.get(&page) else { continue };
                    if let Some(another) = self.put_over(page, server, put.as_ref(), copy)? {
                        again.entry(another).or_default().push(page);
                    }
                }
            }
            todo = again;
        }
        Ok(any)
    }

    /// A server has taken a page or not. Returns another one that is to take it.
    fn put_over(
        &mut self,
        page: u64,
        server: usize,
        put: Result<&(), &Failed>,
        copy: &[u8],
    ) -> Result<Option<usize>, EngineError> {
        let shared = Arc::clone(&self.shared);
        let is_unchanged = || shared.is_unchanged(page, copy);
        let mut remote = shared.remote.lock();
        let done = match put {
            Ok(()) => remote.put_done(page, server, shared.now(), is_unchanged),
            Err(why) => match remote.put_failed(page, server, why.into()) {
                PutFailed::Another(another) => return Ok(Some(another)),
                PutFailed::More => PutDone::More,
                PutFailed::Enough => remote.finish_put(page, shared.now(), is_unchanged),
                PutFailed::Back => PutDone::Changed,
                PutFailed::Cancelled => PutDone::Cancelled,
            },
        };
        self.finish(&mut remote, page, done, copy)?;
        Ok(None)
    }

    /// Carries out what becomes of a page whose put was answered.
    fn finish(
        &mut self,
        remote: &mut Remote,
        page: u64,
        done: PutDone,
        copy: &[u8],
    ) -> Result<(), EngineError> {
        match done {
            PutDone::Punch => {
                self.shared.punch(&[page])?;
                self.shared.serve_waiting(remote, &mut self.fetches)?;
            }
            PutDone::Changed => self.shared.protect(&[page], false)?,
            PutDone::NotYet(until) => drop(self.later.insert(page, (until, copy.to_vec()))),
            PutDone::More | PutDone::Cancelled => {}
        }
        Ok(())
    }

    /// Finishes pages that no direct I/O can reach any more. Says whether there were any.
    fn finish_later(&mut self) -> Result<bool, EngineError> {
        let now = self.shared.now();
        let due: Vec<_> = self.later.extract_if(.., |_, (until, _)| *until <= now).collect();
        let shared = Arc::clone(&self.shared);
        for (page, (_, copy)) in &due {
            let mut remote = shared.remote.lock();
            let is_unchanged = || shared.is_unchanged(*page, copy);
            let done = remote.finish_put(*page, shared.now(), is_unchanged);
            self.finish(&mut remote, *page, done, copy)?;
        }
        self.hand_over_fetches();
        Ok(!due.is_empty())
    }

    /// A version that no page has yet.
    fn next_version(&mut self) -> u64 {
        let version = self.version;
        self.version += 1;
        version
    }

    fn put_to(
        &mut self,
        server: usize,
        pages: &[u64],
        copies: &BTreeMap<u64, Vec<u8>>,
        version: u64,
    ) -> Result<(), Failed> {
        for pages in pages.chunks(REQUEST_PAGES_MAX as usize) {
            let contents: Vec<u8> =
                pages.iter().filter_map(|page| copies.get(page)).flatten().copied().collect();
            let extents = Extent::join(pages.iter().copied());
            let contents = Bytes::from(contents);
            self.call(server, &PageRequest::Put { extents, contents, version, packed: true })?;
        }
        Ok(())
    }

    /// Asks a server for something and waits for the answer.
    fn call(&mut self, server: usize, request: &PageRequest) -> Result<PageAnswer, Failed> {
        let Some(way) = self.clients.get_mut(server) else { return Err(Failed::Away) };
        let Some(client) = way else { return Err(Failed::Away) };
        let answer = client.call(request);
        let (sent, received) = client.bytes();
        self.shared.traffic.keeper.note(server, sent, received);
        match answer {
            Ok(PageAnswer::Failed { error, .. }) => Err(Failed::Refused(error)),
            Ok(answer) => Ok(answer),
            Err(error) => {
                tracing::warn!(%error, server, "the connection to a memory server ended");
                *way = None;
                self.shared.traffic.keeper.ended(server);
                self.shared.traffic.lost(server);
                Err(Failed::Away)
            }
        }
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

    /// Makes copies of pages that have too few, or are on a server that is drained. Says whether there were any.
    fn copy_again(&mut self) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        let moves = shared.remote.lock().next_to_move(EVICT_PAGES, shared.now());
        let mut any = false;
        for Move { page, from, to } in moves {
            let extents = vec![Extent::new(page, 1)];
            let got = self.call(from, &PageRequest::Get { extents, take: false, packed: false });
            let failure = match got {
                Ok(PageAnswer::Pages { extents, contents, .. }) => {
                    let version = self.next_version();
                    let put = PageRequest::Put { extents, contents, version, packed: true };
                    match self.call(to, &put) {
                        Ok(_) => {
                            any = true;
                            None
                        }
                        Err(why) => Some(MoveFailure::NotTaken((&why).into())),
                    }
                }
                Err(Failed::Refused(StoreError::NotStored { .. })) => Some(MoveFailure::NotStored),
                Ok(_) | Err(_) => Some(MoveFailure::NotTaken(PutFailure::Gone)),
            };
            let mut remote = shared.remote.lock();
            match failure {
                None => remote.moved(page),
                Some(failure) => remote.move_failed(page, failure),
            }
        }
        Ok(any)
    }

    /// While merging, fetches what is elsewhere. Says whether there was anything.
    fn merge(&mut self) -> Result<bool, EngineError> {
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

    fn hand_over_fetches(&mut self) {
        if !self.fetches.is_empty() {
            self.faults.tell(Command::Fetch(std::mem::take(&mut self.fetches)));
        }
    }

    /// Reaches servers again whose connections have ended. One that has forgotten the guest is lost; so is one that
    /// stays away while another has all of its pages.
    fn reconnect(&mut self) {
        match self.reaching.take_if(|reaching| reaching.attempt.is_finished()) {
            Some(Reaching { server, attempt }) => match attempt.join() {
                Ok(Ok(clients)) => self.reached(server, clients),
                Ok(Err(EngineError::StoreRefused { source, .. })) => self.forget(server, &source),
                Ok(Err(error)) => self.away(server, &error),
                Err(_) => tracing::error!("a thread of the engine panicked"),
            },
            None if self.reaching.is_none() => self.reach(),
            None => {}
        }
    }

    /// Each server that is away has its turn.
    fn reach(&mut self) {
        if Instant::now() < self.reach_at {
            return;
        }
        let lost = self.shared.traffic.lost.lock();
        let next = lost.range(self.reached_last + 1..).chain(lost.iter()).next();
        let Some(server) = next.map(|(server, _)| *server) else { return };
        drop(lost);
        self.reached_last = server;
        self.reach_at = Instant::now() + RECONNECT_EVERY;
        let Some(store) = self.shared.stores.get(server).cloned() else { return };
        let (identity, options) = (Arc::clone(&self.shared.identity), self.shared.options.clone());
        let attempt = thread::spawn(move || {
            let open = || stores::open(&store, &identity, &options);
            Ok([open()?, open()?])
        });
        self.reaching = Some(Reaching { server, attempt });
    }

    fn reached(&mut self, server: usize, [for_faults, mut for_keeper]: [PageClient; 2]) {
        let address = self.shared.stores.get(server).map(|store| store.address.clone());
        let address = address.unwrap_or_default();
        for extents in self.undropped.entry(server).or_default().chunks(DROP_EXTENTS_MAX) {
            let request = PageRequest::Drop { extents: extents.to_vec() };
            if let Err(error) = stores::ask(&mut for_keeper, &address, &request) {
                tracing::info!(error = %error.tell(), "a memory server is away again");
                return;
            }
        }
        self.undropped.remove(&server);
        tracing::info!(server, "a memory server is back");
        if let Some(way) = self.clients.get_mut(server) {
            *way = Some(for_keeper);
        }
        self.shared.traffic.lost.lock().remove(&server);
        self.faults.tell(Command::Connect(server, Box::new(for_faults)));
    }

    fn away(&mut self, server: usize, error: &EngineError) {
        tracing::debug!(error = %error.tell(), "a memory server is away");
        let since = self.shared.traffic.lost.lock().get(&server).map(Instant::elapsed);
        let is_long = since.is_some_and(|since| since > AWAY_MAX);
        if is_long && self.shared.copies > 1 && self.shared.remote.lock().can_lose(server) {
            self.forget(server, &error.tell());
        }
    }

    fn forget(&mut self, server: usize, why: &dyn std::fmt::Display) {
        eprintln!("memory server {server} is lost with what it had of the guest: {why}");
        let again = self.shared.remote.lock().server_lost(server);
        self.shared.traffic.gone.lock().insert(server);
        self.shared.traffic.lost.lock().remove(&server);
        self.undropped.remove(&server);
        self.postponed.retain(|fetch| fetch.server != server);
        self.faults.tell(Command::Forget(server));
        self.fetches.extend(again);
        self.hand_over_fetches();
        self.shared.changed.notify_waiters();
    }
}

impl Shared {
    fn copy(&self, page: u64) -> Result<Vec<u8>, EngineError> {
        let mut content = vec![0; PAGE_BYTES];
        self.ram.read(PageIndex(page), &mut content)?;
        Ok(content)
    }

    /// Whether a page still has the content that was put. One that cannot be read has not.
    fn is_unchanged(&self, page: u64, copy: &[u8]) -> bool {
        self.copy(page).is_ok_and(|now| now == copy)
    }
}

impl From<&Failed> for PutFailure {
    fn from(failed: &Failed) -> Self {
        match failed {
            Failed::Refused(StoreError::Full { .. } | StoreError::Reserved { .. }) => Self::Full,
            Failed::Away | Failed::Refused(_) => Self::Gone,
        }
    }
}
