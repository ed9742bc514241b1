//! What the end-to-end tests share: identities, journals, and migrations with their checks.

pub mod fleet;
pub mod gateways;
pub mod members;
pub mod reading;
pub mod split;
pub mod stage;
pub mod streams;
pub mod untouched;
pub mod waits;
pub mod watched;

use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use framework::hugepages::HugePages;
use framework::{Backend, Engine, EngineOutput, Env, Pki, Pulse, QemuKind, Vm, VmSpec, wait};
use serde_json::Value;
use tempfile::TempDir;

/// Longest time that any command of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Longest wait for a beat of a guest that runs, which has to share the processors.
pub const BEATS_WITHIN: Duration = Duration::from_secs(60);

/// Held by the one test of a process that runs: two cores carry the QEMUs and engines of one.
static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other test of this process has its turn.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does `work` when no other test of this process has its turn.
///
/// # Errors
/// What the work says.
pub fn in_turn<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let _turn = turn();
    work()
}

/// Two hosts' identities and journals, and the command under test.
#[derive(Debug)]
pub struct Rig {
    /// Kernel, guest image, QEMUs.
    pub env: Env,
    /// The binary under test.
    pub migrate: PathBuf,
    /// The authority.
    pub pki: Pki,
    /// Identity of the source host.
    pub source: PathBuf,
    /// Identity of the destination host.
    pub destination: PathBuf,
    /// Journals and failpoints.
    pub folder: TempDir,
}

impl Rig {
    /// A rig with the ordinary binary.
    ///
    /// # Errors
    /// Setup was not run, or identities cannot be made.
    pub fn new() -> Result<Self> {
        let env = Env::load()?;
        let migrate = env.migrate()?;
        Self::with(env, migrate)
    }

    /// A rig with the binary that stops at failpoints.
    ///
    /// # Errors
    /// As [`Rig::new`].
    pub fn with_failpoints() -> Result<Self> {
        let env = Env::load()?;
        let migrate = env.migrate_failpoints()?;
        Self::with(env, migrate)
    }

    fn with(env: Env, migrate: PathBuf) -> Result<Self> {
        let pki = Pki::init(&migrate)?;
        let (source, destination) = (pki.issue("host-a")?, pki.issue("host-b")?);
        let folder = tempfile::tempdir().context("Cannot create a folder for journals")?;
        Ok(Self { env, migrate, pki, source, destination, folder })
    }

    /// Journal directory of one end.
    #[must_use]
    pub fn journal(&self, end: &str) -> String {
        self.folder.path().join(end).display().to_string()
    }

    /// Directory in which files arm failpoints.
    fn failpoints(&self) -> PathBuf {
        self.folder.path().join("failpoints")
    }

    /// Arms a failpoint that only has to be set.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn arm(&self, failpoint: &str) -> Result<()> {
        self.write_failpoint(failpoint, "")
    }

    /// Has the engine that comes to `step` wait there until [`Rig::release`].
    ///
    /// # Errors
    /// As [`Rig::arm`].
    pub fn hold(&self, step: &str) -> Result<()> {
        self.write_failpoint(step, "hold")
    }

    fn write_failpoint(&self, name: &str, what: &str) -> Result<()> {
        std::fs::create_dir_all(self.failpoints()).context("No folder for failpoints")?;
        std::fs::write(self.failpoints().join(name), what).context("Not armed")
    }

    /// Waits until an engine is held at `step`, and forgets that it was.
    ///
    /// # Errors
    /// None came there in time.
    pub fn reached(&self, step: &str) -> Result<()> {
        let reached = self.failpoints().join(format!("{step}.reached"));
        wait::until("the step", PATIENCE, || Ok(reached.exists().then_some(())))?;
        Ok(std::fs::remove_file(reached)?)
    }

    /// Lets the engine that is held at `step` go on.
    ///
    /// # Errors
    /// The step was not armed.
    pub fn release(&self, step: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.failpoints().join(step))?)
    }

    /// Starts `migrate receive --once` for a waiting VM and waits until it listens.
    ///
    /// # Errors
    /// It ended instead.
    pub fn receive(&self, vm: &Vm, listen: &str, extra: &[&str]) -> Result<Engine> {
        self.receive_in(vm, listen, extra, None)
    }

    /// The same in a network namespace.
    ///
    /// # Errors
    /// It ended instead.
    pub fn receive_in(
        &self,
        vm: &Vm,
        listen: &str,
        extra: &[&str],
        netns: Option<&str>,
    ) -> Result<Engine> {
        let mut engine = self.receive_unchecked(vm, listen, extra, netns)?;
        engine.wait_stderr("listening on", PATIENCE)?;
        Ok(engine)
    }

    /// Starts `migrate receive` without waiting for it.
    ///
    /// # Errors
    /// It could not be started.
    pub fn receive_unchecked(
        &self,
        vm: &Vm,
        listen: &str,
        extra: &[&str],
        netns: Option<&str>,
    ) -> Result<Engine> {
        let words = ["receive", "--once", "--listen", listen];
        self.start_end(vm, &words, (&self.destination, "destination"), extra, netns)
    }

    /// As [`Rig::receive`], at the host with this identity.
    ///
    /// # Errors
    /// It ended instead.
    pub fn receive_as(
        &self,
        identity: &Path,
        vm: &Vm,
        listen: &str,
        extra: &[&str],
    ) -> Result<Engine> {
        let words = ["receive", "--once", "--listen", listen];
        let mut engine = self.start_end(vm, &words, (identity, "destination"), extra, None)?;
        engine.wait_stderr("listening on", PATIENCE)?;
        Ok(engine)
    }

    /// Starts `migrate send --json`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn send(&self, vm: &Vm, to: &str, extra: &[&str]) -> Result<Engine> {
        self.send_in(vm, to, extra, None)
    }

    /// The same in a network namespace.
    ///
    /// # Errors
    /// It could not be started.
    pub fn send_in(
        &self,
        vm: &Vm,
        to: &str,
        extra: &[&str],
        netns: Option<&str>,
    ) -> Result<Engine> {
        let words = ["send", "--json", "--to", to];
        self.start_end(vm, &words, (&self.source, "source"), extra, netns)
    }

    /// Starts one end's command with what both have in common; `end` is its identity and journal.
    fn start_end(
        &self,
        vm: &Vm,
        words: &[&str],
        end: (&Path, &str),
        extra: &[&str],
        netns: Option<&str>,
    ) -> Result<Engine> {
        let (qmp, identity, journal) = (text(&vm.qmp_engine()), text(end.0), self.journal(end.1));
        let mut words = words.to_vec();
        words.extend(["--qmp", &qmp, "--identity", &identity, "--journal", &journal]);
        words.extend(extra);
        let failpoints = text(&self.failpoints());
        let variables = [("GODWIT_FAILPOINTS", failpoints.as_str())];
        Engine::start_with(&self.migrate, &words, netns, &variables)
    }

    /// What `migrate check` prints about a VM.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn check(&self, vm: &Vm) -> Result<String> {
        let qmp = text(&vm.qmp_engine());
        let words = ["check", "--qmp", &qmp];
        Ok(Engine::run(&self.migrate, &words, None, PATIENCE)?.stdout)
    }

    /// What `migrate inspect --json` prints about a VM.
    ///
    /// # Errors
    /// It failed, or did not end in time.
    pub fn inspect(&self, vm: &Vm) -> Result<Value> {
        let qmp = text(&vm.qmp_engine());
        let output =
            Engine::run(&self.migrate, &["inspect", "--json", "--qmp", &qmp], None, PATIENCE)?;
        serde_json::from_str(&output.stdout).with_context(|| output.stderr.clone())
    }

    /// Runs `migrate resolve --json` at one end.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn resolve(&self, vm: &Vm, end: &str, extra: &[&str]) -> Result<EngineOutput> {
        let (qmp, journal) = (text(&vm.qmp_engine()), self.journal(end));
        let mut words = vec!["resolve", "--json", "--qmp", &qmp, "--journal", &journal];
        words.extend(extra);
        Engine::run(&self.migrate, &words, None, PATIENCE)
    }

    /// Migrates a VM over loopback into a fresh QEMU of `kind` and checks what must hold for every
    /// migration: it completed, the guest runs on at the destination and nowhere else, its checker is
    /// clean, and under `--verify` no page differs.
    ///
    /// # Errors
    /// The first of these that does not hold.
    pub fn migrate(&self, mut source: Vm, kind: QemuKind, extra: &[&str]) -> Result<Moved> {
        let next = source.spec().successor("next", kind);
        self.migrate_from(&mut source, next, extra)
    }

    /// The same into a QEMU that is started as `next` says; what is left of the source can be looked at.
    ///
    /// # Errors
    /// As [`Rig::migrate`].
    pub fn migrate_from(&self, source: &mut Vm, next: VmSpec, extra: &[&str]) -> Result<Moved> {
        let mut destination = Vm::start(&self.env, next)?;
        let listen = free_address()?;
        let receive = self.receive(&destination, &listen, &[])?;
        let sent = self.send(source, &listen, extra)?.wait(PATIENCE)?;
        let report = sent.json().cloned()?;
        if sent.code != Some(0) {
            let there = receive.stderr();
            anyhow::bail!("send: {}\nreport: {report}\nreceive: {there}", sent.stderr);
        }
        let received = receive.wait(PATIENCE)?;
        ensure!(received.code == Some(0), "receive: {}", received.stderr);
        let pulse = check_alive(source, &mut destination)?;
        let outage_ms = pulse.handover(0, 1).map(|gap| gap.outage_ms());
        let outage_ms = outage_ms.context("The heartbeat shows no hand-over")?;
        if extra.contains(&"--verify") {
            ensure!(report["verify"]["mismatches"] == 0, "report: {report}");
            ensure!(report["verify"]["pages"] == report["pages"]["total"], "report: {report}");
        }
        Ok(Moved { vm: destination, report, said: sent.stderr, outage_ms })
    }
}

/// What a migration left.
#[derive(Debug)]
pub struct Moved {
    /// The VM at its new place.
    pub vm: Vm,
    /// The report of `send`.
    pub report: Value,
    /// What `send` wrote to stderr.
    pub said: String,
    /// Outage as the heartbeat showed it from outside.
    pub outage_ms: f64,
}

/// The guest beats at the destination and only there, and was never in two places.
///
/// # Errors
/// What does not hold.
pub fn check_alive(source: &mut Vm, destination: &mut Vm) -> Result<Pulse> {
    ensure!(
        destination.heartbeat().beats_within(BEATS_WITHIN),
        "No heartbeat at the destination: {}\nconsole: {}",
        destination.stderr(),
        destination.console().tail(40)
    );
    std::thread::sleep(Duration::from_millis(100));
    let (before, after) = (source.heartbeat().record(), destination.heartbeat().record());
    let pulse = Pulse::of(&[&before, &after])?;
    pulse.assert_one_runs()?;
    source.assert_clean()?;
    destination.assert_clean()?;
    ensure!(destination.qmp().run_state()? == "running", "The destination does not run");
    Ok(pulse)
}

/// The library for `LD_PRELOAD`: `GODWIT_PRELOAD`, or the one that cargo built for development.
///
/// # Errors
/// It was not built.
pub fn preload_library() -> Result<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/debug/libgodwit_preload.so");
    let path = std::env::var_os("GODWIT_PRELOAD").map_or_else(|| default.into(), PathBuf::from);
    path.canonicalize().context("No preload library: cargo build -p qemu-glue-preload")
}

/// A guest that writes and checks its memory.
#[must_use]
pub fn busy(kind: QemuKind) -> VmSpec {
    VmSpec::new("busy", kind)
        .with("godwit.writer=fill=60,hot=30,rate=4000,bytes=64,seed=7")
        .with("godwit.checker=size=24,seed=5")
}

/// These kinds of RAM, and larger pages where the machine gives any; the pages are kept while the
/// second value lives.
#[must_use]
pub fn with_larger_pages(mut backends: Vec<Backend>) -> (Vec<Backend>, Option<HugePages>) {
    match HugePages::reserve(1024) {
        Ok(pages) => {
            backends.push(Backend::Hugetlb(pages.path().to_owned()));
            (backends, Some(pages))
        }
        Err(error) => {
            println!("hugetlbfs left out: {error:#}");
            (backends, None)
        }
    }
}

/// An address on loopback whose port is free at the moment.
///
/// # Errors
/// No port is free.
pub fn free_address() -> Result<String> {
    // A receiver needs its port over TCP, too.
    for _ in 0..32 {
        let socket = UdpSocket::bind("127.0.0.1:0").context("No free port on loopback")?;
        let address = socket.local_addr().context("No address")?;
        if TcpListener::bind(address).is_ok() {
            return Ok(address.to_string());
        }
    }
    bail!("No port on loopback is free over both UDP and TCP")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
