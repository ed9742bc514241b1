//! Hosts of a split guest, and what is measured once it runs there.

use anyhow::{Result, ensure};
use framework::SplitNet;
use framework::worker::Phase;
use serde::{Deserialize, Serialize};

use super::{Modes, Workload};

/// What the worker does for a while after the guest's arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum AccessPhase {
    /// Reads and writes pages of its hot area.
    Hot,
    /// Allocates memory, writes, reads and frees it.
    Fresh,
    /// Reads pages of the area that was filled once.
    Used,
    /// The last two by turns.
    Both,
}

impl AccessPhase {
    /// As the worker knows it.
    pub(crate) fn worker(self) -> Phase {
        match self {
            Self::Hot => Phase::Hot,
            Self::Fresh => Phase::Fresh,
            Self::Used => Phase::Used,
            Self::Both => Phase::Both,
        }
    }

    /// As shown.
    pub(crate) fn label(self) -> &'static str {
        self.worker().label()
    }
}

/// The hosts and the measurements.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SplitPart {
    /// Most memory of the guest at the main host, in MiB.
    pub(crate) resident_mib: u64,
    /// Memory servers, each with a link of its own to the source and to the main host.
    #[serde(default = "SplitPart::servers")]
    pub(crate) servers: usize,
    /// Capacity of each, in MiB.
    pub(crate) capacity_mib: u64,
    /// What the worker does after the guest's arrival, one after the other.
    #[serde(default)]
    pub(crate) phases: Vec<AccessPhase>,
    /// Seconds of each phase that are measured.
    #[serde(default = "SplitPart::phase_s")]
    pub(crate) phase_s: u64,
    /// Seconds of each phase before that.
    #[serde(default = "SplitPart::warm_up_s")]
    pub(crate) warm_up_s: u64,
    /// The mode by whose total time the speed-up of the first mode that splits is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) baseline: Option<String>,
}

fn has_mode(modes: &Modes, name: &str) -> bool {
    modes.plans().iter().any(|plan| plan.name == name)
}

impl SplitPart {
    fn servers() -> usize {
        2
    }

    fn phase_s() -> u64 {
        20
    }

    fn warm_up_s() -> u64 {
        5
    }

    /// In words.
    pub(crate) fn shown(&self) -> String {
        format!(
            "{} MiB at most at the main host, {} memory servers of {} MiB, a link to each of them",
            self.resident_mib, self.servers, self.capacity_mib
        )
    }

    pub(super) fn check(&self, workload: &Workload, modes: &Modes) -> Result<()> {
        ensure!((1..=SplitNet::SERVERS_MAX).contains(&self.servers), "servers: 1 to 4");
        ensure!((16..=65_536).contains(&self.resident_mib), "resident_mib: 16 to 65536");
        ensure!((16..=65_536).contains(&self.capacity_mib), "capacity_mib: 16 to 65536");
        ensure!((1..=600).contains(&self.phase_s), "phase_s: 1 to 600 seconds");
        ensure!(self.warm_up_s <= 600, "warm_up_s: at most 600 seconds");
        for phase in &self.phases {
            let label = phase.label();
            ensure!(
                workload.has_phase(*phase),
                "phases: {label} needs a worker with memory for it; see hot_mib, fresh_mib, fill_mib"
            );
        }
        if let Some(name) = &self.baseline {
            ensure!(has_mode(modes, name), "baseline: no mode is {name:?}");
        }
        Ok(())
    }

    /// With only some of the modes: there may be no baseline among them.
    pub(super) fn keep(&mut self, modes: &Modes) {
        self.baseline.take_if(|name| !has_mode(modes, name));
    }
}
