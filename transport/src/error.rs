//! Everything that can go wrong in a session, in four bins.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::LayoutError;
use migrate_core::store::StoreError;
use quinn::ConnectionError;
use thiserror::Error;

use crate::identity::IdentityError;
use crate::messages::{RejectCode, text};

/// Codes with which a connection is closed. A connection that is dropped without a word has 0.
pub mod close_code {
    /// All is said.
    pub const DONE: u32 = 1;
    /// The offer was rejected.
    pub const REJECTED: u32 = 2;
    /// The other end broke the protocol.
    pub const PROTOCOL: u32 = 3;
    /// The migration was given up.
    pub const ABORTED: u32 = 4;
    /// Something took too long.
    pub const TIMEOUT: u32 = 5;
    /// The host is about to end.
    pub const SHUTDOWN: u32 = 6;
    /// A lane belongs to no session that waits for it.
    pub const LANE_REFUSED: u32 = 7;
    /// Something failed at the closing end.
    pub const INTERNAL: u32 = 8;
    /// What the session is about goes on in another one.
    pub const REPLACED: u32 = 9;
}

/// What is wrong with bytes from a peer, or with a message or batch that was to be sent.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The frame does not begin as it must.
    #[error("{what} begins with {found:#010x} instead of its magic number")]
    Magic {
        /// Which kind of frame.
        what: &'static str,
        /// What was found.
        found: u32,
    },
    /// A message type that does not exist.
    #[error("Control message type {found} does not exist")]
    UnknownType {
        /// What was found.
        found: u16,
    },
    /// A length above its limit.
    #[error("{what} has {found} bytes; at most {max} are allowed")]
    TooLong {
        /// Message or part.
        what: &'static str,
        /// Bytes announced.
        found: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// A frame that does not follow the one before it.
    #[error("{what} has sequence number {found} where {expected} is due")]
    Sequence {
        /// Message or frame.
        what: &'static str,
        /// What is due.
        expected: u64,
        /// What was found.
        found: u64,
    },
    /// The stream ends within a frame.
    #[error("{what} ends after {available} of {needed} bytes")]
    Truncated {
        /// Message or part.
        what: &'static str,
        /// Bytes that should be there.
        needed: usize,
        /// Bytes that are.
        available: usize,
    },
    /// A body that does not decode.
    #[error("{what} has a body that cannot be read as one")]
    Body {
        /// The message.
        what: &'static str,
        /// What postcard says.
        #[source]
        source: postcard::Error,
    },
    /// Contents that do not unpack to what was announced.
    #[error("{what} has contents that do not unpack to the length announced")]
    Packed {
        /// The frame.
        what: &'static str,
    },
    /// A body with bytes left over.
    #[error("{what} has {bytes} bytes too many in its body")]
    Trailing {
        /// The message.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
    /// A field that breaks a rule.
    #[error("{what}: field {field:?} is {value}, but {rule}")]
    Field {
        /// Message or frame.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value, or its length for lists and texts.
        value: u64,
        /// The rule.
        rule: &'static str,
    },
    /// A list of RAM blocks that is no layout.
    #[error("{what} describes no possible RAM")]
    Layout {
        /// The message.
        what: &'static str,
        /// The rule that is broken.
        #[source]
        source: LayoutError,
    },
}

impl Classify for WireError {
    fn bin(&self) -> ErrorBin {
        ErrorBin::PeerMisbehaved
    }
}

/// Why a session could not be made or went wrong.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer sent something that breaks the protocol.
    #[error("Peer {peer} broke the protocol on {place}")]
    Wire {
        /// The peer's address.
        peer: SocketAddr,
        /// `control` or which lane.
        place: String,
        /// What it sent.
        #[source]
        source: WireError,
    },
    /// The peer sent a valid message where another was due.
    #[error("Peer {peer} sent {found} where {expected} is due")]
    Unexpected {
        /// The peer's address.
        peer: SocketAddr,
        /// What is due.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// A lane connection is held by another host than the control connection.
    #[error("Lane {lane} to {peer} is answered by another certificate than the control connection")]
    LaneCertificate {
        /// The peer's address.
        peer: SocketAddr,
        /// The lane.
        lane: u16,
    },
    /// The peer takes no lanes over TCP.
    #[error(
        "Peer {peer} takes no lanes over TCP; install the same release on both hosts, or use \
         `--lanes quic`"
    )]
    LaneKind {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// A lane over TCP could not be opened.
    #[error(
        "Cannot open a TCP connection to {peer} for a lane; let TCP through to this port as well as \
         UDP, or use `--lanes quic`"
    )]
    LaneConnect {
        /// The peer's address.
        peer: SocketAddr,
        /// What the kernel or TLS says.
        #[source]
        source: io::Error,
    },
    /// The TCP connection of a lane ended without the end that TLS gives it.
    #[error("The TCP connection of {place} with {peer} broke off")]
    LaneBroken {
        /// The peer's address.
        peer: SocketAddr,
        /// Which lane.
        place: String,
        /// What the kernel or TLS says.
        #[source]
        source: io::Error,
    },
    /// A connection to a memory server could not be opened.
    #[error(
        "Cannot open a TCP connection to {peer} for pages; is `migrate memory-server` running there, \
         and does TCP get through?"
    )]
    PagesConnect {
        /// The server's address.
        peer: SocketAddr,
        /// What the kernel or TLS says.
        #[source]
        source: io::Error,
    },
    /// A connection for pages ended without the end that TLS gives it.
    #[error("The page channel with {peer} broke off; open another one")]
    PagesBroken {
        /// The peer's address.
        peer: SocketAddr,
        /// What the kernel or TLS says.
        #[source]
        source: io::Error,
    },
    /// The memory server takes no requests on this connection.
    #[error("The memory server at {peer} refuses the connection")]
    PagesRefused {
        /// The server's address.
        peer: SocketAddr,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// As many requests as may be under way on a connection for pages.
    #[error("{requests} requests to {peer} are not answered yet; take their answers first")]
    PagesUnderWay {
        /// The server's address.
        peer: SocketAddr,
        /// How many.
        requests: usize,
    },
    /// A request or an answer for pages did not come or go in time.
    #[error("{what} of {peer} took longer than {within:?}; check the link and that host's load")]
    PagesTimeout {
        /// The peer's address.
        peer: SocketAddr,
        /// What was waited for.
        what: &'static str,
        /// How long.
        within: Duration,
    },
    /// The peer reset or stopped a stream.
    #[error("Peer {peer} cut {place} off with code {code}")]
    Cut {
        /// The peer's address.
        peer: SocketAddr,
        /// `control` or which lane.
        place: String,
        /// The code it gave.
        code: u64,
    },
    /// The server does not take the offer.
    #[error("Peer {peer} rejects the session ({code:?}): {text}")]
    Rejected {
        /// The peer's address.
        peer: SocketAddr,
        /// Why, for programs.
        code: RejectCode,
        /// Why, for people.
        text: String,
    },
    /// The TLS handshake failed.
    #[error("TLS with {peer} failed, {reported}: {what}. {remedy}")]
    Tls {
        /// The peer's address.
        peer: SocketAddr,
        /// Which end found it.
        reported: &'static str,
        /// TLS alert number.
        alert: u8,
        /// What the alert means.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The peer does not speak QUIC as we do.
    #[error("Peer {peer} does not speak this protocol")]
    Quic {
        /// The peer's address.
        peer: SocketAddr,
        /// What quinn says.
        #[source]
        source: ConnectionError,
    },
    /// The peer closed the session and said why.
    #[error("Peer {peer} closed the session (code {code}): {text}")]
    Closed {
        /// The peer's address.
        peer: SocketAddr,
        /// One of [`close_code`].
        code: u32,
        /// What it said; empty if nothing.
        text: String,
    },
    /// This end closed the session.
    #[error("The session with {peer} was closed here (code {code}): {text}")]
    ClosedHere {
        /// The peer's address.
        peer: SocketAddr,
        /// One of [`close_code`].
        code: u32,
        /// What was said.
        text: String,
    },
    /// The peer has ended its side of the control stream.
    #[error("Peer {peer} sends no more messages")]
    Ended {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// Nothing was heard from the peer for as long as [`dead_peer`](crate::Options::dead_peer).
    #[error("Contact with {peer} is lost")]
    Lost {
        /// The peer's address.
        peer: SocketAddr,
    },
    /// The peer did not acknowledge the last messages in time; whether they arrived is not known.
    #[error("Peer {peer} did not acknowledge the last messages within {within:?}")]
    NotAcknowledged {
        /// The peer's address.
        peer: SocketAddr,
        /// How long was waited.
        within: Duration,
    },
    /// The session was not complete in time.
    #[error("No session with {peer} within {after:?}: {waiting_for} did not come")]
    HandshakeTimeout {
        /// The peer's address.
        peer: SocketAddr,
        /// How long was waited.
        after: Duration,
        /// What was missing.
        waiting_for: &'static str,
    },
    /// Another process holds the port.
    #[error(
        "Address {addr} is in use by another process over {protocol}; choose another port or end \
         that process"
    )]
    AddressInUse {
        /// UDP or TCP; a listener needs both.
        protocol: &'static str,
        /// The address.
        addr: SocketAddr,
    },
    /// A socket could not be made.
    #[error("Cannot {what} for {addr}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The address.
        addr: SocketAddr,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The identity cannot be used.
    #[error("This host's identity cannot be used")]
    Identity(#[source] IdentityError),
    /// A connection could not even be begun.
    #[error("Cannot begin a connection to {addr}")]
    Connect {
        /// The address.
        addr: SocketAddr,
        /// What quinn says.
        #[source]
        source: quinn::ConnectError,
    },
    /// An option or argument is out of its range.
    #[error("Option {option} is {value}, but {rule}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// The rule.
        rule: &'static str,
    },
    /// A message or batch that was to be sent breaks the protocol's rules.
    #[error("Cannot send what the peer would refuse")]
    Refused(#[source] WireError),
    /// An earlier send or receive was given up half-way; the stream cannot be continued.
    #[error("An earlier operation on {place} was cancelled half-way; the session must be closed")]
    Interrupted {
        /// `control` or which lane.
        place: String,
    },
    /// The listener has ended.
    #[error("The listener has ended")]
    ListenerEnded,
}

impl Classify for TransportError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Wire { .. }
            // Whoever waited on another stream than the one where it was found.
            | Self::ClosedHere { code: close_code::PROTOCOL, .. }
            | Self::Unexpected { .. }
            | Self::LaneCertificate { .. }
            | Self::Cut { .. } => ErrorBin::PeerMisbehaved,
            Self::Rejected { .. }
            | Self::Tls { .. }
            | Self::Quic { .. }
            | Self::LaneKind { .. } => ErrorBin::PeerIncompatible,
            Self::Identity(source) => source.bin(),
            Self::PagesRefused { source, .. } => source.bin(),
            Self::Option { .. }
            | Self::Refused(_)
            | Self::PagesUnderWay { .. }
            | Self::Interrupted { .. }
            | Self::AddressInUse { .. } => ErrorBin::CallerMisuse,
            Self::Closed { .. }
            | Self::ClosedHere { .. }
            | Self::Ended { .. }
            | Self::Lost { .. }
            | Self::LaneConnect { .. }
            | Self::LaneBroken { .. }
            | Self::PagesConnect { .. }
            | Self::PagesBroken { .. }
            | Self::PagesTimeout { .. }
            | Self::NotAcknowledged { .. }
            | Self::HandshakeTimeout { .. }
            | Self::Socket { .. }
            | Self::Connect { .. }
            | Self::ListenerEnded => ErrorBin::System,
        }
    }
}

/// Why this end closed a session.
#[derive(Debug, Clone)]
pub(crate) struct CloseReason {
    pub(crate) code: u32,
    pub(crate) text: String,
}

/// Turns the end of a connection into an error; `here` is what this end said when it closed.
pub(crate) fn connection_error(
    peer: SocketAddr,
    error: ConnectionError,
    here: Option<&CloseReason>,
) -> TransportError {
    match error {
        ConnectionError::ApplicationClosed(close) => TransportError::Closed {
            peer,
            code: u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX),
            text: text(&String::from_utf8_lossy(&close.reason)),
        },
        ConnectionError::LocallyClosed => TransportError::ClosedHere {
            peer,
            code: here.map_or(0, |reason| reason.code),
            text: here.map_or_else(String::new, |reason| reason.text.clone()),
        },
        ConnectionError::TimedOut | ConnectionError::Reset => TransportError::Lost { peer },
        ConnectionError::TransportError(inner) => {
            let code = u64::from(inner.code);
            let source = ConnectionError::TransportError(inner);
            tls_error(peer, code, "found here").unwrap_or(TransportError::Quic { peer, source })
        }
        ConnectionError::ConnectionClosed(close) => {
            let code = u64::from(close.error_code);
            let source = ConnectionError::ConnectionClosed(close);
            tls_error(peer, code, "found by the peer")
                .unwrap_or(TransportError::Quic { peer, source })
        }
        source => TransportError::Quic { peer, source },
    }
}

/// QUIC carries a TLS alert as 0x100 plus its number (RFC 9001, section 4.8).
fn tls_error(peer: SocketAddr, code: u64, reported: &'static str) -> Option<TransportError> {
    let alert = u8::try_from(code.checked_sub(0x100)?).ok()?;
    Some(tls_alert(peer, alert, reported))
}

/// What a TLS alert means to users.
pub(crate) fn tls_alert(peer: SocketAddr, alert: u8, reported: &'static str) -> TransportError {
    let (what, remedy) = match alert {
        42 | 43 => (
            "a certificate is not acceptable",
            "Issue both hosts' identities with `migrate pki issue`",
        ),
        45 => (
            "a certificate is expired or not yet valid",
            "Issue a new identity with `migrate pki issue` and compare the hosts' clocks",
        ),
        48 => (
            "a certificate is of another authority",
            "Use identities that the same `migrate pki init` directory issued",
        ),
        51 => ("a signature does not fit", "Check that cert.pem and key.pem belong together"),
        116 => (
            "the client presented no certificate",
            "Connect with an identity from `migrate pki issue`",
        ),
        120 => ("the ends speak different protocols", "Install the same release on both hosts"),
        _ => (
            "the handshake was not completed",
            "See both ends' logs; the alert number is in RFC 8446, section 6",
        ),
    };
    TransportError::Tls { peer, reported, alert, what, remedy }
}
