//! TLS for QEMU's own migration, with the identities that Godwit uses.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use framework::Qmp;
use serde_json::json;
use transport::pki::{CA_CERT, HOST_CERT, HOST_KEY};

use crate::testbed::{Bed, DESTINATION_NAME, Guests};

/// The object in QEMU.
const CREDENTIALS: &str = "bench-tls";

/// Lets both ends encrypt and prove who they are.
///
/// # Errors
/// QEMU does not take the certificates.
pub(crate) fn switch_on(bed: &Bed, guests: &mut Guests) -> Result<()> {
    give(bed, guests.destination.qmp(), &bed.destination, "server")?;
    give(bed, guests.source.qmp(), &bed.source, "client")
}

fn give(bed: &Bed, qmp: &mut Qmp, identity: &Path, endpoint: &str) -> Result<()> {
    let folder = bed.folder(endpoint)?;
    // By the names that QEMU looks for (crypto/tlscredsx509.c).
    let names = [
        (CA_CERT, "ca-cert.pem".to_owned()),
        (HOST_CERT, format!("{endpoint}-cert.pem")),
        (HOST_KEY, format!("{endpoint}-key.pem")),
    ];
    for (ours, theirs) in names {
        fs::copy(identity.join(ours), folder.join(theirs))
            .with_context(|| format!("Cannot copy {ours} for QEMU"))?;
    }
    let credentials = json!({
        "qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": folder, "endpoint": endpoint,
        "verify-peer": true,
    });
    qmp.execute("object-add", credentials).context("QEMU does not take the certificates")?;
    let parameters = json!({ "tls-creds": CREDENTIALS, "tls-hostname": DESTINATION_NAME });
    qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}
