//! The page channel: a host keeps pages of its guests at a memory server and gets them back.
//!
//! ```text
//!  client                                    server
//!  PageClient::connect ── TCP, TLS 1.3 ────► PageListener::accept, Arriving::shake
//!        ◄───────────── Done 0 (or Failed 0)  PageServer::welcome (or refuse)
//!  PageClient::send ────── request, tag n ─► PageServer::request
//!  PageClient::receive ◄── answers, tag n ── PageServer::answer
//! ```
//!
//! A fault of a guest costs a round trip on it, and most of that is threads waking each other. So each
//! end belongs to one thread, which blocks; there is no task between it and the socket. Requests are
//! numbered and may be sent before earlier ones are answered; they are carried out and answered in
//! their order, one after the other.
//!
//! | module | what it holds |
//! |---|---|
//! | [`wire`] | frames: header, limits, encoding |
//! | [`client`] | the end that asks |
//! | [`server`] | the end that answers, and accepting connections |
//!
//! Invariants: an answer that is handed out is one to the oldest request, and holds the pages that it
//! asked for in the order in which it did. A peer that breaks a rule loses its connection and
//! disturbs no other.

use bytes::Bytes;
pub use migrate_core::store::{
    Extent, NewStore, ServerStat, StoreError, StoreId, StoreSecret, StoreStat,
};

pub mod client;
pub mod server;
pub mod wire;

mod due;

pub use client::{PageClient, PageStop};
pub use due::{PAGES_UNDER_WAY_MAX, REQUESTS_UNDER_WAY_MAX};
pub use server::{Arriving, PageListener, PageListenerStop, PageServer};

/// What errors call this channel.
pub(crate) const PLACE: &str = "the page channel";

/// What a client asks for. All but the first two, and `Stat`, need a store that is open on the
/// connection, which the first two see to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageRequest {
    /// Creates a store, reserves memory for it, and opens it. It is deleted when no request for it
    /// comes for as long as the server's lease.
    Create(NewStore),
    /// Opens a store of this host, or one that this host was granted.
    Open {
        /// Its id.
        store: StoreId,
        /// Its secret.
        secret: StoreSecret,
    },
    /// Ends the lease: the store stays until it is deleted, whether anybody asks for it or not.
    Keep,
    /// Lets another host use the store, too.
    Grant {
        /// The name in its certificate.
        host: String,
    },
    /// Does not let another host use the store any more, also on connections that it has.
    Revoke {
        /// The name in its certificate.
        host: String,
    },
    /// Changes how many pages the store may hold, up or down, but not below what it holds. Refused with
    /// the reservation as it was if the server, or the share of the host that created the store, has not
    /// got it.
    Reserve {
        /// The new number of pages, at most the guest's.
        pages: u64,
    },
    /// Stores pages, in the place of those with the same numbers, even of a higher version. Where it fails
    /// for want of memory, or others change the same pages at the same time, a part of the pages may have
    /// been stored.
    Put {
        /// Which; 256 pages at most.
        extents: Vec<Extent>,
        /// Their contents in the extents' order, 4096 bytes each.
        contents: Bytes,
        /// Their version, 1 to 2^63: which of two copies at different servers is the newer one.
        version: u64,
        /// Whether the contents travel packed, if that makes them shorter.
        packed: bool,
    },
    /// Gets pages back. All of them must be stored, else the request fails as a whole; if others
    /// drop them at the same time, it may fail after some of them have come.
    Get {
        /// Which, in the order in which they are wanted; 256 pages at most.
        extents: Vec<Extent>,
        /// Whether the server drops them once they are sent. They are lost if the connection ends
        /// before they arrive: only for pages that are elsewhere, too, or no longer needed then.
        take: bool,
        /// Whether the contents may travel packed.
        packed: bool,
    },
    /// Drops pages; those that are not stored are passed by.
    Drop {
        /// Which; 4096 extents at most.
        extents: Vec<Extent>,
    },
    /// Asks which pages are stored, and in which versions. What others put and drop at the same time may
    /// be listed or not.
    List {
        /// Where to begin; a page of the guest.
        from_page: u64,
    },
    /// Asks what the server and the open store hold.
    Stat,
    /// Deletes the store with all that it holds; it is no longer open afterwards.
    Delete,
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageAnswer {
    /// It is done.
    Done {
        /// The request's.
        tag: u32,
    },
    /// Pages that were asked for: the first one alone, then pieces of at most 16.
    Pages {
        /// The request's.
        tag: u32,
        /// Which, in the order in which they were asked for.
        extents: Vec<Extent>,
        /// Their contents, 4096 bytes each.
        contents: Bytes,
        /// Whether they travelled packed; at the server, whether they are to if that makes them shorter.
        packed: bool,
        /// Whether these are the last of the request.
        last: bool,
    },
    /// Pages that are stored.
    Listed {
        /// The request's.
        tag: u32,
        /// Which, in ascending order, with their versions; 4096 at most. Those that follow one another with
        /// one version share an entry.
        entries: Vec<(Extent, u64)>,
        /// Where the list goes on, behind all entries; nothing if it is complete.
        next_page: Option<u64>,
    },
    /// What the server and the open store hold.
    Stat {
        /// The request's.
        tag: u32,
        /// The numbers.
        stat: ServerStat,
    },
    /// It was not done.
    Failed {
        /// The request's; 0 for the connection as a whole.
        tag: u32,
        /// Why.
        error: StoreError,
    },
}

impl PageAnswer {
    /// The number of the request that it answers.
    pub fn tag(&self) -> u32 {
        match self {
            Self::Done { tag }
            | Self::Pages { tag, .. }
            | Self::Listed { tag, .. }
            | Self::Stat { tag, .. }
            | Self::Failed { tag, .. } => *tag,
        }
    }

    /// Whether nothing follows for its request.
    pub fn is_last(&self) -> bool {
        match self {
            Self::Pages { last, .. } => *last,
            Self::Done { .. } | Self::Listed { .. } | Self::Stat { .. } | Self::Failed { .. } => {
                true
            }
        }
    }
}
