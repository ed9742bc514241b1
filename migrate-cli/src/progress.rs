//! Progress on stderr: a bar on a terminal, a line a second elsewhere; and for programs, a JSON object a line in a file.

use std::fs::File;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;

use crate::error::EngineError;

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two lines of the file.
const FILE_INTERVAL: Duration = Duration::from_millis(250);

/// The file for programs, of this process.
static FILE: OnceLock<Mutex<Lines>> = OnceLock::new();

/// Lines for programs.
#[derive(Debug)]
struct Lines {
    file: File,
    last: Option<Instant>,
}

/// A line: what [`Snapshot`] has, and when.
#[derive(Debug, Serialize)]
struct Line {
    /// Seconds since 1970.
    at_s: f64,
    #[serde(flatten)]
    seen: Snapshot,
}

/// Has progress written to a file, too, from its beginning.
///
/// # Errors
/// The file cannot be made.
pub fn write_to(path: &Path) -> Result<(), EngineError> {
    let file = File::create(path).map_err(|error| EngineError::Misuse {
        what: format!("Progress cannot be written to {}: {error}", path.display()),
        remedy: "Name a file in a directory that is there and may be written".into(),
    })?;
    FILE.get_or_init(|| Mutex::new(Lines { file, last: None }));
    Ok(())
}

fn write_line(seen: &Snapshot) {
    let Some(lines) = FILE.get() else { return };
    let mut lines = lines.lock();
    if lines.last.is_some_and(|at| at.elapsed() < FILE_INTERVAL) {
        return;
    }
    lines.last = Some(Instant::now());
    let at_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let Ok(mut text) = serde_json::to_string(&Line { at_s, seen: *seen }) else { return };
    text.push('\n');
    if let Err(error) = lines.file.write_all(text.as_bytes()) {
        tracing::debug!(%error, "A line of progress is lost");
    }
}

/// What is shown.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Snapshot {
    /// Round in progress.
    pub round: u32,
    /// Pages that this round still has to carry when it starts.
    pub round_pages: u64,
    /// Bytes that the destination applied so far.
    pub applied_bytes: u64,
    /// Bytes known to be needed in all: what was handed over and what this round adds.
    pub expected_bytes: u64,
    /// Goodput in bytes a second.
    pub rate_bytes_per_s: Option<f64>,
    /// Predicted downtime in milliseconds.
    pub predicted_ms: Option<f64>,
}

/// Shows snapshots to the user.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    last_round: u32,
}

impl Progress {
    /// A bar if stderr is a terminal, lines otherwise.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{bar:30.cyan/blue} {binary_bytes:>10}/{binary_total_bytes:10} {msg}",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar, last_line: None, last_round: 0 }
    }

    /// Shows where things stand.
    pub fn show(&mut self, seen: &Snapshot) {
        write_line(seen);
        if let Some(bar) = &self.bar {
            bar.set_length(seen.expected_bytes.max(seen.applied_bytes));
            bar.set_position(seen.applied_bytes);
            bar.set_message(describe(seen));
            return;
        }
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_INTERVAL);
        if due || (seen.round <= 1 && seen.round != self.last_round) {
            self.last_line = Some(Instant::now());
            self.last_round = seen.round;
            eprintln!("{}", describe(seen));
        }
    }

    /// Shows how post-copy goes on.
    pub fn fetching(&mut self, left_pages: u64, applied_bytes: u64) {
        let text = format!("the guest runs at the destination; {left_pages} pages left to send");
        if let Some(bar) = &self.bar {
            bar.set_position(applied_bytes);
            bar.set_message(text);
        } else if self.last_line.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
            self.last_line = Some(Instant::now());
            eprintln!("{text}");
        }
    }

    /// Says something that stays on the screen.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn describe(seen: &Snapshot) -> String {
    let mut text = format!("round {}, {} pages", seen.round, seen.round_pages);
    if let Some(rate) = seen.rate_bytes_per_s.filter(|rate| *rate > 0.0) {
        text += &format!(", {:.1} MB/s", rate / 1e6);
        let left = seen.expected_bytes.saturating_sub(seen.applied_bytes);
        text += &format!(", ETA {:.1} s", left as f64 / rate);
    }
    if let Some(predicted) = seen.predicted_ms {
        text += &format!(", predicted downtime {predicted:.0} ms");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format of the progress lines is relied on: this pins it.
    #[test]
    fn a_line_says_round_pages_rate_eta_and_prediction() {
        let seen = Snapshot {
            round: 2,
            round_pages: 1234,
            applied_bytes: 1_000_000,
            expected_bytes: 3_000_000,
            rate_bytes_per_s: Some(1e6),
            predicted_ms: Some(42.3),
        };
        assert_eq!(
            describe(&seen),
            "round 2, 1234 pages, 1.0 MB/s, ETA 2.0 s, predicted downtime 42 ms"
        );
    }
}
