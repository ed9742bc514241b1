//! All stores of a server: who may use which, what is reserved for whom, and how long they stay.
//!
//! | module | what it holds |
//! |---|---|
//! | `ledger` | what of the capacity is promised, in all and to each host |
//! | `reserve` | changing a store's reservation |
//! | `put` | storing pages |
//! | `list` | which pages are stored |
//!
//! Several threads use them at once. Each store has a lock of its own, held while one piece of 64 KiB is
//! copied at most, so that guests do not wait for one another, and a guest's faults hardly for its own
//! evictions. Packing and unpacking happen outside of it.
//!
//! Locks are taken in this order: that of all stores, that of a store.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use self::ledger::Ledger;
use super::content::{Packing, unpack};
use super::error::StoreError;
use super::names::{Extent, HOSTS_MAX, NewStore, StoreId, StoreSecret, StoreStat, check_host};
use super::shelf::{Shelf, Stamp};
use crate::layout::PAGE_BYTES;

mod ledger;
mod list;
mod put;
mod reserve;

pub use ledger::HostShare;
pub use list::Listing;

/// Most stores of a server.
pub const STORES_MAX: usize = 1024;

/// Most stores that one host may create: a quarter, so that none takes all.
pub const STORES_PER_HOST_MAX: usize = STORES_MAX / 4;

/// Pages that are copied under one lock: 64 KiB.
pub const PIECE_PAGES: usize = 16;

/// Pages that are dropped under one lock.
const DROP_PAGES: usize = 1024;

/// All stores of a server.
#[derive(Debug)]
pub struct Stores {
    lease: Duration,
    compresses: bool,
    all: Mutex<All>,
}

#[derive(Debug)]
struct All {
    ledger: Ledger,
    stores: BTreeMap<StoreId, Arc<Store>>,
}

#[derive(Debug)]
struct Store {
    secret: StoreSecret,
    vm: String,
    /// The host that created it, whose share it takes.
    creator: String,
    pages: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Who may use it; the one that created it first.
    hosts: Vec<String>,
    /// When it was asked for last.
    used: Duration,
    kept: bool,
    /// It was deleted, or its lease has ended.
    gone: bool,
    /// Pages that it may hold. Changes with the lock of all stores held, too.
    reserve_pages: u64,
    /// Pages that are being put and have no place yet.
    claimed_pages: u64,
    shelf: Shelf,
}

/// What there is to know of a store, for whoever runs the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreInfo {
    /// Its id.
    pub store: StoreId,
    /// The VM's name.
    pub vm: String,
    /// The host that created it, or the first that still may use it.
    pub host: String,
    /// The host that created it, whose share it takes.
    pub creator: String,
    /// What it holds.
    pub stat: StoreStat,
    /// Memory for contents in bytes, with what is free in between.
    pub memory_bytes: u64,
}

/// Bytes that are reserved for so many pages.
fn bytes_of(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES as u64)
}

impl Store {
    /// The store for a host that may use it.
    fn enter(&self, host: &str) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let inner = self.inner.lock();
        let may = !inner.gone && inner.hosts.iter().any(|other| other == host);
        if may { Ok(inner) } else { Err(StoreError::Unknown) }
    }

    fn stat(&self, inner: &Inner) -> StoreStat {
        StoreStat {
            stored_pages: inner.shelf.len(),
            stored_bytes: inner.shelf.content_bytes(),
            reserve_pages: inner.reserve_pages,
            kept: inner.kept,
        }
    }
}

impl Inner {
    fn touch(&mut self, now: Duration) {
        self.used = self.used.max(now);
    }

    /// Empties the store for good; its memory is given back when what is returned is dropped.
    fn end(&mut self) -> Shelf {
        self.gone = true;
        std::mem::replace(&mut self.shelf, Shelf::new(0))
    }
}

impl Stores {
    /// No stores yet. Together they may reserve `capacity_bytes`, and so may those of one host; one that
    /// is not kept ends when nothing is asked of it for `lease`. Pages are compressed if `compresses`.
    pub fn new(capacity_bytes: u64, lease: Duration, compresses: bool) -> Self {
        let all = All { ledger: Ledger::new(capacity_bytes), stores: BTreeMap::new() };
        Self { lease, compresses, all: Mutex::new(all) }
    }

    /// The same, but the stores that one host creates may reserve no more than `bytes` together.
    #[must_use]
    pub fn with_per_host(mut self, bytes: u64) -> Self {
        self.all.get_mut().ledger.set_per_host(bytes);
        self
    }

    /// Creates a store for `host` and opens it.
    ///
    /// # Errors
    /// [`StoreError::Full`] or [`StoreError::HostFull`] if the reservation exceeds what is free, or what
    /// the host has left; [`StoreError::Exists`], [`StoreError::Unknown`] if the id is taken by a store
    /// that this host may not use, [`StoreError::TooManyStores`], [`StoreError::HostStores`], or a field
    /// that breaks a rule.
    pub fn create(
        &self,
        wanted: NewStore,
        host: &str,
        now: Duration,
    ) -> Result<OpenStore<'_>, StoreError> {
        wanted.check()?;
        check_host(host)?;
        let mut all = self.all.lock();
        if let Some(other) = all.stores.get(&wanted.store) {
            let may = other.secret == wanted.secret && other.enter(host).is_ok();
            return Err(if may { StoreError::Exists } else { StoreError::Unknown });
        }
        all.ledger.add_store(host, bytes_of(wanted.reserve_pages))?;
        let mut hosts = vec![host.to_owned()];
        for other in wanted.hosts {
            if !hosts.contains(&other) {
                hosts.push(other);
            }
        }
        let store = Store {
            secret: wanted.secret,
            vm: wanted.vm,
            creator: host.to_owned(),
            pages: wanted.pages,
            inner: Mutex::new(Inner {
                hosts,
                used: now,
                kept: false,
                gone: false,
                reserve_pages: wanted.reserve_pages,
                claimed_pages: 0,
                shelf: Shelf::new(wanted.reserve_pages),
            }),
        };
        let store = Arc::new(store);
        all.stores.insert(wanted.store, Arc::clone(&store));
        Ok(OpenStore::new(self, wanted.store, store, host))
    }

    /// Opens a store for `host`.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if there is none, the secret is another, or the host may not use it.
    pub fn open(
        &self,
        id: StoreId,
        secret: &StoreSecret,
        host: &str,
        now: Duration,
    ) -> Result<OpenStore<'_>, StoreError> {
        let store = self.all.lock().stores.get(&id).cloned().ok_or(StoreError::Unknown)?;
        if store.secret != *secret {
            return Err(StoreError::Unknown);
        }
        store.enter(host)?.touch(now);
        Ok(OpenStore::new(self, id, store, host))
    }

    /// Deletes the stores whose lease has ended, and returns what they were.
    pub fn expire(&self, now: Duration) -> Vec<StoreInfo> {
        let (mut ended, mut shelves) = (vec![], vec![]);
        let mut all = self.all.lock();
        let All { ledger, stores } = &mut *all;
        stores.retain(|id, store| {
            let mut inner = store.inner.lock();
            // One that is being deleted by its host is taken out by that.
            let over = now.saturating_sub(inner.used) >= self.lease;
            if inner.kept || inner.gone || !over {
                return true;
            }
            ended.push(info(*id, store, &inner));
            shelves.push(inner.end());
            ledger.remove_store(&store.creator, bytes_of(inner.reserve_pages));
            false
        });
        drop(all);
        // Giving back much memory takes a while, which nobody is to wait for.
        drop(shelves);
        ended
    }

    /// Bytes that may be reserved, and that are.
    pub fn capacity(&self) -> (u64, u64) {
        self.all.lock().ledger.capacity()
    }

    /// Bytes that the stores of one host may reserve together.
    pub fn per_host_bytes(&self) -> u64 {
        self.all.lock().ledger.per_host_bytes()
    }

    /// What each host has, by name. Those that have nothing are not named.
    pub fn hosts(&self) -> Vec<HostShare> {
        self.all.lock().ledger.hosts()
    }

    /// All stores.
    pub fn list(&self) -> Vec<StoreInfo> {
        let all = self.all.lock();
        let stores = all.stores.iter();
        stores.map(|(id, store)| info(*id, store, &store.inner.lock())).collect()
    }
}

fn info(id: StoreId, store: &Store, inner: &Inner) -> StoreInfo {
    StoreInfo {
        store: id,
        vm: store.vm.clone(),
        host: inner.hosts.first().cloned().unwrap_or_default(),
        creator: store.creator.clone(),
        stat: store.stat(inner),
        memory_bytes: inner.shelf.memory_bytes(),
    }
}

/// A store in the hands of a host. Everything asked of it fails with [`StoreError::Unknown`] once it is
/// gone or the host was revoked.
#[derive(Debug)]
pub struct OpenStore<'a> {
    stores: &'a Stores,
    id: StoreId,
    store: Arc<Store>,
    host: String,
    packing: Packing,
    scratch: Vec<u8>,
}

/// Pages that are being read, with when each was put.
#[derive(Debug)]
pub struct Reading {
    pages: Vec<(u64, Stamp)>,
    next: usize,
}

/// A part of the pages that are being read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Which, in the order in which they were asked for.
    pub extents: Vec<Extent>,
    /// Their contents, 4096 bytes each.
    pub contents: Vec<u8>,
    /// Whether nothing follows.
    pub last: bool,
}

impl<'a> OpenStore<'a> {
    fn new(stores: &'a Stores, id: StoreId, store: Arc<Store>, host: &str) -> Self {
        let packing = Packing::new(stores.compresses);
        Self { stores, id, store, host: host.to_owned(), packing, scratch: vec![] }
    }

    /// Which one it is.
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// The VM whose pages it holds.
    pub fn vm(&self) -> &str {
        &self.store.vm
    }

    fn enter(&self, now: Duration) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.store.enter(&self.host)?;
        inner.touch(now);
        Ok(inner)
    }

    /// Ends the lease: the store stays until it is deleted.
    ///
    /// # Errors
    /// [`StoreError::Unknown`]
    pub fn keep(&self, now: Duration) -> Result<(), StoreError> {
        self.enter(now)?.kept = true;
        Ok(())
    }

    /// Lets another host use the store.
    ///
    /// # Errors
    /// [`StoreError::TooManyHosts`], or a name that can be none.
    pub fn grant(&self, host: &str, now: Duration) -> Result<(), StoreError> {
        let mut inner = self.enter(now)?;
        check_host(host)?;
        if inner.hosts.iter().any(|other| other == host) {
            return Ok(());
        }
        if inner.hosts.len() >= HOSTS_MAX {
            return Err(StoreError::TooManyHosts { max: HOSTS_MAX as u64 });
        }
        inner.hosts.push(host.to_owned());
        Ok(())
    }

    /// Does not let another host use the store any more.
    ///
    /// # Errors
    /// [`StoreError::Itself`]: so there always is a host that can delete it.
    pub fn revoke(&self, host: &str, now: Duration) -> Result<(), StoreError> {
        let mut inner = self.enter(now)?;
        if host == self.host {
            return Err(StoreError::Itself);
        }
        inner.hosts.retain(|other| other != host);
        Ok(())
    }

    fn check_range(&self, extents: &[Extent]) -> Result<(), StoreError> {
        let pages = self.store.pages;
        match extents.iter().find(|extent| extent.end() > pages) {
            Some(extent) => {
                let page = extent.first_page.max(pages);
                Err(StoreError::OutOfRange { page, pages })
            }
            None => Ok(()),
        }
    }

    /// Begins to read pages.
    ///
    /// # Errors
    /// [`StoreError::NotStored`] or [`StoreError::OutOfRange`] with the first that is not there.
    pub fn read(&self, extents: &[Extent], now: Duration) -> Result<Reading, StoreError> {
        self.check_range(extents)?;
        let inner = self.enter(now)?;
        let pages = extents.iter().flat_map(Extent::iter).map(|page| {
            let stamp = inner.shelf.stamp(page).ok_or(StoreError::NotStored { page })?;
            Ok((page, stamp))
        });
        Ok(Reading { pages: pages.collect::<Result<_, StoreError>>()?, next: 0 })
    }

    /// The next piece of what is read, if there is one: the first page alone, which a guest waits for,
    /// then [`PIECE_PAGES`] at most.
    ///
    /// # Errors
    /// [`StoreError::NotStored`] if the page was dropped meanwhile.
    pub fn piece(&mut self, reading: &mut Reading) -> Result<Option<Piece>, StoreError> {
        let most = if reading.next == 0 { 1 } else { PIECE_PAGES };
        let rest = reading.pages.get(reading.next..).unwrap_or_default();
        let pages = rest.get(..most).unwrap_or(rest);
        if pages.is_empty() {
            return Ok(None);
        }
        self.scratch.clear();
        let mut lengths = Vec::with_capacity(pages.len());
        let inner = self.store.enter(&self.host)?;
        for (page, _) in pages {
            let kept = inner.shelf.get(*page).ok_or(StoreError::NotStored { page: *page })?;
            self.scratch.extend_from_slice(kept);
            lengths.push(kept.len());
        }
        drop(inner);
        let mut contents = vec![0; pages.len() * PAGE_BYTES];
        let mut kept = &self.scratch[..];
        for ((length, (page, _)), content) in
            lengths.into_iter().zip(pages).zip(contents.chunks_exact_mut(PAGE_BYTES))
        {
            let (first, rest) = kept.split_at(length);
            kept = rest;
            if !unpack(first, content) {
                return Err(StoreError::Damaged { page: *page });
            }
        }
        let extents = Extent::join(pages.iter().map(|(page, _)| *page));
        reading.next += pages.len();
        Ok(Some(Piece { extents, contents, last: reading.next == reading.pages.len() }))
    }

    /// Drops the pages that were read, but for those that were put again meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Unknown`]
    pub fn take(&self, reading: &Reading) -> Result<(), StoreError> {
        for pages in reading.pages.chunks(DROP_PAGES) {
            let mut inner = self.store.enter(&self.host)?;
            for (page, stamp) in pages {
                if inner.shelf.stamp(*page) == Some(*stamp) {
                    inner.shelf.remove(*page);
                }
            }
            inner.shelf.tidy();
        }
        Ok(())
    }

    /// Drops pages; those that are not there are passed by.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`] before anything is dropped.
    pub fn drop_pages(&self, extents: &[Extent], now: Duration) -> Result<(), StoreError> {
        self.check_range(extents)?;
        for extent in extents {
            let mut next = Some(extent.first_page);
            while let Some(from) = next {
                let mut inner = self.enter(now)?;
                next = inner.shelf.remove_some(from..extent.end(), DROP_PAGES);
                inner.shelf.tidy();
            }
        }
        Ok(())
    }

    /// What it holds.
    ///
    /// # Errors
    /// [`StoreError::Unknown`]
    pub fn stat(&self, now: Duration) -> Result<StoreStat, StoreError> {
        let inner = self.enter(now)?;
        Ok(self.store.stat(&inner))
    }

    /// Deletes the store and gives back what was reserved for it.
    ///
    /// # Errors
    /// [`StoreError::Unknown`]
    pub fn delete(&self, now: Duration) -> Result<(), StoreError> {
        let mut inner = self.enter(now)?;
        let (shelf, reserve_pages) = (inner.end(), inner.reserve_pages);
        drop(inner);
        // What is free for others is so when the kernel has it back.
        drop(shelf);
        let mut all = self.stores.all.lock();
        all.stores.remove(&self.id);
        all.ledger.remove_store(&self.store.creator, bytes_of(reserve_pages));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
