//! What a VM consists of, as far as moving it is concerned.
//!
//! ```text
//!  query-memdev, qom-get -----+
//!  info ramblock  (sizes) ----+--> which blocks x-ignore-shared leaves out --> regions
//!  info mtree -f  (layout) ---+            |
//!  gpa2hva        (addresses) +            +--> everything else: streamed_blocks
//!  /proc/PID/maps (sharing) --+
//! ```
//!
//! Invariants:
//! - Nothing is guessed. A block whose address, sharing or backing is in doubt is no region; a
//!   blocker says so.
//! - Nothing in the VM is changed: all commands used only ask. It works for a running, a stopped
//!   and an incoming QEMU.
//! - QEMU's text output is parsed within named limits (see `hmp`).

mod direct_io;
mod error;
pub(crate) mod hmp;
mod memory;
mod obstacles;
mod process;
mod processors;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::check::{Finding, Severity};
use crate::procfs;
use crate::qmp::{Client, QemuVersion, Status};
use crate::ram::RamRegion;
pub use error::VmError;
pub use process::{QemuProcess, process};
pub use processors::{Processor, processors};

/// Part of a RAM block as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpaRange {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// QEMU's name of the block.
    pub block: String,
    /// Offset of the first byte in the block, in bytes.
    pub offset: u64,
}

/// What was found out about one VM.
#[derive(Debug, Clone)]
pub struct VmInventory {
    /// Its name (`-name`), if it has one.
    pub name: Option<String>,
    /// Its UUID; all zeros if none was set.
    pub uuid: String,
    /// The machine type's full name, as the migration stream carries it (`pc-i440fx-7.2`).
    pub machine: String,
    /// The version of its QEMU.
    pub qemu: QemuVersion,
    /// Its QEMU's process, as seen from here.
    pub pid: i32,
    /// Its run state.
    pub status: Status,
    /// The RAM that x-ignore-shared leaves out of QEMU's stream: what the engine moves itself.
    pub regions: Vec<RamRegion>,
    /// Names and lengths in bytes of the blocks that QEMU streams with the device state.
    pub streamed_blocks: Vec<(String, u64)>,
    /// All RAM of which QEMU's address is known, the regions among it.
    pub placed: Vec<RamRegion>,
    /// Where the guest sees it, in ascending order.
    pub guest_physical: Vec<GpaRange>,
    /// Disks whose data reaches guest memory past the page cache, and why; see design rule 6.
    pub direct_io: Vec<String>,
    /// Whether a balloon may turn pages into holes while the guest runs; see
    /// [`GuestRam::vanished`](crate::ram::GuestRam::vanished).
    pub discards: bool,
    /// What forbids the direct path, or either.
    pub blockers: Vec<Finding>,
    /// What else is worth knowing.
    pub notes: Vec<Finding>,
}

impl VmInventory {
    /// Name for people: the VM's own or its process.
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("QEMU process {}", self.pid))
    }

    /// Bytes of RAM in all regions.
    pub fn ram_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.length_bytes).sum()
    }
}

/// Examines a VM. That something forbids migrating it is no error: see [`VmInventory::blockers`].
///
/// # Errors
/// A [`VmError`] if QEMU does not answer, is not found as a process, or changes meanwhile.
pub async fn inventory(client: &Client) -> Result<VmInventory, VmError> {
    let status = client.query_status().await?;
    let machine = machine_name(client).await?;
    let pid = process::find(client).await?;
    let identity = procfs::Identity::of(pid)?;
    let memory = memory::examine(client, pid).await?;
    let mut findings = memory.findings;
    findings.extend(obstacles::settings(client, &status).await?);
    let devices = obstacles::device_types(client).await?;
    findings.extend(obstacles::devices(&devices));
    findings.extend(obstacles::network(client).await?);
    let mut direct_io = direct_io::block_nodes(&client.query_named_block_nodes().await?);
    direct_io.extend(obstacles::passthrough_disks(&devices));
    let files = Arc::new(memory.files);
    let from_process = tokio::task::spawn_blocking(move || {
        (direct_io::descriptors(pid), process::other_writers(pid, &files))
    });
    let (descriptors, writers) = from_process.await.map_err(|_| VmError::Interrupted)?;
    direct_io::merge(&mut direct_io, descriptors?);
    findings.extend(writers);
    identity.check()?;
    let (blockers, notes) =
        findings.into_iter().partition(|finding| finding.severity >= Severity::Indirect);
    Ok(VmInventory {
        name: client.query_name().await?,
        uuid: client.query_uuid().await?,
        machine,
        qemu: client.version().clone(),
        pid,
        status,
        regions: memory.regions,
        streamed_blocks: memory.streamed_blocks,
        placed: memory.placed,
        guest_physical: memory.guest_physical,
        direct_io,
        discards: obstacles::discards(&devices),
        blockers,
        notes,
    })
}

/// The machine's class name without the suffix that every machine class has.
async fn machine_name(client: &Client) -> Result<String, VmError> {
    let answer = client.qom_get("/machine", "type").await?;
    let name = answer.as_str().and_then(|class| class.strip_suffix("-machine"));
    name.map(str::to_owned).ok_or_else(|| VmError::MachineType { found: answer.to_string() })
}
