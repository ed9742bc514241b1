//! Peers that speak QUIC, TCP and TLS but not necessarily the protocol: every step is a test's own.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use transport::lane_wire::Greeting;
use transport::messages::{FEATURE_LANES_TCP, Intent, Select};
use transport::{Message, wire};

use crate::common::{any_port, offer};

pub(crate) const ALPN: &[u8] = b"godwit/1";

/// The name of lanes over TCP.
pub(crate) const LANE_ALPN: &[u8] = b"godwit-lane/1";

/// The name of the page channel.
pub(crate) const PAGES_ALPN: &[u8] = b"godwit-pages/1";

/// A client's TLS over TCP.
pub(crate) type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

fn roots(ca: &Path) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.join("ca.pem")).unwrap()).unwrap();
    roots
}

fn chain(host: &Path) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let cert = CertificateDer::from_pem_file(host.join("cert.pem")).unwrap();
    (vec![cert], PrivateKeyDer::from_pem_file(host.join("key.pem")).unwrap())
}

/// A client that trusts the authority in `ca`, takes the server for `b`, and presents the identity
/// in `host` or none. The endpoint must be kept.
pub(crate) fn client(ca: &Path, host: Option<&Path>, alpn: &[u8]) -> Endpoint {
    let config = client_tls(ca, host, alpn);
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let mut endpoint = Endpoint::client(any_port()).unwrap();
    endpoint.set_default_client_config(config);
    endpoint
}

fn client_tls(ca: &Path, host: Option<&Path>, alpn: &[u8]) -> rustls::ClientConfig {
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots(ca));
    let mut config = match host {
        Some(host) => {
            let (chain, key) = chain(host);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = if alpn.is_empty() { vec![] } else { vec![alpn.to_vec()] };
    config
}

/// Connects over TCP as [`client`] does over QUIC; an empty name of a protocol is not sent.
pub(crate) async fn dial_tcp(
    ca: &Path,
    host: Option<&Path>,
    alpn: &[u8],
    addr: SocketAddr,
) -> std::io::Result<TlsStream> {
    let tls = TlsConnector::from(Arc::new(client_tls(ca, host, alpn)));
    let stream = TcpStream::connect(addr).await?;
    tls.connect("b".try_into().unwrap(), stream).await
}

/// What a connection ends with: nothing is ever sent on it to a client.
pub(crate) async fn tcp_end(stream: &mut TlsStream) -> std::io::Result<usize> {
    let read = tokio::time::timeout(Duration::from_secs(4), stream.read(&mut [0; 64])).await;
    read.expect("the server keeps the connection")
}

/// A server that presents the identity in `host` and asks for no certificate.
pub(crate) fn server(host: &Path, alpn: &[u8]) -> Endpoint {
    let crypto = QuicServerConfig::try_from(server_tls(host, alpn)).unwrap();
    Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), any_port()).unwrap()
}

/// The same over TCP: shakes hands and then reads on.
pub(crate) async fn tcp_server(host: &Path, alpn: &[u8], addr: SocketAddr) -> JoinHandle<()> {
    let tls = TlsAcceptor::from(Arc::new(server_tls(host, alpn)));
    let listener = TcpListener::bind(addr).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(mut stream) = tls.accept(stream).await {
                let _ended = stream.read_to_end(&mut Vec::new()).await;
            }
        }
    })
}

fn server_tls(host: &Path, alpn: &[u8]) -> rustls::ServerConfig {
    let (chain, key) = chain(host);
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = if alpn.is_empty() { vec![] } else { vec![alpn.to_vec()] };
    config
}

pub(crate) async fn dial(endpoint: &Endpoint, addr: SocketAddr) -> Connection {
    endpoint.connect(addr, "b").unwrap().await.unwrap()
}

/// What the peer said when it closed the connection: the application's code, or 0x100 and up for
/// TLS alerts, and the text.
pub(crate) fn said(error: ConnectionError) -> (u64, String) {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            (close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned())
        }
        ConnectionError::ConnectionClosed(close) => (u64::from(close.error_code), String::new()),
        other => panic!("the peer said nothing: {other}"),
    }
}

pub(crate) async fn read_message(stream: &mut RecvStream, sequence: u32) -> Message {
    let mut header = [0; wire::CONTROL_HEADER_BYTES];
    stream.read_exact(&mut header).await.unwrap();
    let header = wire::ControlHeader::parse(&header, sequence).unwrap();
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).await.unwrap();
    header.decode(&body).unwrap()
}

/// A control connection up to the server's selection.
pub(crate) struct Control {
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    pub(crate) receive: RecvStream,
    pub(crate) select: Select,
}

/// Offers `lanes` lanes as a good client would.
pub(crate) async fn offer_lanes(endpoint: &Endpoint, addr: SocketAddr, lanes: u16) -> Control {
    offer_features(endpoint, addr, lanes, 0).await
}

/// Offers `lanes` lanes over TCP.
pub(crate) async fn offer_tcp_lanes(endpoint: &Endpoint, addr: SocketAddr, lanes: u16) -> Control {
    let control = offer_features(endpoint, addr, lanes, FEATURE_LANES_TCP).await;
    assert_eq!(control.select.features, FEATURE_LANES_TCP);
    control
}

async fn offer_features(
    endpoint: &Endpoint,
    addr: SocketAddr,
    lanes: u16,
    features: u64,
) -> Control {
    let connection = dial(endpoint, addr).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let mut offer = offer(Intent::Migrate);
    offer.lanes = lanes;
    offer.features = features;
    send.write_all(&wire::encode(&Message::Offer(offer), 1).unwrap()).await.unwrap();
    let Message::Select(select) = read_message(&mut receive, 1).await else {
        panic!("no selection");
    };
    Control { connection, send, receive, select }
}

/// Opens a connection and sends a greeting on it.
pub(crate) async fn lane(
    endpoint: &Endpoint,
    addr: SocketAddr,
    greeting: &Greeting,
) -> (Connection, SendStream) {
    let connection = dial(endpoint, addr).await;
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&greeting.encode()).await.unwrap();
    (connection, stream)
}

/// The same over TCP, as `host` of the authority in `ca`.
pub(crate) async fn tcp_lane(
    ca: &Path,
    host: &Path,
    addr: SocketAddr,
    greeting: &Greeting,
) -> TlsStream {
    let mut stream = dial_tcp(ca, Some(host), LANE_ALPN, addr).await.unwrap();
    stream.write_all(&greeting.encode()).await.unwrap();
    stream.flush().await.unwrap();
    stream
}
