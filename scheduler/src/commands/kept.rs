//! What is kept of a run: a line of JSON, so that a long comparison can go on where it was interrupted.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use scheduler::simulate::Outcome;
use serde::{Deserialize, Serialize};

use super::timed::Timing;

/// A run without its single decisions.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// Which text the scenario had ([`fingerprint`]).
    pub(super) scenario: String,
    pub(super) policy: String,
    pub(super) seed: u64,
    pub(super) overload_s: f64,
    pub(super) cpu_s: f64,
    pub(super) memory_s: f64,
    pub(super) network_s: f64,
    pub(super) disk_s: f64,
    pub(super) moves: usize,
    pub(super) wire_mib: f64,
    pub(super) downtime_ms: f64,
    pub(super) ping_pongs: usize,
    pub(super) resizes: usize,
    pub(super) refused: usize,
    pub(super) response_mean_ms: f64,
    pub(super) response_p95_ms: f64,
    /// What its decisions took on the machine that made them, if that was measured.
    #[serde(default)]
    pub(super) decide: Timing,
    /// Overloaded hosts over time, of the first seed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) overloaded_hosts: Vec<f64>,
}

impl Kept {
    /// Of a run; of the first one with its course over time.
    pub(super) fn of(scenario: &str, outcome: &Outcome, decide: Timing, is_first: bool) -> Self {
        Self {
            scenario: scenario.to_owned(),
            policy: outcome.policy.clone(),
            seed: outcome.seed,
            overload_s: outcome.overload_s,
            cpu_s: outcome.overload.cpu_s,
            memory_s: outcome.overload.memory_s,
            network_s: outcome.overload.network_s,
            disk_s: outcome.overload.disk_s,
            moves: outcome.moves.len(),
            wire_mib: outcome.wire_mib,
            downtime_ms: outcome.downtime_ms,
            ping_pongs: outcome.ping_pongs,
            resizes: outcome.resizes.len(),
            refused: outcome.refused.len(),
            response_mean_ms: outcome.response_mean_ms,
            response_p95_ms: outcome.response_p95_ms,
            decide,
            overloaded_hosts: if is_first { outcome.overloaded_hosts.clone() } else { vec![] },
        }
    }
}

/// FNV-1a of a scenario's text: runs of another text are others.
pub(super) fn fingerprint(text: &str) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// Runs in a file, by policy and seed, and the file to add others to.
#[derive(Debug, Default)]
pub(super) struct Store {
    known: HashMap<(String, u64), Kept>,
    file: Option<File>,
}

impl Store {
    /// Opens or makes a file; without a path, nothing is kept.
    pub(super) fn open(path: Option<&Path>, scenario: &str) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = if path.exists() {
            std::fs::read_to_string(path)
                .with_context(|| format!("Cannot read {}", path.display()))?
        } else {
            String::new()
        };
        let mut known = HashMap::new();
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let run: Kept = serde_json::from_str(line).with_context(|| {
                format!("Line {} of {} is no run: delete it", at + 1, path.display())
            })?;
            if run.scenario == scenario {
                known.insert((run.policy.clone(), run.seed), run);
            }
        }
        let file = File::options().create(true).append(true).open(path);
        let file = file.with_context(|| format!("Cannot write {}", path.display()))?;
        Ok(Self { known, file: Some(file) })
    }

    /// A run that is known.
    pub(super) fn find(&self, policy: &str, seed: u64) -> Option<&Kept> {
        self.known.get(&(policy.to_owned(), seed))
    }

    /// Keeps a run.
    pub(super) fn add(&mut self, run: &Kept) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let line = serde_json::to_string(run).context("Cannot write JSON")?;
        writeln!(file, "{line}").context("Cannot write a run")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_the_same_text_are_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let text = fingerprint("a");
        assert_eq!(text, "af63dc4c8601ec8c");
        let mut store = Store::open(Some(&path), &text).unwrap();
        let (policy, scenario) = ("idc".to_owned(), text.clone());
        let run = Kept { policy, scenario, seed: 3, overload_s: 0.1, ..Kept::default() };
        store.add(&run).unwrap();
        let again = Store::open(Some(&path), &text).unwrap();
        assert_eq!(again.find("idc", 3), Some(&run));
        assert_eq!(again.find("idc", 4), None);
        let other = Store::open(Some(&path), &fingerprint("b")).unwrap();
        assert_eq!(other.find("idc", 3), None);
        std::fs::write(&path, "{\n").unwrap();
        let wrong = Store::open(Some(&path), &text).unwrap_err().to_string();
        assert!(wrong.starts_with("Line 1 of "), "{wrong}");
    }
}
