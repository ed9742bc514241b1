//! A pair of proxies for migrations that somebody else drives: plain QEMU, libvirt, whatever is built on them.
//!
//! ```text
//!   QEMU ══ its stream ══► gateway source ══ pages: lanes; the rest: control ══► gateway destination ══ its stream ══► QEMU
//!        ◄══════════════════════════════ return path: control ══════════════════════════════════════
//! ```
//!
//! The source's gateway takes QEMU's stream apart ([`intake`]), sends pages as an ordinary migration does, packed, as
//! deltas and encrypted, and everything else in its order; that at the destination writes a stream of them for its QEMU
//! ([`sink`]). Neither QEMU knows: when a connection ends early, both see theirs end, and decide as ever who has the guest.
//!
//! Post-copy is the QEMUs' own decision, too; so is `postcopy-preempt`, whose second connection is passed on beside the
//! first, and a recovery after a broken connection ([`channels`], [`raw`]). Once the guest is handed over, the source's gateway
//! reads the return path along ([`requests`]), pages that the guest waits for overtake ([`backlog`]), and little else is
//! under way ([`postcopy`]).
//!
//! Invariants: no byte of the stream is written at the destination before the pages that came before it; of a page
//! versions arrive in the stream's order; device state leaves when all pages are confirmed; after the commands of post-copy no
//! page leaves before these were written; what is under way is bounded, so that QEMU's own estimate of the bandwidth is
//! that of the link.

pub mod addr;
pub mod backlog;
pub mod channels;
pub mod delivery;
pub mod destination;
pub mod encode;
pub mod ends;
pub mod intake;
pub mod lasting;
pub mod listen;
mod metrics;
pub mod passage;
pub mod postcopy;
pub mod raw;
pub mod report;
pub mod requests;
pub mod sink;
pub mod socket;
pub mod source;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use transport::messages::{FEATURE_STREAM, FEATURE_STREAM_RESUME, Intent};
use transport::{DestinationSession, Identity, Listener, Options, TransportError, close_code};

use self::addr::QemuAddr;
use self::channels::{Arrival, Channels};
use self::destination::{Lasting, Received};
use self::lasting::Awaited;
use self::listen::{Connected, QemuListener};
use self::metrics::{Passing, Side};
use self::passage::Packing;
use self::source::Onward;
use crate::args::{GatewayArgs, GatewayDestinationArgs, GatewaySourceArgs};
use crate::blocking::worker_threads;
use crate::error::EngineError;
use crate::source::prepare;
use crate::{cancel, http, tell};

/// What whoever comes is told while there are as many as may be.
const TOO_MANY: &str =
    "as many guests as --guests-max allows are under way; try again later, or allow more";

/// Pause after a connection could not be accepted.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Passes on the guests of QEMUs that connect here, until the user wants out.
///
/// # Errors
/// What keeps it from beginning, with the remedy.
pub async fn source(args: &GatewaySourceArgs) -> Result<(), EngineError> {
    let identity = Arc::new(Identity::load(&args.common.identity)?);
    let lanes = args.lane_count.map_or_else(worker_threads, usize::from);
    let onward = Onward {
        addr: prepare::resolve_address(&args.to).await?,
        identity,
        options: Options {
            lanes,
            lane_kind: args.lanes.kind(),
            expected_peer: args.peer.clone(),
            ..options(&args.common)
        },
        packing: Packing {
            max_bandwidth: args.max_bandwidth,
            wanted: args.compression.wanted(),
            delta_bytes_max: args.delta_cache,
            unused: None,
        },
        reconnect: Duration::from_secs(args.common.reconnect_s),
    };
    let passing = Passing::new(Side::Source);
    tell_metrics(&args.common, &passing).await?;
    let listener = QemuListener::bind(&args.listen, args.socket_mode).await?;
    let listens: Vec<String> = args.listen.iter().map(ToString::to_string).collect();
    // Scripts wait for this line.
    tell!("listening on {}", listens.join(", "));
    let (mut guests, channels) = (JoinSet::new(), Arc::new(Channels::default()));
    let mut requests = cancel::Requests::watch();
    loop {
        let connected = tokio::select! {
            connected = listener.accept() => connected,
            Some(_) = guests.join_next() => continue,
            () = requests.next() => break,
        };
        match connected {
            Ok(connected) if guests.len() >= usize::from(args.common.guests_max) => {
                tell!("{}: {TOO_MANY}", connected.name);
                connected.socket.cut();
            }
            Ok(connected) => {
                let arrival = channels.arrive(&connected);
                let (onward, passing) = (onward.clone(), passing.clone());
                guests.spawn(pass_on(onward, connected, arrival, passing, args.json));
            }
            Err(error) => {
                tracing::warn!(%error, "a QEMU was not accepted");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
    drop(listener);
    wind_up(guests, requests).await
}

async fn pass_on(
    onward: Onward,
    connected: Connected,
    arrival: Arrival,
    passing: Passing,
    json: bool,
) {
    let under_way = passing.begin();
    let report = source::send(&onward, connected, arrival).await;
    tell!("{}", report.line());
    if json && let Ok(line) = serde_json::to_string(&report) {
        let _nobody_reads_it = writeln!(std::io::stdout(), "{line}");
    }
    // Who sees that nothing is under way finds all reports.
    under_way.end(&report);
}

/// Hands guests that other gateways send to the QEMUs that wait for them, until the user wants out.
///
/// # Errors
/// As [`source()`].
pub async fn destination(args: &GatewayDestinationArgs) -> Result<(), EngineError> {
    let identity = Identity::load(&args.common.identity)?;
    let default = Options::default();
    let options =
        Options { lanes: default.lanes, expected_peer: args.peer.clone(), ..options(&args.common) };
    let passing = Passing::new(Side::Destination);
    tell_metrics(&args.common, &passing).await?;
    let mut listener = Listener::bind(args.listen, &identity, &options)?;
    // Scripts wait for this line.
    tell!("listening on {}", listener.local_addr());
    let within = Duration::from_secs(args.common.reconnect_s);
    let lasting = Lasting { awaited: Awaited::default(), within };
    let (mut guests, mut resuming) = (JoinSet::new(), JoinSet::new());
    let mut requests = cancel::Requests::watch();
    loop {
        let session = tokio::select! {
            session = listener.accept() => session,
            Some(_) = guests.join_next() => continue,
            Some(()) = async { resuming.join_next().await.map(drop) } => continue,
            () = requests.next() => break,
        };
        match session {
            Ok(session) if session.intent == Intent::Resume => {
                let awaited = lasting.awaited.clone();
                resuming.spawn(async move { awaited.hand_over(session).await });
            }
            Ok(session) if guests.len() >= usize::from(args.common.guests_max) => {
                tell!("from {}: {TOO_MANY}", session.peer.name);
                session.close(close_code::REJECTED, TOO_MANY).await;
            }
            Ok(session) if session.intent == Intent::Migrate => {
                let (qemu, passing) = (args.qemu.clone(), passing.clone());
                guests.spawn(take_in(session, qemu, lasting.clone(), passing));
            }
            Ok(session) => session.close(close_code::REJECTED, "this is a gateway").await,
            Err(error @ TransportError::ListenerEnded) => {
                wind_up(guests, requests).await?;
                return Err(error.into());
            }
            Err(error) => tell!("refused: {}", EngineError::from(error).tell()),
        }
    }
    // Guests that are under way may lose their sessions yet.
    let take_up = async {
        while let Ok(session) = listener.accept().await {
            match session.intent {
                Intent::Resume => lasting.awaited.hand_over(session).await,
                _ => session.close(close_code::REJECTED, "this gateway is about to end").await,
            }
        }
    };
    tokio::select! {
        ended = wind_up(guests, requests) => ended,
        () = take_up => Err(TransportError::ListenerEnded.into()),
    }
}

async fn take_in(session: DestinationSession, qemu: QemuAddr, lasting: Lasting, passing: Passing) {
    let from = session.peer.name.clone();
    let under_way = passing.begin();
    let Received { taken, wire_bytes, reconnects } =
        destination::receive(session, &qemu, &lasting).await;
    under_way.end_with(wire_bytes, reconnects, taken.is_ok());
    match taken {
        Ok(()) => tell!("a guest from {from} was handed to its QEMU"),
        Err(error) => tell!("a guest from {from} did not arrive: {}", error.tell()),
    }
}

fn options(args: &GatewayArgs) -> Options {
    Options {
        dead_peer: Duration::from_secs(args.dead_peer_s),
        features: match args.reconnect_s {
            0 => FEATURE_STREAM,
            _ => FEATURE_STREAM | FEATURE_STREAM_RESUME,
        },
        ..Options::default()
    }
}

async fn tell_metrics(args: &GatewayArgs, passing: &Passing) -> Result<(), EngineError> {
    if let Some(http) = http::bind_if(args.metrics).await? {
        let passing = passing.clone();
        http.begin(move || passing.text());
    }
    Ok(())
}

/// Waits for guests that are under way, unless the user wants out once more.
///
/// # Errors
/// [`EngineError::Cancelled`] if guests were given up.
async fn wind_up(
    mut guests: JoinSet<()>,
    mut requests: cancel::Requests,
) -> Result<(), EngineError> {
    if guests.is_empty() {
        return Ok(());
    }
    tell!(
        "{} guests are under way: waiting for them; interrupt again to give them up",
        guests.len()
    );
    tokio::select! {
        () = async { while guests.join_next().await.is_some() {} } => Ok(()),
        () = requests.next() => {
            // Their QEMUs see the connections end.
            tell!("{} guests were given up; `query-migrate` at their QEMUs says where they run", guests.len());
            guests.shutdown().await;
            Err(EngineError::Cancelled)
        }
    }
}
