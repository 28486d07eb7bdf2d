//! Prompts that begin alike go to the same endpoint, whose KV cache then holds that beginning. Pure: hashes, loads and
//! what is known of caches come in.
//!
//! Affinity holds until the endpoint is saturated (see [`has_room`]). Without that bound affinity is worse than chance
//! under load.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Seen, has_room, hash};

/// A block of a prompt: 64 tokens of about 4 bytes, which is four of vLLM's blocks.
pub const BLOCK_BYTES: usize = 256;
/// What lies beyond decides nothing: 128 blocks are about 8,000 tokens.
const MAX_BLOCKS: usize = 128;
/// Blocks that one generation of an index holds; there are two, and each entry takes 80 bytes or so at most.
const MAX_KNOWN: usize = 65_536;
/// Endpoints that are remembered for one block.
const MAX_OWNERS: usize = 8;
/// Which endpoint of a process's life: see `EndpointLive::id`.
pub type Owner = u32;

/// Whether an endpoint that was sent so many of a prompt's blocks knows it: then what is saved is more than what is
/// computed anyway (Preble's rule, Srivatsa et al., 2025).
fn is_known(matched: usize, blocks: usize) -> bool {
    matched > blocks / 2
}

/// A hash for each whole block at the beginning of a prompt, which comes in `pieces`, of that block and all before it.
pub fn blocks(pieces: &[&[u8]]) -> Vec<u64> {
    let filled: Vec<&[u8]> = pieces
        .iter()
        .copied()
        .filter(|piece| !piece.is_empty())
        .collect();
    let prompt = if let [whole] = filled.as_slice() {
        Cow::Borrowed(*whole)
    } else {
        let bytes = filled.iter().copied().flatten().copied();
        Cow::Owned(bytes.take(MAX_BLOCKS * BLOCK_BYTES).collect())
    };
    let blocks = prompt.chunks_exact(BLOCK_BYTES).take(MAX_BLOCKS);
    let hashes = blocks.scan(0, |before, block| {
        *before = xxh3_64_with_seed(block, *before);
        Some(*before)
    });
    hashes.collect()
}

/// Which endpoints were sent which blocks lately. Bounded: two generations of [`MAX_KNOWN`] blocks; the older one is
/// forgotten when the younger one is full, and what is used moves to the younger one.
#[derive(Debug, Default)]
pub struct PrefixIndex(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<u64, Owners>,
    old: HashMap<u64, Owners>,
}

/// The last ones first; 0 is none.
type Owners = [Owner; MAX_OWNERS];

impl PrefixIndex {
    /// How many leading blocks each endpoint was sent, the ones with none left out.
    pub fn matched(&self, blocks: &[u64]) -> Vec<(Owner, usize)> {
        let generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut matched: Vec<(Owner, usize)> = Vec::new();
        for (index, block) in blocks.iter().enumerate() {
            let Some(owners) = generations.get(*block) else {
                break;
            };
            for owner in owners.into_iter().filter(|owner| *owner != 0) {
                match matched.iter_mut().find(|(known, _)| *known == owner) {
                    Some((_, count)) if *count == index => *count += 1,
                    None if index == 0 => matched.push((owner, 1)),
                    _ => {}
                }
            }
        }
        matched
    }

    /// Those that know the prompt, with how many of its blocks. None where they are as many as are remembered: then
    /// others know it as well, and those few are not to get all of it.
    pub fn homes(&self, blocks: &[u64]) -> Vec<(Owner, usize)> {
        let mut homes = self.matched(blocks);
        homes.retain(|(_, matched)| is_known(*matched, blocks.len()));
        if homes.len() >= MAX_OWNERS {
            homes.clear();
        }
        homes
    }

    /// These blocks go to `owner` now.
    pub fn learn(&self, blocks: &[u64], owner: Owner) {
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for block in blocks {
            let mut owners = generations.get(*block).unwrap_or_default();
            let at = owners.iter().position(|known| *known == owner);
            owners[..=at.unwrap_or(MAX_OWNERS - 1)].rotate_right(1);
            owners[0] = owner;
            generations.put(*block, owners);
        }
    }
}

impl Generations {
    fn get(&self, block: u64) -> Option<Owners> {
        self.young
            .get(&block)
            .or_else(|| self.old.get(&block))
            .copied()
    }

    fn put(&mut self, block: u64, owners: Owners) {
        if self.young.len() >= MAX_KNOWN && !self.young.contains_key(&block) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(block, owners);
    }
}

/// The one with room that was sent the most of the prompt, if it knows it (see [`is_known`]). Else the cheaper of the
/// two with room that the first block's hash falls to, so that all replicas of a gateway learn a new prompt in the same
/// places and a new prompt does not go where all are waiting already. `owners` are the names in the index of `seen`.
/// `None`: the prompt is shorter than a block, or nobody is given.
pub fn pick(
    blocks: &[u64],
    index: &PrefixIndex,
    seen: &[Seen],
    owners: &[Owner],
    cost: impl Fn(usize) -> f32,
) -> Option<usize> {
    let first = *blocks.first()?;
    let total = seen.iter().map(|seen| seen.in_flight).sum();
    let roomy = || {
        seen.iter()
            .enumerate()
            .filter(|(_, seen)| has_room(**seen, total))
    };
    let matched = index.matched(blocks);
    let blocks_of = |owner: Owner| {
        let known = matched.iter().find(|(known, _)| *known == owner);
        known.map_or(0, |(_, count)| *count)
    };
    let best = roomy()
        .filter_map(|(at, seen)| Some((blocks_of(*owners.get(at)?), Reverse(seen.in_flight), at)))
        .filter(|(count, ..)| is_known(*count, blocks.len()))
        .max();
    if let Some((.., at)) = best {
        return Some(at);
    }
    // Rendezvous hashing by share: an endpoint that comes or goes moves its own prompts only.
    let mut ranked: Vec<(f32, usize)> = roomy()
        .map(|(at, seen)| (hash::score(first, *seen), at))
        .collect();
    ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    match ranked[..] {
        [] => None,
        [(_, at)] => Some(at),
        [(_, first), (_, second), ..] => Some(if cost(second) < cost(first) {
            second
        } else {
            first
        }),
    }
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "small counts")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::balance::{BOUND, Home};

    const HOME: Home = Home {
        name: 1,
        weight: 1.0,
    };

    fn equal(in_flight: &[u32]) -> Vec<Seen> {
        let owners = (1..).zip(in_flight);
        let share = 1.0 / in_flight.len() as f32;
        let seen = owners.map(|(owner, in_flight)| Seen {
            in_flight: *in_flight,
            share,
            name: owner,
            backend: HOME,
        });
        seen.collect()
    }

    /// In these tests an endpoint's name is its name in the index.
    fn picked(
        blocks: &[u64],
        index: &PrefixIndex,
        seen: &[Seen],
        cost: impl Fn(usize) -> f32,
    ) -> Option<usize> {
        let owners: Vec<Owner> = seen
            .iter()
            .map(|seen| Owner::try_from(seen.name).unwrap())
            .collect();
        pick(blocks, index, seen, &owners, cost)
    }

    fn free(_: usize) -> f32 {
        0.0
    }

    /// Of a prompt in one piece.
    fn blocks(prompt: &[u8]) -> Vec<u64> {
        super::blocks(&[prompt])
    }

    #[test]
    fn pieces_of_a_prompt_are_hashed_as_if_they_were_one() {
        let whole: Vec<u8> = (0..40_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        for cut in [0, 1, 255, 700, 33_000] {
            let (system, prompt) = whole.split_at(cut);
            assert_eq!(super::blocks(&[system, prompt]), blocks(&whole), "{cut}");
        }
        assert!(super::blocks(&[]).is_empty());
    }

    #[test]
    fn blocks_depend_on_all_that_came_before() {
        let (a, b) = ([b'a'; 700], [b'b'; 700]);
        let mut c = a;
        c[0] = b'c';
        assert_eq!(blocks(&a).len(), 2);
        assert_eq!(blocks(&a)[..1], blocks(&a[..300])[..]);
        assert_ne!(blocks(&a)[1], blocks(&b)[1]);
        assert_ne!(
            blocks(&a)[1],
            blocks(&c)[1],
            "the same block after another one"
        );
        assert!(blocks(&[b'x'; 255]).is_empty());
        assert_eq!(blocks(&vec![0; 1 << 20]).len(), MAX_BLOCKS);
    }

    #[test]
    fn the_longest_match_with_room_is_taken() {
        let index = PrefixIndex::default();
        let prompt = blocks(&[b'a'; 2048]);
        index.learn(&prompt[..5], 1);
        index.learn(&prompt, 2);
        assert_eq!(index.matched(&prompt), [(2, 8), (1, 5)]);
        assert_eq!(picked(&prompt, &index, &equal(&[0, 0, 0]), free), Some(1));
        assert_eq!(
            picked(&prompt, &index, &equal(&[0, 9, 0]), free),
            Some(0),
            "2 is saturated"
        );
        assert_eq!(picked(&prompt, &index, &equal(&[9, 9, 0]), free), Some(2));
    }

    #[test]
    fn homes_know_most_of_a_prompt_and_are_few() {
        let index = PrefixIndex::default();
        let prompt = blocks(&[b'a'; 2048]);
        assert!(index.homes(&prompt).is_empty() && index.homes(&[]).is_empty());
        index.learn(&prompt[..4], 1);
        index.learn(&prompt[..5], 2);
        assert_eq!(index.homes(&prompt), [(2, 5)]);
        let remembered = Owner::try_from(MAX_OWNERS).unwrap();
        (1..remembered).for_each(|owner| index.learn(&prompt, owner));
        assert_eq!(index.homes(&prompt).len(), MAX_OWNERS - 1);
        index.learn(&prompt, remembered);
        assert!(index.homes(&prompt).is_empty(), "known everywhere");
    }

    #[test]
    fn what_is_mostly_new_goes_where_it_costs_less() {
        let index = PrefixIndex::default();
        let prompt = blocks(&[b'a'; 2048]);
        index.learn(&prompt[..4], 1);
        let places = |dear: usize| {
            let cost = |at: usize| if at == dear { 9.0 } else { 1.0 };
            picked(&prompt, &index, &equal(&[0, 0, 0]), cost).unwrap()
        };
        let picked = [0, 1, 2].map(places);
        assert!((0..3).all(|dear| picked[dear] != dear), "{picked:?}");
        let different: std::collections::BTreeSet<_> = picked.into_iter().collect();
        assert_eq!(
            different.len(),
            2,
            "two places, the same ones for all replicas: {picked:?}"
        );
    }

    #[test]
    fn new_prompts_fall_by_share() {
        let index = PrefixIndex::default();
        let mut seen = equal(&[0; 4]);
        seen[0].share = 0.7;
        seen[1..].iter_mut().for_each(|light| light.share = 0.1);
        let prompts = (0..1_000_u32).map(|prompt| blocks(&prompt.to_le_bytes().repeat(64)));
        let heavy = prompts.filter(|prompt| picked(prompt, &index, &seen, free) == Some(0));
        let count = heavy.count();
        assert!(count.abs_diff(700) < 60, "{count}");
    }

    #[test]
    fn new_prompts_stay_where_they_are_when_an_endpoint_goes() {
        let index = PrefixIndex::default();
        let prompts: Vec<_> = (0..200_u8).map(|byte| blocks(&[byte; 256])).collect();
        let of = |endpoints: &[u32]| -> Vec<u32> {
            let seen: Vec<Seen> = endpoints
                .iter()
                .map(|owner| Seen {
                    in_flight: 0,
                    share: 1.0,
                    name: u64::from(*owner),
                    backend: HOME,
                })
                .collect();
            let at = |prompt: &Vec<u64>| picked(prompt, &index, &seen, free).unwrap();
            prompts.iter().map(|prompt| endpoints[at(prompt)]).collect()
        };
        let (all, fewer) = (of(&[1, 2, 3]), of(&[1, 3]));
        for (before, after) in all.iter().zip(&fewer) {
            assert!(*before == 2 || before == after);
        }
        for owner in 1..=3 {
            assert!(all.iter().filter(|of| **of == owner).count() > 40);
        }
    }

    #[test]
    fn what_is_known_is_bounded_and_what_is_used_stays() {
        let index = PrefixIndex::default();
        let used = blocks(&[b'u'; 512]);
        for number in 0..4 * MAX_KNOWN as u64 {
            index.learn(&[number.wrapping_mul(0x9E37_79B9_7F4A_7C15)], 1);
            if number % 1000 == 0 {
                index.learn(&used, 2);
            }
        }
        let generations = index.0.lock().unwrap();
        assert!(generations.young.len() + generations.old.len() <= 2 * MAX_KNOWN);
        drop(generations);
        assert_eq!(index.matched(&used), [(2, 2)]);
    }

    proptest! {
        #[test]
        fn nobody_is_sent_more_than_the_bound(
            requests in prop::collection::vec((0_u8..3, any::<bool>()), 1..200),
            endpoints in 1_usize..6,
        ) {
            let index = PrefixIndex::default();
            let mut in_flight = vec![0; endpoints];
            for (prompt, ends) in requests {
                let prompt = blocks(&[prompt; 512]);
                let seen = equal(&in_flight);
                let at = picked(&prompt, &index, &seen, free).expect("among equals somebody has room");
                index.learn(&prompt, Owner::try_from(seen[at].name).unwrap());
                in_flight[at] += 1;
                let total: u32 = in_flight.iter().sum();
                prop_assert!(in_flight[at] as f32 <= (BOUND * total as f32 / endpoints as f32).ceil());
                if ends {
                    let busiest = in_flight.iter_mut().max().unwrap();
                    *busiest -= 1;
                }
            }
        }
    }
}
