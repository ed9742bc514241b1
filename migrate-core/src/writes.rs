//! How many pages the guest writes within a time, from scans at any distance.
//!
//! A scan tells how many different pages were written since the one before, not how often. The
//! longer a time, the fewer pages are new among those written in it: the count of different pages is
//! a concave function of time, for whatever mixture of hot and cold pages. So what was measured
//! bounds it from below at every other time. Two points are kept: scans while a round is being sent,
//! and the round as a whole.
//!
//! ```text
//!   pages │            ● the round ──────────  at least as many in a longer time
//!         │       ╱
//!         │   ● scans
//!         │  ╱
//!         └──────────────────────────────────  time
//! ```
//!
//! The time that matters for a decision is a downtime, close to the distance of the scans; and while
//! rounds become shorter, the second point comes closer to where they settle.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

/// Time over which scans are averaged: a burst that is shorter is not taken for the guest's habit.
const WINDOW_S: f64 = 2.0;

/// Different pages that were written within a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Written {
    /// Pages.
    pub pages: f64,
    /// Within this time, in seconds; above 0.
    pub seconds: f64,
}

/// Different pages that are probably written within `seconds` at a rate that was seen for `seen_s` seconds: beyond these
/// every second page is one that was written before.
pub(crate) fn expected_pages(pages_per_s: f64, seen_s: f64, seconds: f64) -> f64 {
    pages_per_s * (seconds.min(seen_s) + 0.5 * (seconds - seen_s).max(0.0))
}

/// What the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Writes {
    /// From one scan to the next, on average over the last two seconds.
    pub scan: Written,
    /// In the last round that took longer than that.
    pub round: Option<Written>,
}

impl Writes {
    /// Different pages that are written within `time`, at least.
    pub fn within(&self, time: Duration) -> f64 {
        let seconds = time.as_secs_f64();
        let Self { scan, round } = self;
        if seconds <= scan.seconds {
            return scan.pages * seconds / scan.seconds;
        }
        let Some(round) = round.filter(|round| round.seconds > scan.seconds) else {
            return scan.pages;
        };
        let share = (seconds - scan.seconds) / (round.seconds - scan.seconds);
        scan.pages + (round.pages - scan.pages).max(0.0) * share.min(1.0)
    }
}

/// Measures [`Writes`].
#[derive(Debug, Default)]
pub struct WriteRate {
    scans: VecDeque<Written>,
    round: Option<Written>,
}

impl WriteRate {
    /// A scan found `pages` written within `interval`.
    pub fn scanned(&mut self, pages: u64, interval: Duration) {
        if interval.is_zero() {
            return;
        }
        self.scans.push_back(Written { pages: pages as f64, seconds: interval.as_secs_f64() });
        let mut total: f64 = self.scans.iter().map(|scan| scan.seconds).sum();
        while let Some(oldest) = self.scans.front()
            && total - oldest.seconds >= WINDOW_S
        {
            total -= oldest.seconds;
            self.scans.pop_front();
        }
    }

    /// The scans of a round, `interval` together, found `pages` different pages.
    pub fn round(&mut self, pages: u64, interval: Duration) {
        let round = Written { pages: pages as f64, seconds: interval.as_secs_f64() };
        if self.mean().is_some_and(|scan| round.seconds > scan.seconds) {
            self.round = Some(round);
        }
    }

    /// What is known so far; nothing before the first scan.
    pub fn writes(&self) -> Option<Writes> {
        Some(Writes { scan: self.mean()?, round: self.round })
    }

    /// The scans' mean, which lies on or below the curve as they do.
    fn mean(&self) -> Option<Written> {
        let count = self.scans.len() as f64;
        let sum = self.scans.iter().copied().reduce(|sum, scan| Written {
            pages: sum.pages + scan.pages,
            seconds: sum.seconds + scan.seconds,
        })?;
        Some(Written { pages: sum.pages / count, seconds: sum.seconds / count })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn points_are_joined_by_lines() {
        let mut seen = WriteRate::default();
        assert_eq!(seen.writes(), None);
        seen.scanned(7, Duration::ZERO);
        seen.round(7, s(1.0));
        assert_eq!(seen.writes(), None);
        seen.scanned(100, s(0.5));
        seen.scanned(300, s(0.5));
        let within = |seen: &WriteRate, time| seen.writes().unwrap().within(s(time)).round();
        assert_eq!((within(&seen, 0.25), within(&seen, 3.0)), (100.0, 200.0));
        seen.round(800, s(2.5));
        let found = [0.0, 0.1, 0.5, 1.5, 2.5, 9.0].map(|time| within(&seen, time));
        assert_eq!(found, [0.0, 40.0, 200.0, 500.0, 800.0, 800.0]);
        seen.round(1, s(0.4));
        assert_eq!(within(&seen, 9.0), 800.0, "a round no longer than its scans tells nothing");
        seen.round(100, s(2.0));
        assert_eq!(within(&seen, 9.0), 200.0, "less than before: the guest has become calmer");
    }

    #[test]
    fn only_the_last_seconds_count() {
        let mut seen = WriteRate::default();
        (0..100).for_each(|_| seen.scanned(1000, s(0.1)));
        (0..20).for_each(|_| seen.scanned(10, s(0.1)));
        let scan = seen.writes().unwrap().scan;
        assert!(scan.pages < 60.0, "{scan:?}");
        seen.scanned(5, s(10.0));
        assert_eq!(seen.writes().unwrap().scan, Written { pages: 5.0, seconds: 10.0 });
    }

    proptest! {
        /// Of a guest that writes at random within two sets.
        #[test]
        fn never_more_than_what_is_written(
            rates in (1.0f64..1e6, 1.0f64..1e6),
            sizes in (1.0f64..1e5, 1.0f64..1e5),
            scans in prop::collection::vec(0.001f64..0.5, 1..30),
            times in prop::collection::vec(0.001f64..20.0, 1..20),
        ) {
            let written = |seconds: f64| {
                let part = |rate: f64, size: f64| size * (1.0 - (-rate * seconds / size).exp());
                part(rates.0, sizes.0) + part(rates.1, sizes.1)
            };
            let mut seen = WriteRate::default();
            scans.iter().for_each(|scan| seen.scanned(written(*scan) as u64, s(*scan)));
            let round: f64 = scans.iter().sum();
            seen.round(written(round) as u64, s(round));
            let writes = seen.writes().unwrap();
            for time in times {
                let (least, fact) = (writes.within(s(time)), written(time));
                prop_assert!(least <= fact * 1.0001 + 1.0, "{least} of {fact} in {time} s");
            }
        }
    }
}
