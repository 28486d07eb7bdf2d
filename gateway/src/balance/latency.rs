//! The one that is expected to answer first. Pure.
//!
//! What is not asked is not known: a few requests go to any endpoint by weight, so that one which was slow is seen to
//! have recovered. (Averages fade as well, but where answers take longer than they last, that alone would be late.)

use rand::{Rng, RngExt as _};

use super::power_of_two;

/// Part of the requests that go anywhere: Kong leaves losers 0.1 to 5 %, llm-d explores with 1 %.
pub const PROBE_SHARE: f32 = 0.02;

/// The index of the least of `expected`, but for [`PROBE_SHARE`] of the requests, which go anywhere by weight.
pub fn pick(expected: &[f32], cumulative: &[f32], rng: &mut impl Rng) -> Option<usize> {
    if rng.random::<f32>() < PROBE_SHARE {
        power_of_two::pick(cumulative, rng, |_| true, |_| 0.0)
    } else {
        least(expected)
    }
}

/// The index of the least, the first one among equals.
pub(super) fn least(expected: &[f32]) -> Option<usize> {
    let both = expected.iter().enumerate();
    both.min_by(|a, b| a.1.total_cmp(b.1)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn nobody_is_nobody_chosen() {
        assert_eq!(pick(&[], &[], &mut StdRng::seed_from_u64(1)), None);
    }

    #[test]
    fn losers_keep_a_small_share() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut counts = [0_u32; 3];
        for _ in 0..30_000 {
            counts[pick(&[10.0, 1.0, 5.0], &[0.5, 0.75, 1.0], &mut rng).unwrap()] += 1;
        }
        // Two percent by weight: 300, 150 and 150.
        assert!(counts[0].abs_diff(300) < 80, "{counts:?}");
        assert!(counts[2].abs_diff(150) < 60, "{counts:?}");
    }

    proptest! {
        #[test]
        fn the_least_is_not_above_any(expected in prop::collection::vec(0.0_f32..1e6, 1..12)) {
            let at = least(&expected).unwrap();
            prop_assert!(expected.iter().all(|other| expected[at] <= *other));
        }
    }
}
