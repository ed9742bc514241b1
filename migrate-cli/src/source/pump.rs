//! Encoder threads: from guest memory to the lanes.
//!
//! ```text
//!   round ──► worker 0 ── reads, judges, batches ──► lanes 0, 2, …  ─┐
//!        └──► worker 1 ──────────────────────────► lanes 1, 3, …  ─┴─► bounded queues ──► QUIC
//! ```
//!
//! Invariants: a lane belongs to one worker, and a worker handles rounds in order, so all versions
//! of a page leave in order (correctness rule 3). What is under way to the destination is bounded by
//! the [`Gate`]; memory in use is bounded by the queues' lengths and one batch a lane.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use migrate_core::batch::{CHUNK_PAGES, lane_of, wire_bytes};
use migrate_core::encode::{BatchBuilder, PageCounts};
use migrate_core::layout::PageIndex;
use migrate_core::page_table::{Reason, SourcePages};
use migrate_core::pageset::PageSet;
use migrate_core::precopy::Round;
use qemu_glue::ram::{GuestRam, RamError};
use thiserror::Error;
use tokio::sync::mpsc as async_mpsc;
use transport::Batch;

use super::buffers::Buffers;
use super::gate::Gate;

/// Batches that may wait for each lane.
pub const LANE_QUEUE: usize = 2;

/// The way to a lane.
pub type LaneQueue = async_mpsc::Sender<Batch>;

/// Why a round could not be sent.
#[derive(Debug, Error)]
pub enum PumpError {
    /// Guest memory could not be read.
    #[error("The guest's memory cannot be read")]
    Ram(#[from] RamError),
    /// A lane's connection is gone; its own error says why.
    #[error("A lane to the destination is closed")]
    LaneClosed,
    /// A worker thread ended.
    #[error("An encoder thread ended")]
    WorkerGone,
}

/// What all workers share.
#[derive(Debug)]
struct Shared {
    ram: Arc<GuestRam>,
    pages: Arc<SourcePages>,
    gate: Arc<Gate>,
    buffers: Buffers,
    /// Batches handed to each lane since the beginning.
    batches: Vec<AtomicU64>,
    lanes: usize,
}

struct Worker {
    jobs: Option<mpsc::Sender<Arc<Round>>>,
    thread: Option<JoinHandle<()>>,
}

/// The encoder threads and their lanes.
pub struct Pump {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    done: Mutex<mpsc::Receiver<Result<PageCounts, PumpError>>>,
}

impl std::fmt::Debug for Pump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pump").field("workers", &self.workers.len()).finish_non_exhaustive()
    }
}

impl Pump {
    /// Starts `threads` workers over the lanes' queues.
    pub fn start(
        ram: Arc<GuestRam>,
        pages: Arc<SourcePages>,
        gate: Arc<Gate>,
        lanes: Vec<LaneQueue>,
        threads: usize,
    ) -> Self {
        let shared = Arc::new(Shared {
            ram,
            pages,
            gate,
            buffers: Buffers::default(),
            batches: lanes.iter().map(|_| AtomicU64::new(0)).collect(),
            lanes: lanes.len(),
        });
        let threads = threads.clamp(1, lanes.len().max(1));
        let (report, done) = mpsc::channel();
        let mut shares: Vec<Vec<(usize, LaneQueue)>> = (0..threads).map(|_| vec![]).collect();
        for (lane, queue) in lanes.into_iter().enumerate() {
            if let Some(share) = shares.get_mut(lane % threads) {
                share.push((lane, queue));
            }
        }
        let workers = shares
            .into_iter()
            .map(|share| {
                let (jobs, inbox) = mpsc::channel::<Arc<Round>>();
                let (shared, report) = (Arc::clone(&shared), report.clone());
                let thread = thread::spawn(move || {
                    for round in inbox {
                        if report.send(send_share(&shared, &share, &round)).is_err() {
                            return;
                        }
                    }
                });
                Worker { jobs: Some(jobs), thread: Some(thread) }
            })
            .collect();
        Self { shared, workers, done: Mutex::new(done) }
    }

    /// Sends a round and waits until its last batch is in a lane's queue. Blocks.
    ///
    /// # Errors
    /// The first [`PumpError`] of any worker; the migration cannot go on then.
    pub fn send(&self, round: Round) -> Result<PageCounts, PumpError> {
        // Held to the end: rounds do not overlap.
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let round = Arc::new(round);
        for worker in &self.workers {
            let jobs = worker.jobs.as_ref().ok_or(PumpError::WorkerGone)?;
            jobs.send(Arc::clone(&round)).map_err(|_| PumpError::WorkerGone)?;
        }
        let mut counts = PageCounts::default();
        let mut failure = None;
        for _ in &self.workers {
            match done.recv().map_err(|_| PumpError::WorkerGone)? {
                Ok(share) => counts.add(&share),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(counts), Err)
    }

    /// Batches handed to each lane so far.
    pub fn batches(&self) -> Vec<u64> {
        self.shared.batches.iter().map(|count| count.load(Ordering::Acquire)).collect()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.shared.gate.close();
        for worker in &mut self.workers {
            worker.jobs = None;
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("an encoder thread panicked");
            }
        }
    }
}

fn send_share(
    shared: &Shared,
    share: &[(usize, LaneQueue)],
    round: &Round,
) -> Result<PageCounts, PumpError> {
    let mut counts = PageCounts::default();
    let mut builders: Vec<BatchBuilder> = share.iter().map(|_| BatchBuilder::new()).collect();
    let size = round.dirty.size();
    for chunk in 0..size.div_ceil(CHUNK_PAGES) {
        let lane = lane_of(PageIndex(chunk * CHUNK_PAGES), shared.lanes);
        let Some(mine) = share.iter().position(|(number, _)| *number == lane) else { continue };
        let (Some((_, queue)), Some(builder)) = (share.get(mine), builders.get_mut(mine)) else {
            continue;
        };
        let range = chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES;
        for (set, reason) in [(&round.dirty, Reason::Dirty), (&round.look, Reason::Look)] {
            for (first, pages) in page_runs(set, range.clone()) {
                push_within_blocks(shared, builder, first, pages, reason)?;
            }
        }
        if builder.is_full(2 * CHUNK_PAGES as usize) {
            flush(shared, lane, queue, builder, round.number)?;
        }
    }
    for ((lane, queue), builder) in share.iter().zip(&mut builders) {
        flush(shared, *lane, queue, builder, round.number)?;
        counts.add(&builder.take_counts());
    }
    Ok(counts)
}

/// Reads pages that may cross a block's end, one block at a time.
fn push_within_blocks(
    shared: &Shared,
    builder: &mut BatchBuilder,
    first: u64,
    pages: u64,
    reason: Reason,
) -> Result<(), RamError> {
    for (part, count) in shared.ram.layout().split(PageIndex(first), pages) {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        builder.push(&shared.pages, part, count, reason, |buffer| shared.ram.read(part, buffer))?;
    }
    Ok(())
}

/// Consecutive pages of a set within a range, as (first, count).
fn page_runs(set: &PageSet, range: std::ops::Range<u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = vec![];
    for page in set.iter_range(range) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

fn flush(
    shared: &Shared,
    lane: usize,
    queue: &LaneQueue,
    builder: &mut BatchBuilder,
    round: u32,
) -> Result<(), PumpError> {
    let Some(batch) = builder.take() else { return Ok(()) };
    let bytes = wire_bytes(batch.runs.len(), batch.payload.len());
    shared.gate.enter(bytes);
    if let Some(count) = shared.batches.get(lane) {
        count.fetch_add(1, Ordering::Release);
    }
    builder.reuse(shared.buffers.take());
    let payload = shared.buffers.lend(batch.payload).into();
    let batch = Batch { runs: batch.runs, payload, round };
    queue.blocking_send(batch).map_err(|_| PumpError::LaneClosed)
}
