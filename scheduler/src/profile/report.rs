//! What a host says of itself and its guests.
//!
//! Invariant: a report that was read with [`HostReport::from_json`] is within all limits named here, its figures are
//! finite and not negative, and its names hold no control characters.

pub use scheduler_api::figures::{GuestState, Pressure};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::parse::qmp::is_ethernet_address;
use crate::cost::Sampled;
use crate::model::{Amounts, GrayBox, Resource};

/// Version of the form.
pub const VERSION: u32 = 1;

/// Longest report, in bytes.
pub const REPORT_BYTES_MAX: usize = 4 << 20;

/// Most guests on a host.
pub const GUESTS_MAX: usize = 1024;

/// Most peers of a guest: those that it sends most to.
pub const PEERS_MAX: usize = 256;

/// Most interfaces of a guest.
pub const INTERFACES_MAX: usize = 64;

/// Most troubles that are told.
pub const TROUBLES_MAX: usize = 64;

/// Longest name, and longest trouble, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
const TROUBLE_BYTES_MAX: usize = 512;

/// No figure is larger: it is more than any host has of anything.
const FIGURE_MAX: f64 = 1e12;

/// Where figures of a guest's memory are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemorySource {
    /// Its kernel's own counters, read from outside.
    Introspection,
    /// Its balloon driver.
    Balloon,
    /// What its process has in memory: more than it needs.
    #[default]
    Resident,
}

/// A guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestMemory {
    /// What it may use: its RAM without what a balloon holds, MiB.
    pub allocated_mib: f64,
    /// Its RAM, MiB.
    pub max_mib: f64,
    /// What its process has in the host's memory, MiB.
    pub resident_mib: f64,
    /// What it uses, page cache included, MiB.
    pub used_mib: f64,
    /// What it uses and cannot give up, MiB.
    pub needed_mib: f64,
    /// Pages that it writes to its swap, a second.
    pub swap_writes_per_s: f64,
    /// Where the last three are from.
    pub source: MemorySource,
}

/// What a guest sends to another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sent {
    /// The other's Ethernet address.
    pub to: String,
    /// In Mbit/s.
    pub mbit: f64,
}

/// A guest.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestReport {
    /// Its name.
    pub name: String,
    /// Its UUID, empty if it has none.
    pub uuid: String,
    /// What it is doing.
    pub state: GuestState,
    /// Whether its QEMU is sending it somewhere.
    pub is_migrating: bool,
    /// Whether its monitor serves somebody else (a migration, for one), or its QEMU hangs: nothing can be done with it
    /// meanwhile.
    #[serde(default)]
    pub is_held: bool,
    /// Virtual processors.
    pub vcpus: u32,
    /// Processors that its whole process keeps busy.
    pub cpu_cores: f64,
    /// Share of all time, over its virtual processors, in which one could have run and had to wait.
    pub steal: f64,
    /// Its memory.
    pub memory: GuestMemory,
    /// Through its interfaces, both directions together, Mbit/s.
    pub network_mbit: f64,
    /// Of its disks, both directions together, MiB/s.
    pub disk_mib: f64,
    /// Its interfaces' Ethernet addresses.
    pub addresses: Vec<String>,
    /// To whom it sends.
    pub sent: Vec<Sent>,
    /// What its application says, if it does.
    #[serde(default)]
    pub gray_box: Option<GrayBox>,
    /// What its memory would take to move, where a sample was taken.
    #[serde(default)]
    pub sampled: Option<Sampled>,
}

/// A host and its guests.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostReport {
    /// Version of the form: 1.
    pub v: u32,
    /// The host's name, as in its certificate.
    pub host: String,
    /// The kernel's name for the time since the host was started.
    pub boot_id: String,
    /// Grows by one with each report.
    pub seq: u64,
    /// When it was made, on the host's own clock, seconds since 1970.
    pub at_s: f64,
    /// What it has; 0 of what is not known.
    pub capacity: Amounts,
    /// What is taken of it by all, the guests included.
    pub used: Amounts,
    /// Who waits for what.
    pub pressure: Pressure,
    /// Its guests.
    pub guests: Vec<GuestReport>,
    /// What could not be read, in words.
    pub troubles: Vec<String>,
}

/// Why a report is not believed.
#[derive(Debug, Error)]
pub enum ReportError {
    /// It is too long.
    #[error("A report of {bytes} bytes is too long (at most {REPORT_BYTES_MAX})")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It has another form.
    #[error("A report has a form that this version does not know")]
    Form(#[from] serde_json::Error),
    /// It has another version.
    #[error(
        "A report of {host:?} has version {v}, and this program knows {VERSION}: bring all agents to one version"
    )]
    Version {
        /// Its host.
        host: String,
        /// Its version.
        v: u32,
    },
    /// It has more of something than can be, or a figure that cannot be.
    #[error("A report of {host:?} cannot be: {what}")]
    Impossible {
        /// Its host.
        host: String,
        /// What cannot be.
        what: String,
    },
}

#[derive(Debug, Deserialize)]
struct Version {
    v: u32,
    #[serde(default)]
    host: String,
}

impl HostReport {
    /// Reads a report, which may be from anybody.
    ///
    /// # Errors
    /// [`ReportError`].
    pub fn from_json(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() > REPORT_BYTES_MAX {
            return Err(ReportError::TooLong { bytes: bytes.len() });
        }
        let Version { v, host } = serde_json::from_slice(bytes)?;
        if v != VERSION {
            let host = host.chars().take(NAME_BYTES_MAX).collect();
            return Err(ReportError::Version { host, v });
        }
        let report: Self = serde_json::from_slice(bytes)?;
        report.check()?;
        Ok(report)
    }

    /// Checks that it is within all limits.
    ///
    /// # Errors
    /// [`ReportError::Impossible`] with the first thing that is not.
    pub fn check(&self) -> Result<(), ReportError> {
        self.impossible().map_or(Ok(()), |what| {
            let host = self.host.chars().take(NAME_BYTES_MAX).collect();
            Err(ReportError::Impossible { host, what })
        })
    }

    fn impossible(&self) -> Option<String> {
        if !is_name(&self.host) {
            return Some("its host has no name, or one that is too long".into());
        }
        if self.boot_id.len() > NAME_BYTES_MAX {
            return Some("its boot id is too long".into());
        }
        if self.guests.len() > GUESTS_MAX {
            return Some(format!("{} guests", self.guests.len()));
        }
        let is_long = |trouble: &String| trouble.len() > TROUBLE_BYTES_MAX;
        if self.troubles.len() > TROUBLES_MAX || self.troubles.iter().any(is_long) {
            return Some("it tells of too much trouble".into());
        }
        let Pressure { cpu, memory, memory_full, disk } = self.pressure;
        let all = [self.at_s, cpu, memory, memory_full, disk].into_iter();
        let all = all.chain(amounts(&self.capacity)).chain(amounts(&self.used));
        if let Some(figure) = first_impossible(all) {
            return Some(format!("a figure of {figure}"));
        }
        self.guests.iter().find_map(|guest| {
            guest.impossible().map(|what| format!("of guest {:?}: {what}", brief(&guest.name)))
        })
    }

    /// Puts it within the limits, for those who make it: what is too much is left out, the least first where there is an
    /// order.
    pub fn fit(&mut self) {
        let left_out = self.guests.len().saturating_sub(GUESTS_MAX);
        if left_out > 0 {
            self.troubles.insert(0, format!("{left_out} guests are not reported: too many"));
            self.guests.truncate(GUESTS_MAX);
        }
        for guest in &mut self.guests {
            guest.addresses.truncate(INTERFACES_MAX);
            guest.sent.sort_by(|one, other| other.mbit.total_cmp(&one.mbit));
            guest.sent.truncate(PEERS_MAX);
        }
        self.troubles.truncate(TROUBLES_MAX);
        for trouble in &mut self.troubles {
            *trouble = cut(trouble, TROUBLE_BYTES_MAX);
        }
    }
}

impl GuestReport {
    fn impossible(&self) -> Option<String> {
        if !is_name(&self.name) || self.uuid.len() > NAME_BYTES_MAX {
            return Some("it has no name, or one that is too long".into());
        }
        if self.addresses.len() > INTERFACES_MAX || self.sent.len() > PEERS_MAX {
            return Some("it has too many interfaces or peers".into());
        }
        let to = self.sent.iter().map(|sent| &sent.to);
        if let Some(address) = self.addresses.iter().chain(to).find(|one| !is_ethernet_address(one))
        {
            return Some(format!("an Ethernet address {:?}", brief(address)));
        }
        let GuestMemory {
            allocated_mib,
            max_mib,
            resident_mib,
            used_mib,
            needed_mib,
            swap_writes_per_s,
            source: _,
        } = self.memory;
        let memory =
            [allocated_mib, max_mib, resident_mib, used_mib, needed_mib, swap_writes_per_s];
        let rest = [self.cpu_cores, self.steal, self.network_mbit, self.disk_mib];
        let sent = self.sent.iter().map(|sent| sent.mbit);
        let said = self.gray_box.iter().flat_map(said);
        let sampled = self.sampled.iter().flat_map(Sampled::figures);
        let all = memory.into_iter().chain(rest).chain(sent).chain(sampled).chain(said);
        first_impossible(all).map(|figure| format!("a figure of {figure}"))
    }
}

/// Whether figures can be.
#[must_use]
pub fn is_possible(gray_box: &GrayBox) -> bool {
    first_impossible(said(gray_box).into_iter()).is_none()
}

fn said(gray_box: &GrayBox) -> [f64; 8] {
    let GrayBox {
        served_per_s,
        dropped_per_s,
        response_s,
        service_s,
        arrival_variance_s2,
        service_variance_s2,
        promised_response_s,
        promised_drops,
    } = *gray_box;
    [
        served_per_s,
        dropped_per_s,
        response_s,
        service_s,
        arrival_variance_s2,
        service_variance_s2,
        promised_response_s,
        promised_drops,
    ]
}

fn first_impossible(mut figures: impl Iterator<Item = f64>) -> Option<f64> {
    figures.find(|figure| !(0.0..=FIGURE_MAX).contains(figure))
}

fn amounts(amounts: &Amounts) -> [f64; 4] {
    Resource::ALL.map(|resource| amounts[resource])
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control)
}

fn brief(name: &str) -> String {
    name.chars().take(40).collect()
}

/// At most so many bytes, at a character's end.
pub(super) fn cut(text: &str, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}
