//! Opening a client's connections: the control connection, and QUIC and TCP for its lanes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{ClientConfig, Connection, Endpoint, SendStream, TokioRuntime};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::closer::{Closer, Connections};
use crate::error::{TransportError, connection_error};
use crate::identity::Identity;
use crate::lane::LaneSender;
use crate::lane_stream::Outlet;
use crate::lane_wire::{GREETING_BYTES, Greeting};
use crate::messages::Select;
use crate::options::{LaneKind, Options};
use crate::session::{certificate, handshake_error};
use crate::socket::{self, UdpBuffers};
use crate::tcp::TcpOut;
use crate::tls::{self, ANY_NAME};

/// How long TCP may take to get through where lanes may do without, besides twice the time that
/// QUIC took: it needs one round trip more.
const TCP_WAIT_MIN: Duration = Duration::from_millis(50);
const TCP_WAIT_MAX: Duration = Duration::from_millis(500);

/// A connection with its own endpoint.
pub(crate) struct Dialled {
    pub(crate) endpoint: Endpoint,
    pub(crate) connection: Connection,
    pub(crate) udp_buffers: UdpBuffers,
}

/// What all connections of a session are opened with.
#[derive(Clone)]
pub(crate) struct Dialler {
    addr: SocketAddr,
    quic: ClientConfig,
    tls: TlsConnector,
    options: Options,
}

/// A lane's connections as they come into being.
#[derive(Default)]
pub(crate) struct LaneParts {
    pub(crate) quic: Option<(Dialled, SendStream)>,
    pub(crate) tcp: Option<Box<TcpOut>>,
}

impl Dialler {
    pub(crate) fn new(
        addr: SocketAddr,
        identity: &Identity,
        options: &Options,
    ) -> Result<Self, TransportError> {
        let expected = options.expected_peer.as_deref();
        let crypto = tls::quic_client(identity, expected).map_err(TransportError::Identity)?;
        let mut quic = ClientConfig::new(Arc::new(crypto));
        // A server opens no streams.
        quic.transport_config(options.transport(0)?);
        let tls = tls::lane_client(identity, expected).map_err(TransportError::Identity)?;
        Ok(Self { addr, quic, tls, options: options.clone() })
    }

    /// Opens the control connection. Where lanes may go over TCP, finds out whether that gets
    /// through: the first lane's connection is returned if it does.
    pub(crate) async fn control(
        &self,
        wanted: LaneKind,
    ) -> Result<(Dialled, Option<Box<TcpOut>>), TransportError> {
        let mut early = JoinSet::new();
        if wanted == LaneKind::Auto {
            let dialler = self.clone();
            early.spawn(async move { dialler.tcp().await });
        }
        let began = Instant::now();
        let control = dial(self.addr, &self.quic, &self.options).await?;
        let wait = (2 * began.elapsed()).clamp(TCP_WAIT_MIN, TCP_WAIT_MAX);
        let tcp = match tokio::time::timeout(wait, early.join_next()).await {
            Ok(Some(Ok(Ok(tcp)))) if tcp.certificate() == certificate(&control.connection) => {
                Some(tcp)
            }
            Ok(Some(Ok(Ok(_)))) => {
                tracing::warn!(peer = %self.addr, "Another host answers TCP: lanes stay on QUIC");
                None
            }
            Ok(Some(Ok(Err(error)))) => {
                tracing::info!(%error, "Lanes stay on QUIC");
                None
            }
            Err(_) => {
                tracing::info!(peer = %self.addr, "TCP does not get through: lanes stay on QUIC");
                None
            }
            Ok(None | Some(Err(_))) => None,
        };
        Ok((control, tcp))
    }

    /// Opens all connections of all lanes and greets on them.
    pub(crate) async fn lanes(
        &self,
        select: &Select,
        kind: LaneKind,
        early: Option<Box<TcpOut>>,
        control: &Connection,
    ) -> Result<Vec<LaneParts>, TransportError> {
        let mut early = early.filter(|_| kind.has_tcp());
        let mut dialling = JoinSet::new();
        for lane in 0..select.lanes {
            let (version, token) = (select.version, select.token);
            let greeting = Greeting { version, lane, token }.encode();
            if kind.has_quic() {
                let dialler = self.clone();
                dialling.spawn(async move {
                    let quic = Some(dialler.quic_lane(&greeting).await?);
                    Ok((lane, LaneParts { quic, tcp: None }))
                });
            }
            if kind.has_tcp() {
                let (dialler, early) = (self.clone(), early.take());
                dialling.spawn(async move {
                    let tcp = Some(dialler.tcp_lane(&greeting, early).await?);
                    Ok((lane, LaneParts { quic: None, tcp }))
                });
            }
        }
        let mut lanes: Vec<LaneParts> = (0..select.lanes).map(|_| LaneParts::default()).collect();
        while let Some(dialled) = dialling.join_next().await {
            // A task panicked or was cancelled, which only the end of the runtime does.
            let ended = |_| TransportError::Interrupted { place: "a lane's task".into() };
            let (lane, parts) = dialled.map_err(ended)??;
            let shown = match (&parts.quic, &parts.tcp) {
                (Some((dialled, _)), _) => certificate(&dialled.connection),
                (None, Some(tcp)) => tcp.certificate(),
                (None, None) => None,
            };
            if shown != certificate(control) {
                return Err(TransportError::LaneCertificate { peer: self.addr, lane });
            }
            if let Some(place) = lanes.get_mut(usize::from(lane)) {
                place.quic = parts.quic.or_else(|| place.quic.take());
                place.tcp = parts.tcp.or_else(|| place.tcp.take());
            }
        }
        Ok(lanes)
    }

    async fn quic_lane(
        &self,
        greeting: &[u8; GREETING_BYTES],
    ) -> Result<(Dialled, SendStream), TransportError> {
        let dialled = dial(self.addr, &self.quic, &self.options).await?;
        let lost = |error| connection_error(self.addr, error, None);
        let mut stream = dialled.connection.open_uni().await.map_err(lost)?;
        let greeted = stream.write_all(greeting).await;
        greeted.map_err(|error| handshake_error(&dialled.connection, error.into()))?;
        Ok((dialled, stream))
    }

    async fn tcp_lane(
        &self,
        greeting: &[u8; GREETING_BYTES],
        early: Option<Box<TcpOut>>,
    ) -> Result<Box<TcpOut>, TransportError> {
        let mut tcp = match early {
            Some(tcp) => tcp,
            None => self.tcp().await?,
        };
        let greeted = tcp.write_all(vec![Bytes::copy_from_slice(greeting)]).await;
        greeted.map_err(|source| TransportError::LaneConnect { peer: self.addr, source })?;
        Ok(tcp)
    }

    async fn tcp(&self) -> Result<Box<TcpOut>, TransportError> {
        TcpOut::dial(self.addr, &self.tls, &self.options).await.map(Box::new)
    }
}

async fn dial(
    addr: SocketAddr,
    config: &ClientConfig,
    options: &Options,
) -> Result<Dialled, TransportError> {
    let (socket, udp_buffers) = socket::client(addr, options.bind, options.udp_buffer_bytes)?;
    let runtime = Arc::new(TokioRuntime);
    let endpoint = Endpoint::new(options.endpoint()?, None, socket, runtime)
        .map_err(|source| TransportError::Socket { what: "use a socket", addr, source })?;
    let name = options.expected_peer.as_deref().unwrap_or(ANY_NAME);
    let connection = endpoint
        .connect_with(config.clone(), addr, name)
        .map_err(|source| TransportError::Connect { addr, source })?
        .await
        .map_err(|error| connection_error(addr, error, None))?;
    Ok(Dialled { endpoint, connection, udp_buffers })
}

/// Puts the client's connections together.
pub(crate) fn assemble(
    control: Dialled,
    kind: LaneKind,
    lanes: Vec<LaneParts>,
    options: &Options,
) -> (Vec<LaneSender>, Closer) {
    let mut all = Connections {
        control: control.connection,
        kind,
        quic: Vec::new(),
        tcp: Vec::new(),
        endpoints: vec![control.endpoint],
        udp_buffers: control.udp_buffers,
        fast_bits_per_s: options.fast_bits_per_s,
    };
    let mut streams = Vec::new();
    for LaneParts { quic, tcp } in lanes {
        all.tcp.extend(tcp.as_ref().map(|tcp| tcp.handle()));
        let Some((dialled, stream)) = quic else {
            streams.extend(tcp.map(|tcp| (Outlet::Tcp(tcp), None)));
            continue;
        };
        all.quic.push(dialled.connection);
        all.endpoints.push(dialled.endpoint);
        all.udp_buffers = all.udp_buffers.least(dialled.udp_buffers);
        streams.push((Outlet::Quic(stream), tcp));
    }
    all.udp_buffers.warn_if_small(options.udp_buffer_bytes);
    let closer = Closer::new(all);
    let lanes = streams.into_iter().enumerate();
    let lanes =
        lanes.map(|(lane, (stream, next))| LaneSender::new(stream, next, lane, closer.clone()));
    (lanes.collect(), closer)
}
