//! A split guest by its commands: `migrate status` and `migrate merge` at the main host, and the
//! arguments that `migrate split` has beside those of `migrate send`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::engine::{Engine, EngineOutput};
use crate::memory_server::MemoryServer;
use crate::vm::Vm;
use crate::wait;

/// Longest time for an answer of the pager.
const ANSWER: Duration = Duration::from_secs(60);

/// Version of the status that is understood.
const VERSION: u32 = 1;

/// Where a split guest stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SplitState {
    /// Part of its memory lies on servers.
    Split,
    /// All of it is being brought to the main host.
    Merging,
    /// All of it is there.
    Merged,
    /// It is about to leave for another main host.
    Leaving,
    /// Memory was lost with a server: the guest cannot go on.
    Lost,
}

/// What a server holds of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RemotePages {
    /// Its address.
    pub server: String,
    /// Pages there.
    pub pages: u64,
    /// How it does, as the pager calls it.
    #[serde(default)]
    pub state: String,
}

/// Faults of the guest on pages that were not at the main host.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Faults {
    /// All.
    pub count: u64,
    /// Of them, on pages that nobody had written: zeros.
    pub zero: u64,
    /// Of them, served by a server.
    pub fetched: u64,
    /// From a fault's reading until its page is in place, median, in microseconds.
    pub p50_us: u64,
    /// What 99 % of them stay below.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// Pages that came before the guest asked for them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ReadAhead {
    /// All.
    pub pages: u64,
    /// Of them, used by the guest.
    pub used: u64,
}

/// Pages that left the main host.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Evicted {
    /// All.
    pub pages: u64,
    /// Of them, not sent, since a server still had their content.
    pub clean: u64,
    /// Begun, and given up since the guest wrote to the page.
    pub cancelled: u64,
}

/// What `migrate status --json` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    v: u32,
    /// Where the guest stands.
    pub state: SplitState,
    /// Most pages at the main host.
    pub resident_limit_pages: u64,
    /// Pages there.
    pub resident_pages: u64,
    /// Pages elsewhere, by server.
    pub remote_pages: Vec<RemotePages>,
    /// Pages that are on fewer servers than asked for.
    pub under_copied_pages: u64,
    /// Faults.
    pub faults: Faults,
    /// Read ahead.
    pub read_ahead: ReadAhead,
    /// Evicted.
    pub evicted: Evicted,
    /// Pages that were dropped since the guest had freed them.
    pub reclaimed_pages: u64,
}

impl Status {
    fn of(output: EngineOutput) -> Result<Self> {
        let output = output.success()?;
        let json = output.json()?.clone();
        let status: Self =
            serde_json::from_value(json).with_context(|| format!("Status: {}", output.stdout))?;
        ensure!(status.v == VERSION, "A status of version {}", status.v);
        Ok(status)
    }

    /// Pages on all servers together.
    #[must_use]
    pub fn remote(&self) -> u64 {
        self.remote_pages.iter().map(|one| one.pages).sum()
    }
}

/// The pager of a split guest, at the main host.
#[derive(Debug)]
pub struct Pager<'a> {
    program: &'a Path,
    qmp: PathBuf,
    journal: String,
}

impl<'a> Pager<'a> {
    /// That of `vm`, whose `migrate receive` has its journal in `journal`: the pager is found by it.
    #[must_use]
    pub fn of(program: &'a Path, vm: &Vm, journal: String) -> Self {
        Self { program, qmp: vm.qmp_engine(), journal }
    }

    fn run(&self, command: &str, timeout: Duration) -> Result<EngineOutput> {
        let qmp = self.qmp.display().to_string();
        let words = [command, "--json", "--qmp", &qmp, "--journal", &self.journal];
        Engine::run(self.program, &words, None, timeout)
    }

    /// Runs `migrate status`.
    ///
    /// # Errors
    /// The guest is not split, or the pager does not answer.
    pub fn status(&self) -> Result<Status> {
        Status::of(self.run("status", ANSWER)?)
    }

    /// Waits until the status is as `is_met` wants it.
    ///
    /// # Errors
    /// As [`Self::status`], or it is not within `timeout`; the last one is in the error.
    pub fn wait_status(
        &self,
        what: &str,
        timeout: Duration,
        is_met: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let mut last = None;
        let met = wait::until(what, timeout, || {
            // A command each time: not as often as other things are looked at.
            std::thread::sleep(Duration::from_millis(200));
            let status = last.insert(self.status()?);
            Ok(is_met(status).then(|| status.clone()))
        });
        met.with_context(|| format!("{last:?}"))
    }

    /// Runs `migrate move-fragment`.
    ///
    /// # Errors
    /// It was not over within `timeout`; how it ended is in the answer.
    pub fn move_fragment(
        &self,
        from: &str,
        to: Option<&str>,
        timeout: Duration,
    ) -> Result<EngineOutput> {
        let qmp = self.qmp.display().to_string();
        let mut words = vec!["move-fragment", "--json", "--qmp", &qmp, "--journal", &self.journal];
        words.extend(["--from", from]);
        words.extend(to.into_iter().flat_map(|to| ["--to", to]));
        Engine::run(self.program, &words, None, timeout)
    }

    /// Runs `migrate merge --to`.
    ///
    /// # Errors
    /// It was not over within `timeout`; how it ended is in the answer.
    pub fn merge_to(&self, to: &str, timeout: Duration) -> Result<EngineOutput> {
        let qmp = self.qmp.display().to_string();
        let words = ["merge", "--json", "--qmp", &qmp, "--journal", &self.journal, "--to", to];
        Engine::run(self.program, &words, None, timeout)
    }

    /// Runs `migrate merge` to its end.
    ///
    /// # Errors
    /// It failed, or was not over within `timeout`.
    pub fn merge(&self, timeout: Duration) -> Result<EngineOutput> {
        self.run("merge", timeout)?.success()
    }
}

/// Arguments of `migrate split` for these servers and a limit of the main host's memory.
#[must_use]
pub fn arguments(servers: &[MemoryServer], resident_mib: Option<u64>) -> Vec<String> {
    let resident = resident_mib.map(|mib| ["--resident".to_owned(), format!("{mib}M")]);
    let servers = servers.iter().map(|one| ["--memory".to_owned(), one.address().to_owned()]);
    servers.chain(resident).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = r#"{"v":1,"vm":"x","state":"split","resident_limit_pages":10,
        "resident_pages":9,"remote_pages":[{"server":"a:1","pages":5,"bytes":9,"state":"up"},
        {"server":"b:1","pages":6,"bytes":9,"state":"up"}],"under_copied_pages":0,"faults":{"count":3,"zero":1,
        "fetched":2,"p50_us":70,"p99_us":90,"max_us":99},"read_ahead":{"pages":4,"used":3},
        "evicted":{"pages":8,"clean":2,"cancelled":1},"reclaimed_pages":7,
        "bytes":{"sent":1,"received":2}}"#;

    fn output(text: &str) -> EngineOutput {
        EngineOutput {
            code: Some(0),
            json: serde_json::from_str(text).ok(),
            stdout: text.to_owned(),
            stderr: String::new(),
            cpu_seconds: None,
            peak_bytes: None,
        }
    }

    #[test]
    fn a_status_is_read() {
        let status = Status::of(output(STATUS)).unwrap();
        assert_eq!((status.state, status.remote()), (SplitState::Split, 11));
        assert_eq!((status.faults.fetched, status.evicted.clean), (2, 2));
        let newer = STATUS.replace("\"v\":1", "\"v\":2");
        assert!(Status::of(output(&newer)).unwrap_err().to_string().contains("version 2"));
        let short = STATUS.replace("\"reclaimed_pages\":7,", "");
        assert!(format!("{:#}", Status::of(output(&short)).unwrap_err()).contains("reclaimed"));
    }
}
