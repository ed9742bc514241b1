//! Encoder threads: from guest memory to the lanes, in rounds, or in the background of post-copy.
//!
//! ```text
//!   round ──► worker 0 ── reads, judges, packs ────► lanes 0, 2, …  ─┐
//!        └──► worker 1 ──────────────────────────► lanes 1, 3, …  ─┴─► bounded queues ──► QUIC
//! ```
//!
//! Invariants: a lane belongs to one worker, and a worker handles rounds in order, so all versions
//! of a page leave in order (correctness rule 3), and so do the parts of a lane's compressed stream. What is under way to the destination is bounded by
//! the [`Gate`]; memory in use is bounded by the queues' lengths and one batch a lane.

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};

use migrate_core::batch::{CHUNK_PAGES, lane_of};
use migrate_core::codec_choice::{CodecChoice, Wanted};
use migrate_core::encode::{BatchBuilder, PageCounts, Reason};
use migrate_core::layout::PageIndex;
use migrate_core::page_table::SourcePages;
use migrate_core::pageset::PageSet;
use migrate_core::precopy::Round;
use qemu_glue::ram::{GuestRam, RamError};

use super::feed::Feed;
use super::gate::Gate;
use super::outlet::{self, LaneQueue, Outlet, Outlets, PumpError};
use super::unused::Unused;
use crate::blocking::worker_threads;

/// Most pages that are taken from the feed at a time.
const REST_PAGES: usize = CHUNK_PAGES as usize;

/// What all workers share.
#[derive(Debug)]
struct Shared {
    ram: Arc<GuestRam>,
    pages: Arc<SourcePages>,
    outlets: Outlets,
    /// Tells what the guest does not use.
    unused: Option<Arc<Unused>>,
    /// Pages of the round being sent that need not be sent in it.
    left_out: RwLock<PageSet>,
}

/// What a worker is to send its share of.
#[derive(Clone)]
enum Job {
    /// A round of pre-copy.
    Round(Arc<Round>),
    /// What a guest that runs at the destination lacks.
    Rest(Arc<Feed>),
}

struct Worker {
    jobs: Option<mpsc::Sender<Job>>,
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
    /// Starts `threads` workers over the lanes' queues, which pack with the codec that is `wanted` and skip what is
    /// `unused`.
    pub fn start(
        ram: Arc<GuestRam>,
        pages: Arc<SourcePages>,
        gate: Arc<Gate>,
        lanes: Vec<LaneQueue>,
        threads: usize,
        wanted: Wanted,
        unused: Option<Arc<Unused>>,
    ) -> Self {
        let shared = Arc::new(Shared {
            left_out: RwLock::new(PageSet::new(ram.layout().pages())),
            ram,
            pages,
            outlets: Outlets::new(gate, lanes.len()),
            unused,
        });
        let threads = threads.clamp(1, lanes.len().max(1));
        let (report, done) = mpsc::channel();
        let shares = outlet::shares(lanes, threads);
        let workers = shares
            .into_iter()
            .map(|lanes| {
                let (jobs, inbox) = mpsc::channel::<Job>();
                let (shared, report) = (Arc::clone(&shared), report.clone());
                let mut share = Share { lanes, choice: CodecChoice::new(wanted, threads) };
                let thread = thread::spawn(move || {
                    for job in inbox {
                        let sent = match job {
                            Job::Round(round) => share.send(&shared, &round),
                            Job::Rest(feed) => share.send_rest(&shared, &feed),
                        };
                        if report.send(sent).is_err() {
                            return;
                        }
                    }
                });
                Worker { jobs: Some(jobs), thread: Some(thread) }
            })
            .collect();
        Self { shared, workers, done: Mutex::new(done) }
    }

    /// Workers that only send what a guest lacks that runs at the destination already.
    pub fn serve(
        ram: Arc<GuestRam>,
        gate: Arc<Gate>,
        lanes: Vec<LaneQueue>,
        wanted: Wanted,
    ) -> Self {
        let pages = Arc::new(SourcePages::new(0, false, 0));
        Self::start(ram, pages, gate, lanes, worker_threads(), wanted, None)
    }

    /// A round begins: nothing is left out of it yet.
    pub fn begin_round(&self) {
        self.shared.left_out.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Sends a round and waits until its last batch is in a lane's queue. Blocks.
    ///
    /// # Errors
    /// The first [`PumpError`] of any worker; the migration cannot go on then.
    pub fn send(&self, round: Round) -> Result<PageCounts, PumpError> {
        self.work(&Job::Round(Arc::new(round)))
    }

    /// Sends what the feed gives until it gives no more, with the guest stopped for good. Blocks.
    ///
    /// # Errors
    /// As [`Self::send`]; what was taken from the feed may be lost.
    pub fn send_rest(&self, feed: Arc<Feed>) -> Result<PageCounts, PumpError> {
        self.work(&Job::Rest(feed))
    }

    fn work(&self, job: &Job) -> Result<PageCounts, PumpError> {
        // Held to the end: jobs do not overlap.
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        for worker in &self.workers {
            let jobs = worker.jobs.as_ref().ok_or(PumpError::WorkerGone)?;
            jobs.send(job.clone()).map_err(|_| PumpError::WorkerGone)?;
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

    /// Leaves pages out of the round being sent, unless they were sent already.
    pub fn leave_out(&self, pages: &PageSet) {
        self.shared.left_out.write().unwrap_or_else(PoisonError::into_inner).union_with(pages);
    }

    /// Batches handed to each lane so far.
    pub fn batches(&self) -> Vec<u64> {
        self.shared.outlets.batches()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.shared.outlets.gate.close();
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

/// What a worker works on.
struct Share {
    lanes: Vec<Outlet>,
    choice: CodecChoice,
}

impl Share {
    fn send(&mut self, shared: &Shared, round: &Round) -> Result<PageCounts, PumpError> {
        let mut counts = PageCounts::default();
        for wave in &round.waves {
            self.send_set(shared, wave, Reason::Dirty, round.number, &mut counts)?;
        }
        self.send_set(shared, &round.look, Reason::Look, round.number, &mut counts)?;
        for lane in &mut self.lanes {
            lane.flush(&shared.outlets, &mut self.choice, round.number, &mut counts)?;
            counts.add(&lane.builder.take_counts());
        }
        Ok(counts)
    }

    /// The worker's lanes take turns, since every page leaves once. A page is taken only when it may
    /// leave: the guest would wait for it.
    fn send_rest(&mut self, shared: &Shared, feed: &Feed) -> Result<PageCounts, PumpError> {
        let mut counts = PageCounts::default();
        let mut more = true;
        while more {
            for lane in &mut self.lanes {
                let batch_bytes = feed.batch_bytes();
                shared.outlets.gate.limit_window(feed.window_bytes());
                shared.outlets.gate.enter(batch_bytes as u64);
                let builder = &mut lane.builder;
                while builder.content_bytes() < batch_bytes && !builder.is_full(REST_PAGES) {
                    let Some((first, pages)) = feed.next(REST_PAGES) else {
                        more = false;
                        break;
                    };
                    builder.push_last(first, pages, |buffer| shared.ram.read(first, buffer))?;
                }
                let packed = lane.packed(&shared.outlets, &mut self.choice, 0, &mut counts)?;
                let bytes = packed.as_ref().map_or(0, |(_, bytes)| *bytes);
                shared.outlets.gate.correct(batch_bytes as u64, bytes);
                if let Some((batch, _)) = packed {
                    lane.send(&shared.outlets, batch)?;
                }
                counts.add(&lane.builder.take_counts());
            }
        }
        Ok(counts)
    }

    fn send_set(
        &mut self,
        shared: &Shared,
        set: &PageSet,
        reason: Reason,
        round: u32,
        counts: &mut PageCounts,
    ) -> Result<(), PumpError> {
        let mut next = 0;
        while let Some(page) = set.first_in(next..set.size()) {
            let chunk = page / CHUNK_PAGES;
            next = (chunk + 1) * CHUNK_PAGES;
            let number = lane_of(PageIndex(chunk * CHUNK_PAGES), shared.outlets.lanes());
            let Some(lane) = self.lanes.iter_mut().find(|lane| lane.number == number) else {
                continue;
            };
            let (runs, left_out) = shared.page_runs(set, chunk, reason);
            counts.left_out += left_out;
            for (first, pages) in runs {
                for (first, pages, is_unused) in shared.parts(first, pages) {
                    let builder = &mut lane.builder;
                    push_within_blocks(shared, builder, (first, pages), is_unused, reason)?;
                }
            }
            if lane.builder.is_full(CHUNK_PAGES as usize) {
                lane.flush(&shared.outlets, &mut self.choice, round, counts)?;
            }
        }
        Ok(())
    }
}

impl Shared {
    /// Consecutive pages of a set within a chunk, as (first, count), and the number of its written
    /// pages that are left out.
    fn page_runs(&self, set: &PageSet, chunk: u64, reason: Reason) -> (Vec<(u64, u64)>, u64) {
        let mut runs: Vec<(u64, u64)> = vec![];
        let pages = set.iter_range(chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES);
        let left_out = self.left_out.read().unwrap_or_else(PoisonError::into_inner);
        let mut without = 0;
        for page in pages {
            if reason == Reason::Dirty && left_out.contains(page) {
                without += 1;
                continue;
            }
            match runs.last_mut() {
                Some((first, count)) if *first + *count == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        (runs, without)
    }

    /// Parts of consecutive pages that the guest uses, and that it does not.
    fn parts(&self, first: u64, pages: u64) -> Vec<(u64, u64, bool)> {
        match &self.unused {
            Some(unused) => unused.split(first, pages),
            None => vec![(first, pages, false)],
        }
    }
}

/// Reads pages that may cross a block's end, one block at a time. Unused ones count as zeros.
fn push_within_blocks(
    shared: &Shared,
    builder: &mut BatchBuilder,
    (first, pages): (u64, u64),
    is_unused: bool,
    reason: Reason,
) -> Result<(), RamError> {
    for (part, count) in shared.ram.layout().split(PageIndex(first), pages) {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        builder.push(&shared.pages, part, count, reason, |page, buffer| {
            if is_unused {
                buffer.fill(0);
                return Ok(());
            }
            shared.ram.read(page, buffer)
        })?;
    }
    Ok(())
}
