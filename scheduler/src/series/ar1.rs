//! What the next figure is expected to be, if each figure depends on the one before.
//!
//! Sandpiper predicts û = μ + φ·(u − μ) with μ the window's mean and φ its lag-1 autocorrelation: [`toward_mean`]. In a
//! short window that contains a rise, μ lies between the two levels, and the prediction falls far behind: of 0.4, 0.4,
//! 1.0, 1.0, 1.0 it makes 0.85. [`regress`] fits the same model by least squares instead, each figure against the one
//! before it; of these figures it makes 1.0, and it follows a ramp.

use serde::{Deserialize, Serialize};

use super::Series;

/// How the model's parameters are had from the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// By least squares.
    #[default]
    Regression,
    /// The window's mean and autocorrelation, as Sandpiper has it.
    Mean,
}

/// What the next figure is expected to be, none without a figure.
#[must_use]
pub fn predict(series: &Series, fit: Fit) -> Option<f64> {
    match fit {
        Fit::Regression => regress(series),
        Fit::Mean => toward_mean(series),
    }
}

/// The correlation of figures with those before them, -1 to 1; 0 if all are the same, or there are fewer than two.
#[must_use]
pub fn autocorrelation(series: &Series) -> f64 {
    let Some(mean) = series.mean() else { return 0.0 };
    let apart = series.values().map(|value| value - mean);
    let squares: f64 = apart.clone().map(|value| value * value).sum();
    let products: f64 = apart.clone().zip(apart.skip(1)).map(|(one, next)| one * next).sum();
    divided(products, squares).clamp(-1.0, 1.0)
}

/// Back towards the mean, by as much as figures have followed those before them.
#[must_use]
pub fn toward_mean(series: &Series) -> Option<f64> {
    let (mean, last) = (series.mean()?, series.last()?.value);
    Some(mean + autocorrelation(series) * (last - mean))
}

/// On the line that figures make against those before them. With fewer than two pairs, or when all earlier figures were
/// the same, the last figure stays.
#[must_use]
pub fn regress(series: &Series) -> Option<f64> {
    let last = series.last()?.value;
    let pairs = series.values().zip(series.values().skip(1));
    let count = series.len().saturating_sub(1) as f64;
    if count < 2.0 {
        return Some(last);
    }
    let (sum_before, sum_after) =
        pairs.clone().fold((0.0, 0.0), |(before, after), pair| (before + pair.0, after + pair.1));
    let (mean_before, mean_after) = (sum_before / count, sum_after / count);
    let (mut squares, mut products) = (0.0, 0.0);
    for (before, after) in pairs {
        squares += (before - mean_before).powi(2);
        products += (before - mean_before) * (after - mean_after);
    }
    if squares <= f64::EPSILON * count * mean_before * mean_before {
        return Some(last);
    }
    let phi = divided(products, squares).clamp(-1.0, 1.0);
    Some(mean_after + phi * (last - mean_before))
}

fn divided(dividend: f64, divisor: f64) -> f64 {
    let quotient = dividend / divisor;
    if quotient.is_finite() { quotient } else { 0.0 }
}
