//! The same key to the same endpoint for as long as it is there, however busy it is. Pure: hashes and shares come in.
//!
//! The order of endpoints is that of [`super::hash`], so all replicas agree without talking, and an endpoint that comes
//! or goes moves its own keys only. There is no bound of load: a session that moves loses what its endpoint holds for
//! it.

use super::Seen;
use super::hash::Rank;

/// The key's endpoint.
pub fn pick(key: u64, seen: &[Seen]) -> Option<usize> {
    let ranks = seen.iter().map(|seen| Rank::of(key, *seen)).enumerate();
    ranks.max_by(|a, b| a.1.cmp(b.1)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::balance::{Home, hash};

    fn seen(in_flight: &[u32]) -> Vec<Seen> {
        let share = 1.0 / f32::from(u8::try_from(in_flight.len()).unwrap());
        let names = (100_u64..).zip(in_flight);
        names
            .map(|(name, in_flight)| Seen {
                in_flight: *in_flight,
                share,
                name,
                backend: Home {
                    name: 1,
                    weight: 1.0,
                },
            })
            .collect()
    }

    #[test]
    fn nobody_is_nobody_chosen() {
        assert_eq!(pick(7, &[]), None);
    }

    proptest! {
        #[test]
        fn load_moves_no_key(key in any::<u64>(), load in prop::collection::vec(0_u32..1_000, 5)) {
            prop_assert_eq!(pick(key, &seen(&load)), pick(key, &seen(&[0; 5])));
        }

        #[test]
        fn it_is_the_first_choice_of_hash(key in any::<u64>()) {
            prop_assert_eq!(pick(key, &seen(&[0; 5])), hash::pick(key, &seen(&[0; 5])));
        }

        #[test]
        fn an_endpoint_that_comes_or_goes_moves_its_own_keys_only(key in any::<u64>(), gone in 0_usize..5) {
            let all = seen(&[0; 5]);
            let mut left = all.clone();
            left.remove(gone);
            let (before, after) = (all[pick(key, &all).unwrap()].name, left[pick(key, &left).unwrap()].name);
            prop_assert!(before == all[gone].name || before == after);
        }
    }
}
