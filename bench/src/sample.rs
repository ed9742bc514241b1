//! Bytes over time: the link's counters, read beside a migration.
//!
//! They are read from /proc/PID/net/dev of a process inside the namespace, the source's QEMU: that
//! needs no program to be started for each sample. Invariant: however long a migration takes, at
//! most [`SAMPLES_MAX`] samples are kept, evenly spaced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use framework::wait::monotonic_us;
use serde::{Deserialize, Serialize};

/// Time between two samples at first.
const STEP: Duration = Duration::from_millis(50);

/// Samples that are kept; when there are more, every other goes and the time between doubles.
const SAMPLES_MAX: usize = 1000;

/// What the link had carried at a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Since the command, in milliseconds.
    pub(crate) ms: f64,
    /// Bytes that had gone to the destination since then.
    pub(crate) out_bytes: u64,
    /// Bytes that had come back.
    pub(crate) back_bytes: u64,
}

/// Those of some devices together, of all that are there.
fn sums(text: &str, devices: &[&str]) -> Option<(u64, u64)> {
    let all = devices.iter().filter_map(|device| counters(text, device));
    all.reduce(|sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// Counters of a device: bytes that were (sent, received).
fn counters(text: &str, device: &str) -> Option<(u64, u64)> {
    let rest = text.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
    let fields: Vec<u64> =
        rest.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
    // Eight fields of what was received, then eight of what was sent; bytes come first.
    Some((*fields.get(8)?, *fields.first()?))
}

/// Reads the counters until it is ended.
#[derive(Debug)]
pub(crate) struct Sampler {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(u64, u64, u64)>>,
}

impl Sampler {
    /// Begins to read the counters of `devices`, taken together, in the namespace of process `pid`.
    pub(crate) fn begin(pid: u32, devices: &'static [&'static str]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let own = Arc::clone(&over);
        let thread = std::thread::spawn(move || read(pid, devices, &own));
        Self { over, thread }
    }

    /// Ends it: what was carried since `from_us` of the host's clock until `to_us`.
    pub(crate) fn end(self, from_us: u64, to_us: u64) -> Vec<Sample> {
        self.over.store(true, Ordering::Relaxed);
        // A panic in the thread was printed where it happened.
        since(&self.thread.join().unwrap_or_default(), from_us, to_us)
    }
}

fn read(pid: u32, devices: &[&str], over: &AtomicBool) -> Vec<(u64, u64, u64)> {
    let path = format!("/proc/{pid}/net/dev");
    let mut step = STEP;
    let mut all = vec![];
    while !over.load(Ordering::Relaxed) {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if let Some((sent, received)) = sums(&text, devices) {
            all.push((monotonic_us(), sent, received));
        }
        if all.len() > SAMPLES_MAX {
            all = thinned(&all);
            step *= 2;
        }
        std::thread::sleep(step);
    }
    all
}

/// Every other.
fn thinned<T: Copy>(all: &[T]) -> Vec<T> {
    all.iter().copied().step_by(2).collect()
}

/// Samples (time, sent, received) as differences to the last one before `from_us`.
fn since(all: &[(u64, u64, u64)], from_us: u64, to_us: u64) -> Vec<Sample> {
    let before = all.iter().rfind(|one| one.0 <= from_us).or_else(|| all.first());
    let Some((_, sent, received)) = before else { return vec![] };
    let within = all.iter().filter(|one| (from_us..=to_us).contains(&one.0));
    within
        .map(|one| Sample {
            ms: (one.0 - from_us) as f64 / 1e3,
            out_bytes: one.1.saturating_sub(*sent),
            back_bytes: one.2.saturating_sub(*received),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Inter-|   Receive                |  Transmit\n \
        face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n    \
        lo:     100       1    0    0    0     0          0         0      100       1    0\n \
        link0:   7000      10    0    0    0     0          0         0    90000      70    0\n";

    #[test]
    fn finds_a_device_among_others() {
        assert_eq!(counters(TEXT, "link0"), Some((90_000, 7_000)));
        assert_eq!(counters(TEXT, "lo"), Some((100, 100)));
        assert_eq!(counters(TEXT, "link"), None);
        assert_eq!(counters("", "lo"), None);
        assert_eq!(sums(TEXT, &["link0", "lo", "link9"]), Some((90_100, 7_100)));
        assert_eq!(sums(TEXT, &["link9"]), None);
    }

    #[test]
    fn samples_count_from_the_command() {
        let all = [(0, 10, 1), (50, 20, 2), (100, 320, 3), (150, 520, 5), (200, 999, 9)];
        let samples = since(&all, 60, 150);
        assert_eq!(
            samples,
            [
                Sample { ms: 0.04, out_bytes: 300, back_bytes: 1 },
                Sample { ms: 0.09, out_bytes: 500, back_bytes: 3 },
            ]
        );
        assert!(since(&[], 0, 9).is_empty());
    }

    #[test]
    fn the_own_namespace_has_a_loopback() {
        let sampler = Sampler::begin(std::process::id(), &["lo"]);
        std::thread::sleep(STEP * 3);
        assert!(!sampler.end(0, u64::MAX).is_empty());
        assert_eq!(thinned(&[1, 2, 3, 4, 5]), [1, 3, 5]);
    }
}
