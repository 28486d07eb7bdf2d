//! The one that can do the least, of those that can do what is asked, and among equals the quicker of two: who can do
//! more is kept for requests that need it. Pure.

use std::cmp::Reverse;

use penstock_core::config::Capabilities;
use rand::Rng;

use super::{Offer, cost};

/// How much a backend can do. Greater is more: first by what it takes besides text, then by the length of its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ability {
    lacks: Reverse<usize>,
    context_tokens: u32,
}

impl Ability {
    /// That of a backend with these `capabilities`. What it does not say, it can.
    pub fn of(capabilities: &Capabilities) -> Self {
        Self {
            lacks: Reverse(capabilities.lacks.len()),
            context_tokens: capabilities.context_tokens.unwrap_or(u32::MAX),
        }
    }
}

/// One of those that can do the least: of two drawn by weight the one that costs less time. `cumulative` holds the sums
/// of the shares up to and with each offer. Who cannot do what is asked is no offer.
pub fn pick(offers: &[Offer], cumulative: &[f32], rng: &mut impl Rng) -> Option<usize> {
    cost::lowest(offers, cumulative, rng, |offer| Some(offer.ability))
}

#[cfg(test)]
mod tests {
    use penstock_core::config::Need;
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::balance::tests::{Given, offers, sums};

    const NEEDS: [Need; 4] = [Need::Vision, Need::Audio, Need::Tools, Need::JsonSchema];

    fn capabilities(lacks: usize, context_tokens: Option<u32>) -> Capabilities {
        Capabilities {
            lacks: NEEDS.into_iter().take(lacks).collect(),
            context_tokens,
            ..Capabilities::default()
        }
    }

    #[test]
    fn who_says_nothing_can_do_most() {
        let of = |lacks, context| Ability::of(&capabilities(lacks, context));
        let ascending = [
            of(4, Some(8)),
            of(4, None),
            of(1, Some(8)),
            of(1, Some(9)),
            of(0, Some(8)),
            of(0, None),
        ];
        assert!(ascending.is_sorted());
        assert_eq!(Ability::of(&Capabilities::default()), of(0, None));
    }

    proptest! {
        #[test]
        fn it_never_can_do_more_than_another(
            given in prop::collection::vec((0_usize..3, prop::option::of(1_u32..3), 0.0_f32..9.0, 0.01_f32..1.0), 1..9),
            seed in any::<u64>(),
        ) {
            let plain: Vec<Given> = given.iter().map(|given| (0, 0.0, given.2, given.3)).collect();
            let mut offers = offers(&plain);
            for (offer, given) in offers.iter_mut().zip(&given) {
                offer.ability = Ability::of(&capabilities(given.0, given.1));
            }
            let picked = pick(&offers, &sums(&plain), &mut StdRng::seed_from_u64(seed)).unwrap();
            let picked = offers[picked];
            prop_assert!(offers.iter().all(|other| picked.ability <= other.ability));
            // Of equally able ones the dearest in time is left aside where there are two.
            let equal: Vec<_> = offers.iter().filter(|other| other.ability == picked.ability).collect();
            let slower = equal.iter().filter(|other| other.cost_ms >= picked.cost_ms).count();
            prop_assert!(slower >= equal.len().min(2));
        }
    }
}
