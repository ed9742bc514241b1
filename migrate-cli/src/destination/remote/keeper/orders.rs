//! What operators have the keeper do: a server's pages move to others.
//!
//! ```text
//!   order ─► server added ─► drained ... empty ─► journal noted ─► store deleted, server parted with
//! ```
//!
//! Invariants: a server is in the journal before anything is put there; it is out of the journal before its store is
//! deleted, so that no later pager seeks a store that is not there.

use std::sync::Arc;

use migrate_core::remote::{RemoteError, ServerRoom};
use tokio::sync::oneshot::{self, error::TryRecvError};
use transport::messages::Store;
use transport::pages::{PageClient, PageRequest};

use super::Keeper;
use crate::destination::remote::faults::Command;
use crate::error::EngineError;
use crate::journal::JournalError;

/// A server that joins, reached and in the journal.
#[derive(Debug)]
pub(in crate::destination::remote) struct Joining {
    pub(in crate::destination::remote) store: Store,
    pub(in crate::destination::remote) for_faults: PageClient,
    pub(in crate::destination::remote) for_keeper: PageClient,
}

/// What the keeper is to do.
#[derive(Debug)]
pub(in crate::destination::remote) struct Order {
    /// The server, by its number, whose pages move to others.
    pub(in crate::destination::remote) drain: usize,
    /// One more of the others.
    pub(in crate::destination::remote) to: Option<Joining>,
    /// Told once it is begun.
    pub(in crate::destination::remote) begun: oneshot::Sender<Result<(), EngineError>>,
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
    /// Takes what was ordered up.
    pub(super) fn obey(&mut self) {
        let orders = std::mem::take(&mut *self.shared.orders.lock());
        for Order { drain, to, begun } in orders {
            let joined = to.map_or(Ok(()), |joining| self.join(joining));
            if joined.is_ok() {
                self.shared.remote.lock().drain(drain);
                if self.parting.iter().all(|parting| parting.server != drain) {
                    self.parting.push(Parting { server: drain, noted: None });
                }
            }
            let _asker_left = begun.send(joined.map_err(EngineError::from));
        }
    }

    fn join(&mut self, joining: Joining) -> Result<(), RemoteError> {
        let Joining { store, for_faults, for_keeper } = joining;
        // Numbers are given out under the lock of the stores, so that both lists agree.
        let mut stores = self.shared.stores.write();
        let room = ServerRoom { reserve_pages: store.reserve_pages };
        let server = self.shared.remote.lock().add_server(room)?;
        stores.push(store);
        self.clients.push(Some(for_keeper));
        self.faults.tell(Command::Connect(server, Box::new(for_faults)));
        Ok(())
    }

    /// Parts with servers that have nothing of the guest any more.
    pub(super) fn part(&mut self) {
        for mut parting in std::mem::take(&mut self.parting) {
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
        let noted = parting
            .noted
            .get_or_insert_with(|| shared.note(shared.split_now(Some(parting.server))));
        match noted.try_recv() {
            Ok(Ok(())) => Look::Empty,
            Err(TryRecvError::Empty) => Look::Waits,
            Ok(Err(error)) => {
                eprintln!("memory server {} is empty, but stays: {error}", parting.server);
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
