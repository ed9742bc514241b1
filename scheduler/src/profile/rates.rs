//! Counters, as rates.

/// A figure that only grows, until what counts it starts anew.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counter {
    last: Option<(f64, f64)>,
}

impl Counter {
    /// By how much it grew a second since it was read last. None the first time, if no time has passed or the clock was set
    /// back, and if the counter is less than it was: then it counts anew.
    pub fn rate(&mut self, at_s: f64, value: f64) -> Option<f64> {
        if !at_s.is_finite() || !value.is_finite() {
            return None;
        }
        let (before_s, before) = self.last.replace((at_s, value))?;
        let (passed_s, grew) = (at_s - before_s, value - before);
        let rate = grew / passed_s;
        (passed_s > 0.0 && grew >= 0.0 && rate.is_finite()).then_some(rate)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_goes_backwards_is_no_rate() {
        let mut counter = Counter::default();
        assert_eq!(counter.rate(10.0, 100.0), None);
        assert_eq!(counter.rate(12.0, 160.0), Some(30.0));
        assert_eq!(counter.rate(14.0, 20.0), None, "it counts anew");
        assert_eq!(counter.rate(16.0, 24.0), Some(2.0));
        assert_eq!(counter.rate(16.0, 30.0), None, "no time has passed");
        assert_eq!(counter.rate(5.0, 40.0), None, "the clock was set back");
        assert_eq!(counter.rate(7.0, 42.0), Some(1.0));
        assert_eq!(counter.rate(f64::NAN, 1.0), None);
        assert_eq!(counter.rate(8.0, 42.0), Some(0.0));
    }

    proptest! {
        /// Rates of readings in order add up to what was counted.
        #[test]
        fn rates_add_up(steps in prop::collection::vec((0.1..100.0, 0.0..1e6), 1..50)) {
            let (mut counter, mut at_s, mut value, mut sum) = (Counter::default(), 0.0, 0.0, 0.0);
            counter.rate(at_s, value);
            for (passed_s, grew) in steps {
                (at_s, value) = (at_s + passed_s, value + grew);
                sum += counter.rate(at_s, value).unwrap() * passed_s;
            }
            prop_assert!((sum - value).abs() <= 1e-6 * value.max(1.0));
        }

        #[test]
        fn rates_are_never_negative_nor_endless(readings in prop::collection::vec((any::<f64>(), any::<f64>()), 0..50)) {
            let mut counter = Counter::default();
            for (at_s, value) in readings {
                prop_assert!(counter.rate(at_s, value).is_none_or(|rate| rate.is_finite() && rate >= 0.0));
            }
        }
    }
}
