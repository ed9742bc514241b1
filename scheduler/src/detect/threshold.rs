//! k of n figures above a threshold, and the next one expected there.
//!
//! One figure out of line, however high, is no hotspot (unless k is 1), and neither is one that is about to end by
//! itself.

use crate::detect::settings::Settings;
use crate::series::{Series, ar1};

/// What is known of one figure over time.
#[derive(Debug, Clone)]
pub struct Threshold {
    series: Series,
    since_s: Option<f64>,
}

/// Too much, and what that rests on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exceeded {
    /// The newest figure.
    pub current: f64,
    /// The next one as it is expected.
    pub predicted: f64,
    /// When the first of the figures that are too high was taken, seconds.
    pub since_s: f64,
    /// How many figures were too high.
    pub above: usize,
    /// Out of how many.
    pub of: usize,
}

impl Threshold {
    /// Of figures that are to come.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let len_max = settings.window.max(settings.n).min(1000);
        Self { series: Series::new(len_max).without_gaps(settings.gap_s), since_s: None }
    }

    /// Takes a figure and says whether it is too much now.
    pub fn judge(
        &mut self,
        settings: &Settings,
        threshold: f64,
        figure: f64,
        now_s: f64,
    ) -> Option<Exceeded> {
        if !self.series.push(now_s, figure) {
            return None;
        }
        let newest = || self.series.samples().rev().take(settings.n.max(1));
        let too_high = || newest().filter(|sample| sample.value > threshold);
        let above = too_high().count();
        let predicted = ar1::predict(&self.series, settings.prediction)?.max(0.0);
        if above < settings.k.max(1) || predicted <= threshold {
            self.since_s = None;
            return None;
        }
        let first_s = too_high().next_back().map_or(now_s, |sample| sample.at_s);
        let current = self.series.last()?.value;
        let since_s = *self.since_s.get_or_insert(first_s);
        Some(Exceeded { current, predicted, since_s: since_s.min(now_s), above, of: settings.n })
    }
}
