//! Servers whose connection has ended are reached again.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use transport::pages::wire::DROP_EXTENTS_MAX;
use transport::pages::{PageClient, PageRequest};

use super::Keeper;
use crate::destination::remote::faults::Command;
use crate::error::EngineError;
use crate::stores;
use crate::tell;

/// Pause between attempts to reach a server again.
const RECONNECT_EVERY: Duration = Duration::from_millis(500);

/// How long a server whose pages are on another as well may be away before they are copied anew.
const AWAY_MAX: Duration = Duration::from_secs(3);

/// An attempt to reach a server, which may take a while.
#[derive(Debug)]
pub(super) struct Reaching {
    server: usize,
    attempt: JoinHandle<Result<[PageClient; 2], EngineError>>,
}

impl Keeper {
    /// Reaches servers again whose connections have ended. One that has forgotten the guest is lost; so is one that
    /// stays away while others that answer have all of its pages.
    pub(super) fn reconnect(&mut self) {
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
        let Some(store) = self.shared.store(server) else { return };
        let (identity, options) = (Arc::clone(&self.shared.identity), self.shared.options.clone());
        let attempt = thread::spawn(move || {
            let open = || stores::open(&store, &identity, &options);
            Ok([open()?, open()?])
        });
        self.reaching = Some(Reaching { server, attempt });
    }

    fn reached(&mut self, server: usize, [for_faults, mut for_keeper]: [PageClient; 2]) {
        let address = self.shared.store(server).map(|store| store.address).unwrap_or_default();
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
        if is_long && self.shared.split.copies > 1 && self.can_do_without(server) {
            self.forget(server, &error.tell());
        }
    }

    /// Whether other servers have all that this one has, and answer: a host that is cut off from several must not give up
    /// one for the copies on another.
    fn can_do_without(&mut self, server: usize) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut others = self.there();
        others.retain(|other| *other != server && shared.traffic.is_reached(*other));
        if !shared.remote.lock().can_lose(server, &others) {
            return false;
        }
        // Of one that nothing was asked of lately nobody knows.
        others.retain(|other| self.call(*other, &PageRequest::Stat).is_ok());
        shared.remote.lock().can_lose(server, &others)
    }

    fn forget(&mut self, server: usize, why: &dyn std::fmt::Display) {
        let vm = &self.shared.vm;
        tell!("memory server {server} is lost with what it had of the guest {vm}: {why}");
        self.part_with(server);
        // The next pager would seek it in vain. Should it not be noted, that is all that comes of it.
        drop(self.shared.note());
    }

    /// The server has nothing of the guest any more.
    pub(super) fn part_with(&mut self, server: usize) {
        let again = self.shared.remote.lock().server_lost(server);
        self.shared.traffic.gone.lock().insert(server);
        self.shared.traffic.lost.lock().remove(&server);
        if let Some(way) = self.clients.get_mut(server) {
            *way = None;
        }
        self.undropped.remove(&server);
        self.postponed.retain(|fetch| fetch.server != server);
        self.faults.tell(Command::Forget(server));
        self.fetches.extend(again);
        self.hand_over_fetches();
        self.shared.changed.notify_waiters();
    }
}
