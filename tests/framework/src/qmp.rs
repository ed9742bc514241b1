//! A minimal QMP client for tests. It is no part of the engine, so that a mistake there is not
//! repeated here.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::wait;

const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to one QMP socket.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: VecDeque<Value>,
    partial: String,
}

impl Qmp {
    /// Connects, waiting until the socket is there, and negotiates.
    ///
    /// # Errors
    /// No QEMU answers within `timeout`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        Self::negotiate(path, timeout, json!({}))
    }

    /// The same for commands that are answered although the guest's memory is awaited ([`Self::execute_oob`]).
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn connect_oob(path: &Path, timeout: Duration) -> Result<Self> {
        Self::negotiate(path, timeout, json!({ "enable": ["oob"] }))
    }

    fn negotiate(path: &Path, timeout: Duration, capabilities: Value) -> Result<Self> {
        let what = format!("the QMP socket {}", path.display());
        let writer = wait::until(&what, timeout, || Ok(UnixStream::connect(path).ok()))?;
        let reader = BufReader::new(writer.try_clone().context("Cannot duplicate a socket")?);
        let mut qmp = Self { reader, writer, events: VecDeque::new(), partial: String::new() };
        let greeting = qmp.message(Instant::now() + timeout)?;
        if greeting.as_ref().and_then(|greeting| greeting.get("QMP")).is_none() {
            bail!("No greeting from {}: another client holds it, or it is no QMP", path.display());
        }
        qmp.execute("qmp_capabilities", capabilities)?;
        Ok(qmp)
    }

    /// One message, or `None` at `end`.
    fn message(&mut self, end: Instant) -> Result<Option<Value>> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.writer.set_read_timeout(Some(left)).context("Cannot set a timeout")?;
            match self.reader.read_line(&mut self.partial) {
                Ok(0) => bail!("QEMU closed the QMP connection"),
                Ok(_) if self.partial.ends_with('\n') => {
                    let line = std::mem::take(&mut self.partial);
                    let text = line.trim();
                    let value = serde_json::from_str(text);
                    return value.map(Some).with_context(|| format!("No JSON: {text}"));
                }
                Ok(_) => {}
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted]
                        .contains(&error.kind()) => {}
                Err(error) => return Err(error).context("Cannot read from QMP"),
            }
        }
    }

    /// Executes a command and returns what QEMU returned. Events that come in between are kept.
    ///
    /// # Errors
    /// QEMU refused, is gone, or did not answer within a minute.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.request(json!({ "execute": command }), command, arguments)
    }

    /// The same out of band, which QEMU allows few commands.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_oob(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.request(json!({ "exec-oob": command, "id": command }), command, arguments)
    }

    fn request(&mut self, mut request: Value, command: &str, arguments: Value) -> Result<Value> {
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            request["arguments"] = arguments;
        }
        self.writer
            .write_all(format!("{request}\n").as_bytes())
            .with_context(|| format!("Cannot send {command}"))?;
        let end = Instant::now() + COMMAND_TIMEOUT;
        loop {
            let Some(mut message) = self.message(end)? else {
                bail!("QEMU did not answer {command} within {} s", COMMAND_TIMEOUT.as_secs());
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!("QEMU refused {command}: {}", error["desc"].as_str().unwrap_or("?"));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// A line of the human monitor.
    ///
    /// # Errors
    /// As [`Qmp::execute`]. An unknown monitor command is not an error but a text.
    pub fn monitor(&mut self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// The run state: `running`, `paused`, `inmigrate`, `postmigrate`, ...
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn run_state(&mut self) -> Result<String> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// What it says of its latest migration (`query-migrate`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn migration(&mut self) -> Result<Value> {
        self.execute("query-migrate", json!({}))
    }

    /// Waits until a migration is at one of these, and returns what QEMU says of it then.
    ///
    /// # Errors
    /// It failed or was cancelled although that is not wanted, or `timeout` passed.
    pub fn wait_migration(&mut self, wanted: &[&str], timeout: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let reached = wait::until(&format!("{wanted:?} of QEMU's migration"), timeout, || {
            last = self.migration()?;
            let status = last["status"].as_str().unwrap_or_default();
            let is_there = wanted.contains(&status);
            if !is_there && ["failed", "cancelled"].contains(&status) {
                bail!("QEMU's migration is over");
            }
            Ok(is_there.then_some(()))
        });
        reached.with_context(|| last.to_string())?;
        Ok(last)
    }

    /// The next event of this name, kept or coming.
    ///
    /// # Errors
    /// It did not come within `timeout`.
    pub fn event(&mut self, name: &str, timeout: Duration) -> Result<Value> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name)
                && let Some(event) = self.events.remove(at)
            {
                return Ok(event);
            }
            match self.message(end)? {
                Some(message) => self.events.push_back(message),
                None => bail!("QEMU sent no event {name} in {:.1} s", timeout.as_secs_f64()),
            }
        }
    }

    /// The next event of this name among those that came while something else was awaited.
    pub fn kept_event(&mut self, name: &str) -> Option<Value> {
        let at = self.events.iter().position(|event| event["event"] == name)?;
        self.events.remove(at)
    }

    /// Forgets the events that were kept so far.
    pub fn clear_events(&mut self) {
        self.events.clear();
    }
}
