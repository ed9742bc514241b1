//! Why a memory server does not do what it is asked for. These travel.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::{Classify, ErrorBin};

/// Longest text within an error in bytes.
pub const RULE_BYTES_MAX: usize = 128;

/// Why a request is refused. Nothing of it was done, unless the variant says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such store, its secret is another, or the host may not use it.
    #[error(
        "The memory server has no such store for this host: it was deleted, its lease has ended, or \
         the host was not granted it; create it again or have it granted"
    )]
    Unknown,
    /// The store exists.
    #[error("The store exists already; open it, or create one with another id")]
    Exists,
    /// The capacity is reserved.
    #[error(
        "The memory server has {free_bytes} bytes free where {wanted_bytes} are wanted; use a further \
         server, or start this one with a larger --capacity"
    )]
    Full {
        /// Bytes that may be reserved.
        free_bytes: u64,
        /// Bytes that were to be, besides those that are.
        wanted_bytes: u64,
    },
    /// The store would hold more pages than it has reserved, or is to have.
    #[error(
        "A reservation of {reserve_pages} pages is too small for the {wanted_pages} that the store \
         would hold; drop pages, or reserve more"
    )]
    Reserved {
        /// Pages that it may hold.
        reserve_pages: u64,
        /// Pages that it would hold.
        wanted_pages: u64,
    },
    /// A page that was asked for is not there. Pieces that came before are good.
    #[error("Page {page} is not stored here; ask who else has it")]
    NotStored {
        /// The page.
        page: u64,
    },
    /// A page beyond the guest's end.
    #[error("Page {page} lies beyond the guest's end at {pages}; create the store with its size")]
    OutOfRange {
        /// The page.
        page: u64,
        /// The guest's size in pages.
        pages: u64,
    },
    /// No store was opened.
    #[error("No store is open on this connection; create or open one first")]
    NotOpen,
    /// A store was opened already.
    #[error("A store is open on this connection already; use another connection for another store")]
    OpenAlready,
    /// A field of a request breaks a rule.
    #[error("Field {field:?} is {value}, but {rule}")]
    Field {
        /// The field.
        field: String,
        /// Its value, or its length for lists and texts.
        value: u64,
        /// The rule.
        rule: String,
    },
    /// As many stores as there may be.
    #[error("The memory server has {max} stores already; delete one, or use another server")]
    TooManyStores {
        /// How many there may be.
        max: u64,
    },
    /// As many hosts as may use a store.
    #[error("{max} hosts may use the store already; revoke one first")]
    TooManyHosts {
        /// How many there may be.
        max: u64,
    },
    /// A host wanted to shut itself out.
    #[error("A host cannot revoke itself; let another host of the store do it")]
    Itself,
    /// As many connections as there may be.
    #[error("The memory server has {max} connections already; close some, or use another server")]
    Busy {
        /// How many there may be.
        max: u64,
    },
    /// The host is not one that the server takes.
    #[error("The memory server does not take this host; start it with --peer and the host's name")]
    NotTaken,
    /// The kernel gives no memory. A part of the pages may have been stored.
    #[error(
        "The memory server's kernel gives it no more memory; start it with a smaller --capacity"
    )]
    NoMemory,
    /// A stored page does not unpack.
    #[error("Page {page} is damaged at the memory server; check that machine's memory")]
    Damaged {
        /// The page.
        page: u64,
    },
    /// The host that created the store has reserved its share of the capacity.
    #[error(
        "The memory server has {free_bytes} bytes left for the host that created the store where \
         {wanted_bytes} are wanted; delete stores of that host, use a further server, or start this one \
         with a larger --per-host"
    )]
    HostFull {
        /// Bytes that the host may still reserve.
        free_bytes: u64,
        /// Bytes that were to be, besides those that are.
        wanted_bytes: u64,
    },
    /// As many stores as one host may create.
    #[error(
        "This host has created {max} stores at the memory server, as many as one host may; delete \
         one, or use another server"
    )]
    HostStores {
        /// How many there may be.
        max: u64,
    },
    /// As many connections as one host may have.
    #[error(
        "This host has {max} connections to the memory server, as many as one host may; close some, \
         or use another server"
    )]
    HostBusy {
        /// How many there may be.
        max: u64,
    },
}

impl StoreError {
    pub(crate) fn field(field: &str, value: u64, rule: &str) -> Self {
        Self::Field { field: field.into(), value, rule: rule.into() }
    }

    /// Whether its texts are short and clean, as a peer must send them.
    pub fn is_clean(&self) -> bool {
        let clean =
            |text: &str| text.len() <= RULE_BYTES_MAX && !text.chars().any(char::is_control);
        match self {
            Self::Field { field, rule, .. } => clean(field) && clean(rule),
            _ => true,
        }
    }
}

impl Classify for StoreError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Full { .. }
            | Self::TooManyStores { .. }
            | Self::Busy { .. }
            | Self::NotTaken
            | Self::HostFull { .. }
            | Self::HostStores { .. }
            | Self::HostBusy { .. } => ErrorBin::PeerIncompatible,
            Self::NoMemory | Self::Damaged { .. } => ErrorBin::System,
            Self::Unknown
            | Self::Exists
            | Self::Reserved { .. }
            | Self::NotStored { .. }
            | Self::OutOfRange { .. }
            | Self::NotOpen
            | Self::OpenAlready
            | Self::Field { .. }
            | Self::TooManyHosts { .. }
            | Self::Itself => ErrorBin::CallerMisuse,
        }
    }
}
