//! A guest's figures: its process, processors, interfaces, disks and memory.
//!
//! QEMU is asked over its monitor, which is connected to for each reading and let go at once: it serves one client at a
//! time, and a migration needs it, too. While somebody else holds it, what was known of it stays, and what the kernel says
//! of the process goes on being read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu_glue::procfs::{self, Identity};
use qemu_glue::qmp::{Client, QmpError, RunState};
use qemu_glue::vm;
use serde_json::{Value, json};

use super::host::MBIT_PER_BYTE;
use super::memory::Look;
use super::parse::qmp::{self, BalloonStats};
use super::rates::{Counter, share};
use super::report::{GuestMemory, GuestReport, GuestState, MemorySource, NAME_BYTES_MAX, cut};
use super::{parse, read};

const MIB: f64 = 1_048_576.0;

/// How long QEMU may take to greet, and for all questions of one reading.
const GREETING_PATIENCE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(2);

/// How often a balloon asks its guest for figures, and how old they may be, seconds.
const BALLOON_INTERVAL_S: u64 = 10;
const BALLOON_AGE_MAX_S: f64 = 45.0;

/// Where QEMU keeps devices.
const DEVICE_FOLDERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// A QEMU that is looked at, at an interval.
#[derive(Debug)]
pub struct GuestProbe {
    socket: PathBuf,
    attached: Option<Attached>,
}

/// What stays as it is while a QEMU runs, and what was read last.
#[derive(Debug)]
struct Attached {
    identity: Identity,
    name: String,
    uuid: String,
    vcpu_threads: Vec<i32>,
    vcpus: u32,
    ram_mib: f64,
    taps: Vec<String>,
    is_in_our_network: bool,
    addresses: Vec<String>,
    balloon: Option<String>,
    asked: Asked,
    counters: Counters,
    look: Look,
}

/// What QEMU said last.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    state: GuestState,
    is_migrating: bool,
    disk_bytes: u64,
    balloon_leaves_mib: Option<f64>,
    balloon_stats: Option<BalloonStats>,
}

#[derive(Debug, Default)]
struct Counters {
    process: Counter,
    ran: Counter,
    waited: Counter,
    disk: Counter,
    swap: Counter,
    taps: BTreeMap<String, Counter>,
}

/// When something is read.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// On a clock that only goes forward, seconds.
    pub at_s: f64,
    /// Since 1970, seconds.
    pub unix_s: f64,
    /// Clock ticks a second, as the kernel counts processes' time.
    pub ticks_per_s: f64,
    /// Bytes of a page of the host.
    pub page_bytes: f64,
    /// Whether there is time to look for kernels.
    pub may_find: bool,
    /// Whether the monitor may be asked now.
    pub may_ask: bool,
}

impl GuestProbe {
    /// Of the QEMU that listens there.
    #[must_use]
    pub const fn new(socket: PathBuf) -> Self {
        Self { socket, attached: None }
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The guest's name, once it is known.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.attached.as_ref().map(|attached| attached.name.as_str())
    }

    /// The interfaces by which the guest sends, if they are in this program's network namespace.
    #[must_use]
    pub fn taps(&self) -> &[String] {
        let attached = self.attached.as_ref().filter(|attached| attached.is_in_our_network);
        attached.map_or(&[], |attached| &attached.taps)
    }

    /// Whether its kernel is to be looked for.
    #[must_use]
    pub fn is_look_due(&self, at_s: f64) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.look.is_due(at_s))
    }

    /// Reads. None if there is no QEMU, or nothing is known of it yet; `troubles` has why.
    pub async fn read(
        &mut self,
        moment: Moment,
        troubles: &mut Vec<String>,
    ) -> Option<GuestReport> {
        if let Some(attached) = &self.attached
            && attached.identity.check().is_err()
        {
            self.attached = None;
        }
        let socket = self.socket.display().to_string();
        let asked = async { if moment.may_ask { self.ask(moment).await } else { Ok(()) } };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => troubles.push(format!("{socket}: {why}")),
            Err(_) => {
                troubles.push(format!("{socket}: no answer for {} s", PATIENCE.as_secs()));
            }
        }
        let attached = self.attached.as_mut()?;
        let report = attached.report(moment);
        if let Err(why) = &report {
            // A processor was plugged or unplugged, or the process ended: everything is asked again next time.
            troubles.push(format!("{socket}: {why}"));
            self.attached = None;
        }
        report.ok()
    }

    async fn ask(&mut self, moment: Moment) -> Result<(), String> {
        let client = Client::connect_within(&self.socket, GREETING_PATIENCE).await.map_err(told)?;
        let attached = match &mut self.attached {
            Some(attached) => attached,
            None => self.attached.insert(Attached::attach(&client, &self.socket).await?),
        };
        attached.asked = ask(&client, attached.balloon.as_deref()).await.map_err(told)?;
        let is_running = attached.asked.state == GuestState::Running;
        if moment.may_find && is_running && attached.look.is_due(moment.at_s) {
            attached.look.find(&client, moment.at_s).await;
        }
        Ok(())
    }
}

impl Attached {
    async fn attach(client: &Client, socket: &Path) -> Result<Self, String> {
        let process = vm::process(client).await.map_err(told)?;
        let identity = Identity::of(process.pid).map_err(told)?;
        let mut vcpu_threads = process.vcpu_threads;
        let vcpus = u32::try_from(vcpu_threads.len()).unwrap_or(u32::MAX);
        vcpu_threads.sort_unstable();
        vcpu_threads.dedup();
        let name = client.query_name().await.map_err(told)?;
        let file_name = || socket.file_stem().map(|name| name.to_string_lossy().into_owned());
        let name = name.or_else(file_name).unwrap_or_default();
        let name: String = name.chars().filter(|letter| !letter.is_control()).collect();
        let ram = client.execute("query-memory-size-summary", Value::Null).await.map_err(told)?;
        // A machine without network cards has no such list.
        let cards = client.execute("query-rx-filter", Value::Null).await.unwrap_or_default();
        let balloon = find_balloon(client).await.map_err(told)?;
        if let Some(path) = &balloon {
            let interval = json!({
                "path": path, "property": "guest-stats-polling-interval", "value": BALLOON_INTERVAL_S,
            });
            client.execute("qom-set", interval).await.map_err(told)?;
        }
        Ok(Self {
            taps: taps(process.pid)?,
            is_in_our_network: network_of("self") == network_of(&process.pid.to_string()),
            identity,
            name: cut(&name, NAME_BYTES_MAX),
            uuid: client.query_uuid().await.map_err(told)?,
            vcpu_threads,
            vcpus,
            ram_mib: qmp::ram_mib(&ram).ok_or("QEMU does not say how much RAM the guest has")?,
            addresses: qmp::ethernet_addresses(&cards),
            balloon,
            asked: Asked::default(),
            counters: Counters::default(),
            look: Look::default(),
        })
    }

    fn report(&mut self, moment: Moment) -> Result<GuestReport, String> {
        let pid = self.identity.pid();
        let ticks = read::figure(format!("/proc/{pid}/stat"), parse::process_ticks)?;
        let ticks = self.counters.process.rate(moment.at_s, ticks as f64).unwrap_or(0.0);
        let steal = self.steal(pid, moment.at_s)?;
        let disk_bytes = self.counters.disk.rate(moment.at_s, self.asked.disk_bytes as f64);
        Ok(GuestReport {
            name: self.name.clone(),
            uuid: self.uuid.clone(),
            state: self.asked.state,
            is_migrating: self.asked.is_migrating,
            vcpus: self.vcpus,
            cpu_cores: ticks / moment.ticks_per_s,
            steal,
            memory: self.memory(pid, moment)?,
            network_mbit: self.network_mbit(pid, moment.at_s)?,
            disk_mib: disk_bytes.unwrap_or(0.0) / MIB,
            addresses: self.addresses.clone(),
            ..GuestReport::default()
        })
    }

    /// Of the time in which processors ran or could have, the share in which they waited.
    fn steal(&mut self, pid: i32, at_s: f64) -> Result<f64, String> {
        let (mut ran_ns, mut waited_ns) = (0_u64, 0_u64);
        for thread in &self.vcpu_threads {
            let path = format!("/proc/{pid}/task/{thread}/schedstat");
            let time = read::figure(path, parse::thread_time)?;
            ran_ns = ran_ns.saturating_add(time.ran_ns);
            waited_ns = waited_ns.saturating_add(time.waited_ns);
        }
        let ran = self.counters.ran.rate(at_s, ran_ns as f64);
        let waited = self.counters.waited.rate(at_s, waited_ns as f64);
        Ok(share(waited.unwrap_or(0.0), ran.unwrap_or(0.0)))
    }

    fn network_mbit(&mut self, pid: i32, at_s: f64) -> Result<f64, String> {
        if self.taps.is_empty() {
            return Ok(0.0);
        }
        let path = format!("/proc/{pid}/net/dev");
        let interfaces = read::figure(path, |text| Some(parse::interfaces(text)))?;
        let mut all_mbit = 0.0;
        for tap in &self.taps {
            let Some(bytes) = interfaces.get(tap) else { continue };
            let counter = self.counters.taps.entry(tap.clone()).or_default();
            all_mbit += counter.rate(at_s, *bytes as f64).unwrap_or(0.0) * MBIT_PER_BYTE;
        }
        Ok(all_mbit)
    }

    fn memory(&mut self, pid: i32, moment: Moment) -> Result<GuestMemory, String> {
        let pages = read::figure(format!("/proc/{pid}/statm"), parse::resident_pages)?;
        let resident_mib = pages as f64 * moment.page_bytes / MIB;
        let left_mib = self.asked.balloon_leaves_mib.unwrap_or(self.ram_mib);
        let allocated_mib = left_mib.min(self.ram_mib);
        let is_fresh =
            |stats: &BalloonStats| (moment.unix_s - stats.at_s as f64).abs() <= BALLOON_AGE_MAX_S;
        let mib = |bytes: u64| bytes as f64 / MIB;
        let (free_mib, available_mib, swapped, source) = if let Some(seen) = self.look.read() {
            let (free, available) = (mib(seen.free_bytes), mib(seen.available_bytes));
            (free, available, seen.swapped_out_pages, MemorySource::Introspection)
        } else if let Some(said) = self.asked.balloon_stats.filter(is_fresh) {
            (said.free_mib, said.available_mib, said.swapped_out_pages, MemorySource::Balloon)
        } else {
            let free_mib = (allocated_mib - resident_mib).max(0.0);
            (free_mib, free_mib, None, MemorySource::Resident)
        };
        // Another source's counter may begin elsewhere: the first reading of it is no rate.
        let swaps = swapped.and_then(|pages| self.counters.swap.rate(moment.at_s, pages as f64));
        Ok(GuestMemory {
            allocated_mib,
            max_mib: self.ram_mib,
            resident_mib,
            used_mib: (allocated_mib - free_mib).max(0.0),
            needed_mib: (allocated_mib - available_mib).max(0.0),
            swap_writes_per_s: swaps.unwrap_or(0.0),
            source,
        })
    }
}

async fn ask(client: &Client, balloon: Option<&str>) -> Result<Asked, QmpError> {
    let status = client.query_status().await?;
    let state = match (status.running, &status.state) {
        (true, _) => GuestState::Running,
        (false, RunState::InMigrate) => GuestState::Incoming,
        (false, _) => GuestState::Paused,
    };
    let is_migrating = client.query_migrate().await?.is_under_way();
    let disks = client.execute("query-blockstats", Value::Null).await?;
    let mut asked =
        Asked { state, is_migrating, disk_bytes: qmp::disk_bytes(&disks), ..Asked::default() };
    if let Some(path) = balloon {
        let leaves = client.execute("query-balloon", Value::Null).await?;
        asked.balloon_leaves_mib = qmp::balloon_leaves_mib(&leaves);
        asked.balloon_stats = qmp::balloon_stats(&client.qom_get(path, "guest-stats").await?);
    }
    Ok(asked)
}

async fn find_balloon(client: &Client) -> Result<Option<String>, QmpError> {
    for folder in DEVICE_FOLDERS {
        let children = client.qom_list(folder).await?;
        let is_balloon =
            |kind: Option<&str>| kind.is_some_and(|kind| kind.starts_with("virtio-balloon"));
        let found = children.iter().find(|child| is_balloon(child.child_type()));
        if let Some(child) = found {
            return Ok(Some(format!("{folder}/{}", child.name)));
        }
    }
    Ok(None)
}

/// The interfaces that the process has open, whatever they are called and whoever made them.
fn taps(pid: i32) -> Result<Vec<String>, String> {
    let mut found = vec![];
    for fd in procfs::descriptors(pid).map_err(told)? {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        if !target.is_ok_and(|target| target.ends_with("net/tun")) {
            continue;
        }
        let info = read::text(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let name = parse::tap_name(&info).map(str::to_owned);
        found.extend(name.filter(|name| !found.contains(name)));
    }
    Ok(found)
}

fn network_of(process: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/net")).ok()
}

fn told(error: impl std::error::Error) -> String {
    error.to_string()
}
