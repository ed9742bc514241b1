//! TLS 1.3 with mutual authentication, set up from an [`Identity`].
//!
//! Both ends verify that the other's certificate chains to their own authority. A client is told an
//! address, not a name, so it accepts every host of the authority unless a name was asked for.
//! Sessions are never resumed: a certificate is verified every time.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::identity::{Identity, IdentityError};

/// The protocol's name in the TLS handshake of QUIC connections.
pub(crate) const ALPN: &[u8] = b"godwit/1";

/// The name of lanes over TCP, so that neither kind of connection can be taken for the other.
pub(crate) const LANE_ALPN: &[u8] = b"godwit-lane/1";

/// The name of the page channel.
pub(crate) const PAGES_ALPN: &[u8] = b"godwit-pages/1";

/// What is put in the place of the server's name where none was asked for; never sent.
pub(crate) const ANY_NAME: &str = "any.invalid";

/// ring, with the suites of TLS 1.3 alone; AES-128 first, which is the fastest.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    use rustls::crypto::ring::{self, cipher_suite};
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    })
}

/// Fills `bytes` with what nobody can guess.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), IdentityError> {
    provider()
        .secure_random
        .fill(bytes)
        .map_err(|_| IdentityError::Tls(rustls::Error::FailedToGetRandomBytes))
}

/// For QUIC connections of a server.
pub(crate) fn quic_server(identity: &Identity) -> Result<QuicServerConfig, IdentityError> {
    QuicServerConfig::try_from(server(identity, ALPN)?).map_err(|_| no_initial_suite())
}

/// For QUIC connections of a client.
pub(crate) fn quic_client(
    identity: &Identity,
    expected_peer: Option<&str>,
) -> Result<QuicClientConfig, IdentityError> {
    let config = client(identity, expected_peer, ALPN)?;
    QuicClientConfig::try_from(config).map_err(|_| no_initial_suite())
}

/// For lanes over TCP at a server.
pub(crate) fn lane_server(identity: &Identity) -> Result<TlsAcceptor, IdentityError> {
    Ok(TlsAcceptor::from(Arc::new(server(identity, LANE_ALPN)?)))
}

/// For lanes over TCP at a client.
pub(crate) fn lane_client(
    identity: &Identity,
    expected_peer: Option<&str>,
) -> Result<TlsConnector, IdentityError> {
    Ok(TlsConnector::from(Arc::new(client(identity, expected_peer, LANE_ALPN)?)))
}

/// For the page channel at a server.
pub(crate) fn pages_server(identity: &Identity) -> Result<Arc<ServerConfig>, IdentityError> {
    Ok(Arc::new(server(identity, PAGES_ALPN)?))
}

/// For the page channel at a client.
pub(crate) fn pages_client(
    identity: &Identity,
    expected_peer: Option<&str>,
) -> Result<Arc<ClientConfig>, IdentityError> {
    Ok(Arc::new(client(identity, expected_peer, PAGES_ALPN)?))
}

pub(crate) fn server(identity: &Identity, alpn: &[u8]) -> Result<ServerConfig, IdentityError> {
    let provider = provider();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&identity.roots), provider.clone())
            .build()
            .map_err(|error| IdentityError::Tls(rustls::Error::General(error.to_string())))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(IdentityError::Tls)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

pub(crate) fn client(
    identity: &Identity,
    expected_peer: Option<&str>,
    alpn: &[u8],
) -> Result<ClientConfig, IdentityError> {
    let provider = provider();
    let verifier = Arc::new(HostVerifier {
        roots: Arc::clone(&identity.roots),
        provider: Arc::clone(&provider),
        check_name: expected_peer.is_some(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(IdentityError::Tls)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn no_initial_suite() -> IdentityError {
    IdentityError::Tls(rustls::Error::General("no AES-128-GCM for QUIC".into()))
}

/// Verifies a server as the standard verifier does, but for the name where none was asked for.
#[derive(Debug)]
struct HostVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    check_name: bool,
}

impl ServerCertVerifier for HostVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let cert = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &cert,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        if self.check_name {
            verify_server_name(&cert, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
