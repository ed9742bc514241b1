//! What can be written in a scenario file. Unknown keys are refused; what values mean is in docs/SCHEDULER.md.

use serde::Deserialize;

use crate::model::HostState;
use crate::plan::Limits;
use crate::{detect, provision};

/// A scenario file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) about: String,
    pub(super) duration_s: f64,
    #[serde(default = "ten")]
    pub(super) report_s: f64,
    #[serde(default = "one_seed")]
    pub(super) seeds: u64,
    #[serde(default)]
    pub(super) policies: Vec<String>,
    #[serde(default)]
    pub(super) limits: Limits,
    #[serde(default)]
    pub(super) detect: detect::Settings,
    #[serde(default)]
    pub(super) provision: provision::Settings,
    #[serde(default)]
    pub(super) engine: EnginePart,
    #[serde(default)]
    pub(super) host: Vec<HostPart>,
    #[serde(default)]
    pub(super) vm: Vec<VmPart>,
    #[serde(default)]
    pub(super) talk: Vec<TalkPart>,
    #[serde(default)]
    pub(super) rules: RulesPart,
    pub(super) generate: Option<GeneratePart>,
    #[serde(default)]
    pub(super) expect: Vec<Expect>,
    #[serde(default)]
    pub(super) compare: Vec<Compare>,
}

/// What migrations take of hosts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EnginePart {
    /// CPU at either end.
    pub(super) cores_per_gbit: f64,
}

impl Default for EnginePart {
    fn default() -> Self {
        Self { cores_per_gbit: 0.5 }
    }
}

/// What a host is like where the file does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum HostKind {
    /// 16 cores, 64 GiB, 10 Gbit/s.
    #[default]
    Server,
    /// The hosts of the tables in [`crate::simulate::calibration`].
    Pentium4,
}

/// `[[host]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HostPart {
    pub(super) name: String,
    #[serde(default)]
    pub(super) kind: HostKind,
    pub(super) cpu_cores: Option<f64>,
    pub(super) memory_mib: Option<f64>,
    pub(super) network_mbit: Option<f64>,
    pub(super) receive_mbit: Option<f64>,
    pub(super) disk_mib: Option<f64>,
    pub(super) own_cpu_cores: Option<f64>,
    pub(super) own_memory_mib: Option<f64>,
    #[serde(default)]
    pub(super) state: HostState,
}

/// What a guest does.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Work {
    /// SPECweb2005 Support: users that read and think.
    Web { role: WebRole, sessions: f64 },
    /// netperf: as much as gets through.
    Bulk { role: BulkRole },
    /// So much of everything.
    Plain {
        cpu_cores: f64,
        #[serde(default)]
        outside_mbit: f64,
        #[serde(default)]
        disk_mib: f64,
        #[serde(default)]
        users: f64,
    },
}

/// Which tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WebRole {
    Server,
    Database,
    Both,
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum BulkRole {
    Client,
    Server,
}

/// `[[vm]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VmPart {
    pub(super) name: String,
    pub(super) host: String,
    pub(super) group: Option<String>,
    pub(super) work: Work,
    #[serde(default = "one_vcpu")]
    pub(super) vcpus: u32,
    pub(super) memory_mib: f64,
    /// RAM that it was started with.
    pub(super) max_mib: Option<f64>,
    pub(super) reserve_mib: Option<f64>,
    pub(super) needs_mib: Option<f64>,
    #[serde(default)]
    pub(super) cache_mib: f64,
    #[serde(default = "two")]
    pub(super) dirty_mib_per_s: f64,
    /// (from when, factor)
    #[serde(default)]
    pub(super) levels: Vec<(f64, f64)>,
    /// (from when, MiB)
    #[serde(default)]
    pub(super) needs: Vec<(f64, f64)>,
    #[serde(default)]
    pub(super) noise: f64,
    #[serde(default)]
    pub(super) priority: u8,
}

/// `[[talk]]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TalkPart {
    pub(super) between: (String, String),
    pub(super) mbit: f64,
    #[serde(default)]
    pub(super) elastic: bool,
}

/// `[rules]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RulesPart {
    pub(super) pinned: Vec<String>,
    pub(super) together: Vec<Vec<String>>,
    pub(super) apart: Vec<Vec<String>>,
}

/// `[generate]`: a cluster by seed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct GeneratePart {
    pub(super) hosts: usize,
    pub(super) vms: usize,
    /// Mean share of all hosts' CPU that guests want.
    pub(super) cpu_share: f64,
    /// Share of guests that are part of a group.
    pub(super) grouped: f64,
    pub(super) group_size_max: usize,
    /// Share of groups that begin on one host.
    pub(super) together: f64,
    /// Median between two guests of a group that talk.
    pub(super) talk_mbit: f64,
    pub(super) daily: f64,
    pub(super) noise: f64,
    pub(super) bursts_per_day: f64,
    pub(super) burst_factor_max: f64,
    pub(super) burst_s_max: f64,
    /// Flash crowds in a day, each upon one group.
    pub(super) crowds_per_day: f64,
    pub(super) crowd_factor: f64,
    /// Share of guests whose memory needs grow beyond what they have.
    pub(super) memory_grows: f64,
}

impl Default for GeneratePart {
    fn default() -> Self {
        Self {
            hosts: 20,
            vms: 200,
            cpu_share: 0.55,
            grouped: 0.6,
            group_size_max: 6,
            together: 0.3,
            talk_mbit: 150.0,
            daily: 0.25,
            noise: 0.05,
            bursts_per_day: 6.0,
            burst_factor_max: 2.5,
            burst_s_max: 900.0,
            crowds_per_day: 40.0,
            crowd_factor: 3.0,
            memory_grows: 0.05,
        }
    }
}

/// `[[expect]]`: what a policy is expected to do.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Expect {
    pub(super) policy: String,
    /// All moves in their order, each `GUEST: FROM -> TO`.
    pub(super) moves: Option<Vec<String>>,
    /// Guests whose memory grows first, in order.
    #[serde(default)]
    pub(super) grows: Vec<String>,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Quantity {
    /// A group's mean response time.
    Response,
    /// Mean traffic between a group's guests.
    Talk,
    /// A host's mean share of CPU in use.
    Cpu,
    /// A host's mean share of the interface in use.
    Network,
    /// Host-seconds in which more was wanted than there is, of all hosts.
    Overload,
}

/// `[[compare]]`: how results of two policies are expected to differ.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Compare {
    pub(super) quantity: Quantity,
    /// A group or a host; without: the mean of all.
    pub(super) of: Option<String>,
    pub(super) policy: String,
    pub(super) against: String,
    /// What was measured, percent.
    pub(super) measured: Option<f64>,
    /// Between these, percent.
    pub(super) percent: (f64, f64),
}

fn ten() -> f64 {
    10.0
}

fn two() -> f64 {
    2.0
}

fn one_seed() -> u64 {
    1
}

fn one_vcpu() -> u32 {
    1
}
