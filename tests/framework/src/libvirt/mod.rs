//! Two hosts under libvirt on one machine: each a libvirtd of its own with domains that boot the
//! test guest in private RAM, and `virsh migrate` between them.
//!
//! ```text
//!    source, 10.77.0.1 ───────── link0, shaped ───────── destination, 10.77.0.2
//!    unshare                                             unshare
//!     └─ sh, the host's init                              └─ sh
//!         ├─ libvirtd (Libvirtd) ◄────── qemu+tcp ──────►     ├─ libvirtd
//!         └─ QEMU (Domain) ──────── migration stream ───►     └─ QEMU
//! ```
//! A host has namespaces of its own for network, mounts, processes and the host name. libvirt's
//! paths are compiled in; inside, they lead into the host's folder, so that a domain has the same
//! paths at both hosts, as a migration needs it, and different files.
//!
//! Invariants:
//! - All that a host runs ends with it: the kernel ends what is in a namespace of processes when its
//!   init is killed, and init is killed with the test.
//! - A host sees nothing of the machine's own libvirt and D-Bus (it has its own /run), of cgroups
//!   (`ip netns exec` mounts a /sys without them) or of KVM: domains run under TCG, and so does
//!   libvirt's own probing of QEMU.
//! - The daemons tell each other names and UUIDs that differ; libvirt refuses to migrate to its own host.

mod config;
mod daemon;
mod domain;
mod job;
mod migration;
mod xml;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

pub use daemon::Libvirtd;
pub use domain::Domain;
pub use job::Job;
pub use migration::{Migration, Moved, Way};

use crate::netns::NetnsPair;
use config::Host;

/// Both hosts.
#[derive(Debug)]
pub struct LibvirtPair {
    // Fields are dropped in this order: daemons end before their network does.
    /// The daemon of the source host.
    pub source: Libvirtd,
    /// The daemon of the destination host.
    pub destination: Libvirtd,
    /// The link between them.
    pub net: NetnsPair,
    _cache: TempDir,
}

impl LibvirtPair {
    /// Starts both daemons; each end of the link is shaped to `bits_per_s`, or not at all if it is 0.
    ///
    /// # Errors
    /// Not root, libvirt is not installed, or a daemon did not start; its log is in the error.
    pub fn start(bits_per_s: u64) -> Result<Self> {
        let net = NetnsPair::create(bits_per_s)?;
        // What a QEMU can do takes seconds to find out: what one daemon has found is there for both.
        let cache = tempfile::Builder::new()
            .prefix("godwit-libvirt-cache-")
            .tempdir()
            .context("Cannot create a folder for libvirt's cache")?;
        let source = Libvirtd::start(&net.source, &Host::SOURCE, cache.path())?;
        let destination = Libvirtd::start(&net.destination, &Host::DESTINATION, cache.path())?;
        Ok(Self { source, destination, net, _cache: cache })
    }
}
