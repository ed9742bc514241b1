//! Peers that speak QUIC and TLS but not necessarily the protocol: every step is a test's own.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use transport::lane_wire::Greeting;
use transport::messages::{Intent, Select};
use transport::{Message, wire};

use crate::common::{any_port, offer};

pub(crate) const ALPN: &[u8] = b"godwit/1";

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
    config.alpn_protocols = vec![alpn.to_vec()];
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let mut endpoint = Endpoint::client(any_port()).unwrap();
    endpoint.set_default_client_config(config);
    endpoint
}

/// A server that presents the identity in `host` and asks for no certificate.
pub(crate) fn server(host: &Path, alpn: &[u8]) -> Endpoint {
    let (chain, key) = chain(host);
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![alpn.to_vec()];
    let crypto = QuicServerConfig::try_from(config).unwrap();
    Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), any_port()).unwrap()
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
    let connection = dial(endpoint, addr).await;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let mut offer = offer(Intent::Migrate);
    offer.lanes = lanes;
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
