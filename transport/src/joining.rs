//! Sessions that wait for their lanes, and lanes that look for their session.
//!
//! ```text
//! control connection ─► enter ─► collect ─────────────────────► all lanes, in order
//!                                   ▲
//! lane's connection ─► greeting ─► hand_over: token, certificate, version, number and kind fit
//! ```

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{Connection, RecvStream, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::mpsc;

use crate::error::{TransportError, close_code, connection_error};
use crate::lane_stream::Inlet;
use crate::lane_wire::Greeting;
use crate::options::LaneKind;
use crate::tcp::{TcpHandle, TcpIn};

/// A lane's connection, greeted.
pub(crate) enum Carrier {
    Quic { connection: Connection, stream: RecvStream },
    Tcp(Box<TcpIn>),
}

impl Carrier {
    fn is_of(&self, kind: LaneKind) -> bool {
        match self {
            Self::Quic { .. } => kind.has_quic(),
            Self::Tcp(_) => kind.has_tcp(),
        }
    }

    /// Closes it; over TCP nothing can be said.
    fn refuse(&self, why: &str) {
        match self {
            Self::Quic { connection, .. } => {
                connection.close(VarInt::from_u32(close_code::LANE_REFUSED), why.as_bytes());
            }
            Self::Tcp(lane) => {
                tracing::warn!(peer = %lane.peer(), why, "A lane over TCP is refused");
                lane.handle().close();
            }
        }
    }
}

/// A connection that has shown the right token.
struct Arrival {
    lane: u16,
    carrier: Carrier,
}

/// A session whose lanes are still coming.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// What its control connection has shown.
    pub(crate) certificate: Option<CertificateDer<'static>>,
    /// The protocol's version.
    pub(crate) version: u16,
    /// Lanes to come.
    pub(crate) lanes: u16,
    /// What they consist of.
    pub(crate) kind: LaneKind,
}

/// Where a session's lanes are sent to.
type Entry = (Arc<Waiting>, mpsc::Sender<Arrival>);

/// The sessions that wait, by their tokens.
#[derive(Default)]
pub(crate) struct Table {
    waiting: Mutex<HashMap<[u8; 16], Entry>>,
}

impl Table {
    /// Lets a session wait for as long as what is returned exists.
    pub(crate) fn enter(&self, token: [u8; 16], session: Waiting) -> Registered<'_> {
        let (sender, arrivals) = mpsc::channel(1);
        let session = Arc::new(session);
        let entry = (Arc::clone(&session), sender);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(token, entry);
        Registered { table: self, token, session, arrivals }
    }

    /// Gives a greeted connection to the session that waits for it.
    pub(crate) async fn hand_over(
        &self,
        peer: SocketAddr,
        greeting: &Greeting,
        certificate: Option<CertificateDer<'static>>,
        carrier: Carrier,
    ) -> Result<(), TransportError> {
        let lane = greeting.lane;
        let session = {
            let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting
                .get(&greeting.token)
                .filter(|(session, _)| session.certificate == certificate)
                .filter(|(session, _)| session.version == greeting.version)
                .filter(|(session, _)| lane < session.lanes && carrier.is_of(session.kind))
                .map(|(_, arrivals)| arrivals.clone())
        };
        // One answer for a wrong token, certificate, version, number and kind: it tells a guesser
        // nothing.
        let Some(session) = session else {
            carrier.refuse("No session waits for this lane");
            return Err(TransportError::Unexpected {
                peer,
                expected: "a lane that a session waits for",
                found: format!("lane {lane} with another token or certificate"),
            });
        };
        if let Err(mpsc::error::SendError(gone)) = session.send(Arrival { lane, carrier }).await {
            gone.carrier.refuse("The session is gone");
        }
        Ok(())
    }
}

/// What has come of a lane.
#[derive(Default)]
struct Place {
    quic: Option<(Connection, RecvStream)>,
    tcp: Option<Box<TcpIn>>,
}

/// All lanes of a session.
pub(crate) struct Arrived {
    pub(crate) quic: Vec<Connection>,
    pub(crate) tcp: Vec<Arc<TcpHandle>>,
    /// For each lane what it begins on, and what it may go on over.
    pub(crate) streams: Vec<(Inlet, Option<Box<TcpIn>>)>,
}

/// A session's place in the table of those that wait for lanes, given up when dropped.
pub(crate) struct Registered<'a> {
    table: &'a Table,
    token: [u8; 16],
    session: Arc<Waiting>,
    arrivals: mpsc::Receiver<Arrival>,
}

impl Registered<'_> {
    /// Waits until every lane has arrived once with all that it consists of.
    pub(crate) async fn collect(
        &mut self,
        control: &Connection,
    ) -> Result<Arrived, TransportError> {
        let Waiting { lanes, kind, .. } = *self.session;
        let mut places: Vec<Place> = (0..lanes).map(|_| Place::default()).collect();
        let each = usize::from(kind.has_quic()) + usize::from(kind.has_tcp());
        let mut missing = usize::from(lanes) * each;
        while missing > 0 {
            let arrival = tokio::select! {
                arrival = self.arrivals.recv() => arrival,
                error = control.closed() => {
                    return Err(connection_error(control.remote_address(), error, None));
                }
            };
            let Some(Arrival { lane, carrier }) = arrival else {
                return Err(TransportError::ListenerEnded);
            };
            match (places.get_mut(usize::from(lane)), carrier) {
                (Some(Place { quic: quic @ None, .. }), Carrier::Quic { connection, stream }) => {
                    *quic = Some((connection, stream));
                    missing = missing.saturating_sub(1);
                }
                (Some(Place { tcp: tcp @ None, .. }), Carrier::Tcp(lane)) => {
                    *tcp = Some(lane);
                    missing = missing.saturating_sub(1);
                }
                (_, carrier) => carrier.refuse("This lane has arrived already"),
            }
        }
        Ok(Arrived::of(places))
    }
}

impl Arrived {
    fn of(places: Vec<Place>) -> Self {
        let mut all = Self { quic: Vec::new(), tcp: Vec::new(), streams: Vec::new() };
        for Place { quic, tcp } in places {
            all.tcp.extend(tcp.as_ref().map(|lane| lane.handle()));
            if let Some((connection, stream)) = quic {
                all.quic.push(connection);
                all.streams.push((Inlet::Quic(stream), tcp));
            } else {
                all.streams.extend(tcp.map(|lane| (Inlet::Tcp(lane), None)));
            }
        }
        all
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let mut waiting = self.table.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&self.token);
    }
}
