//! Whether the level of figures has changed: cumulative sums of what they are off a forgetting mean (Andreolini and
//! others, as the DRS thesis has it).
//!
//! ```text
//!   μ ← α·x + (1 − α)·μ                       rise ← max(0, rise + x − μ − K)
//!   H = h·max(σ, σ_min)                       fall ← max(0, fall + μ − x − K)
//!   a sum above H: the level has changed; both begin anew
//! ```
//!
//! Where the thesis' text and its published code differ, or cannot be meant, this is what was chosen:
//!
//! - One sum that may go below zero, compared as d > H in the text and |d| > H in the code. K is taken from it with every
//!   figure, so with |d| a level that stays is called a change after H/K figures. Two sums that stop at zero see both
//!   directions and do not drift.
//! - σ of all figures so far, to which the code adds 20,000 random ones at the start, so that H hardly moves for days.
//!   Here σ forgets (about [`SPREAD_ALPHA`]⁻¹ figures count), does not contain the figure that is judged, and is at least
//!   σ_min; nothing random is needed.
//! - h is 7 in the text, and the code takes 3 from it for CPU: a setting, 7 unless set.

use super::ewma::{Ewma, Spread};

/// Weight of a figure in σ.
pub const SPREAD_ALPHA: f64 = 0.01;

/// What a change is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// α: weight of a figure in the mean.
    pub alpha: f64,
    /// K: what a figure may be off without counting; half of the change that is to be seen.
    pub slack: f64,
    /// h: how many σ the sum of what figures are off must exceed.
    pub sigmas: f64,
    /// σ is taken to be at least this.
    pub sigma_min: f64,
}

/// Where the level went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Up.
    Rise,
    /// Down.
    Fall,
}

/// The sums of one series of figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cusum {
    tuning: Tuning,
    mean: Ewma,
    spread: Spread,
    rise: f64,
    fall: f64,
}

impl Cusum {
    /// Of figures that are to come.
    #[must_use]
    pub const fn new(tuning: Tuning) -> Self {
        let (mean, spread) = (Ewma::new(tuning.alpha), Spread::new(SPREAD_ALPHA));
        Self { tuning, mean, spread, rise: 0.0, fall: 0.0 }
    }

    /// Takes a figure and says whether the level has changed. What is no number changes nothing.
    pub fn push(&mut self, figure: f64) -> Option<Change> {
        if !figure.is_finite() {
            return None;
        }
        let figure = figure.clamp(-super::VALUE_MAX, super::VALUE_MAX);
        let mean = self.mean.push(figure)?;
        let above = self.tuning.sigmas * self.spread.sigma().max(self.tuning.sigma_min);
        self.spread.push(figure);
        self.rise = (self.rise + figure - mean - self.tuning.slack).max(0.0);
        self.fall = (self.fall + mean - figure - self.tuning.slack).max(0.0);
        let change = match (self.rise > above, self.fall > above) {
            (true, _) => Change::Rise,
            (_, true) => Change::Fall,
            _ => return None,
        };
        (self.rise, self.fall) = (0.0, 0.0);
        Some(change)
    }

    /// The mean.
    #[must_use]
    pub const fn mean(&self) -> Option<f64> {
        self.mean.get()
    }
}
