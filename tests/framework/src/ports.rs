//! A guest's three serial ports, as one QEMU shows them.
//!
//! ```text
//! folder/console.log     ttyS0, a file        Console
//! folder/heartbeat.sock  ttyS1, QEMU listens  Heartbeat
//! folder/command.sock    ttyS2, QEMU listens  Guest
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::console::Console;
use crate::guest::{Guest, number};
use crate::heartbeat::Heartbeat;
use crate::wait;

/// Longest wait for an answer: some of it is work for the guest.
const ANSWER: Duration = Duration::from_secs(120);

/// The guest's console, within the folder of its ports.
pub(crate) const CONSOLE: &str = "console.log";
/// The socket of its heartbeat.
pub(crate) const HEARTBEAT: &str = "heartbeat.sock";
/// The socket for commands to it.
pub(crate) const COMMAND: &str = "command.sock";

/// The connected ports. What has arrived stays readable after QEMU's end.
#[derive(Debug)]
pub struct Ports {
    guest: Guest,
    heartbeat: Heartbeat,
    console: Console,
    answers_within: Duration,
}

impl Ports {
    /// Connects to the ports in `folder`, waiting until QEMU listens there.
    pub(crate) fn connect(folder: &Path) -> Result<Self> {
        Ok(Self {
            guest: Guest::connect(&folder.join(COMMAND))?,
            heartbeat: Heartbeat::connect(&folder.join(HEARTBEAT))?,
            console: Console::new(&folder.join(CONSOLE)),
            answers_within: ANSWER,
        })
    }

    /// Sets how long answers are waited for; two minutes if it is not set.
    pub fn set_answers_within(&mut self, answers_within: Duration) {
        self.answers_within = answers_within;
    }

    /// The command channel.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// The heartbeat.
    #[must_use]
    pub fn heartbeat(&self) -> &Heartbeat {
        &self.heartbeat
    }

    /// The console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Waits until all of the guest's programs run and a first beat has arrived; `alive` says why
    /// there is no more use in waiting.
    pub(crate) fn wait_ready(
        &self,
        timeout: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let console = &self.console;
        let ready = wait::until("GUEST READY on the console", timeout, || {
            console.assert_clean()?;
            alive()?;
            let ready = console.text()?.contains("GUEST READY") && self.heartbeat.count() > 0;
            Ok(ready.then_some(()))
        });
        ready.with_context(|| format!("Its console ends with:\n{}", console.tail(15)))
    }

    /// Asks the guest, waiting as long as was set.
    ///
    /// # Errors
    /// As [`Guest::ask`].
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.guest.ask(command, self.answers_within)
    }

    /// Waits until the checker has verified all its memory from now on, and fails if it found
    /// anything wrong, ever.
    ///
    /// # Errors
    /// A wrong byte, or no whole pass within `timeout`.
    pub fn verify_checker(&mut self, timeout: Duration) -> Result<String> {
        let first = number(&self.ask("checker report")?, "passes")?;
        let report = wait::until("a whole pass of the checker", timeout, || {
            let report = self.ask("checker report")?;
            // The pass that is under way began before now: it and one more.
            Ok((number(&report, "passes")? >= first + 2).then_some(report))
        })?;
        if !report.contains("CHECKER OK") {
            bail!("{report}\n{}", self.console.bad_lines()?.join("\n"));
        }
        self.assert_clean()?;
        Ok(report)
    }

    /// Fails if the guest has complained on its console or among its heartbeats.
    ///
    /// # Errors
    /// It has.
    pub fn assert_clean(&self) -> Result<()> {
        self.console.assert_clean()?;
        let failures = self.heartbeat.record().failures();
        if !failures.is_empty() {
            bail!("The guest complained among its heartbeats:\n{}", failures.join("\n"));
        }
        Ok(())
    }
}
