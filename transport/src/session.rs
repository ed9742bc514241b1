//! The session, and connecting as a client.
//!
//! ```text
//! client                                        server
//!   control connection, bidirectional stream
//!   Offer ------------------------------------->
//!         <------------------------------------- Select (or Reject)
//!   lane connections: QUIC with a unidirectional stream, or TCP with TLS, or both
//!   greeting with Select's token on each ------>
//!         <------------------------------------- Joined, when all lanes are there
//! ```
//!
//! Every connection has its own socket at the client. At the server, lanes over TCP have the port
//! number of the others. Where both kinds are wanted, the client finds out before its offer whether
//! TCP gets through, and offers QUIC alone if it does not. The server holds several sockets on one
//! port; which of them a connection reaches does not matter.

use std::net::SocketAddr;

use quinn::Connection;

use crate::closer::Closer;
use crate::control::{ControlReceiver, ControlSender, PLACE, Reader, StreamError, Writer};
use crate::dial::{Dialler, assemble};
use crate::error::{TransportError, close_code, connection_error};
use crate::identity::{Identity, certified_name};
use crate::lane::{LaneReceiver, LaneSender};
use crate::lane_stream::Inlet;
use crate::messages::{FEATURES_OF_TRANSPORT, Intent, Message, MigrationId, Offer, Select};
use crate::options::{LaneKind, Options};
use crate::tcp::TcpIn;

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// The host name in its certificate, which its authority and ours vouches for.
    pub name: String,
    /// Its address on the control connection.
    pub addr: SocketAddr,
}

/// What both ends agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// The protocol's version.
    pub version: u16,
    /// Optional features that both ends can use, as bits; without the transport's own.
    pub features: u64,
}

impl Selection {
    pub(crate) fn of(select: &Select) -> Self {
        let features = select.features & !FEATURES_OF_TRANSPORT;
        Self { version: select.version, features }
    }
}

/// A complete session. Its parts may be taken out and moved into tasks; the connections close when
/// all parts are dropped, or for all parts at once by [`Closer::close_now`].
#[derive(Debug)]
pub struct Session<L> {
    /// Sends control messages.
    pub control_sender: ControlSender,
    /// Receives control messages.
    pub control_receiver: ControlReceiver,
    /// The lanes in order; none for [`Intent::Ask`].
    pub lanes: Vec<L>,
    /// Who is at the other end.
    pub peer: PeerInfo,
    /// What both ends agreed on.
    pub selected: Selection,
    /// What the client wanted.
    pub intent: Intent,
    /// The migration that the session is about.
    pub migration: MigrationId,
    /// Name and version of the client's engine, as it says.
    pub engine: String,
    /// Closes and measures the session.
    pub closer: Closer,
}

/// The session at the client.
pub type SourceSession = Session<LaneSender>;

/// The session at the server.
pub type DestinationSession = Session<LaneReceiver>;

/// Makes a session with the listener at `addr`. The offer's lanes and features are set from the
/// options.
///
/// # Errors
/// [`TransportError`]: what is wrong at this end, at the other, or between them. Nothing is left
/// open. May be cancelled.
pub async fn connect(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    offer: Offer,
) -> Result<SourceSession, TransportError> {
    options.check()?;
    let mut offer = offer;
    let kind = match offer.intent {
        Intent::Migrate | Intent::Resume => options.lane_kind,
        Intent::Ask => LaneKind::Quic,
    };
    offer.features = options.features | kind.feature();
    offer.lanes = match offer.intent {
        Intent::Migrate | Intent::Resume => u16::try_from(options.lanes).unwrap_or(u16::MAX),
        Intent::Ask => 0,
    };
    Message::Offer(offer.clone()).validate().map_err(TransportError::Refused)?;

    let mut waiting_for = "an answer to the first packet";
    let joined = join(addr, identity, options, offer, &mut waiting_for);
    match tokio::time::timeout(options.handshake_timeout, joined).await {
        Ok(session) => session,
        Err(_elapsed) => {
            let after = options.handshake_timeout;
            Err(TransportError::HandshakeTimeout { peer: addr, after, waiting_for })
        }
    }
}

async fn join(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    mut offer: Offer,
    waiting_for: &mut &'static str,
) -> Result<SourceSession, TransportError> {
    let dialler = Dialler::new(addr, identity, options)?;
    let wanted = LaneKind::selected(offer.features);
    let (control, early) = dialler.control(wanted).await?;
    if wanted == LaneKind::Auto && early.is_none() {
        offer.features &= !wanted.feature();
    }
    *waiting_for = "the answer to the offer";
    let failed = |error: StreamError| handshake_error(&control.connection, error);
    let lost = |error| connection_error(addr, error, None);
    let (send, receive) = control.connection.open_bi().await.map_err(lost)?;
    let (mut writer, mut reader) = (Writer::new(send), Reader::new(receive));
    writer.write(&Message::Offer(offer.clone())).await.map_err(failed)?;
    let select = match reader.read().await.map_err(failed)? {
        Message::Select(select) => check_select(addr, &offer, select)?,
        Message::Reject(reject) => {
            let (code, text) = (reject.code, reject.text);
            return Err(TransportError::Rejected { peer: addr, code, text });
        }
        other => return Err(unexpected(addr, "Select or Reject", &other)),
    };
    let kind = LaneKind::selected(select.features);
    if wanted == LaneKind::Tcp && kind != wanted {
        return Err(TransportError::LaneKind { peer: addr });
    }

    *waiting_for = "a lane";
    let lanes = dialler.lanes(&select, kind, early, &control.connection).await?;
    *waiting_for = "word that all lanes have arrived";
    match reader.read().await.map_err(failed)? {
        Message::Joined(joined) if joined.lanes == select.lanes => {}
        other => return Err(unexpected(addr, "Joined with all lanes", &other)),
    }
    let peer = peer_info(&control.connection)?;
    let (lanes, closer) = assemble(control, kind, lanes, options);
    Ok(Session {
        control_sender: ControlSender::new(writer, closer.clone()),
        control_receiver: ControlReceiver::new(reader, closer.clone()),
        lanes,
        peer,
        selected: Selection::of(&select),
        intent: offer.intent,
        migration: offer.migration,
        engine: offer.engine,
        closer,
    })
}

fn check_select(peer: SocketAddr, offer: &Offer, select: Select) -> Result<Select, TransportError> {
    let lanes_fit = match offer.intent {
        Intent::Migrate | Intent::Resume => (1..=offer.lanes).contains(&select.lanes),
        Intent::Ask => select.lanes == 0,
    };
    if !offer.versions.contains(&select.version)
        || select.features & !offer.features != 0
        || !lanes_fit
    {
        return Err(TransportError::Unexpected {
            peer,
            expected: "a selection out of what was offered",
            found: format!(
                "version {}, features {:#x}, {} lanes",
                select.version, select.features, select.lanes
            ),
        });
    }
    Ok(select)
}

/// An error before there is a session. A peer that broke the protocol is told so.
pub(crate) fn handshake_error(connection: &Connection, error: StreamError) -> TransportError {
    let peer = connection.remote_address();
    match error {
        StreamError::Wire(source) => {
            let reason = format!("{PLACE}: {source}");
            connection.close(quinn::VarInt::from_u32(close_code::PROTOCOL), reason.as_bytes());
            TransportError::Wire { peer, place: PLACE.into(), source }
        }
        StreamError::Lost(error) => connection_error(peer, error, None),
        StreamError::Broken(source) => TransportError::LaneConnect { peer, source },
        // The reason of the connection's end says more than a stream's.
        StreamError::Ended | StreamError::Cut(_) | StreamError::Interrupted => {
            match connection.close_reason() {
                Some(reason) => connection_error(peer, reason, None),
                None => TransportError::Ended { peer },
            }
        }
        StreamError::Refused(source) => TransportError::Refused(source),
    }
}

pub(crate) fn unexpected(
    peer: SocketAddr,
    expected: &'static str,
    found: &Message,
) -> TransportError {
    TransportError::Unexpected { peer, expected, found: found.name().into() }
}

/// The peer's own certificate, as verified in the handshake.
pub(crate) fn certificate(
    connection: &Connection,
) -> Option<rustls::pki_types::CertificateDer<'static>> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok()?;
    chain.into_iter().next()
}

/// Who is at the other end of a connection.
pub(crate) fn peer_info(connection: &Connection) -> Result<PeerInfo, TransportError> {
    let addr = connection.remote_address();
    let name = certificate(connection).as_ref().and_then(certified_name);
    match name {
        Some(name) => Ok(PeerInfo { name, addr }),
        None => Err(TransportError::Unexpected {
            peer: addr,
            expected: "a certificate with a host name",
            found: "one without".into(),
        }),
    }
}

/// Puts a session together at the server.
pub(crate) fn destination(
    writer: Writer,
    reader: Reader,
    streams: Vec<(Inlet, Option<Box<TcpIn>>)>,
    offer: Offer,
    selected: Selection,
    peer: PeerInfo,
    closer: Closer,
) -> DestinationSession {
    Session {
        control_sender: ControlSender::new(writer, closer.clone()),
        control_receiver: ControlReceiver::new(reader, closer.clone()),
        lanes: streams
            .into_iter()
            .enumerate()
            .map(|(lane, (stream, next))| LaneReceiver::new(stream, next, lane, closer.clone()))
            .collect(),
        peer,
        selected,
        intent: offer.intent,
        migration: offer.migration,
        engine: offer.engine,
        closer,
    }
}

impl<L> Session<L> {
    /// Closes all connections with a code and a text for the peer; waits a moment for it to hear.
    pub async fn close(&self, code: u32, text: &str) {
        self.closer.close(code, text).await;
    }

    /// UDP and TCP payload bytes over all connections so far.
    pub fn wire_bytes(&self) -> crate::WireBytes {
        self.closer.wire_bytes()
    }
}
