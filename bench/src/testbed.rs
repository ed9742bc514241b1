//! Two hosts on one machine, and guests in them.
//!
//! ```text
//!   namespace A                      namespace B
//!   QEMU (the guest)  ==== link0 ==== QEMU -incoming defer
//!   migrate send          TBF        migrate receive
//! ```
//! On loopback both hosts are one namespace without a shaped link.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use framework::netns::{Netns, NetnsPair};
use framework::{Backend, Env, Pki, QemuKind, Vm, VmSpec};
use tempfile::TempDir;

use crate::args::CommonArgs;
use crate::host::Host;
use crate::workload::Workload;

/// What all measurements of a run share.
#[derive(Debug)]
pub(crate) struct Bed {
    /// Kernel, guest image, QEMUs.
    pub(crate) env: Env,
    /// The command under test.
    pub(crate) migrate: PathBuf,
    /// Identity of the source host.
    pub(crate) source: PathBuf,
    /// Identity of the destination host.
    pub(crate) destination: PathBuf,
    /// Machine and versions.
    pub(crate) host: Host,
    folder: TempDir,
    _authority: Pki,
}

impl Bed {
    /// Finds everything and makes identities.
    ///
    /// # Errors
    /// Setup was not run, or `migrate` was not built for release.
    pub(crate) fn open(args: &CommonArgs) -> Result<Self> {
        let env = Env::load()?;
        let migrate = migrate()?;
        let authority = Pki::init(&migrate)?;
        let (source, destination) = (authority.issue("host-a")?, authority.issue("host-b")?);
        let folder = tempfile::tempdir().context("Cannot create a folder for journals")?;
        let host = Host::look(&env, &migrate, args.qemu)?;
        Ok(Self { env, migrate, source, destination, host, folder, _authority: authority })
    }

    /// Journal folder of one end.
    pub(crate) fn journal(&self, end: &str) -> String {
        self.folder.path().join(end).display().to_string()
    }
}

/// `GODWIT_MIGRATE`, or cargo's release build.
fn migrate() -> Result<PathBuf> {
    release("GODWIT_MIGRATE", "migrate", "cargo build --release -p migrate-cli")
}

/// A program that cargo built for release.
///
/// # Errors
/// It is not there; the text says how to build it.
pub(crate) fn release(variable: &str, name: &str, how: &str) -> Result<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release");
    let path =
        std::env::var_os(variable).map_or_else(|| PathBuf::from(folder).join(name), PathBuf::from);
    path.canonicalize()
        .with_context(|| format!("No program at {}; build it with `{how}`", path.display()))
}

/// How the two hosts are joined.
#[derive(Debug)]
pub(crate) enum Link {
    /// Two namespaces and a veth pair, shaped or not.
    Veth(NetnsPair),
    /// One namespace and its loopback.
    Loopback(Netns),
}

impl Link {
    /// Two namespaces joined at a rate; 0 is unshaped.
    ///
    /// # Errors
    /// Not root.
    pub(crate) fn veth(bits_per_s: u64) -> Result<Self> {
        NetnsPair::create(bits_per_s).map(Self::Veth)
    }

    /// One namespace.
    ///
    /// # Errors
    /// Not root.
    pub(crate) fn loopback() -> Result<Self> {
        Netns::create("bench").map(Self::Loopback)
    }

    /// As recorded.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Veth(_) => "veth",
            Self::Loopback(_) => "loopback",
        }
    }

    /// The source's namespace.
    pub(crate) fn source(&self) -> &str {
        match self {
            Self::Veth(pair) => pair.source.name(),
            Self::Loopback(netns) => netns.name(),
        }
    }

    /// The destination's namespace.
    pub(crate) fn destination(&self) -> &str {
        match self {
            Self::Veth(pair) => pair.destination.name(),
            Self::Loopback(netns) => netns.name(),
        }
    }

    /// The destination's address. Ports are free: the namespace is ours.
    pub(crate) fn address(&self) -> Ipv4Addr {
        match self {
            Self::Veth(_) => NetnsPair::DESTINATION,
            Self::Loopback(_) => Ipv4Addr::LOCALHOST,
        }
    }

    /// Bytes carried to (destination, source) so far. Loopback does not tell the ways apart: all
    /// counts as the first.
    ///
    /// # Errors
    /// `ip` failed.
    pub(crate) fn bytes(&self) -> Result<(u64, u64)> {
        match self {
            Self::Veth(pair) => pair.bytes(),
            Self::Loopback(netns) => netns.bytes("lo").map(|(_, sent)| (sent, 0)),
        }
    }
}

/// What guest to boot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GuestPlan {
    /// QEMU of both ends.
    pub(crate) qemu: QemuKind,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// Virtual CPUs.
    pub(crate) smp: u32,
    /// Programs.
    pub(crate) workload: Workload,
    /// Resident data of [`Workload::Resident`] in MiB.
    pub(crate) resident_mib: u64,
}

/// A guest that runs at the source, and a QEMU that waits for it.
#[derive(Debug)]
pub(crate) struct Guests {
    /// Runs the guest.
    pub(crate) source: Vm,
    /// Waits.
    pub(crate) destination: Vm,
}

impl Guests {
    /// Boots a guest, brings it into the workload's state and starts the waiting QEMU.
    ///
    /// # Errors
    /// QEMU does not start, or the guest does not become ready.
    pub(crate) fn boot(bed: &Bed, link: &Link, plan: &GuestPlan, backend: Backend) -> Result<Self> {
        let spec = VmSpec::new("source", plan.qemu).memory_mib(plan.memory_mib).smp(plan.smp);
        let spec = spec.backend(backend);
        let spec = plan.workload.give_to(spec, plan.resident_mib).netns(link.source());
        let waiting = spec.successor("target", plan.qemu).netns(link.destination());
        let mut source = Vm::boot(&bed.env, spec).context("The guest does not boot")?;
        plan.workload.prepare(&mut source)?;
        let destination = Vm::start(&bed.env, waiting).context("The destination does not start")?;
        Ok(Self { source, destination })
    }
}
