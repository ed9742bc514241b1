//! Medians, spans and ratios of pairs.

use std::collections::BTreeMap;

/// Smallest, middle and largest of some values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Span {
    /// Smallest.
    pub(crate) min: f64,
    /// Median; the mean of the middle two if their count is even.
    pub(crate) median: f64,
    /// Largest.
    pub(crate) max: f64,
    /// How many.
    pub(crate) count: usize,
}

impl Span {
    /// Of finite values; nothing if there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let count = values.len();
        let upper = *values.get(count / 2)?;
        let lower = *values.get((count - 1) / 2)?;
        Some(Self { min, median: f64::midpoint(lower, upper), max, count })
    }
}

/// Ratios of what was measured in the same turn, in the order of turns.
pub(crate) fn ratios(ours: &BTreeMap<u32, f64>, theirs: &BTreeMap<u32, f64>) -> Vec<f64> {
    let pairs = ours.iter().filter_map(|(turn, one)| Some((one, theirs.get(turn)?)));
    pairs.filter(|(_, other)| **other != 0.0).map(|(one, other)| one / other).collect()
}

/// Value below which a share (0 to 1) of the values lies, by nearest rank.
pub(crate) fn percentile(values: &[u64], share: f64) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        let span = Span::of([3.0, f64::NAN, 1.0, 2.0, 10.0]).unwrap();
        assert_eq!(span, Span { min: 1.0, median: 2.5, max: 10.0, count: 4 });
        assert_eq!(Span::of([7.0]).unwrap().median, 7.0);
        assert_eq!(Span::of([]), None);
    }

    #[test]
    fn ratios_take_pairs_only() {
        let ours = BTreeMap::from([(0, 1.0), (1, 4.0), (3, 9.0)]);
        let theirs = BTreeMap::from([(0, 2.0), (1, 4.0), (2, 1.0), (3, 0.0)]);
        assert_eq!(ratios(&ours, &theirs), [0.5, 1.0]);
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u64> = (1..=20).rev().collect();
        assert_eq!(percentile(&values, 0.5), Some(10));
        assert_eq!(percentile(&values, 1.0), Some(20));
        assert_eq!(percentile(&values, 0.0), Some(1));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
