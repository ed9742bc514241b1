//! Answers to the requests of a guest that runs at the destination and waits for a page.
//!
//! ```text
//!   TCP:   UrgentSender ──► thread: plan, read, pack ──► UrgentSender
//!   QUIC:  control stream ► task:   plan, read, pack ──► LaneSender
//! ```
//!
//! Over TCP a thread does it all and nothing has to be handed on; over QUIC the connections' tasks lie in
//! between. Answers leave whatever else is under way, and pages that the guest waits for go before neighbours
//! that it did not ask for. What ends answering ends the session, in the place of which the destination gets
//! another.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use migrate_core::batch::{CHUNK_PAGES, wire_bytes};
use migrate_core::codec::{Codec, Packer};
use migrate_core::codec_choice::Wanted;
use migrate_core::encode::{BatchBuilder, PageBuffer};
use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::PageIndex;
use migrate_core::postcopy::Answer;
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::{Batch, Closer, LaneSender, TransportError, UrgentSender, UrgentStop, close_code};

use super::buffers::Buffers;
use super::feed::Feed;
use super::gate::Gate;
use super::outlet::PumpError;
use crate::blocking::{hurry, join};
use crate::error::EngineError;

/// Neighbours in a batch: reading and packing one of 64 pages takes longer than a fault may.
const NEIGHBOURS_AT_ONCE: u64 = 16;

/// The lane that was set aside for answers.
#[derive(Debug)]
pub enum UrgentLane {
    /// Requests come on it.
    Tcp(UrgentSender),
    /// Requests come on the control stream.
    Quic(LaneSender),
}

impl UrgentLane {
    /// Readies a lane of a session whose destination does the same.
    ///
    /// # Errors
    /// If its TCP connection has ended.
    pub fn of(lane: LaneSender) -> Result<Self, EngineError> {
        if lane.has_tcp() {
            return Ok(Self::Tcp(lane.into_urgent()?));
        }
        Ok(Self::Quic(lane))
    }
}

/// Who answers, until this is dropped.
#[derive(Debug)]
pub enum Answering {
    /// A thread.
    Tcp(UrgentStop, Option<thread::JoinHandle<()>>),
    /// A task.
    Quic(JoinHandle<()>),
}

impl Answering {
    /// Begins to answer requests on `lane`, or those that come over `requests`.
    pub fn start(
        answers: Answers,
        lane: UrgentLane,
        requests: mpsc::Receiver<PageIndex>,
        closer: Closer,
    ) -> Self {
        match lane {
            UrgentLane::Tcp(lane) => {
                let stop = lane.stop();
                let answer = move || report(&closer, answer_on_thread(answers, lane));
                Self::Tcp(stop, Some(thread::spawn(answer)))
            }
            UrgentLane::Quic(lane) => Self::Quic(tokio::spawn(async move {
                report(&closer, answer_in_task(answers, lane, requests).await);
            })),
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        match self {
            Self::Quic(task) => task.abort(),
            Self::Tcp(stop, thread) => {
                stop.stop();
                if let Some(thread) = thread.take() {
                    join(thread, Some(stop));
                }
            }
        }
    }
}

fn report(closer: &Closer, answered: Result<(), EngineError>) {
    let Err(error) = answered else { return };
    // The destination has all it wants, or the session is given up here.
    if let EngineError::Transport(TransportError::Ended { .. }) = error {
        return;
    }
    tracing::info!(error = %error.tell(), "requests are not answered");
    let code = match error.bin() {
        ErrorBin::PeerMisbehaved => close_code::PROTOCOL,
        _ => close_code::INTERNAL,
    };
    closer.close_now(code, &error.tell());
}

fn answer_on_thread(mut answers: Answers, mut lane: UrgentSender) -> Result<(), EngineError> {
    hurry();
    loop {
        answers.requested(lane.requested()?)?;
        while let Some(batch) = answers.next()? {
            lane.send(batch)?;
            while let Some(page) = lane.requested_already()? {
                answers.requested(page)?;
            }
        }
    }
}

/// Reads memory on the runtime's thread: a page is some microseconds, and the guest waits.
async fn answer_in_task(
    mut answers: Answers,
    mut lane: LaneSender,
    mut requests: mpsc::Receiver<PageIndex>,
) -> Result<(), EngineError> {
    while let Some(page) = requests.recv().await {
        answers.requested(page)?;
        while let Some(batch) = answers.next()? {
            lane.send(batch).await?;
            while let Ok(page) = requests.try_recv() {
                answers.requested(page)?;
            }
        }
    }
    Ok(())
}

/// Makes the answers, batch by batch.
#[derive(Debug)]
pub struct Answers {
    ram: Arc<GuestRam>,
    feed: Arc<Feed>,
    gate: Arc<Gate>,
    is_packed: bool,
    queue: Queue,
    builder: BatchBuilder,
    packer: Packer,
    buffers: Buffers,
}

impl Answers {
    /// Answers with pages of `ram` as the feed plans it, packed unless raw contents are `wanted`.
    pub fn new(ram: Arc<GuestRam>, feed: Arc<Feed>, gate: Arc<Gate>, wanted: Wanted) -> Self {
        Self {
            ram,
            feed,
            gate,
            is_packed: wanted != Wanted::Always(Codec::Plain),
            queue: Queue::default(),
            builder: BatchBuilder::new(),
            packer: Packer::default(),
            buffers: Buffers::default(),
        }
    }

    fn requested(&mut self, page: PageIndex) -> Result<(), EngineError> {
        match self.feed.requested(page)? {
            Some(answer) => self.queue.add(answer),
            None => self.queue.prefer(page.0),
        }
        Ok(())
    }

    /// The next batch of the answers, or nothing at their end.
    fn next(&mut self) -> Result<Option<Batch>, EngineError> {
        if let Some(run) = self.queue.next_asked() {
            self.push(run)?;
            return self.batch();
        }
        let mut room = NEIGHBOURS_AT_ONCE;
        while room > 0
            && let Some(run) = self.queue.next_neighbours(room)
        {
            room -= run.end - run.start;
            self.push(run)?;
        }
        self.batch()
    }

    fn push(&mut self, run: Range<u64>) -> Result<(), EngineError> {
        let (first, pages) = (PageIndex(run.start), (run.end - run.start) as usize);
        let read = |buffer: &mut [u8]| self.ram.read(first, buffer);
        Ok(self.builder.push_last(first, pages, read).map_err(PumpError::from)?)
    }

    fn batch(&mut self) -> Result<Option<Batch>, EngineError> {
        let Some(batch) = self.builder.take() else { return Ok(None) };
        self.builder.reuse(self.buffers.take());
        let content_bytes = batch.content.len();
        let (codec, payload) = self.pack(batch.content)?;
        self.gate.pass(wire_bytes(batch.runs.len(), payload.len()));
        let payload = self.buffers.lend(payload).into();
        Ok(Some(Batch { runs: batch.runs, payload, codec, content_bytes, round: 0 }))
    }

    fn pack(&mut self, content: PageBuffer) -> Result<(Codec, PageBuffer), PumpError> {
        if !self.is_packed || content.is_empty() {
            return Ok((Codec::Plain, content));
        }
        let packed = content.pack(&mut self.packer, Codec::Lz4, self.buffers.take())?;
        let (codec, kept, spare) = match packed.len() < content.len() {
            true => (Codec::Lz4, packed, content),
            false => (Codec::Plain, content, packed),
        };
        self.buffers.put(spare);
        Ok((codec, kept))
    }
}

/// What the destination asked for, and what goes with it. Every page comes out once.
#[derive(Debug, Default)]
struct Queue {
    asked: VecDeque<Range<u64>>,
    neighbours: VecDeque<Range<u64>>,
}

impl Queue {
    fn add(&mut self, answer: Answer) {
        self.asked.push_back(answer.page);
        self.neighbours.extend(answer.neighbours);
    }

    /// The guest waits for a page that is under way: if it is still here, it goes before the others.
    fn prefer(&mut self, page: u64) {
        let Some(at) = self.neighbours.iter().position(|run| run.contains(&page)) else { return };
        let run = self.neighbours.remove(at).unwrap_or_default();
        for rest in [page + 1..run.end, run.start..page] {
            if !rest.is_empty() {
                self.neighbours.insert(at, rest);
            }
        }
        self.asked.push_back(page..page + 1);
    }

    /// What the guest waits for, as far as it fits a batch, of which it is all.
    fn next_asked(&mut self) -> Option<Range<u64>> {
        take(&mut self.asked, CHUNK_PAGES)
    }

    fn next_neighbours(&mut self, pages_max: u64) -> Option<Range<u64>> {
        take(&mut self.neighbours, pages_max)
    }
}

/// Takes at most `pages_max` pages off the first run.
fn take(runs: &mut VecDeque<Range<u64>>, pages_max: u64) -> Option<Range<u64>> {
    let run = runs.front_mut()?;
    let taken = run.start..run.end.min(run.start + pages_max);
    run.start = taken.end;
    if run.is_empty() {
        runs.pop_front();
    }
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is left, in the order in which it leaves.
    fn rest(queue: &mut Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.next_asked().or_else(|| queue.next_neighbours(3)))
            .flatten()
            .collect()
    }

    #[test]
    fn neighbours_wait_for_pages_that_are_asked_for() {
        let mut queue = Queue::default();
        queue.add(Answer { page: 10..11, neighbours: vec![11..14, 20..24] });
        assert_eq!((queue.next_asked(), queue.next_asked()), (Some(10..11), None));
        assert_eq!(queue.next_neighbours(2), Some(11..13));
        queue.add(Answer { page: 512..1024, neighbours: vec![] });
        queue.prefer(22);
        // On its way already.
        queue.prefer(11);
        assert_eq!(queue.next_asked(), Some(512..512 + CHUNK_PAGES));
        let large = 512 + CHUNK_PAGES..1024;
        assert_eq!(rest(&mut queue), large.chain([22, 13, 20, 21, 23]).collect::<Vec<_>>());
    }
}
