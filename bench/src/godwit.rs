//! Drives a migration by `migrate send` or `migrate split`, and `migrate receive`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use framework::wait::monotonic_us;
use framework::{Engine, EngineOutput, MemoryServer};
use serde_json::{Value, json};

use crate::driver::{DriveOptions, Driven};
use crate::record::{Dirty, EngineMemory, Outcome};
use crate::scenario::{ModePlan, SplitPart};
use crate::split::{Paged, start_servers};
use crate::testbed::{Bed, Guests, Link};

/// Where `migrate receive` listens; the namespace is ours.
const PORT: u16 = 7700;

/// Longest wait for the receiver to listen, and to end after the sender.
const RECEIVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a page, by which reports count.
const PAGE_BYTES: f64 = 4096.0;

/// Lines of stderr that a record of a failure keeps.
const STDERR_LINES: usize = 12;

/// A path as an argument.
pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The end of what an engine said.
pub(crate) fn tail(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().collect();
    lines.get(lines.len().saturating_sub(STDERR_LINES)..).unwrap_or_default().join("\n")
}

/// What a mode types, beside what all have in common, and the memory servers that it needs.
fn command(
    bed: &Bed,
    link: &Link,
    mode: &ModePlan,
    part: Option<&SplitPart>,
) -> Result<(Vec<String>, Vec<MemoryServer>)> {
    let words = |command: &str| [command, "--keep-source"].map(str::to_owned);
    if !mode.splits {
        let own = mode.by.words().iter().copied().map(str::to_owned);
        return Ok((words("send").into_iter().chain(own).collect(), vec![]));
    }
    let part = part.context("A mode splits without hosts for it")?;
    let servers = start_servers(bed, link, part)?;
    let own = framework::split::arguments(&servers, Some(part.resident_mib));
    Ok((words("split").into_iter().chain(own).collect(), servers))
}

/// Runs one migration. The source's QEMU is left paused, as QEMU's own migration leaves it, so that
/// its CPU time can be read.
///
/// # Errors
/// The commands cannot be started.
pub(crate) fn migrate(
    bed: &Bed,
    link: &Link,
    guests: &mut Guests,
    mode: &ModePlan,
    turn: u32,
    options: &DriveOptions,
) -> Result<Driven> {
    let (own, servers) = command(bed, link, mode, options.split.as_ref())?;
    let address = format!("{}:{PORT}", link.address());
    let (qmp, identity) = (text(&guests.destination.qmp_engine()), text(&bed.destination));
    let journal = bed.journal("destination");
    let words = ["receive", "--once", "--listen", &address, "--qmp", &qmp];
    let mut words = [&words[..], &["--identity", &identity, "--journal", &journal]].concat();
    words.extend(mode.receive.iter().map(String::as_str));
    let mut receive = Engine::start(&bed.migrate, &words, Some(link.destination()))?;
    receive.wait_stderr("listening on", RECEIVER_TIMEOUT)?;
    let (address, relay) = link.reach(PORT, turn)?;
    let address = address.to_string();

    let (qmp, identity) = (text(&guests.source.qmp_engine()), text(&bed.source));
    let journal = bed.journal("source");
    let mut words: Vec<&str> = own.iter().map(String::as_str).collect();
    words.extend(["--json", "--to", &address, "--qmp", &qmp]);
    words.extend(["--identity", &identity, "--journal", &journal]);
    words.extend(mode.send.iter().chain(&options.send_args).map(String::as_str));
    let from_us = monotonic_us();
    let send = Engine::start(&bed.migrate, &words, Some(link.source()))?;
    let sent = send.wait_beside(options.limit, Some(&mut receive));
    let to_us = monotonic_us();
    let mut driven = Driven {
        from_us,
        to_us,
        engine_s: (0.0, 0.0),
        engine_memory: EngineMemory::default(),
        outcome: Ok(()),
        reported_ms: (None, None),
        dirty: vec![],
        relay,
        paged: None,
        report: Value::Null,
    };
    let sent = match sent {
        Ok(sent) => sent,
        Err(error) => {
            // The limit has passed, and the sender was killed.
            driven.outcome = Err((Outcome::NotConverged, format!("{error:#}")));
            return Ok(driven);
        }
    };
    let (received_s, destination_bytes) = receive.used();
    driven.engine_s = (sent.cpu_seconds.unwrap_or_default(), received_s.unwrap_or_default());
    driven.engine_memory = EngineMemory { source_bytes: sent.peak_bytes, destination_bytes };
    if mode.splits && sent.code == Some(0) && receive.running()? {
        driven.paged = Some(Paged { receive, servers });
        driven.take_report(&sent);
        return Ok(driven);
    }
    let received = if sent.code == Some(0) {
        receive.wait(RECEIVER_TIMEOUT).context("`migrate receive` does not end")?
    } else {
        receive.kill()?
    };
    driven.engine_s.1 = received.cpu_seconds.unwrap_or_default();
    driven.engine_memory.destination_bytes = received.peak_bytes;
    driven.take_report(&sent);
    driven.outcome = outcome(&sent, &received);
    if mode.splits && driven.outcome.is_ok() {
        let why = format!("The pager ended with the split: {}", tail(&received.stderr));
        driven.outcome = Err((Outcome::Failed, why));
    }
    Ok(driven)
}

impl Driven {
    /// Keeps what the engine at the source printed.
    fn take_report(&mut self, sent: &EngineOutput) {
        self.report = sent.json.clone().unwrap_or(json!(null));
        self.reported_ms = (self.report["downtime_ms"].as_f64(), self.report["total_ms"].as_f64());
        self.dirty = dirty(&self.report);
    }
}

/// The dirty set when each round began. Rounds follow each other and are over when the guest is
/// stopped: what was before the first is what the total has beside them. Rounds after the stop have
/// no prediction.
fn dirty(report: &Value) -> Vec<Dirty> {
    let rounds: Vec<&Value> = report["rounds"].as_array().into_iter().flatten().collect();
    let running: f64 = rounds
        .iter()
        .filter(|round| !round["predicted"].is_null())
        .filter_map(|round| round["ms"].as_f64())
        .sum();
    let (Some(total), Some(downtime)) =
        (report["total_ms"].as_f64(), report["downtime_ms"].as_f64())
    else {
        return vec![];
    };
    let mut ms = (total - downtime - running).max(0.0);
    let mut all = vec![];
    for round in rounds {
        let Some(pages) = round["dirty"].as_f64() else { continue };
        all.push(Dirty { ms, bytes: (pages * PAGE_BYTES) as u64 });
        ms += round["ms"].as_f64().unwrap_or(0.0);
    }
    if report["outcome"] == "completed" {
        all.push(Dirty { ms: ms.min(total), bytes: 0 });
    }
    all
}

fn outcome(sent: &EngineOutput, received: &EngineOutput) -> Result<(), (Outcome, String)> {
    if sent.code == Some(0) && received.code == Some(0) {
        return Ok(());
    }
    let message = sent.json.as_ref().and_then(|report| report["error"]["message"].as_str());
    let stalled = message.is_some_and(|text| text.to_lowercase().contains("converg"));
    let outcome = if stalled { Outcome::NotConverged } else { Outcome::Failed };
    let why = format!(
        "`migrate send` ended with {:?}, `receive` with {:?}: {}\nsend: {}\nreceive: {}",
        sent.code,
        received.code,
        message.unwrap_or("no message"),
        tail(&sent.stderr),
        tail(&received.stderr)
    );
    Err((outcome, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_lie_between_the_contact_and_the_stop() {
        let predicted = json!({ "now_ms": 1.0 });
        let report = json!({
            "outcome": "completed", "total_ms": 1000.0, "downtime_ms": 50.0,
            "rounds": [
                { "dirty": 1000, "ms": 700.0, "predicted": predicted },
                { "dirty": 100, "ms": 200.0, "predicted": predicted },
                { "dirty": 10, "ms": 20.0, "predicted": null },
            ],
        });
        let points: Vec<(f64, u64)> =
            dirty(&report).iter().map(|one| (one.ms, one.bytes / 4096)).collect();
        assert_eq!(points, [(50.0, 1000), (750.0, 100), (950.0, 10), (970.0, 0)]);
        assert!(dirty(&Value::Null).is_empty());
    }
}
