//! Decoder threads: from the lanes to where pages go ([`PageSink`]), or to the pager once the guest runs here.
//!
//! Invariants: batches of a lane are applied in the order in which they came, by one thread; a page
//! is written only if its version is the next one (correctness rule 3); a reference is to a page that
//! came before on the same lane, and takes what that page holds when its turn comes; what waits is
//! bounded by the queues, and QUIC's flow control holds the source back when they are full.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use migrate_core::batch::{LAST_VERSION, PageRun, REFERENCE_BYTES, RunKind, lane_of, wire_bytes};
use migrate_core::codec::{Codec, CodecError, Unpacker};
use migrate_core::delta::MASK_BYTES;
use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_table::{DestinationPages, VersionError};
use qemu_glue::ram::RamError;
use thiserror::Error;
use tokio::sync::{Notify, mpsc};
use transport::Batch;

use super::fetcher::Fetcher;
use super::sink::{PageSink, PageWriter};
use crate::error::EngineError;

/// Batches that may wait for each decoder thread.
const QUEUE: usize = 4;

/// Why a batch could not be applied.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The page or its version is wrong.
    #[error("The source sent a wrong page")]
    Version(#[from] VersionError),
    /// Guest memory could not be written.
    #[error("The guest's memory cannot be written")]
    Ram(#[from] RamError),
    /// The contents cannot be unpacked.
    #[error("The source sent contents that cannot be unpacked")]
    Codec(#[from] CodecError),
    /// A delta says that nothing changed.
    #[error("The source sent a delta that changes nothing, for {0}")]
    EmptyDelta(PageIndex),
    /// A delta of a page that the destination does not hold.
    #[error("The source sent a delta of {0}, which is missing")]
    DeltaOfMissing(PageIndex),
    /// A reference to a page whose content cannot be meant.
    #[error("The source sent {page} as a reference to {of}, {why}")]
    Reference {
        /// The page that was to take the content.
        page: PageIndex,
        /// The page named.
        of: PageIndex,
        /// What is wrong with that one.
        why: &'static str,
    },
    /// A reference for a page that was missing at the hand-over.
    #[error("The source sent a reference for {0}, which is missing")]
    ReferenceForMissing(PageIndex),
    /// A reference where nobody has the contents of pages any more.
    #[error("The source sent a reference for {0}, whose content was not kept here")]
    ReferenceInStream(PageIndex),
    /// The stream of the QEMU that takes the guest cannot be written.
    #[error("The guest's stream cannot be written")]
    Stream(#[source] io::Error),
    /// The contents end within a run, or go on after the last one.
    #[error("A batch holds fewer or more bytes than its runs describe")]
    Length,
    /// A missing page was not placed.
    #[error("A missing page cannot be put in place")]
    Fetch(#[source] Box<EngineError>),
}

impl Classify for ApplyError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Version(error) => error.bin(),
            Self::Ram(error) => error.bin(),
            Self::Codec(error) => error.bin(),
            Self::Fetch(error) => error.bin(),
            Self::Stream(_) => ErrorBin::System,
            Self::EmptyDelta(_)
            | Self::DeltaOfMissing(_)
            | Self::Reference { .. }
            | Self::ReferenceForMissing(_)
            | Self::ReferenceInStream(_)
            | Self::Length => ErrorBin::PeerMisbehaved,
        }
    }
}

#[derive(Debug)]
struct Shared {
    sink: Arc<dyn PageSink>,
    pages: Arc<DestinationPages>,
    applied_bytes: AtomicU64,
    /// Batches applied of each lane.
    batches: Vec<AtomicU64>,
    failure: Mutex<Option<ApplyError>>,
    changed: Notify,
    fetcher: OnceLock<Arc<Fetcher>>,
    /// A guest waits for what comes, although nothing is fetched here.
    is_awaited: AtomicBool,
}

/// The entrance for one lane's batches.
#[derive(Debug, Clone)]
pub struct LaneInlet {
    lane: usize,
    queue: mpsc::Sender<(usize, Batch)>,
}

impl LaneInlet {
    /// Hands a batch to the lane's thread; `false` once the decoder has failed or ended.
    pub async fn push(&self, batch: Batch) -> bool {
        self.queue.send((self.lane, batch)).await.is_ok()
    }
}

/// The decoder threads.
#[derive(Debug)]
pub struct Applier {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Applier {
    /// Starts up to `threads` threads for `lanes` lanes; returns the entrances in lane order.
    pub fn start(
        sink: Arc<dyn PageSink>,
        pages: Arc<DestinationPages>,
        lanes: usize,
        threads: usize,
    ) -> (Self, Vec<LaneInlet>) {
        let shared = Arc::new(Shared {
            sink,
            pages,
            applied_bytes: AtomicU64::new(0),
            batches: (0..lanes).map(|_| AtomicU64::new(0)).collect(),
            failure: Mutex::new(None),
            changed: Notify::new(),
            fetcher: OnceLock::new(),
            is_awaited: AtomicBool::new(false),
        });
        // What the guest waits for comes on the last lane and must not queue behind anything.
        let shared_lanes = lanes.saturating_sub(1).max(1);
        let threads = threads.clamp(1, shared_lanes) + usize::from(lanes > 1);
        let (queues, threads): (Vec<_>, Vec<_>) = (0..threads)
            .map(|_| {
                let (queue, inbox) = mpsc::channel(QUEUE);
                let shared = Arc::clone(&shared);
                (queue, thread::spawn(move || apply_all(&shared, inbox)))
            })
            .unzip();
        let last = queues.last().filter(|_| lanes > 1);
        let others = queues.iter().take(queues.len() - usize::from(last.is_some()));
        let inlets = others
            .cycle()
            .take(lanes - usize::from(last.is_some()))
            .chain(last)
            .enumerate()
            .map(|(lane, queue)| LaneInlet { lane, queue: queue.clone() })
            .collect();
        (Self { shared, threads: Mutex::new(threads) }, inlets)
    }

    /// From now on pages that were missing at the hand-over go to `fetcher`.
    pub fn fetch(&self, fetcher: Arc<Fetcher>) {
        let _set_once = self.shared.fetcher.set(fetcher);
    }

    /// From now on a guest waits for what comes.
    pub fn await_pages(&self) {
        self.shared.is_awaited.store(true, Ordering::Relaxed);
    }

    /// Whether a guest waits for what comes.
    pub fn is_awaited(&self) -> bool {
        self.fetcher().is_some() || self.shared.is_awaited.load(Ordering::Relaxed)
    }

    /// Who takes pages that were missing at the hand-over.
    pub fn fetcher(&self) -> Option<&Arc<Fetcher>> {
        self.shared.fetcher.get()
    }

    /// Applies a batch at once, on the caller's thread: the guest waits for it, and it is a few pages.
    /// Such batches come on a lane of their own, packed one by one. `false` once the decoder has failed.
    pub fn apply_urgent(&self, lane: usize, batch: &Batch) -> bool {
        let shared = &self.shared;
        finish(
            shared,
            lane,
            batch,
            unpack_and_apply(shared, lane, batch, &mut Unpacker::default(), &mut vec![]),
        )
    }

    /// Bytes applied since the start, and batches applied of each lane.
    pub fn applied(&self) -> (u64, Vec<u64>) {
        let batches = self.shared.batches.iter().map(|count| count.load(Ordering::Acquire));
        (self.shared.applied_bytes.load(Ordering::Acquire), batches.collect())
    }

    /// Waits until at least `batches` of each lane are applied.
    ///
    /// # Errors
    /// The [`ApplyError`] of a thread that failed.
    pub async fn reach(&self, batches: &[u64]) -> Result<(), ApplyError> {
        loop {
            let changed = self.shared.changed.notified();
            self.check()?;
            let (_, applied) = self.applied();
            if applied.iter().zip(batches).all(|(have, want)| have >= want) {
                return Ok(());
            }
            changed.await;
        }
    }

    /// Waits for a failure of a thread.
    pub async fn failed(&self) -> ApplyError {
        loop {
            let changed = self.shared.changed.notified();
            if let Err(error) = self.check() {
                return error;
            }
            changed.await;
        }
    }

    /// Waits for the threads, which end when all inlets are gone: nothing writes guest memory after.
    /// Blocks.
    pub fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a decoder thread panicked");
            }
        }
    }

    fn check(&self) -> Result<(), ApplyError> {
        lock(&self.shared.failure).take().map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn apply_all(shared: &Shared, mut inbox: mpsc::Receiver<(usize, Batch)>) {
    let mut unpackers: HashMap<usize, Unpacker> = HashMap::new();
    let mut unpacked = Vec::new();
    while let Some((lane, batch)) = inbox.blocking_recv() {
        let unpacker = unpackers.entry(lane).or_default();
        let applied = unpack_and_apply(shared, lane, &batch, unpacker, &mut unpacked);
        if !finish(shared, lane, &batch, applied) {
            return;
        }
    }
}

/// Counts a batch, or keeps the failure; says which.
fn finish(shared: &Shared, lane: usize, batch: &Batch, applied: Result<(), ApplyError>) -> bool {
    let is_applied = applied.is_ok();
    match applied {
        Ok(()) => {
            let bytes = wire_bytes(batch.runs.len(), batch.payload.len());
            shared.applied_bytes.fetch_add(bytes, Ordering::Release);
            if let Some(count) = shared.batches.get(lane) {
                count.fetch_add(1, Ordering::Release);
            }
        }
        Err(error) => *lock(&shared.failure) = Some(error),
    }
    shared.changed.notify_waiters();
    is_applied
}

/// Applies a batch; `memory` is for unpacked contents and used again.
fn unpack_and_apply(
    shared: &Shared,
    lane: usize,
    batch: &Batch,
    unpacker: &mut Unpacker,
    memory: &mut Vec<u8>,
) -> Result<(), ApplyError> {
    let pieces = batch.payload.pieces().iter().map(|piece| &piece[..]);
    if batch.codec == Codec::Plain {
        return apply(shared, lane, batch, Contents::of(pieces));
    }
    if memory.len() < batch.content_bytes {
        memory.resize(batch.content_bytes, 0);
    }
    let content = memory.get_mut(..batch.content_bytes).unwrap_or_default();
    unpacker.unpack(batch.codec, pieces, content)?;
    apply(shared, lane, batch, Contents::of([&*content].into_iter()))
}

fn apply<'a>(
    shared: &Shared,
    lane: usize,
    batch: &Batch,
    mut contents: Contents<'a, impl Iterator<Item = &'a [u8]>>,
) -> Result<(), ApplyError> {
    let mut writer = shared.sink.begin();
    for run in &batch.runs {
        if let Some(fetcher) = shared.fetcher.get()
            && run.version == LAST_VERSION
        {
            place(fetcher, run, &mut contents)?;
            continue;
        }
        shared.pages.accept(run)?;
        for (first, pages) in shared.sink.layout().split(run.first, u64::from(run.pages)) {
            match run.kind {
                RunKind::Zero => writer.zeros(first, pages)?,
                RunKind::Raw => {
                    let bytes = pages as usize * PAGE_BYTES;
                    let mut part = contents.take(bytes).ok_or(ApplyError::Length)?;
                    writer.whole(first, &mut part)?;
                }
                RunKind::Delta => {
                    for page in (first.0..).take(pages as usize) {
                        apply_delta(&mut *writer, PageIndex(page), &mut contents)?;
                    }
                }
                RunKind::Same => {
                    let end = run.first.0 + u64::from(run.pages);
                    for page in (first.0..).take(pages as usize) {
                        let of = reference(shared, lane, page..end, &mut contents)?;
                        writer.same(PageIndex(page), of)?;
                    }
                }
            }
        }
    }
    writer.end()?;
    if contents.ended() { Ok(()) } else { Err(ApplyError::Length) }
}

/// Hands a run to the pager.
fn place<'a>(
    fetcher: &Fetcher,
    run: &PageRun,
    contents: &mut Contents<'a, impl Iterator<Item = &'a [u8]>>,
) -> Result<(), ApplyError> {
    let pages = run.first.0..run.first.0 + u64::from(run.pages);
    let placed = match run.kind {
        RunKind::Zero => fetcher.place(&pages, None),
        // There is nothing that a delta could be against, nor anything on the lane to refer to.
        RunKind::Delta => return Err(ApplyError::DeltaOfMissing(run.first)),
        RunKind::Same => return Err(ApplyError::ReferenceForMissing(run.first)),
        RunKind::Raw => {
            let bytes = usize::from(run.pages) * PAGE_BYTES;
            let pieces = contents.take(bytes).ok_or(ApplyError::Length)?;
            match pieces.as_slice() {
                [whole] => fetcher.place(&pages, Some(whole)),
                pieces => fetcher.place(&pages, Some(&join(pieces, bytes))),
            }
        }
    };
    placed.map_err(|error| ApplyError::Fetch(Box::new(error)))
}

fn join(pieces: &[IoSlice<'_>], bytes: usize) -> Vec<u8> {
    let mut whole = Vec::with_capacity(bytes);
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
    whole
}

fn apply_delta<'a>(
    writer: &mut dyn PageWriter,
    page: PageIndex,
    contents: &mut Contents<'a, impl Iterator<Item = &'a [u8]>>,
) -> Result<(), ApplyError> {
    let mask = contents.take_number(MASK_BYTES).ok_or(ApplyError::Length)?;
    if mask == 0 {
        return Err(ApplyError::EmptyDelta(page));
    }
    writer.delta(page, mask, &mut |bytes| contents.take(bytes))
}

/// The page whose content the first page of what is left of a run is to have.
fn reference<'a>(
    shared: &Shared,
    lane: usize,
    left: Range<u64>,
    contents: &mut Contents<'a, impl Iterator<Item = &'a [u8]>>,
) -> Result<PageIndex, ApplyError> {
    let of = PageIndex(contents.take_number(REFERENCE_BYTES).ok_or(ApplyError::Length)?);
    let page = PageIndex(left.start);
    let bad = |why| Err(ApplyError::Reference { page, of, why });
    match shared.pages.version(of) {
        None => bad("which lies outside the guest's RAM"),
        _ if of == page => bad("which is itself"),
        _ if !travel_on(lane, [page, of], shared.batches.len()) => {
            bad("which does not travel on the same lane")
        }
        // The run's versions count already, its contents do not.
        Some(0) => bad("which never came"),
        Some(_) if left.contains(&of.0) => bad("which comes later"),
        Some(_) => Ok(of),
    }
}

/// Whether both pages belong to this one of `lanes` lanes, the last of which may be kept for pages
/// that the guest waits for.
fn travel_on(lane: usize, pages: [PageIndex; 2], lanes: usize) -> bool {
    [lanes, lanes.saturating_sub(1)]
        .iter()
        .any(|lanes| pages.iter().all(|page| lane_of(*page, *lanes) == lane))
}

/// What is left of a batch's contents, front to back.
struct Contents<'a, I> {
    pieces: I,
    /// The rest of the piece that was begun.
    begun: &'a [u8],
}

impl<'a, I: Iterator<Item = &'a [u8]>> Contents<'a, I> {
    fn of(pieces: I) -> Self {
        Self { pieces, begun: &[] }
    }

    /// The next `bytes` bytes; nothing if there are fewer.
    fn take(&mut self, mut bytes: usize) -> Option<Vec<IoSlice<'a>>> {
        let mut taken = Vec::new();
        while bytes > 0 {
            if self.begun.is_empty() {
                self.begun = self.pieces.next()?;
            }
            let (part, rest) = self.begun.split_at(bytes.min(self.begun.len()));
            taken.push(IoSlice::new(part));
            self.begun = rest;
            bytes -= part.len();
        }
        Some(taken)
    }

    /// The next `bytes` bytes, at most 8, as a little-endian number.
    fn take_number(&mut self, bytes: usize) -> Option<u64> {
        let pieces = self.take(bytes)?;
        let bytes = pieces.iter().flat_map(|piece| piece.iter());
        Some(bytes.rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn ended(mut self) -> bool {
        self.begun.is_empty() && self.pieces.all(<[u8]>::is_empty)
    }
}

#[cfg(test)]
mod tests;
