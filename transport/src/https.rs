//! HTTP/1.1 under the same identities as migrations: for the scheduler's agents and those who ask them.
//!
//! Invariant: whoever has no certificate of the authority gets no byte of an answer.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ServerConfig};

use crate::identity::{Identity, IdentityError, certified_name};
use crate::tls;

/// The protocol's name in the handshake.
const ALPN: &[u8] = b"http/1.1";

/// For a server.
///
/// # Errors
/// [`IdentityError::Tls`].
pub fn server(identity: &Identity) -> Result<Arc<ServerConfig>, IdentityError> {
    Ok(Arc::new(tls::server(identity, ALPN)?))
}

/// For a client. Where a name is expected, it must be given to the handshake as the server's, too.
///
/// # Errors
/// [`IdentityError::Tls`].
pub fn client(
    identity: &Identity,
    expected_peer: Option<&str>,
) -> Result<Arc<ClientConfig>, IdentityError> {
    Ok(Arc::new(tls::client(identity, expected_peer, ALPN)?))
}

/// The name in the certificate that a peer has shown in a finished handshake.
#[must_use]
pub fn peer_name(certificates: Option<&[CertificateDer<'_>]>) -> Option<String> {
    certified_name(certificates?.first()?)
}
