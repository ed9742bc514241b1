//! Series, averages and predictions against what they must be.

use proptest::prelude::*;

use super::ar1::{self, Fit};
use super::cusum::{Change, Cusum, Tuning};
use super::ewma::{Ewma, Spread};
use super::*;

fn series(values: &[f64]) -> Series {
    let mut series = Series::new(values.len());
    for (index, value) in values.iter().enumerate() {
        assert!(series.push(index as f64, *value));
    }
    series
}

fn near(one: f64, other: f64) -> bool {
    (one - other).abs() <= 1e-9 * one.abs().max(other.abs()).max(1.0)
}

#[test]
fn percentiles_are_figures_that_were_there() {
    let figures = series(&[5.0, 1.0, 4.0, 2.0, 3.0]);
    assert_eq!(figures.percentile(0.0), Some(1.0));
    assert_eq!(figures.percentile(0.2), Some(1.0));
    assert_eq!(figures.percentile(0.5), Some(3.0));
    assert_eq!(figures.percentile(0.95), Some(5.0));
    assert_eq!(figures.percentile(f64::NAN), Some(5.0));
    assert_eq!(Series::new(3).percentile(0.5), None);
}

#[test]
fn what_is_too_old_or_too_much_is_dropped() {
    let mut figures = Series::new(3).within(25.0);
    for at_s in [0.0, 10.0, 20.0, 30.0] {
        figures.push(at_s, at_s);
    }
    assert_eq!(figures.values().collect::<Vec<_>>(), [10.0, 20.0, 30.0]);
    figures.push(40.0, 40.0);
    assert_eq!(figures.values().collect::<Vec<_>>(), [20.0, 30.0, 40.0]);
    figures.push(60.0, 60.0);
    assert_eq!(figures.values().collect::<Vec<_>>(), [40.0, 60.0]);
    figures.push(1000.0, 1.0);
    assert_eq!(figures.len(), 1);
}

#[test]
fn a_long_silence_begins_anew_and_a_short_one_does_not() {
    let mut figures = Series::new(9).without_gaps(30.0);
    for at_s in [0.0, 10.0, 40.0] {
        figures.push(at_s, 1.0);
    }
    assert_eq!(figures.len(), 3);
    figures.push(71.0, 2.0);
    assert_eq!(figures.values().collect::<Vec<_>>(), [2.0]);
}

#[test]
fn a_clock_that_is_set_back_loses_nothing() {
    let mut figures = Series::new(9).within(100.0).without_gaps(30.0);
    for at_s in [1000.0, 1010.0, 1020.0, 5.0, 15.0] {
        figures.push(at_s, at_s);
    }
    let times: Vec<f64> = figures.samples().map(|sample| sample.at_s).collect();
    assert_eq!(times, [-15.0, -5.0, 5.0, 5.0, 15.0]);
}

#[test]
fn a_step_is_expected_to_last_by_regression_and_underrated_by_the_mean() {
    let step = series(&[0.4, 0.4, 1.0, 1.0, 1.0]);
    assert!(near(ar1::regress(&step).unwrap(), 1.0));
    assert!((0.84..0.85).contains(&ar1::toward_mean(&step).unwrap()));
    let ramp = series(&[0.1, 0.2, 0.3, 0.4, 0.5]);
    assert!(near(ar1::predict(&ramp, Fit::Regression).unwrap(), 0.6));
    assert!(near(ar1::regress(&series(&[0.7; 5])).unwrap(), 0.7));
    assert_eq!(ar1::regress(&series(&[0.7])), Some(0.7));
    assert_eq!(ar1::regress(&Series::new(2)), None);
}

#[test]
fn figures_that_alternate_are_expected_to_go_on_alternating() {
    let saw = series(&[0.2, 0.9, 0.2, 0.9, 0.2, 0.9]);
    assert!(ar1::autocorrelation(&saw) < -0.8);
    assert!(near(ar1::regress(&saw).unwrap(), 0.2));
    assert!(ar1::toward_mean(&saw).unwrap() < 0.4);
}

const TUNING: Tuning = Tuning { alpha: 0.1, slack: 0.005, sigmas: 7.0, sigma_min: 0.01 };

/// Noise in -1 to 1 that is the same every time.
fn noise(index: u32) -> f64 {
    f64::from(index.wrapping_mul(2_654_435_761) >> 8) / f64::from(1 << 23) - 1.0
}

#[test]
fn a_shift_by_two_sigma_is_seen_within_fourteen_figures_and_noise_is_not() {
    let mut cusum = Cusum::new(TUNING);
    // Evenly spread: σ is the half width over √3.
    let figure = |index| 0.5 + 0.02 * noise(index);
    let early = (0..5000).filter(|index| cusum.push(figure(*index)).is_some()).count();
    assert!(early <= 5, "{early} changes in noise");
    let step = 2.0 * 0.02 / 3_f64.sqrt() + 2.0 * TUNING.slack;
    let delay = (0..100).find(|index| cusum.push(figure(5000 + index) + step).is_some());
    assert!((2..14).contains(&delay.unwrap()), "{delay:?}");
}

#[test]
fn a_level_that_stays_is_no_change_and_both_directions_are() {
    let mut cusum = Cusum::new(TUNING);
    assert!((0..10_000).all(|_| cusum.push(0.5).is_none()));
    assert_eq!(cusum.push(0.9), Some(Change::Rise));
    let fall = (0..20).find_map(|_| cusum.push(0.1));
    assert_eq!(fall, Some(Change::Fall));
    assert_eq!(cusum.push(f64::NAN), None);
}

fn any_figure() -> impl Strategy<Value = f64> {
    prop_oneof![8 => -1e3..1e3, 1 => any::<f64>(), 1 => Just(f64::NAN), 1 => Just(f64::INFINITY)]
}

proptest! {
    /// Every answer agrees with working it out on a plain list.
    #[test]
    fn answers_are_those_of_a_plain_list(
        values in prop::collection::vec(-1e3..1e3, 1..60), len_max in 1_usize..40, share in 0.0..1.0,
    ) {
        let mut held = Series::new(len_max);
        for (index, value) in values.iter().enumerate() {
            held.push(index as f64, *value);
        }
        let mut plain: Vec<f64> = values[values.len().saturating_sub(len_max)..].to_vec();
        prop_assert_eq!(held.values().collect::<Vec<_>>(), plain.clone());
        let count = plain.len() as f64;
        let mean = plain.iter().sum::<f64>() / count;
        prop_assert!(near(held.mean().unwrap(), mean));
        let squares: f64 = plain.iter().map(|value| (value - mean) * (value - mean)).sum();
        prop_assert!(near(held.variance().unwrap(), squares / count));
        let lagged: f64 = plain.windows(2).map(|pair| (pair[0] - mean) * (pair[1] - mean)).sum();
        let phi = if squares > 0.0 { lagged / squares } else { 0.0 };
        prop_assert!(near(ar1::autocorrelation(&held), phi));
        let last = plain[plain.len() - 1];
        prop_assert!(near(ar1::toward_mean(&held).unwrap(), mean + phi * (last - mean)));
        plain.sort_by(f64::total_cmp);
        let found = held.percentile(share).unwrap();
        let at_most = plain.iter().filter(|value| **value <= found).count() as f64;
        let below = plain.iter().filter(|value| **value < found).count() as f64;
        prop_assert!(at_most >= share * count - 1e-9 && below <= share * count);
    }

    /// The line of least squares: no other one through the pairs is nearer, unless its slope was cut.
    #[test]
    fn no_line_is_nearer_than_the_regression(
        values in prop::collection::vec(0.0..1.0, 4..30), tilt in -0.5..0.5, lift in -0.5..0.5,
    ) {
        let predicted = ar1::regress(&series(&values)).unwrap();
        let pairs: Vec<(f64, f64)> = values.windows(2).map(|pair| (pair[0], pair[1])).collect();
        let count = pairs.len() as f64;
        let (before, after) = pairs.iter().fold((0.0, 0.0), |sums, pair| {
            (sums.0 + pair.0 / count, sums.1 + pair.1 / count)
        });
        let last = values[values.len() - 1];
        prop_assume!((last - before).abs() > 0.05);
        let slope = (predicted - after) / (last - before);
        prop_assert!(slope.abs() <= 1.0 + 1e-6);
        prop_assume!(slope.abs() < 0.999);
        let error = |slope: f64, lift: f64| -> f64 {
            pairs.iter().map(|pair| (after + slope * (pair.0 - before) + lift - pair.1).powi(2)).sum()
        };
        prop_assert!(error(slope, 0.0) <= error(slope + tilt, lift) + 1e-9);
    }

    /// A mean that forgets is the weighted sum that it stands for.
    #[test]
    fn a_forgetting_mean_is_its_weighted_sum(
        values in prop::collection::vec(-1e3..1e3, 1..60), alpha in 0.01..1.0,
    ) {
        let mut ewma = Ewma::new(alpha);
        let mut spread = Spread::new(alpha);
        values.iter().for_each(|value| { ewma.push(*value); spread.push(*value); });
        let weight = |age: i32| alpha * (1.0 - alpha).powi(age);
        let newest_first = values[1..].iter().rev().zip(0..);
        let sum: f64 = newest_first.map(|(value, age)| value * weight(age)).sum();
        let first = values[0] * (1.0 - alpha).powi(values.len() as i32 - 1);
        prop_assert!(near(ewma.get().unwrap(), sum + first));
        let widest = values.iter().fold(0.0_f64, |widest, value| widest.max((value - values[0]).abs()));
        prop_assert!(spread.sigma() >= 0.0 && spread.sigma() <= 2.0 * widest + 1e-9);
    }

    /// Whatever is fed, at whatever time, answers are finite and memory is bounded.
    #[test]
    fn nothing_that_is_fed_does_harm(
        fed in prop::collection::vec((any_figure(), any_figure()), 0..80),
        len_max in 0_usize..20, age_max_s in any_figure(), gap_max_s in any_figure(),
    ) {
        let mut held = Series::new(len_max).within(age_max_s).without_gaps(gap_max_s);
        let mut cusum = Cusum::new(TUNING);
        let mut spread = Spread::new(0.1);
        for (at_s, value) in fed {
            held.push(at_s, value);
            cusum.push(value);
            spread.push(value);
            prop_assert!(held.len() <= len_max.max(1));
            let answers = [
                held.mean(), held.variance(), held.percentile(0.95), ar1::regress(&held),
                ar1::toward_mean(&held), cusum.mean(), Some(spread.sigma()),
            ];
            prop_assert!(answers.into_iter().flatten().all(f64::is_finite), "{:?}", answers);
        }
    }
}
