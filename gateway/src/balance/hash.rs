//! The same key to the same endpoint: a session, a user, a conversation. Pure: hashes, shares and loads come in.
//!
//! Rendezvous hashing, of backends and then of the first one's endpoints: so an endpoint that comes or goes moves its
//! own keys only, and no key of another backend, and all replicas of a gateway agree without talking. Backends by
//! weight, as in Mosharaf, *Weighted Distributed Hash Tables* (2016): the highest `-weight / ln(h)` wins. Loads are
//! bounded as in consistent hashing with bounded loads (Mirrokni et al., 2018): a key whose endpoint is full goes to
//! its next one, for as long as that is so.

use std::cmp::Ordering;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Seen, has_room};

/// The first endpoint of the key's order that has room, else the first one.
pub fn pick(key: u64, seen: &[Seen]) -> Option<usize> {
    let total = seen.iter().map(|seen| seen.in_flight).sum();
    let mut ranked: Vec<(Rank, usize)> = seen
        .iter()
        .enumerate()
        .map(|(at, seen)| (Rank::of(key, *seen), at))
        .collect();
    ranked.sort_by(|a, b| b.0.cmp(a.0));
    let roomy = ranked
        .iter()
        .find(|(_, at)| seen.get(*at).is_some_and(|seen| has_room(*seen, total)));
    roomy.or(ranked.first()).map(|(_, at)| *at)
}

/// Where an endpoint stands in a key's order; the greatest is first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rank {
    backend: f32,
    endpoint: f32,
}

impl Rank {
    pub(super) fn of(key: u64, seen: Seen) -> Self {
        Self {
            backend: drawn_for(key, seen.backend.name, seen.backend.weight),
            endpoint: drawn_for(key, seen.name, 1.0),
        }
    }

    pub(super) fn cmp(self, other: Self) -> Ordering {
        let backends = self.backend.total_cmp(&other.backend);
        backends.then(self.endpoint.total_cmp(&other.endpoint))
    }
}

/// How high an endpoint stands in a key's order if all are of one backend.
pub(super) fn score(key: u64, seen: Seen) -> f32 {
    drawn_for(key, seen.name, seen.share)
}

fn drawn_for(key: u64, name: u64, weight: f32) -> f32 {
    -weight / drawn(xxh3_64_with_seed(&name.to_le_bytes(), key)).ln()
}

/// A hash as a number between 0 and 1, neither of them included.
pub fn drawn(hash: u64) -> f32 {
    // Its upper 24 bits: as many as an f32 holds.
    let upper = u16::try_from(hash >> 48).unwrap_or(0);
    let lower = u8::try_from((hash >> 40) & 0xff).unwrap_or(0);
    (f32::from(upper) * 256.0 + f32::from(lower) + 0.5) / 16_777_216.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::balance::Home;

    /// Backends of some weights, and how many endpoints each has.
    fn idle(backends: &[(f32, u16)]) -> Vec<Seen> {
        let total: f32 = backends.iter().map(|(weight, _)| weight).sum();
        let backends = (1_u64..).zip(backends);
        let each = backends.flat_map(|(backend, (weight, count))| {
            (0..*count).map(move |number| Seen {
                in_flight: 0,
                share: weight / total / f32::from(*count),
                name: backend * 1_000 + u64::from(number),
                backend: Home {
                    name: backend,
                    weight: *weight,
                },
            })
        });
        each.collect()
    }

    #[test]
    fn keys_spread_by_share() {
        let seen = idle(&[(5.0, 1), (3.0, 1), (2.0, 1)]);
        let mut counts = [0_u32; 3];
        for key in 0..10_000_u64 {
            counts[pick(key.wrapping_mul(0x9e37_79b9_7f4a_7c15), &seen).unwrap()] += 1;
        }
        for (count, expected) in counts.iter().zip([5_000, 3_000, 2_000]) {
            assert!(count.abs_diff(expected) < 250, "{counts:?}");
        }
    }

    #[test]
    fn a_full_endpoint_passes_a_key_on_and_gets_it_back() {
        let mut seen = idle(&[(1.0, 2)]);
        let home = pick(7, &seen).unwrap();
        seen[home].in_flight = 10;
        assert_eq!(pick(7, &seen), Some(1 - home));
        seen[home].in_flight = 0;
        assert_eq!(pick(7, &seen), Some(home));
        assert_eq!(pick(7, &[]), None);
    }

    proptest! {
        #[test]
        fn an_endpoint_that_goes_moves_its_own_keys_only(key in any::<u64>(), gone in 0usize..5) {
            let seen = idle(&[(1.0, 5)]);
            let before = pick(key, &seen).unwrap();
            let mut left = seen.clone();
            left.remove(gone);
            let after = left[pick(key, &left).unwrap()].name;
            if before != gone {
                prop_assert_eq!(after, seen[before].name);
            }
        }

        #[test]
        fn an_endpoint_that_comes_moves_no_key_of_another_backend(key in any::<u64>(), count in 1_u16..5) {
            let of = |seen: &[Seen]| seen[pick(key, seen).unwrap()];
            let (before, after) = (of(&idle(&[(1.0, count), (2.0, 3)])), of(&idle(&[(1.0, count + 1), (2.0, 3)])));
            prop_assert_eq!(before.backend, after.backend);
            prop_assert!(before.backend.name == 1 || before.name == after.name);
        }
    }
}
