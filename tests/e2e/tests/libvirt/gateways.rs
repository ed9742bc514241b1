//! Two hosts under libvirt with gateways between them.
//!
//! ```text
//!  host-a                                             host-b
//!  QEMU ─► 127.0.0.1:49216-49279 gateway ═══ TLS ═══► gateway :7800 ─► 127.0.0.1, same port, QEMU
//!  QEMU, same port, 127.0.0.1 ◄─ :7800 gateway ◄═ TLS ═══ gateway 127.0.0.1:49152-49215 ◄─ QEMU
//! ```
//! The commands are those of docs/GATEWAY.md.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use e2e::PATIENCE;
use framework::libvirt::Libvirtd;
use framework::netns::Netns;
use framework::{Engine, Env, LibvirtPair, Pki, metrics, wait};
use serde_json::Value;

/// Where gateways listen for each other.
const PORT: u16 = 7800;

/// Where the gateway at a migration's source tells its metrics, and that at its destination.
const METRICS: [&str; 2] = ["127.0.0.1:7801", "127.0.0.1:7802"];

/// Two hosts, and an identity for each.
pub(crate) struct Site {
    pub(crate) env: Env,
    pub(crate) pair: LibvirtPair,
    migrate: PathBuf,
    pki: Pki,
}

/// One of the two directions.
#[derive(Clone, Copy)]
pub(crate) struct Direction<'a> {
    from: &'a Libvirtd,
    to: &'a Libvirtd,
    /// Of both hosts.
    netns: [&'a Netns; 2],
}

/// Where QEMUs meet the gateways.
#[derive(Clone, Copy)]
pub(crate) enum Sockets {
    /// At the ports from which libvirt chooses one for each migration.
    Ports,
    /// At a Unix socket of this name in `/run` of both hosts.
    Unix(&'static str),
}

/// A pair of gateways for one direction.
pub(crate) struct Gateways<'a> {
    site: &'a Site,
    direction: Direction<'a>,
    sockets: Sockets,
    source: Engine,
    destination: Engine,
}

/// One of the two.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    Source,
    Destination,
}

impl Site {
    /// Each end of the link is shaped to `bits_per_s`, or not at all if it is 0.
    pub(crate) fn start(bits_per_s: u64) -> Result<Self> {
        let env = Env::load()?;
        let migrate = env.migrate()?;
        let pki = Pki::init(&migrate)?;
        let pair = LibvirtPair::start(bits_per_s)?;
        for host in [&pair.source, &pair.destination] {
            pki.issue(host.name())?;
        }
        Ok(Self { env, pair, migrate, pki })
    }

    /// Gateways from the source host to the destination.
    pub(crate) fn there(&self, sockets: Sockets) -> Result<Gateways<'_>> {
        let LibvirtPair { source, destination, net, .. } = &self.pair;
        let netns = [&net.source, &net.destination];
        self.gateways(Direction { from: source, to: destination, netns }, sockets)
    }

    /// Gateways back from there.
    pub(crate) fn back(&self, sockets: Sockets) -> Result<Gateways<'_>> {
        let LibvirtPair { source, destination, net, .. } = &self.pair;
        let netns = [&net.destination, &net.source];
        self.gateways(Direction { from: destination, to: source, netns }, sockets)
    }

    fn gateways<'a>(&'a self, direction: Direction<'a>, sockets: Sockets) -> Result<Gateways<'a>> {
        let destination = self.destination(direction, sockets)?;
        let source = self.source(direction, sockets)?;
        Ok(Gateways { site: self, direction, sockets, source, destination })
    }

    fn source(
        &self,
        Direction { from, to, .. }: Direction<'_>,
        sockets: Sockets,
    ) -> Result<Engine> {
        let listen = match sockets {
            Sockets::Ports => ports(to),
            Sockets::Unix(name) => unix(&from.run_file(name)),
        };
        let to_gateway = format!("{}:{PORT}", to.address());
        let words = ["source", "--listen", &listen, "--to", &to_gateway, "--json"];
        self.gateway((from, to), &words, METRICS[0])
    }

    fn destination(
        &self,
        Direction { from, to, .. }: Direction<'_>,
        sockets: Sockets,
    ) -> Result<Engine> {
        let qemu = match sockets {
            Sockets::Ports => ports(to),
            Sockets::Unix(name) => unix(&to.run_file(name)),
        };
        let listen = format!("{}:{PORT}", to.address());
        let words = ["destination", "--listen", &listen, "--qemu", &qemu];
        self.gateway((to, from), &words, METRICS[1])
    }

    fn gateway(
        &self,
        (at, peer): (&Libvirtd, &Libvirtd),
        words: &[&str],
        metrics: &str,
    ) -> Result<Engine> {
        let identity = self.pki.folder().join(at.name()).display().to_string();
        let rest = ["--identity", &identity, "--peer", peer.name(), "--metrics", metrics];
        let words = [&["gateway"], words, &rest].concat();
        let mut gateway = Engine::start(&self.migrate, &words, Some(at.netns()))?;
        gateway.wait_line("listening on ", PATIENCE)?;
        Ok(gateway)
    }
}

/// Where the QEMUs of a host wait, and those that send to it are waited for.
fn ports(to: &Libvirtd) -> String {
    let (first, last) = to.migration_ports();
    format!("127.0.0.1:{first}-{last}")
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

impl Gateways<'_> {
    /// Kills one with SIGKILL.
    pub(crate) fn kill(&mut self, end: End) -> Result<()> {
        let engine = match end {
            End::Source => &mut self.source,
            End::Destination => &mut self.destination,
        };
        engine.signal(nix::sys::signal::Signal::SIGKILL)?;
        let ended = || Ok((!engine.running()?).then_some(()));
        wait::until("the end of a gateway that was killed", PATIENCE, ended)
    }

    /// Starts one anew.
    pub(crate) fn restart(&mut self, end: End) -> Result<()> {
        match end {
            End::Source => self.source = self.site.source(self.direction, self.sockets)?,
            End::Destination => {
                self.destination = self.site.destination(self.direction, self.sockets)?;
            }
        }
        Ok(())
    }

    /// Waits until the gateway at the source has reported so many guests since it was started, and returns all.
    pub(crate) fn reports(&self, count: usize) -> Result<Vec<Value>> {
        let reports = wait::until("a gateway's reports", PATIENCE, || {
            let text = self.source.stdout();
            let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let reports: Vec<&str> = lines.collect();
            let reports = reports.into_iter().map(serde_json::from_str);
            let reports = reports.collect::<Result<Vec<Value>, _>>().context("No JSON")?;
            Ok((reports.len() >= count).then_some(reports))
        });
        reports.with_context(|| self.said())
    }

    /// Waits until one of the reports from the `known` first ones on names the `cause`; what those say that are there
    /// then. Of several connections each has one, in any order, and none says that a guest was passed on.
    pub(crate) fn refused(&self, known: usize, cause: &str) -> Result<Vec<String>> {
        let named = wait::until("a report that names the cause", PATIENCE, || {
            let reports = self.reports(known)?;
            let errors = reports.iter().skip(known).map(|report| {
                let error = report["error"].as_str().map(str::to_owned);
                error.with_context(|| format!("Passed on: {report}"))
            });
            let errors = errors.collect::<Result<Vec<String>>>()?;
            Ok(errors.iter().any(|error| error.contains(cause)).then_some(errors))
        });
        named.with_context(|| format!("{cause}: {}", self.said()))
    }

    /// Waits until no guest is under way.
    pub(crate) fn wait_idle(&self) -> Result<()> {
        for end in [End::Source, End::Destination] {
            let idle = wait::until("no guests under way", PATIENCE, || {
                let under_way = metrics::sum(&self.metrics(end)?, "godwit_gateway_guests")?;
                Ok((under_way == Some(0)).then_some(()))
            });
            idle.with_context(|| self.said())?;
        }
        Ok(())
    }

    /// What a gateway tells about itself.
    pub(crate) fn metrics(&self, end: End) -> Result<String> {
        let [source, destination] = self.direction.netns;
        let (netns, address) = match end {
            End::Source => (source, METRICS[0]),
            End::Destination => (destination, METRICS[1]),
        };
        let asked = netns.spawn(move || metrics::get(address))?;
        asked.join().map_err(|_| anyhow!("Asking for metrics panicked"))?
    }

    /// What both said, for error texts.
    pub(crate) fn said(&self) -> String {
        format!("source: {}\ndestination: {}", self.source.stderr(), self.destination.stderr())
    }
}
