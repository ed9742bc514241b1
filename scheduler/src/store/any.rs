//! Either kind of store, as a configuration names it.

use std::time::Duration;

use tokio::sync::mpsc;

use super::{Change, Condition, Embedded, Entry, Etcd, Event, Lease, Revision, Store, StoreError};

/// A store of either kind.
#[derive(Debug, Clone)]
pub enum AnyStore {
    /// A file.
    Embedded(Embedded),
    /// Members of etcd.
    Etcd(Box<Etcd>),
}

impl AnyStore {
    /// What it is called in configurations.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Embedded(_) => "embedded",
            Self::Etcd(_) => "etcd",
        }
    }
}

impl Store for AnyStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        match self {
            Self::Embedded(store) => store.get(key).await,
            Self::Etcd(store) => store.get(key).await,
        }
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        match self {
            Self::Embedded(store) => store.list(prefix).await,
            Self::Etcd(store) => store.list(prefix).await,
        }
    }

    async fn commit(
        &self,
        conditions: &[Condition],
        changes: &[Change],
    ) -> Result<Option<Revision>, StoreError> {
        match self {
            Self::Embedded(store) => store.commit(conditions, changes).await,
            Self::Etcd(store) => store.commit(conditions, changes).await,
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        match self {
            Self::Embedded(store) => store.grant(ttl).await,
            Self::Etcd(store) => store.grant(ttl).await,
        }
    }

    async fn keep(&self, lease: Lease) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.keep(lease).await,
            Self::Etcd(store) => store.keep(lease).await,
        }
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.revoke(lease).await,
            Self::Etcd(store) => store.revoke(lease).await,
        }
    }

    async fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> Result<mpsc::Receiver<Result<Event, StoreError>>, StoreError> {
        match self {
            Self::Embedded(store) => store.watch(prefix, after).await,
            Self::Etcd(store) => store.watch(prefix, after).await,
        }
    }
}
