//! The thread that keeps a split guest within its limit, and everything else that no guest waits for.
//!
//! ```text
//!   wait ─► evict ─► flush (leaving) ─► drop old copies ─► make copies ─► fetch (merging) ─► orders ─► reach servers ─┐
//!     ▲                                                                                                               │
//!     └───────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Its connections carry all puts and drops, in the order in which they were decided.

mod copies;
mod orders;
mod reach;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::remote::{Fetch, PutDone, PutFailed, PutFailure, Remote};
use parking_lot::Mutex;
use transport::messages::Store;
use transport::pages::wire::REQUEST_PAGES_MAX;
use transport::pages::{Extent, PageAnswer, PageClient, PageRequest, StoreError};

use self::orders::Parting;
pub(super) use self::orders::{Joining, Obeyed, Order};
use self::reach::Reaching;
use super::Shared;
use super::faults::{Command, FaultHandle};
use crate::blocking::join;
use crate::error::EngineError;
use crate::stores;

/// Longest time without a look at what there is to do.
const TICK: Duration = Duration::from_millis(50);

/// Pages that are evicted at a time.
const EVICT_PAGES: usize = REQUEST_PAGES_MAX as usize;

/// How fast pages are copied to servers that stay here.
#[derive(Debug, Default)]
pub(super) struct Flushed {
    pages: AtomicU64,
    busy_us: AtomicU64,
}

impl Flushed {
    /// Pages so far, and how long that took.
    pub(super) fn seen(&self) -> (u64, Duration) {
        let busy_us = self.busy_us.load(Ordering::Relaxed);
        (self.pages.load(Ordering::Relaxed), Duration::from_micros(busy_us))
    }

    fn note(&self, pages: usize, busy: Duration) {
        self.pages.fetch_add(pages as u64, Ordering::Relaxed);
        self.busy_us.fetch_add(busy.as_micros() as u64, Ordering::Relaxed);
    }
}

/// The thread's owner.
#[derive(Debug)]
pub(super) struct KeeperThread {
    thread: JoinHandle<()>,
    clients: Arc<Mutex<Vec<Option<PageClient>>>>,
}

impl KeeperThread {
    /// Begins to keep the guest within its limit, over a connection a server.
    pub(super) fn start(
        shared: Arc<Shared>,
        clients: Vec<PageClient>,
        faults: FaultHandle,
    ) -> Self {
        let clients: Vec<_> = clients.into_iter().map(Some).collect();
        let left = Arc::new(Mutex::new(vec![]));
        let leaves = Arc::clone(&left);
        let mut keeper = Keeper {
            shared,
            clients,
            faults,
            fetches: vec![],
            later: BTreeMap::new(),
            postponed: vec![],
            undropped: BTreeMap::new(),
            reaching: None,
            parting: vec![],
            reached_last: 0,
            reach_at: Instant::now(),
        };
        let thread = thread::spawn(move || {
            if let Err(error) = keeper.run() {
                keeper.shared.fail(error);
            }
            // Whoever waits for them is told that nobody obeys.
            keeper.shared.orders.lock().clear();
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
    /// Servers that are being drained.
    parting: Vec<Parting>,
    /// The last one that was reached again, and when the next may be.
    reached_last: usize,
    reach_at: Instant,
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
        let shared = Arc::clone(&self.shared);
        while !shared.is_over.load(Ordering::Acquire) {
            let keeping = shared.keeping.lock();
            let is_held = shared.is_held.load(Ordering::Acquire);
            let is_short = shared.remote.lock().wanted_evictions() > 0;
            let busy = !is_held && self.keep()?;
            self.hand_over_fetches();
            self.reconnect();
            drop(keeping);
            if !busy {
                let mut remote = shared.remote.lock();
                // Nothing to be done before something changes, or something to be done since the last look.
                if is_held || is_short || remote.wanted_evictions() == 0 {
                    let _timed_out = shared.keeper.wait_for(&mut remote, TICK);
                }
            }
        }
        Ok(())
    }

    /// Does a piece of everything. Says whether there was anything to do.
    fn keep(&mut self) -> Result<bool, EngineError> {
        let busy = self.finish_later()?
            | self.evict()?
            | self.flush()?
            | self.tend_copies()
            | self.merge()?;
        self.obey();
        self.part();
        Ok(busy)
    }

    /// Gives pages that are only here a copy while they stay. Says whether any server took any.
    fn flush(&mut self) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        let pages = {
            let mut remote = shared.remote.lock();
            let pages = remote.next_to_flush(EVICT_PAGES, shared.now());
            shared.protect(&pages, true)?;
            pages
        };
        if pages.is_empty() {
            return Ok(false);
        }
        let (count, began) = (pages.len(), Instant::now());
        let any = self.put(pages)?;
        shared.flushed.note(count, began.elapsed());
        Ok(any)
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
            PutDone::Keep | PutDone::More | PutDone::Cancelled => {}
        }
        Ok(())
    }

    /// Finishes pages that no direct I/O can reach any more. Says whether there were any.
    fn finish_later(&mut self) -> Result<bool, EngineError> {
        let shared = Arc::clone(&self.shared);
        let now = shared.now();
        // The disks of a guest that stands still are drained.
        let is_still = shared.is_still.load(Ordering::Acquire);
        let due = self.later.extract_if(.., |_, (until, _)| is_still || *until <= now);
        let due: Vec<_> = due.collect();
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
        self.shared.version.fetch_add(1, Ordering::AcqRel)
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

    fn hand_over_fetches(&mut self) {
        if !self.fetches.is_empty() {
            self.faults.tell(Command::Fetch(std::mem::take(&mut self.fetches)));
        }
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
            Failed::Refused(
                StoreError::Full { .. } | StoreError::HostFull { .. } | StoreError::Reserved { .. },
            ) => Self::Full,
            Failed::Away | Failed::Refused(_) => Self::Gone,
        }
    }
}
