//! Identity, sessions and lanes over QUIC and TCP, and the wire format.
//!
//! A **session** joins two hosts that hold certificates of the same authority. It consists of one
//! control connection over QUIC, which carries typed [`Message`]s both ways, and of up to
//! [`LANES_MAX`](migrate_core::batch::LANES_MAX) lanes, each of which carries [`Batch`]es of pages
//! from the client (the source) to the server (the destination) on a connection of its own: QUIC,
//! TCP with TLS 1.3, or first the one and then the other ([`LaneKind`]).
//!
//! | module | what it holds |
//! |---|---|
//! | [`pki`] | making a certificate authority and host identities |
//! | [`identity`] | loading one's own identity; what a peer must present |
//! | [`https`] | the same identities for HTTP |
//! | [`messages`] | the control messages, their limits and their validation |
//! | [`wire`] | control frames: header, sequence, encoding |
//! | [`lane_wire`] | lane frames: the greeting and batches of pages |
//! | [`auto`] | when lanes leave QUIC for TCP |
//! | [`options`] | what can be tuned, with the reasons |
//! | [`control`], [`lane`] | the two kinds of streams of a session |
//! | [`urgent`] | a lane that threads serve, with requests on the way back |
//! | [`pages`] | a channel of its own, between a host and a memory server |
//! | [`session`] | the session, and connecting as a client |
//! | [`listener`] | accepting sessions |
//! | [`error`] | everything that can go wrong, in four bins |
//! | [`fuzz`] | entry points for fuzzers |
//!
//! `docs/PROTOCOL.md` is the specification of what travels; a test compares its fingerprint with
//! [`messages`], [`wire`], [`lane_wire`] and [`pages::wire`].
//!
//! Invariants: nothing that a peer sends is believed before it is checked against a named limit;
//! what a decoder would refuse, the encoder refuses too; a peer that breaks the protocol loses its
//! own session and disturbs no other.

pub mod auto;
pub mod control;
pub mod error;
pub mod fuzz;
pub mod https;
pub mod identity;
pub mod lane;
pub mod lane_wire;
pub mod listener;
pub mod messages;
pub mod options;
pub mod pages;
pub mod payload;
pub mod pki;
pub mod session;
pub mod urgent;
pub mod wire;

mod closer;
mod dial;
mod joining;
mod lane_stream;
mod socket;
mod tcp;
mod tls;

pub use closer::{Closer, SessionStats, WireBytes};
pub use control::{ControlReceiver, ControlSender, For};
pub use error::{TransportError, WireError, close_code};
pub use identity::{Identity, IdentityError};
pub use lane::{LaneReceiver, LaneSender};
pub use lane_wire::Batch;
pub use listener::Listener;
pub use messages::{Message, MigrationId, Offer};
pub use options::{LaneKind, Options};
pub use pages::{PageAnswer, PageClient, PageListener, PageRequest, PageServer};
pub use payload::Payload;
pub use session::{DestinationSession, PeerInfo, Selection, Session, SourceSession, connect};
pub use urgent::{UrgentReceiver, UrgentSender, UrgentStop};
