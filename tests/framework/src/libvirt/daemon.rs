//! A host: one libvirtd and all that it runs, within namespaces of their own.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::config::{GUESTS, HOSTS, Host, INIT, LIBVIRTD, LOG, QEMU_DRIVER, SOCKET, VIRSH};
use crate::engine::{Engine, EngineOutput};
use crate::netns::Netns;
use crate::process::{Process, bound};
use crate::wait;

/// A daemon starts within a second; a loaded machine needs more.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a command of `virsh`: the first that is about a domain looks at QEMU's abilities.
const VIRSH_TIMEOUT: Duration = Duration::from_secs(60);
/// What is shown of a log.
const LOG_LINES: usize = 15;

/// A host's libvirtd. Drop ends it and all of its domains.
#[derive(Debug)]
pub struct Libvirtd {
    // Dropped in this order, after our own Drop.
    /// `unshare`, which waits for the host's init.
    process: Process,
    /// The host's init, by the id that it has outside.
    init: Pid,
    netns: String,
    host: Host,
    root: TempDir,
}

impl Libvirtd {
    /// Starts one in a network namespace that has the host's address.
    ///
    /// # Errors
    /// Not root, libvirt is not installed, or it ended; its log is in the error.
    pub(super) fn start(netns: &Netns, host: &Host, cache: &Path) -> Result<Self> {
        for file in [LIBVIRTD, QEMU_DRIVER, VIRSH] {
            ensure!(
                Path::new(file).exists(),
                "No {file}; run `cargo xtask setup`, which installs libvirt's packages"
            );
        }
        let root = tempfile::Builder::new()
            .prefix("godwit-libvirt-")
            .tempdir()
            .context("Cannot create a folder for a host")?;
        host.furnish(root.path())?;
        let log = File::create(root.path().join("init.log")).context("Cannot log")?;
        let mut command = bound(Path::new("unshare"), Some(netns.name()));
        command
            .args(["--uts", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", INIT, "init"])
            .args([root.path().as_os_str(), host.name.as_ref(), cache.as_os_str()])
            .arg(LIBVIRTD)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("Cannot log")?)
            .stderr(log);
        let mut process = Process::start(&format!("libvirtd of {}", host.name), command)?;
        let init = init_of(&mut process);
        let init = init.with_context(|| tail(&root.path().join("init.log")))?;
        let netns = netns.name().to_owned();
        let mut daemon = Self { process, init, netns, host: *host, root };
        daemon.wait_up().with_context(|| {
            let logs = ["init.log", LOG].map(|name| tail(&daemon.root.path().join(name)));
            format!("libvirtd of {} does not answer:\n{}", host.name, logs.concat())
        })?;
        Ok(daemon)
    }

    fn wait_up(&mut self) -> Result<()> {
        let socket = self.root.path().join(SOCKET);
        wait::until("libvirtd's socket", START_TIMEOUT, || {
            if let Some(status) = self.process.exited()? {
                bail!("It ended with {status}");
            }
            Ok(socket.exists().then_some(()))
        })?;
        let name = self.virsh(&["hostname"])?;
        ensure!(name.trim() == self.host.name, "It calls its host {:?}", name.trim());
        Ok(())
    }

    /// Its URI as it is known to the other host.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("qemu+tcp://{}/system", self.host.address)
    }

    /// Its address on the link.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.host.address
    }

    /// First and last port of those where libvirt lets QEMUs wait for guests here.
    #[must_use]
    pub fn migration_ports(&self) -> (u16, u16) {
        self.host.ports
    }

    /// Its name, which is also that of its identity.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.host.name
    }

    /// The name that stands in the URIs which it proposes for streams to here.
    #[must_use]
    pub fn migration_name(&self) -> String {
        self.host.migration_name()
    }

    /// From now on this host takes `name` for `address`.
    ///
    /// # Errors
    /// Its file of hosts cannot be changed.
    pub fn resolve(&self, name: &str, address: Ipv4Addr) -> Result<()> {
        // The file is mounted: it is changed, not replaced.
        let path = self.root.path().join(HOSTS);
        let known = std::fs::read_to_string(&path).context("Cannot read a host's names")?;
        let is_other = |line: &&str| !line.split_whitespace().any(|word| word == name);
        let mut lines: Vec<&str> = known.lines().filter(is_other).collect();
        let new = format!("{address} {name}");
        lines.push(&new);
        std::fs::write(&path, lines.join("\n") + "\n").context("Cannot change a host's names")
    }

    /// The name of its network namespace.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// Where a file lies that the host sees as `/run/` and this name.
    #[must_use]
    pub fn run_file(&self, name: &str) -> PathBuf {
        self.root.path().join("run").join(name)
    }

    /// Starts a command of `virsh` at this host. It reaches its own daemon by a socket in the file
    /// system, whatever becomes of the link.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_virsh(&self, words: &[&str]) -> Result<Engine> {
        let socket = self.root.path().join(SOCKET);
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        let variables = [("LIBVIRT_DEFAULT_URI", uri.as_str()), ("LC_ALL", "C")];
        Engine::start_with(Path::new(VIRSH), words, Some(&self.netns), &variables)
    }

    /// Runs a command of `virsh` at this host and returns its stdout.
    ///
    /// # Errors
    /// It failed; the text has what it wrote.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        let output = self.start_virsh(words)?.wait(VIRSH_TIMEOUT)?;
        if output.code != Some(0) {
            bail!("{}", self.complaint(words, &output));
        }
        Ok(output.stdout)
    }

    /// What `virsh` said when it failed.
    pub(super) fn complaint(&self, words: &[&str], output: &EngineOutput) -> String {
        let (out, err) = (output.stdout.trim(), output.stderr.trim());
        let command = words.join(" ");
        let name = self.host.name;
        format!("`virsh {command}` at {name} ended with {:?}: {out}\n{err}", output.code)
    }

    /// Names of all domains that it knows, whether they run or not.
    ///
    /// # Errors
    /// As [`Self::virsh`].
    pub fn domains(&self) -> Result<Vec<String>> {
        let text = self.virsh(&["list", "--all", "--name"])?;
        Ok(text.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect())
    }

    /// An empty folder for the ports of a domain's guest, as it is seen from outside.
    pub(super) fn ports_folder(&self, domain: &str) -> Result<PathBuf> {
        let folder = self.root.path().join(GUESTS).join(domain);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).context("Cannot remove the ports of before")?;
        }
        std::fs::create_dir(&folder).context("Cannot create a folder for a guest's ports")?;
        Ok(folder)
    }

    /// True while the domain has a QEMU.
    pub(super) fn has_qemu(&self, domain: &str) -> bool {
        self.root.path().join(format!("run/libvirt/qemu/{domain}.pid")).exists()
    }

    /// The end of what QEMU and libvirt have logged about a domain.
    pub(super) fn log_of(&self, domain: &str) -> String {
        tail(&self.root.path().join(format!("var/log/libvirt/qemu/{domain}.log")))
    }

    /// Ends the host at once: the daemon and all of its QEMUs, as if it had lost its power.
    ///
    /// # Errors
    /// It is not gone after 20 s.
    pub fn kill(&mut self) -> Result<()> {
        // Init is a child of ours as long as `unshare` has not ended: its id is not another's.
        if self.process.exited()?.is_none() {
            match kill(self.init, Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).context("Cannot kill a host's init"),
            }
        }
        // Init's parent sees its end only when all others of the namespace are gone.
        self.process.wait(Duration::from_secs(20)).map(drop)
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
    }
}

/// The only child of `unshare`.
fn init_of(unshare: &mut Process) -> Result<Pid> {
    let pid = unshare.pid();
    let path = format!("/proc/{pid}/task/{pid}/children");
    wait::until("a host's init", START_TIMEOUT, || {
        if let Some(status) = unshare.exited()? {
            bail!("`unshare` ended with {status}");
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
        let child = text.split_ascii_whitespace().next().map(str::parse).transpose();
        Ok(child.with_context(|| format!("{path} has {text:?}"))?.map(Pid::from_raw))
    })
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{name} ends with:\n{}\n", last.join("\n"))
}
