//! Pages of QEMU's stream on their way to the lanes.
//!
//! ```text
//!   reader ── pages ──► a chunk a lane ──► worker 0 ── judges, packs ──► lanes 0, 2, …
//!                                     └──► worker 1 ───────────────────► lanes 1, 3, …
//! ```
//!
//! Invariants: all pages of a lane are handled by one worker in the order in which the stream has them, so that the
//! latest version of a page arrives last. What waits is bounded by the queues of chunks, by the gate and by the lanes'
//! queues; then the reader waits, and QEMU with it, whose estimate of the bandwidth so stays true.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use migrate_core::batch::lane_of;
use migrate_core::codec_choice::{CodecChoice, Wanted};
use migrate_core::encode::{PageCounts, Reason};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_table::SourcePages;

use crate::blocking::worker_threads;
use crate::error::EngineError;
use crate::source::outlet::{self, LaneQueue, Outlet, Outlets, PumpError};
use crate::source::unused::streamed::Streamed;

/// Contents from which on a chunk goes to its worker.
const CHUNK_BYTES: usize = 128 << 10;

/// Pages of zeros from which on it does.
const CHUNK_RUNS: usize = 512;

/// Chunks that may wait for a worker.
const CHUNKS_WAITING: usize = 4;

/// Consecutive pages of a chunk.
#[derive(Debug)]
struct Run {
    first: u64,
    pages: usize,
    is_zero: bool,
}

/// Pages of one lane, in the stream's order.
#[derive(Debug, Default)]
struct Chunk {
    runs: Vec<Run>,
    /// Of those that are not zero, one after the other.
    contents: Vec<u8>,
}

impl Chunk {
    fn push(&mut self, page: u64, content: Option<&[u8; PAGE_BYTES]>) {
        let is_zero = content.is_none();
        if let Some(content) = content {
            self.contents.extend_from_slice(content);
        }
        match self.runs.last_mut() {
            Some(run) if run.is_zero == is_zero && run.first + run.pages as u64 == page => {
                run.pages += 1;
            }
            _ => self.runs.push(Run { first: page, pages: 1, is_zero }),
        }
    }

    fn is_full(&self) -> bool {
        self.contents.len() >= CHUNK_BYTES || self.runs.len() >= CHUNK_RUNS
    }
}

impl Shared {
    /// An empty chunk, with the room of one that was sent if there is one.
    fn spare(&self) -> Chunk {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Takes a chunk back that was sent.
    fn reuse(&self, mut chunk: Chunk) {
        chunk.runs.clear();
        chunk.contents.clear();
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(chunk);
    }
}

/// What a worker is to do.
enum Task {
    /// Pages of this lane.
    Pages(usize, Chunk),
    /// To send what it has, and say so.
    Flush(SyncSender<()>),
}

struct Worker {
    tasks: SyncSender<Task>,
    /// Gives the lanes back.
    thread: JoinHandle<Vec<Outlet>>,
}

/// What the workers share.
#[derive(Debug)]
struct Shared {
    pages: SourcePages,
    outlets: Outlets,
    /// Tells what need not be sent.
    unused: Option<Arc<Streamed>>,
    /// Chunks that were sent, to be filled again.
    spare: Mutex<Vec<Chunk>>,
    counts: Mutex<PageCounts>,
    failure: Mutex<Option<PumpError>>,
}

/// The reader's end of it. Blocks where the lanes do.
pub struct Encoder {
    shared: Arc<Shared>,
    /// By lane: what is not with its worker yet.
    chunks: Vec<Chunk>,
    workers: Vec<Worker>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("lanes", &self.chunks.len()).finish_non_exhaustive()
    }
}

impl Encoder {
    /// Starts the workers over the lanes' queues; they pack with the codec that is `wanted`, and send zeros for what is
    /// `unused`.
    pub fn start(
        pages: SourcePages,
        gate: Arc<crate::source::gate::Gate>,
        lanes: Vec<LaneQueue>,
        wanted: Wanted,
        unused: Option<Arc<Streamed>>,
    ) -> Self {
        let count = lanes.len();
        let threads = worker_threads().clamp(1, count.max(1));
        let shared = Arc::new(Shared {
            pages,
            outlets: Outlets::new(gate, count),
            unused,
            spare: Mutex::default(),
            counts: Mutex::default(),
            failure: Mutex::default(),
        });
        let workers = outlet::shares(lanes, threads).into_iter().map(|outlets| {
            let (tasks, inbox) = sync_channel(CHUNKS_WAITING);
            let shared = Arc::clone(&shared);
            let choice = CodecChoice::new(wanted, threads);
            let thread = thread::spawn(move || work(&shared, &inbox, outlets, choice));
            Worker { tasks, thread }
        });
        let workers = workers.collect();
        Self { shared, chunks: (0..count).map(|_| Chunk::default()).collect(), workers }
    }

    /// Takes a page; zeros if it has no content.
    ///
    /// # Errors
    /// [`PumpError`] if a lane is gone.
    pub fn push(
        &mut self,
        page: PageIndex,
        content: Option<&[u8; PAGE_BYTES]>,
    ) -> Result<(), PumpError> {
        let lane = lane_of(page, self.chunks.len());
        let Some(chunk) = self.chunks.get_mut(lane) else { return Err(PumpError::WorkerGone) };
        chunk.push(page.0, content);
        if chunk.is_full() {
            let chunk = std::mem::replace(chunk, self.shared.spare());
            self.give(lane, Task::Pages(lane, chunk))?;
        }
        Ok(())
    }

    fn give(&self, lane: usize, task: Task) -> Result<(), PumpError> {
        let worker = self.workers.get(lane % self.workers.len().max(1));
        let worker = worker.ok_or(PumpError::WorkerGone)?;
        worker.tasks.send(task).map_err(|_| self.failure())
    }

    /// Why the workers have ended.
    fn failure(&self) -> PumpError {
        let failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failure.unwrap_or(PumpError::WorkerGone)
    }

    /// Sends all that was taken so far: how many batches each lane has been given then.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn flush(&mut self) -> Result<Vec<u64>, PumpError> {
        for lane in 0..self.chunks.len() {
            let chunk = self.chunks.get_mut(lane).map(std::mem::take).unwrap_or_default();
            if !chunk.runs.is_empty() {
                self.give(lane, Task::Pages(lane, chunk))?;
            }
        }
        let (done, is_done) = sync_channel(self.workers.len());
        for worker in 0..self.workers.len() {
            self.give(worker, Task::Flush(done.clone()))?;
        }
        drop(done);
        for _ in &self.workers {
            is_done.recv().map_err(|_| self.failure())?;
        }
        Ok(self.shared.outlets.batches())
    }

    /// The guest is stopped: takes pages once more of which zeros were sent and that are used now. Says whether there were
    /// any.
    ///
    /// # Errors
    /// As [`Self::push`], or if memory cannot be read.
    pub fn look_again(&mut self) -> Result<bool, EngineError> {
        let Some(unused) = self.shared.unused.clone() else { return Ok(false) };
        // All pages are judged then.
        self.flush()?;
        let again = unused.used_again()?;
        let mut content = [0; PAGE_BYTES];
        for page in again.iter().map(PageIndex) {
            unused.read(page, &mut content)?;
            self.push(page, Some(&content))?;
        }
        tracing::debug!(pages = again.len(), "used again");
        Ok(!again.is_empty())
    }

    /// Ends the workers, and gives back what they had.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(mut self) -> Result<Finished, PumpError> {
        self.flush()?;
        let mut lanes = Vec::new();
        for Worker { tasks, thread } in self.workers.drain(..) {
            drop(tasks);
            lanes.extend(thread.join().map_err(|_| PumpError::WorkerGone)?);
        }
        lanes.sort_by_key(|outlet| outlet.number);
        let shared = Arc::clone(&self.shared);
        drop(self);
        let shared = Arc::into_inner(shared).ok_or(PumpError::WorkerGone)?;
        let counts = shared.counts.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Finished { pages: shared.pages, outlets: shared.outlets, lanes, counts })
    }

    /// Versions of all pages, for comparison.
    pub fn digest(&self) -> u64 {
        self.shared.pages.digest()
    }

    /// What became of the pages so far.
    pub fn counts(&self) -> PageCounts {
        *self.shared.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an encoder leaves.
#[derive(Debug)]
pub struct Finished {
    /// What was sent of each page.
    pub pages: SourcePages,
    /// What all lanes share.
    pub outlets: Outlets,
    /// The lanes, in their order.
    pub lanes: Vec<Outlet>,
    /// What became of the pages.
    pub counts: PageCounts,
}

impl Drop for Encoder {
    fn drop(&mut self) {
        if self.workers.is_empty() {
            return;
        }
        self.shared.outlets.gate.close();
        for Worker { tasks, thread } in self.workers.drain(..) {
            drop(tasks);
            if thread.join().is_err() {
                tracing::error!("an encoder thread panicked");
            }
        }
    }
}

fn work(
    shared: &Shared,
    inbox: &Receiver<Task>,
    mut outlets: Vec<Outlet>,
    mut choice: CodecChoice,
) -> Vec<Outlet> {
    while let Ok(task) = inbox.recv() {
        let mut counts = PageCounts::default();
        let done = match task {
            Task::Pages(lane, chunk) => {
                let outlet = outlets.iter_mut().find(|outlet| outlet.number == lane);
                let sent = outlet.map_or(Err(PumpError::WorkerGone), |outlet| {
                    send(shared, outlet, &chunk, &mut choice, &mut counts)
                });
                shared.reuse(chunk);
                sent.map(|()| None)
            }
            Task::Flush(done) => {
                let mut flushed = Ok(());
                for outlet in &mut outlets {
                    flushed = flushed
                        .and_then(|()| outlet.flush(&shared.outlets, &mut choice, 0, &mut counts));
                }
                flushed.map(|()| Some(done))
            }
        };
        for outlet in &mut outlets {
            counts.add(&outlet.builder.take_counts());
        }
        shared.counts.lock().unwrap_or_else(PoisonError::into_inner).add(&counts);
        match done {
            Ok(Some(done)) => drop(done.send(())),
            Ok(None) => {}
            Err(error) => {
                *shared.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                break;
            }
        }
    }
    outlets
}

/// Judges a chunk's pages and sends what makes whole batches.
fn send(
    shared: &Shared,
    outlet: &mut Outlet,
    chunk: &Chunk,
    choice: &mut CodecChoice,
    counts: &mut PageCounts,
) -> Result<(), PumpError> {
    let mut left = chunk.contents.as_slice();
    for run in &chunk.runs {
        let parts = match &shared.unused {
            Some(unused) if !run.is_zero => unused.split(run.first, run.pages),
            _ => vec![(run.first, run.pages, false)],
        };
        for (mut first, mut pages, is_unused) in parts {
            while pages > 0 {
                let room = outlet.builder.room_pages();
                if room == 0 || outlet.builder.is_full(1) {
                    outlet.flush(&shared.outlets, choice, 0, counts)?;
                    continue;
                }
                let part = pages.min(room);
                let bytes = if run.is_zero { 0 } else { part * PAGE_BYTES };
                let (contents, rest) = left.split_at(bytes.min(left.len()));
                left = rest;
                let read = |_: PageIndex, buffer: &mut [u8]| {
                    match contents.len() == buffer.len() && !is_unused {
                        true => buffer.copy_from_slice(contents),
                        false => buffer.fill(0),
                    }
                    Ok::<_, PumpError>(())
                };
                outlet.builder.push(&shared.pages, PageIndex(first), part, Reason::Dirty, read)?;
                (first, pages) = (first + part as u64, pages - part);
            }
        }
    }
    Ok(())
}
