//! How many bytes of background pages may be under way.
//!
//! An answer to a fault can overtake what waits at the source, but not what is in the network or at
//! the destination. The budget halves when a fault is asked for and doubles while none is: with few
//! faults the link is full, with many their answers find it nearly empty.

use std::time::Duration;

/// Time without faults after which the budget doubles, again and again.
const QUIET: Duration = Duration::from_millis(20);

/// Faults within this time of one that halved the budget are part of the same stir.
const STIR: Duration = Duration::from_millis(5);

/// The budget as it changes with faults.
#[derive(Debug)]
pub struct Budget {
    bytes_min: u64,
    bytes_max: u64,
    /// As of `since`.
    bytes: u64,
    /// When it was last halved, or grew; nothing before it was asked for.
    since: Option<Duration>,
    halved: Option<Duration>,
}

impl Budget {
    /// Begins with the least, since the guest faults most right after the hand-over.
    pub fn new(bytes_min: u64, bytes_max: u64) -> Self {
        let bytes_min = bytes_min.max(1);
        Self {
            bytes_min,
            bytes_max: bytes_max.max(bytes_min),
            bytes: bytes_min,
            since: None,
            halved: None,
        }
    }

    /// A fault was asked for at `now`.
    pub fn fault(&mut self, now: Duration) {
        let bytes = self.bytes(now);
        if self.halved.is_none_or(|at| now.saturating_sub(at) >= STIR) {
            self.bytes = (bytes / 2).max(self.bytes_min);
            self.halved = Some(now);
        }
        self.since = self.since.max(Some(now));
    }

    /// Bytes that may be under way at `now`.
    pub fn bytes(&mut self, now: Duration) -> u64 {
        let since = self.since.get_or_insert(now);
        while self.bytes < self.bytes_max && now.saturating_sub(*since) >= QUIET {
            self.bytes = self.bytes.saturating_mul(2).min(self.bytes_max);
            *since += QUIET;
        }
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn grows_in_quiet_and_shrinks_with_faults() {
        let mut budget = Budget::new(1 << 17, 1 << 24);
        budget.fault(at(1000));
        assert_eq!(budget.bytes(at(1019)), 1 << 17);
        assert_eq!(budget.bytes(at(1020)), 1 << 18);
        assert_eq!(budget.bytes(at(1065)), 1 << 20);
        assert_eq!(budget.bytes(at(9000)), 1 << 24);
        budget.fault(at(9000));
        budget.fault(at(9001));
        assert_eq!(budget.bytes(at(9001)), 1 << 23, "one stir");
        (1..20).for_each(|stir| budget.fault(at(9000 + 5 * stir)));
        assert_eq!(budget.bytes(at(9095)), 1 << 17);
        assert_eq!(budget.bytes(at(9115)), 1 << 18);
    }

    #[test]
    fn begins_with_the_least_whenever_that_is() {
        let mut budget = Budget::new(1, 100);
        assert_eq!(budget.bytes(at(100_000)), 1);
        assert_eq!(budget.bytes(at(100_020)), 2);
    }

    #[test]
    fn faults_within_a_stir_still_delay_growth() {
        let mut budget = Budget::new(1, 1 << 24);
        for ms in 0..1000 {
            budget.fault(at(ms));
            assert_eq!(budget.bytes(at(ms)), 1);
        }
    }

    #[test]
    fn bounds_that_contradict_each_other_keep_the_lower() {
        let mut budget = Budget::new(100, 10);
        budget.fault(at(0));
        assert_eq!(budget.bytes(at(5000)), 100);
        assert_eq!(Budget::new(0, 0).bytes(at(1)), 1);
    }
}
