//! The nearest that is not too busy. Pure.
//!
//! Distance counts as time: what is farther must be quicker by the penalty, so callers stay near until near ones have
//! a queue that takes longer than that.

use rand::Rng;

use super::power_of_two;

/// How far an endpoint is from the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// In the same zone.
    Zone,
    /// In the same region, or nobody says where.
    Region,
    /// In another region.
    Elsewhere,
}

const DISTANCES: [Distance; 3] = [Distance::Zone, Distance::Region, Distance::Elsewhere];
/// Another zone of the region counts as this part of the penalty: round trips between zones take about 1 ms where those
/// between regions take tens, and bytes between them are paid as well.
const ZONE_PART: f32 = 0.05;

/// An endpoint, as this strategy sees it.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    /// How far it is.
    pub distance: Distance,
    /// What it is expected to need, in ms; 0 where nothing is known.
    pub expected_ms: f32,
    /// That per share of the traffic.
    pub cost_ms: f32,
}

/// What a distance counts as, in ms.
pub fn penalty(distance: Distance, penalty_ms: f32) -> f32 {
    match distance {
        Distance::Zone => 0.0,
        Distance::Region => penalty_ms * ZONE_PART,
        Distance::Elsewhere => penalty_ms,
    }
}

/// The better of two of each distance, and of these the one that needs least with its penalty; the nearer one among
/// equals. `cumulative` holds the sums of the shares up to and with each spot.
pub fn pick(
    spots: &[Spot],
    penalty_ms: f32,
    cumulative: &[f32],
    rng: &mut impl Rng,
) -> Option<usize> {
    let cost = |index: usize| {
        let spot = spots.get(index);
        spot.map_or(f32::INFINITY, |spot| spot.cost_ms)
    };
    let mut best: Option<(f32, usize)> = None;
    for distance in DISTANCES {
        let is_there = |index: usize| {
            spots
                .get(index)
                .is_some_and(|spot| spot.distance == distance)
        };
        let Some(index) = power_of_two::pick(cumulative, rng, is_there, cost) else {
            continue;
        };
        let expected_ms = spots.get(index).map_or(0.0, |spot| spot.expected_ms);
        let needs_ms = expected_ms + penalty(distance, penalty_ms);
        if best.is_none_or(|(least, _)| needs_ms < least) {
            best = Some((needs_ms, index));
        }
    }
    best.map(|(_, index)| index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn spot(distance: Distance, expected_ms: f32) -> Spot {
        Spot {
            distance,
            expected_ms,
            cost_ms: expected_ms,
        }
    }

    fn picked(spots: &[Spot], seed: u64) -> Option<usize> {
        let cumulative: Vec<f32> = (1_u8..).zip(spots).map(|(sum, _)| f32::from(sum)).collect();
        pick(spots, 100.0, &cumulative, &mut StdRng::seed_from_u64(seed))
    }

    #[test]
    fn callers_stay_near_until_the_queue_there_is_longer_than_the_way() {
        let near = |ms| spot(Distance::Region, ms);
        let far = spot(Distance::Elsewhere, 40.0);
        assert_eq!(picked(&[far, near(120.0)], 1), Some(1));
        assert_eq!(picked(&[far, near(136.0)], 1), Some(0));
        assert_eq!(picked(&[far, near(0.0)], 1), Some(1), "not known yet");
        assert_eq!(picked(&[far], 1), Some(0));
        assert_eq!(picked(&[], 1), None);
    }

    #[test]
    fn the_own_zone_comes_before_others_that_are_as_quick() {
        let other = spot(Distance::Region, 40.0);
        assert_eq!(picked(&[other, spot(Distance::Zone, 44.0)], 1), Some(1));
        assert_eq!(picked(&[other, spot(Distance::Zone, 46.0)], 1), Some(0));
    }

    proptest! {
        #[test]
        fn nothing_farther_is_taken_that_is_not_quicker_by_the_penalty(
            given in prop::collection::vec((0_usize..3, 0.0_f32..500.0), 1..9),
            seed in any::<u64>(),
        ) {
            let spots: Vec<Spot> = given.iter().map(|(distance, ms)| spot(DISTANCES[*distance], *ms)).collect();
            let chosen = spots[picked(&spots, seed).unwrap()];
            let nearer = DISTANCES.into_iter().filter(|distance| *distance < chosen.distance);
            for distance in nearer {
                // Power of two may see the slowest of a distance only where there is one.
                let slowest = spots.iter().filter(|spot| spot.distance == distance).map(|spot| spot.expected_ms);
                let slowest = slowest.fold(f32::NEG_INFINITY, f32::max);
                if slowest > f32::NEG_INFINITY {
                    let needs = chosen.expected_ms + penalty(chosen.distance, 100.0);
                    prop_assert!(needs <= slowest + penalty(distance, 100.0));
                }
            }
        }
    }
}
