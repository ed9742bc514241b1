//! One guest's way in: from the other gateway to the QEMU that waits for it here.

use std::time::Duration;

use transport::messages::{
    self, FEATURE_STREAM, Message, Refuse, RefuseCode, StreamOpen, StreamOpened,
};
use transport::{DestinationSession, close_code};

use super::addr::QemuAddr;
use super::delivery::Delivery;
use super::socket::{self, QemuSocket};
use crate::error::EngineError;

/// Longest wait for the first word.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Longest wait for a QEMU to listen: who starts it may be about to.
const REACHED_WITHIN: Duration = Duration::from_secs(10);

/// Takes a guest in; what went wrong.
///
/// # Errors
/// Anything that kept it from being handed to its QEMU in good order.
pub async fn receive(session: DestinationSession, qemu: &QemuAddr) -> Result<(), EngineError> {
    let (closer, sender) = (session.closer.clone(), session.control_sender.clone());
    let taken = Box::pin(run(session, qemu)).await;
    match &taken {
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
    taken
}

async fn run(mut session: DestinationSession, qemu: &QemuAddr) -> Result<(), EngineError> {
    let open = opened(&mut session).await?;
    let socket = tokio::select! {
        reached = reach(qemu, &open) => reached?,
        // A QEMU that begins to listen for another guest is not taken.
        lost = session.closer.closed() => return Err(lost.into()),
    };
    tracing::info!(name = open.name, port = open.port, "a guest comes in");
    session.control_sender.send(&Message::StreamOpened(StreamOpened {})).await?;
    let (lanes, sender) = (session.lanes, session.control_sender);
    let mut delivery = Delivery::new(lanes, sender, session.closer, socket)?;
    delivery.pass(&mut session.control_receiver).await
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
