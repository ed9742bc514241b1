//! How fast and how widely the guest writes, from scans at any distance.
//!
//! A scan tells how many pages were written since the one before, not how often. A guest that writes
//! `rate` pages a second at random within a hot set of `hot` pages has written, after a time `t`,
//!
//! ```text
//! written(t) = hot * (1 - exp(-rate * t / hot))
//! ```
//!
//! different pages. Two distances determine both numbers: scans while a round is being sent, and the
//! round as a whole. The time that matters for a decision is a downtime, close to the distance of
//! such scans, so little depends on whether the guest really writes at random.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

/// Time over which scans are averaged: a burst that is shorter is not taken for the guest's habit.
const WINDOW: Duration = Duration::from_secs(2);

/// A round tells of the hot set if it took this many times as long as scans are apart.
const ROUND_SCANS: f64 = 3.0;

/// Rounds that find at least this share of what their scans add up to tell of no hot set.
const UNREPEATED: f64 = 0.98;

/// Largest hot set that is told from none, as a multiple of what a round found.
const HOT_FACTOR_MAX: f64 = 50.0;

/// What the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Writes {
    /// Pages a second, counted again whenever they are written again.
    pub pages_per_s: f64,
    /// Pages among which these writes fall; nothing if no page was seen to be written again.
    pub hot_pages: Option<f64>,
}

impl Writes {
    /// Different pages that are written within `time`.
    pub fn within(&self, time: Duration) -> f64 {
        let writes = self.pages_per_s * time.as_secs_f64();
        match self.hot_pages {
            Some(hot) if hot > 0.0 => hot * (1.0 - (-writes / hot).exp()),
            _ => writes,
        }
    }
}

/// Pages that were written within a time.
#[derive(Debug, Clone, Copy)]
struct Sample {
    pages: f64,
    seconds: f64,
}

/// Measures [`Writes`].
#[derive(Debug, Default)]
pub struct WriteRate {
    scans: VecDeque<Sample>,
    round: Option<Sample>,
}

impl WriteRate {
    /// A scan found `pages` written within `interval`.
    pub fn scanned(&mut self, pages: u64, interval: Duration) {
        if interval.is_zero() {
            return;
        }
        self.scans.push_back(Sample { pages: pages as f64, seconds: interval.as_secs_f64() });
        let mut total: f64 = self.scans.iter().map(|scan| scan.seconds).sum();
        while let Some(oldest) = self.scans.front()
            && total - oldest.seconds >= WINDOW.as_secs_f64()
        {
            total -= oldest.seconds;
            self.scans.pop_front();
        }
    }

    /// The scans of a round, `interval` together, found `pages` different pages.
    pub fn round(&mut self, pages: u64, interval: Duration) {
        let round = Sample { pages: pages as f64, seconds: interval.as_secs_f64() };
        if self.mean().is_some_and(|scan| round.seconds >= scan.seconds * ROUND_SCANS) {
            self.round = Some(round);
        }
    }

    /// What is known so far; nothing before the first scan.
    pub fn writes(&self) -> Option<Writes> {
        let scan = self.mean()?;
        let hot_pages = self.round.and_then(|round| hot_pages(scan, round));
        let pages_per_s = match hot_pages {
            // The inverse of `written(t)`, finite even if the whole hot set was found written.
            Some(hot) => -hot * (1.0 - scan.pages / hot).max(1e-3).ln() / scan.seconds,
            None => scan.pages / scan.seconds,
        };
        Some(Writes { pages_per_s, hot_pages })
    }

    /// The scans' mean.
    fn mean(&self) -> Option<Sample> {
        let count = self.scans.len() as f64;
        let sum = self.scans.iter().copied().reduce(|sum, scan| Sample {
            pages: sum.pages + scan.pages,
            seconds: sum.seconds + scan.seconds,
        })?;
        Some(Sample { pages: sum.pages / count, seconds: sum.seconds / count })
    }
}

/// The hot set of which a scan finds some pages written and a round others, by bisection.
fn hot_pages(scan: Sample, round: Sample) -> Option<f64> {
    let scans = round.seconds / scan.seconds;
    if round.pages >= scan.pages * scans * UNREPEATED {
        return None;
    }
    let found = |hot: f64| hot * (1.0 - (1.0 - (scan.pages / hot).min(1.0)).powf(scans));
    let (mut low, mut high) = (round.pages.max(scan.pages), round.pages * HOT_FACTOR_MAX);
    for _ in 0..50 {
        let middle = 0.5 * (low + high);
        if found(middle) < round.pages { low = middle } else { high = middle }
    }
    Some(high)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans every 100 ms over a round of a guest that writes at random.
    fn measured(rate: f64, hot: f64, round_s: f64) -> Writes {
        let guest = Writes { pages_per_s: rate, hot_pages: Some(hot) };
        let mut seen = WriteRate::default();
        let scan = Duration::from_millis(100);
        for _ in 0..(round_s * 10.0) as u64 {
            seen.scanned(guest.within(scan) as u64, scan);
        }
        let round = Duration::from_secs_f64(round_s);
        seen.round(guest.within(round) as u64, round);
        seen.writes().unwrap()
    }

    #[test]
    fn rate_and_hot_set_are_found() {
        for (rate, hot, round_s) in
            [(20_000.0, 51_200.0, 10.0), (5_000.0, 20_000.0, 3.0), (300_000.0, 100_000.0, 1.0)]
        {
            let writes = measured(rate, hot, round_s);
            let found = (writes.pages_per_s / rate, writes.hot_pages.unwrap() / hot);
            assert!((0.95..1.05).contains(&found.0), "{writes:?}");
            assert!((0.95..1.05).contains(&found.1), "{writes:?}");
        }
    }

    #[test]
    fn a_hot_set_that_is_written_between_scans_is_known_and_its_rate_is_finite() {
        let writes = measured(1e9, 1000.0, 1.0);
        assert!((writes.hot_pages.unwrap() - 1000.0).abs() < 5.0, "{writes:?}");
        assert!(writes.pages_per_s.is_finite() && writes.pages_per_s > 50_000.0, "{writes:?}");
    }

    #[test]
    fn without_rewrites_there_is_no_hot_set() {
        let mut seen = WriteRate::default();
        assert_eq!(seen.writes(), None);
        seen.scanned(7, Duration::ZERO);
        assert_eq!(seen.writes(), None);
        for _ in 0..30 {
            seen.scanned(100, Duration::from_millis(100));
        }
        seen.round(3000, Duration::from_secs(3));
        let writes = seen.writes().unwrap();
        assert!((writes.pages_per_s - 1000.0).abs() < 1e-6, "{writes:?}");
        assert_eq!(writes.hot_pages, None);
    }

    #[test]
    fn an_idle_guest_writes_nothing() {
        let writes = measured(0.0, 1000.0, 1.0);
        assert_eq!(writes.within(Duration::from_secs(9)), 0.0);
    }

    #[test]
    fn only_the_last_seconds_count() {
        let mut seen = WriteRate::default();
        (0..100).for_each(|_| seen.scanned(1000, Duration::from_millis(100)));
        (0..20).for_each(|_| seen.scanned(10, Duration::from_millis(100)));
        let rate = seen.writes().unwrap().pages_per_s;
        assert!(rate < 110.0, "{rate}");
        seen.scanned(5, Duration::from_secs(10));
        assert_eq!(seen.writes().unwrap().pages_per_s, 0.5);
    }
}
