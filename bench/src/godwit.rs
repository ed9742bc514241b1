//! Drives a migration by `migrate send` and `migrate receive`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use framework::wait::monotonic_us;
use framework::{Engine, EngineOutput};
use serde_json::{Value, json};

use crate::driver::{DriveOptions, Driven};
use crate::record::Outcome;
use crate::testbed::{Bed, Guests, Link};

/// Where `migrate receive` listens; the namespace is ours.
const PORT: u16 = 7700;

/// Longest wait for the receiver to listen, and to end after the sender.
const RECEIVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Lines of stderr that a record of a failure keeps.
const STDERR_LINES: usize = 12;

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn tail(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().collect();
    lines.get(lines.len().saturating_sub(STDERR_LINES)..).unwrap_or_default().join("\n")
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
    options: &DriveOptions,
) -> Result<Driven> {
    let address = format!("{}:{PORT}", link.address());
    let (qmp, identity) = (text(&guests.destination.qmp_engine()), text(&bed.destination));
    let journal = bed.journal("destination");
    let words = ["receive", "--once", "--listen", &address, "--qmp", &qmp];
    let words = [&words[..], &["--identity", &identity, "--journal", &journal]].concat();
    let mut receive = Engine::start(&bed.migrate, &words, Some(link.destination()))?;
    receive.wait_stderr("listening on", RECEIVER_TIMEOUT)?;

    let (qmp, identity) = (text(&guests.source.qmp_engine()), text(&bed.source));
    let journal = bed.journal("source");
    let mut words = vec!["send", "--json", "--keep-source", "--to", &address, "--qmp", &qmp];
    words.extend(["--identity", &identity, "--journal", &journal]);
    words.extend(options.send_args.iter().map(String::as_str));
    let from_us = monotonic_us();
    let send = Engine::start(&bed.migrate, &words, Some(link.source()))?;
    let sent = send.wait(options.limit);
    let to_us = monotonic_us();
    let mut driven = Driven {
        from_us,
        to_us,
        engine_s: (0.0, 0.0),
        outcome: Ok(()),
        reported_ms: (None, None),
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
    let received = if sent.code == Some(0) {
        receive.wait(RECEIVER_TIMEOUT).context("`migrate receive` does not end")?
    } else {
        receive.kill()?
    };
    driven.engine_s =
        (sent.cpu_seconds.unwrap_or_default(), received.cpu_seconds.unwrap_or_default());
    driven.report = sent.json.clone().unwrap_or(json!(null));
    driven.reported_ms =
        (driven.report["downtime_ms"].as_f64(), driven.report["total_ms"].as_f64());
    driven.outcome = outcome(&sent, &received);
    Ok(driven)
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
