//! Pacing: so many operations a second, never more, without catching up after a pause.
//!
//! Invariant: over any interval of `t` microseconds at most `rate * t / 1e6 + burst` operations are
//! granted, where `burst` is what [`BURST_US`] holds at that rate and at least one.

/// Longest time whose operations may be made up for at once.
pub const BURST_US: u64 = 10_000;

/// Grants operations at a rate. Time is passed in.
#[derive(Debug, Clone)]
pub struct Pacer {
    rate_per_s: u64,
    last_us: u64,
    /// Operations saved up, times one million.
    credit: u64,
}

impl Pacer {
    /// A pacer that starts at `now_us` without credit. A rate of 0 means as fast as possible.
    #[must_use]
    pub fn new(rate_per_s: u64, now_us: u64) -> Self {
        Self { rate_per_s, last_us: now_us, credit: 0 }
    }

    /// How many operations may be done now, `most` at most; they count as done.
    pub fn grant(&mut self, now_us: u64, most: u64) -> u64 {
        if self.rate_per_s == 0 {
            return most;
        }
        let elapsed_us = now_us.saturating_sub(self.last_us).min(BURST_US);
        self.last_us = self.last_us.max(now_us);
        let ceiling = self.rate_per_s.saturating_mul(BURST_US).max(1_000_000);
        let earned = elapsed_us.saturating_mul(self.rate_per_s);
        self.credit = self.credit.saturating_add(earned).min(ceiling);
        let granted = (self.credit / 1_000_000).min(most);
        self.credit -= granted * 1_000_000;
        granted
    }

    /// Forgets the time since the last grant: nothing is earned by a pause.
    pub fn restart(&mut self, now_us: u64) {
        self.last_us = self.last_us.max(now_us);
        self.credit = 0;
    }

    /// Changes the rate from now on.
    pub fn set_rate(&mut self, rate_per_s: u64) {
        self.rate_per_s = rate_per_s;
        self.credit = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keeps_the_rate_when_polled_often() {
        for rate in [1, 3, 999, 20_000, 1_000_000] {
            let mut pacer = Pacer::new(rate, 0);
            let done: u64 = (1..=10_000).map(|ms| pacer.grant(ms * 1000, u64::MAX)).sum();
            assert!(done <= rate * 10 && done + 1 >= rate * 10, "{done} at {rate}");
        }
    }

    #[test]
    fn does_not_catch_up_after_a_pause() {
        let mut pacer = Pacer::new(1000, 0);
        assert_eq!(pacer.grant(60_000_000, u64::MAX), 10);
    }

    #[test]
    fn zero_means_unpaced() {
        assert_eq!(Pacer::new(0, 0).grant(0, 64), 64);
    }

    proptest! {
        #[test]
        fn never_above_the_rate(
            rate in 1_u64..200_000,
            steps in prop::collection::vec((0_u64..50_000, 1_u64..100), 1..200),
        ) {
            let mut pacer = Pacer::new(rate, 0);
            let (mut now, mut done) = (0, 0);
            for (step, most) in steps {
                now += step;
                done += pacer.grant(now, most);
                let burst = (rate * BURST_US / 1_000_000).max(1);
                prop_assert!(done <= rate * now / 1_000_000 + burst);
            }
        }
    }
}
