//! The messages of a guest whose memory is split over hosts.

use std::fmt;

use migrate_core::store::names::VERSION_MAX;
use serde::{Deserialize, Serialize};

use super::{Body, PAGES_MAX, SMALL_BYTES, TEXT_BYTES_MAX, check_text, rule};
use crate::error::WireError;

/// Most memory servers of a guest.
pub const STORES_MAX: usize = 8;

/// Room in bytes for a [`Split`].
pub(super) const SPLIT_BODY_BYTES: usize =
    STORES_MAX * (2 * TEXT_BYTES_MAX + SMALL_BYTES) + SMALL_BYTES;

/// Source: the guest's memory will lie here in part, and on memory servers. The destination answers with
/// [`Prepared`](super::Prepared) once it has reached all of them, or aborts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Most pages of the guest that the destination may ever hold.
    pub resident_pages: u64,
    /// On how many servers each page is that is not here: 1 or 2.
    pub copies: u8,
    /// Longest plausible direct I/O of the guest's disks in milliseconds; 0 if they have none.
    pub direct_io_window_ms: u32,
    /// The guest's stores, 1 to [`STORES_MAX`].
    pub stores: Vec<Store>,
    /// Whether the guest was split before and only its main host changes: what lies in the stores is its memory already.
    /// Until the destination owns the guest nothing in them may change, and they stay if it never does.
    #[serde(default)]
    pub is_moved: bool,
    /// What the guest's pager is to do by itself.
    #[serde(default)]
    pub then: Then,
}

/// What becomes of a split guest once it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Then {
    /// All of its memory is to come to the destination.
    pub merge: bool,
    /// Numbers of stores from which all is to move to the others, ascending.
    pub drain: Vec<u16>,
}

/// A store of the guest's pages on a memory server.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    /// Where the server listens.
    pub address: String,
    /// The name in the server's certificate.
    pub name: String,
    /// Names the store.
    pub id: [u8; 16],
    /// Who knows it may use the store.
    pub secret: [u8; 32],
    /// Pages that are reserved there.
    pub reserve_pages: u64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, name, reserve_pages, .. } = self;
        f.debug_struct("Store")
            .field("address", address)
            .field("name", name)
            .field("reserve_pages", reserve_pages)
            .finish_non_exhaustive()
    }
}

/// Source, before [`Load`](super::Load): the [`Missing`](super::Missing) pages since the last such message lie in
/// this store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteEnd {
    /// Number of the store in [`Split::stores`].
    pub store: u16,
    /// How many pages these are.
    pub pages: u64,
    /// The highest version that a page in this store has, or had: 1 to 2^63, or 0 if none was put. The
    /// destination puts its own pages with higher ones than that of any store.
    pub version: u64,
}

impl Body for Split {
    fn validate(&self) -> Result<(), WireError> {
        let what = "Split";
        let (resident, count) = (self.resident_pages, self.stores.len());
        rule((1..=PAGES_MAX).contains(&resident), what, "resident_pages", resident, "1 to 2^34")?;
        rule((1..=STORES_MAX).contains(&count), what, "stores", count as u64, "1 to 8")?;
        let copies = usize::from(self.copies);
        let enough = (1..=2).contains(&copies) && copies <= count;
        rule(enough, what, "copies", copies as u64, "1, or 2 with two stores or more")?;
        let drain = &self.then.drain;
        let ascending = drain.windows(2).all(|pair| pair.first() < pair.last());
        let known = drain.last().is_none_or(|last| usize::from(*last) < count);
        let last = drain.last().copied().unwrap_or_default().into();
        rule(ascending && known, what, "drain", last, "numbers of stores, ascending")?;
        rule(
            drain.len() + copies <= count,
            what,
            "drain",
            drain.len() as u64,
            "copies need stores",
        )?;
        for store in &self.stores {
            check_text(what, "address", &store.address)?;
            check_text(what, "name", &store.name)?;
            let pages = store.reserve_pages;
            rule(pages <= PAGES_MAX, what, "reserve_pages", pages, "pages end at 2^34")?;
        }
        Ok(())
    }
}

impl Body for RemoteEnd {
    fn validate(&self) -> Result<(), WireError> {
        let (what, store) = ("RemoteEnd", u64::from(self.store));
        rule(store < STORES_MAX as u64, what, "store", store, "stores end at 8")?;
        rule(self.pages <= PAGES_MAX, what, "pages", self.pages, "pages end at 2^34")?;
        let version = self.version;
        let is_version = (self.pages.min(1)..=VERSION_MAX).contains(&version);
        rule(is_version, what, "version", version, "1 to 2^63, or 0 without pages")
    }
}
