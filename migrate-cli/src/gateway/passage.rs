//! A stream on its way from a QEMU here to the destination, and what comes back.
//!
//! ```text
//!   QEMU ─► intake (a thread) ─► items ─► control stream
//!                         └► pages ─► lanes
//!   QEMU ◄─ StreamBack ◄───────────────── control stream
//! ```
//!
//! Invariant: whichever way ends takes the other with it, and everything that waits is woken.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use migrate_core::codec_choice::Wanted;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use transport::messages::{Message, StreamBlocks, StreamBytes, StreamEnd, StreamPostcopy, Sync};

use super::channels::{Beside, Kind};
use super::intake::{Item, StreamIntake, Taken, Way};
use super::raw;
use super::requests::Requests;
use super::socket::QemuSocket;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::source::gate::Gate;
use crate::source::lanes::LaneTasks;
use crate::source::link::Link;
use crate::source::unused::streamed::Streamed;

/// Messages that may wait to be sent.
const ITEMS: usize = 4;

/// How long the source's QEMU may take to end its connection after that at the destination did.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// How pages are packed, and how fast they may leave.
#[derive(Debug, Clone)]
pub struct Packing {
    /// Bits a second that a guest may take.
    pub max_bandwidth: Option<u64>,
    /// Codecs.
    pub wanted: Wanted,
    /// Memory for deltas, in bytes a guest.
    pub delta_bytes_max: u64,
    /// Tells what need not be sent.
    pub unused: Option<Arc<Streamed>>,
}

/// A session that pages leave by.
#[derive(Debug)]
pub struct Lanes {
    /// Its lanes.
    pub tasks: LaneTasks,
    /// Back-pressure.
    pub gate: Arc<Gate>,
    /// Of the idle link.
    pub round_trip: Duration,
}

/// A stream on its way, and what comes back. Dropping it ends the connection to the QEMU.
#[derive(Debug)]
pub struct Passage {
    gate: Arc<Gate>,
    lanes: LaneTasks,
    /// The source's QEMU.
    socket: QemuSocket,
    /// How pages are to travel, until they do.
    way: Option<Way>,
    /// What the destination asks for.
    requests: Arc<Requests>,
    /// What the destination has to say of syncs, by their numbers.
    expected: HashMap<u32, Expected>,
    /// The one of which it has to say it before anything else is sent.
    held: Option<u32>,
    /// The source's QEMU has ended its stream.
    is_sent: bool,
    /// The destination's QEMU has said its last word.
    is_answered: bool,
}

impl Passage {
    /// From the QEMU at the other end of the socket, which may have other connections `beside` this one.
    pub fn new(packing: &Packing, lanes: Lanes, socket: QemuSocket, beside: Beside) -> Self {
        let Lanes { tasks: mut lanes, gate, round_trip } = lanes;
        let requests = Arc::<Requests>::default();
        let way = Way {
            lanes: lanes.queues(),
            gate: Arc::clone(&gate),
            wanted: packing.wanted,
            delta_bytes_max: packing.delta_bytes_max,
            unused: packing.unused.clone(),
            requests: Arc::clone(&requests),
            beside,
            round_trip,
        };
        Self {
            gate,
            lanes,
            socket,
            way: Some(way),
            requests,
            expected: HashMap::new(),
            held: None,
            is_sent: false,
            is_answered: false,
        }
    }

    /// Passes everything on in both directions until both ends are done: what was taken of the stream, and whether all
    /// went well. Can be called once.
    pub async fn pass(&mut self, link: &mut Link, kind: Kind) -> (Taken, Result<(), EngineError>) {
        let (items, mut inbox) = mpsc::channel(ITEMS);
        let mut reading = match self.read(items, kind) {
            Ok(reading) => reading,
            Err(error) => return (Taken::default(), Err(error)),
        };
        let mut read = None;
        let passed = tokio::select! {
            passed = self.exchange(link, &mut inbox) => passed,
            // Where QEMU gives up, whatever is waited for is in vain.
            () = failed(&mut reading, &mut read) => Err(EngineError::Cancelled),
        };
        drop(inbox);
        // Who waits for an answer waits in vain.
        self.expected.clear();
        if passed.is_err() {
            // Whoever reads, encodes or waits for its turn is woken.
            self.socket.cut();
            self.stop().await;
        }
        let (taken, read) = match read {
            Some(read) => read,
            None => ended(reading.await),
        };
        let moved = match (passed, read) {
            (Ok(()), read) => read,
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(other)) => Err(reason(link, error, other).await),
        };
        (taken, moved)
    }

    /// Begins to read what the QEMU sends.
    fn read(
        &mut self,
        items: mpsc::Sender<Item>,
        kind: Kind,
    ) -> Result<JoinHandle<Read>, EngineError> {
        let way = self.way.take();
        let way = way.ok_or_else(|| EngineError::Internal("the stream was taken".into()))?;
        let socket = self.socket.another().map_err(EngineError::QemuSocket)?;
        Ok(tokio::task::spawn_blocking(move || {
            if kind != Kind::Stream {
                let mut taken = Taken::default();
                let read = raw::pass_on(&socket, &items, way.lanes.len(), &way.gate, &mut taken);
                return (taken, read);
            }
            let mut intake = StreamIntake::new(items, way);
            let read = intake.run(&socket);
            (intake.taken(), read)
        }))
    }

    /// Nothing more goes over the lanes.
    pub async fn stop(&mut self) {
        self.gate.close();
        self.requests.backlog().end(None);
        self.lanes.stop().await;
    }

    async fn exchange(
        &mut self,
        link: &mut Link,
        inbox: &mut mpsc::Receiver<Item>,
    ) -> Result<(), EngineError> {
        let mut sequence = 0;
        while !(self.is_sent && self.is_answered) {
            let (is_sent, is_answered) = (self.is_sent, self.is_answered);
            tokio::select! {
                item = inbox.recv(), if !is_sent && self.held.is_none() => match item {
                    Some(item) => match self.send(link, item, &mut sequence).await {
                        // What is heard last says why nothing can be said.
                        Err(error @ EngineError::Cancelled) => {
                            return Err(link.why_over().await.unwrap_or(error));
                        }
                        sent => sent?,
                    },
                    // The reading has ended, with an error of its own.
                    None => return Err(EngineError::Cancelled),
                },
                message = link.recv() => self.hear(message?).await?,
                () = tokio::time::sleep(ENDS_WITHIN), if is_answered => {
                    tracing::warn!("the source's QEMU keeps its connection, though that at the destination ended its own");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn send(
        &mut self,
        link: &Link,
        item: Item,
        sequence: &mut u32,
    ) -> Result<(), EngineError> {
        let message = match item {
            Item::Bytes(bytes) => Message::StreamBytes(StreamBytes { bytes }),
            Item::Blocks { section, blocks } => {
                Message::StreamBlocks(StreamBlocks { section, blocks })
            }
            Item::Postcopy => Message::StreamPostcopy(StreamPostcopy {}),
            Item::Sync { batches, digest, done } => {
                *sequence = sequence.wrapping_add(1);
                if digest.is_some() && done.is_none() {
                    self.held = Some(*sequence);
                }
                self.expected.insert(*sequence, Expected { digest, done });
                Message::Sync(Sync { sequence: *sequence, batches })
            }
            Item::End => {
                self.is_sent = true;
                Message::StreamEnd(StreamEnd {})
            }
        };
        link.send(message).await
    }

    async fn hear(&mut self, message: Message) -> Result<(), EngineError> {
        match message {
            Message::StreamBack(back) => {
                self.requests.hear(&back.bytes);
                let socket = self.socket.another().map_err(EngineError::QemuSocket)?;
                let written =
                    on_thread(move || std::io::Write::write_all(&mut &socket, &back.bytes));
                written.await?.map_err(EngineError::QemuSocket)
            }
            Message::Synced(synced) => {
                self.held.take_if(|held| *held == synced.sequence);
                match self.expected.remove(&synced.sequence) {
                    Some(expected) => expected.check(synced.version_digest),
                    None => Err(EngineError::OutOfPlace { got: "Synced", wanted: "StreamBack" }),
                }
            }
            Message::StreamEnd(_) => {
                self.is_answered = true;
                self.socket.end_writing();
                Ok(())
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamBack" }),
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.gate.close();
        self.requests.backlog().end(None);
        self.socket.cut();
    }
}

/// What came first: whichever way ends takes the other with it. Where the reading does, the other is cancelled; where the
/// other does, the reading sees a stream that ends too soon.
async fn reason(link: &mut Link, passed: EngineError, read: EngineError) -> EngineError {
    match (&passed, &read) {
        // A lane ends for a reason that the control stream tells.
        (EngineError::Cancelled, EngineError::Pump(_)) => link.why_over().await.unwrap_or(read),
        (EngineError::Cancelled, _) => read,
        _ => passed,
    }
}

/// The answer to a sync.
#[derive(Debug)]
struct Expected {
    /// Of the versions of all pages.
    digest: Option<u64>,
    /// Who waits for it.
    done: Option<SyncSender<()>>,
}

impl Expected {
    fn check(self, digest: u64) -> Result<(), EngineError> {
        if self.digest.is_some_and(|own| own != digest) {
            let what = "that other pages are in place than were sent";
            return Err(EngineError::Contradiction(what.into()));
        }
        if let Some(done) = self.done {
            let _given_up = done.try_send(());
        }
        Ok(())
    }
}

/// What was read of a stream, and how that ended.
type Read = (Taken, Result<(), EngineError>);

fn ended(read: Result<Read, JoinError>) -> Read {
    read.unwrap_or_else(|error| (Taken::default(), Err(EngineError::Internal(error.to_string()))))
}

/// Returns when the reading has failed; if it ends well, never.
async fn failed(reading: &mut JoinHandle<Read>, read: &mut Option<Read>) {
    let ended = ended(reading.await);
    let is_well = ended.1.is_ok();
    *read = Some(ended);
    if is_well {
        std::future::pending::<()>().await;
    }
}
