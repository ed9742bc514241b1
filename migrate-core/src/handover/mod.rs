//! Who owns the guest: both ends' state machines and their journal.
//!
//! ```text
//!   source                                      destination
//!   ------                                      -----------
//!   Moving                                      Receiving
//!     │ last pages, device state ─────────────►   │ loads it, stays paused
//!     │ ◄─────────────────────────────── ready  Ready
//!     │ journal: handed over (durable)            │
//!   HandedOver ── commit ─────────────────────►   │ journal: owned (durable)
//!     │                                         Owned, resumes the guest
//!     │ ◄───────────────────────────── running  Running
//!   Done
//! ```
//!
//! With post-copy the guest is resumed while pages are missing; the source's memory is part of it until
//! the last of them is over:
//!
//! ```text
//!     │                                         Owned, resumes the guest
//!     │ ◄──────────────────────────── fetching  Fetching
//!   Serving                                       │ journal: fetching
//!     │ ◄──────────────────────────── requests    │ ◄── the guest's page faults
//!     │ pages ────────────────────────────────►   │ places them
//!     │ ◄───────────────────────────── running  Running
//!   Done
//! ```
//!
//! | contact lost in | source | destination |
//! |---|---|---|
//! | Moving, Receiving | resumes the guest | refuses for ever, discards |
//! | Moving, Ready | resumes the guest | waits for its lease, then refuses for ever, discards |
//! | HandedOver, Ready | asks; never resumes by itself | commit or refusal, whichever is asked first |
//! | HandedOver, Owned | asks | resumes the guest |
//! | HandedOver, Running | asks | nothing: the guest may be stopped or moved on by then |
//! | Serving, Fetching | asks, and serves on when it is heard | nothing: threads that need a missing page wait |
//!
//! Invariant (correctness rule 8): at most one guest runs. The source runs it only in `Moving`, or
//! after the destination's durable refusal; the destination only after `owned` is durable, which
//! needs the source's commit, and never after a refusal. A refusal and an ownership exclude each
//! other because both are written to the destination's journal before they are spoken.

pub mod destination;
pub mod source;

#[cfg(test)]
mod model;

pub use destination::Destination;
pub use source::Source;

use serde::{Deserialize, Serialize};

/// What the source's journal holds durably.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRecord {
    /// A migration began; the guest belongs here.
    Moving,
    /// The commit may have been sent: the guest may run at the destination.
    HandedOver,
    /// The destination runs the guest and fetches its missing pages from here.
    Serving,
    /// The destination said durably that it will never run the guest.
    RolledBack,
    /// The destination runs the guest.
    Done,
}

/// What the destination's journal holds durably.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationRecord {
    /// A migration was accepted; the guest belongs to the source.
    Receiving,
    /// The guest belongs here and is to be resumed.
    Owned,
    /// The guest ran here; pages of it are still at the source.
    Fetching,
    /// The guest ran here: nothing is left to do for it, whatever became of it since.
    Running,
    /// The guest will never run here.
    Refused,
}

/// What a destination says of a migration when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationState {
    /// Its journal does not know the migration: nothing can be concluded.
    Unknown,
    /// It is loaded and waits for the commit; a commit will be honoured.
    Ready,
    /// It owns the guest, but the guest does not run (it is being resumed, or its QEMU is gone).
    Owned,
    /// It owns the guest, which has run here; pages of it are still at the source.
    Fetching,
    /// It owns the guest, and the guest runs.
    Running,
    /// It will never run the guest; this is durable.
    Refused,
}

/// How a migration ended for one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The destination runs the guest.
    Completed,
    /// The guest runs at the source (or is as it was before).
    RolledBack,
    /// It is not known whether the destination runs the guest; the source's stays stopped.
    InDoubt,
}
