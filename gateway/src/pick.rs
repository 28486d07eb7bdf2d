//! One of a tier's endpoints, by the rule's strategy: what each strategy in `balance` is given of the live state. Pure
//! but for the balancer's counters, which are passed in with the tier; time and randomness come in.
//!
//! `RoundRobin` and `LeastRequests` take a backend and then one of its endpoints, the others take an endpoint of any
//! backend.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use penstock_core::config::{Protocol, Strategy};
use penstock_core::ids::BackendId;
use rand::Rng;

use crate::balance::peak_ewma::Work;
use crate::balance::prefix_affinity::Owner;
use crate::balance::{
    self, Seen, hash, least_requests, peak_ewma, power_of_two, prefix_affinity, round_robin,
};
use crate::snapshot::{Candidate, Credential, Endpoint, Slot, Tier};

/// What a strategy may know of the request.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Now, in the process's ms.
    pub now_ms: u64,
    /// Whether an event stream is asked for: its first token tells of a queue, other answers come when all is done.
    pub stream: bool,
    /// About how many tokens its prompt has.
    pub prompt_tokens: u32,
    /// Hashes of the prompt's leading blocks; empty where the rule's strategy does not ask for them.
    pub blocks: &'a [u64],
    /// Hash of what `Hash` keeps together; `None` where the request has no such thing.
    pub key: Option<u64>,
    /// Who cannot carry it.
    pub unfit: &'a Unfit,
}

/// Who cannot carry a request.
#[derive(Clone, Debug, Default)]
pub struct Unfit {
    /// All backends that speak one of these.
    pub protocols: Vec<Protocol>,
    /// Backends that refused it.
    pub backends: Vec<BackendId>,
}

impl Wish<'_> {
    /// Whether the candidate can carry it, as far as is known.
    pub fn fits(&self, candidate: &Candidate) -> bool {
        let backend = &candidate.backend;
        !self.unfit.protocols.contains(&backend.protocol)
            && !self.unfit.backends.contains(&backend.id)
    }

    /// What an average of the endpoint's latency is to be multiplied with.
    pub fn work_at(&self, endpoint: &Endpoint) -> f32 {
        let in_flight = endpoint.live.in_flight.load(Ordering::Relaxed);
        if self.stream {
            let work = Work {
                in_flight,
                waiting_tokens: endpoint.live.waiting_tokens.load(Ordering::Relaxed),
                prompt_tokens: self.prompt_tokens,
            };
            work.until_first_token()
        } else {
            sharing(in_flight)
        }
    }

    /// What `PeakEwma` takes the endpoint to need for it, in ms per share of the traffic.
    pub fn cost_at(&self, slot: &Slot, endpoint: &Endpoint) -> f32 {
        let average_ms = endpoint.live.latency(self.stream).at(self.now_ms);
        let in_flight = endpoint.live.in_flight.load(Ordering::Relaxed);
        peak_ewma::cost(average_ms, self.work_at(endpoint), in_flight, slot.share)
    }
}

/// Requests that share an endpoint, one more included.
#[expect(clippy::cast_precision_loss, reason = "far below 2^23")]
fn sharing(in_flight: u32) -> f32 {
    in_flight as f32 + 1.0
}

/// One of a tier's endpoints that fit, by the rule's strategy.
pub fn pick(
    strategy: Strategy,
    tier: &Tier,
    wish: Wish<'_>,
    rng: &mut impl Rng,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    match strategy {
        Strategy::RoundRobin => in_two_steps(tier, false, fits),
        Strategy::LeastRequests => in_two_steps(tier, true, fits),
        Strategy::PowerOfTwo => cheaper_of_two(tier, None, rng, fits),
        Strategy::PeakEwma => cheaper_of_two(tier, Some(wish), rng, fits),
        Strategy::Hash => {
            by_hash(tier, wish, &fits).or_else(|| cheaper_of_two(tier, Some(wish), rng, fits))
        }
        Strategy::PrefixAffinity => {
            by_prefix(tier, wish, &fits).or_else(|| cheaper_of_two(tier, Some(wish), rng, fits))
        }
    }
}

/// Whether its requests can carry the credential that they need.
pub fn has_credential(candidate: &Candidate) -> bool {
    !matches!(candidate.backend.credential, Credential::Missing)
}

/// The cheaper of two endpoints of the tier: by its latency for such requests, or by requests in flight alone.
fn cheaper_of_two(
    tier: &Tier,
    latency_for: Option<Wish<'_>>,
    rng: &mut impl Rng,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let at = |index: usize| {
        let slot = tier.slots.get(index)?;
        let candidate = tier.candidates.get(slot.candidate)?;
        let endpoint = candidate.backend.endpoints.get(slot.endpoint)?;
        Some((slot, candidate, endpoint))
    };
    let eligible = |index: usize| {
        at(index).is_some_and(|(slot, candidate, endpoint)| {
            has_credential(candidate) && fits(slot.candidate, endpoint)
        })
    };
    let cost = |index: usize| match (at(index), latency_for) {
        (None, _) => f32::INFINITY,
        (Some((slot, _, endpoint)), Some(wish)) => wish.cost_at(slot, endpoint),
        (Some((slot, _, endpoint)), None) => {
            sharing(endpoint.live.in_flight.load(Ordering::Relaxed)) / slot.share
        }
    };
    let index = power_of_two::pick(&tier.cumulative, rng, eligible, cost)?;
    at(index).map(|(slot, _, endpoint)| (slot.candidate, Arc::clone(endpoint)))
}

/// Those of a tier that may be chosen.
struct Fitting<'a> {
    slots: Vec<(&'a Slot, &'a Arc<Endpoint>)>,
    seen: Vec<Seen>,
}

impl<'a> Fitting<'a> {
    fn of(tier: &'a Tier, fits: impl Fn(usize, &Arc<Endpoint>) -> bool) -> Self {
        let slots: Vec<(&Slot, &Arc<Endpoint>)> = tier
            .slots
            .iter()
            .filter_map(|slot| {
                let candidate = tier.candidates.get(slot.candidate)?;
                let endpoint = candidate.backend.endpoints.get(slot.endpoint)?;
                (has_credential(candidate) && fits(slot.candidate, endpoint))
                    .then_some((slot, endpoint))
            })
            .collect();
        let total: f32 = slots.iter().map(|(slot, _)| slot.share).sum();
        let seen = slots
            .iter()
            .map(|(slot, endpoint)| Seen {
                in_flight: endpoint.live.in_flight.load(Ordering::Relaxed),
                share: slot.share / total,
                name: slot.name,
            })
            .collect();
        Self { slots, seen }
    }

    fn at(&self, index: usize) -> Option<(usize, Arc<Endpoint>)> {
        let (slot, endpoint) = self.slots.get(index)?;
        Some((slot.candidate, Arc::clone(endpoint)))
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
    let owners: Vec<Owner> = fitting
        .slots
        .iter()
        .map(|(_, endpoint)| endpoint.live.id)
        .collect();
    let cost = |index: usize| {
        let slot = fitting.slots.get(index);
        slot.map_or(f32::INFINITY, |(slot, endpoint)| {
            wish.cost_at(slot, endpoint)
        })
    };
    let (blocks, index) = (wish.blocks, &tier.prefixes);
    fitting.at(prefix_affinity::pick(
        blocks,
        index,
        &fitting.seen,
        &owners,
        cost,
    )?)
}

/// The endpoint that the request's key falls to and that has room.
fn by_hash(
    tier: &Tier,
    wish: Wish<'_>,
    fits: impl Fn(usize, &Arc<Endpoint>) -> bool,
) -> Option<(usize, Arc<Endpoint>)> {
    let key = wish.key?;
    let fitting = Fitting::of(tier, fits);
    fitting.at(hash::pick(key, &fitting.seen)?)
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
