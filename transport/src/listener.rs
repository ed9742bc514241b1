//! Accepting sessions.
//!
//! ```text
//! connection -> TLS -> first stream --bidirectional--> Offer -> Select, wait for lanes -> session
//!                          |
//!                          +------- unidirectional --> greeting -> handed to the session that waits
//! ```
//!
//! Every connection has a task of its own with a time limit, and their number is bounded; nothing
//! that a client does or leaves undone delays another. Lanes find their session by its token, and
//! must present the same certificate as its control connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming, RecvStream, ServerConfig, TokioRuntime, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::closer::Closer;
use crate::control::{Reader, StreamError, Writer, read_exact};
use crate::error::{TransportError, close_code, connection_error};
use crate::identity::Identity;
use crate::lane_wire::{GREETING_BYTES, Greeting};
use crate::messages::{Intent, Joined, Message, Reject, RejectCode, Select, VERSIONS, text};
use crate::options::Options;
use crate::session::{
    DestinationSession, Selection, certificate, destination, handshake_error, peer_info, unexpected,
};
use crate::socket::{self, UdpBuffers};
use crate::tls;

/// Most connections that are not yet part of a complete session.
pub const HANDSHAKES_MAX: usize = 256;

/// From this many on, a client must prove that it receives at its address (QUIC's Retry) before
/// anything is kept for it.
pub const HANDSHAKES_UNPROVEN_MAX: usize = HANDSHAKES_MAX / 2;

/// Most sessions that are complete or nearly so and wait to be accepted.
pub const SESSIONS_WAITING_MAX: usize = 16;

/// Bytes that quinn may keep for connections that are not accepted yet.
const INCOMING_BYTES_MAX: u64 = 4 << 20;

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

/// A lane that has shown the right token.
struct Arrival {
    lane: u16,
    connection: Connection,
    stream: RecvStream,
}

/// A session whose lanes are still coming.
struct Waiting {
    certificate: Option<CertificateDer<'static>>,
    version: u16,
    lanes: u16,
    arrivals: mpsc::Sender<Arrival>,
}

/// What all tasks of a listener share.
struct Shared {
    options: Options,
    endpoints: Vec<Endpoint>,
    udp_buffers: UdpBuffers,
    handshakes: Arc<Semaphore>,
    waiting: Mutex<HashMap<[u8; 16], Waiting>>,
    sessions: mpsc::Sender<DestinationSession>,
}

impl Listener {
    /// Opens the port; `addr` with port 0 chooses one. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`TransportError::AddressInUse`] if another process is there, or what else is wrong.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        options: &Options,
    ) -> Result<Self, TransportError> {
        options.check()?;
        let crypto = tls::server_config(identity).map_err(TransportError::Identity)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(options.transport(1)?)
            .migration(false)
            .max_incoming(HANDSHAKES_MAX)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX);
        let count = options.server_sockets;
        let (sockets, udp_buffers) = socket::server(addr, count, options.udp_buffer_bytes)?;
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
            waiting: Mutex::new(HashMap::new()),
            sessions: sender,
        });
        let mut tasks = JoinSet::new();
        for endpoint in &endpoints {
            tasks.spawn(accept_loop(Arc::clone(&shared), endpoint.clone()));
        }
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
    let mut waiting = Registered::new(shared, token, connection, version, lanes);
    let features = selected.features;
    let select = Select { version, features, lanes, token };
    writer.write(&Message::Select(select)).await.map_err(failed)?;

    *waiting_for = "a lane";
    let arrived = waiting.collect(connection, usize::from(lanes)).await?;
    drop(waiting);
    writer.write(&Message::Joined(Joined { lanes })).await.map_err(failed)?;
    let (connections, streams) =
        arrived.into_iter().map(|arrival| (arrival.connection, arrival.stream)).unzip();
    let (endpoints, udp_buffers) = (shared.endpoints.clone(), shared.udp_buffers);
    let closer = Closer::new(connection.clone(), connections, endpoints, udp_buffers);
    tracing::info!(peer = %addr, name = peer.name, ?offer, lanes, version, "Session complete");
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
    let session = {
        let waiting = shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting
            .get(&greeting.token)
            .filter(|waiting| waiting.certificate == certificate(&connection))
            .filter(|waiting| waiting.version == greeting.version)
            .filter(|waiting| greeting.lane < waiting.lanes)
            .map(|waiting| waiting.arrivals.clone())
    };
    // One answer for a wrong token, certificate, version and number: it tells a guesser nothing.
    let Some(session) = session else {
        refuse_lane(&connection, "No session waits for this lane");
        return Err(TransportError::Unexpected {
            peer,
            expected: "a lane that a session waits for",
            found: format!("lane {} with another token or certificate", greeting.lane),
        });
    };
    let lane = greeting.lane;
    if session.send(Arrival { lane, connection: connection.clone(), stream }).await.is_err() {
        refuse_lane(&connection, "The session is gone");
    }
    Ok(())
}

fn refuse_lane(connection: &Connection, why: &str) {
    connection.close(VarInt::from_u32(close_code::LANE_REFUSED), why.as_bytes());
}

/// A session's place in the table of those that wait for lanes, given up when dropped.
struct Registered<'a> {
    shared: &'a Shared,
    token: [u8; 16],
    arrivals: mpsc::Receiver<Arrival>,
}

impl<'a> Registered<'a> {
    fn new(
        shared: &'a Shared,
        token: [u8; 16],
        connection: &Connection,
        version: u16,
        lanes: u16,
    ) -> Self {
        let (sender, arrivals) = mpsc::channel(1);
        let certificate = certificate(connection);
        let waiting = Waiting { certificate, version, lanes, arrivals: sender };
        shared.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(token, waiting);
        Self { shared, token, arrivals }
    }

    /// Waits until every lane has arrived once; they come out in order.
    async fn collect(
        &mut self,
        control: &Connection,
        lanes: usize,
    ) -> Result<Vec<Arrival>, TransportError> {
        let mut arrived: Vec<Option<Arrival>> = (0..lanes).map(|_| None).collect();
        let mut missing = lanes;
        while missing > 0 {
            let arrival = tokio::select! {
                arrival = self.arrivals.recv() => arrival,
                error = control.closed() => {
                    return Err(connection_error(control.remote_address(), error, None));
                }
            };
            let Some(arrival) = arrival else { return Err(TransportError::ListenerEnded) };
            match arrived.get_mut(usize::from(arrival.lane)) {
                Some(place @ None) => {
                    *place = Some(arrival);
                    missing = missing.saturating_sub(1);
                }
                _ => refuse_lane(&arrival.connection, "This lane has arrived already"),
            }
        }
        Ok(arrived.into_iter().flatten().collect())
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let mut waiting = self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&self.token);
    }
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
