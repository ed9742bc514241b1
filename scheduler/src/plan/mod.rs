//! What to do about hotspots.
//!
//! A [`Policy`] is a pure function of a [`Problem`]; agents and the simulator ask the same code. A plan's steps name their
//! reasons in words that `explain` and `--dry-run` print.
//!
//! ```text
//!   Problem ─► Draft ─► sandpiper | idc | drs ─► drain ─► Plan
//!              room, waves, words   hot hosts    hosts to be emptied
//! ```

pub mod balloon;
mod draft;
mod drain;
pub mod drs;
mod hot;
pub mod idc;
mod registry;
mod room;
pub mod sandpiper;
mod swap;
mod words;

pub mod godwit;
#[cfg(test)]
mod invariants;
#[cfg(test)]
mod situations;
#[cfg(test)]
mod thesis;

use serde::{Deserialize, Serialize};

pub use self::registry::{NAMES, policy};
use crate::cost::MigrationCost;
use crate::model::{Amounts, Cluster, HostIndex, Resource, VmIndex};

/// A host, or a guest on it, that has too much to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Hotspot {
    /// The host.
    pub host: HostIndex,
    /// The guest that suffers, if it is one: it waits for processors, swaps, or misses what its users were promised.
    pub vm: Option<VmIndex>,
    /// What there is too little of.
    pub resource: Resource,
    /// The figure, in the detector's unit: a share of the capacity, 1 for all of it, unless `why` says otherwise.
    pub current: f64,
    /// What it is expected to be next.
    pub predicted: f64,
    /// What it must not exceed.
    pub threshold: f64,
    /// Since when, in seconds on the scheduler's clock.
    pub since_s: f64,
    /// In words.
    pub why: String,
}

/// How far plans may go.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Shares of its capacity up to which a host may be filled; those that a file does not name are the defaults.
    #[serde(deserialize_with = "share_max")]
    pub share_max: Amounts,
    /// Migrations in one plan.
    pub moves_max: usize,
    /// A guest does not return to where it was within this time, in seconds.
    pub back_after_s: f64,
    /// A guest that has moved stays for this time, in seconds.
    pub stay_s: f64,
    /// What a migration may take of the network, Mbit/s.
    pub link_mbit: f64,
    /// By what memory grows in one step, MiB.
    pub memory_step_mib: f64,
}

/// Reads shares of which some may be left out.
fn share_max<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Amounts, D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Named {
        cpu_cores: Option<f64>,
        memory_mib: Option<f64>,
        network_mbit: Option<f64>,
        disk_mib: Option<f64>,
    }
    let (named, all) = (Named::deserialize(from)?, Limits::default().share_max);
    Ok(Amounts {
        cpu_cores: named.cpu_cores.unwrap_or(all.cpu_cores),
        memory_mib: named.memory_mib.unwrap_or(all.memory_mib),
        network_mbit: named.network_mbit.unwrap_or(all.network_mbit),
        disk_mib: named.disk_mib.unwrap_or(all.disk_mib),
    })
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            share_max: Amounts {
                cpu_cores: 0.85,
                memory_mib: 0.95,
                network_mbit: 0.80,
                disk_mib: 0.90,
            },
            moves_max: 16,
            back_after_s: 600.0,
            stay_s: 60.0,
            link_mbit: 1000.0,
            memory_step_mib: 32.0,
        }
    }
}

/// What a policy is asked.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Everything that is known.
    pub cluster: &'a Cluster,
    /// What is to be cured, the worst first. Hosts that are to be emptied are found by their state.
    pub hotspots: &'a [Hotspot],
    /// How far the plan may go.
    pub limits: &'a Limits,
    /// The scheduler's clock, in seconds.
    pub now_s: f64,
}

/// Something that a plan wants done.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// A guest goes to another host.
    Migrate {
        /// The guest.
        vm: VmIndex,
        /// Where it runs.
        from: HostIndex,
        /// Where it goes.
        to: HostIndex,
        /// What that is expected to take.
        cost: MigrationCost,
    },
    /// A guest may use more memory, or less.
    Resize {
        /// The guest.
        vm: VmIndex,
        /// What it may use now, MiB.
        from_mib: f64,
        /// What it may use then, MiB.
        to_mib: f64,
    },
}

/// A step of a plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// Steps of one wave are independent of each other; a wave begins when those before it have ended well.
    pub wave: u32,
    /// Why, in words.
    pub reason: String,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Plan {
    /// The steps, by wave.
    pub steps: Vec<Step>,
    /// What was considered and left, in words.
    pub notes: Vec<String>,
}

impl Plan {
    /// The migrations: guest, from where, to where.
    pub fn moves(&self) -> impl Iterator<Item = (VmIndex, HostIndex, HostIndex)> + '_ {
        self.steps.iter().filter_map(|step| match step.action {
            Action::Migrate { vm, from, to, .. } => Some((vm, from, to)),
            Action::Resize { .. } => None,
        })
    }
}

/// A way to decide.
pub trait Policy: std::fmt::Debug + Send + Sync {
    /// Its name, as users write it.
    fn name(&self) -> &'static str;

    /// What to do. The same problem always has the same plan.
    fn plan(&self, problem: &Problem<'_>) -> Plan;

    /// Whether it is to be asked while there is no hotspot, too.
    fn anticipates(&self) -> bool {
        false
    }
}
