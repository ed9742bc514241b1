//! Pages of guests that run elsewhere, kept by a memory server.
//!
//! ```text
//!            create (reserves)                     delete
//!   nothing ──────────────────► leased ──────────────────────► nothing
//!                                │   │  no request for a lease    ▲
//!                                │   └────────────────────────────┤
//!                                │ keep                           │ delete
//!                                └──────► kept ───────────────────┘
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`names`] | ids and secrets of stores, extents of pages |
//! | [`error`] | why a request is refused |
//! | [`content`] | one page as it is kept: zero, raw or packed |
//! | [`arena`] | memory in chunks, given back when it is empty |
//! | [`shelf`] | the pages of one guest |
//! | [`stores`] | all stores of a server: who may use them, what is reserved, shares of hosts, leases |
//!
//! Invariants:
//! - What is reserved never exceeds the capacity, nor what is for one host its share, and no store holds
//!   more pages than it has reserved. What compression saves is not promised to anybody.
//! - A page that is not stored is never answered with anything but an error.
//! - A host learns nothing of a store that it may not use, not even that it exists.

pub mod arena;
pub mod content;
pub mod error;
pub mod names;
pub mod shelf;
pub mod stores;

pub use error::StoreError;
pub use names::{Extent, NewStore, ServerStat, StoreId, StoreSecret, StoreStat};
pub use stores::{Listing, OpenStore, Reading, Stores};
