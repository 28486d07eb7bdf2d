//! The cheapest that is quick enough. Pure.

use rand::Rng;

use super::{Offer, cost, latency};

/// The cheapest of those whose first token is expected within `target_ms`; where none is, the quickest, a weight of 2
/// counting as twice as quick. One of which
/// nothing is known is taken to be quick enough until it has shown what it does. Without a target all are.
pub fn pick(
    offers: &[Offer],
    target_ms: Option<u64>,
    cumulative: &[f32],
    rng: &mut impl Rng,
) -> Option<usize> {
    #[expect(clippy::cast_precision_loss, reason = "a target is a rough figure")]
    let target_ms = target_ms.map_or(f32::INFINITY, |ms| ms as f32);
    let in_time = |offer: &Offer| (offer.ttft_ms <= target_ms).then_some(offer.price);
    cost::lowest(offers, cumulative, rng, in_time).or_else(|| {
        let expected = offers.iter().map(|offer| offer.ttft_ms / offer.weight);
        latency::least(&expected.collect::<Vec<f32>>())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::balance::tests::{offers, sums};

    proptest! {
        #[test]
        fn it_is_the_cheapest_in_time_or_the_quickest(
            given in prop::collection::vec((0_u128..4, 0.0_f32..1_000.0, 0.0_f32..9.0, 0.01_f32..1.0), 1..9),
            target in 1_u16..1_000,
            seed in any::<u64>(),
        ) {
            let (offers, cumulative) = (offers(&given), sums(&given));
            let picked = pick(&offers, Some(target.into()), &cumulative, &mut StdRng::seed_from_u64(seed)).unwrap();
            let picked = offers[picked];
            let in_time: Vec<&Offer> = offers.iter().filter(|offer| offer.ttft_ms <= f32::from(target)).collect();
            if in_time.is_empty() {
                let per_weight = |offer: &Offer| offer.ttft_ms / offer.weight;
                prop_assert!(offers.iter().all(|other| per_weight(&picked) <= per_weight(other)));
            } else {
                prop_assert!(picked.ttft_ms <= f32::from(target));
                prop_assert!(in_time.iter().all(|other| picked.price <= other.price));
            }
        }

        #[test]
        fn without_a_target_it_is_the_cheapest(
            given in prop::collection::vec((0_u128..4, 0.0_f32..1_000.0, 0.0_f32..9.0, 0.01_f32..1.0), 1..9),
            seed in any::<u64>(),
        ) {
            let (offers, cumulative) = (offers(&given), sums(&given));
            let of = |seed| StdRng::seed_from_u64(seed);
            prop_assert_eq!(
                pick(&offers, None, &cumulative, &mut of(seed)),
                cost::pick(&offers, &cumulative, &mut of(seed))
            );
        }
    }
}
