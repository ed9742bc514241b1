//! One guest's way out of here: from its QEMU to the other gateway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::messages::{
    self, Abort, FEATURE_STREAM, FEATURE_STREAM_RESUME, Message, StreamOpen,
};
use transport::{Closer, ControlSender, Identity, Options, SourceSession, close_code};

use super::channels::{Arrival, Kind};
use super::lasting::{Again, Leaving};
use super::listen::Connected;
use super::passage::{Lanes, Packing, Passage};
use super::report::GatewayReport;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::source::gate::Gate;
use crate::source::lanes::LaneTasks;
use crate::source::link::Link;
use crate::source::prepare;

/// What is to run at the other end.
const THERE: &str = "migrate gateway destination";

/// Longest wait for the other gateway to reach its QEMU.
const OPENED_WITHIN: Duration = Duration::from_secs(30);

/// Longest wait until a last word is there.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

/// Where guests go and how.
#[derive(Debug, Clone)]
pub struct Onward {
    /// The other gateway.
    pub addr: SocketAddr,
    /// Our identity.
    pub identity: Arc<Identity>,
    /// Session options.
    pub options: Options,
    /// How pages are packed, and how fast they leave.
    pub packing: Packing,
    /// How long a lost session is tried to be replaced.
    pub reconnect: Duration,
}

/// Takes a guest from a QEMU that has connected, `arrival` among others; everything that happens is in the report.
pub async fn send(onward: &Onward, connected: Connected, mut arrival: Arrival) -> GatewayReport {
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
    let (addr, migration) = (onward.addr, prepare::new_migration()?);
    let mut session =
        prepare::connect(addr, &onward.identity, &onward.options, migration, THERE).await?;
    if session.selected.features & FEATURE_STREAM == 0 {
        let error = EngineError::Misuse {
            what: format!("What listens at {addr} is no gateway"),
            remedy: format!("Start `{THERE}` there"),
        };
        session.close(close_code::ABORTED, &error.tell()).await;
        return Err(error);
    }
    if let Err(error) = open(&mut session, connected).await {
        close(&session.control_sender, &session.closer, Some(&error)).await;
        return Err(error);
    }
    arrival.opened(kind);
    let gate = Arc::new(Gate::new(onward.packing.max_bandwidth));
    let round_trip = session.closer.rtt();
    let (way, mut link, tasks) = begin(onward, session, &gate, clock, &report.name);
    let lanes = Lanes { tasks, gate, round_trip };
    let socket = connected.socket.another().map_err(EngineError::QemuSocket)?;
    let mut passage = Passage::new(&onward.packing, lanes, socket, arrival.beside());
    let (taken, moved) = passage.pass(&mut link, kind).await;
    passage.stop().await;
    way.close(moved.as_ref().err()).await;
    let (wire_bytes, reconnects) = way.tally();
    report.note(&taken, wire_bytes, reconnects);
    moved
}

/// The session that a stream goes by, or all of them.
enum Way {
    One(ControlSender, Closer),
    Lasting(Leaving),
}

fn begin(
    onward: &Onward,
    session: SourceSession,
    gate: &Arc<Gate>,
    clock: Instant,
    name: &str,
) -> (Way, Link, LaneTasks) {
    if session.selected.features & FEATURE_STREAM_RESUME != 0 {
        let again = Again {
            name: name.to_owned(),
            addr: onward.addr,
            identity: Arc::clone(&onward.identity),
            options: onward.options.clone(),
            migration: session.migration,
            within: onward.reconnect,
        };
        let (leaving, link, tasks) = Leaving::start(session, again, Arc::clone(gate), clock);
        return (Way::Lasting(leaving), link, tasks);
    }
    let SourceSession { control_sender, control_receiver, lanes, closer, .. } = session;
    let way = Way::One(control_sender.clone(), closer);
    let link = Link::start(control_sender, control_receiver, Arc::clone(gate), clock);
    (way, link, LaneTasks::start(lanes))
}

impl Way {
    /// To be called while there is the link.
    async fn close(&self, error: Option<&EngineError>) {
        match self {
            Self::One(sender, closer) => close(sender, closer, error).await,
            Self::Lasting(leaving) => leaving.close(error).await,
        }
    }

    /// Payload bytes, and how often the session was replaced.
    fn tally(&self) -> (u64, u64) {
        match self {
            Self::One(_, closer) => {
                let wire = closer.stats().wire;
                (wire.sent + wire.received, 0)
            }
            Self::Lasting(leaving) => (leaving.wire_bytes(), leaving.reconnects()),
        }
    }
}

/// What the connection is for, once that is known.
async fn kind(connected: &Connected, arrival: &mut Arrival) -> Result<Kind, EngineError> {
    let socket = connected.socket.another().map_err(EngineError::QemuSocket)?;
    let beside = arrival.beside();
    let kind = on_thread(move || beside.kind(&socket)).await??;
    arrival.is(kind);
    Ok(kind)
}

/// Has the other gateway connect to its QEMU.
async fn open(session: &mut SourceSession, connected: &Connected) -> Result<(), EngineError> {
    let (name, port) = (messages::text(&connected.name), connected.port);
    session.control_sender.send(&Message::StreamOpen(StreamOpen { name, port })).await?;
    let answer = tokio::time::timeout(OPENED_WITHIN, session.control_receiver.recv()).await;
    let late = |_| EngineError::TooSlow {
        wanted: "that its QEMU is connected",
        seconds: OPENED_WITHIN.as_secs(),
    };
    match answer.map_err(late)?? {
        Message::Refuse(refuse) => {
            Err(EngineError::Refused { code: refuse.code, text: refuse.text })
        }
        Message::Abort(abort) => {
            Err(EngineError::PeerAborted { code: abort.code, text: abort.text })
        }
        Message::StreamOpened(_) => Ok(()),
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamOpened" }),
    }
}

async fn close(sender: &ControlSender, closer: &Closer, error: Option<&EngineError>) {
    let Some(error) = error else {
        // What is under way when a session is closed is lost.
        let _lost_contact = sender.finish(TOLD_WITHIN).await;
        return closer.close(close_code::DONE, "done").await;
    };
    let (code, text) = (error.abort_code(), messages::text(&error.tell()));
    let told = async {
        sender.send(&Message::Abort(Abort { code, text: text.clone() })).await?;
        sender.finish(TOLD_WITHIN).await
    };
    let _lost_contact_is_noticed_there = tokio::time::timeout(TOLD_WITHIN, told).await;
    closer.close(close_code::ABORTED, &text).await;
}
