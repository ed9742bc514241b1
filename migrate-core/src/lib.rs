//! Godwit's engine without I/O.
//!
//! Everything in this crate is a pure function of its inputs: no sockets, no clock, no randomness,
//! no async. Time is a [`Duration`](std::time::Duration) since an origin that the caller chose and
//! is passed in; decisions come out as values that the caller carries out. That makes the engine
//! testable with random lists of operations against a model of memory.
//!
//! | module | what it decides or holds |
//! |---|---|
//! | [`layout`] | RAM blocks and the numbering of their pages |
//! | [`pageset`] | sets of pages as bitmaps |
//! | [`batch`] | what travels on a lane: runs of pages with their versions |
//! | [`encode`] | private copies of pages into batches |
//! | [`page_table`] | what each side knows of every page: version, hash |
//! | [`bases`], [`delta`] | changed lines of a page, found by hashes of what was sent |
//! | [`duplicates`] | which page was sent with a content, for references to it |
//! | [`page_cache`], [`xbzrle`] | changed bytes of a page as QEMU tells them, found by copies |
//! | [`second_look`] | which pages direct I/O may have changed behind the tracking's back |
//! | [`convergence`] | predictions of downtime and when to stop the guest |
//! | [`forecast`] | what a migration will take, from a sample of the guest's pages |
//! | [`precopy`] | rounds, from arming to the last page, as a state machine |
//! | [`writes`] | how many pages the guest writes within a time, from scans at any distance |
//! | [`mode`] | whether pre-copy will end, or the guest goes first and its last pages follow |
//! | [`postcopy`] | the pages that follow: what to ask for, to answer with and to push |
//! | [`remote`] | a split guest's pages: what to fetch, what to evict and where to, what is stale |
//! | [`handover`] | who owns the guest: both ends' state machines and their journal |
//! | [`store`] | pages of guests that run elsewhere: what a memory server holds, for whom and how long |
//! | [`error`] | the four bins that every error falls into |
//! | [`fuzz`] | entry points for fuzzers |
//!
//! Architecture invariant: this crate depends on no other crate of the workspace.

pub mod bases;
pub mod batch;
pub mod codec;
pub mod codec_choice;
pub mod convergence;
pub mod delta;
pub mod duplicates;
pub mod encode;
pub mod error;
pub mod forecast;
pub mod fuzz;
pub mod handover;
pub mod layout;
pub mod mode;
pub mod order;
pub mod page_cache;
pub mod page_table;
pub mod pageset;
pub mod postcopy;
pub mod precopy;
pub mod remote;
pub mod second_look;
pub mod store;
pub mod writes;
pub mod xbzrle;
