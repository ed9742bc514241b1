//! Before a split guest comes: its memory servers are reached.

use std::sync::Arc;

use transport::messages::Split;
use transport::pages::{PageClient, PageRequest};
use transport::{Identity, Options};

use crate::error::EngineError;
use crate::stores;

/// The stores of a guest that is about to come, and connections to them.
#[derive(Debug)]
pub struct Reached {
    /// What the source said.
    pub split: Split,
    pub(super) identity: Arc<Identity>,
    pub(super) options: Options,
    /// A connection a store for pages that the guest waits for.
    pub(super) for_faults: Vec<PageClient>,
    /// And one for everything else.
    pub(super) for_keeper: Vec<PageClient>,
}

impl Reached {
    /// Connects to all stores. Blocks.
    ///
    /// # Errors
    /// [`EngineError::NoStore`] or [`EngineError::StoreRefused`] with the server's address.
    pub fn connect(
        split: Split,
        identity: Arc<Identity>,
        options: Options,
    ) -> Result<Self, EngineError> {
        let open = || -> Result<Vec<PageClient>, EngineError> {
            split.stores.iter().map(|store| stores::open(store, &identity, &options)).collect()
        };
        let (for_faults, for_keeper) = (open()?, open()?);
        Ok(Self { split, identity, options, for_faults, for_keeper })
    }

    /// The guest is about to be handed over: its stores stay until somebody deletes them. Blocks.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn keep(&mut self) -> Result<(), EngineError> {
        for (store, client) in self.split.stores.iter().zip(&mut self.for_keeper) {
            stores::ask(client, &store.address, &PageRequest::Keep)?;
        }
        Ok(())
    }
}
