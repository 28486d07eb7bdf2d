//! Fewest requests in flight per weight. Pure.

use super::round_robin;

/// The eligible one with the fewest requests in flight per weight, counted as if it already had the next one, so
/// that an idle heavy one comes before an idle light one. Ties are broken by [`round_robin`].
pub fn pick(
    current: &mut [i64],
    weights: &[u32],
    in_flight: impl Fn(usize) -> u64,
    eligible: impl Fn(usize) -> bool,
) -> Option<usize> {
    let load = |index: usize| (in_flight(index) + 1, u64::from(weights[index].max(1)));
    let less = |(a, wa): (u64, u64), (b, wb): (u64, u64)| a * wb < b * wa;
    let mut best: Option<(u64, u64)> = None;
    let mut tie = false;
    let mut first = 0;
    for index in (0..weights.len()).filter(|&index| eligible(index)) {
        let here = load(index);
        match best {
            Some(so_far) if !less(here, so_far) => tie = tie || !less(so_far, here),
            _ => {
                best = Some(here);
                first = index;
                tie = false;
            }
        }
    }
    let best = best?;
    if !tie {
        return Some(first);
    }
    round_robin::pick(current, weights, |index| {
        eligible(index) && !less(best, load(index))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nobody_eligible_is_nobody_chosen() {
        assert_eq!(pick(&mut [0], &[1], |_| 0, |_| false), None);
    }

    proptest! {
        #[test]
        fn it_never_leaves_a_lighter_one_aside(
            loads in prop::collection::vec((0_u64..20, 1_u32..10, any::<bool>()), 1..8),
        ) {
            let weights: Vec<u32> = loads.iter().map(|load| load.1).collect();
            let mut current = vec![0; loads.len()];
            let picked = pick(&mut current, &weights, |index| loads[index].0, |index| loads[index].2);
            match picked {
                None => prop_assert!(loads.iter().all(|load| !load.2)),
                Some(index) => {
                    prop_assert!(loads[index].2);
                    for load in loads.iter().filter(|load| load.2) {
                        prop_assert!((loads[index].0 + 1) * u64::from(load.1) <= (load.0 + 1) * u64::from(weights[index]));
                    }
                }
            }
        }

        #[test]
        fn it_fills_by_weight(weights in prop::collection::vec(1_u32..10, 2..5)) {
            let sum: u32 = weights.iter().sum();
            let mut current = vec![0; weights.len()];
            let mut in_flight = vec![0_u64; weights.len()];
            for _ in 0..sum * 2 {
                let index = pick(&mut current, &weights, |index| in_flight[index], |_| true).unwrap();
                in_flight[index] += 1;
            }
            for (load, weight) in in_flight.iter().zip(&weights) {
                prop_assert_eq!(*load, u64::from(*weight) * 2);
            }
        }
    }
}
