//! Hosts on one machine: each a network namespace, a bridge, and a control group whose limit of processor time is what
//! the host has.
//!
//! ```text
//!   host 0: namespace, control group           host 1 ...
//!   ┌──────────────────────────────────┐
//!   │ QEMU ─ tap ─┐                    │
//!   │ QEMU ─ tap ─┴─ bridge br0 ─ up0 ─┼──┐
//!   │ agent       10.88.0.1/24         │  │    namespace "middle"
//!   └──────────────────────────────────┘  └─── bridge br0 ─── host 1, host 2, ...
//! ```
//! All is one Ethernet, so that guests keep their addresses and peers wherever they are. QEMU makes and removes its tap.
//! Agents and engines run in a host's namespace but outside of its control group: they are not what is measured, and a
//! real host gives them their share before guests'.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::engine::Engine;
use crate::env::{Env, QemuKind};
use crate::netns::Netns;
use crate::process::{Process, bound_in};
use crate::spec::{Disk, Nic, VmSpec};
use crate::vm::Vm;
use crate::wait;

/// The interface by which a host reaches the others.
pub const UPLINK: &str = "up0";
const BRIDGE: &str = "br0";
const LIGHT_TIMEOUT: Duration = Duration::from_secs(60);

/// Where QEMU's tap is joined to the host's bridge.
const TAP_SCRIPT: &str = "#!/bin/sh\nip link set \"$1\" master br0 up\n";

/// What a host has.
#[derive(Debug, Clone, PartialEq)]
pub struct HostPlan {
    /// Its name.
    pub name: String,
    /// Processors.
    pub cores: f64,
    /// Memory, MiB. Nobody is kept from taking more. One of [`guest`] takes some 190 MiB, with QEMU's own.
    pub memory_mib: u64,
    /// Its uplink, bits a second in each direction; 0 without a limit.
    pub bits_per_s: u64,
}

impl HostPlan {
    /// A host without a limited uplink.
    #[must_use]
    pub fn new(name: &str, cores: f64, memory_mib: u64) -> Self {
        Self { name: name.to_owned(), cores, memory_mib, bits_per_s: 0 }
    }
}

/// A host.
#[derive(Debug)]
pub struct ClusterHost {
    // Dropped in this order; guests have to be gone before.
    cgroup: Cgroup,
    netns: Netns,
    folder: TempDir,
    plan: HostPlan,
    address: Ipv4Addr,
}

/// Hosts that reach each other.
#[derive(Debug)]
pub struct Cluster {
    hosts: Vec<ClusterHost>,
    _middle: Netns,
}

impl Cluster {
    /// Most hosts.
    pub const HOSTS_MAX: usize = 9;

    /// Creates hosts, without limits on processors as yet: [`ClusterHost::limit`] when guests have booted.
    ///
    /// # Errors
    /// Not root.
    pub fn create(plans: &[HostPlan]) -> Result<Self> {
        ensure!(plans.len() <= Self::HOSTS_MAX, "More hosts than addresses");
        let middle = Netns::create("middle")?;
        bridge(&middle)?;
        let mut hosts = vec![];
        for (number, plan) in (1..).zip(plans) {
            let host = ClusterHost::create(plan, Ipv4Addr::new(10, 88, 0, number))?;
            host.join(&middle, &format!("h{number}"))?;
            hosts.push(host);
        }
        Ok(Self { hosts, _middle: middle })
    }

    /// A host by its number.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn host(&self, number: usize) -> &ClusterHost {
        &self.hosts[number]
    }

    /// All hosts.
    #[must_use]
    pub fn hosts(&self) -> &[ClusterHost] {
        &self.hosts
    }
}

/// Address of the guest of this number, 1 to 99.
#[must_use]
pub fn guest_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, number.saturating_add(100))
}

/// Ethernet address of the guest of this number.
#[must_use]
pub fn guest_mac(number: u8) -> String {
    format!("52:54:00:88:00:{number:02x}")
}

/// A small guest with the program `load` (module [`crate::load`]), whose name ends with its number. On which host it
/// runs is said by [`ClusterHost::place`].
#[must_use]
pub fn guest(name: &str, number: u8, kind: QemuKind) -> VmSpec {
    let mut spec = VmSpec::new(name, kind)
        .memory_mib(128)
        // Several boot at once: the kernel would find the timer late and give up.
        .with("no_timer_check")
        .with("godwit.heartbeat=period_us=100000")
        .with(&format!("godwit.ip={}/24", guest_address(number)))
        .with("godwit.load=");
    spec.extra = vec!["-uuid".into(), format!("00000000-0000-4000-8000-{number:012}")];
    spec.nic = Some(Nic { netdev: String::new(), mac: guest_mac(number) });
    spec
}

/// An empty disk of so many MiB for a guest's swap ([`crate::load::swap_on`]), in a folder that outlives it.
///
/// # Errors
/// The file cannot be written.
pub fn swap_disk(folder: &Path, name: &str, mib: u64) -> Result<Disk> {
    let path = folder.join(format!("{name}.swap"));
    let file = fs::File::create(&path).with_context(|| format!("No file {}", path.display()))?;
    file.set_len(mib << 20).context("Too large a disk")?;
    Ok(Disk { path, cache: "writeback".into(), aio: "threads".into() })
}

fn bridge(netns: &Netns) -> Result<()> {
    netns.ip(&["link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0"])?;
    netns.ip(&["link", "set", BRIDGE, "up"]).map(drop)
}

impl ClusterHost {
    fn create(plan: &HostPlan, address: Ipv4Addr) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("godwit-host-").tempdir();
        let folder = folder.context("Cannot create a host's folder")?;
        let script = folder.path().join("tap-up");
        fs::write(&script, TAP_SCRIPT).context("Cannot write the script of taps")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("Not runnable")?;
        fs::create_dir(folder.path().join("monitors")).context("No folder for monitors")?;
        let (cgroup, netns) = (Cgroup::create(&plan.name)?, Netns::create(&plan.name)?);
        Ok(Self { cgroup, netns, folder, plan: plan.clone(), address })
    }

    fn join(&self, middle: &Netns, port: &str) -> Result<()> {
        bridge(&self.netns)?;
        let names = ["link", "add", UPLINK, "type", "veth", "peer", "name", port];
        self.netns.ip(&[&names[..], &["netns", middle.name()]].concat())?;
        for (netns, device) in [(&self.netns, UPLINK), (middle, port)] {
            netns.ip(&["link", "set", device, "master", BRIDGE, "up"])?;
            netns.shape(device, self.plan.bits_per_s)?;
        }
        self.netns.ip(&["addr", "add", &format!("{}/24", self.address), "dev", BRIDGE]).map(drop)
    }

    /// What it has.
    #[must_use]
    pub fn plan(&self) -> &HostPlan {
        &self.plan
    }

    /// Its address, on which agents may listen.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its control group.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A folder for what belongs to it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder with a link to the monitor of every guest that was placed here: NAME.sock.
    #[must_use]
    pub fn monitors(&self) -> PathBuf {
        self.folder().join("monitors")
    }

    /// From now on its guests have no more than its processors.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit(&self) -> Result<()> {
        self.cgroup.limit(Some(self.plan.cores))
    }

    /// Its guests have as many processors as they want, as while they boot.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unlimit(&self) -> Result<()> {
        self.cgroup.limit(None)
    }

    /// Its power fails: nothing comes from it any more, and everything that runs on it has ended.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn vanish(&self) -> Result<()> {
        self.netns.ip(&["link", "set", UPLINK, "down"])?;
        self.netns.kill_all()
    }

    /// It is on the network again, and nothing runs on it.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn come_back(&self) -> Result<()> {
        self.netns.ip(&["link", "set", UPLINK, "up"]).map(drop)
    }

    /// The guest as it is started on this host: in its namespace and control group, with a tap on its bridge.
    #[must_use]
    pub fn place(&self, spec: VmSpec) -> VmSpec {
        let mut spec = spec.netns(self.netns.name());
        spec.cgroups = self.cgroup.folders().to_vec();
        if let Some(nic) = &mut spec.nic {
            let number = nic.mac.rsplit(':').next().unwrap_or_default();
            let script = self.folder().join("tap-up");
            let script = script.display();
            nic.netdev = format!("tap,ifname=t{number},script={script},downscript=no");
        }
        spec
    }

    /// Starts a guest here, or a QEMU that waits for one ([`VmSpec::successor`]), and links its monitor.
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn start(&self, env: &Env, spec: VmSpec) -> Result<Vm> {
        let vm = Vm::start(env, self.place(spec))?;
        let link = self.monitors().join(format!("{}.sock", vm.spec().name));
        // Of an earlier QEMU of this guest.
        drop(fs::remove_file(&link));
        symlink(vm.qmp_engine(), &link)
            .with_context(|| format!("Cannot link {}", link.display()))?;
        Ok(vm)
    }

    /// Starts a QEMU with a card and a disk and no guest, which takes little memory and no processor: for counting what
    /// looking at many costs. Its monitor is among the others.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_light(&self, env: &Env, number: u8) -> Result<Process> {
        let socket = self.monitors().join(format!("light{number}.sock"));
        let script = self.folder().join("tap-up");
        let netdev = format!("tap,id=n,ifname=l{number},script={},downscript=no", script.display());
        let mut command = bound_in(
            &env.qemu(QemuKind::V10_0)?.bin,
            Some(self.netns.name()),
            self.cgroup.folders(),
        );
        command.args(["-name", &format!("light{number}"), "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args("-machine pc -accel tcg -m 8M -S -nodefaults -display none".split(' '));
        command.args(["-no-user-config", "-netdev", &netdev, "-device"]);
        command.arg(format!("virtio-net-pci,netdev=n,romfile=,mac=52:54:00:99:00:{number:02x}"));
        command.args("-blockdev null-co,node-name=d,size=1048576".split(' '));
        command.args(["-device", "virtio-blk-pci,drive=d"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = Process::start("a light QEMU", command)?;
        wait::until("its monitor", LIGHT_TIMEOUT, || {
            if let Some(status) = process.exited()? {
                bail!("A light QEMU ended with {status}");
            }
            Ok(socket.exists().then_some(()))
        })?;
        Ok(process)
    }

    /// Starts a program in its namespace. Unlike with `ip netns exec`, /sys and the control groups are as outside.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, program: &Path, arguments: &[&str]) -> Result<Engine> {
        let net = format!("--net=/run/netns/{}", self.netns.name());
        let program = program.to_string_lossy();
        let words = [&[net.as_str(), &program], arguments].concat();
        Engine::start(Path::new("nsenter"), &words, None)
    }

    /// Does `work` in its namespace, in a thread of its own.
    ///
    /// # Errors
    /// As [`Netns::spawn`].
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        self.netns.spawn(work)
    }

    /// What an agent has to know of it: the tables `profile` and `profile.host` of its configuration, with so much memory.
    #[must_use]
    pub fn profile_toml(&self, interval_s: f64, memory_mib: u64) -> String {
        let HostPlan { bits_per_s, .. } = self.plan;
        let mbit = 2.0 * bits_per_s as f64 / 1e6;
        let (monitors, cgroup) = (self.monitors(), self.cgroup.folder());
        format!(
            "[profile]\ninterval-s = {interval_s:?}\nsocket-folder = {monitors:?}\n\
             [profile.host]\ncgroup = {cgroup:?}\nuplinks = [\"{UPLINK}\"]\n\
             [profile.host.capacity]\nmemory_mib = {memory_mib}.0\nnetwork_mbit = {mbit:?}\n"
        )
    }
}
