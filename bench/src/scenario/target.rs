//! What a scenario expects: a quantity of a mode, or its ratio to that of another, and a bound.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::ModePlan;
use crate::mode::Mode;

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
    /// Share of the runs that completed.
    Completed,
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
}

impl TargetPart {
    /// In words, without the bound.
    pub(crate) fn shown(&self) -> String {
        let what = match self.what {
            Quantity::OutageMs => "outage, ms",
            Quantity::StalledMs => "stalled, ms",
            Quantity::TotalMs => "total time, ms",
            Quantity::ArrivalMs => "time to arrival, ms",
            Quantity::WireBytes => "wire bytes",
            Quantity::WirePerCompulsory => "wire / compulsory bytes",
            Quantity::Completed => "share of runs that completed",
        };
        let what = match &self.against {
            None => what.to_owned(),
            Some(other) if other == BEST_OF_QEMU => {
                format!("{} / that of the best of QEMU's modes", what.trim_end_matches(", ms"))
            }
            Some(other) => format!("{} / {other}'s", what.trim_end_matches(", ms")),
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
        let part = |sign: &str, value: Option<f64>| value.map(|value| format!("{sign} {value}"));
        let parts = [part(">=", self.at_least), part("<=", self.at_most)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// Whether a value is within the bound.
    pub(crate) fn is_met_by(&self, value: f64) -> bool {
        self.at_most.is_none_or(|bound| value <= bound)
            && self.at_least.is_none_or(|bound| value >= bound)
    }

    /// Name of the mode that is judged.
    pub(crate) fn mode<'a>(&'a self, plans: &'a [ModePlan]) -> Option<&'a str> {
        let first = || plans.iter().find(|plan| plan.by == Mode::Godwit);
        self.mode.as_deref().or_else(|| first().map(|plan| plan.name.as_str()))
    }

    pub(super) fn check(&self, plans: &[ModePlan]) -> Result<()> {
        ensure!(
            self.at_most.is_some() || self.at_least.is_some(),
            "A target needs at_most or at_least"
        );
        let Some(mode) = self.mode(plans) else { bail!("There is no setting of Godwit to judge") };
        let known = |name: &str| plans.iter().any(|plan| plan.name == name);
        ensure!(known(mode), "No mode is called {mode:?}");
        let Some(other) = self.against.as_deref() else { return Ok(()) };
        ensure!(self.what != Quantity::Completed, "A share of runs is not compared");
        let there = match other {
            BEST_OF_QEMU => plans.iter().any(|plan| plan.by != Mode::Godwit),
            name => known(name),
        };
        ensure!(there, "No mode is called {other:?}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(outage.is_met_by(60.0) && !outage.is_met_by(60.1));
        let ratio = read("what = \"total-ms\"\nagainst = \"best-of-qemu\"\nat_most = 0.6");
        assert_eq!(ratio.shown(), "total time / that of the best of QEMU's modes, median");
        let all = read("what = \"completed\"\nmode = \"base\"\nat_least = 1");
        assert!(all.is_met_by(1.0) && !all.is_met_by(0.5));
        assert!(all.shown().starts_with("base: "));
    }

    #[test]
    fn modes_must_exist() {
        let plans = [ModePlan::of(Mode::Godwit)];
        let check = |text: &str| read(text).check(&plans);
        assert!(check("what = \"outage-ms\"\nat_most = 60").is_ok());
        assert!(check("what = \"outage-ms\"").is_err());
        assert!(check("what = \"outage-ms\"\nat_most = 1\nmode = \"x\"").is_err());
        assert!(check("what = \"outage-ms\"\nat_most = 1\nagainst = \"best-of-qemu\"").is_err());
        assert!(check("what = \"completed\"\nat_least = 1\nagainst = \"godwit\"").is_err());
    }
}
