//! Figures over time, bounded in memory, and what can be said about them.
//!
//! | module | what it holds |
//! |---|---|
//! | here | the last figures of something: mean, spread, percentiles |
//! | [`ewma`] | a mean that forgets, and the spread about it |
//! | [`ar1`] | what the next figure is expected to be |
//! | [`cusum`] | whether the level has changed |
//!
//! Invariants: whatever is fed, nothing panics, a [`Series`] never holds more than it was made for, and every answer is a
//! finite number. Figures that are no numbers count as not taken. Times come from elsewhere: a clock that was set back
//! shifts what is held, so that intervals between earlier figures stay as they were.

pub mod ar1;
pub mod cusum;
pub mod ewma;

use std::collections::VecDeque;

/// Figures are cut to this, so that sums of squares stay finite.
const VALUE_MAX: f64 = 1e15;

/// A figure and when it was taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// In seconds, on the clock of whoever feeds the series.
    pub at_s: f64,
    /// The figure.
    pub value: f64,
}

/// The last figures of something, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    samples: VecDeque<Sample>,
    len_max: usize,
    age_max_s: f64,
    gap_max_s: f64,
}

impl Series {
    /// Holds so many figures (at least one), of any age.
    #[must_use]
    pub fn new(len_max: usize) -> Self {
        Self {
            samples: VecDeque::new(),
            len_max: len_max.max(1),
            age_max_s: f64::INFINITY,
            gap_max_s: f64::INFINITY,
        }
    }

    /// Figures that are older than this when another one comes are dropped.
    #[must_use]
    pub fn within(mut self, age_max_s: f64) -> Self {
        self.age_max_s = age_max_s;
        self
    }

    /// After a longer silence than this, figures from before say nothing: all of them are dropped.
    #[must_use]
    pub fn without_gaps(mut self, gap_max_s: f64) -> Self {
        self.gap_max_s = gap_max_s;
        self
    }

    /// Takes a figure; whether it was one. A second one of the same moment takes the place of the first.
    pub fn push(&mut self, at_s: f64, value: f64) -> bool {
        if !at_s.is_finite() || !value.is_finite() {
            return false;
        }
        let sample = Sample { at_s, value: value.clamp(-VALUE_MAX, VALUE_MAX) };
        if let Some(last) = self.samples.back_mut() {
            let since_s = at_s - last.at_s;
            if since_s == 0.0 {
                *last = sample;
                return true;
            }
            if since_s > self.gap_max_s {
                self.samples.clear();
            } else if since_s < 0.0 {
                self.samples.iter_mut().for_each(|earlier| earlier.at_s += since_s);
            }
        }
        self.samples.push_back(sample);
        while self.samples.len() > self.len_max
            || self.samples.front().is_some_and(|first| at_s - first.at_s > self.age_max_s)
        {
            self.samples.pop_front();
        }
        true
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// How many figures it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The newest.
    #[must_use]
    pub fn last(&self) -> Option<Sample> {
        self.samples.back().copied()
    }

    /// All of them, oldest first.
    pub fn samples(&self) -> impl DoubleEndedIterator<Item = Sample> + ExactSizeIterator + '_ {
        self.samples.iter().copied()
    }

    /// The figures without their times, oldest first.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = f64> + ExactSizeIterator + Clone + '_ {
        self.samples.iter().map(|sample| sample.value)
    }

    /// Their mean.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (!self.is_empty()).then(|| self.values().sum::<f64>() / self.len() as f64)
    }

    /// Their mean squared distance from the mean; 0 if all are the same.
    #[must_use]
    pub fn variance(&self) -> Option<f64> {
        let mean = self.mean()?;
        let squares: f64 = self.values().map(|value| (value - mean).powi(2)).sum();
        Some(squares / self.len() as f64)
    }

    /// The smallest figure that at least this share of all does not exceed; a share is cut to 0 to 1.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Option<f64> {
        percentile(&mut self.values().collect::<Vec<_>>(), share)
    }
}

/// [`Series::percentile`] of figures in any order, which it mixes up.
#[must_use]
pub fn percentile(values: &mut [f64], share: f64) -> Option<f64> {
    let last = values.len().checked_sub(1)?;
    let share = if share.is_nan() { 1.0 } else { share.clamp(0.0, 1.0) };
    let rank = (share * values.len() as f64).ceil() as usize;
    let (_, value, _) =
        values.select_nth_unstable_by(rank.saturating_sub(1).min(last), f64::total_cmp);
    Some(*value)
}

#[cfg(test)]
mod tests;
