//! One of a tier's endpoints, by the rule's strategy: what each strategy in `balance` is given of the live state. Pure
//! but for the balancer's counters, which are passed in with the tier; time and randomness come in.
//!
//! `RoundRobin` and `LeastRequests` take a backend and then one of its endpoints, the others take an endpoint of any
//! backend.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use penstock_core::config::Strategy;
use rand::Rng;

use crate::balance::adaptive::Forecast;
use crate::balance::capability::Ability;
use crate::balance::prefix_affinity::Owner;
use crate::balance::region::Spot;
use crate::balance::{
    self, Offer, Seen, adaptive, capability, cost, cost_latency, hash, latency, least_requests,
    peak_ewma, power_of_two, prefix_affinity, region, round_robin, sticky,
};
use crate::snapshot::{Candidate, Credential, Endpoint, Rule, Slot, Tier};
use crate::wish::{Wish, sharing};

/// One of a tier's endpoints that fit, by the rule's strategy.
pub fn pick(
    rule: &Rule,
    tier: &Tier,
    wish: Wish<'_>,
    rng: &mut impl Rng,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let quicker = |rng: &mut _| quickest(tier, wish, rng, &fits);
    match rule.strategy {
        Strategy::RoundRobin => in_two_steps(tier, false, &fits),
        Strategy::LeastRequests => in_two_steps(tier, true, &fits),
        Strategy::PowerOfTwo => {
            let load = |slot: &Slot, endpoint: &Endpoint| {
                sharing(endpoint.live.in_flight.load(Ordering::Relaxed)) / slot.share
            };
            cheaper_of_two(tier, rng, load, &fits)
        }
        Strategy::PeakEwma => quicker(rng),
        Strategy::KvAware => {
            let cost = |slot: &Slot, endpoint: &Endpoint| {
                wish.cost_at(slot, endpoint) * wish.pressure_at(endpoint)
            };
            cheaper_of_two(tier, rng, cost, &fits)
        }
        Strategy::Hash => by_hash(tier, wish, &fits).or_else(|| quicker(rng)),
        Strategy::Sticky => {
            let key = wish.key;
            let home = key.and_then(|key| {
                let fitting = Fitting::of(tier, &fits);
                fitting.at(sticky::pick(key, &fitting.seen())?)
            });
            home.or_else(|| quicker(rng))
        }
        Strategy::Region => {
            let fitting = Fitting::of(tier, &fits);
            let spots = fitting.each(|place| place.spot(wish));
            let penalty_ms = rule.region_penalty_ms;
            fitting.at(region::pick(
                &spots,
                penalty_ms,
                &fitting.cumulative(),
                rng,
            )?)
        }
        Strategy::PrefixAffinity => by_prefix(tier, wish, &fits).or_else(|| quicker(rng)),
        Strategy::Latency => {
            let fitting = Fitting::of(tier, &fits);
            let expected = fitting.each(|place| wish.expected_ms(place.endpoint) / place.weight);
            fitting.at(latency::pick(&expected, &fitting.cumulative(), rng)?)
        }
        // What is not streamed says nothing of its first token.
        Strategy::Adaptive if !wish.stream => quicker(rng),
        Strategy::Adaptive => by_model(rule, tier, wish, rng, &fits),
        Strategy::Cost => {
            let fitting = Fitting::of(tier, &fits);
            let offers = fitting.each(|place| place.offer(wish));
            fitting.at(cost::pick(&offers, &fitting.cumulative(), rng)?)
        }
        Strategy::Capability => {
            let fitting = Fitting::of(tier, &fits);
            let offers = fitting.each(|place| place.offer(wish));
            fitting.at(capability::pick(&offers, &fitting.cumulative(), rng)?)
        }
        Strategy::CostLatency => {
            let fitting = Fitting::of(tier, &fits);
            let offers = fitting.each(|place| place.offer(wish));
            let target_ms = rule.slo.ttft_ms;
            let picked = cost_latency::pick(&offers, target_ms, &fitting.cumulative(), rng)?;
            fitting.at(picked)
        }
    }
}

/// Whether its requests can carry the credential that they need.
pub fn has_credential(candidate: &Candidate) -> bool {
    !matches!(candidate.backend.credential, Credential::Missing)
}

/// The cheaper of two endpoints of the tier.
fn cheaper_of_two(
    tier: &Tier,
    rng: &mut impl Rng,
    cost: impl Fn(&Slot, &Endpoint) -> f32,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let at = |index: usize| Place::of(tier, tier.slots.get(index)?);
    let eligible = |index: usize| at(index).is_some_and(|place| place.is_eligible(&fits));
    let cost =
        |index: usize| at(index).map_or(f32::INFINITY, |place| cost(place.slot, place.endpoint));
    at(power_of_two::pick(&tier.cumulative, rng, eligible, cost)?).map(Place::chosen)
}

/// The endpoint that is expected to begin soonest, one that knows the prompt preferred.
fn quickest(
    tier: &Tier,
    wish: Wish<'_>,
    rng: &mut impl Rng,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let homes = if wish.blocks.is_empty() {
        Vec::new()
    } else {
        tier.prefixes.homes(wish.blocks)
    };
    let at = |index: usize| Place::of(tier, tier.slots.get(index)?);
    let eligible = |index: usize| at(index).is_some_and(|place| place.is_eligible(&fits));
    let cost = |index: usize| {
        let place = at(index);
        place.map_or(f32::INFINITY, |place| {
            wish.home_cost_at(place.slot, place.endpoint, &homes)
        })
    };
    let is_home = |index: &usize| {
        let owner = at(*index).map(|place| place.endpoint.live.id);
        owner.is_some_and(|owner| homes.iter().any(|(home, _)| *home == owner))
    };
    let homes_at = (0..tier.slots.len()).filter(is_home);
    at(peak_ewma::pick(
        &tier.cumulative,
        homes_at,
        rng,
        eligible,
        cost,
    )?)
    .map(Place::chosen)
}

/// An endpoint of a tier.
#[derive(Clone, Copy)]
struct Place<'a> {
    slot: &'a Slot,
    /// That of its candidate.
    weight: f32,
    candidate: &'a Candidate,
    endpoint: &'a Arc<Endpoint>,
}

impl<'a> Place<'a> {
    fn of(tier: &'a Tier, slot: &'a Slot) -> Option<Self> {
        let candidate = tier.candidates.get(slot.candidate)?;
        let weight = tier.weights.get(slot.candidate).copied().unwrap_or(1);
        Some(Self {
            slot,
            weight: u16::try_from(weight).map_or(f32::INFINITY, f32::from),
            candidate,
            endpoint: candidate.backend.endpoints.get(slot.endpoint)?,
        })
    }

    fn is_eligible(&self, fits: impl Fn(usize, &Arc<Endpoint>) -> bool) -> bool {
        has_credential(self.candidate) && fits(self.slot.candidate, self.endpoint)
    }

    fn offer(&self, wish: Wish<'_>) -> Offer {
        Offer {
            price: wish.price_at(self.candidate),
            ttft_ms: wish.ttft_ms(self.endpoint),
            cost_ms: wish.cost_at(self.slot, self.endpoint),
            weight: self.weight,
            ability: Ability::of(&self.candidate.backend.profile.capabilities),
        }
    }

    fn forecast(&self, wish: Wish<'_>, matched: &[(Owner, usize)]) -> Forecast {
        wish.forecast_at(self.slot, self.endpoint, matched, self.weight)
    }

    fn spot(&self, wish: Wish<'_>) -> Spot {
        Spot {
            distance: wish.distance_to(self.slot, self.candidate),
            expected_ms: wish.known_ms(self.endpoint),
            cost_ms: wish.cost_at(self.slot, self.endpoint),
        }
    }

    fn chosen(self) -> (usize, Arc<Endpoint>) {
        (self.slot.candidate, Arc::clone(self.endpoint))
    }
}

/// Those of a tier that may be chosen.
struct Fitting<'a>(Vec<Place<'a>>);

impl<'a> Fitting<'a> {
    fn of(tier: &'a Tier, fits: impl Fn(usize, &Arc<Endpoint>) -> bool) -> Self {
        let places = tier.slots.iter().filter_map(|slot| Place::of(tier, slot));
        Self(places.filter(|place| place.is_eligible(&fits)).collect())
    }

    fn each<T>(&self, figure: impl Fn(&Place<'a>) -> T) -> Vec<T> {
        self.0.iter().map(figure).collect()
    }

    /// Sums of the shares up to and with each one.
    fn cumulative(&self) -> Vec<f32> {
        let sums = self.0.iter().scan(0.0, |sum, place| {
            *sum += place.slot.share;
            Some(*sum)
        });
        sums.collect()
    }

    /// As strategies with affinity see them.
    fn seen(&self) -> Vec<Seen> {
        let total: f32 = self.0.iter().map(|place| place.slot.share).sum();
        self.each(|place| Seen {
            in_flight: place.endpoint.live.in_flight.load(Ordering::Relaxed),
            share: place.slot.share / total,
            name: place.slot.name,
            backend: place.slot.backend,
        })
    }

    fn at(&self, index: usize) -> Option<(usize, Arc<Endpoint>)> {
        self.0.get(index).copied().map(Place::chosen)
    }
}

/// The endpoint that knows most of the prompt and has room.
fn by_prefix(
    tier: &Tier,
    wish: Wish<'_>,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    if wish.blocks.is_empty() {
        return None;
    }
    let fitting = Fitting::of(tier, fits);
    let owners: Vec<Owner> = fitting.each(|place| place.endpoint.live.id);
    let cost = |index: usize| {
        let place = fitting.0.get(index);
        place.map_or(f32::INFINITY, |place| {
            wish.cost_at(place.slot, place.endpoint)
        })
    };
    let (blocks, index) = (wish.blocks, &tier.prefixes);
    let picked = prefix_affinity::pick(blocks, index, &fitting.seen(), &owners, cost)?;
    fitting.at(picked)
}

/// The endpoint whose models predict the best service.
fn by_model(
    rule: &Rule,
    tier: &Tier,
    wish: Wish<'_>,
    rng: &mut impl Rng,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let fitting = Fitting::of(tier, fits);
    let matched = tier.prefixes.matched(wish.blocks);
    let forecasts = fitting.each(|place| place.forecast(wish, &matched));
    let (aim, cumulative) = (wish.aim(&rule.slo), fitting.cumulative());
    fitting.at(adaptive::pick(&forecasts, aim, &cumulative, rng)?)
}

/// The endpoint that the request's key falls to and that has room.
fn by_hash(
    tier: &Tier,
    wish: Wish<'_>,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let key = wish.key?;
    let fitting = Fitting::of(tier, fits);
    fitting.at(hash::pick(key, &fitting.seen())?)
}

/// A backend, then one of its endpoints; in turn, or the one with the fewest requests in flight.
fn in_two_steps(
    tier: &Tier,
    by_load: bool,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let eligible = |index: usize| {
        tier.candidates.get(index).is_some_and(|candidate| {
            has_credential(candidate)
                && candidate
                    .backend
                    .endpoints
                    .iter()
                    .any(|endpoint| fits(index, endpoint))
        })
    };
    let index = if tier.candidates.len() == 1 {
        Some(0).filter(|&only| eligible(only))
    } else {
        let mut wheel = tier.wheel.lock().unwrap_or_else(PoisonError::into_inner);
        let in_flight = |index: usize| {
            let candidate = tier.candidates.get(index);
            candidate.map_or(0, |candidate| candidate.backend.ledger.in_flight())
        };
        if by_load {
            least_requests::pick(&mut wheel, &tier.weights, in_flight, eligible)
        } else {
            round_robin::pick(&mut wheel, &tier.weights, eligible)
        }
    }?;
    let backend = &tier.candidates.get(index)?.backend;
    let turn = if backend.endpoints.len() > 1 {
        backend.turn.fetch_add(1, Ordering::Relaxed)
    } else {
        0
    };
    let load = |index: usize| match backend.endpoints.get(index) {
        Some(endpoint) if by_load => endpoint.live.in_flight.load(Ordering::Relaxed),
        _ => 0,
    };
    let fits = |endpoint: usize| {
        backend
            .endpoints
            .get(endpoint)
            .is_some_and(|endpoint| fits(index, endpoint))
    };
    let endpoint = balance::endpoint(backend.endpoints.len(), turn, load, fits)?;
    Some((index, Arc::clone(backend.endpoints.get(endpoint)?)))
}
