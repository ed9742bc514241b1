//! Making a certificate authority and host identities.
//!
//! ```text
//! DIR/ca.pem  DIR/ca.key            init DIR
//! DIR/NAME/{cert.pem,key.pem,ca.pem}    issue DIR NAME
//! ```
//!
//! An authority is good for one cluster: every host that holds an identity of it may bring guests
//! to every other. Its key stays where it was made; a host needs its own directory alone. There is
//! no revocation: identities are meant to be short-lived and issued again.
//!
//! Nothing is ever overwritten.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use migrate_core::error::{Classify, ErrorBin};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use thiserror::Error;
use time::{Duration, OffsetDateTime};

use crate::tls::random;

/// The authority's certificate, in the authority's and in every identity's directory.
pub const CA_CERT: &str = "ca.pem";

/// The authority's key.
pub const CA_KEY: &str = "ca.key";

/// A host's certificate.
pub const HOST_CERT: &str = "cert.pem";

/// A host's key.
pub const HOST_KEY: &str = "key.pem";

/// Longest name of a host: that of a label and of a certificate's common name.
pub const NAME_BYTES_MAX: usize = 63;

/// Longest validity in days that may be asked for: a hundred years.
pub const DAYS_MAX: u32 = 36_525;

/// How an authority is made.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// The authority's name, shown by certificate tools.
    pub name: String,
    /// Days that it is valid.
    pub days: u32,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self { name: "Godwit authority".into(), days: 3650 }
    }
}

/// How an identity is issued.
#[derive(Debug, Clone)]
pub struct IssueOptions {
    /// Days that it is valid, counted from its beginning.
    pub days: u32,
    /// Days by which its beginning lies in the past, beyond the hour that is always granted for
    /// clocks that differ.
    pub backdate_days: u32,
    /// Where the identity's three files go; `DIR/NAME` if not given.
    pub out_dir: Option<PathBuf>,
}

impl Default for IssueOptions {
    fn default() -> Self {
        Self { days: 397, backdate_days: 0, out_dir: None }
    }
}

/// Why an authority or identity could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file is there already.
    #[error("{path:?} exists and is not overwritten; remove it or choose another directory")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("Cannot {what} {path:?}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A host's name that cannot be used.
    #[error(
        "{name:?} is no host name: 1 to 63 letters, digits, '-' and '.', not all of them \
             digits and dots, labels neither empty nor beginning or ending with '-'"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A validity out of range.
    #[error("A validity of {days} days is out of range; 1 to {DAYS_MAX} are allowed")]
    BadDays {
        /// Days asked for.
        days: u32,
    },
    /// The authority's files do not hold what they should.
    #[error("{path:?} holds no usable certificate authority; make one with `migrate pki init`")]
    BadAuthority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rcgen::Error,
    },
    /// A key or certificate could not be made.
    #[error("Cannot make a key or certificate for {name:?}")]
    Generate {
        /// For whom.
        name: String,
        /// What is wrong.
        #[source]
        source: rcgen::Error,
    },
}

impl Classify for PkiError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Exists { .. }
            | Self::BadName { .. }
            | Self::BadDays { .. }
            | Self::BadAuthority { .. } => ErrorBin::CallerMisuse,
            Self::File { .. } | Self::Generate { .. } => ErrorBin::System,
        }
    }
}

/// Makes an authority in `dir`, which is created if it is missing.
///
/// # Errors
/// [`PkiError`]; an authority that exists is left alone.
pub fn init(dir: &Path, options: &InitOptions) -> Result<(), PkiError> {
    check_days(options.days)?;
    let generate = |source| PkiError::Generate { name: options.name.clone(), source };
    let mut params = CertificateParams::new(Vec::new()).map_err(generate)?;
    // Every authority has a name of its own, so that a certificate of another one is recognised as
    // such instead of as a bad signature.
    let mut tag = [0; 4];
    random(&mut tag).map_err(|_| generate(rcgen::Error::RingUnspecified))?;
    let tag = u32::from_be_bytes(tag);
    params.distinguished_name = distinguished_name(&format!("{} {tag:08x}", options.name));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, options.days, 0);
    let key = KeyPair::generate().map_err(generate)?;
    let cert = params.self_signed(&key).map_err(generate)?;

    make_dir(dir)?;
    // The certificate first: two that run at once then collide before a key is lost.
    write_new(&dir.join(CA_CERT), &cert.pem(), 0o644)?;
    write_new(&dir.join(CA_KEY), &key.serialize_pem(), 0o600)
}

/// Issues an identity named `name` with the authority in `dir`; returns the identity's directory.
///
/// # Errors
/// [`PkiError`]; an identity that exists is left alone.
pub fn issue(dir: &Path, name: &str, options: &IssueOptions) -> Result<PathBuf, PkiError> {
    check_name(name)?;
    check_days(options.days)?;
    let generate = |source| PkiError::Generate { name: name.to_owned(), source };
    let ca_pem = read(&dir.join(CA_CERT))?;
    let key_path = dir.join(CA_KEY);
    let ca_key = KeyPair::from_pem(&read(&key_path)?)
        .map_err(|source| PkiError::BadAuthority { path: key_path, source })?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key)
        .map_err(|source| PkiError::BadAuthority { path: dir.join(CA_CERT), source })?;

    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(generate)?;
    params.distinguished_name = distinguished_name(name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, options.days, options.backdate_days);
    let key = KeyPair::generate().map_err(generate)?;
    let cert = params.signed_by(&key, &issuer).map_err(generate)?;

    let out = options.out_dir.clone().unwrap_or_else(|| dir.join(name));
    make_dir(&out)?;
    write_new(&out.join(HOST_CERT), &cert.pem(), 0o644)?;
    write_new(&out.join(HOST_KEY), &key.serialize_pem(), 0o600)?;
    write_new(&out.join(CA_CERT), &ca_pem, 0o644)?;
    Ok(out)
}

/// Checks that `name` is a host name and thereby no path.
pub(crate) fn check_name(name: &str) -> Result<(), PkiError> {
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    // A name of digits and dots would be taken for an IP address.
    let only_digits = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if name.len() > NAME_BYTES_MAX || only_digits || !name.split('.').all(label_ok) {
        return Err(PkiError::BadName { name: name.to_owned() });
    }
    Ok(())
}

fn check_days(days: u32) -> Result<(), PkiError> {
    if (1..=DAYS_MAX).contains(&days) { Ok(()) } else { Err(PkiError::BadDays { days }) }
}

fn set_validity(params: &mut CertificateParams, days: u32, backdate_days: u32) {
    let backdate = Duration::days(i64::from(backdate_days.min(DAYS_MAX))) + Duration::hours(1);
    let begin = OffsetDateTime::now_utc() - backdate;
    params.not_before = begin;
    params.not_after = begin + Duration::days(i64::from(days)) + Duration::hours(1);
}

fn distinguished_name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

fn make_dir(dir: &Path) -> Result<(), PkiError> {
    let failed = |source| PkiError::File { what: "create", path: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)
}

fn read(path: &Path) -> Result<String, PkiError> {
    let failed = |source| PkiError::File { what: "read", path: path.to_owned(), source };
    fs::read_to_string(path).map_err(failed)
}

fn write_new(path: &Path, contents: &str, mode: u32) -> Result<(), PkiError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::File { what: "write", path: path.to_owned(), source },
    };
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(contents.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn names_that_are_paths_or_addresses_are_refused() {
        for name in
            ["", ".", "..", "a/b", "../x", "-a", "a-", "a..b", "10.0.0.1", "a b", "ä", "a\0"]
        {
            assert!(matches!(check_name(name), Err(PkiError::BadName { .. })), "{name:?}");
        }
        assert!(check_name(&"a".repeat(64)).is_err());
        for name in ["a", "host-1", "rack2.example", "7up"] {
            check_name(name).unwrap();
        }
    }

    #[test]
    fn nothing_is_overwritten_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        init(&ca, &InitOptions::default()).unwrap();
        let before = fs::read(ca.join(CA_KEY)).unwrap();
        assert!(matches!(init(&ca, &InitOptions::default()), Err(PkiError::Exists { .. })));
        assert_eq!(fs::read(ca.join(CA_KEY)).unwrap(), before);

        let out = issue(&ca, "host-a", &IssueOptions::default()).unwrap();
        assert_eq!(out, ca.join("host-a"));
        let again = issue(&ca, "host-a", &IssueOptions::default());
        assert!(matches!(again, Err(PkiError::Exists { .. })));
        for key in [ca.join(CA_KEY), out.join(HOST_KEY)] {
            let mode = fs::metadata(&key).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{key:?}");
        }
    }

    #[test]
    fn a_missing_authority_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = issue(dir.path(), "a", &IssueOptions::default()).unwrap_err();
        assert!(error.to_string().contains("ca.pem"), "{error}");
        let none = IssueOptions { days: 0, ..IssueOptions::default() };
        assert!(matches!(issue(dir.path(), "a", &none), Err(PkiError::BadDays { days: 0 })));
    }
}
