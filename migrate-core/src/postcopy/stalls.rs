//! How long the guest waited for pages.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Significant digits of the histogram: service times are kept to 1 %, in at most 64 KiB.
const DIGITS: u8 = 2;

/// Longest service time that the histogram tells apart: above 12 days.
const TIME_US_MAX: u64 = 1 << 40;

/// What the destination saw. Times are from the first fault on a host page until all of it arrived,
/// outages of the link included.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FetchStats {
    /// Faults on missing pages.
    pub faults: u64,
    /// Of those, faults on pages that were asked for before or partly arrived.
    pub faults_under_way: u64,
    /// Faults on pages that were never missing and have no content.
    pub faults_zero: u64,
    /// Pages that arrived again.
    pub duplicate_pages: u64,
    /// Host pages that were waited for and arrived.
    pub served: u64,
    /// Median time to serve one, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of that time, in microseconds.
    pub p99_us: u64,
    /// The longest stall, in microseconds.
    pub max_us: u64,
    /// Time in which at least one page was waited for, in microseconds.
    pub blocked_us: u64,
}

/// Counts faults and measures how long they took.
#[derive(Debug)]
pub(crate) struct Stalls {
    pub(super) faults: u64,
    pub(super) faults_under_way: u64,
    pub(super) faults_zero: u64,
    pub(super) duplicate_pages: u64,
    service_us: Histogram<u64>,
    max: Duration,
    waiting: u64,
    blocked_since: Duration,
    blocked: Duration,
}

impl Stalls {
    pub(crate) fn new() -> Self {
        Self {
            faults: 0,
            faults_under_way: 0,
            faults_zero: 0,
            duplicate_pages: 0,
            service_us: Histogram::new_with_bounds(1, TIME_US_MAX, DIGITS)
                .expect("the bounds are constant and in range"),
            max: Duration::ZERO,
            waiting: 0,
            blocked_since: Duration::ZERO,
            blocked: Duration::ZERO,
        }
    }

    /// A host page is waited for from `now` on.
    pub(crate) fn began(&mut self, now: Duration) {
        if self.waiting == 0 {
            self.blocked_since = now;
        }
        self.waiting += 1;
    }

    /// A host page that was waited for since `since` arrived.
    pub(crate) fn ended(&mut self, since: Duration, now: Duration) {
        let took = now.saturating_sub(since);
        self.max = self.max.max(took);
        self.service_us.saturating_record(micros(took));
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0 {
            let blocked = now.saturating_sub(self.blocked_since);
            self.blocked = self.blocked.saturating_add(blocked);
        }
    }

    pub(crate) fn stats(&self) -> FetchStats {
        FetchStats {
            faults: self.faults,
            faults_under_way: self.faults_under_way,
            faults_zero: self.faults_zero,
            duplicate_pages: self.duplicate_pages,
            served: self.service_us.len(),
            p50_us: self.service_us.value_at_quantile(0.5),
            p99_us: self.service_us.value_at_quantile(0.99),
            max_us: micros(self.max),
            blocked_us: micros(self.blocked),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn quantiles_are_kept_to_a_hundredth() {
        let mut stalls = Stalls::new();
        for took in 1..=1000 {
            stalls.began(us(5000));
            stalls.ended(us(5000), us(5000 + took * 10));
        }
        let stats = stalls.stats();
        assert_eq!((stats.served, stats.max_us), (1000, 10_000));
        assert!(stats.p50_us.abs_diff(5000) <= 50, "{}", stats.p50_us);
        assert!(stats.p99_us.abs_diff(9900) <= 99, "{}", stats.p99_us);
        assert_eq!(Stalls::new().stats().p99_us, 0);
    }

    #[test]
    fn stalls_that_overlap_block_once() {
        let mut stalls = Stalls::new();
        stalls.began(us(10));
        stalls.began(us(20));
        stalls.ended(us(10), us(30));
        stalls.ended(us(20), us(50));
        stalls.began(us(100));
        stalls.ended(us(100), us(101));
        assert_eq!(stalls.stats().blocked_us, 41);
    }

    #[test]
    fn an_hour_is_kept_and_memory_is_bounded() {
        let mut stalls = Stalls::new();
        stalls.began(us(0));
        stalls.ended(us(0), Duration::from_secs(3600));
        stalls.began(us(0));
        stalls.ended(us(0), Duration::MAX);
        assert!(stalls.service_us.distinct_values() * 8 <= 64 << 10);
        assert_eq!(stalls.stats().served, 2);
        assert!(stalls.stats().p50_us >= 3_560_000_000, "{:?}", stalls.stats());
    }
}
