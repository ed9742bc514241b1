//! What others have the keeper do: servers join, reserve more, or are drained.
//!
//! ```text
//!   drain ─► pages move to others ... empty ─► journal noted ─► store deleted, server parted with
//! ```
//!
//! Invariants: a server is in the journal before anything is put there; it is out of the journal before its store is
//! deleted, so that no later pager seeks a store that is not there.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use migrate_core::remote::{RemoteError, ServerRoom};
use tokio::sync::oneshot::{self, error::TryRecvError};
use transport::messages::Store;
use transport::pages::{PageClient, PageRequest};

use super::{Failed, Keeper};
use crate::destination::remote::faults::Command;
use crate::error::EngineError;
use crate::journal::JournalError;
use crate::stores;
use crate::tell;

/// A server that joins, reached and in the journal.
#[derive(Debug)]
pub(in crate::destination::remote) struct Joining {
    pub(in crate::destination::remote) store: Store,
    pub(in crate::destination::remote) for_faults: PageClient,
    pub(in crate::destination::remote) for_keeper: PageClient,
}

/// Told once an order was carried out.
pub(in crate::destination::remote) type Obeyed = oneshot::Sender<Result<(), EngineError>>;

/// What the keeper is to do.
#[derive(Debug)]
pub(in crate::destination::remote) enum Order {
    /// One more server joins.
    Join(Box<Joining>, Obeyed),
    /// This server, which is being drained, is parted with once it is empty.
    Part(usize),
    /// This server is to keep so many pages free for the guest.
    Reserve(usize, u64, Obeyed),
    /// This host may use the guest's stores.
    Grant(String, Obeyed),
    /// This host has nothing to do with the guest's memory any more.
    Revoke(String),
}

/// A server that is being drained.
#[derive(Debug)]
pub(super) struct Parting {
    server: usize,
    /// Whether the journal does without it.
    noted: Option<oneshot::Receiver<Result<(), JournalError>>>,
}

/// What there is to do about a server that is being drained.
enum Look {
    /// It has pages, or the journal is being written.
    Waits,
    /// It has none.
    Empty,
    /// Nothing any more.
    Over,
}

impl Keeper {
    /// Carries out what was ordered.
    pub(super) fn obey(&mut self) {
        let orders = std::mem::take(&mut *self.shared.orders.lock());
        for order in orders {
            match order {
                Order::Join(joining, obeyed) => {
                    let joined = self.join(*joining).map_err(EngineError::from);
                    let _asker_left = obeyed.send(joined);
                }
                Order::Part(server) => self.begin_to_part(server),
                Order::Reserve(server, pages, obeyed) => {
                    let _asker_left = obeyed.send(self.reserve(server, pages));
                }
                Order::Grant(host, obeyed) => {
                    let _asker_left = obeyed.send(self.grant(&host));
                }
                Order::Revoke(host) => self.revoke(&host),
            }
        }
    }

    fn begin_to_part(&mut self, server: usize) {
        if self.parting.iter().all(|parting| parting.server != server) {
            self.parting.push(Parting { server, noted: None });
        }
        // The next pager goes on with it. Should it not be noted, it has to be asked for again.
        drop(self.shared.note());
    }

    fn reserve(&mut self, server: usize, pages: u64) -> Result<(), EngineError> {
        self.ask(server, &PageRequest::Reserve { pages })?;
        self.shared.remote.lock().set_reserve(server, pages);
        // The next pager is told of it by the server's pages, should it not be noted.
        drop(self.shared.note());
        Ok(())
    }

    fn grant(&mut self, host: &str) -> Result<(), EngineError> {
        for server in self.there() {
            self.ask(server, &PageRequest::Grant { host: host.to_owned() })?;
        }
        Ok(())
    }

    /// One that does not answer is told by no one: whoever knows the store's secret may go on using it there.
    fn revoke(&mut self, host: &str) {
        for server in self.there() {
            let revoked = self.ask(server, &PageRequest::Revoke { host: host.to_owned() });
            if let Err(error) = revoked {
                let error = error.tell();
                tracing::warn!(error, host, "access to the guest's memory was not withdrawn");
            }
        }
    }

    /// The servers that the guest has.
    pub(super) fn there(&self) -> Vec<usize> {
        let gone = self.shared.traffic.gone.lock();
        (0..self.clients.len()).filter(|server| !gone.contains(server)).collect()
    }

    /// Has a server do something that it answers by a word.
    fn ask(&mut self, server: usize, request: &PageRequest) -> Result<(), EngineError> {
        let address = self.shared.store(server).map(|store| store.address).unwrap_or_default();
        match self.call(server, request) {
            Ok(_) => Ok(()),
            Err(Failed::Refused(error)) => Err(stores::refused(&address, error)),
            Err(Failed::Away) => Err(EngineError::Misuse {
                what: format!("The memory server {address} does not answer"),
                remedy: "Wait until `migrate status` shows it as connected".into(),
            }),
        }
    }

    fn join(&mut self, joining: Joining) -> Result<(), RemoteError> {
        let Joining { store, for_faults, for_keeper } = joining;
        // Numbers are given out under the lock of the stores, so that both lists agree.
        let mut listed = self.shared.listed.lock();
        let mut stores = self.shared.stores.write();
        let room = ServerRoom { reserve_pages: store.reserve_pages };
        let server = self.shared.remote.lock().add_server(room)?;
        listed.joining.retain(|joining| joining.id != store.id);
        stores.push(store);
        self.clients.push(Some(for_keeper));
        self.faults.tell(Command::Connect(server, Box::new(for_faults)));
        Ok(())
    }

    /// Parts with servers that have nothing of the guest any more.
    pub(super) fn part(&mut self) {
        let is_leaving = self.shared.is_leaving.load(Ordering::Acquire);
        for mut parting in std::mem::take(&mut self.parting) {
            if is_leaving && parting.noted.is_none() {
                // The new main host is told of it.
                self.parting.push(parting);
                continue;
            }
            match self.look(&mut parting) {
                Look::Waits => self.parting.push(parting),
                Look::Empty => self.delete(parting.server),
                Look::Over => {}
            }
        }
    }

    fn look(&mut self, parting: &mut Parting) -> Look {
        let shared = Arc::clone(&self.shared);
        if shared.traffic.gone.lock().contains(&parting.server) {
            return Look::Over;
        }
        if !shared.remote.lock().is_drained(parting.server) {
            return Look::Waits;
        }
        let noted = parting.noted.get_or_insert_with(|| {
            shared.listed.lock().parting.insert(parting.server);
            shared.note()
        });
        match noted.try_recv() {
            Ok(Ok(())) => Look::Empty,
            Err(TryRecvError::Empty) => Look::Waits,
            Ok(Err(error)) => {
                let (server, vm) = (parting.server, &shared.vm);
                tell!("memory server {server} is empty, but stays one of the guest {vm}: {error}");
                shared.listed.lock().parting.remove(&parting.server);
                Look::Over
            }
            // Nobody keeps the journal any more: the paging is over.
            Err(TryRecvError::Closed) => Look::Over,
        }
    }

    fn delete(&mut self, server: usize) {
        if self.call(server, &PageRequest::Delete).is_err() {
            tracing::warn!(server, "a store was not deleted; it stays until its server ends");
        }
        self.shared.traffic.drained.lock().insert(server);
        self.part_with(server);
        tracing::info!(server, "a memory server is not needed any more");
    }
}
