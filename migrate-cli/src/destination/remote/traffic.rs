//! What goes over the connections to memory servers, and which of them are not reached.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use parking_lot::Mutex;

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
    pub(super) keeper: Meter,
    /// Servers of which a connection has ended, and since when.
    pub(super) lost: Mutex<BTreeMap<usize, Instant>>,
    /// Servers that are not sought any more.
    pub(super) gone: Mutex<BTreeSet<usize>>,
    /// Of those, servers from which all was taken away.
    pub(super) drained: Mutex<BTreeSet<usize>>,
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
