//! A mean that forgets, and the spread of figures about it.

/// An exponentially weighted mean: each figure moves it by a share of the distance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ewma {
    alpha: f64,
    value: Option<f64>,
}

impl Ewma {
    /// With the share of the distance that a figure moves it by, cut to 0 to 1; what is no number counts as 1.
    #[must_use]
    pub const fn new(alpha: f64) -> Self {
        let alpha = if alpha.is_nan() { 1.0 } else { alpha.clamp(0.0, 1.0) };
        Self { alpha, value: None }
    }

    /// Takes a figure and says the mean; the first figure is the first mean. What is no number changes nothing.
    pub fn push(&mut self, figure: f64) -> Option<f64> {
        if figure.is_finite() {
            let figure = figure.clamp(-super::VALUE_MAX, super::VALUE_MAX);
            let mean = self.value.unwrap_or(figure);
            self.value = Some(mean + self.alpha * (figure - mean));
        }
        self.value
    }

    /// The mean, once there was a figure.
    #[must_use]
    pub const fn get(&self) -> Option<f64> {
        self.value
    }
}

/// The spread of figures about their mean, forgetting at the same pace.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    mean: Ewma,
    variance: Ewma,
}

impl Spread {
    /// With the weight of a new figure, as [`Ewma::new`].
    #[must_use]
    pub const fn new(alpha: f64) -> Self {
        Self { mean: Ewma::new(alpha), variance: Ewma::new(alpha) }
    }

    /// Takes a figure.
    pub fn push(&mut self, figure: f64) {
        if !figure.is_finite() {
            return;
        }
        let figure = figure.clamp(-super::VALUE_MAX, super::VALUE_MAX);
        let before = self.mean.get().unwrap_or(figure);
        if let Some(after) = self.mean.push(figure) {
            // West's form: never negative, and without the loss of a difference of squares.
            self.variance.push((figure - before) * (figure - after));
        }
    }

    /// The standard deviation; 0 before there were two figures.
    #[must_use]
    pub fn sigma(&self) -> f64 {
        self.variance.get().unwrap_or(0.0).max(0.0).sqrt()
    }
}
