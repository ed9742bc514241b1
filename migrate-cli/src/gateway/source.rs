//! One guest's way out of here: from its QEMU to the other gateway.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use migrate_core::codec_choice::Wanted;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::messages::{
    self, Abort, FEATURE_STREAM, Intent, Message, StreamBlocks, StreamBytes, StreamEnd, StreamOpen,
    StreamPostcopy, Sync,
};
use transport::{Closer, Identity, Offer, Options, SourceSession, TransportError, close_code};

use super::channels::{Arrival, Channels, Kind};
use super::intake::{Item, StreamIntake, Taken, Way};
use super::listen::Connected;
use super::raw;
use super::report::GatewayReport;
use super::requests::Requests;
use super::socket::QemuSocket;
use crate::ENGINE;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::source::gate::Gate;
use crate::source::lanes::LaneTasks;
use crate::source::link::Link;
use crate::source::prepare;

/// Longest wait for the other gateway to reach its QEMU.
const OPENED_WITHIN: Duration = Duration::from_secs(30);

/// Messages that may wait to be sent.
const ITEMS: usize = 4;

/// How long the source's QEMU may take to end its connection after that at the destination did.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// Longest wait until a last word is there.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

/// How long the other gateway may take to tell why a lane has ended.
const WHY_WITHIN: Duration = Duration::from_secs(2);

/// Where guests go and how.
#[derive(Debug, Clone)]
pub struct Onward {
    /// The other gateway.
    pub addr: SocketAddr,
    /// Our identity.
    pub identity: Arc<Identity>,
    /// Session options.
    pub options: Options,
    /// Bits a second that a guest may take.
    pub max_bandwidth: Option<u64>,
    /// Codecs.
    pub wanted: Wanted,
    /// Memory for deltas, in bytes a guest.
    pub delta_bytes_max: u64,
}

/// Takes a guest from a QEMU that has connected, and that opens no further connections; everything that happens is in
/// the report.
pub async fn send(onward: &Onward, connected: Connected) -> GatewayReport {
    let arrival = Arc::new(Channels::default()).arrive(&connected);
    send_among(onward, connected, arrival).await
}

/// The same for a QEMU that may open several.
pub async fn send_among(
    onward: &Onward,
    connected: Connected,
    mut arrival: Arrival,
) -> GatewayReport {
    let clock = Instant::now();
    let mut report = GatewayReport::begin(&connected.name);
    let moved = Box::pin(run(onward, &connected, &mut arrival, &mut report, clock)).await;
    // A QEMU that has not ended its connection sees here that nothing comes of it, and lets its guest run on.
    connected.socket.cut();
    report.end(moved.as_ref().err(), clock.elapsed());
    report
}

async fn run(
    onward: &Onward,
    connected: &Connected,
    arrival: &mut Arrival,
    report: &mut GatewayReport,
    clock: Instant,
) -> Result<(), EngineError> {
    let kind = kind(connected, arrival).await?;
    report.name.push_str(kind.suffix());
    let migration = prepare::new_migration()?;
    let offer = Offer::new(ENGINE, migration, Intent::Migrate);
    let session = transport::connect(onward.addr, &onward.identity, &onward.options, offer).await;
    let session = session.map_err(|source| match source {
        TransportError::Lost { .. } | TransportError::HandshakeTimeout { .. } => {
            EngineError::NoGateway { addr: onward.addr, source: Box::new(source) }
        }
        other => EngineError::from(other),
    })?;
    if session.selected.features & FEATURE_STREAM == 0 {
        let error = EngineError::Misuse {
            what: format!("What listens at {} is no gateway", onward.addr),
            remedy: "Start `migrate gateway destination` there".into(),
        };
        session.close(close_code::ABORTED, &error.tell()).await;
        return Err(error);
    }
    let SourceSession { control_sender, control_receiver, lanes, closer, .. } = session;
    let gate = Arc::new(Gate::new(onward.max_bandwidth));
    let link = Link::start(control_sender, control_receiver, Arc::clone(&gate), clock);
    let mut lanes = LaneTasks::start(lanes);
    let way = Way {
        lanes: lanes.queues(),
        gate: Arc::clone(&gate),
        wanted: onward.wanted,
        delta_bytes_max: onward.delta_bytes_max,
        requests: Arc::default(),
        beside: arrival.beside(),
        round_trip: closer.rtt(),
    };
    let mut passage = Passage {
        link,
        gate,
        lanes,
        back: connected.socket.another().map_err(EngineError::QemuSocket)?,
        requests: Arc::clone(&way.requests),
        expected: HashMap::new(),
        held: None,
        is_sent: false,
        is_answered: false,
    };
    let moved = passage.pass(connected, (arrival, kind), way).await;
    passage.stop().await;
    let (taken, moved) = match moved {
        Ok((taken, moved)) => (taken, moved),
        Err(error) => (Taken::default(), Err(error)),
    };
    let wire = closer.stats().wire;
    report.note(&taken, wire.sent + wire.received);
    passage.close(&closer, moved.as_ref().err()).await;
    moved
}

/// What the connection is for, once that is known.
async fn kind(connected: &Connected, arrival: &mut Arrival) -> Result<Kind, EngineError> {
    let socket = connected.socket.another().map_err(EngineError::QemuSocket)?;
    let beside = arrival.beside();
    let kind = on_thread(move || beside.kind(&socket)).await??;
    arrival.is(kind);
    Ok(kind)
}

/// A stream on its way, and what comes back.
struct Passage {
    link: Link,
    gate: Arc<Gate>,
    lanes: LaneTasks,
    /// The source's QEMU, to write to.
    back: QemuSocket,
    /// What the destination asks for.
    requests: Arc<Requests>,
    /// What the other gateway has to say of syncs, by their numbers.
    expected: HashMap<u32, Expected>,
    /// The one of which it has to say it before anything else is sent.
    held: Option<u32>,
    /// The source's QEMU has ended its stream.
    is_sent: bool,
    /// The destination's QEMU has said its last word.
    is_answered: bool,
}

impl Passage {
    /// Passes everything on in both directions until both ends are done: what was taken of the stream, and whether all
    /// went well.
    async fn pass(
        &mut self,
        connected: &Connected,
        (arrival, kind): (&mut Arrival, Kind),
        way: Way,
    ) -> Result<(Taken, Result<(), EngineError>), EngineError> {
        let Message::StreamOpened(_) = self.open(connected).await? else {
            return Err(EngineError::Internal("the gateway there did not open".into()));
        };
        arrival.opened(kind);
        let (items, mut inbox) = mpsc::channel(ITEMS);
        let socket = connected.socket.another().map_err(EngineError::QemuSocket)?;
        let mut reading: JoinHandle<_> = tokio::task::spawn_blocking(move || {
            if kind != Kind::Stream {
                let mut taken = Taken::default();
                let read = raw::pass_on(&socket, &items, way.lanes.len(), &way.gate, &mut taken);
                return (taken, read);
            }
            let mut intake = StreamIntake::new(items, way);
            let read = intake.run(&socket);
            (intake.taken(), read)
        });
        let mut read = None;
        let passed = tokio::select! {
            passed = self.exchange(&mut inbox) => passed,
            // Where QEMU gives up, whatever is waited for is in vain.
            () = failed(&mut reading, &mut read) => Err(EngineError::Cancelled),
        };
        drop(inbox);
        // Who waits for an answer waits in vain.
        self.expected.clear();
        if passed.is_err() {
            // Whoever reads, encodes or waits for its turn is woken.
            connected.socket.cut();
            self.stop().await;
        }
        let (taken, read) = match read {
            Some(read) => read,
            None => reading.await.map_err(|error| EngineError::Internal(error.to_string()))?,
        };
        let moved = match (passed, read) {
            (Ok(()), read) => read,
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(other)) => Err(self.reason(error, other).await),
        };
        Ok((taken, moved))
    }

    /// What came first: whichever way ends takes the other with it.
    async fn reason(&mut self, passed: EngineError, read: EngineError) -> EngineError {
        match (&passed, &read) {
            // A lane ends for a reason that the control stream tells.
            (EngineError::Cancelled, EngineError::Pump(_)) => {
                self.link.why_over(WHY_WITHIN).await.unwrap_or(read)
            }
            (EngineError::Cancelled, _) => read,
            (_, EngineError::Cancelled | EngineError::QemuSocket(_) | EngineError::Pump(_)) => {
                passed
            }
            _ => read,
        }
    }

    /// Nothing more goes over the lanes.
    async fn stop(&mut self) {
        self.gate.close();
        self.requests.backlog().end(None);
        self.lanes.stop().await;
    }

    async fn open(&mut self, connected: &Connected) -> Result<Message, EngineError> {
        let (name, port) = (messages::text(&connected.name), connected.port);
        self.link.send(Message::StreamOpen(StreamOpen { name, port })).await?;
        match self.link.recv_within("that its QEMU is connected", OPENED_WITHIN).await? {
            Message::Refuse(refuse) => {
                Err(EngineError::Refused { code: refuse.code, text: refuse.text })
            }
            opened @ Message::StreamOpened(_) => Ok(opened),
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamOpened" }),
        }
    }

    async fn exchange(&mut self, inbox: &mut mpsc::Receiver<Item>) -> Result<(), EngineError> {
        let mut sequence = 0;
        while !(self.is_sent && self.is_answered) {
            let (is_sent, is_answered) = (self.is_sent, self.is_answered);
            tokio::select! {
                item = inbox.recv(), if !is_sent && self.held.is_none() => match item {
                    Some(item) => self.send(item, &mut sequence).await?,
                    // The reading has ended, with an error of its own.
                    None => return Err(EngineError::Cancelled),
                },
                message = self.link.recv() => self.hear(message?).await?,
                () = tokio::time::sleep(ENDS_WITHIN), if is_answered => {
                    tracing::warn!("the source's QEMU keeps its connection, though that at the destination ended its own");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn send(&mut self, item: Item, sequence: &mut u32) -> Result<(), EngineError> {
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
        self.link.send(message).await
    }

    async fn hear(&mut self, message: Message) -> Result<(), EngineError> {
        match message {
            Message::StreamBack(back) => {
                self.requests.hear(&back.bytes);
                let socket = self.back.another().map_err(EngineError::QemuSocket)?;
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
                self.back.end_writing();
                Ok(())
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamBack" }),
        }
    }

    async fn close(self, closer: &Closer, error: Option<&EngineError>) {
        let Some(error) = error else {
            // What is under way when a session is closed is lost.
            let _lost_contact = self.link.finish(TOLD_WITHIN).await;
            return closer.close(close_code::DONE, "done").await;
        };
        let (code, text) = (error.abort_code(), messages::text(&error.tell()));
        let told = async {
            self.link.send(Message::Abort(Abort { code, text: text.clone() })).await?;
            self.link.finish(TOLD_WITHIN).await
        };
        let _lost_contact_is_noticed_there = tokio::time::timeout(TOLD_WITHIN, told).await;
        closer.close(close_code::ABORTED, &text).await;
    }
}

/// The answer to a sync.
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

/// Returns when the reading has failed; if it ends well, never.
async fn failed(reading: &mut JoinHandle<Read>, read: &mut Option<Read>) {
    let ended = reading
        .await
        .unwrap_or_else(|error| (Taken::default(), Err(EngineError::Internal(error.to_string()))));
    let is_well = ended.1.is_ok();
    *read = Some(ended);
    if is_well {
        std::future::pending::<()>().await;
    }
}
