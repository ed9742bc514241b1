//! What is too much, and when it is believed.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::Amounts;
use crate::series::ar1::Fit;
use crate::series::cusum::Tuning;

/// Which detectors judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// k of n figures above a threshold, and the next one expected there (Sandpiper).
    #[default]
    Threshold,
    /// A level that has risen and is too high (DRS thesis).
    Cusum,
    /// Either.
    Both,
}

impl Kind {
    pub(super) const fn has_threshold(self) -> bool {
        matches!(self, Self::Threshold | Self::Both)
    }

    pub(super) const fn has_cusum(self) -> bool {
        matches!(self, Self::Cusum | Self::Both)
    }
}

/// Settings of the detectors, for a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// Which detectors judge.
    pub kind: Kind,
    /// So many of the last `n` figures must be above the threshold.
    pub k: usize,
    /// How many figures are looked at.
    pub n: usize,
    /// How many figures the prediction is made from, at least `n`.
    pub window: usize,
    /// How the prediction is made.
    pub prediction: Fit,
    /// Figures with a longer silence than this between them are not put together, seconds.
    pub gap_s: f64,
    /// What must not be exceeded.
    pub threshold: Thresholds,
    /// What a change of level is.
    pub cusum: CusumSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kind: Kind::Threshold,
            k: 3,
            n: 5,
            window: 10,
            prediction: Fit::Regression,
            gap_s: 60.0,
            threshold: Thresholds::default(),
            cusum: CusumSettings::default(),
        }
    }
}

/// What must not be exceeded. A share of 1 of what cannot be more than 1 (CPU, steal) is never exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Thresholds {
    /// Share of a host's processors.
    pub cpu: f64,
    /// Share of a host's memory that guests may use.
    pub memory: f64,
    /// Share of a host's network interface.
    pub network: f64,
    /// Share of what a host's disks can do.
    pub disk: f64,
    /// Pages that a guest writes to its swap, a second.
    pub swap_writes_per_s: f64,
    /// Share of the time in which a guest wants to run and has to wait.
    pub steal: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            cpu: 0.85,
            memory: 0.95,
            network: 0.80,
            disk: 0.90,
            swap_writes_per_s: 150.0,
            steal: 0.10,
        }
    }
}

impl Thresholds {
    /// Those that are shares of what a host has.
    #[must_use]
    pub const fn shares(&self) -> Amounts {
        Amounts {
            cpu_cores: self.cpu,
            memory_mib: self.memory,
            network_mbit: self.network,
            disk_mib: self.disk,
        }
    }
}

/// What a change of level is, and how high a level may be.
///
/// Of memory the thesis' text says 0.8 of all, its configuration 0.9: the text's is taken. Network and disk are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CusumSettings {
    /// Weight of a figure in the mean.
    pub alpha: f64,
    /// What a figure may be off without counting, as a share: half of the shift that is to be seen.
    pub slack: f64,
    /// How many standard deviations the sum of what figures are off must exceed.
    pub sigmas: f64,
    /// The standard deviation is taken to be at least this share.
    pub sigma_min: f64,
    /// A level that stays too high for so many figures is one even if no change to it was seen.
    pub settled: usize,
    /// Share of a host's memory.
    pub memory: f64,
    /// Share of a host's network interface.
    pub network: f64,
    /// Share of what a host's disks can do.
    pub disk: f64,
    /// Share of the time in which a guest wants to run and has to wait.
    pub steal: f64,
}

impl Default for CusumSettings {
    fn default() -> Self {
        Self {
            alpha: 0.1,
            slack: 0.005,
            sigmas: 7.0,
            sigma_min: 0.01,
            settled: 14,
            memory: 0.80,
            network: 0.80,
            disk: 0.90,
            steal: 0.10,
        }
    }
}

impl CusumSettings {
    pub(super) const fn tuning(&self) -> Tuning {
        Tuning {
            alpha: self.alpha,
            slack: self.slack,
            sigmas: self.sigmas,
            sigma_min: self.sigma_min,
        }
    }
}

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("`{key} = {value}` cannot be: {remedy}")]
pub struct SettingsError {
    /// Its name, with that of its table.
    pub key: &'static str,
    /// What it is set to.
    pub value: f64,
    /// What to do.
    pub remedy: &'static str,
}

impl Settings {
    /// Checks that every setting makes sense.
    ///
    /// # Errors
    /// The first that does not, with its key and what to do.
    pub fn check(&self) -> Result<(), SettingsError> {
        let (threshold, cusum) = (&self.threshold, &self.cusum);
        let count = |key, value: usize, least: usize, remedy| {
            above(key, value as f64, least as f64, 1000.0, remedy)
        };
        count("k", self.k, 1, "take a number from 1 to `n`")?;
        count("n", self.n, self.k, "take a number from `k` to 1000")?;
        count("window", self.window, self.n, "take a number from `n` to 1000")?;
        count("cusum.settled", cusum.settled, 1, "take a number from 1 to 1000")?;
        above("gap-s", self.gap_s, 1.0, 86_400.0, "take some report intervals, in seconds")?;
        let positive = f64::MIN_POSITIVE;
        for (key, value) in [
            ("threshold.cpu", threshold.cpu),
            ("threshold.network", threshold.network),
            ("threshold.disk", threshold.disk),
            ("threshold.steal", threshold.steal),
            ("cusum.network", cusum.network),
            ("cusum.disk", cusum.disk),
            ("cusum.steal", cusum.steal),
            ("cusum.alpha", cusum.alpha),
        ] {
            above(key, value, positive, 1.0, "take a share above 0, at most 1 (85 % is 0.85)")?;
        }
        let overcommit =
            "take a share above 0, at most 10 (95 % is 0.95; above 1 is overcommitted)";
        above("threshold.memory", threshold.memory, positive, 10.0, overcommit)?;
        above("cusum.memory", cusum.memory, positive, 10.0, overcommit)?;
        let pages = "take pages a second, above 0";
        above("threshold.swap-writes-per-s", threshold.swap_writes_per_s, positive, 1e9, pages)?;
        let small = "take a share of less than 0.5 (half a percent is 0.005)";
        above("cusum.slack", cusum.slack, 0.0, 0.5, small)?;
        above("cusum.sigma-min", cusum.sigma_min, 0.0, 0.5, small)?;
        above("cusum.sigmas", cusum.sigmas, 0.1, 100.0, "take a number from 0.1 to 100 (paper: 7)")
    }
}

fn above(
    key: &'static str,
    value: f64,
    least: f64,
    most: f64,
    remedy: &'static str,
) -> Result<(), SettingsError> {
    if (least..=most).contains(&value) { Ok(()) } else { Err(SettingsError { key, value, remedy }) }
}
