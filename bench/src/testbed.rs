//! Two hosts on one machine, and guests in them.
//!
//! ```text
//!   namespace A                      namespace B
//!   QEMU (the guest)  ==== link0 ==== QEMU -incoming defer
//!   migrate send          TBF        migrate receive
//! ```
//! On loopback both hosts are one namespace without a shaped link. A relay, if the scenario has
//! one, runs at the destination, behind the link. For split guests there are memory servers, too, each in
//! a namespace with a link to A and one to B ([`framework::split_net`]).

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use framework::netns::{self, Netns, NetnsPair};
use framework::vm::READY_TIMEOUT;
use framework::{Backend, Env, Pki, QemuKind, SplitNet, Vm, VmSpec};
use tempfile::TempDir;

use crate::applications;
use crate::host::Host;
use crate::relay::Relay;
use crate::scenario::{LinkPart, Workload};

/// The destination's name in its certificate.
pub(crate) const DESTINATION_NAME: &str = "host-b";

/// Time over which a workload's rate is measured before a migration.
const RATE_WINDOW: Duration = Duration::from_secs(2);

/// Longest wait for an application that starts under emulation.
const APPLICATION_TIMEOUT: Duration = Duration::from_secs(600);

/// Longest wait for a worker that fills up to 12 GiB first, as long as the guest itself waits.
const FILL_TIMEOUT: Duration = Duration::from_secs(900);

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
    /// Identities of memory servers.
    pub(crate) servers: Vec<PathBuf>,
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
    pub(crate) fn open(qemu: QemuKind) -> Result<Self> {
        let env = Env::load()?;
        let migrate = migrate()?;
        let authority = Pki::init(&migrate)?;
        let (source, destination) =
            (authority.issue("host-a")?, authority.issue(DESTINATION_NAME)?);
        let servers = (0..SplitNet::SERVERS_MAX).map(|number| format!("memory-{number}"));
        let servers = servers.map(|name| authority.issue(&name)).collect::<Result<_>>()?;
        let folder = tempfile::tempdir().context("Cannot create a folder for journals")?;
        let host = Host::look(&env, &migrate, qemu)?;
        Ok(Self { env, migrate, source, destination, servers, host, folder, _authority: authority })
    }

    /// Journal folder of one end.
    pub(crate) fn journal(&self, end: &str) -> String {
        self.folder.path().join(end).display().to_string()
    }

    /// A folder of this run, made if it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).context("Cannot create a folder for certificates")?;
        Ok(path)
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

/// The two hosts.
#[derive(Debug)]
enum Hosts {
    /// Two namespaces and a veth pair, shaped or not.
    Veth(NetnsPair),
    /// One namespace and its loopback.
    Loopback(Netns),
    /// Those and memory servers, every two that talk joined by a link of the same rate.
    Split(SplitNet),
}

/// How the two hosts are joined.
#[derive(Debug)]
pub(crate) struct Link {
    hosts: Hosts,
    part: LinkPart,
}

impl Link {
    /// Two namespaces joined as a scenario says.
    ///
    /// # Errors
    /// Not root.
    pub(crate) fn veth(part: &LinkPart) -> Result<Self> {
        let hosts = NetnsPair::create(part.rate).map(Hosts::Veth)?;
        Ok(Self { hosts, part: part.clone() })
    }

    /// Two hosts and memory servers, all links as a scenario says.
    ///
    /// # Errors
    /// Not root.
    pub(crate) fn split(part: &LinkPart, servers: usize) -> Result<Self> {
        let hosts = SplitNet::create(servers, part.rate).map(Hosts::Split)?;
        Ok(Self { hosts, part: part.clone() })
    }

    /// One namespace.
    ///
    /// # Errors
    /// Not root.
    pub(crate) fn loopback() -> Result<Self> {
        let hosts = Netns::create("bench").map(Hosts::Loopback)?;
        Ok(Self { hosts, part: LinkPart { rate: 0, ..LinkPart::default() } })
    }

    /// Its rate in bits a second; 0 is unshaped.
    pub(crate) fn rate(&self) -> u64 {
        self.part.rate
    }

    /// The source's devices, one a link.
    pub(crate) fn devices(&self) -> &'static [&'static str] {
        match &self.hosts {
            Hosts::Veth(_) => &[netns::LINK],
            Hosts::Loopback(_) => &["lo"],
            Hosts::Split(net) => net.source_links(),
        }
    }

    /// Where the source finds what listens on `port` at the destination: there, or at a relay that
    /// this starts on the next port.
    ///
    /// # Errors
    /// The relay does not start.
    pub(crate) fn reach(&self, port: u16, turn: u32) -> Result<(SocketAddr, Option<Relay>)> {
        let to = SocketAddr::from((self.address(), port));
        if !self.part.is_relayed() {
            return Ok((to, None));
        }
        let listen = SocketAddr::from((self.address(), port + 1));
        let relay = Relay::start(self.destination(), listen, to, &self.part, turn)?;
        Ok((listen, Some(relay)))
    }

    /// As recorded.
    pub(crate) fn label(&self) -> &'static str {
        match &self.hosts {
            Hosts::Veth(_) => "veth",
            Hosts::Loopback(_) => "loopback",
            Hosts::Split(_) => "veths",
        }
    }

    /// The source's namespace.
    pub(crate) fn source(&self) -> &str {
        match &self.hosts {
            Hosts::Veth(pair) => pair.source.name(),
            Hosts::Loopback(netns) => netns.name(),
            Hosts::Split(net) => net.source.name(),
        }
    }

    /// The destination's namespace.
    pub(crate) fn destination(&self) -> &str {
        match &self.hosts {
            Hosts::Veth(pair) => pair.destination.name(),
            Hosts::Loopback(netns) => netns.name(),
            Hosts::Split(net) => net.main.name(),
        }
    }

    /// Namespaces and addresses of memory servers.
    pub(crate) fn servers(&self) -> Vec<(&str, Ipv4Addr)> {
        let Hosts::Split(net) = &self.hosts else { return vec![] };
        let named = |(number, netns)| (Netns::name(netns), SplitNet::server(number));
        net.servers.iter().enumerate().map(named).collect()
    }

    /// The destination's address. Ports are free: the namespace is ours.
    pub(crate) fn address(&self) -> Ipv4Addr {
        match &self.hosts {
            Hosts::Veth(_) => NetnsPair::DESTINATION,
            Hosts::Loopback(_) => Ipv4Addr::LOCALHOST,
            Hosts::Split(_) => SplitNet::MAIN,
        }
    }

    /// Bytes carried (from the source, to it) so far. Loopback does not tell the ways apart: all
    /// counts as the first. What goes between the destination and memory servers does not count.
    ///
    /// # Errors
    /// `ip` failed.
    pub(crate) fn bytes(&self) -> Result<(u64, u64)> {
        match &self.hosts {
            Hosts::Veth(pair) => pair.bytes(),
            Hosts::Loopback(netns) => netns.bytes("lo").map(|(_, sent)| (sent, 0)),
            Hosts::Split(net) => net.source_bytes(),
        }
    }
}

/// What guest to boot.
#[derive(Debug, Clone)]
pub(crate) struct GuestPlan {
    /// As recorded: the scenario, or what is measured instead.
    pub(crate) name: String,
    /// QEMU of both ends.
    pub(crate) qemu: QemuKind,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// Virtual CPUs.
    pub(crate) smp: u32,
    /// Programs.
    pub(crate) workload: Workload,
    /// Whether its memory is private in every mode.
    pub(crate) is_private: bool,
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
        let spec = match plan.workload.is_application() {
            true => spec.initrd(&applications::initrd()?),
            false => spec,
        };
        let spec = plan.workload.give_to(spec).netns(link.source());
        let waiting = spec.successor("target", plan.qemu).netns(link.destination());
        let mut source = Vm::start(&bed.env, spec).context("The guest does not start")?;
        let patience = match &plan.workload {
            workload if workload.is_application() => APPLICATION_TIMEOUT,
            workload if workload.is_worker() => FILL_TIMEOUT,
            _ => READY_TIMEOUT,
        };
        source.wait_ready(patience).context("The guest does not boot")?;
        if matches!(plan.workload, Workload::Resident { .. }) {
            source.ask("writer stop")?;
        }
        let destination = Vm::start(&bed.env, waiting).context("The destination does not start")?;
        Ok(Self { source, destination })
    }
}

/// What a guest's program has done so far, and when by the guest's clock in microseconds.
fn progress(vm: &mut Vm, command: &str, counter: &str) -> Result<(u64, u64)> {
    let answer = vm.ask(command)?;
    let done = framework::guest::number(&answer, counter)?;
    Ok((done, framework::guest::number(&answer, "elapsed_us")?))
}

/// Per second over [`RATE_WINDOW`], as far as the guest's clock moves.
fn rate(vm: &mut Vm, command: &str, counter: &str) -> Result<Option<f64>> {
    let first = progress(vm, command, counter)?;
    std::thread::sleep(RATE_WINDOW);
    let last = progress(vm, command, counter)?;
    let seconds = last.1.saturating_sub(first.1) as f64 / 1e6;
    Ok((seconds > 0.0).then(|| last.0.saturating_sub(first.0) as f64 / seconds))
}

/// Pages a second that a writer really writes: emulation may not reach what was asked.
///
/// # Errors
/// It does not answer.
pub(crate) fn writer_pages_per_s(plan: &GuestPlan, vm: &mut Vm) -> Result<Option<f64>> {
    match plan.workload {
        Workload::Writer { .. } => {
            rate(vm, "writer report", "pages").context("The writer does not report")
        }
        _ => Ok(None),
    }
}

/// Operations a second of an application, which must work without a fault.
///
/// # Errors
/// It does not answer, or it has found something wrong.
pub(crate) fn application_per_s(plan: &GuestPlan, vm: &mut Vm) -> Result<Option<f64>> {
    if !plan.workload.is_application() {
        return Ok(None);
    }
    rate(vm, "app report", "operations").context("The application does not report")
}

/// Waits until an application has done something from now on.
///
/// # Errors
/// It does not within `timeout`, or has found something wrong.
pub(crate) fn application_works(vm: &mut Vm, timeout: Duration) -> Result<()> {
    let first = progress(vm, "app report", "operations")?.0;
    framework::wait::until("the application to go on", timeout, || {
        Ok((progress(vm, "app report", "operations")?.0 > first).then_some(()))
    })
}
