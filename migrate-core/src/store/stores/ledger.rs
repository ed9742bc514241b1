//! What of a server's memory is promised, and to whom.
//!
//! ```text
//!   capacity    |■■■■■■■ host-a ■■■■■■■|■■ host-b ■■|     free     |
//!   per host    |■■■■■■■ host-a ■■■■■■■|  free  |
//!               |■■ host-b ■■|       free       |
//! ```
//!
//! A host is the name in the certificate with which a store was created: the store takes that host's
//! share as long as it exists, whoever uses it.
//!
//! Invariants: what is reserved is the sum of what hosts have; neither exceeds its limit; a host that has
//! nothing is not remembered.

use std::collections::BTreeMap;

use super::{STORES_MAX, STORES_PER_HOST_MAX};
use crate::store::error::StoreError;

/// What a host has of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostShare {
    /// The name in its certificate.
    pub host: String,
    /// Stores that it created.
    pub stores: usize,
    /// Bytes that are reserved for them.
    pub reserved_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    stores: usize,
    reserved_bytes: u64,
}

/// What is reserved, and what may be.
#[derive(Debug)]
pub(super) struct Ledger {
    capacity_bytes: u64,
    per_host_bytes: u64,
    all: Taken,
    hosts: BTreeMap<String, Taken>,
}

impl Ledger {
    /// Nothing is reserved. One host may have all of the capacity.
    pub(super) fn new(capacity_bytes: u64) -> Self {
        let per_host_bytes = capacity_bytes;
        Self { capacity_bytes, per_host_bytes, all: Taken::default(), hosts: BTreeMap::new() }
    }

    /// Changes what one host may have.
    pub(super) fn set_per_host(&mut self, bytes: u64) {
        self.per_host_bytes = bytes;
    }

    /// Bytes that one host may have.
    pub(super) fn per_host_bytes(&self) -> u64 {
        self.per_host_bytes
    }

    /// Bytes that may be reserved, and that are.
    pub(super) fn capacity(&self) -> (u64, u64) {
        (self.capacity_bytes, self.all.reserved_bytes)
    }

    /// What each host has.
    pub(super) fn hosts(&self) -> Vec<HostShare> {
        let share = |(host, taken): (&String, &Taken)| {
            let Taken { stores, reserved_bytes } = *taken;
            HostShare { host: host.clone(), stores, reserved_bytes }
        };
        self.hosts.iter().map(share).collect()
    }

    fn of(&self, host: &str) -> Taken {
        self.hosts.get(host).copied().unwrap_or_default()
    }

    /// Notes a store that a host creates.
    ///
    /// # Errors
    /// The first limit that it exceeds; nothing is noted then.
    pub(super) fn add_store(&mut self, host: &str, bytes: u64) -> Result<(), StoreError> {
        if self.all.stores >= STORES_MAX {
            return Err(StoreError::TooManyStores { max: STORES_MAX as u64 });
        }
        if self.of(host).stores >= STORES_PER_HOST_MAX {
            return Err(StoreError::HostStores { max: STORES_PER_HOST_MAX as u64 });
        }
        self.reserve(host, bytes)?;
        self.change(host, |taken| taken.stores += 1);
        Ok(())
    }

    /// Notes that a store is gone, for which so much was reserved.
    pub(super) fn remove_store(&mut self, host: &str, bytes: u64) {
        self.give_back(host, bytes);
        self.change(host, |taken| taken.stores = taken.stores.saturating_sub(1));
    }

    /// Reserves memory for a store of a host.
    ///
    /// # Errors
    /// [`StoreError::Full`] or [`StoreError::HostFull`]; nothing is reserved then.
    pub(super) fn reserve(&mut self, host: &str, wanted_bytes: u64) -> Result<(), StoreError> {
        let free_bytes = self.capacity_bytes.saturating_sub(self.all.reserved_bytes);
        if wanted_bytes > free_bytes {
            return Err(StoreError::Full { free_bytes, wanted_bytes });
        }
        let free_bytes = self.per_host_bytes.saturating_sub(self.of(host).reserved_bytes);
        if wanted_bytes > free_bytes {
            return Err(StoreError::HostFull { free_bytes, wanted_bytes });
        }
        self.change(host, |taken| taken.reserved_bytes += wanted_bytes);
        Ok(())
    }

    /// Gives back what was reserved for a store of a host.
    pub(super) fn give_back(&mut self, host: &str, bytes: u64) {
        self.change(host, |taken| {
            taken.reserved_bytes = taken.reserved_bytes.saturating_sub(bytes);
        });
    }

    /// Changes what a host has, and the sum.
    fn change(&mut self, host: &str, change: impl Fn(&mut Taken)) {
        change(&mut self.all);
        let taken = self.hosts.entry(host.to_owned()).or_default();
        change(taken);
        if (taken.stores, taken.reserved_bytes) == (0, 0) {
            self.hosts.remove(host);
        }
    }
}
