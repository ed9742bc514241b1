//! A guest's figures: its process, processors, interfaces, disks and memory.
//!
//! QEMU is asked over its monitor, which is connected to for each reading and let go at once: it serves one client at a
//! time, and a migration needs it, too. While somebody else holds it, what was known of it stays, and what the kernel says
//! of the process goes on being read.
//!
//! Waiting that the guest's own limit of processor time brings about is no steal: elsewhere it would wait as long.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::layout::PAGE_BYTES;
use qemu_glue::procfs::Identity;
use qemu_glue::qmp::{Client, QmpError};

use super::host::MBIT_PER_BYTE;
use super::memory::Look;
use super::monitor::{Asked, Parts, told};
use super::parse::qmp::BalloonStats;
use super::rates::Counter;
use super::report::{GuestMemory, GuestReport, GuestState, MemorySource, NAME_BYTES_MAX, cut};
use super::{parse, read};
use crate::cost::Sampled;

const MIB: f64 = 1_048_576.0;

/// How long QEMU may take to greet, and for all questions of one reading.
const GREETING_PATIENCE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(2);

/// How old figures of a balloon may be, seconds.
const BALLOON_AGE_MAX_S: f64 = 45.0;

/// How often it is asked for what may be plugged, seconds.
const PARTS_INTERVAL_S: f64 = 60.0;

/// From this share of its own limit on, it is the limit that a guest waits for.
const LIMIT_SHARE: f64 = 0.9;

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
    is_in_our_network: bool,
    parts: Parts,
    parts_at_s: f64,
    asked: Asked,
    disk_mib: f64,
    is_held: bool,
    counters: Counters,
    look: Look,
}

#[derive(Debug, Default)]
struct Counters {
    process: Counter,
    waited: Counter,
    disk: Counter,
    swap: Counter,
    taps: BTreeMap<String, Counter>,
}

/// When something is read, and what is the same for all guests.
#[derive(Debug, Clone)]
pub struct Moment {
    /// Where the clock begins that only goes forward.
    pub began: Instant,
    /// On that clock, when this reading began and `interfaces` were read, seconds.
    pub at_s: f64,
    /// Since 1970, seconds.
    pub unix_s: f64,
    /// Clock ticks a second, as the kernel counts processes' time.
    pub ticks_per_s: f64,
    /// Bytes of a page of the host.
    pub page_bytes: f64,
    /// Whether there is time to look for kernels.
    pub may_find: bool,
    /// Whether there is time for a sample of memory.
    pub may_sample: bool,
    /// Whether the monitor may be asked now.
    pub may_ask: bool,
    /// Bytes through the interfaces of this program's network namespace.
    pub interfaces: Arc<BTreeMap<String, u64>>,
    /// The control group that is the host's.
    pub cgroup: Option<Arc<Path>>,
}

impl Moment {
    /// By now, seconds: QEMU may have taken its time to answer.
    fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}

/// Why QEMU said nothing.
enum Silence {
    /// It serves somebody else, or hangs.
    Held(String),
    /// Anything else.
    Other(String),
}

impl From<String> for Silence {
    fn from(why: String) -> Self {
        Self::Other(why)
    }
}

impl From<QmpError> for Silence {
    fn from(error: QmpError) -> Self {
        match &error {
            QmpError::NoGreeting { .. } => Self::Held(told(error)),
            _ => Self::Other(told(error)),
        }
    }
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

    /// Its process, and when that was started in clock ticks since the host was.
    #[must_use]
    pub fn process(&self) -> Option<(i32, u64)> {
        let identity = &self.attached.as_ref()?.identity;
        Some((identity.pid(), identity.start_ticks()))
    }

    /// The interfaces by which the guest sends, if they are in this program's network namespace.
    #[must_use]
    pub fn taps(&self) -> &[String] {
        let attached = self.attached.as_ref().filter(|attached| attached.is_in_our_network);
        attached.map_or(&[], |attached| &attached.parts.taps)
    }

    /// Whether its kernel is to be looked for.
    #[must_use]
    pub fn is_look_due(&self, at_s: f64) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.look.is_due(at_s))
    }

    /// Whether it is time for a sample of its memory.
    #[must_use]
    pub fn is_sample_due(&self, at_s: f64) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.look.is_sample_due(at_s))
    }

    /// Reads. None if there is no QEMU, or nothing is known of it yet; `troubles` has why.
    pub async fn read(
        &mut self,
        moment: &Moment,
        troubles: &mut Vec<String>,
    ) -> Option<GuestReport> {
        if let Some(attached) = &self.attached
            && attached.identity.check().is_err()
        {
            self.attached = None;
        }
        let socket = self.socket.display().to_string();
        let asked =
            async { if moment.may_ask { self.ask(moment, troubles).await } else { Ok(()) } };
        let asked = tokio::time::timeout(PATIENCE, asked).await;
        let silence = match asked {
            Ok(answer) => answer.err(),
            Err(_) => Some(Silence::Held(format!("no answer for {} s", PATIENCE.as_secs()))),
        };
        let is_held = matches!(silence, Some(Silence::Held(_)));
        if let Some(Silence::Held(why) | Silence::Other(why)) = silence {
            troubles.push(format!("{socket}: {why}"));
        }
        let attached = self.attached.as_mut()?;
        attached.is_held = is_held;
        let may_sample = moment.may_sample && attached.is_at_home(moment);
        attached.look.sample(may_sample, moment.at_s).await;
        let report = attached.report(moment);
        if let Err(why) = &report {
            // A processor was unplugged, or the process ended: everything is asked again next time.
            troubles.push(format!("{socket}: {why}"));
            self.attached = None;
        }
        report.ok()
    }

    async fn ask(&mut self, moment: &Moment, troubles: &mut Vec<String>) -> Result<(), Silence> {
        let client = Client::connect_within(&self.socket, GREETING_PATIENCE).await?;
        let attached = match &mut self.attached {
            Some(attached) => attached,
            None => self.attached.insert(Attached::attach(&client, &self.socket, moment).await?),
        };
        attached.ask(&client, moment).await?;
        let is_running = attached.asked.state == GuestState::Running;
        if moment.may_find && is_running && attached.look.is_due(moment.at_s) {
            attached.look.find(&client, moment.at_s).await;
            let why = attached.look.why_not();
            troubles.extend(why.map(|why| {
                format!("{}: its memory cannot be seen from outside: {why}", attached.name)
            }));
        }
        Ok(())
    }
}

impl Attached {
    async fn attach(client: &Client, socket: &Path, moment: &Moment) -> Result<Self, String> {
        let parts = Parts::ask(client, moment.cgroup.as_deref()).await?;
        let identity = Identity::of(parts.pid).map_err(told)?;
        let name = client.query_name().await.map_err(told)?;
        let file_name = || socket.file_stem().map(|name| name.to_string_lossy().into_owned());
        let name = name.filter(|name| !name.is_empty()).or_else(file_name).unwrap_or_default();
        let name: String = name.chars().filter(|letter| !letter.is_control()).collect();
        Ok(Self {
            name: cut(&name, NAME_BYTES_MAX),
            uuid: client.query_uuid().await.map_err(told)?,
            is_in_our_network: network_of("thread-self") == network_of(&parts.pid.to_string()),
            identity,
            parts,
            parts_at_s: moment.at_s,
            asked: Asked::default(),
            disk_mib: 0.0,
            is_held: false,
            counters: Counters::default(),
            look: Look::default(),
        })
    }

    async fn ask(&mut self, client: &Client, moment: &Moment) -> Result<(), Silence> {
        if moment.at_s - self.parts_at_s >= PARTS_INTERVAL_S {
            self.parts = Parts::ask(client, moment.cgroup.as_deref()).await?;
            self.parts_at_s = moment.at_s;
        }
        self.asked = Asked::ask(client, self.parts.balloon.as_deref()).await?;
        let rate = self.counters.disk.rate(moment.now_s(), self.asked.disk_bytes as f64);
        self.disk_mib = rate.unwrap_or(0.0) / MIB;
        Ok(())
    }

    /// Whether it runs, and all of it here, for all that is known.
    fn is_at_home(&self, moment: &Moment) -> bool {
        let is_running = self.asked.state == GuestState::Running;
        is_running && moment.may_ask && !self.is_held && !self.asked.is_migrating
    }

    fn report(&mut self, moment: &Moment) -> Result<GuestReport, String> {
        let pid = self.identity.pid();
        let ticks = read::figure(format!("/proc/{pid}/stat"), parse::process_ticks)?;
        let ticks = self.counters.process.rate(moment.now_s(), ticks as f64).unwrap_or(0.0);
        let cpu_cores = ticks / moment.ticks_per_s;
        let steal = self.steal(pid, moment)?;
        let is_at_limit =
            self.parts.limit_cores.is_some_and(|cores| cpu_cores >= cores * LIMIT_SHARE);
        let memory = self.memory(pid, moment)?;
        Ok(GuestReport {
            name: self.name.clone(),
            uuid: self.uuid.clone(),
            state: self.asked.state,
            is_migrating: self.asked.is_migrating,
            is_held: self.is_held,
            vcpus: self.parts.vcpus,
            cpu_cores,
            steal: if is_at_limit { 0.0 } else { steal },
            sampled: self.sampled(memory.used_mib),
            memory,
            network_mbit: self.network_mbit(pid, moment)?,
            disk_mib: self.disk_mib,
            addresses: self.parts.addresses.clone(),
            ..GuestReport::default()
        })
    }

    /// Of all time the share in which a processor could have run and waited, as the DRS thesis has it: what is used,
    /// divided by the rest of the time, is then what is wanted. (The share of the time in which it ran or waited would be
    /// large for a guest that is at rest and waits a little at each of its few awakenings.)
    fn steal(&mut self, pid: i32, moment: &Moment) -> Result<f64, String> {
        let mut waited_ns = 0_u64;
        for thread in &self.parts.vcpu_threads {
            let path = format!("/proc/{pid}/task/{thread}/schedstat");
            waited_ns = waited_ns.saturating_add(read::figure(path, parse::thread_waited_ns)?);
        }
        let waited = self.counters.waited.rate(moment.now_s(), waited_ns as f64).unwrap_or(0.0);
        let threads = self.parts.vcpu_threads.len().max(1);
        Ok((waited / 1e9 / threads as f64).min(1.0))
    }

    fn network_mbit(&mut self, pid: i32, moment: &Moment) -> Result<f64, String> {
        if self.parts.taps.is_empty() {
            return Ok(0.0);
        }
        let (interfaces, at_s) = if self.is_in_our_network {
            (Arc::clone(&moment.interfaces), moment.at_s)
        } else {
            let path = format!("/proc/{pid}/net/dev");
            let interfaces = read::figure(path, |text| Some(parse::interfaces(text)))?;
            (Arc::new(interfaces), moment.now_s())
        };
        let mut all_mbit = 0.0;
        for tap in &self.parts.taps {
            let Some(bytes) = interfaces.get(tap) else { continue };
            let counter = self.counters.taps.entry(tap.clone()).or_default();
            all_mbit += counter.rate(at_s, *bytes as f64).unwrap_or(0.0) * MBIT_PER_BYTE;
        }
        Ok(all_mbit)
    }

    /// What the last sample says of a guest that uses so much.
    fn sampled(&self, used_mib: f64) -> Option<Sampled> {
        let load = self.look.sampled()?.load(used_mib * MIB / PAGE_BYTES as f64)?;
        let mib = |pages: f64| pages * PAGE_BYTES as f64 / MIB;
        Some(Sampled {
            first_wire_mib: load.first_bytes / MIB,
            written_mib: mib(load.written.pages),
            written_within_s: load.written.seconds,
            again: load.bytes_a_written_page / PAGE_BYTES as f64,
        })
    }

    fn memory(&mut self, pid: i32, moment: &Moment) -> Result<GuestMemory, String> {
        let pages = read::figure(format!("/proc/{pid}/statm"), parse::resident_pages)?;
        let resident_mib = pages as f64 * moment.page_bytes / MIB;
        let ram_mib = self.parts.ram_mib;
        let allocated_mib = self.asked.balloon_leaves_mib.map_or(ram_mib, |left| left.min(ram_mib));
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
        // Both sources count what the guest's kernel does.
        let swaps = swapped.and_then(|pages| self.counters.swap.rate(moment.now_s(), pages as f64));
        Ok(GuestMemory {
            allocated_mib,
            max_mib: ram_mib,
            resident_mib,
            used_mib: (allocated_mib - free_mib).max(0.0),
            needed_mib: (allocated_mib - available_mib).max(0.0),
            swap_writes_per_s: swaps.unwrap_or(0.0),
            source,
        })
    }
}

fn network_of(process: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/net")).ok()
}
