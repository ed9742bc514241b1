//! One guest's way out of here: from its QEMU to the other gateway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::codec_choice::Wanted;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::messages::{
    self, Abort, FEATURE_STREAM, Intent, Message, StreamBlocks, StreamBytes, StreamEnd, StreamOpen,
    Sync,
};
use transport::{Closer, Identity, Offer, Options, SourceSession, close_code};

use super::intake::{Item, StreamIntake, Taken, Way};
use super::report::GatewayReport;
use super::socket::{Connected, QemuSocket};
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
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// Longest wait until a last word is on its way.
const ABORT_WITHIN: Duration = Duration::from_secs(2);

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

/// Takes a guest from a QEMU that has connected; everything that happens is in the report.
pub async fn send(onward: &Onward, connected: Connected) -> GatewayReport {
    let clock = Instant::now();
    let mut report = GatewayReport::begin(&connected.name);
    let moved = Box::pin(run(onward, &connected, &mut report, clock)).await;
    // A QEMU that has not ended its connection sees here that nothing comes of it, and lets its guest run on.
    connected.socket.cut();
    report.end(moved.as_ref().err(), clock.elapsed());
    report
}

async fn run(
    onward: &Onward,
    connected: &Connected,
    report: &mut GatewayReport,
    clock: Instant,
) -> Result<(), EngineError> {
    let migration = prepare::new_migration()?;
    let offer = Offer::new(ENGINE, migration, Intent::Migrate);
    let session = transport::connect(onward.addr, &onward.identity, &onward.options, offer).await?;
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
    };
    let mut passage = Passage {
        link,
        back: connected.socket.another().map_err(EngineError::QemuSocket)?,
        digests: Default::default(),
        is_sent: false,
        is_answered: false,
    };
    let moved = passage.pass(connected, way).await;
    gate.close();
    lanes.stop().await;
    let (taken, moved) = match moved {
        Ok((taken, moved)) => (taken, moved),
        Err(error) => (Taken::default(), Err(error)),
    };
    let wire = closer.stats().wire;
    report.note(&taken, wire.sent + wire.received);
    passage.close(&closer, moved.as_ref().err()).await;
    moved
}

/// A stream on its way, and what comes back.
struct Passage {
    link: Link,
    /// The source's QEMU, to write to.
    back: QemuSocket,
    /// What the other gateway has to say of each sync.
    digests: std::collections::HashMap<u32, u64>,
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
        way: Way,
    ) -> Result<(Taken, Result<(), EngineError>), EngineError> {
        let Message::StreamOpened(_) = self.open(connected).await? else {
            return Err(EngineError::Internal("the gateway there did not open".into()));
        };
        let (items, mut inbox) = mpsc::channel(ITEMS);
        let socket = connected.socket.another().map_err(EngineError::QemuSocket)?;
        let reading: JoinHandle<_> = tokio::task::spawn_blocking(move || {
            let mut intake = StreamIntake::new(items, way);
            let read = intake.run(&socket);
            (intake.taken(), read)
        });
        let passed = self.exchange(&mut inbox).await;
        drop(inbox);
        if passed.is_err() {
            connected.socket.cut();
        }
        let (taken, read) =
            reading.await.map_err(|error| EngineError::Internal(error.to_string()))?;
        // What ended the reading comes first, unless that was the end of the session.
        let moved = match (passed, read) {
            (Err(error), Ok(()) | Err(EngineError::Cancelled | EngineError::QemuSocket(_))) => {
                Err(error)
            }
            (_, read) => read,
        };
        Ok((taken, moved))
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
            let answered = self.is_answered;
            tokio::select! {
                item = inbox.recv(), if !self.is_sent => match item {
                    Some(item) => self.send(item, &mut sequence).await?,
                    // The reading has ended, with an error of its own.
                    None => return Err(EngineError::Cancelled),
                },
                message = self.link.recv() => self.hear(message?).await?,
                () = tokio::time::sleep(ENDS_WITHIN), if answered => {
                    return Err(EngineError::TooSlow {
                        wanted: "the end of the stream, after the QEMU at the destination had ended it",
                        seconds: ENDS_WITHIN.as_secs(),
                    });
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
            Item::Sync(batches, digest) => {
                *sequence = sequence.wrapping_add(1);
                self.digests.insert(*sequence, digest);
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
                let socket = self.back.another().map_err(EngineError::QemuSocket)?;
                let written =
                    on_thread(move || std::io::Write::write_all(&mut &socket, &back.bytes));
                written.await?.map_err(EngineError::QemuSocket)
            }
            Message::Synced(synced) => match self.digests.remove(&synced.sequence) {
                Some(digest) if digest == synced.version_digest => Ok(()),
                _ => Err(EngineError::Contradiction(
                    "that other pages are in place than were sent".into(),
                )),
            },
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
            return closer.close(close_code::DONE, "done").await;
        };
        let (code, text) = (error.abort_code(), messages::text(&error.tell()));
        let told = self.link.send(Message::Abort(Abort { code, text: text.clone() }));
        let _lost_contact_is_noticed_there = tokio::time::timeout(ABORT_WITHIN, told).await;
        closer.close(close_code::ABORTED, &text).await;
    }
}
