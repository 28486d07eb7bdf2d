//! Choosing one of several. Pure: loads, weights, times and randomness come in, an index goes out. A file a strategy.

pub mod adaptive;
pub mod capability;
pub mod cost;
pub mod cost_latency;
pub mod hash;
pub mod kv_aware;
pub mod latency;
pub mod least_requests;
pub mod least_squares;
pub mod peak_ewma;
pub mod power_of_two;
pub mod prefix_affinity;
pub mod region;
pub mod round_robin;
#[cfg(test)]
mod shares;
pub mod slow_start;
pub mod sticky;

use capability::Ability;

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
    /// Its backend.
    pub backend: Home,
}

/// A backend, as strategies see it that send a key to the same place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Home {
    /// Hash of its name, the same in all replicas.
    pub name: u64,
    /// Its weight.
    pub weight: f32,
}

/// What an endpoint would ask for a request.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Money, in pico-USD.
    pub price: u128,
    /// Time until the first token, in ms; 0 where nothing is known.
    pub ttft_ms: f32,
    /// What `PeakEwma` compares, in ms per share of the traffic.
    pub cost_ms: f32,
    /// Its backend's weight.
    pub weight: f32,
    /// How much its backend can do.
    pub ability: Ability,
}

/// Whether one more request keeps it within [`BOUND`] times its share of `total` requests in flight.
fn has_room(seen: Seen, total: u32) -> bool {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^23")]
    let (mine, all) = (seen.in_flight as f32 + 1.0, total as f32 + 1.0);
    mine <= (BOUND * all * seen.share).ceil()
}

/// Round robin or least in flight among equals without weights: the scan begins at `turn`, so ties rotate. The turns of
/// one that is not eligible go to the others by turns, not all to the next one.
pub fn endpoint(
    count: usize,
    turn: usize,
    load: impl Fn(usize) -> u32,
    eligible: impl Fn(usize) -> bool,
) -> Option<usize> {
    let mut best: Option<(usize, u32)> = None;
    let mut first = turn.checked_rem(count)?;
    if count > 1 && !eligible(first) {
        first += 1 + (turn / count) % (count - 1);
    }
    for step in 0..count {
        let index = (first + step) % count;
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
pub(crate) mod tests {
    use penstock_core::config::Capabilities;
    use proptest::prelude::*;

    use super::*;

    /// Price, time to the first token, cost and weight.
    pub(crate) type Given = (u128, f32, f32, f32);

    pub(crate) fn offers(given: &[Given]) -> Vec<Offer> {
        let offer = |given: &Given| Offer {
            price: given.0,
            ttft_ms: given.1,
            cost_ms: given.2,
            weight: given.3,
            ability: Ability::of(&Capabilities::default()),
        };
        given.iter().map(offer).collect()
    }

    pub(crate) fn sums(given: &[Given]) -> Vec<f32> {
        let sums = given.iter().scan(0.0, |sum, given| {
            *sum += given.3;
            Some(*sum)
        });
        sums.collect()
    }

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

    #[test]
    fn the_turns_of_one_that_is_out_are_shared_by_all_others() {
        for count in 2..6 {
            for out in 0..count {
                let mut turns = vec![0; count];
                for turn in 0..count * (count - 1) * 10 {
                    let picked = endpoint(count, turn, |_| 0, |index| index != out);
                    turns[picked.unwrap()] += 1;
                }
                let mut expected = vec![count * 10; count];
                expected[out] = 0;
                assert_eq!(turns, expected);
            }
        }
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
