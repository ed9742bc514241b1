//! All stores of a server: who may use which, what is reserved, and how long they stay.
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

use super::content::{Packing, unpack};
use super::error::StoreError;
use super::names::{Extent, HOSTS_MAX, NewStore, StoreId, StoreSecret, StoreStat, check_host};
use super::shelf::{Shelf, Stamp};
use crate::layout::PAGE_BYTES;

mod list;

pub use list::Listing;

/// Most stores of a server.
pub const STORES_MAX: usize = 1024;

/// Pages that are copied under one lock: 64 KiB.
pub const PIECE_PAGES: usize = 16;

/// Pages that are dropped under one lock.
const DROP_PAGES: usize = 1024;

/// All stores of a server.
#[derive(Debug)]
pub struct Stores {
    capacity_bytes: u64,
    lease: Duration,
    compresses: bool,
    all: Mutex<All>,
}

#[derive(Debug, Default)]
struct All {
    reserved_bytes: u64,
    stores: BTreeMap<StoreId, Arc<Store>>,
}

#[derive(Debug)]
struct Store {
    secret: StoreSecret,
    vm: String,
    pages: u64,
    reserve_pages: u64,
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
    /// What it holds.
    pub stat: StoreStat,
    /// Memory for contents in bytes, with what is free in between.
    pub memory_bytes: u64,
}

impl Store {
    fn reserved_bytes(&self) -> u64 {
        self.reserve_pages.saturating_mul(PAGE_BYTES as u64)
    }

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
            reserve_pages: self.reserve_pages,
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
    /// No stores yet. Together they may reserve `capacity_bytes`; one that is not kept ends when
    /// nothing is asked of it for `lease`. Pages are compressed if `compresses`.
    pub fn new(capacity_bytes: u64, lease: Duration, compresses: bool) -> Self {
        Self { capacity_bytes, lease, compresses, all: Mutex::default() }
    }

    /// Creates a store for `host` and opens it.
    ///
    /// # Errors
    /// [`StoreError::Full`] if the reservation exceeds what is free; [`StoreError::Exists`],
    /// [`StoreError::Unknown`] if the id is taken by a store that this host may not use,
    /// [`StoreError::TooManyStores`], or a field that breaks a rule.
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
        if all.stores.len() >= STORES_MAX {
            return Err(StoreError::TooManyStores { max: STORES_MAX as u64 });
        }
        let mut hosts = vec![host.to_owned()];
        for other in wanted.hosts {
            if !hosts.contains(&other) {
                hosts.push(other);
            }
        }
        let store = Store {
            secret: wanted.secret,
            vm: wanted.vm,
            pages: wanted.pages,
            reserve_pages: wanted.reserve_pages,
            inner: Mutex::new(Inner {
                hosts,
                used: now,
                kept: false,
                gone: false,
                claimed_pages: 0,
                shelf: Shelf::new(wanted.reserve_pages),
            }),
        };
        let wanted_bytes = store.reserved_bytes();
        let free_bytes = self.capacity_bytes.saturating_sub(all.reserved_bytes);
        if wanted_bytes > free_bytes {
            return Err(StoreError::Full { free_bytes, wanted_bytes });
        }
        all.reserved_bytes = all.reserved_bytes.saturating_add(wanted_bytes);
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
        let All { reserved_bytes, stores } = &mut *all;
        stores.retain(|id, store| {
            let mut inner = store.inner.lock();
            // One that is being deleted by its host is taken out by that.
            let over = now.saturating_sub(inner.used) >= self.lease;
            if inner.kept || inner.gone || !over {
                return true;
            }
            ended.push(info(*id, store, &inner));
            shelves.push(inner.end());
            *reserved_bytes = reserved_bytes.saturating_sub(store.reserved_bytes());
            false
        });
        drop(all);
        // Giving back much memory takes a while, which nobody is to wait for.
        drop(shelves);
        ended
    }

    /// Bytes that may be reserved, and that are.
    pub fn capacity(&self) -> (u64, u64) {
        (self.capacity_bytes, self.all.lock().reserved_bytes)
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

    /// Puts pages of one version, in the place of those with the same numbers, whatever their versions.
    /// `contents` has 4096 bytes for each.
    ///
    /// # Errors
    /// [`StoreError::Reserved`] or [`StoreError::OutOfRange`] before anything is put;
    /// [`StoreError::NoMemory`], or [`StoreError::Reserved`] where others drop and put the same pages
    /// meanwhile, after some of the pages.
    pub fn put(
        &mut self,
        extents: &[Extent],
        contents: &[u8],
        version: u64,
        now: Duration,
    ) -> Result<(), StoreError> {
        self.check_range(extents)?;
        let pages: Vec<u64> = extents.iter().flat_map(Extent::iter).collect();
        if contents.len() != pages.len().saturating_mul(PAGE_BYTES) {
            let bytes = contents.len() as u64;
            return Err(StoreError::field("contents", bytes, "4096 bytes a page are needed"));
        }
        let mut claimed = self.claim(&pages, now)?;
        let pieces = pages.chunks(PIECE_PAGES).zip(contents.chunks(PIECE_PAGES * PAGE_BYTES));
        let mut put = Ok(());
        for (pages, contents) in pieces {
            let kept = self.packing.pack(contents);
            put = self.store.enter(&self.host).and_then(|mut inner| {
                let pages = pages.iter().copied().zip(kept);
                put_piece(&mut inner, pages, version, &mut claimed, self.store.reserve_pages)
            });
            if put.is_err() {
                break;
            }
        }
        self.store.inner.lock().claimed_pages -= claimed;
        put
    }

    /// Makes sure that all of these pages find a place, however many threads put at once.
    fn claim(&self, pages: &[u64], now: Duration) -> Result<u64, StoreError> {
        let mut inner = self.enter(now)?;
        let new = pages.iter().filter(|page| !inner.shelf.contains(**page)).count() as u64;
        let wanted_pages = inner.shelf.len() + inner.claimed_pages + new;
        let reserve_pages = self.store.reserve_pages;
        if wanted_pages > reserve_pages {
            return Err(StoreError::Reserved { reserve_pages, wanted_pages });
        }
        inner.claimed_pages += new;
        Ok(new)
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
        let shelf = self.enter(now)?.end();
        // What is free for others is so when the kernel has it back.
        drop(shelf);
        let mut all = self.stores.all.lock();
        all.stores.remove(&self.id);
        all.reserved_bytes = all.reserved_bytes.saturating_sub(self.store.reserved_bytes());
        Ok(())
    }
}

/// Puts a piece; pages that are new use up what was `claimed`.
fn put_piece<'a>(
    inner: &mut Inner,
    pages: impl Iterator<Item = (u64, &'a [u8])>,
    version: u64,
    claimed: &mut u64,
    reserve_pages: u64,
) -> Result<(), StoreError> {
    for (page, kept) in pages {
        if !inner.shelf.contains(page) {
            let wanted_pages = inner.shelf.len() + inner.claimed_pages + 1;
            match claimed.checked_sub(1) {
                Some(rest) => {
                    *claimed = rest;
                    inner.claimed_pages -= 1;
                }
                // It was there when this began, and somebody has dropped it since.
                None if wanted_pages > reserve_pages => {
                    return Err(StoreError::Reserved { reserve_pages, wanted_pages });
                }
                None => {}
            }
        }
        inner.shelf.put(page, kept, version).map_err(|_| StoreError::NoMemory)?;
    }
    inner.shelf.tidy();
    Ok(())
}

#[cfg(test)]
mod tests;
