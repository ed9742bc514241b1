//! The connections of a session as a whole: closing them and measuring them.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionError, Endpoint, VarInt};

use crate::auto::Gauge;
use crate::control::StreamError;
use crate::error::{CloseReason, TransportError, WireError, close_code, connection_error};
use crate::messages::text;
use crate::options::LaneKind;
use crate::socket::UdpBuffers;
use crate::tcp::TcpHandle;

/// Longest time that [`Closer::close`] waits for the peer to hear of it.
const CLOSE_WAIT_MAX: Duration = Duration::from_millis(50);

/// Shortest: the connections' tasks have to come to run.
const CLOSE_WAIT_MIN: Duration = Duration::from_millis(10);

/// Longest wait for the control connection to say why a stream broke off: both are told at
/// the same time, and nothing orders the two.
const REASON_WAIT: Duration = Duration::from_millis(500);

/// Payload bytes over all connections of a session: of UDP with all of QUIC's overhead and
/// retransmissions, of TCP with TLS's overhead and without TCP's retransmissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WireBytes {
    /// Sent from here.
    pub sent: u64,
    /// Received here.
    pub received: u64,
}

/// What quinn and the kernel say about a session. Packets, losses and congestion are those of its
/// QUIC connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionStats {
    /// UDP and TCP payload bytes.
    pub wire: WireBytes,
    /// Round-trip time of the control connection.
    pub rtt: Duration,
    /// Packets sent over all QUIC connections.
    pub packets_sent: u64,
    /// Of them, those held for lost.
    pub packets_lost: u64,
    /// Bytes in them.
    pub bytes_lost: u64,
    /// Times that congestion was seen.
    pub congestion_events: u64,
    /// Smallest UDP payload in bytes that any connection found its path to carry.
    pub udp_payload_bytes_min: u16,
    /// Smallest UDP buffers among the session's sockets.
    pub udp_buffers: UdpBuffers,
}

/// The connections of a session.
#[derive(Debug)]
pub(crate) struct Connections {
    pub(crate) control: Connection,
    pub(crate) kind: LaneKind,
    /// Lanes over QUIC.
    pub(crate) quic: Vec<Connection>,
    /// Lanes over TCP.
    pub(crate) tcp: Vec<Arc<TcpHandle>>,
    /// The client's own, or all of the listener's: were one of them closed, the kernel would hand
    /// this session's packets to another socket of the port.
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) udp_buffers: UdpBuffers,
    /// When lanes that have both kinds of connections go over to TCP.
    pub(crate) fast_bits_per_s: u64,
}

/// A handle to a session's connections; clones belong to the same session.
#[derive(Debug, Clone)]
pub struct Closer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    peer: SocketAddr,
    all: Connections,
    gauge: Gauge,
    /// Whether a lane that began on QUIC goes on over TCP.
    went_over: AtomicBool,
    closed: OnceLock<CloseReason>,
}

impl Closer {
    pub(crate) fn new(all: Connections) -> Self {
        Self(Arc::new(Inner {
            peer: all.control.remote_address(),
            gauge: Gauge::new(all.fast_bits_per_s),
            all,
            went_over: AtomicBool::new(false),
            closed: OnceLock::new(),
        }))
    }

    /// Closes the session at once; what was sent but has not arrived is lost
    /// ([`ControlSender::finish`](crate::ControlSender::finish) waits for it). `code` is one of
    /// [`close_code`], `reason` is shown to the peer's user. The first call counts.
    pub fn close_now(&self, code: u32, reason: &str) {
        let said = CloseReason { code, text: text(reason) };
        let said = self.0.closed.get_or_init(|| said);
        for connection in self.connections() {
            connection.close(VarInt::from_u32(said.code), said.text.as_bytes());
        }
        for lane in &self.0.all.tcp {
            lane.close();
        }
    }

    /// As [`Closer::close_now`], and waits a moment for the peer to hear of it. To be called
    /// before a process ends.
    pub async fn close(&self, code: u32, reason: &str) {
        self.close_now(code, reason);
        let idle = async {
            for endpoint in &self.0.all.endpoints {
                endpoint.wait_idle().await;
            }
        };
        // The word is on its way at once; what waits is a packet of the peer that crosses it, to be
        // answered with the word again. An endpoint that other sessions use is never idle.
        let wait = (4 * self.rtt()).clamp(CLOSE_WAIT_MIN, CLOSE_WAIT_MAX);
        let _elapsed = tokio::time::timeout(wait, idle).await;
    }

    /// Waits until the session ends and says why.
    pub async fn closed(&self) -> TransportError {
        let error = self.0.all.control.closed().await;
        self.lost(error)
    }

    /// Why the session has ended, or nothing as long as it has not.
    pub fn close_reason(&self) -> Option<TransportError> {
        self.0.all.control.close_reason().map(|error| self.lost(error))
    }

    /// UDP and TCP payload bytes so far; also after the session has ended.
    pub fn wire_bytes(&self) -> WireBytes {
        let quic = self.connections().map(|connection| {
            let stats = connection.stats();
            (stats.udp_tx.bytes, stats.udp_rx.bytes)
        });
        let tcp = self.0.all.tcp.iter().map(|lane| lane.bytes());
        quic.chain(tcp).fold(WireBytes::default(), |sum, (sent, received)| WireBytes {
            sent: sum.sent.saturating_add(sent),
            received: sum.received.saturating_add(received),
        })
    }

    /// What carries the lanes. A session that has both kinds is [`LaneKind::Quic`] at its client
    /// until lanes have gone over and [`LaneKind::Tcp`] from then on; its server says
    /// [`LaneKind::Auto`].
    pub fn lane_kind(&self) -> LaneKind {
        match self.0.all.kind {
            LaneKind::Auto if self.0.went_over.load(Ordering::Relaxed) => LaneKind::Tcp,
            LaneKind::Auto if self.0.all.control.side().is_client() => LaneKind::Quic,
            kind => kind,
        }
    }

    /// Round-trip time of the control connection.
    pub fn rtt(&self) -> Duration {
        self.0.all.control.rtt()
    }

    /// All figures at once.
    pub fn stats(&self) -> SessionStats {
        let mut stats = SessionStats {
            wire: self.wire_bytes(),
            rtt: self.rtt(),
            packets_sent: 0,
            packets_lost: 0,
            bytes_lost: 0,
            congestion_events: 0,
            udp_payload_bytes_min: u16::MAX,
            udp_buffers: self.0.all.udp_buffers,
        };
        for path in self.connections().map(|connection| connection.stats().path) {
            stats.packets_sent = stats.packets_sent.saturating_add(path.sent_packets);
            stats.packets_lost = stats.packets_lost.saturating_add(path.lost_packets);
            stats.bytes_lost = stats.bytes_lost.saturating_add(path.lost_bytes);
            stats.congestion_events =
                stats.congestion_events.saturating_add(path.congestion_events);
            stats.udp_payload_bytes_min = stats.udp_payload_bytes_min.min(path.current_mtu);
        }
        stats
    }

    /// The peer's address on the control connection.
    pub fn peer(&self) -> SocketAddr {
        self.0.peer
    }

    /// Turns the end of one of the connections into an error. Where a lane only timed out or was
    /// dropped, the control connection may know more.
    pub(crate) fn lost(&self, error: ConnectionError) -> TransportError {
        let error = match (&error, self.0.all.control.close_reason()) {
            (ConnectionError::TimedOut | ConnectionError::Reset, Some(reason)) => reason,
            _ => error,
        };
        connection_error(self.0.peer, error, self.0.closed.get())
    }

    /// Ends the session because the peer broke the protocol, and tells it why.
    pub(crate) fn misbehaved(&self, place: String, source: WireError) -> TransportError {
        self.close_now(close_code::PROTOCOL, &format!("{place}: {source}"));
        TransportError::Wire { peer: self.0.peer, place, source }
    }

    /// The error of an operation on a stream. Where its TCP connection broke off, or the peer let go
    /// of it, the control connection may know why.
    pub(crate) async fn stream_error(&self, error: StreamError, place: &str) -> TransportError {
        if let StreamError::Broken(_) | StreamError::Cut(_) = &error
            && let Ok(why) = tokio::time::timeout(REASON_WAIT, self.closed()).await
        {
            return why;
        }
        error.of_session(self, place)
    }

    /// Waits until the control connection has ended.
    pub(crate) async fn control_closed(&self) -> ConnectionError {
        self.0.all.control.closed().await
    }

    /// Whether lanes that have both kinds of connections are to go over to TCP.
    pub(crate) fn is_fast(&self) -> bool {
        let sent = || {
            let lanes = self.0.all.quic.iter();
            lanes.map(|lane| lane.stats().udp_tx.bytes).fold(0, u64::saturating_add)
        };
        self.0.gauge.is_fast(Instant::now(), sent)
    }

    /// A lane has gone over to TCP.
    pub(crate) fn went_over(&self) {
        self.0.went_over.store(true, Ordering::Relaxed);
    }

    fn connections(&self) -> impl Iterator<Item = &Connection> {
        std::iter::once(&self.0.all.control).chain(&self.0.all.quic)
    }
}
