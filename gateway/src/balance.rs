//! Choosing one of several equals. Pure: loads and weights come in, an index goes out.

/// Smooth weighted round robin, as in nginx: each eligible one gains its weight, the highest is taken and pays the
/// sum. Proportional over any window of `sum` picks, and evenly spread inside it.
///
/// `current` holds the state, one number for each of `weights`.
pub fn smooth(
    current: &mut [i64],
    weights: &[u32],
    eligible: impl Fn(usize) -> bool,
) -> Option<usize> {
    debug_assert_eq!(current.len(), weights.len());
    let mut sum = 0;
    let mut best: Option<(usize, i64)> = None;
    for (index, (state, weight)) in current.iter_mut().zip(weights).enumerate() {
        if !eligible(index) {
            continue;
        }
        let weight = i64::from(*weight);
        *state += weight;
        sum += weight;
        if best.is_none_or(|(_, highest)| *state > highest) {
            best = Some((index, *state));
        }
    }
    let (index, _) = best?;
    if let Some(state) = current.get_mut(index) {
        *state -= sum;
    }
    Some(index)
}

/// The eligible one with the fewest requests in flight per weight, counted as if it already had the next one, so
/// that an idle heavy one comes before an idle light one. Ties are broken by [`smooth`].
pub fn least(
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
    smooth(current, weights, |index| {
        eligible(index) && !less(best, load(index))
    })
}

/// Round robin or least in flight among equals without weights: the scan begins at `turn`, so ties rotate.
pub fn endpoint(
    count: usize,
    turn: usize,
    load: impl Fn(usize) -> u32,
    eligible: impl Fn(usize) -> bool,
) -> Option<usize> {
    let mut best: Option<(usize, u32)> = None;
    for step in 0..count {
        let index = (turn % count + step) % count;
        if !eligible(index) {
            continue;
        }
        let here = load(index);
        if best.is_none_or(|(_, lowest)| here < lowest) {
            best = Some((index, here));
        }
        if here == 0 {
            break;
        }
    }
    best.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn smooth_spreads_as_nginx_does() {
        let mut current = [0; 3];
        let order: Vec<usize> = (0..7)
            .map(|_| smooth(&mut current, &[5, 1, 1], |_| true).unwrap())
            .collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(current, [0; 3]);
    }

    #[test]
    fn nobody_eligible_is_nobody_chosen() {
        assert_eq!(smooth(&mut [0], &[1], |_| false), None);
        assert_eq!(least(&mut [0], &[1], |_| 0, |_| false), None);
        assert_eq!(endpoint(3, 1, |_| 0, |_| false), None);
        assert_eq!(endpoint(0, 1, |_| 0, |_| true), None);
    }

    #[test]
    fn endpoints_take_turns_when_equal() {
        let picks: Vec<_> = (0..4)
            .map(|turn| endpoint(3, turn, |_| 2, |_| true).unwrap())
            .collect();
        assert_eq!(picks, [0, 1, 2, 0]);
    }

    proptest! {
        #[test]
        fn smooth_is_proportional(weights in prop::collection::vec(1_u32..50, 1..8)) {
            let sum: u32 = weights.iter().sum();
            let mut current = vec![0; weights.len()];
            let mut counts = vec![0_u32; weights.len()];
            for _ in 0..sum * 3 {
                counts[smooth(&mut current, &weights, |_| true).unwrap()] += 1;
            }
            prop_assert_eq!(counts, weights.iter().map(|weight| weight * 3).collect::<Vec<_>>());
        }

        #[test]
        fn least_never_leaves_a_lighter_one_aside(
            loads in prop::collection::vec((0_u64..20, 1_u32..10, any::<bool>()), 1..8),
        ) {
            let weights: Vec<u32> = loads.iter().map(|load| load.1).collect();
            let mut current = vec![0; loads.len()];
            let picked = least(&mut current, &weights, |index| loads[index].0, |index| loads[index].2);
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
        fn least_fills_by_weight(weights in prop::collection::vec(1_u32..10, 2..5)) {
            let sum: u32 = weights.iter().sum();
            let mut current = vec![0; weights.len()];
            let mut in_flight = vec![0_u64; weights.len()];
            for _ in 0..sum * 2 {
                let index = least(&mut current, &weights, |index| in_flight[index], |_| true).unwrap();
                in_flight[index] += 1;
            }
            for (load, weight) in in_flight.iter().zip(&weights) {
                prop_assert_eq!(*load, u64::from(*weight) * 2);
            }
        }

        #[test]
        fn endpoint_has_the_lowest_load(loads in prop::collection::vec((0_u32..5, any::<bool>()), 1..10), turn in 0_usize..1000) {
            let picked = endpoint(loads.len(), turn, |index| loads[index].0, |index| loads[index].1);
            let lowest = loads.iter().filter(|load| load.1).map(|load| load.0).min();
            prop_assert_eq!(picked.map(|index| loads[index].0), lowest);
        }
    }
}
