//! A host's own identity, read from a directory that `migrate pki issue` wrote.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use migrate_core::error::{Classify, ErrorBin};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use thiserror::Error;

use crate::pki::{CA_CERT, HOST_CERT, HOST_KEY};
use crate::tls::provider;

/// Largest file of an identity in bytes.
pub const FILE_BYTES_MAX: u64 = 64 << 10;

/// Most certificates in a file.
pub const CERTIFICATES_MAX: usize = 8;

/// Why an identity cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file could not be read.
    #[error("Cannot read {path:?}; make an identity with `migrate pki issue DIR NAME`")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A file is too large to be what it should be.
    #[error("{path:?} is larger than {FILE_BYTES_MAX} bytes; it is no certificate or key")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A file holds no PEM of the kind that it should.
    #[error("{path:?} holds no {what} in PEM form; issue the identity again")]
    NoPem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A certificate's name cannot be found.
    #[error("{path:?} names no host; issue the identity again with `migrate pki issue`")]
    NoName {
        /// The file.
        path: PathBuf,
    },
    /// The certificate is expired or not yet valid.
    #[error("{path:?} is not valid now; issue a new identity, and check this host's clock")]
    NotValidNow {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// The certificate is not of the authority beside it.
    #[error("{path:?} was not issued by the authority in {CA_CERT:?} beside it")]
    NotOfAuthority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// The key does not belong to the certificate.
    #[error("{path:?} is not the key of the certificate beside it; issue the identity again")]
    WrongKey {
        /// The key's file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// TLS cannot be set up with the identity.
    #[error("TLS cannot be set up with this identity")]
    Tls(#[source] rustls::Error),
}

impl Classify for IdentityError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::File { .. } | Self::Tls(_) => ErrorBin::System,
            _ => ErrorBin::CallerMisuse,
        }
    }
}

/// A host's certificate, key and authority, checked against one another.
#[derive(Debug)]
pub struct Identity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) roots: Arc<RootCertStore>,
    name: String,
}

impl Identity {
    /// Reads `cert.pem`, `key.pem` and `ca.pem` from `dir` and checks that they belong together
    /// and are valid now. A key that others may read is used, with a warning in the log.
    ///
    /// # Errors
    /// [`IdentityError`] with the file at fault and what to do about it.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let cert_path = dir.join(HOST_CERT);
        let key_path = dir.join(HOST_KEY);
        let chain = certificates(&cert_path)?;
        let roots = Arc::new(authority(&dir.join(CA_CERT))?);
        let key = key(&key_path)?;
        check_chain(&cert_path, &chain, &roots)?;
        check_key(&key_path, &chain, &key)?;
        let name = chain
            .first()
            .and_then(certified_name)
            .ok_or(IdentityError::NoName { path: cert_path })?;
        Ok(Self { chain, key, roots, name })
    }

    /// The name that this host's certificate carries.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// The first host name in a certificate. The certificate's chain must have been verified.
pub(crate) fn certified_name(cert: &CertificateDer<'_>) -> Option<String> {
    let cert = webpki::EndEntityCert::try_from(cert).ok()?;
    let name = cert.valid_dns_names().next()?;
    Some(name.to_owned())
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let failed = |source| IdentityError::File { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(IdentityError::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let bytes = read(path)?;
    let none = || IdentityError::NoPem { path: path.to_owned(), what: "certificate" };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .take(CERTIFICATES_MAX)
        .collect::<Result<_, _>>()
        .map_err(|_| none())?;
    if chain.is_empty() { Err(none()) } else { Ok(chain) }
}

fn authority(path: &Path) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(path)? {
        roots.add(cert).map_err(|_| IdentityError::NoPem {
            path: path.to_owned(),
            what: "certificate of an authority",
        })?;
    }
    Ok(roots)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let bytes = read(path)?;
    let mode = fs::metadata(path)
        .map_err(|source| IdentityError::File { path: path.to_owned(), source })?
        .mode();
    if mode & 0o077 != 0 {
        tracing::warn!(
            path = %path.display(),
            mode = format_args!("{:o}", mode & 0o777),
            "Others may read this host's key; run `chmod 600` on it"
        );
    }
    PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| IdentityError::NoPem { path: path.to_owned(), what: "private key" })
}

fn check_chain(
    path: &Path,
    chain: &[CertificateDer<'static>],
    roots: &RootCertStore,
) -> Result<(), IdentityError> {
    let none = || IdentityError::NoPem { path: path.to_owned(), what: "certificate" };
    let (leaf, intermediates) = chain.split_first().ok_or_else(none)?;
    let parsed = ParsedCertificate::try_from(leaf).map_err(|_| none())?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let algorithms = provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        roots,
        intermediates,
        UnixTime::since_unix_epoch(now),
        algorithms,
    )
    .map_err(|source| {
        let path = path.to_owned();
        if is_about_time(&source) {
            IdentityError::NotValidNow { path, source }
        } else {
            IdentityError::NotOfAuthority { path, source }
        }
    })
}

fn is_about_time(error: &rustls::Error) -> bool {
    use rustls::CertificateError as E;
    matches!(
        error,
        rustls::Error::InvalidCertificate(
            E::Expired | E::ExpiredContext { .. } | E::NotValidYet | E::NotValidYetContext { .. }
        )
    )
}

fn check_key(
    path: &Path,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<(), IdentityError> {
    CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider())
        .map(drop)
        .map_err(|source| IdentityError::WrongKey { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{InitOptions, IssueOptions, init, issue};

    #[test]
    fn a_fresh_identity_loads_and_knows_its_name() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &InitOptions::default()).unwrap();
        let out = issue(dir.path(), "host-a", &IssueOptions::default()).unwrap();
        assert_eq!(Identity::load(&out).unwrap().name(), "host-a");
    }

    #[test]
    fn what_does_not_belong_together_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        init(&one, &InitOptions::default()).unwrap();
        init(&two, &InitOptions::default()).unwrap();
        let a = issue(&one, "a", &IssueOptions::default()).unwrap();
        let b = issue(&two, "b", &IssueOptions::default()).unwrap();

        fs::copy(b.join(CA_CERT), a.join(CA_CERT)).unwrap();
        let error = Identity::load(&a).unwrap_err();
        assert!(matches!(error, IdentityError::NotOfAuthority { .. }), "{error}");

        fs::copy(one.join(CA_CERT), a.join(CA_CERT)).unwrap();
        fs::copy(b.join(HOST_KEY), a.join(HOST_KEY)).unwrap();
        let error = Identity::load(&a).unwrap_err();
        assert!(matches!(error, IdentityError::WrongKey { .. }), "{error}");

        fs::write(a.join(HOST_CERT), "nothing").unwrap();
        let error = Identity::load(&a).unwrap_err();
        assert!(error.to_string().contains("cert.pem"), "{error}");

        fs::write(a.join(HOST_CERT), vec![b'x'; FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(matches!(Identity::load(&a), Err(IdentityError::TooLarge { .. })));
        fs::remove_file(a.join(HOST_CERT)).unwrap();
        assert!(matches!(Identity::load(&a), Err(IdentityError::File { .. })));
    }

    #[test]
    fn an_expired_identity_is_refused_at_home() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &InitOptions::default()).unwrap();
        let old = IssueOptions { days: 5, backdate_days: 10, out_dir: None };
        let out = issue(dir.path(), "old", &old).unwrap();
        let error = Identity::load(&out).unwrap_err();
        assert!(matches!(error, IdentityError::NotValidNow { .. }), "{error}");
    }
}
