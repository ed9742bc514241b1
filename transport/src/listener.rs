//! Accepting sessions.
//!
//! ```text
//! QUIC -> TLS -> first stream --bidirectional--> Offer -> Select, wait for lanes -> session
//!                    |
//!                    +------- unidirectional --> greeting -> handed to the session that waits
//! TCP  -> TLS ---------------------------------> greeting -> handed to the session that waits
//! ```
//!
//! Every connection has a task of its own with a time limit, and their number is bounded, that of
//! TCP connections by itself; nothing that a client does or leaves undone delays another. Lanes find
//! their session by its token, and must present the same certificate as its control connection.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming, RecvStream, ServerConfig, TokioRuntime, VarInt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::closer::{Closer, Connections};
use crate::control::{Reader, StreamError, Writer, read_exact};
use crate::error::{TransportError, close_code, connection_error};
use crate::identity::Identity;
use crate::joining::{Carrier, Table, Waiting};
use crate::lane_wire::{GREETING_BYTES, Greeting};
use crate::messages::{Intent, Joined, Message, Reject, RejectCode, Select, VERSIONS, text};
use crate::options::{LaneKind, Options};
use crate::session::{
    DestinationSession, Selection, certificate, destination, handshake_error, peer_info, unexpected,
};
use crate::socket::{self, UdpBuffers};
use crate::tcp::{self, TcpIn};
use crate::tls;

/// Most QUIC connections that are not yet part of a complete session, and as many of TCP.
pub const HANDSHAKES_MAX: usize = 256;

/// From this many on, a client must prove that it receives at its address (QUIC's Retry) before
/// anything is kept for it.
pub const HANDSHAKES_UNPROVEN_MAX: usize = HANDSHAKES_MAX / 2;

/// Most sessions that are complete or nearly so and wait to be accepted.
pub const SESSIONS_WAITING_MAX: usize = 16;

/// Bytes that quinn may keep for connections that are not accepted yet.
const INCOMING_BYTES_MAX: u64 = 4 << 20;

/// Ports that are tried where any will do.
const PORTS_TRIED: u32 = 32;

/// Pause after a connection could not be accepted, for want of descriptors or memory.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How long a rejected client is given to fetch the reason.
const REJECT_WAIT: Duration = Duration::from_secs(1);

/// Accepts sessions on one port. Dropping it stops accepting; accepted sessions go on.
#[derive(Debug)]
pub struct Listener {
    addr: SocketAddr,
    udp_buffers: UdpBuffers,
    endpoints: Vec<Endpoint>,
    sessions: mpsc::Receiver<DestinationSession>,
    /// The accepting tasks, which end when this is dropped.
    _tasks: JoinSet<()>,
}

/// What all tasks of a listener share.
struct Shared {
    options: Options,
    endpoints: Vec<Endpoint>,
    udp_buffers: UdpBuffers,
    handshakes: Arc<Semaphore>,
    lane_handshakes: Arc<Semaphore>,
    lane_tls: TlsAcceptor,
    waiting: Table,
    sessions: mpsc::Sender<DestinationSession>,
}

impl Listener {
    /// Opens the port, both UDP and TCP; `addr` with port 0 chooses one. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`TransportError::AddressInUse`] if another process has either, or what else is wrong.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        options: &Options,
    ) -> Result<Self, TransportError> {
        options.check()?;
        let crypto = tls::quic_server(identity).map_err(TransportError::Identity)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(options.transport(1)?)
            .migration(false)
            .max_incoming(HANDSHAKES_MAX)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX);
        let count = options.server_sockets;
        let (sockets, udp_buffers, lanes) = open_ports(addr, count, options)?;
        udp_buffers.warn_if_small(options.udp_buffer_bytes);
        let failed = |source| TransportError::Socket { what: "use a socket", addr, source };
        let mut endpoints = Vec::with_capacity(sockets.len());
        for socket in sockets {
            let (endpoint_config, server) = (options.endpoint()?, Some(config.clone()));
            let runtime = Arc::new(TokioRuntime);
            let endpoint =
                Endpoint::new(endpoint_config, server, socket, runtime).map_err(failed)?;
            endpoints.push(endpoint);
        }
        let first = endpoints.first().ok_or(TransportError::ListenerEnded)?;
        let addr = first.local_addr().map_err(failed)?;

        let (sender, sessions) = mpsc::channel(SESSIONS_WAITING_MAX);
        let shared = Arc::new(Shared {
            options: options.clone(),
            endpoints: endpoints.clone(),
            udp_buffers,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            lane_handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            lane_tls: tls::lane_server(identity).map_err(TransportError::Identity)?,
            waiting: Table::default(),
            sessions: sender,
        });
        let mut tasks = JoinSet::new();
        for endpoint in &endpoints {
            tasks.spawn(accept_loop(Arc::clone(&shared), endpoint.clone()));
        }
        tasks.spawn(accept_lanes(shared, lanes));
        Ok(Self { addr, udp_buffers, endpoints, sessions, _tasks: tasks })
    }

    /// The address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// UDP buffers that the kernel granted.
    pub fn udp_buffers(&self) -> UdpBuffers {
        self.udp_buffers
    }

    /// The next complete session. May be cancelled: no session is lost.
    ///
    /// # Errors
    /// [`TransportError::ListenerEnded`] when the runtime is ending.
    pub async fn accept(&mut self) -> Result<DestinationSession, TransportError> {
        loop {
            let session = self.sessions.recv().await.ok_or(TransportError::ListenerEnded)?;
            match session.closer.close_reason() {
                None => return Ok(session),
                Some(error) => {
                    let peer = session.peer.addr;
                    tracing::info!(%peer, error = chain(&error), "A session ended while it waited");
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        for endpoint in &self.endpoints {
            endpoint.set_server_config(None);
        }
    }
}

/// Opens UDP sockets and a TCP socket with the same port number.
fn open_ports(
    addr: SocketAddr,
    count: usize,
    options: &Options,
) -> Result<(Vec<UdpSocket>, UdpBuffers, TcpListener), TransportError> {
    let mut tries = 1;
    loop {
        let (sockets, udp_buffers) = socket::server(addr, count, options.udp_buffer_bytes)?;
        let chosen =
            sockets.first().map(UdpSocket::local_addr).ok_or(TransportError::ListenerEnded)?;
        let chosen = chosen.map_err(|source| TransportError::Socket {
            what: "read the port",
            addr,
            source,
        })?;
        match tcp::listen(chosen, options) {
            Ok(lanes) => return Ok((sockets, udp_buffers, lanes)),
            // A port that is free for UDP may be in use for TCP; where any will do, another does.
            Err(TransportError::AddressInUse { .. }) if addr.port() == 0 && tries < PORTS_TRIED => {
                tries += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn accept_loop(shared: Arc<Shared>, endpoint: Endpoint) {
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => admit(&shared, incoming, &mut tasks),
                None => return,
            },
            Some(_ended) = tasks.join_next() => {}
        }
    }
}

/// Gives a connection a task if there is room.
fn admit(shared: &Arc<Shared>, incoming: Incoming, tasks: &mut JoinSet<()>) {
    let peer = incoming.remote_address();
    let Ok(permit) = Arc::clone(&shared.handshakes).try_acquire_owned() else {
        tracing::warn!(%peer, "Refused: {HANDSHAKES_MAX} connections are being made already");
        incoming.refuse();
        return;
    };
    let busy = HANDSHAKES_MAX - shared.handshakes.available_permits();
    if busy > HANDSHAKES_UNPROVEN_MAX && incoming.may_retry() {
        if let Err(error) = incoming.retry() {
            error.into_incoming().refuse();
        }
        return;
    }
    let shared = Arc::clone(shared);
    tasks.spawn(async move {
        let _permit = permit;
        if let Err(error) = handle(&shared, incoming).await {
            tracing::warn!(%peer, error = chain(&error), "A connection came to nothing");
        }
    });
}

/// Takes a connection up to where it is part of a session, within the time allowed.
async fn handle(shared: &Shared, incoming: Incoming) -> Result<(), TransportError> {
    let peer = incoming.remote_address();
    let after = shared.options.handshake_timeout;
    let deadline = Instant::now() + after;
    let late = |waiting_for| TransportError::HandshakeTimeout { peer, after, waiting_for };
    let lost = |error| connection_error(peer, error, None);
    let connecting = incoming.accept().map_err(lost)?;
    let connection = timeout_at(deadline, connecting)
        .await
        .map_err(|_elapsed| late("the end of the TLS handshake"))?
        .map_err(lost)?;

    let mut waiting_for = "a stream";
    let served = serve(shared, &connection, &mut waiting_for);
    let served = timeout_at(deadline, served).await.unwrap_or_else(|_elapsed| {
        let error = late(waiting_for);
        let code = VarInt::from_u32(close_code::TIMEOUT);
        connection.close(code, format!("{waiting_for} did not come in time").as_bytes());
        Err(error)
    });
    // Where the reason was not given yet, this one is.
    if served.is_err() {
        connection.close(VarInt::from_u32(close_code::INTERNAL), b"The session could not be made");
    }
    served
}

async fn serve(
    shared: &Shared,
    connection: &Connection,
    waiting_for: &mut &'static str,
) -> Result<(), TransportError> {
    let lost = |error| connection_error(connection.remote_address(), error, None);
    tokio::select! {
        control = connection.accept_bi() => {
            let (send, receive) = control.map_err(lost)?;
            let (writer, reader) = (Writer::new(send), Reader::new(receive));
            serve_control(shared, connection, writer, reader, waiting_for).await
        }
        lane = connection.accept_uni() => {
            *waiting_for = "a lane's greeting";
            serve_lane(shared, connection.clone(), lane.map_err(lost)?).await
        }
    }
}

async fn serve_control(
    shared: &Shared,
    connection: &Connection,
    mut writer: Writer,
    mut reader: Reader,
    waiting_for: &mut &'static str,
) -> Result<(), TransportError> {
    let addr = connection.remote_address();
    let failed = |error: StreamError| handshake_error(connection, error);
    *waiting_for = "an offer";
    let offer = match reader.read().await.map_err(failed)? {
        Message::Offer(offer) => offer,
        other => {
            let error = unexpected(addr, "Offer", &other);
            connection.close(VarInt::from_u32(close_code::PROTOCOL), error.to_string().as_bytes());
            return Err(error);
        }
    };
    let peer = peer_info(connection)?;
    let Some(version) = offer.versions.iter().copied().filter(|v| VERSIONS.contains(v)).max()
    else {
        let text =
            format!("This host speaks protocol versions {VERSIONS:?}, not {:?}", offer.versions);
        return reject(connection, writer, RejectCode::Version, &text).await;
    };
    // The place is kept from here on, so that no client waits for lanes in vain.
    let Ok(place) = shared.sessions.clone().try_reserve_owned() else {
        let text = format!("{SESSIONS_WAITING_MAX} sessions wait here already; try again later");
        return reject(connection, writer, RejectCode::Busy, &text).await;
    };
    let selected = Selection { version, features: offer.features & shared.options.features };
    let lanes = match offer.intent {
        Intent::Migrate | Intent::Resume => {
            offer.lanes.min(u16::try_from(shared.options.lanes).unwrap_or(u16::MAX))
        }
        Intent::Ask => 0,
    };
    let mut token = [0; 16];
    tls::random(&mut token).map_err(TransportError::Identity)?;
    let kind = match offer.intent {
        Intent::Migrate | Intent::Resume => LaneKind::selected(offer.features),
        Intent::Ask => LaneKind::Quic,
    };
    let session = Waiting { certificate: certificate(connection), version, lanes, kind };
    let mut waiting = shared.waiting.enter(token, session);
    let features = selected.features | kind.feature();
    let select = Select { version, features, lanes, token };
    writer.write(&Message::Select(select)).await.map_err(failed)?;

    *waiting_for = "a lane";
    let arrived = waiting.collect(connection).await?;
    drop(waiting);
    writer.write(&Message::Joined(Joined { lanes })).await.map_err(failed)?;
    let closer = Closer::new(Connections {
        control: connection.clone(),
        kind,
        quic: arrived.quic,
        tcp: arrived.tcp,
        endpoints: shared.endpoints.clone(),
        udp_buffers: shared.udp_buffers,
        fast_bits_per_s: shared.options.fast_bits_per_s,
    });
    let streams = arrived.streams;
    tracing::info!(peer = %addr, name = peer.name, ?offer, ?kind, lanes, version, "Session complete");
    place.send(destination(writer, reader, streams, offer, selected, peer, closer));
    Ok(())
}

/// Tells a client why there is no session, and gives it time to read that.
async fn reject(
    connection: &Connection,
    mut writer: Writer,
    code: RejectCode,
    why: &str,
) -> Result<(), TransportError> {
    let peer = connection.remote_address();
    tracing::warn!(%peer, ?code, why, "Rejected an offer");
    let why = text(why);
    let message = Message::Reject(Reject { code, text: why.clone() });
    let failed = |error: StreamError| handshake_error(connection, error);
    writer.write(&message).await.map_err(failed)?;
    let _elapsed = tokio::time::timeout(REJECT_WAIT, writer.finish()).await;
    connection.close(VarInt::from_u32(close_code::REJECTED), why.as_bytes());
    Ok(())
}

async fn serve_lane(
    shared: &Shared,
    connection: Connection,
    mut stream: RecvStream,
) -> Result<(), TransportError> {
    let peer = connection.remote_address();
    let failed = |error: StreamError| handshake_error(&connection, error);
    let mut bytes = [0; GREETING_BYTES];
    read_exact(&mut stream, &mut bytes, "Lane greeting").await.map_err(failed)?;
    let greeting = Greeting::parse(&bytes).map_err(|error| failed(StreamError::Wire(error)))?;
    let certificate = certificate(&connection);
    let carrier = Carrier::Quic { connection, stream };
    shared.waiting.hand_over(peer, &greeting, certificate, carrier).await
}

/// Accepts lanes over TCP.
async fn accept_lanes(shared: Arc<Shared>, listener: TcpListener) {
    let mut tasks = JoinSet::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "A TCP connection was not accepted");
                    tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                    continue;
                }
            },
            Some(_ended) = tasks.join_next() => continue,
        };
        let Ok(permit) = Arc::clone(&shared.lane_handshakes).try_acquire_owned() else {
            tracing::warn!(%peer, "Refused: {HANDSHAKES_MAX} TCP connections are being made already");
            continue;
        };
        let shared = Arc::clone(&shared);
        tasks.spawn(async move {
            let _permit = permit;
            let after = shared.options.handshake_timeout;
            let mut waiting_for = "the end of the TLS handshake";
            let served = serve_tcp_lane(&shared, stream, peer, &mut waiting_for);
            let served = tokio::time::timeout(after, served).await.unwrap_or_else(|_elapsed| {
                Err(TransportError::HandshakeTimeout { peer, after, waiting_for })
            });
            if let Err(error) = served {
                tracing::warn!(%peer, error = chain(&error), "A TCP connection came to nothing");
            }
        });
    }
}

async fn serve_tcp_lane(
    shared: &Shared,
    stream: TcpStream,
    peer: SocketAddr,
    waiting_for: &mut &'static str,
) -> Result<(), TransportError> {
    let mut lane = TcpIn::accept(stream, peer, &shared.lane_tls, &shared.options).await?;
    *waiting_for = "a lane's greeting";
    let mut bytes = [0; GREETING_BYTES];
    let place = || "a new lane".to_owned();
    let greeting = match lane.read_exact(&mut bytes, "Lane greeting").await {
        Ok(()) => Greeting::parse(&bytes).map_err(|source| TransportError::Wire {
            peer,
            place: place(),
            source,
        })?,
        Err(StreamError::Wire(source)) => {
            return Err(TransportError::Wire { peer, place: place(), source });
        }
        Err(StreamError::Broken(source)) => {
            return Err(TransportError::LaneBroken { peer, place: place(), source });
        }
        Err(_ended) => return Err(TransportError::Ended { peer }),
    };
    let certificate = lane.certificate();
    let carrier = Carrier::Tcp(Box::new(lane));
    shared.waiting.hand_over(peer, &greeting, certificate, carrier).await
}

/// An error with all its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
