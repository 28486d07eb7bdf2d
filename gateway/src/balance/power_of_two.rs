//! Power of two choices (Mitzenmacher, 2001): draw two by weight, take the one that costs less. With figures that are
//! a little old, as those of any balancer are, taking the cheapest of all sends everybody to the same one; the better
//! of two random ones does not. Pure: randomness and costs come in.

use rand::{Rng, RngExt as _};

/// Draws before the rest is looked at one by one.
const DRAWS: usize = 8;

/// One of the eligible. `cumulative` holds the sums of weights up to and with each one.
pub fn pick(
    cumulative: &[f32],
    rng: &mut impl Rng,
    eligible: impl Fn(usize) -> bool,
    cost: impl Fn(usize) -> f32,
) -> Option<usize> {
    let total = *cumulative.last()?;
    let mut first = None;
    for _ in 0..DRAWS {
        let at = rng.random_range(0.0..1.0_f32) * total;
        let index = cumulative
            .partition_point(|sum| *sum <= at)
            .min(cumulative.len() - 1);
        match first {
            _ if !eligible(index) => {}
            None => first = Some(index),
            Some(first) if first != index => return Some(cheaper(first, index, &cost)),
            Some(_) => {}
        }
    }
    // Few are eligible, or one has nearly all of the weight.
    let others = (0..cumulative.len()).filter(|index| Some(*index) != first && eligible(*index));
    others.fold(first, |best, index| {
        Some(best.map_or(index, |best| cheaper(best, index, &cost)))
    })
}

fn cheaper(first: usize, second: usize, cost: impl Fn(usize) -> f32) -> usize {
    if cost(second) < cost(first) {
        second
    } else {
        first
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn sums(weights: &[f32]) -> Vec<f32> {
        let mut sum = 0.0;
        let sums = weights.iter().map(|weight| {
            sum += weight;
            sum
        });
        sums.collect()
    }

    #[test]
    fn nobody_is_nobody() {
        let mut rng = StdRng::seed_from_u64(1);
        assert_eq!(pick(&[], &mut rng, |_| true, |_| 0.0), None);
        assert_eq!(pick(&[1.0], &mut rng, |_| false, |_| 0.0), None);
    }

    proptest! {
        #[test]
        fn the_dearest_is_never_taken_where_there_are_two(
            costs in prop::collection::vec((0.0_f32..100.0, any::<bool>(), 0.01_f32..10.0), 1..12),
            seed in any::<u64>(),
        ) {
            let mut rng = StdRng::seed_from_u64(seed);
            let cumulative = sums(&costs.iter().map(|cost| cost.2).collect::<Vec<_>>());
            let eligible: Vec<usize> = (0..costs.len()).filter(|&index| costs[index].1).collect();
            let picked = pick(&cumulative, &mut rng, |index| costs[index].1, |index| costs[index].0);
            match picked {
                None => prop_assert!(eligible.is_empty()),
                Some(index) => {
                    prop_assert!(costs[index].1);
                    let dearer = eligible.iter().filter(|&&other| costs[other].0 >= costs[index].0).count();
                    prop_assert!(dearer >= eligible.len().min(2), "{costs:?} {index}");
                }
            }
        }

        #[test]
        fn load_spreads_by_weight(weights in prop::collection::vec(1.0_f32..5.0, 2..6), seed in any::<u64>()) {
            let mut rng = StdRng::seed_from_u64(seed);
            let cumulative = sums(&weights);
            let mut load = vec![0.0_f32; weights.len()];
            for _ in 0..3_000 {
                let cost = |index: usize| (load[index] + 1.0) / weights[index];
                let index = pick(&cumulative, &mut rng, |_| true, cost).unwrap();
                load[index] += 1.0;
            }
            let total: f32 = weights.iter().sum();
            for (load, weight) in load.iter().zip(&weights) {
                let fair = 3_000.0 * weight / total;
                prop_assert!((load - fair).abs() < fair * 0.1 + 10.0, "{load} for {fair}");
            }
        }
    }
}
