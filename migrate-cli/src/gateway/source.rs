//! One guest's way out of here: from its QEMU to the other gateway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::messages::{self, Abort, FEATURE_STREAM, Message, StreamOpen};
use transport::{Closer, Identity, Options, SourceSession, close_code};

use super::channels::{Arrival, Kind};
use super::intake::Taken;
use super::listen::Connected;
use super::passage::{Lanes, Packing, Passage};
use super::report::GatewayReport;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::source::gate::Gate;
use crate::source::lanes::LaneTasks;
use crate::source::link::Link;
use crate::source::prepare;

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
    let there = "migrate gateway destination";
    let session =
        prepare::connect(addr, &onward.identity, &onward.options, migration, there).await?;
    if session.selected.features & FEATURE_STREAM == 0 {
        let error = EngineError::Misuse {
            what: format!("What listens at {addr} is no gateway"),
            remedy: format!("Start `{there}` there"),
        };
        session.close(close_code::ABORTED, &error.tell()).await;
        return Err(error);
    }
    let SourceSession { control_sender, control_receiver, lanes, closer, .. } = session;
    let gate = Arc::new(Gate::new(onward.packing.max_bandwidth));
    let mut link = Link::start(control_sender, control_receiver, Arc::clone(&gate), clock);
    let lanes = Lanes { tasks: LaneTasks::start(lanes), gate, round_trip: closer.rtt() };
    let socket = connected.socket.another().map_err(EngineError::QemuSocket)?;
    let mut passage = Passage::new(&onward.packing, lanes, socket, arrival.beside());
    let (taken, moved) = match open(&mut link, connected).await {
        Ok(()) => {
            arrival.opened(kind);
            passage.pass(&mut link, kind).await
        }
        Err(error) => (Taken::default(), Err(error)),
    };
    passage.stop().await;
    let wire = closer.stats().wire;
    report.note(&taken, wire.sent + wire.received);
    close(link, &closer, moved.as_ref().err()).await;
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

/// Has the other gateway connect to its QEMU.
async fn open(link: &mut Link, connected: &Connected) -> Result<(), EngineError> {
    let (name, port) = (messages::text(&connected.name), connected.port);
    link.send(Message::StreamOpen(StreamOpen { name, port })).await?;
    match link.recv_within("that its QEMU is connected", OPENED_WITHIN).await? {
        Message::Refuse(refuse) => {
            Err(EngineError::Refused { code: refuse.code, text: refuse.text })
        }
        Message::StreamOpened(_) => Ok(()),
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamOpened" }),
    }
}

async fn close(link: Link, closer: &Closer, error: Option<&EngineError>) {
    let Some(error) = error else {
        // What is under way when a session is closed is lost.
        let _lost_contact = link.finish(TOLD_WITHIN).await;
        return closer.close(close_code::DONE, "done").await;
    };
    let (code, text) = (error.abort_code(), messages::text(&error.tell()));
    let told = async {
        link.send(Message::Abort(Abort { code, text: text.clone() })).await?;
        link.finish(TOLD_WITHIN).await
    };
    let _lost_contact_is_noticed_there = tokio::time::timeout(TOLD_WITHIN, told).await;
    closer.close(close_code::ABORTED, &text).await;
}
