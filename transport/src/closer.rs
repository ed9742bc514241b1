//! The connections of a session as a whole: closing them and measuring them.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quinn::{Connection, ConnectionError, Endpoint, VarInt};

use crate::error::{CloseReason, TransportError, WireError, close_code, connection_error};
use crate::messages::text;
use crate::socket::UdpBuffers;

/// Longest time that [`Closer::close`] waits for the peer to hear of it.
const CLOSE_WAIT_MAX: Duration = Duration::from_millis(50);

/// Shortest: the connections' tasks have to come to run.
const CLOSE_WAIT_MIN: Duration = Duration::from_millis(10);

/// UDP payload bytes over all connections of a session, with all of QUIC's overhead and
/// retransmissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WireBytes {
    /// Sent from here.
    pub sent: u64,
    /// Received here.
    pub received: u64,
}

/// What quinn and the kernel say about a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionStats {
    /// UDP payload bytes.
    pub wire: WireBytes,
    /// Round-trip time of the control connection.
    pub rtt: Duration,
    /// Packets sent over all connections.
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

/// A handle to a session's connections; clones belong to the same session.
#[derive(Debug, Clone)]
pub struct Closer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    peer: SocketAddr,
    /// The control connection, then the lanes.
    control: Connection,
    lanes: Vec<Connection>,
    /// The client's own, or all of the listener's: were one of them closed, the kernel would hand
    /// this session's packets to another socket of the port.
    endpoints: Vec<Endpoint>,
    udp_buffers: UdpBuffers,
    closed: OnceLock<CloseReason>,
}

impl Closer {
    pub(crate) fn new(
        control: Connection,
        lanes: Vec<Connection>,
        endpoints: Vec<Endpoint>,
        udp_buffers: UdpBuffers,
    ) -> Self {
        let peer = control.remote_address();
        let closed = OnceLock::new();
        Self(Arc::new(Inner { peer, control, lanes, endpoints, udp_buffers, closed }))
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
    }

    /// As [`Closer::close_now`], and waits a moment for the peer to hear of it. To be called
    /// before a process ends.
    pub async fn close(&self, code: u32, reason: &str) {
        self.close_now(code, reason);
        let idle = async {
            for endpoint in &self.0.endpoints {
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
        let error = self.0.control.closed().await;
        self.lost(error)
    }

    /// Why the session has ended, or nothing as long as it has not.
    pub fn close_reason(&self) -> Option<TransportError> {
        self.0.control.close_reason().map(|error| self.lost(error))
    }

    /// UDP payload bytes so far; also after the session has ended.
    pub fn wire_bytes(&self) -> WireBytes {
        self.connections().fold(WireBytes::default(), |sum, connection| {
            let stats = connection.stats();
            WireBytes {
                sent: sum.sent.saturating_add(stats.udp_tx.bytes),
                received: sum.received.saturating_add(stats.udp_rx.bytes),
            }
        })
    }

    /// Round-trip time of the control connection.
    pub fn rtt(&self) -> Duration {
        self.0.control.rtt()
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
            udp_buffers: self.0.udp_buffers,
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
        let error = match (&error, self.0.control.close_reason()) {
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

    fn connections(&self) -> impl Iterator<Item = &Connection> {
        std::iter::once(&self.0.control).chain(&self.0.lanes)
    }
}
