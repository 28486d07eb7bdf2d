//! The same key to the same endpoint: a session, a user, a conversation. Pure: hashes, shares and loads come in.
//!
//! Rendezvous hashing, so an endpoint that comes or goes moves its own keys only and all replicas of a gateway agree
//! without talking; weighted as in Mosharaf, *Weighted Distributed Hash Tables* (2016): the highest `-share / ln(h)`
//! wins. Loads are bounded as in consistent hashing with bounded loads (Mirrokni et al., 2018): a key whose endpoint is
//! full goes to its next one, for as long as that is so.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Seen, has_room};

/// The first endpoint of the key's order that has room, else the first one.
pub fn pick(key: u64, seen: &[Seen]) -> Option<usize> {
    let total = seen.iter().map(|seen| seen.in_flight).sum();
    let mut ranked: Vec<(f32, usize)> = seen
        .iter()
        .enumerate()
        .map(|(at, seen)| (score(key, *seen), at))
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let roomy = ranked
        .iter()
        .find(|(_, at)| seen.get(*at).is_some_and(|seen| has_room(*seen, total)));
    roomy.or(ranked.first()).map(|(_, at)| *at)
}

/// How high an endpoint stands in a key's order.
pub(super) fn score(key: u64, seen: Seen) -> f32 {
    -seen.share / drawn(xxh3_64_with_seed(&seen.name.to_le_bytes(), key)).ln()
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

    fn idle(shares: &[f32]) -> Vec<Seen> {
        let names = (100u64..).zip(shares);
        names
            .map(|(name, share)| Seen {
                in_flight: 0,
                share: *share,
                name,
            })
            .collect()
    }

    #[test]
    fn keys_spread_by_share() {
        let seen = idle(&[0.5, 0.3, 0.2]);
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
        let mut seen = idle(&[0.5, 0.5]);
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
            let seen = idle(&[0.2; 5]);
            let before = pick(key, &seen).unwrap();
            let mut left = seen.clone();
            left.remove(gone);
            let after = left[pick(key, &left).unwrap()].name;
            if before != gone {
                prop_assert_eq!(after, seen[before].name);
            }
        }
    }
}
