//! Guests that are split: memory servers, the split with its checks, and the merge with its own.
//!
//! ```text
//!  Vm ── Rig::split ──> Split { vm at the main host, paged } ── Split::merge ──> Merged { vm, whole }
//!                         └─ RamWatch: its RAM file stays below the limit
//! ```
//! Invariant: of a guest that [`Split::merge`] gives back nothing is left at any server, and nothing of a
//! pager at its QEMU.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use framework::memory_server::ServerOptions;
use framework::metrics;
use framework::split::{SplitState, arguments};
use framework::worker::{self, Phase};
use framework::{
    Engine, MemoryServer, Pager, QemuKind, RamSeen, RamWatch, Status, Vm, VmSpec, wait,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::untouched::{assert_detached, source_journals};
use crate::{PATIENCE, Rig, check_alive, free_address};

/// Pages in one MiB.
pub const PAGES_PER_MIB: u64 = 256;

const MIB: u64 = 1 << 20;

/// What the main host may hold of a guest that works on more than that.
pub const WORKING_RESIDENT_MIB: u64 = 128;

/// The area that it works on: with the rest of the guest it does not fit there.
const HOT_MIB: u64 = 140;

/// Pages of it to work on before and after something happens.
pub const WORK_PAGES: u64 = HOT_MIB * PAGES_PER_MIB / 2;

/// Longest time for that.
const WORK_WITHIN: Duration = Duration::from_secs(200);

/// Longest wait for servers to be empty after their guest was merged, or after its source told them: less than a lease.
pub const EMPTY_WITHIN: Duration = Duration::from_secs(30);

/// What a server offers and how.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// Capacity in MiB.
    pub capacity_mib: u64,
    /// Further arguments of `migrate memory-server`.
    pub extra: &'a [&'a str],
}

/// Room for all that the tests' guests have.
pub const OFFER: Offer<'_> = Offer { capacity_mib: 1024, extra: &[] };

/// Identities of memory servers. A name is issued once.
#[derive(Debug)]
pub struct ServerIdentities(pub Vec<PathBuf>);

/// A guest that is to work on more memory than its main host may hold.
#[must_use]
pub fn at_work(kind: QemuKind) -> VmSpec {
    VmSpec::new("working", kind)
        .memory_mib(512)
        .with("godwit.checker=size=24,seed=5")
        .with(&format!("godwit.worker=hot_mib={HOT_MIB},fresh_mib=16,order=random,seed=9"))
}

impl Rig {
    /// Issues identities of `count` memory servers.
    ///
    /// # Errors
    /// It failed, or they were issued before.
    pub fn server_identities(&self, count: usize) -> Result<ServerIdentities> {
        let names = (0..count).map(|number| format!("memory-{number}"));
        names.map(|name| self.pki.issue(&name)).collect::<Result<_>>().map(ServerIdentities)
    }

    /// Starts a memory server of each identity on loopback.
    ///
    /// # Errors
    /// One does not start.
    pub fn memory_servers(
        &self,
        identities: &ServerIdentities,
        offer: &Offer<'_>,
    ) -> Result<Vec<MemoryServer>> {
        let start = |identity: &PathBuf| self.memory_server(identity, "127.0.0.1:0", offer);
        identities.0.iter().map(start).collect()
    }

    /// Two memory servers, and one more for later.
    ///
    /// # Errors
    /// One does not start.
    pub fn servers_and_a_spare(&self) -> Result<(Vec<MemoryServer>, MemoryServer)> {
        let mut servers = self.memory_servers(&self.server_identities(3)?, &OFFER)?;
        let spare = servers.pop().context("There are three")?;
        Ok((servers, spare))
    }

    /// Starts a memory server of this identity that listens at `listen`.
    ///
    /// # Errors
    /// It does not listen.
    pub fn memory_server(
        &self,
        identity: &Path,
        listen: &str,
        offer: &Offer<'_>,
    ) -> Result<MemoryServer> {
        self.memory_server_in(identity, listen, offer, None)
    }

    /// The same in a network namespace.
    ///
    /// # Errors
    /// It does not listen.
    pub fn memory_server_in(
        &self,
        identity: &Path,
        listen: &str,
        offer: &Offer<'_>,
        netns: Option<&str>,
    ) -> Result<MemoryServer> {
        MemoryServer::start(&ServerOptions {
            program: &self.migrate,
            identity,
            listen,
            capacity_mib: offer.capacity_mib,
            netns,
            extra: offer.extra,
        })
    }

    /// Starts `migrate split --json`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_split(
        &self,
        vm: &Vm,
        to: &str,
        servers: &[MemoryServer],
        resident_mib: u64,
        extra: &[&str],
    ) -> Result<Engine> {
        self.start_split_from(vm, "source", to, servers, resident_mib, extra)
    }

    /// The same at the end whose journals are in `end`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_split_from(
        &self,
        vm: &Vm,
        end: &str,
        to: &str,
        servers: &[MemoryServer],
        resident_mib: u64,
        extra: &[&str],
    ) -> Result<Engine> {
        self.start_split_as(vm, to, end, (servers, resident_mib), extra, None)
    }

    /// The same in a network namespace.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_split_in(
        &self,
        vm: &Vm,
        to: &str,
        over: (&[MemoryServer], u64),
        extra: &[&str],
        netns: &str,
    ) -> Result<Engine> {
        self.start_split_as(vm, to, "source", over, extra, Some(netns))
    }

    /// With the servers and what the main host may hold, in MiB.
    fn start_split_as(
        &self,
        vm: &Vm,
        to: &str,
        end: &str,
        (servers, resident_mib): (&[MemoryServer], u64),
        extra: &[&str],
        netns: Option<&str>,
    ) -> Result<Engine> {
        let own = arguments(servers, Some(resident_mib));
        let extra: Vec<&str> =
            own.iter().map(String::as_str).chain(extra.iter().copied()).collect();
        let words = ["split", "--json", "--to", to];
        self.start_end(vm, &words, (&self.source, end), &extra, netns)
    }

    /// Starts `migrate merge`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_merge(&self, vm: &Vm) -> Result<Engine> {
        let (qmp, journal) = (vm.qmp_engine().display().to_string(), self.journal("destination"));
        let words = ["merge", "--json", "--qmp", &qmp, "--journal", &journal];
        Engine::start(&self.migrate, &words, None)
    }

    /// Starts `migrate send` at the end whose journals are in `end`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn send_from(&self, vm: &Vm, end: &str, to: &str) -> Result<Engine> {
        self.start_end(vm, &["send", "--json", "--to", to], (&self.source, end), &[], None)
    }

    /// The pager of a VM that was split into this host.
    #[must_use]
    pub fn pager(&self, vm: &Vm) -> Pager<'_> {
        Pager::of(&self.migrate, vm, self.journal("destination"))
    }

    /// A guest that is split and at work on more memory than its main host may hold.
    ///
    /// # Errors
    /// As [`Self::split`].
    pub fn split_at_work(&self, servers: &[MemoryServer], extra: &[&str]) -> Result<Split> {
        let kind = QemuKind::V10_0;
        let source = Vm::boot(&self.env, at_work(kind))?;
        let mut split = self.split(source, kind, servers, WORKING_RESIDENT_MIB, extra)?;
        worker::set_phase(&mut split.vm, Phase::Hot)?;
        split.work()?;
        Ok(split)
    }

    /// Splits a VM over loopback into a fresh QEMU of `kind` and checks what must hold for every split: it
    /// completed, the guest runs on at the main host and nowhere else, its report and the pager's status agree with
    /// what was asked for, and all servers hold some of it.
    ///
    /// # Errors
    /// The first of these that does not hold.
    pub fn split(
        &self,
        mut source: Vm,
        kind: QemuKind,
        servers: &[MemoryServer],
        resident_mib: u64,
        extra: &[&str],
    ) -> Result<Split> {
        let mut vm = Vm::start(&self.env, source.spec().successor("main", kind))?;
        let watch = RamWatch::begin(&vm);
        let listen = free_address()?;
        let metrics = metrics::free_port()?;
        let receive = self.receive(&vm, &listen, &["--metrics", &metrics])?;
        let split = self.start_split(&source, &listen, servers, resident_mib, extra)?;
        let sent = split.wait(PATIENCE)?;
        let report = sent.json().cloned()?;
        if sent.code != Some(0) {
            let there = receive.stderr();
            anyhow::bail!("split: {}\nreport: {report}\nreceive: {there}", sent.stderr);
        }
        let pulse = check_alive(&mut source, &mut vm)?;
        let outage_ms = pulse.handover(0, 1).map(|gap| gap.outage_ms());
        let outage_ms = outage_ms.context("The heartbeat shows no hand-over")?;
        let identity = self.destination.clone();
        let split =
            Split { vm, receive, identity, metrics, report, outage_ms, watch, resident_mib };
        let copies = if extra.windows(2).any(|pair| pair == ["--copies", "2"]) { 2 } else { 1 };
        split.check_report(servers, copies).with_context(|| format!("report: {}", split.report))?;
        split.check_status(self)?;
        Ok(split)
    }
}

/// A split guest.
#[derive(Debug)]
pub struct Split {
    /// The VM at the main host.
    pub vm: Vm,
    /// Its pager: `migrate receive`, which stays.
    pub receive: Engine,
    /// The identity of its main host.
    identity: PathBuf,
    /// Where the pager tells its metrics.
    metrics: String,
    /// The report of `migrate split`.
    pub report: Value,
    /// Outage of the split as the heartbeat showed it from outside.
    pub outage_ms: f64,
    watch: RamWatch,
    resident_mib: u64,
}

/// Another main host that waits for a split guest.
#[derive(Debug)]
pub struct NextHost {
    /// The VM that waits.
    pub vm: Vm,
    /// Its `migrate receive`.
    pub receive: Engine,
    identity: PathBuf,
    metrics: String,
    /// Where that listens.
    pub listen: String,
    watch: RamWatch,
}

/// What a merge left.
#[derive(Debug)]
pub struct Merged {
    /// The VM, whole.
    pub vm: Vm,
    /// What its RAM file took while it was split, since before the guest came.
    pub ram: RamSeen,
    /// The pager's last status before the merge.
    pub status: Status,
    /// How long `migrate merge` took.
    pub took: Duration,
}

/// A whole number of a report.
///
/// # Errors
/// There is none.
pub fn number(report: &Value, field: &str) -> Result<u64> {
    report.pointer(field).and_then(Value::as_u64).with_context(|| format!("{field}: {report}"))
}

impl Split {
    /// A guest that was made by [`Rig::split_at_work`] goes through half of what it works on.
    ///
    /// # Errors
    /// It does not get on.
    pub fn work(&mut self) -> Result<()> {
        worker::wait_pages(&mut self.vm, WORK_PAGES, WORK_WITHIN).map(drop)
    }

    /// The same, and then it rests and everything is right.
    ///
    /// # Errors
    /// It does not get on, or memory is not what it should be.
    pub fn works_on(&mut self) -> Result<()> {
        self.work()?;
        worker::set_phase(&mut self.vm, Phase::Idle)?;
        worker::check(&mut self.vm, WORK_WITHIN)?;
        self.vm.verify_checker(WORK_WITHIN).map(drop)
    }

    fn limit_pages(&self) -> u64 {
        self.resident_mib * PAGES_PER_MIB
    }

    fn check_report(&self, servers: &[MemoryServer], copies: u64) -> Result<()> {
        let report = &self.report;
        ensure!(report["mode"] == "split", "mode {}", report["mode"]);
        let resident = number(report, "/split/resident_pages")?;
        ensure!((1..=self.limit_pages()).contains(&resident), "{resident} pages are resident");
        let remote = report["split"]["remote_pages"].as_array().context("remote_pages")?;
        let mut sum = 0;
        for server in servers {
            let own = remote.iter().find(|one| one["server"] == server.address());
            let own = own.with_context(|| format!("No word of {}", server.address()))?;
            let pages = number(own, "/pages")?;
            ensure!(pages > 0, "{} got nothing", server.address());
            sum += pages;
        }
        ensure!(remote.len() == servers.len(), "{} servers are named", remote.len());
        let in_use = number(report, "/split/in_use_pages")?;
        ensure!(in_use >= resident.max(sum / copies), "{in_use} pages are in use");
        ensure!(number(report, "/split/to_servers_bytes")? > 0, "Nothing went to servers");
        if let Some(mismatches) = report["verify"]["mismatches"].as_u64() {
            ensure!(mismatches == 0, "{mismatches} pages differ");
        }
        Ok(())
    }

    fn check_status(&self, rig: &Rig) -> Result<()> {
        let status = rig.pager(&self.vm).status()?;
        ensure!(status.state == SplitState::Split, "{status:?}");
        ensure!(status.resident_limit_pages == self.limit_pages(), "{status:?}");
        ensure!(status.resident_pages <= self.limit_pages(), "{status:?}");
        ensure!(status.remote() > 0, "{status:?}");
        let told = metrics::get(&self.metrics)?;
        let limit = metrics::sum(&told, "godwit_pager_resident_limit_bytes")?;
        ensure!(limit == Some(self.resident_mib * MIB), "{told}");
        let held = metrics::sum(&told, "godwit_pager_server_bytes")?;
        ensure!(held.is_some_and(|bytes| bytes > 0), "{told}");
        Ok(())
    }

    /// Kills its pager with SIGKILL.
    ///
    /// # Errors
    /// It is not gone after 20 s.
    pub fn kill_pager(&mut self) -> Result<()> {
        self.receive.signal(Signal::SIGKILL)?;
        let gone = || Ok((!self.receive.running()?).then_some(()));
        wait::until("the end of the pager", Duration::from_secs(20), gone)
    }

    /// Starts its next pager.
    ///
    /// # Errors
    /// It does not go on with the guest.
    pub fn start_pager(&mut self, rig: &Rig) -> Result<()> {
        self.start_pager_with(rig, &[])
    }

    /// The same with further options.
    ///
    /// # Errors
    /// It does not go on with the guest.
    pub fn start_pager_with(&mut self, rig: &Rig, extra: &[&str]) -> Result<()> {
        self.metrics = metrics::free_port()?;
        let extra = [extra, &["--metrics", &self.metrics]].concat();
        self.receive = rig.receive_as(&self.identity, &self.vm, &free_address()?, &extra)?;
        self.check_status(rig)
    }

    /// A QEMU that waits for it at another main host, `name`, with its receiver.
    ///
    /// # Errors
    /// They do not start, or the name was used before.
    pub fn next_host(&self, rig: &Rig, name: &str, extra: &[&str]) -> Result<NextHost> {
        let vm = Vm::start(&rig.env, self.vm.spec().successor(name, QemuKind::V10_0))?;
        let (watch, identity) = (RamWatch::begin(&vm), rig.pki.issue(name)?);
        let listen = free_address()?;
        let metrics = metrics::free_port()?;
        let extra = [extra, &["--metrics", &metrics]].concat();
        let receive = rig.receive_as(&identity, &vm, &listen, &extra)?;
        Ok(NextHost { vm, receive, identity, metrics, listen, watch })
    }

    /// It has left for its next main host with this report: it runs there and nowhere else, its pager here has ended, and
    /// neither host ever had more memory than was allowed.
    ///
    /// # Errors
    /// The first of these that does not hold.
    pub fn left(mut self, next: NextHost, report: Value) -> Result<Self> {
        ensure!(report["outcome"] == "completed", "{report}");
        wait::until("the end of the pager that let it go", PATIENCE, || {
            Ok((!self.receive.running()?).then_some(()))
        })?;
        Ok(Self { report, ..self.has_left(next)? })
    }

    /// The same whatever became of its pager here.
    ///
    /// # Errors
    /// As [`Self::left`].
    pub fn has_left(mut self, next: NextHost) -> Result<Self> {
        let NextHost { mut vm, receive, identity, metrics, listen: _, watch } = next;
        let pulse = check_alive(&mut self.vm, &mut vm)?;
        let outage_ms = pulse.handover(0, 1).map(|gap| gap.outage_ms());
        let outage_ms = outage_ms.context("The heartbeat shows no hand-over")?;
        let resident_mib = self.resident_mib;
        self.watch.end()?.assert_at_most(resident_mib * MIB)?;
        let report = self.report;
        Ok(Self { vm, receive, identity, metrics, report, outage_ms, watch, resident_mib })
    }

    /// It has left to be merged at its next main host, and is: it is whole and well there, nothing is left at the
    /// servers, at its QEMU and in the journals, and both pagers have ended.
    ///
    /// # Errors
    /// The first of these that does not hold.
    pub fn merged(
        self,
        rig: &Rig,
        next: NextHost,
        report: Value,
        servers: &[MemoryServer],
    ) -> Result<Vm> {
        self.left(next, report)?.whole(rig, servers)
    }

    /// As [`Self::merge`], with a pager that is killed half-way: the next one goes on by itself.
    ///
    /// # Errors
    /// As [`Self::merge`].
    pub fn merge_by_two_pagers(mut self, rig: &Rig, servers: &[MemoryServer]) -> Result<Vm> {
        let command = rig.start_merge(&self.vm)?;
        let began = Instant::now();
        // All of it is here within fractions of a second.
        while framework::memory::allocated_bytes(self.vm.ram_files())? <= self.resident_mib * MIB {
            ensure!(began.elapsed() < PATIENCE, "It is not merged");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.kill_pager()?;
        let interrupted = command.wait(PATIENCE)?;
        ensure!(interrupted.code == Some(1), "{interrupted:?}");
        let listen = free_address()?;
        self.receive = rig.receive_as(&self.identity, &self.vm, &listen, &[])?;
        self.whole(rig, servers)
    }

    /// It is being merged: waits for that and checks what must hold then.
    ///
    /// # Errors
    /// As [`Self::merge`].
    pub fn whole(self, rig: &Rig, servers: &[MemoryServer]) -> Result<Vm> {
        let Self { mut vm, receive, watch, .. } = self;
        // Whole, it takes more than was allowed before.
        watch.end()?;
        check_whole(rig, &mut vm, receive, servers)?;
        Ok(vm)
    }

    /// Merges the guest and checks what must hold then: its main host never had more memory than was allowed, it is whole
    /// and well, nothing is left at the servers, at its QEMU and in the journals, and `receive` has ended.
    ///
    /// # Errors
    /// The first of these that does not hold.
    pub fn merge(self, rig: &Rig, servers: &[MemoryServer]) -> Result<Merged> {
        let Self { mut vm, receive, watch, resident_mib, .. } = self;
        let status = rig.pager(&vm).status()?;
        let ram = watch.end()?;
        ram.assert_at_most(resident_mib * MIB)?;
        let began = Instant::now();
        let merged = rig.pager(&vm).merge(PATIENCE);
        merged.with_context(|| format!("receive: {}", receive.stderr()))?;
        let took = began.elapsed();
        check_whole(rig, &mut vm, receive, servers)?;
        // What was elsewhere is here now; a memfd has no name to ask about it.
        let bytes = framework::memory::allocated_bytes(vm.ram_files())?;
        let is_seen = !vm.ram_files().is_empty();
        ensure!(!is_seen || bytes > resident_mib * MIB, "{bytes} bytes after the merge");
        vm.verify_checker(PATIENCE)?;
        Ok(Merged { vm, ram, status, took })
    }
}

/// What must hold of a guest whose memory is all at its main host: its pager has ended, nothing is left at the servers, at
/// its QEMU and in the journals, and it runs.
fn check_whole(rig: &Rig, vm: &mut Vm, receive: Engine, servers: &[MemoryServer]) -> Result<()> {
    receive.wait(PATIENCE)?.success()?;
    ensure!(rig.pager(vm).status().is_err(), "Somebody still pages a guest that is whole");
    for server in servers {
        server.wait_empty(EMPTY_WITHIN)?;
    }
    assert_detached(vm.pid())?;
    check_journals(rig)?;
    ensure!(vm.qmp().run_state()? == "running", "The guest does not run");
    Ok(())
}

/// The journals hold nothing but what an ordinary migration leaves: that the guest has run there.
fn check_journals(rig: &Rig) -> Result<()> {
    for end in ["source", "destination"] {
        let folder = rig.journal(end);
        let folder = Path::new(&folder);
        let left = source_journals(folder);
        ensure!(left.is_empty(), "Journals are left: {left:?}");
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_arrival = name.starts_with("destination-") && name.ends_with(".journal");
            ensure!(is_arrival, "{name} is left in the journals");
        }
    }
    Ok(())
}
