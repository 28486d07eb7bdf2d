//! The cheapest, and among equally cheap ones the quicker of two. Pure.

use rand::Rng;

use super::{Offer, power_of_two};

/// One of those whose price is the lowest: of two drawn by weight the one that costs less time. `cumulative` holds the
/// sums of the shares up to and with each offer.
pub fn pick(offers: &[Offer], cumulative: &[f32], rng: &mut impl Rng) -> Option<usize> {
    lowest(offers, cumulative, rng, |offer| Some(offer.price))
}

/// One of those whose `figure` is the lowest, drawn as by [`pick`]; who has none is not chosen.
pub(super) fn lowest<T: Ord>(
    offers: &[Offer],
    cumulative: &[f32],
    rng: &mut impl Rng,
    figure: impl Fn(&Offer) -> Option<T>,
) -> Option<usize> {
    let least = offers.iter().filter_map(&figure).min()?;
    let is_lowest = |index: usize| {
        let figure = offers.get(index).and_then(&figure);
        figure.is_some_and(|figure| figure == least)
    };
    let cost = |index: usize| {
        let offer = offers.get(index);
        offer.map_or(f32::INFINITY, |offer| offer.cost_ms)
    };
    power_of_two::pick(cumulative, rng, is_lowest, cost)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::balance::tests::{offers, sums};

    #[test]
    fn nobody_is_nobody_chosen() {
        assert_eq!(pick(&[], &[], &mut StdRng::seed_from_u64(1)), None);
    }

    proptest! {
        #[test]
        fn it_is_never_dearer_than_another(
            given in prop::collection::vec((0_u128..4, 0.0_f32..9.0, 0.0_f32..9.0, 0.01_f32..1.0), 1..9),
            seed in any::<u64>(),
        ) {
            let (offers, cumulative) = (offers(&given), sums(&given));
            let picked = pick(&offers, &cumulative, &mut StdRng::seed_from_u64(seed)).unwrap();
            prop_assert!(offers.iter().all(|other| offers[picked].price <= other.price));
            // Of equally cheap ones the dearest in time is left aside where there are two.
            let equal: Vec<_> = offers.iter().filter(|other| other.price == offers[picked].price).collect();
            let slower = equal.iter().filter(|other| other.cost_ms >= offers[picked].cost_ms).count();
            prop_assert!(slower >= equal.len().min(2));
        }

        #[test]
        fn equally_cheap_ones_share_by_weight(weights in prop::collection::vec(1.0_f32..5.0, 2..5), seed in any::<u64>()) {
            let given: Vec<_> = weights.iter().map(|weight| (7_u128, 0.0, 0.0, *weight)).collect();
            let (cumulative, mut rng) = (sums(&given), StdRng::seed_from_u64(seed));
            let mut load = vec![0.0_f32; weights.len()];
            for _ in 0..3_000 {
                let now: Vec<_> = given.iter().zip(&load).map(|(given, load)| (7, 0.0, (load + 1.0) / given.3, given.3)).collect();
                load[pick(&offers(&now), &cumulative, &mut rng).unwrap()] += 1.0;
            }
            let total: f32 = weights.iter().sum();
            for (load, weight) in load.iter().zip(&weights) {
                let fair = 3_000.0 * weight / total;
                prop_assert!((load - fair).abs() < fair * 0.1 + 10.0, "{load} for {fair}");
            }
        }
    }
}
