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
mod puts;
mod reach;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::remote::{Fetch, PutFailure, Victims};
use parking_lot::Mutex;
use transport::TransportError;
use transport::messages::Store;
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

/// Pages that are put to servers before anything else is looked after.
const PUT_PAGES: usize = 512;

/// Pages that are flushed at a time.
const FLUSH_PAGES: usize = 256;

/// Pages that are decided about under one lock, for which a fault may have to wait.
pub(super) const LOCKED_PAGES: usize = 16;

/// Pages that are chosen to be evicted under one lock.
const VICTIM_PAGES: usize = 64;

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

/// The thread's owner. Dropping it waits for the thread, which was told to end.
#[derive(Debug)]
pub(super) struct KeeperThread {
    thread: Option<JoinHandle<()>>,
    clients: Arc<Mutex<Vec<Option<PageClient>>>>,
}

/// Whoever pages the guest next must not find it at work.
impl Drop for KeeperThread {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            join(thread, None);
        }
    }
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
        Self { thread: Some(thread), clients: left }
    }

    /// Waits for the thread, which was told to end, and returns its connections.
    pub(super) fn stop(self) -> Vec<Option<PageClient>> {
        let clients = Arc::clone(&self.clients);
        drop(self);
        std::mem::take(&mut *clients.lock())
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

/// A put of these pages, whose contents are in their order.
fn put_of(pages: &[u64], contents: Vec<u8>, version: u64) -> PageRequest {
    let extents = Extent::join(pages.iter().copied());
    PageRequest::Put { extents, contents: Bytes::from(contents), version, packed: true }
}

/// An answer that is no refusal.
fn accepted(answer: PageAnswer) -> Result<PageAnswer, Failed> {
    match answer {
        PageAnswer::Failed { error, .. } => Err(Failed::Refused(error)),
        answer => Ok(answer),
    }
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
            let pages = remote.next_to_flush(FLUSH_PAGES, shared.now());
            shared.protect(&pages, true)?;
            pages
        };
        if pages.is_empty() {
            return Ok(false);
        }
        let (count, began) = (pages.len(), Instant::now());
        let any = self.put(pages, 0)?;
        shared.flushed.note(count, began.elapsed());
        Ok(any)
    }

    /// Takes pages away. Says whether there were any.
    fn evict(&mut self) -> Result<bool, EngineError> {
        let victims = self.take_victims()?;
        let is_any_clean = !victims.clean.is_empty();
        // What no server takes is tried again later, not at once.
        Ok(self.put(victims.dirty, PUT_PAGES)? || is_any_clean)
    }

    /// Punches clean pages and protects dirty ones that are to leave.
    fn take_victims(&mut self) -> Result<Victims, EngineError> {
        let shared = Arc::clone(&self.shared);
        let mut remote = shared.remote.lock();
        let want = usize::try_from(remote.wanted_evictions()).unwrap_or(usize::MAX);
        if want == 0 {
            return Ok(Victims::default());
        }
        let victims = remote.victims(want.min(VICTIM_PAGES), shared.now());
        shared.punch(&victims.clean)?;
        shared.protect(&victims.dirty, true)?;
        shared.serve_waiting(&mut remote, &mut self.fetches)?;
        drop(remote);
        self.hand_over_fetches();
        Ok(victims)
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
            self.finish(&mut remote, &[(*page, done, copy)])?;
        }
        self.hand_over_fetches();
        Ok(!due.is_empty())
    }

    /// Asks a server for something and waits for the answer.
    fn call(&mut self, server: usize, request: &PageRequest) -> Result<PageAnswer, Failed> {
        self.with(server, |client| client.call(request)).and_then(accepted)
    }

    /// Does something with the connection to a server, which is over if that fails.
    fn with<T>(
        &mut self,
        server: usize,
        work: impl FnOnce(&mut PageClient) -> Result<T, TransportError>,
    ) -> Result<T, Failed> {
        let Some(way) = self.clients.get_mut(server) else { return Err(Failed::Away) };
        let Some(client) = way else { return Err(Failed::Away) };
        let done = work(client);
        let (sent, received) = client.bytes();
        self.shared.traffic.keeper.note(server, sent, received);
        match done {
            Ok(done) => Ok(done),
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
