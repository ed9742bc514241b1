//! The end of an encoder thread's work: batches packed, let through by the gate, and handed to a lane's task.
//!
//! Invariants: an outlet belongs to one thread, which handles a page's versions in order; so they leave in order
//! (correctness rule 3), and so do the parts of a lane's compressed stream.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migrate_core::batch::wire_bytes;
use migrate_core::codec::{Codec, CodecError, Packer};
use migrate_core::codec_choice::CodecChoice;
use migrate_core::encode::{BatchBuilder, PageBuffer, PageCounts};
use qemu_glue::ram::RamError;
use thiserror::Error;
use tokio::sync::mpsc;
use transport::Batch;

use super::buffers::Buffers;
use super::gate::Gate;

/// Batches that may wait for each lane.
pub const LANE_QUEUE: usize = 2;

/// The way to a lane.
pub type LaneQueue = mpsc::Sender<Batch>;

/// Why pages could not be sent.
#[derive(Debug, Error)]
pub enum PumpError {
    /// Guest memory could not be read.
    #[error("The guest's memory cannot be read")]
    Ram(#[from] RamError),
    /// Contents could not be packed.
    #[error("Pages cannot be packed")]
    Codec(#[from] CodecError),
    /// A lane's connection is gone; its own error says why.
    #[error("A lane to the destination is closed")]
    LaneClosed,
    /// A worker thread ended.
    #[error("An encoder thread ended")]
    WorkerGone,
}

/// What all outlets of a session share.
#[derive(Debug)]
pub struct Outlets {
    /// Back-pressure.
    pub gate: Arc<Gate>,
    buffers: Buffers,
    /// Batches handed to each lane since the beginning.
    batches: Vec<AtomicU64>,
}

impl Outlets {
    /// For so many lanes.
    pub fn new(gate: Arc<Gate>, lanes: usize) -> Self {
        let batches = (0..lanes).map(|_| AtomicU64::new(0)).collect();
        Self { gate, buffers: Buffers::default(), batches }
    }

    /// How many lanes there are.
    pub fn lanes(&self) -> usize {
        self.batches.len()
    }

    /// Batches handed to each lane so far.
    pub fn batches(&self) -> Vec<u64> {
        self.batches.iter().map(|count| count.load(Ordering::Acquire)).collect()
    }
}

/// A lane and what belongs to it alone.
pub struct Outlet {
    /// Which lane.
    pub number: usize,
    /// What is to leave next.
    pub builder: BatchBuilder,
    queue: LaneQueue,
    packer: Packer,
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet").field("number", &self.number).finish_non_exhaustive()
    }
}

/// The lanes by the thread that has them.
pub fn shares(lanes: Vec<LaneQueue>, threads: usize) -> Vec<Vec<Outlet>> {
    let mut shares: Vec<Vec<Outlet>> = (0..threads).map(|_| vec![]).collect();
    for (number, queue) in lanes.into_iter().enumerate() {
        if let Some(share) = shares.get_mut(number % threads.max(1)) {
            let (builder, packer) = Default::default();
            share.push(Outlet { number, queue, builder, packer });
        }
    }
    shares
}

impl Outlet {
    /// Packs what the builder holds and sends it when the gate lets it through. Blocks.
    ///
    /// # Errors
    /// [`PumpError`]; nothing can follow then.
    pub fn flush(
        &mut self,
        outlets: &Outlets,
        choice: &mut CodecChoice,
        round: u32,
        counts: &mut PageCounts,
    ) -> Result<(), PumpError> {
        let Some((batch, bytes)) = self.packed(outlets, choice, round, counts)? else {
            return Ok(());
        };
        outlets.gate.enter(bytes);
        self.send(outlets, batch)
    }

    /// Another way onto the same lane, for batches that are packed one by one.
    #[must_use]
    pub fn beside(&self) -> Self {
        let (builder, packer) = Default::default();
        Self { number: self.number, queue: self.queue.clone(), builder, packer }
    }

    /// What the builder holds as a batch, and its bytes on the wire.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub fn packed(
        &mut self,
        outlets: &Outlets,
        choice: &mut CodecChoice,
        round: u32,
        counts: &mut PageCounts,
    ) -> Result<Option<(Batch, u64)>, PumpError> {
        let Some(batch) = self.builder.take() else { return Ok(None) };
        self.builder.reuse(outlets.buffers.take());
        let content_bytes = batch.content.len();
        let (codec, payload) = self.pack(outlets, choice, batch.content)?;
        let bytes = wire_bytes(batch.runs.len(), payload.len());
        counts.wire_bytes += bytes;
        counts.note_packed(codec, content_bytes, payload.len());
        let payload = outlets.buffers.lend(payload).into();
        Ok(Some((Batch { runs: batch.runs, payload, codec, content_bytes, round }, bytes)))
    }

    /// Hands a batch to the lane's task. Blocks.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub fn send(&self, outlets: &Outlets, batch: Batch) -> Result<(), PumpError> {
        if let Some(count) = outlets.batches.get(self.number) {
            count.fetch_add(1, Ordering::Release);
        }
        self.queue.blocking_send(batch).map_err(|_| PumpError::LaneClosed)
    }

    /// Packs as is fastest; contents that LZ4 does not make smaller travel as they are.
    fn pack(
        &mut self,
        outlets: &Outlets,
        choice: &mut CodecChoice,
        content: PageBuffer,
    ) -> Result<(Codec, PageBuffer), PumpError> {
        let codec = choice.choose(content.as_ref(), outlets.gate.link_bytes_per_s());
        if codec == Codec::Plain || content.is_empty() {
            return Ok((Codec::Plain, content));
        }
        let (began, processor) = (Instant::now(), processor_time());
        let packed = content.pack(&mut self.packer, codec, outlets.buffers.take())?;
        let bytes = packed.len();
        let processor = processor_time().saturating_sub(processor);
        choice.packed(content.len(), bytes, began.elapsed(), processor);
        if codec == Codec::Lz4 && bytes >= content.len() {
            return Ok((Codec::Plain, content));
        }
        outlets.buffers.put(content);
        Ok((codec, packed))
    }
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}
