//! A level that has risen and is too high (DRS thesis).
//!
//! The thesis' text asks that the level changes (CUSUM) and that its mean is too high; its code asks that of memory, and of
//! a guest's steal only that the mean is too high. Taken at its word, the former never finds what rises while the mean,
//! which follows slowly, is still low; nor a level that was too high from the first figure; nor one that creeps up in steps
//! that are no change. So: once a rise was seen it counts until a fall is, and a mean that stays too high for `settled`
//! figures counts as one.

use crate::detect::settings::CusumSettings;
use crate::series::cusum::{Change, Cusum};

/// What is known of one level.
#[derive(Debug, Clone)]
pub struct Level {
    cusum: Cusum,
    has_risen: bool,
    high_for: usize,
    since_s: Option<f64>,
    last_s: Option<f64>,
}

/// Too high, and what that rests on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Risen {
    /// The newest figure.
    pub current: f64,
    /// The forgetting mean.
    pub mean: f64,
    /// Since when the mean is too high, seconds.
    pub since_s: f64,
    /// For how many figures it was.
    pub high_for: usize,
    /// Whether the rise was seen; otherwise it has been so high for long.
    pub was_seen: bool,
}

impl Level {
    /// Of figures that are to come.
    #[must_use]
    pub const fn new(settings: &CusumSettings) -> Self {
        let cusum = Cusum::new(settings.tuning());
        Self { cusum, has_risen: false, high_for: 0, since_s: None, last_s: None }
    }

    /// Takes a figure and says whether its level is too high now. After a silence of more than `gap_s`, it begins anew.
    pub fn judge(
        &mut self,
        settings: &CusumSettings,
        (threshold, gap_s): (f64, f64),
        figure: f64,
        now_s: f64,
    ) -> Option<Risen> {
        if !figure.is_finite() || !now_s.is_finite() {
            return None;
        }
        if self.last_s.is_some_and(|last_s| now_s - last_s > gap_s) {
            *self = Self::new(settings);
        }
        self.last_s = Some(now_s);
        match self.cusum.push(figure) {
            Some(Change::Rise) => self.has_risen = true,
            Some(Change::Fall) => self.has_risen = false,
            None => {}
        }
        let mean = self.cusum.mean()?;
        if mean <= threshold {
            (self.high_for, self.since_s) = (0, None);
            return None;
        }
        self.high_for = self.high_for.saturating_add(1);
        let since_s = self.since_s.get_or_insert(now_s).min(now_s);
        let (high_for, was_seen) = (self.high_for, self.has_risen);
        let is_one = was_seen || high_for >= settings.settled;
        is_one.then_some(Risen { current: figure, mean, since_s, high_for, was_seen })
    }
}
