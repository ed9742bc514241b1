//! A pair of gateways between the QEMUs of one migration, which [`crate::qemu`] drives.
//!
//! ```text
//!  namespace A                                              namespace B
//!  QEMU ── unix:out ──> migrate gateway source ==== link0 ==== migrate gateway destination ── unix:into ──> QEMU
//! ```
//! Both are started for one guest and are ended when it has passed, so that their processor time is that of
//! its migration.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use framework::{Engine, EngineOutput};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::godwit::{tail, text};
use crate::record::EngineMemory;
use crate::relay::Relay;
use crate::scenario::ModePlan;
use crate::testbed::{Bed, Link};

/// Where the destination's gateway listens; the namespace is ours.
const PORT: u16 = 7800;

/// Longest wait for a gateway to listen, and to end after the guest.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Both gateways, killed on drop.
#[derive(Debug)]
pub(crate) struct Gateways {
    source: Engine,
    destination: Engine,
    folder: TempDir,
}

/// What they did.
#[derive(Debug)]
pub(crate) struct Passed {
    /// CPU seconds of (the source's, the destination's).
    pub(crate) engine_s: (f64, f64),
    /// Memory of both.
    pub(crate) engine_memory: EngineMemory,
    /// The report of the source's gateway, if a guest came.
    pub(crate) report: Value,
    /// What both said at the end, for the text of a failure.
    pub(crate) said: String,
}

impl Gateways {
    /// Starts both, and the relay between them if the link has one.
    ///
    /// # Errors
    /// One does not listen.
    pub(crate) fn start(
        bed: &Bed,
        link: &Link,
        mode: &ModePlan,
        turn: u32,
    ) -> Result<(Self, Option<Relay>)> {
        let folder = tempfile::tempdir().context("Cannot create a folder for sockets")?;
        let socket = |name: &str| format!("unix:{}", text(&folder.path().join(name)));
        let listen = format!("{}:{PORT}", link.address());
        let (identity, qemu) = (text(&bed.destination), socket("into"));
        let words = ["gateway", "destination", "--listen", &listen, "--qemu", &qemu];
        let mut words = [&words[..], &["--identity", &identity]].concat();
        words.extend(mode.receive.iter().map(String::as_str));
        let mut destination = Engine::start(&bed.migrate, &words, Some(link.destination()))?;
        destination.wait_stderr("listening on", TIMEOUT)?;
        let (to, relay) = link.reach(PORT, turn)?;
        let to = to.to_string();
        let (identity, listen) = (text(&bed.source), socket("out"));
        let words = ["gateway", "source", "--json", "--listen", &listen, "--to", &to];
        let mut words = [&words[..], &["--identity", &identity], mode.by.words()].concat();
        words.extend(mode.send.iter().map(String::as_str));
        let mut source = Engine::start(&bed.migrate, &words, Some(link.source()))?;
        source.wait_stderr("listening on", TIMEOUT)?;
        Ok((Self { source, destination, folder }, relay))
    }

    /// Where the source's QEMU sends its guest.
    pub(crate) fn uri_out(&self) -> String {
        format!("unix:{}", text(&self.folder.path().join("out")))
    }

    /// Where the destination's QEMU waits for it.
    pub(crate) fn uri_in(&self) -> String {
        format!("unix:{}", text(&self.folder.path().join("into")))
    }

    /// Lets both finish with the guest and end.
    ///
    /// # Errors
    /// One does not end.
    pub(crate) fn end(mut self) -> Result<Passed> {
        // After this they wait for what is under way.
        self.source.signal(Signal::SIGTERM)?;
        let source = self.source.wait_beside(TIMEOUT, Some(&mut self.destination));
        let source = source.context("The source's gateway does not end")?;
        self.destination.signal(Signal::SIGTERM)?;
        let destination =
            self.destination.wait(TIMEOUT).context("The destination's gateway does not end")?;
        Ok(Passed::of(source, &destination))
    }
}

impl Passed {
    fn of(source: EngineOutput, destination: &EngineOutput) -> Self {
        let seconds = |of: &EngineOutput| of.cpu_seconds.unwrap_or_default();
        Self {
            engine_s: (seconds(&source), seconds(destination)),
            engine_memory: EngineMemory {
                source_bytes: source.peak_bytes,
                destination_bytes: destination.peak_bytes,
            },
            said: format!(
                "source's gateway: {}\ndestination's gateway: {}",
                tail(&source.stderr),
                tail(&destination.stderr)
            ),
            report: source.json.unwrap_or(Value::Null),
        }
    }

    /// Whether the guest passed by their account.
    ///
    /// # Errors
    /// It did not; the text has what they said.
    pub(crate) fn check(&self) -> Result<()> {
        let outcome = self.report["outcome"].as_str().unwrap_or("nothing");
        ensure!(outcome == "completed", "the source's gateway reports {outcome}\n{}", self.said);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ended(stdout: Option<Value>, stderr: &str) -> EngineOutput {
        EngineOutput {
            code: Some(0),
            json: stdout,
            stdout: String::new(),
            stderr: stderr.to_owned(),
            cpu_seconds: Some(1.5),
            peak_bytes: Some(7),
        }
    }

    #[test]
    fn a_guest_has_passed_when_the_report_says_so() {
        let passed = |report| Passed::of(ended(report, "listening on x"), &ended(None, "away"));
        let right = passed(Some(json!({ "outcome": "completed" })));
        assert!(right.check().is_ok());
        assert_eq!((right.engine_s, right.engine_memory.source_bytes), ((1.5, 1.5), Some(7)));
        let error = passed(Some(json!({ "outcome": "failed" }))).check().unwrap_err().to_string();
        assert!(error.contains("reports failed") && error.contains("away"), "{error}");
        assert!(passed(None).check().unwrap_err().to_string().contains("reports nothing"));
    }
}
