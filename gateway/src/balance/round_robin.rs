//! Smooth weighted round robin. Pure.

/// Smooth weighted round robin, as in nginx: each eligible one gains its weight, the highest is taken and pays the
/// sum. Proportional over any window of `sum` picks, and evenly spread inside it.
///
/// `current` holds the state, one number for each of `weights`.
pub fn pick(
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_spreads_as_nginx_does() {
        let mut current = [0; 3];
        let order: Vec<usize> = (0..7)
            .map(|_| pick(&mut current, &[5, 1, 1], |_| true).unwrap())
            .collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(current, [0; 3]);
    }

    #[test]
    fn nobody_eligible_is_nobody_chosen() {
        assert_eq!(pick(&mut [0], &[1], |_| false), None);
    }

    proptest! {
        #[test]
        fn it_is_proportional(weights in prop::collection::vec(1_u32..50, 1..8)) {
            let sum: u32 = weights.iter().sum();
            let mut current = vec![0; weights.len()];
            let mut counts = vec![0_u32; weights.len()];
            for _ in 0..sum * 3 {
                counts[pick(&mut current, &weights, |_| true).unwrap()] += 1;
            }
            prop_assert_eq!(counts, weights.iter().map(|weight| weight * 3).collect::<Vec<_>>());
        }
    }
}
