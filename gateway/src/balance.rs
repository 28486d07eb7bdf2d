//! Choosing one of several. Pure: loads, weights, times and randomness come in, an index goes out. A file a strategy.

pub mod hash;
pub mod least_requests;
pub mod peak_ewma;
pub mod power_of_two;
pub mod prefix_affinity;
pub mod round_robin;

/// How far above its share an endpoint's requests in flight may go (consistent hashing with bounded loads, Mirrokni et
/// al., 2018; the factor is the one that KubeAI runs with).
const BOUND: f32 = 1.25;

/// An endpoint, as strategies with affinity see it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Its requests in flight.
    pub in_flight: u32,
    /// Its part of the traffic, of all that are seen.
    pub share: f32,
    /// Hash of its address, the same in all replicas.
    pub name: u64,
}

/// Whether one more request keeps it within [`BOUND`] times its share of `total` requests in flight.
fn has_room(seen: Seen, total: u32) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^23")]
    let (mine, all) = (seen.in_flight as f32 + 1.0, total as f32 + 1.0);
    mine <= (BOUND * all * seen.share).ceil()
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
    fn nobody_eligible_is_nobody_chosen() {
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
        fn endpoint_has_the_lowest_load(loads in prop::collection::vec((0_u32..5, any::<bool>()), 1..10), turn in 0_usize..1000) {
            let picked = endpoint(loads.len(), turn, |index| loads[index].0, |index| loads[index].1);
            let lowest = loads.iter().filter(|load| load.1).map(|load| load.0).min();
            prop_assert_eq!(picked.map(|index| loads[index].0), lowest);
        }
    }
}
