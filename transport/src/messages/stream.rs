//! The messages of a guest whose QEMUs move it themselves: through a gateway at each end, or with an engine at each end
//! that tells its QEMU what to do. Then the guest is described, accepted and handed over as any other.
//!
//! ```text
//! source                                        destination
//!   StreamOpen --------------------------------->  a gateway: connects to its QEMU
//!         <------------------------------------- StreamOpened (or Refuse)
//!   StreamGuest -------------------------------->  an engine: prepares its QEMU
//!         <------------------------------------- Accept (or Refuse)
//!   StreamBytes, StreamBlocks, Sync, ... -------->  in this order to its QEMU; pages come on the lanes
//!         <------------------------------------- StreamBack: what its QEMU says
//!   StreamPostcopy, Sync ------------------------>  the guest is about to run there
//!         <------------------------------------- Synced: pages that it lacks may come on the lanes
//!   StreamEnd ---------------------------------->
//!         <------------------------------------- StreamEnd
//! ```
//!
//! Where both ends can, a stream whose session was lost goes on in another one:
//!
//! ```text
//!   StreamHeard --------------------------------->  both, from time to time: so much need not be kept
//!         <------------------------------------- StreamHeard
//!   StreamResume -------------------------------->  first in the other session: so much came here
//!         <------------------------------------- StreamResumed: so much came there (or Refuse)
//! ```

use migrate_core::layout::{BLOCKS_MAX, BlockSpec};
use serde::{Deserialize, Serialize};

use super::{Body, Describe, SMALL_BYTES, check_blocks, check_lanes, check_text, rule};
use crate::error::WireError;

/// Most bytes of QEMU's stream in one message.
pub const STREAM_CHUNK_BYTES_MAX: usize = 256 << 10;

/// Room in bytes for [`StreamBytes`] and [`StreamBack`].
pub(super) const STREAM_CHUNK_BODY_BYTES: usize = STREAM_CHUNK_BYTES_MAX + SMALL_BYTES;

/// Room in bytes for [`StreamBlocks`]: a name of QEMU's has 255 bytes.
pub(super) const STREAM_BLOCKS_BODY_BYTES: usize = BLOCKS_MAX * 280 + SMALL_BYTES;

/// Source: a QEMU is about to send a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOpen {
    /// Where the QEMU connected to the source's gateway, for the log.
    pub name: String,
    /// The port that the QEMU at the destination listens on; 0 for the one that the gateway there was told of.
    pub port: u16,
}

/// Source: the guest that it wants to bring by its QEMU's stream. Of its blocks it names those that have one length for
/// ever; the stream may have more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamGuest {
    /// The guest.
    pub guest: Describe,
}

/// Destination, answer to [`StreamOpen`]: the QEMU there is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOpened {}

/// Source, once: the guest's RAM as the stream lists it. Pages may come on the lanes from now on; their numbers
/// are those of the blocks in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamBlocks {
    /// The number of the stream's section of RAM.
    pub section: u32,
    /// The blocks.
    pub blocks: Vec<BlockSpec>,
}

/// Source: bytes of the stream that are no pages, to be written after everything that was sent before: after the
/// batches of the last [`Sync`](super::Sync).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamBytes {
    /// 1 to [`STREAM_CHUNK_BYTES_MAX`] bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Destination: bytes of the return path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamBack {
    /// 1 to [`STREAM_CHUNK_BYTES_MAX`] bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Source, once, behind the bytes that hand the guest over by post-copy: every page that comes from now on is one that
/// the QEMU at the destination lacks, comes whole or as zeros, and once. A [`Sync`](super::Sync) follows, and pages
/// come only after its answer: then the bytes before it were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPostcopy {}

/// Either: the QEMU here ended its connection in good order; nothing more comes from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamEnd {}

/// Either, where the session can be replaced: how many messages of the stream were taken so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHeard {
    /// Since the stream's beginning, over all its sessions.
    pub messages: u64,
}

/// Source, first in a session with intent [`Resume`](super::Intent::Resume): a stream goes on whose session was lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamResume {
    /// Messages of the stream that came here: what follows them is to be sent again.
    pub messages: u64,
}

/// Destination, answer to [`StreamResume`]: the stream goes on with what follows this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamResumed {
    /// Messages of the stream that came here.
    pub messages: u64,
    /// Batches that came here, an entry a lane.
    pub batches: Vec<u64>,
}

fn check_chunk(what: &'static str, bytes: &[u8]) -> Result<(), WireError> {
    let count = bytes.len();
    let fits = (1..=STREAM_CHUNK_BYTES_MAX).contains(&count);
    rule(fits, what, "bytes", count as u64, "1 to 262144 bytes are allowed")
}

impl Body for StreamOpen {
    fn validate(&self) -> Result<(), WireError> {
        check_text("StreamOpen", "name", &self.name)
    }
}

impl Body for StreamGuest {
    fn validate(&self) -> Result<(), WireError> {
        self.guest.validate()
    }
}

impl Body for StreamOpened {
    fn validate(&self) -> Result<(), WireError> {
        Ok(())
    }
}

impl Body for StreamBlocks {
    fn validate(&self) -> Result<(), WireError> {
        check_blocks("StreamBlocks", &self.blocks)
    }
}

impl Body for StreamBytes {
    fn validate(&self) -> Result<(), WireError> {
        check_chunk("StreamBytes", &self.bytes)
    }
}

impl Body for StreamBack {
    fn validate(&self) -> Result<(), WireError> {
        check_chunk("StreamBack", &self.bytes)
    }
}

impl Body for StreamPostcopy {
    fn validate(&self) -> Result<(), WireError> {
        Ok(())
    }
}

impl Body for StreamEnd {
    fn validate(&self) -> Result<(), WireError> {
        Ok(())
    }
}

impl Body for StreamHeard {
    fn validate(&self) -> Result<(), WireError> {
        Ok(())
    }
}

impl Body for StreamResume {
    fn validate(&self) -> Result<(), WireError> {
        Ok(())
    }
}

impl Body for StreamResumed {
    fn validate(&self) -> Result<(), WireError> {
        check_lanes("StreamResumed", "batches", self.batches.len())
    }
}
