//! What stores and their pages are called by.

use std::fmt;

use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::error::StoreError;
use crate::layout::{PAGE_BYTES, RAM_BYTES_MAX};

/// Highest page number plus one.
pub const PAGES_MAX: u64 = RAM_BYTES_MAX / PAGE_BYTES as u64;

/// Highest version of a page. One more than that still is a number, for whoever counts on from it.
pub const VERSION_MAX: u64 = 1 << 63;

/// Most entries in one part of the list of a store's pages.
pub const LIST_ENTRIES_MAX: usize = 4096;

/// Most hosts that may use a store.
pub const HOSTS_MAX: usize = 16;

/// Longest name of a host in bytes, as `migrate pki issue` takes it.
pub const HOST_BYTES_MAX: usize = 63;

/// Longest name of a VM in bytes.
pub const VM_BYTES_MAX: usize = 255;

/// Names a store for all time: chosen at random by whoever creates it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StoreId(pub [u8; 16]);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreId({self})")
    }
}

/// What a host must know to use a store, besides being one that may. Compared in constant time, and
/// never printed.
#[derive(Clone, Serialize, Deserialize)]
pub struct StoreSecret([u8; 32]);

impl StoreSecret {
    /// A secret of bytes that nobody can guess.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl PartialEq for StoreSecret {
    fn eq(&self, other: &Self) -> bool {
        bool::from(self.0.ct_eq(&other.0))
    }
}

impl Eq for StoreSecret {}

impl fmt::Debug for StoreSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreSecret(..)")
    }
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first page's number.
    pub first_page: u64,
    /// How many there are.
    pub pages: u32,
}

impl Extent {
    /// The pages from `first_page` on.
    pub fn new(first_page: u64, pages: u32) -> Self {
        Self { first_page, pages }
    }

    /// The page after the last.
    pub fn end(&self) -> u64 {
        self.first_page.saturating_add(u64::from(self.pages))
    }

    /// The pages' numbers in their order.
    pub fn iter(&self) -> std::ops::Range<u64> {
        self.first_page..self.end()
    }

    /// How many pages some extents have together.
    pub fn count(extents: &[Self]) -> u64 {
        extents.iter().fold(0, |sum, extent| sum.saturating_add(u64::from(extent.pages)))
    }

    /// Pages in their order as extents; neighbours that follow one another share one.
    pub fn join(pages: impl IntoIterator<Item = u64>) -> Vec<Self> {
        let mut extents: Vec<Self> = vec![];
        for page in pages {
            match extents.last_mut() {
                Some(last) if last.end() == page && last.pages < u32::MAX => last.pages += 1,
                _ => extents.push(Self::new(page, 1)),
            }
        }
        extents
    }
}

/// What is asked for when a store is created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewStore {
    /// Its id.
    pub store: StoreId,
    /// What whoever uses it must know.
    pub secret: StoreSecret,
    /// The VM whose pages it is for, for people.
    pub vm: String,
    /// Size of the guest in pages: page numbers end there.
    pub pages: u64,
    /// Most pages that it may hold; memory for them is reserved.
    pub reserve_pages: u64,
    /// Other hosts that may use it, by the names in their certificates.
    pub hosts: Vec<String>,
}

impl NewStore {
    /// Checks the limits on every field.
    ///
    /// # Errors
    /// [`StoreError::Field`] with the first that breaks a rule.
    pub fn check(&self) -> Result<(), StoreError> {
        let clean = self.vm.len() <= VM_BYTES_MAX && !self.vm.chars().any(char::is_control);
        let vm_bytes = self.vm.len() as u64;
        rule(clean, "vm", vm_bytes, "at most 255 bytes without control characters")?;
        let pages = self.pages;
        rule((1..=PAGES_MAX).contains(&pages), "pages", pages, "1 to 2^34 pages are allowed")?;
        check_reserve(self.reserve_pages, pages)?;
        let hosts = self.hosts.len();
        // The one that creates the store is one of them.
        rule(hosts < HOSTS_MAX, "hosts", hosts as u64, "at most 15 others are allowed")?;
        self.hosts.iter().try_for_each(|host| check_host(host))
    }
}

fn rule(holds: bool, field: &str, value: u64, rule: &str) -> Result<(), StoreError> {
    if holds { Ok(()) } else { Err(StoreError::field(field, value, rule)) }
}

/// Checks a reservation for a guest of `pages` pages.
///
/// # Errors
/// [`StoreError::Field`] if it is for no page, or for more than the guest has.
pub fn check_reserve(reserve_pages: u64, pages: u64) -> Result<(), StoreError> {
    let fits = (1..=pages).contains(&reserve_pages);
    rule(fits, "reserve_pages", reserve_pages, "at least one page and at most the guest's")
}

/// Checks a host's name.
///
/// # Errors
/// [`StoreError::Field`] if it can be none.
pub fn check_host(host: &str) -> Result<(), StoreError> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if (1..=HOST_BYTES_MAX).contains(&host.len()) && host.bytes().all(is_name) {
        return Ok(());
    }
    let rule = "a name as `migrate pki issue` takes it, 1 to 63 bytes";
    Err(StoreError::field("host", host.len() as u64, rule))
}

/// What a store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StoreStat {
    /// Pages that are stored.
    pub stored_pages: u64,
    /// Bytes that they take, packed as they are; pages of zeros take none.
    pub stored_bytes: u64,
    /// Pages that may be stored.
    pub reserve_pages: u64,
    /// Whether it stays without requests.
    pub kept: bool,
}

/// What a server holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServerStat {
    /// Bytes that may be reserved in all.
    pub capacity_bytes: u64,
    /// Bytes that are reserved.
    pub reserved_bytes: u64,
    /// The store that is open on the connection, if one is.
    pub store: Option<StoreStat>,
}

impl ServerStat {
    /// Bytes that may still be reserved.
    pub fn free_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(self.reserved_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> NewStore {
        NewStore {
            store: StoreId([1; 16]),
            secret: StoreSecret::new([2; 32]),
            vm: "web-1".into(),
            pages: 100,
            reserve_pages: 10,
            hosts: vec!["host-b".into()],
        }
    }

    #[test]
    fn a_secret_is_never_printed() {
        let text = format!("{:?}", good());
        assert!(text.contains("secret: StoreSecret(..)") && !text.contains('2'), "{text}");
        assert_eq!(good().secret, StoreSecret::new([2; 32]));
        let mut other = [2; 32];
        other[31] = 3;
        assert_ne!(good().secret, StoreSecret::new(other));
    }

    #[test]
    fn every_field_has_limits() {
        good().check().unwrap();
        let long = "x".repeat(HOST_BYTES_MAX + 1);
        let bad = [
            NewStore { vm: "x".repeat(VM_BYTES_MAX + 1), ..good() },
            NewStore { vm: "a\x1b[2J".into(), ..good() },
            NewStore { pages: 0, reserve_pages: 0, ..good() },
            NewStore { pages: PAGES_MAX + 1, ..good() },
            NewStore { reserve_pages: 0, ..good() },
            NewStore { reserve_pages: 101, ..good() },
            NewStore { hosts: vec!["b".into(); HOSTS_MAX], ..good() },
            NewStore { hosts: vec![String::new()], ..good() },
            NewStore { hosts: vec![long], ..good() },
            NewStore { hosts: vec!["a/b".into()], ..good() },
        ];
        for wanted in bad {
            let checked = wanted.check();
            assert!(matches!(checked, Err(StoreError::Field { .. })), "{wanted:?}");
        }
    }

    #[test]
    fn neighbours_share_an_extent() {
        let joined = Extent::join([7, 8, 9, 3, 4, 4, 100]);
        let expected = [(7, 3), (3, 2), (4, 1), (100, 1)].map(|(at, n)| Extent::new(at, n));
        assert_eq!(joined, expected);
        assert_eq!(Extent::count(&joined), 7);
        let again: Vec<u64> = joined.iter().flat_map(Extent::iter).collect();
        assert_eq!(again, [7, 8, 9, 3, 4, 4, 100]);
    }
}
