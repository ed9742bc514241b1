//! Randomness by seed: SplitMix64 (Steele, Lea, Flood 2014). The same seed gives the same numbers on every machine.

use std::f64::consts::TAU;

/// A generator.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

/// One step of SplitMix64's output function.
const fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A number in [0, 1) out of 64 bits.
fn unit(word: u64) -> f64 {
    // 53 bits are what an f64 holds exactly.
    (word >> 11) as f64 / (1_u64 << 53) as f64
}

/// A number in [-1, 1) that depends on nothing but the three.
pub(super) fn noise(seed: u64, guest: usize, turn: u64) -> f64 {
    let word = mix(seed ^ mix((guest as u64) << 32 ^ turn).wrapping_add(0x9e37_79b9_7f4a_7c15));
    2.0 * unit(mix(word)) - 1.0
}

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x6a09_e667_f3bc_c908))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// In [0, 1).
    pub(super) fn unit(&mut self) -> f64 {
        unit(self.next())
    }

    /// Between both ends, all equally likely.
    pub(super) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Below `count`; 0 if that is 0.
    pub(super) fn below(&mut self, count: usize) -> usize {
        // The bias is below count / 2^64.
        ((u128::from(self.next()) * count as u128) >> 64) as usize
    }

    /// Exponentially distributed.
    pub(super) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Log-normally distributed, by its median and the deviation of its logarithm.
    pub(super) fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        let (radius, angle) = ((-2.0 * (1.0 - self.unit()).ln()).sqrt(), TAU * self.unit());
        median * (sigma * radius * angle.cos()).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_others_others() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            [random.next(), random.next(), random.next()]
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert_eq!(noise(1, 2, 3).to_bits(), noise(1, 2, 3).to_bits());
        assert_ne!(noise(1, 2, 3).to_bits(), noise(1, 3, 2).to_bits());
    }

    #[test]
    fn distributions_have_their_means() {
        let mut random = Random::new(1);
        let count = 20_000;
        let mean = |mut draw: Box<dyn FnMut() -> f64 + '_>| {
            (0..count).map(|_| draw()).sum::<f64>() / f64::from(count)
        };
        assert!((mean(Box::new(|| random.unit())) - 0.5).abs() < 0.01);
        assert!((mean(Box::new(|| random.exponential(3.0))) - 3.0).abs() < 0.1);
        assert!((mean(Box::new(|| random.below(10) as f64)) - 4.5).abs() < 0.1);
        assert!((mean(Box::new(|| random.log_normal(2.0, 0.1))) - 2.0).abs() < 0.05);
        assert!(mean(Box::new(|| noise(3, 0, random.next()))).abs() < 0.02);
        assert_eq!(random.below(0), 0);
    }
}
