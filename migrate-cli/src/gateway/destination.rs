//! One guest's way in: from the other gateway to the QEMU that waits for it here.

use std::time::Duration;

use transport::messages::{
    self, FEATURE_STREAM, FEATURE_STREAM_RESUME, Message, Refuse, RefuseCode, StreamOpen,
    StreamOpened,
};
use transport::{Closer, ControlSender, DestinationSession, close_code};

use super::addr::QemuAddr;
use super::delivery::Delivery;
use super::ends::Ends;
use super::lasting::{Arriving, Awaited};
use super::socket::{self, QemuSocket};
use crate::error::EngineError;

/// Longest wait for the first word.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Longest wait for a QEMU to listen: who starts it may be about to.
const REACHED_WITHIN: Duration = Duration::from_secs(10);

/// Streams whose lost sessions are replaced.
#[derive(Debug, Clone)]
pub struct Lasting {
    /// All of this gateway's.
    pub awaited: Awaited,
    /// How long another session is waited for.
    pub within: Duration,
}

/// What became of a guest.
#[derive(Debug)]
pub struct Received {
    /// What kept it from being handed to its QEMU in good order.
    pub taken: Result<(), EngineError>,
    /// Payload bytes in both directions.
    pub wire_bytes: u64,
    /// How often its session was replaced.
    pub reconnects: u64,
}

/// Takes a guest in.
pub async fn receive(session: DestinationSession, qemu: &QemuAddr, lasting: &Lasting) -> Received {
    let (closer, sender) = (session.closer.clone(), session.control_sender.clone());
    let (mut wire_bytes, mut reconnects) = (None, 0);
    let taken = match Box::pin(open(session, qemu, lasting)).await {
        Err(error) => Err(error),
        Ok(Opened { delivery, way: Way::One(session) }) => pass(delivery, session).await,
        Ok(Opened { mut delivery, way: Way::Lasting(mut arriving) }) => {
            let taken = delivery.pass(Ends::Lasting(&mut arriving)).await;
            // The QEMU here sees the end at once.
            drop(delivery);
            arriving.close(taken.as_ref().err()).await;
            (wire_bytes, reconnects) = (Some(arriving.wire_bytes()), arriving.reconnects());
            taken
        }
    };
    if wire_bytes.is_none() {
        close(&sender, &closer, &taken).await;
    }
    let wire = closer.stats().wire;
    let wire_bytes = wire_bytes.unwrap_or(wire.sent + wire.received);
    Received { taken, wire_bytes, reconnects }
}

async fn close(sender: &ControlSender, closer: &Closer, taken: &Result<(), EngineError>) {
    match taken {
        Ok(()) => {
            // The other gateway closes once it has heard the last word.
            let _closed = tokio::time::timeout(OPEN_WITHIN, closer.closed()).await;
        }
        Err(EngineError::Refused { code, text }) => {
            let refuse = Refuse { code: *code, text: messages::text(text) };
            let _gone = sender.send(&Message::Refuse(refuse)).await;
            let _closed = tokio::time::timeout(OPEN_WITHIN, closer.closed()).await;
        }
        Err(error) => {
            let (code, text) = (error.abort_code(), messages::text(&error.tell()));
            let abort = messages::Abort { code, text: text.clone() };
            let _gone = sender.send(&Message::Abort(abort)).await;
            closer.close(close_code::ABORTED, &text).await;
        }
    }
}

/// What a stream comes by.
enum Way {
    One(Box<DestinationSession>),
    Lasting(Box<Arriving>),
}

/// A guest's way, with its QEMU at the end.
struct Opened {
    delivery: Delivery,
    way: Way,
}

async fn open(
    mut session: DestinationSession,
    qemu: &QemuAddr,
    lasting: &Lasting,
) -> Result<Opened, EngineError> {
    let open = opened(&mut session).await?;
    let can_last = session.selected.features & FEATURE_STREAM_RESUME != 0;
    let place = match can_last.then(|| lasting.awaited.enter(&session)) {
        Some(None) => {
            let text = "this migration is under way already".into();
            return Err(EngineError::Refused { code: RefuseCode::Busy, text });
        }
        place => place.flatten(),
    };
    let socket = tokio::select! {
        reached = reach(qemu, &open) => reached?,
        // A QEMU that begins to listen for another guest is not taken.
        lost = session.closer.closed() => return Err(lost.into()),
    };
    tracing::info!(name = open.name, port = open.port, "a guest comes in");
    let delivery = Delivery::new(socket)?;
    session.control_sender.send(&Message::StreamOpened(StreamOpened {})).await?;
    let way = match place {
        Some(place) => Way::Lasting(Box::new(Arriving::start(session, place, lasting.within))),
        None => Way::One(Box::new(session)),
    };
    Ok(Opened { delivery, way })
}

async fn pass(mut delivery: Delivery, session: Box<DestinationSession>) -> Result<(), EngineError> {
    let DestinationSession { lanes, control_sender, mut control_receiver, closer, .. } = *session;
    delivery.pass(Ends::one(lanes, control_sender, &mut control_receiver, closer)).await
}

async fn opened(session: &mut DestinationSession) -> Result<StreamOpen, EngineError> {
    let first = tokio::time::timeout(OPEN_WITHIN, session.control_receiver.recv()).await;
    let late = |_| EngineError::TooSlow {
        wanted: "a word about the guest",
        seconds: OPEN_WITHIN.as_secs(),
    };
    match first.map_err(late)?? {
        Message::StreamOpen(open) if session.selected.features & FEATURE_STREAM != 0 => Ok(open),
        _ => Err(EngineError::Refused {
            code: RefuseCode::NoPlace,
            text:
                "this is a gateway: start `migrate receive` for `migrate send` and `migrate split`"
                    .into(),
        }),
    }
}

async fn reach(qemu: &QemuAddr, open: &StreamOpen) -> Result<QemuSocket, EngineError> {
    let refuse = |text| Err(EngineError::Refused { code: RefuseCode::NoPlace, text });
    let Some(port) = qemu.port_for(open.port) else {
        return refuse(match open.port {
            0 => format!(
                "the source's QEMU uses a Unix socket: name the port of the one here, --qemu {qemu}:PORT"
            ),
            port => format!("port {port} is none of --qemu {qemu}"),
        });
    };
    match socket::connect(qemu, port, REACHED_WITHIN).await {
        Ok(socket) => Ok(socket),
        Err(error) => refuse(format!("no QEMU listens at {qemu}, port {port}: {error}")),
    }
}
