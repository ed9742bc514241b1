//! Progress on stderr: a bar on a terminal, a line a second elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// What is shown.
#[derive(Debug, Clone, Copy, Default)]
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
