//! The guest's console (ttyS0): QEMU writes it to a file, which survives QEMU's death.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::wait;

/// What no healthy guest prints. A kernel's texts, and those of the guest's programs.
const BAD_TEXTS: [&str; 20] = [
    "APP FAIL",
    "CHECKER FAIL",
    "DISKREAD FAIL",
    "FREED FAIL",
    "WORKER FAIL",
    "pagealloc: ",
    "GUEST FAIL",
    "GUEST DIED",
    "Kernel panic",
    "BUG:",
    "Oops",
    "general protection fault",
    "segfault",
    "WARNING:",
    "rcu_sched self-detected stall",
    "detected stalls on CPUs",
    "soft lockup",
    "hung_task",
    "blocked for more than",
    "I/O error",
];

/// Reads a console's file.
#[derive(Debug, Clone)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// All that was printed so far.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn text(&self) -> Result<String> {
        match std::fs::read(&self.path) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => {
                Err(error).with_context(|| format!("Cannot read {}", self.path.display()))
            }
        }
    }

    /// The last `count` lines.
    #[must_use]
    pub fn tail(&self, count: usize) -> String {
        let text = self.text().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Waits for a text.
    ///
    /// # Errors
    /// It did not come within `timeout`; the last lines are in the error.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<()> {
        let found = || Ok(self.text()?.contains(text).then_some(()));
        wait::until(&format!("{text:?} on the console"), timeout, found)
            .with_context(|| format!("The console ends with:\n{}", self.tail(15)))
    }

    /// The lines that no healthy guest prints.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn bad_lines(&self) -> Result<Vec<String>> {
        Ok(bad_lines(&self.text()?))
    }

    /// Fails if there is any such line, with what the guest printed around the first of them.
    ///
    /// # Errors
    /// There is one, or the file cannot be read.
    pub fn assert_clean(&self) -> Result<()> {
        if self.bad_lines()?.is_empty() {
            return Ok(());
        }
        bail!("The guest complained:\n{}", around_first_bad(&self.settled()?))
    }

    /// The text once it grows no more: a complaint arrives in pieces, and its trace after it.
    fn settled(&self) -> Result<String> {
        let mut text = self.text()?;
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(500));
            let now = self.text()?;
            if now.len() == text.len() && now.ends_with('\n') {
                break;
            }
            text = now;
        }
        Ok(text)
    }
}

fn is_bad(line: &str) -> bool {
    BAD_TEXTS.iter().any(|bad| line.contains(bad))
}

fn bad_lines(text: &str) -> Vec<String> {
    text.lines().filter(|line| is_bad(line)).map(str::to_owned).collect()
}

/// The first line that is bad, the three before it, and its trace.
fn around_first_bad(text: &str) -> String {
    let first = text.lines().position(is_bad).unwrap_or_default();
    text.lines().skip(first.saturating_sub(3)).take(60).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_complaints() {
        let text = "[ 1.0] fine\nCHECKER FAIL page=3\nGUEST READY 1\n[2.0] BUG: unable to handle\n";
        assert_eq!(bad_lines(text), ["CHECKER FAIL page=3", "[2.0] BUG: unable to handle"]);
        assert_eq!(around_first_bad(text), text.trim_end());
        assert!(bad_lines("GUEST READY 5\nrcu: Hierarchical RCU implementation.\n").is_empty());
    }
}
