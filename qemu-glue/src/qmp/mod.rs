//! A client for QMP, QEMU's machine protocol (docs/interop/qmp-spec in QEMU's tree).
//!
//! ```text
//!              execute()                    +-----------+   line (+ descriptor)
//!  Client ------------------ request -----> |  writer   | -----------------------> QEMU
//!    |  id -> oneshot                       +-----------+
//!    |<----- reply ----- +-----------+ <--------------------------------- line --- QEMU
//!    |<----- event ----- |  reader   |
//!                        +-----------+  end of file, bad line: every waiter fails
//! ```
//!
//! Invariants:
//! - A line is written whole or the connection is closed: the writer is a task of its own, so a
//!   caller that is cancelled leaves no half command behind.
//! - A reply goes to the command whose id it carries, in whatever order replies come.
//! - When the connection ends, every waiting and every later command fails at once and says why;
//!   event receivers see the end of their channel.
//! - What QEMU sends is bounded by [`MESSAGE_BYTES_MAX`] and never trusted further: values that
//!   are not known are kept as `Unknown`.

mod client;
mod commands;
mod error;
mod types;
pub(crate) mod wire;

pub use client::{COMMAND_TIMEOUT, Client, GREETING_TIMEOUT, PeerProcess};
pub use error::QmpError;
pub use types::{
    CpuThread, MemoryBackend, MigrationInfo, MigrationRam, MigrationStatus, NamedChild,
    QemuVersion, RunState, Status,
};
pub use wire::{Event, MESSAGE_BYTES_MAX};
