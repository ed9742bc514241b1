//! What agents share: a small store of keys and values with transactions, leases and watches.
//!
//! One trait, [`Store`], and two kinds behind it: a file for one machine or a lab ([`embedded`]), and a cluster of etcd
//! members. What agents agree on by it, who moves which guest and what a host has promised, is in [`claims`].
//!
//! Invariants, for every kind:
//! - a transaction's changes are all made or none, and only if all of its conditions hold at that moment;
//! - every change raises the store's revision, and an entry has the revision of its last change;
//! - an entry with a lease is gone once the lease has ended, and watchers hear of that.
//!
//! A store that cannot be reached stops decisions, never guests: nothing here touches a guest.

pub mod any;
pub mod claims;
pub mod embedded;
pub mod etcd;
#[cfg(test)]
mod etcd_tests;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;

pub use self::any::AnyStore;
pub use self::embedded::Embedded;
pub use self::etcd::Etcd;

/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 512;

/// Longest value, in bytes; etcd takes 1.5 MiB a request.
pub const VALUE_BYTES_MAX: usize = 1 << 20;

/// Number of the store's changes so far.
pub type Revision = i64;

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or cannot write.
    #[error("The store cannot be used: {what}; nothing is decided until it can, guests run on")]
    Unavailable {
        /// Why.
        what: String,
    },
    /// A lease has ended: its holder was silent for too long.
    #[error("The lease has ended; what was entered under it is gone")]
    LeaseEnded,
    /// A key or value that is too long.
    #[error("{what} of {bytes} bytes is too long for the store (at most {max})")]
    TooLong {
        /// Key or value.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// What is possible.
        max: usize,
    },
    /// What is stored is not what this version writes.
    #[error("The store holds something else than this version writes: {what}")]
    Foreign {
        /// What.
        what: String,
    },
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// The store's revision when it was last changed.
    pub revision: Revision,
}

/// What must be so for a transaction to change anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// There is no such entry.
    Absent(String),
    /// The entry was not changed since, and is there.
    Unchanged(String, Revision),
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Enters a value, under a lease or for good.
    Put {
        /// Where.
        key: String,
        /// What.
        value: Vec<u8>,
        /// Until when.
        lease: Option<Lease>,
    },
    /// Removes an entry, if there is one.
    Delete(String),
}

/// The right to entries as long as it is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease(pub i64);

/// Something that happened to an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It has this value now.
    Put(Entry),
    /// It is gone.
    Gone {
        /// Its key.
        key: String,
        /// The store's revision by then.
        revision: Revision,
    },
}

/// A store.
pub trait Store: Clone + Send + Sync + 'static {
    /// An entry.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// All entries whose keys begin so, by key, and the revision at which that was so.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn list(
        &self,
        prefix: &str,
    ) -> impl Future<Output = Result<(Vec<Entry>, Revision), StoreError>> + Send;

    /// Makes all changes if all conditions hold: the revision then, or nothing.
    ///
    /// # Errors
    /// [`StoreError::LeaseEnded`] if a change names a lease that is no more, [`StoreError::TooLong`],
    /// [`StoreError::Unavailable`].
    fn commit(
        &self,
        conditions: &[Condition],
        changes: &[Change],
    ) -> impl Future<Output = Result<Option<Revision>, StoreError>> + Send;

    /// A lease that ends unless it is renewed within `ttl`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<Lease, StoreError>> + Send;

    /// Renews a lease.
    ///
    /// # Errors
    /// [`StoreError::LeaseEnded`], [`StoreError::Unavailable`].
    fn keep(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Ends a lease, and with it its entries.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn revoke(&self, lease: Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// What happens to entries whose keys begin so, after a revision. The queue ends with the error that ended the watch;
    /// whoever still wants to know lists anew.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> impl Future<Output = Result<mpsc::Receiver<Result<Event, StoreError>>, StoreError>> + Send;
}

/// Refuses changes that no store would take.
fn check(changes: &[Change]) -> Result<(), StoreError> {
    for change in changes {
        let (key, value) = match change {
            Change::Put { key, value, .. } => (key, value.len()),
            Change::Delete(key) => (key, 0),
        };
        if key.len() > KEY_BYTES_MAX {
            let (what, bytes, max) = ("A key", key.len(), KEY_BYTES_MAX);
            return Err(StoreError::TooLong { what, bytes, max });
        }
        if value > VALUE_BYTES_MAX {
            let (what, bytes, max) = ("A value", value, VALUE_BYTES_MAX);
            return Err(StoreError::TooLong { what, bytes, max });
        }
    }
    Ok(())
}
