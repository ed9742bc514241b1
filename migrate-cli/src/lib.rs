//! The command `migrate`: wires the engine's parts together.
//!
//! | module | what it does |
//! |---|---|
//! | [`args`] | what can be typed |
//! | [`commands`] | what each command does |
//! | [`source`], [`destination`] | the two ends of a migration |
//! | [`memory_server`] | keeps pages of guests that run elsewhere |
//! | [`agent`] | a memory server and receivers in one process |
//! | [`gateway`] | passes on migrations that QEMUs make themselves |
//! | [`journal`] | the durable record of who owns the guest |
//! | [`report`], [`progress`], [`mod@tell`] | what the user sees |
//! | [`attaching`], [`verify`] | the descriptor of QEMU's memory; digests of all pages |
//! | [`missing`], [`blocking`] | sets of pages on the control stream; work off the async runtime |
//! | [`stores`], [`pager_socket`], [`http`] | ways to memory servers; to the pager of a split guest; metrics |
//! | [`qmp_socket`] | which QEMU a monitor belongs to |
//! | [`error`] | everything that ends a migration early |
//! | [`failpoint`] | places where the failure tests stop the engine |
//!
//! Architecture invariant: decisions are in `migrate-core`; this crate carries them out.

pub mod agent;
pub mod args;
pub mod attaching;
pub mod blocking;
pub mod cancel;
pub mod commands;
pub mod destination;
pub mod error;
pub mod failpoint;
pub mod gateway;
pub mod http;
pub mod journal;
pub mod memory_server;
pub mod missing;
pub mod pager_socket;
pub mod progress;
pub mod qmp_socket;
pub mod random;
pub mod report;
pub mod resets;
pub mod source;
pub mod state_parts;
pub mod stores;
pub mod stream;
pub mod tell;
pub mod verify;

/// Name and version of this engine, as it introduces itself.
pub const ENGINE: &str = concat!("godwit ", env!("CARGO_PKG_VERSION"));
