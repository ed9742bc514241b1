//! What a page, a program or another agent sees of a cluster.
//!
//! Names instead of indices, times in seconds since 1970 on the answering agent's clock, and the same units as the model.
//! Invariant: everything here is bounded by what reports may hold (`profile::report`) and by the limits named here.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::amounts::{Amounts, Resource};
use crate::figures::{GrayBox, GuestState, HostState, MigrationCost, Pressure};

/// Version of the form.
pub const VERSION: u32 = 1;

/// Most points of a curve or history; the oldest go first.
pub const POINTS_MAX: usize = 360;

/// Most hotspots and moves that have ended and are still shown.
pub const ENDED_MAX: usize = 64;

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct View {
    /// Version of the form: 1.
    pub v: u32,
    /// The host whose agent answers.
    pub agent: String,
    /// When this was put together.
    pub at_s: f64,
    /// How often that is done, seconds.
    pub interval_s: f64,
    /// The policy that decides.
    pub policy: String,
    /// Whether plans are only shown.
    pub is_dry_run: bool,
    /// The store that agents share.
    pub store: StoreView,
    /// The hosts, by name.
    pub hosts: Vec<HostView>,
    /// The guests, by name.
    pub guests: Vec<GuestView>,
    /// Which guests talk, the most first.
    pub talks: Vec<TalkView>,
    /// Hotspots now, the worst first, then those that ended, the latest first.
    pub hotspots: Vec<HotspotView>,
    /// Migrations under way, then those that ended, the latest first.
    pub moves: Vec<MoveView>,
    /// The last plan of this agent, if it made one.
    pub plan: Option<PlanView>,
    /// What was odd about reports, in words.
    pub remarks: Vec<String>,
}

/// The store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct StoreView {
    /// `embedded` or `etcd`.
    pub kind: String,
    /// Why it cannot be used at present, in words: nothing is decided until it can.
    pub trouble: Option<String>,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// Its name.
    pub name: String,
    /// Where its agent is asked, as `ADDRESS:PORT`, if it is there.
    pub api: Option<String>,
    /// What may be done with it.
    pub state: HostState,
    /// Whether a guest is on its way from here or to here.
    pub is_migrating: bool,
    /// When it was last heard of.
    pub heard_at_s: f64,
    /// Whether that is too long ago: its figures are old.
    pub is_stale: bool,
    /// What it has.
    pub capacity: Amounts,
    /// What is taken of it.
    pub used: Amounts,
    /// Who waits for what.
    pub pressure: Pressure,
    /// What could not be read there, in words.
    pub troubles: Vec<String>,
}

/// A guest.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct GuestView {
    /// Its name.
    pub name: String,
    /// Its host's name.
    pub host: String,
    /// What it is doing.
    pub state: GuestState,
    /// Whether it is on its way.
    pub is_migrating: bool,
    /// Whether a rule keeps it where it is.
    pub is_pinned: bool,
    /// Guests of higher priority are moved later.
    pub priority: u8,
    /// Virtual processors.
    pub vcpus: u32,
    /// What it takes.
    pub usage: Amounts,
    /// What it is estimated to want at its peak.
    pub peak: Amounts,
    /// Share of the time in which it wanted to run and had to wait.
    pub steal: f64,
    /// What it uses of its memory, page cache included, MiB.
    pub memory_used_mib: f64,
    /// What it uses and cannot give up, MiB.
    pub memory_needed_mib: f64,
    /// RAM that it was started with, MiB.
    pub memory_max_mib: f64,
    /// Pages that it writes to its swap, a second.
    pub swap_writes_per_s: f64,
    /// What its application says, if it does.
    pub gray_box: Option<GrayBox>,
}

/// Two guests that talk.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct TalkView {
    /// One guest.
    pub one: String,
    /// The other.
    pub other: String,
    /// Both directions together, Mbit/s.
    pub mbit: f64,
}

/// A hotspot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HotspotView {
    /// The host.
    pub host: String,
    /// The guest that suffers, if it is one.
    pub guest: Option<String>,
    /// What there is too little of.
    pub resource: Resource,
    /// The figure.
    pub current: f64,
    /// What it is expected to be next.
    pub predicted: f64,
    /// What it must not exceed.
    pub threshold: f64,
    /// Since when.
    pub since_s: f64,
    /// When it was gone, if it is.
    pub ended_s: Option<f64>,
    /// Why, in words.
    pub why: String,
}

/// How a migration is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MoveStage {
    /// It is claimed; the destination gets ready.
    #[default]
    Preparing,
    /// Memory moves.
    Moving,
    /// The guest runs at the destination.
    Completed,
    /// The guest runs at the source.
    Failed,
    /// It is being found out where the guest runs.
    InDoubt,
}

/// A point of a migration's curve.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct MovePoint {
    /// When.
    pub at_s: f64,
    /// The round.
    pub round: u32,
    /// What the destination has, bytes.
    pub applied_bytes: u64,
    /// What is known to be needed in all, bytes.
    pub expected_bytes: u64,
    /// Bytes a second.
    pub rate_bytes_per_s: Option<f64>,
    /// Downtime if the guest were stopped now, milliseconds.
    pub predicted_ms: Option<f64>,
}

/// A migration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct MoveView {
    /// The guest.
    pub guest: String,
    /// Where from.
    pub from: String,
    /// Where to.
    pub to: String,
    /// The host whose agent moves it.
    pub agent: String,
    /// Why, in words.
    pub reason: String,
    /// How it is doing.
    pub stage: MoveStage,
    /// When it began.
    pub began_s: f64,
    /// When it ended, if it has.
    pub ended_s: Option<f64>,
    /// How it went, as far as this agent saw it.
    pub curve: Vec<MovePoint>,
    /// The guest stood still for this time, milliseconds; known at the end.
    pub downtime_ms: Option<f64>,
    /// Bytes that travelled; known at the end.
    pub wire_bytes: Option<u64>,
    /// What went wrong, in words.
    pub error: Option<String>,
}

/// How a step of a plan is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// It waits for those before it.
    #[default]
    Planned,
    /// It is being done.
    Running,
    /// It is done.
    Done,
    /// It failed, or was given up.
    Failed,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum StepAction {
    /// A guest goes to another host.
    Migrate {
        /// Where from.
        from: String,
        /// Where to.
        to: String,
        /// What that is expected to take.
        cost: MigrationCost,
    },
    /// A guest may use more memory, or less.
    Resize {
        /// What it may use now, MiB.
        from_mib: f64,
        /// What it may use then, MiB.
        to_mib: f64,
    },
}

/// A step of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StepView {
    /// The guest.
    pub guest: String,
    /// What is done.
    pub action: StepAction,
    /// Steps of one wave are independent of each other.
    pub wave: u32,
    /// How it is doing.
    pub state: StepState,
    /// Why, in words.
    pub reason: String,
    /// What went wrong, in words.
    pub error: Option<String>,
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct PlanView {
    /// When it was made.
    pub at_s: f64,
    /// By which policy.
    pub policy: String,
    /// The steps, by wave.
    pub steps: Vec<StepView>,
    /// What was considered and left, in words.
    pub notes: Vec<String>,
}

/// A point of a host's history.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct HistoryPoint {
    /// When.
    pub at_s: f64,
    /// Shares of what the host has.
    pub share: Amounts,
}

/// A host's history.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct HistoryView {
    /// The host.
    pub host: String,
    /// What must not be exceeded, as shares.
    pub threshold: Amounts,
    /// The points, the oldest first.
    pub points: Vec<HistoryPoint>,
    /// What is expected next, as shares, where enough is known.
    pub predicted: Option<Amounts>,
}
