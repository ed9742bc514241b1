//! What QEMU says of a guest over its monitor.

use std::fs;
use std::path::Path;

use qemu_glue::procfs;
use qemu_glue::qmp::{Client, QmpError, RunState};
use qemu_glue::vm;
use serde_json::{Value, json};

use super::cgroup;
use super::parse::qmp::{self, BalloonStats};
use super::report::{GuestState, INTERFACES_MAX};
use super::{parse, read};

/// How often a balloon asks its guest for figures.
const BALLOON_INTERVAL_S: u64 = 10;

/// Where QEMU keeps devices, and most of them that are looked at.
const DEVICE_FOLDERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
const DEVICES_MAX: usize = 512;

/// What may be plugged and unplugged, or set anew.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Parts {
    pub(super) pid: i32,
    pub(super) vcpu_threads: Vec<i32>,
    pub(super) vcpus: u32,
    /// Processors that the guest may use by a limit of its own.
    pub(super) limit_cores: Option<f64>,
    pub(super) ram_mib: f64,
    pub(super) taps: Vec<String>,
    pub(super) addresses: Vec<String>,
    pub(super) balloon: Option<String>,
}

/// What changes all the time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    pub(super) state: GuestState,
    pub(super) is_migrating: bool,
    pub(super) disk_bytes: u64,
    pub(super) balloon_leaves_mib: Option<f64>,
    pub(super) balloon_stats: Option<BalloonStats>,
}

impl Parts {
    /// Asks for them. The balloon is told to ask its guest for figures.
    pub(super) async fn ask(client: &Client, host: Option<&Path>) -> Result<Self, String> {
        let process = vm::process(client).await.map_err(told)?;
        let mut vcpu_threads = process.vcpu_threads;
        let vcpus = u32::try_from(vcpu_threads.len()).unwrap_or(u32::MAX);
        vcpu_threads.sort_unstable();
        vcpu_threads.dedup();
        let ram = client.execute("query-memory-size-summary", Value::Null).await.map_err(told)?;
        let (addresses, balloon) = devices(client).await.map_err(told)?;
        if let Some(path) = &balloon {
            let interval = json!({
                "path": path, "property": "guest-stats-polling-interval", "value": BALLOON_INTERVAL_S,
            });
            client.execute("qom-set", interval).await.map_err(told)?;
        }
        Ok(Self {
            limit_cores: cgroup::own_limit_cores(process.pid, &vcpu_threads, host),
            taps: taps(process.pid)?,
            pid: process.pid,
            vcpu_threads,
            vcpus,
            ram_mib: qmp::ram_mib(&ram).ok_or("QEMU does not say how much RAM the guest has")?,
            addresses,
            balloon,
        })
    }
}

impl Asked {
    /// Asks for it.
    pub(super) async fn ask(client: &Client, balloon: Option<&str>) -> Result<Self, QmpError> {
        let status = client.query_status().await?;
        let state = match (status.running, &status.state) {
            (true, _) => GuestState::Running,
            (false, RunState::InMigrate) => GuestState::Incoming,
            (false, _) => GuestState::Paused,
        };
        let is_migrating = client.query_migrate().await?.is_under_way();
        let disks = client.execute("query-blockstats", Value::Null).await?;
        let mut asked =
            Self { state, is_migrating, disk_bytes: qmp::disk_bytes(&disks), ..Self::default() };
        if let Some(path) = balloon {
            // A balloon that is being unplugged says nothing; all else goes on.
            let leaves = client.execute("query-balloon", Value::Null).await;
            asked.balloon_leaves_mib = leaves.ok().as_ref().and_then(qmp::balloon_leaves_mib);
            let stats = client.qom_get(path, "guest-stats").await;
            asked.balloon_stats = stats.ok().as_ref().and_then(qmp::balloon_stats);
        }
        Ok(asked)
    }
}

/// Ethernet addresses of network cards, as they were set and as the guest has set them itself; and the balloon.
async fn devices(client: &Client) -> Result<(Vec<String>, Option<String>), QmpError> {
    // A machine without network cards has no such list.
    let cards = client.execute("query-rx-filter", Value::Null).await.unwrap_or_default();
    let mut addresses = qmp::ethernet_addresses(&cards);
    let mut balloon = None;
    for folder in DEVICE_FOLDERS {
        for child in client.qom_list(folder).await?.into_iter().take(DEVICES_MAX) {
            let Some(kind) = child.child_type() else { continue };
            let path = format!("{folder}/{}", child.name);
            if kind.starts_with("virtio-balloon") {
                balloon.get_or_insert(path);
            } else if let Ok(Value::String(address)) = client.qom_get(&path, "mac").await {
                let address = address.to_ascii_lowercase();
                let is_new = qmp::is_ethernet_address(&address) && !addresses.contains(&address);
                addresses.extend(is_new.then_some(address));
            }
        }
    }
    addresses.truncate(INTERFACES_MAX);
    Ok((addresses, balloon))
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

pub(super) fn told(error: impl std::error::Error) -> String {
    error.to_string()
}
