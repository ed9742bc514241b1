//! A running QEMU with a test guest.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::console::Console;
use crate::env::Env;
use crate::guest::Guest;
use crate::heartbeat::Heartbeat;
use crate::ports::Ports;
use crate::process::{Process, bound_in};
use crate::qmp::Qmp;
use crate::spec::VmSpec;
use crate::wait;

/// Files of ours in /dev/shm begin with this, then the id of the test's process.
const STEM: &str = "godwit-vm";
/// QEMU opens its sockets within a fraction of a second; a loaded machine needs more.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A guest boots in 5 to 10 s; with a loaded machine and much memory to fill it takes longer.
pub const READY_TIMEOUT: Duration = Duration::from_secs(180);

/// A running QEMU. Drop kills it and removes its files.
#[derive(Debug)]
pub struct Vm {
    // Fields are dropped in this order: QEMU ends before the readers and the folder do.
    process: Process,
    qmp: Qmp,
    ports: Ports,
    ram_files: RamFiles,
    folder: TempDir,
    spec: VmSpec,
}

/// Removed on drop.
#[derive(Debug)]
struct RamFiles(Vec<PathBuf>);

impl Drop for RamFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            // QEMU may have failed before it created the file.
            drop(std::fs::remove_file(path));
        }
    }
}

/// Removes RAM files of test processes that were killed: they hold memory.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Ok(entries) = std::fs::read_dir("/dev/shm") else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let owner = name.to_str().and_then(|name| name.strip_prefix(STEM)?.strip_prefix('-'));
            let pid = owner.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                drop(std::fs::remove_file(entry.path()));
            }
        }
    });
}

impl Vm {
    /// Starts QEMU and connects to it; the guest boots from now on, or waits for a migration.
    ///
    /// # Errors
    /// QEMU did not start; what it said is in the error.
    pub fn start(env: &Env, spec: VmSpec) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let stem = format!("{STEM}-{}-{count}", std::process::id());
        let folder = tempfile::Builder::new()
            .prefix("godwit-vm-")
            .tempdir()
            .context("Cannot create a folder for sockets")?;
        let at = folder.path().to_owned();
        let ram_files = RamFiles(spec.ram_files(&stem)?);
        let qemu = &env.qemu(spec.qemu)?.bin;
        // Set for QEMU alone, not for what starts it.
        let mut command = bound_in(Path::new("env"), spec.netns.as_deref(), &spec.cgroups);
        command
            .args(spec.variables.iter().map(|(name, value)| format!("{name}={value}")))
            .arg(qemu);
        let stderr = std::fs::File::create(at.join("qemu.stderr")).context("Cannot log stderr")?;
        command
            .args(spec.arguments(env, &stem, &at)?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let mut process = Process::start(&format!("QEMU {}", spec.name), command)?;
        let socket = at.join("qmp-test.sock");
        let connected = wait::until("QEMU's sockets", START_TIMEOUT, || {
            if let Some(status) = process.exited()? {
                bail!("QEMU ended with {status}");
            }
            Ok(socket.exists().then_some(()))
        })
        .and_then(|()| Qmp::connect(&socket, START_TIMEOUT));
        let said = || {
            let text = std::fs::read_to_string(at.join("qemu.stderr")).unwrap_or_default();
            format!("QEMU {} for {:?} said: {}", spec.qemu.version(), spec.name, text.trim())
        };
        let qmp = connected.with_context(said)?;
        Ok(Self { process, qmp, ports: Ports::connect(&at)?, ram_files, folder, spec })
    }

    /// Starts QEMU and waits until the guest is ready.
    ///
    /// # Errors
    /// As [`Vm::start`] and [`Vm::wait_ready`].
    pub fn boot(env: &Env, spec: VmSpec) -> Result<Self> {
        let mut vm = Self::start(env, spec)?;
        vm.wait_ready(READY_TIMEOUT)?;
        Ok(vm)
    }

    /// Waits until all of the guest's programs run and a first beat has arrived.
    ///
    /// # Errors
    /// The guest complained, QEMU ended, or `timeout` passed; the console's end is in the error.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        let process = &mut self.process;
        let alive = || match process.exited()? {
            Some(status) => bail!("QEMU ended with {status}"),
            None => Ok(()),
        };
        let ready = self.ports.wait_ready(timeout, alive);
        ready.with_context(|| format!("Guest {:?} is not ready", self.spec.name))
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it was started from.
    #[must_use]
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The QMP socket for the engine.
    #[must_use]
    pub fn qmp_engine(&self) -> PathBuf {
        self.folder.path().join("qmp-engine.sock")
    }

    /// A folder that lives as long as the VM, for sockets of the test.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The files that hold the guest's RAM; none for memfd and private memory.
    #[must_use]
    pub fn ram_files(&self) -> &[PathBuf] {
        &self.ram_files.0
    }

    /// The test's own QMP connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// The guest's command channel; it answers where the guest runs.
    pub fn guest(&mut self) -> &mut Guest {
        self.ports.guest()
    }

    /// The guest's heartbeat as seen at this QEMU.
    #[must_use]
    pub fn heartbeat(&self) -> &Heartbeat {
        self.ports.heartbeat()
    }

    /// The guest's console as seen at this QEMU.
    #[must_use]
    pub fn console(&self) -> &Console {
        self.ports.console()
    }

    /// What QEMU has written to stderr.
    #[must_use]
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("qemu.stderr")).unwrap_or_default()
    }

    /// QEMU's exit status if it has ended.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.process.exited()
    }

    /// Waits for QEMU's end.
    ///
    /// # Errors
    /// It still runs after `timeout`.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.process.wait(timeout)
    }

    /// Kills QEMU with SIGKILL. Heartbeat and console stay readable.
    ///
    /// # Errors
    /// It is not gone after 20 s.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Stops the whole process with SIGSTOP: a host that hangs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn freeze(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGSTOP)
    }

    /// Continues it after [`Vm::freeze`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn thaw(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)
    }

    /// CPU seconds that QEMU has used.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu_seconds(&self) -> Result<f64> {
        crate::cpu::seconds(self.pid())
    }

    /// Its ports.
    pub fn ports(&mut self) -> &mut Ports {
        &mut self.ports
    }

    /// Asks the guest, as [`Ports::ask`].
    ///
    /// # Errors
    /// As [`Guest::ask`].
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.ports.ask(command)
    }

    /// Waits until the checker has verified all its memory from now on, and fails if it found
    /// anything wrong, ever.
    ///
    /// # Errors
    /// A wrong byte, or no whole pass within `timeout`.
    pub fn verify_checker(&mut self, timeout: Duration) -> Result<String> {
        self.ports.verify_checker(timeout)
    }

    /// Fails if the guest has complained on its console or among its heartbeats.
    ///
    /// # Errors
    /// It has.
    pub fn assert_clean(&self) -> Result<()> {
        self.ports.assert_clean()
    }
}
