//! What can be tuned about sessions, with the reasons for the defaults.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::batch::LANES_MAX;
use quinn::congestion::CubicConfig;
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::auto::FAST_BITS_PER_S;
use crate::error::TransportError;
use crate::messages::{FEATURE_LANES_BOTH, FEATURE_LANES_TCP, FEATURES_OF_TRANSPORT};
use crate::pki::check_name;

/// Largest UDP payload in bytes that may be asked for. quinn hands the kernel up to ten datagrams
/// in one call; the call fails without a word when they exceed 65,507 bytes together.
pub const UDP_PAYLOAD_BYTES_MAX: u16 = 6000;

/// Smallest UDP payload that QUIC allows.
pub const UDP_PAYLOAD_BYTES_MIN: u16 = 1200;

/// Most sockets that a listener opens.
pub const SERVER_SOCKETS_MAX: usize = 16;

/// Largest window of a lane in bytes. Larger ones make quinn close connections under loss (more
/// than 1,024 gaps in a stream).
pub const LANE_WINDOW_BYTES_MAX: u32 = 32 << 20;

/// Smallest window of a lane in bytes.
pub const LANE_WINDOW_BYTES_MIN: u32 = 64 << 10;

/// Bytes that a connection sends before the first acknowledgement. The device state (some 300 KB)
/// crosses the control connection while the guest is stopped: growing a window for it from nothing
/// cost 20 ms on a link of 1 Gb/s.
const INITIAL_WINDOW_BYTES: u64 = 512 << 10;

/// What carries a session's lanes. The control connection is QUIC always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LaneKind {
    /// QUIC connections.
    #[default]
    Quic,
    /// TCP connections with TLS 1.3: fewer processor cycles a byte (docs/BENCHMARKS.md).
    Tcp,
    /// Both, where the server's TCP port can be reached: lanes begin on QUIC and go on over TCP
    /// once they are fast (see [`crate::auto`]). Else QUIC.
    Auto,
}

impl LaneKind {
    /// The feature bit that stands for it, or 0.
    pub(crate) fn feature(self) -> u64 {
        match self {
            Self::Quic => 0,
            Self::Tcp => FEATURE_LANES_TCP,
            Self::Auto => FEATURE_LANES_BOTH,
        }
    }

    /// What both ends have selected.
    pub(crate) fn selected(features: u64) -> Self {
        if features & FEATURE_LANES_TCP != 0 {
            Self::Tcp
        } else if features & FEATURE_LANES_BOTH != 0 {
            Self::Auto
        } else {
            Self::Quic
        }
    }

    /// Whether each lane has a QUIC connection.
    pub(crate) fn has_quic(self) -> bool {
        self != Self::Tcp
    }

    /// Whether each lane has a TCP connection.
    pub(crate) fn has_tcp(self) -> bool {
        self != Self::Quic
    }
}

/// Tuning of a session, for both ends.
#[derive(Debug, Clone)]
pub struct Options {
    /// Lanes that a client asks for, and the most that a listener grants; 1 to `LANES_MAX`. A lane
    /// is one task on each end, so more lanes than cores bring nothing.
    pub lanes: usize,
    /// What carries the lanes that a client asks for. A listener takes every kind.
    pub lane_kind: LaneKind,
    /// Rate in bits a second from which on lanes of [`LaneKind::Auto`] go over to TCP.
    pub fast_bits_per_s: u64,
    /// How long a silent peer counts as alive. Keep-alives are sent five times as often. The
    /// smaller value of both ends holds.
    pub dead_peer: Duration,
    /// How long all of making a session may take, from the first packet to the last lane.
    pub handshake_timeout: Duration,
    /// UDP buffers to ask for, in bytes; what the kernel grants is in
    /// [`SessionStats`](crate::SessionStats). The kernel's default of 208 KiB loses packets at
    /// 4 Gb/s and above; it grants at most `net.core.rmem_max` and `wmem_max`.
    pub udp_buffer_bytes: usize,
    /// Bytes that may be written to a lane before the receiver must have read some: quinn takes no
    /// more from the sender than the receiver has room for. Over TCP this is what socket buffers are
    /// made of, unless the kernel allows only smaller ones (`net.core.rmem_max`); then it chooses
    /// them by itself (`net.ipv4.tcp_rmem`). What is under way when the guest is
    /// stopped adds to its pause: 4 MiB are 3 ms at 10 Gb/s and 34 ms at 1 Gb/s.
    pub lane_window_bytes: u32,
    /// Largest UDP payload to probe for, 1200 to [`UDP_PAYLOAD_BYTES_MAX`]. Larger packets cost
    /// less CPU; where the path does not carry them, discovery settles for what it does.
    pub udp_payload_bytes_max: u16,
    /// Round-trip time to assume before one was measured. QUIC's default of 333 ms delays the
    /// first retransmission by a second; hosts that migrate guests are near one another.
    pub initial_rtt: Duration,
    /// Sockets (and so tasks) that a listener shares its port among, by `SO_REUSEPORT`.
    pub server_sockets: usize,
    /// Local address that a client binds to; any if not given.
    pub bind: Option<IpAddr>,
    /// Name that the server's certificate must carry; any host of the authority if not given.
    pub expected_peer: Option<String>,
    /// Optional features that this end can use, as bits of [`Offer`](crate::Offer)'s field; a
    /// session uses what both ends can. Those of the transport (bits 8 to 15) are not given here.
    pub features: u64,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            lanes: cores.clamp(2, 8),
            lane_kind: LaneKind::default(),
            fast_bits_per_s: FAST_BITS_PER_S,
            dead_peer: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            udp_buffer_bytes: 8 << 20,
            lane_window_bytes: 4 << 20,
            udp_payload_bytes_max: UDP_PAYLOAD_BYTES_MAX,
            initial_rtt: Duration::from_millis(20),
            server_sockets: cores.clamp(2, 8),
            bind: None,
            expected_peer: None,
            features: 0,
        }
    }
}

impl Options {
    /// Checks every option.
    ///
    /// # Errors
    /// [`TransportError::Option`] with the first that is out of range.
    pub fn check(&self) -> Result<(), TransportError> {
        let ms = |duration: Duration| duration.as_millis();
        ranged("lanes", self.lanes, 1, LANES_MAX, "1 to 64 are allowed")?;
        ranged("dead_peer (ms)", ms(self.dead_peer), 50, 600_000, "50 to 600000 are allowed")?;
        let timeout = ms(self.handshake_timeout);
        ranged("handshake_timeout (ms)", timeout, 1, 600_000, "1 to 600000 are allowed")?;
        let rule = "64 KiB to 1 GiB are allowed";
        ranged("udp_buffer_bytes", self.udp_buffer_bytes, 64 << 10, 1 << 30, rule)?;
        ranged(
            "lane_window_bytes",
            self.lane_window_bytes,
            LANE_WINDOW_BYTES_MIN,
            LANE_WINDOW_BYTES_MAX,
            "64 KiB to 32 MiB are allowed",
        )?;
        ranged(
            "udp_payload_bytes_max",
            self.udp_payload_bytes_max,
            UDP_PAYLOAD_BYTES_MIN,
            UDP_PAYLOAD_BYTES_MAX,
            "1200 to 6000 are allowed",
        )?;
        ranged("initial_rtt (ms)", ms(self.initial_rtt), 1, 10_000, "1 to 10000 are allowed")?;
        let sockets = self.server_sockets;
        ranged("server_sockets", sockets, 1, SERVER_SOCKETS_MAX, "1 to 16 are allowed")?;
        if self.features & FEATURES_OF_TRANSPORT != 0 {
            return Err(TransportError::Option {
                option: "features",
                value: format!("{:#x}", self.features),
                rule: "bits 8 to 15 are the transport's own",
            });
        }
        match &self.expected_peer {
            Some(name) if check_name(name).is_err() => Err(TransportError::Option {
                option: "expected_peer",
                value: format!("{name:?}"),
                rule: "it must be a host name as `migrate pki issue` takes it",
            }),
            _ => Ok(()),
        }
    }

    /// quinn's settings of a connection that takes `streams` streams of each direction.
    pub(crate) fn transport(&self, streams: u32) -> Result<Arc<TransportConfig>, TransportError> {
        let idle = IdleTimeout::try_from(self.dead_peer).map_err(|_| TransportError::Option {
            option: "dead_peer",
            value: format!("{:?}", self.dead_peer),
            rule: "QUIC cannot carry it",
        })?;
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(self.udp_payload_bytes_max);
        let mut congestion = CubicConfig::default();
        congestion.initial_window(INITIAL_WINDOW_BYTES);
        let mut config = TransportConfig::default();
        config
            .max_concurrent_bidi_streams(VarInt::from_u32(streams))
            .max_concurrent_uni_streams(VarInt::from_u32(streams))
            .max_idle_timeout(Some(idle))
            .keep_alive_interval(Some(self.dead_peer / 5))
            .stream_receive_window(VarInt::from_u32(self.lane_window_bytes))
            .receive_window(VarInt::from_u32(self.lane_window_bytes))
            .send_window(u64::from(self.lane_window_bytes))
            .send_fairness(false)
            .initial_rtt(self.initial_rtt)
            .congestion_controller_factory(Arc::new(congestion))
            .mtu_discovery_config(Some(mtu))
            .datagram_receive_buffer_size(None);
        Ok(Arc::new(config))
    }

    pub(crate) fn endpoint(&self) -> Result<EndpointConfig, TransportError> {
        let mut config = EndpointConfig::default();
        let bytes = self.udp_payload_bytes_max;
        config.max_udp_payload_size(bytes).map_err(|_| TransportError::Option {
            option: "udp_payload_bytes_max",
            value: bytes.to_string(),
            rule: "QUIC cannot carry it",
        })?;
        Ok(config)
    }
}

fn ranged<T: PartialOrd + ToString + Copy>(
    option: &'static str,
    value: T,
    min: T,
    max: T,
    rule: &'static str,
) -> Result<(), TransportError> {
    if value < min || value > max {
        return Err(TransportError::Option { option, value: value.to_string(), rule });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_range_and_what_is_not_is_named() {
        Options::default().check().unwrap();
        let bad = [
            Options { lanes: 0, ..Options::default() },
            Options { lanes: LANES_MAX + 1, ..Options::default() },
            Options { dead_peer: Duration::ZERO, ..Options::default() },
            Options { udp_payload_bytes_max: 9000, ..Options::default() },
            Options { lane_window_bytes: 1, ..Options::default() },
            Options { expected_peer: Some("a/b".into()), ..Options::default() },
            Options { features: FEATURE_LANES_TCP, ..Options::default() },
        ];
        for options in bad {
            assert!(matches!(options.check(), Err(TransportError::Option { .. })), "{options:?}");
        }
    }

    #[test]
    fn kinds_of_lanes_are_what_was_selected() {
        for kind in [LaneKind::Quic, LaneKind::Tcp, LaneKind::Auto] {
            assert_eq!(LaneKind::selected(kind.feature() | 0b101), kind);
            assert_eq!(kind.feature() & !FEATURES_OF_TRANSPORT, 0);
        }
    }

    #[test]
    fn ten_datagrams_fit_one_system_call() {
        assert!(10 * u32::from(UDP_PAYLOAD_BYTES_MAX) <= 65_507);
    }
}
