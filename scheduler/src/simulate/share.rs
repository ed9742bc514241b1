//! Fair shares of something of which there is too little.
//!
//! Invariants: nobody gets more than it wants or less than nothing; all that is there is given away as long as somebody
//! wants more.

/// What each gets of `capacity`: as much for each unit of its weight, where it wants that much (max-min fairness).
///
/// Wants and weights that are no positive number count as none.
pub(super) fn share(capacity: f64, wants: &[(f64, f64)], given: &mut Vec<f64>) {
    given.clear();
    given.extend(wants.iter().map(|(want, _)| positive(*want)));
    let total: f64 = given.iter().sum();
    let capacity = positive(capacity);
    if total <= capacity {
        return;
    }
    let mut order: Vec<usize> = (0..wants.len()).collect();
    let level = |at: &usize| {
        wants.get(*at).map_or(0.0, |(want, weight)| positive(*want) / at_least(*weight))
    };
    order.sort_by(|one, other| level(one).total_cmp(&level(other)).then(one.cmp(other)));
    let mut weights: f64 = wants.iter().map(|(_, weight)| at_least(*weight)).sum();
    let mut left = capacity;
    for at in order {
        let (Some((_, weight)), Some(given)) = (wants.get(at), given.get_mut(at)) else { continue };
        let weight = at_least(*weight);
        let fair = if weights > 0.0 { left * (weight / weights).min(1.0) } else { left };
        *given = given.min(fair);
        left = (left - *given).max(0.0);
        weights -= weight;
    }
}

/// Weights that differ by more would lose digits.
fn at_least(weight: f64) -> f64 {
    if weight.is_finite() { weight.clamp(1e-6, 1e6) } else { 1.0 }
}

fn positive(amount: f64) -> f64 {
    if amount > 0.0 && amount.is_finite() { amount } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(capacity: f64, wants: &[(f64, f64)]) -> Vec<f64> {
        let mut given = vec![];
        share(capacity, wants, &mut given);
        given
    }

    #[test]
    fn who_wants_little_gets_it_and_the_rest_is_divided() {
        assert_eq!(shares(10.0, &[(1.0, 1.0), (20.0, 1.0), (6.0, 1.0)]), [1.0, 4.5, 4.5]);
        assert_eq!(shares(10.0, &[(1.0, 1.0), (2.0, 1.0)]), [1.0, 2.0]);
        assert_eq!(shares(9.0, &[(20.0, 2.0), (20.0, 1.0)]), [6.0, 3.0]);
        assert_eq!(shares(f64::NAN, &[(f64::NAN, 1.0), (2.0, f64::NAN)]), [0.0, 0.0]);
    }

    proptest! {
        #[test]
        fn all_is_given_away_and_nobody_gets_more_than_it_wants(
            capacity in -10.0..1e4_f64,
            wants in prop::collection::vec((-5.0..1e3_f64, 0.0..10.0_f64), 0..40),
        ) {
            let given = shares(capacity, &wants);
            let wanted: f64 = wants.iter().map(|(want, _)| want.max(0.0)).sum();
            let expected = wanted.min(capacity.max(0.0));
            prop_assert!((given.iter().sum::<f64>() - expected).abs() <= 1e-6 * (1.0 + expected));
            for ((want, _), given) in wants.iter().zip(&given) {
                prop_assert!(*given >= 0.0 && *given <= want.max(0.0));
            }
        }
    }
}
