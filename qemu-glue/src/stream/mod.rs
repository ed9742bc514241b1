//! QEMU's migration stream: reading it piece by piece, changing it, writing it byte for byte.
//!
//! This is for whoever stands between two QEMUs, 7.2 to 10.0 with x86-64 guests. RAM and commands
//! are read, device state passes as it is. There is no I/O here: pieces go in, events come out,
//! and the other way round.
//!
//! ```text
//! source                                                            destination
//!   bytes ──► Reader ──► Event ──► (drop, add, replace) ──► Writer ──► bytes
//!   bytes ◄── ReturnMessage ◄────────────────────────── ReturnReader ◄── bytes
//! ```
//!
//! A stream (migration/savevm.c, `qemu_loadvm_state_main`; migration/ram.c, `ram_load`):
//!
//! ```text
//!  Header ──► Top ──────────── START ram ──► block list ──► records ◄───┐
//!              ▲ │ └─ PART, END ─────────────────────────────► │        │ page
//!              │ │                                             ├────────┘
//!              │ └─ COMMAND (PACKAGED: bytes) ─► Top           EOS
//!              └────────────────── footer ◄────────────────────┘
//!
//!  after END:  Top ── FULL ──► device state ── 00 ──► Ended ── 06 ──► Over
//!                 └── 00 ─────────────────────────────► (post-copy)
//!
//!  a package:  Top ── LISTEN ── FULL ──► device state ── PING, RUN ── [its size]
//!  resumed:    Top ── commands ── PART … END ── 00
//! ```
//!
//! Post-copy sends its device state as a package before the rest of RAM. Its contents come as
//! [`Event::Bytes`] and can be read by a reader of their own ([`Reader::package`]).
//!
//! Invariants:
//! - What was read, written again in the same order, gives the same bytes (tests, and fuzzed).
//! - Contents of pages are copied only if they came in two pieces, then once. Nothing is done a
//!   byte of them.
//! - Memory is bounded: by the longest element, of which the description is by far the largest
//!   ([`DESCRIPTION_BYTES_MAX`]), and the list of blocks. No length is believed before it is compared
//!   with a limit.
//! - A stream that is not understood is refused by name, and stays refused: what follows has no
//!   known meaning. Nothing panics, whatever comes in.
//! - Device state ends where the rule in `tail.rs` says, never earlier: what may be its end is held
//!   back until it is known that nothing follows.
//!
//! Refused, because only QEMU's own code knows how long they are: sections in parts other than
//! `ram` (dirty bitmaps, disks, VFIO), compressed pages, RDMA, `mapped-ram`. Recognised on other
//! connections: [`channel`].

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

pub(crate) mod blocks;
pub mod channel;
mod command;
mod configuration;
pub(crate) mod cursor;
mod error;
mod event;
pub(crate) mod grammar;
pub mod multifd;
mod parts;
mod reader;
pub(crate) mod record;
pub mod return_path;
pub(crate) mod tail;
mod writer;

pub use blocks::{BlockIndex, BlockList, RamBlock};
pub use command::{Advise, Command, DISCARD_RANGES_MAX, Discard, DiscardRange};
pub(crate) use configuration::Following;
pub use configuration::{
    CAPABILITIES_MAX, Configuration, HeaderError, MACHINE_BYTES_MAX, SUBSECTIONS_MAX, Subsection,
};
pub use error::{Refusal, StreamError, WriteError};
pub use event::{EndSign, Event, SectionHeader};
pub use parts::{PART_BYTES_MAX, RamParts};
pub use reader::Reader;
pub use record::{PageContent, PageRecord};
pub use writer::Writer;

/// Longest description in bytes. Real ones have 100 KiB, a machine with hundreds of devices a few
/// MiB.
pub const DESCRIPTION_BYTES_MAX: usize = 16 << 20;

/// The section's name that holds RAM.
pub const RAM_ID: &str = "ram";

/// The version of that section.
pub const RAM_VERSION: u32 = 4;

#[cfg(test)]
mod tests;
