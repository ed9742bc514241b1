//! Streams that outlive their sessions: one that is lost is replaced, and neither QEMU notices more than a pause.
//!
//! ```text
//!   what is to be said ─► outgoing ═══ session ═══► inbox ─► what is done with it
//!                            ▲  kept until ...        │
//!                            └──── StreamHeard ◄──────┘
//!   batches ─► outgoing, a lane each ═ session ═► decoder threads
//!                            ▲  kept until ...        │
//!                            └─────── Progress ◄──────┘
//! ```
//!
//! A session is carried by a task of its own at each end ([`source`], [`destination`]), which is also who replaces it:
//! the source connects again, the destination waits for that ([`awaited`]). What passes a stream on does not know.
//! Whoever has more to say than may be kept waits, and its QEMU with it.
//!
//! Invariants: each message and each batch is taken once and in order, whatever is lost when; what the other end says
//! of it is checked; only the host that began a stream can go on with it.

pub mod awaited;
pub mod carry;
pub mod destination;
pub mod outgoing;
pub mod retain;
pub mod source;
mod tally;

use std::time::Duration;

use transport::{Batch, Closer, TransportError, close_code};

pub use self::awaited::{Awaited, Place};
pub use self::carry::{Control, Inbox};
pub use self::destination::Arriving;
pub use self::outgoing::Outgoing;
pub use self::source::{Again, Leaving};
use crate::error::EngineError;

/// What a lane may keep, in bytes; what is under way on all of them is bounded by the gate before.
const LANE_BYTES: u64 = 64 << 20;

/// Batches of a lane that may wait to be sent.
const LANE_UNSENT: usize = 2;

/// Longest wait for the first word in a session that replaces another.
const RESUMED_WITHIN: Duration = Duration::from_secs(5);

/// Longest wait until a last word is there.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

/// How long what was said last is looked for once a session is over.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(1);

/// What is said of a session that was given up for another.
const REPLACED: &str = "it is taken up again";

/// Whether the stream may go on although its session ended so: nobody meant it to end.
fn is_loss(error: &EngineError) -> bool {
    let EngineError::Transport(error) = error else { return false };
    matches!(
        error,
        TransportError::Lost { .. }
            | TransportError::LaneBroken { .. }
            | TransportError::Closed { code: close_code::REPLACED, .. }
            | TransportError::ClosedHere { code: close_code::REPLACED, .. }
    )
}

/// A batch's weight in bytes.
pub fn weight(batch: &Batch) -> u64 {
    migrate_core::batch::wire_bytes(batch.runs.len(), batch.payload.len())
}

/// Payload bytes over a session's connections, both ways.
fn wire_bytes(closer: &Closer) -> u64 {
    let wire = closer.wire_bytes();
    wire.sent.saturating_add(wire.received)
}

#[cfg(test)]
mod tests;
