//! What a scenario expects: a quantity of a mode, or its ratio to that of another, and a bound.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::ModePlan;

/// Name in `against` that stands for that of QEMU's modes which is hardest to beat.
pub(crate) const BEST_OF_QEMU: &str = "best-of-qemu";

/// What is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Quantity {
    /// From the last heartbeat at the source to the first at the destination, in milliseconds.
    OutageMs,
    /// What gaps were longer than 20 ms, in milliseconds.
    StalledMs,
    /// Until the command's end, in milliseconds.
    TotalMs,
    /// Until the first heartbeat at the destination, in milliseconds.
    ArrivalMs,
    /// Bytes on the link, both ways.
    WireBytes,
    /// Bytes on the link by the compulsory ones.
    WirePerCompulsory,
    /// From a page fault's reading until its page is in place, in microseconds: the median of a
    /// migration's faults by Godwit's report; of a split guest, of those until the end of its work.
    FaultMedianUs,
    /// The same: what 99 % of the faults stay below.
    FaultP99Us,
    /// The most memory that `migrate send` had resident, in MiB.
    SendMemoryMib,
    /// The most memory that `migrate receive` had resident, in MiB.
    ReceiveMemoryMib,
    /// Processor seconds of both engines and both QEMUs for 10^9 bytes on the link.
    CpuSPerGb,
    /// MiB a second that the source's QEMU sent: its own account of bytes by the time until the command's end.
    QemuMibPerS,
    /// Bytes that the engine sent to memory servers.
    ToServersBytes,
    /// MiB a second of the worker on its hot area, after the guest's arrival.
    HotMibPerS,
    /// The same on memory that it allocates and frees.
    FreshMibPerS,
    /// The same on memory that was filled before.
    UsedMibPerS,
    /// The same on the last two by turns.
    BothMibPerS,
    /// Share of the runs that completed.
    Completed,
}

impl Quantity {
    /// In words, and its unit, which a ratio has not.
    fn words(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::OutageMs => ("outage", Some("ms")),
            Self::StalledMs => ("stalled", Some("ms")),
            Self::TotalMs => ("total time", Some("ms")),
            Self::ArrivalMs => ("time to arrival", Some("ms")),
            Self::WireBytes => ("wire bytes", None),
            Self::WirePerCompulsory => ("wire / compulsory bytes", None),
            Self::FaultMedianUs => ("faults to wake, median of a run", Some("us")),
            Self::FaultP99Us => ("faults to wake, 99 % of a run", Some("us")),
            Self::SendMemoryMib => ("memory of `migrate send`", Some("MiB")),
            Self::ReceiveMemoryMib => ("memory of `migrate receive`", Some("MiB")),
            Self::CpuSPerGb => ("processor seconds", Some("s/GB")),
            Self::QemuMibPerS => ("throughput of QEMU's stream", Some("MiB/s")),
            Self::ToServersBytes => ("bytes to memory servers", None),
            Self::HotMibPerS => ("work on its hot memory", Some("MiB/s")),
            Self::FreshMibPerS => ("work on fresh memory", Some("MiB/s")),
            Self::UsedMibPerS => ("work on used memory", Some("MiB/s")),
            Self::BothMibPerS => ("work on fresh and used memory by turns", Some("MiB/s")),
            Self::Completed => ("share of runs that completed", None),
        }
    }
}

/// Which of the runs counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Among {
    /// The middle one.
    #[default]
    Median,
    /// The worst one.
    Worst,
}

/// A target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TargetPart {
    /// What is judged.
    pub(crate) what: Quantity,
    /// Of which mode; without it the first setting of Godwit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<String>,
    /// The mode whose value it is divided by, pair by pair: a name, or [`BEST_OF_QEMU`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) against: Option<String>,
    /// Which run counts.
    #[serde(default)]
    pub(crate) among: Among,
    /// Largest value that is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) at_most: Option<f64>,
    /// Smallest value that is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) at_least: Option<f64>,
    /// Whether there is no bound: what is found is shown, and not judged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_reported: bool,
}

impl TargetPart {
    /// In words, without the bound.
    pub(crate) fn shown(&self) -> String {
        let (what, unit) = self.what.words();
        let what = match (&self.against, unit) {
            (None, None) => what.to_owned(),
            (None, Some(unit)) => format!("{what}, {unit}"),
            (Some(other), _) if other == BEST_OF_QEMU => {
                format!("{what} / that of the best of QEMU's modes")
            }
            (Some(other), _) => format!("{what} / {other}'s"),
        };
        let what = match &self.mode {
            None => what,
            Some(mode) => format!("{mode}: {what}"),
        };
        match (self.what, self.among) {
            (Quantity::Completed, _) => what,
            (_, Among::Median) => format!("{what}, median"),
            (_, Among::Worst) => format!("{what}, worst"),
        }
    }

    /// The bound in words.
    pub(crate) fn bound(&self) -> String {
        if self.is_reported {
            return "none".to_owned();
        }
        let part = |sign: &str, value: Option<f64>| value.map(|value| format!("{sign} {value}"));
        let parts = [part(">=", self.at_least), part("<=", self.at_most)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// Whether a value is within the bound, if there is one.
    pub(crate) fn is_met_by(&self, value: f64) -> Option<bool> {
        let is_met = self.at_most.is_none_or(|bound| value <= bound)
            && self.at_least.is_none_or(|bound| value >= bound);
        (!self.is_reported).then_some(is_met)
    }

    /// Name of the mode that is judged.
    pub(crate) fn mode<'a>(&'a self, plans: &'a [ModePlan]) -> Option<&'a str> {
        let first = || plans.iter().find(|plan| plan.by.is_ours());
        self.mode.as_deref().or_else(|| first().map(|plan| plan.name.as_str()))
    }

    pub(super) fn check(&self, plans: &[ModePlan]) -> Result<()> {
        ensure!(
            self.is_reported != (self.at_most.is_some() || self.at_least.is_some()),
            "A target needs at_most or at_least, or is_reported = true, which has neither"
        );
        let Some(mode) = self.mode(plans) else { bail!("There is no setting of Godwit to judge") };
        let known = |name: &str| plans.iter().any(|plan| plan.name == name);
        ensure!(known(mode), "No mode is called {mode:?}");
        let Some(other) = self.against.as_deref() else { return Ok(()) };
        ensure!(self.what != Quantity::Completed, "A share of runs is not compared");
        let there = match other {
            BEST_OF_QEMU => plans.iter().any(|plan| !plan.by.is_ours()),
            name => known(name),
        };
        ensure!(there, "No mode is called {other:?}");
        ensure!(other != mode, "{mode:?} is compared with itself");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::Mode;

    fn read(text: &str) -> TargetPart {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn words_and_bounds() {
        let outage = read("what = \"outage-ms\"\nat_most = 60");
        assert_eq!(
            (outage.shown().as_str(), outage.bound().as_str()),
            ("outage, ms, median", "<= 60")
        );
        assert_eq!([60.0, 60.1].map(|ms| outage.is_met_by(ms)), [Some(true), Some(false)]);
        let ratio = read("what = \"total-ms\"\nagainst = \"best-of-qemu\"\nat_most = 0.6");
        assert_eq!(ratio.shown(), "total time / that of the best of QEMU's modes, median");
        let all = read("what = \"completed\"\nmode = \"base\"\nat_least = 1");
        assert_eq!([1.0, 0.5].map(|share| all.is_met_by(share)), [Some(true), Some(false)]);
        assert!(all.shown().starts_with("base: "));
        let cost = read("what = \"cpu-s-per-gb\"\nis_reported = true");
        assert_eq!(
            (cost.shown().as_str(), cost.bound().as_str()),
            ("processor seconds, s/GB, median", "none")
        );
        assert_eq!(cost.is_met_by(1.0), None);
    }

    #[test]
    fn modes_must_exist() {
        let base = ModePlan { name: "base".into(), ..ModePlan::of(Mode::Godwit) };
        let plans = [ModePlan::of(Mode::Godwit), base];
        let check = |text: &str| read(text).check(&plans);
        assert!(check("what = \"outage-ms\"\nat_most = 60").is_ok());
        assert!(check("what = \"outage-ms\"").is_err());
        assert!(check("what = \"outage-ms\"\nat_most = 1\nmode = \"x\"").is_err());
        assert!(check("what = \"outage-ms\"\nat_most = 1\nagainst = \"best-of-qemu\"").is_err());
        assert!(check("what = \"completed\"\nat_least = 1\nagainst = \"godwit\"").is_err());
        let by_base = "what = \"total-ms\"\nat_most = 1\nagainst = \"base\"";
        assert!(check(by_base).is_ok(), "a setting of Godwit");
        assert!(check(&format!("{by_base}\nmode = \"base\"")).is_err(), "with itself");
        let reported = "what = \"cpu-s-per-gb\"\nis_reported = true";
        assert!(check(reported).is_ok());
        assert!(check(&format!("{reported}\nat_most = 1")).is_err(), "it has no bound");
    }
}
