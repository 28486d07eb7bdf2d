//! What strategies may know of a request, and what it would find at an endpoint. Pure: live figures are read, never
//! changed.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use penstock_core::config::{Protocol, Slo, Strategy};
use penstock_core::ids::BackendId;
use xxhash_rust::xxh3::xxh3_64;

use crate::balance::adaptive::{Aim, Forecast, Foreseen, Situation};
use crate::balance::peak_ewma::{self, Work};
use crate::balance::prefix_affinity::{BLOCK_BYTES, Owner};
use crate::balance::region::Distance;
use crate::balance::{kv_aware, prefix_affinity};
use crate::capability::Needed;
use crate::fallback::Failed;
use crate::lengths::USUAL_TOKENS;
use crate::limits::Limit;
use crate::load::BYTES_PER_TOKEN;
use crate::openai::Call;
use crate::principal::Principal;
use crate::settings::Place;
use crate::snapshot::{Candidate, Endpoint, Rule, Slot};

/// What a strategy may know of the request.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Now, in the process's ms.
    pub now_ms: u64,
    /// Whether an event stream is asked for: its first token tells of a queue, other answers come when all is done.
    pub stream: bool,
    /// The model, as its caller calls it.
    pub model: &'a str,
    /// About how many tokens its prompt has.
    pub prompt_tokens: u32,
    /// See [`limit_tokens`].
    pub limit_tokens: u32,
    /// About how many tokens its answer will have.
    pub answer_tokens: u32,
    /// Hashes of the prompt's leading blocks; empty where the rule's strategy does not ask for them.
    pub blocks: &'a [u64],
    /// Hash of what the rule's strategy keeps together; `None` where it keeps nothing, or the request names none.
    pub key: Option<u64>,
    /// Where its caller is, if that is another region than the gateway's.
    pub region: Option<&'a str>,
    /// Who cannot carry it.
    pub unfit: &'a Unfit,
}

/// Who cannot carry a request.
#[derive(Clone, Debug, Default)]
pub struct Unfit {
    /// All backends that speak one of these.
    pub protocols: Vec<Protocol>,
    /// Those that refused it or have it already.
    pub models: Vec<BackendModel>,
    /// All backends that lack some of this.
    pub needed: Needed,
    /// All endpoints but these.
    pub only: Option<Only>,
    /// All endpoints but this one.
    pub trial: Option<Owner>,
    /// All candidates that do not follow this.
    pub failed: Failed,
}

/// What a candidate asks of its backend: the rule may have the backend once more with another model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendModel {
    backend: BackendId,
    /// `None`: the caller's.
    model: Option<Box<str>>,
}

impl BackendModel {
    /// That of a candidate.
    pub fn of(candidate: &Candidate) -> Self {
        Self {
            backend: candidate.backend.id.clone(),
            model: candidate.model.as_ref().map(|model| model.name.clone()),
        }
    }

    fn is_of(&self, candidate: &Candidate) -> bool {
        let model = candidate.model.as_ref().map(|model| &*model.name);
        self.backend == candidate.backend.id && self.model.as_deref() == model
    }
}

/// The endpoints of one candidate whose pods are of one template.
#[derive(Clone, Debug)]
pub struct Only {
    /// Position of the candidate's tier in the rule.
    pub tier: usize,
    /// Position of the candidate in the tier.
    pub candidate: usize,
    /// See [`Endpoint::revision`].
    pub revision: Option<String>,
}

impl Unfit {
    /// Whether an endpoint of the candidate in this place is one that can carry it.
    pub fn takes(&self, tier: usize, candidate: usize, endpoint: &Endpoint) -> bool {
        let is_alike = |only: &Only| only.revision == endpoint.revision;
        self.goes_on_at(tier, candidate)
            && self.only.as_ref().is_none_or(is_alike)
            && self.trial.is_none_or(|trial| trial == endpoint.live.id)
    }

    /// Whether the candidate in this place has some that can carry it.
    pub fn goes_on_at(&self, tier: usize, candidate: usize) -> bool {
        let is_there = |only: &Only| (only.tier, only.candidate) == (tier, candidate);
        self.only.as_ref().is_none_or(is_there)
    }

    /// Whether the candidate is one of [`Self::models`].
    pub fn had(&self, candidate: &Candidate) -> bool {
        self.models.iter().any(|model| model.is_of(candidate))
    }
}

impl Wish<'_> {
    /// Whether the candidate can carry it, as far as is known, and follows what has failed.
    pub fn fits(&self, candidate: &Candidate) -> bool {
        let backend = &candidate.backend;
        !self.unfit.protocols.contains(&backend.protocol)
            && !self.unfit.had(candidate)
            && self.unfit.needed.lack_of(candidate).is_none()
            && self.unfit.failed.lets(candidate)
    }

    /// How the candidate's model stands at the endpoint for such a request.
    pub fn limit_at(&self, candidate: &Candidate, endpoint: &Endpoint) -> Limit {
        let model = candidate.model_name(self.model);
        let limits = &endpoint.live.limits;
        limits.of(model, self.now_ms, self.limit_tokens)
    }

    /// How far an endpoint is from the caller.
    pub fn distance_to(&self, slot: &Slot, candidate: &Candidate) -> Distance {
        let region = candidate.backend.profile.region.as_deref();
        let from = self.region;
        from.map_or(slot.distance, |from| Place::between(from, region))
    }

    /// What an average of the endpoint's latency is to be multiplied with.
    pub fn work_at(&self, endpoint: &Endpoint) -> f32 {
        if self.stream {
            self.work_before(endpoint).until_first_token()
        } else {
            sharing(endpoint.live.in_flight.load(Ordering::Relaxed))
        }
    }

    fn work_before(&self, endpoint: &Endpoint) -> Work {
        let in_flight = endpoint.live.in_flight.load(Ordering::Relaxed);
        let waiting_tokens = endpoint.live.waiting_tokens.load(Ordering::Relaxed);
        // What the engine says is a little old, what this gateway sent it is not: the larger one counts.
        let queue = endpoint
            .live
            .engine
            .at(self.now_ms)
            .queue
            .unwrap_or_default();
        let of_others = queue.waiting.saturating_mul(self.prompt_tokens);
        Work {
            in_flight: in_flight.max(queue.running.saturating_add(queue.waiting)),
            waiting_tokens: waiting_tokens.max(of_others),
            prompt_tokens: self.prompt_tokens,
        }
    }

    /// How many tokens at the beginning of its prompt the endpoint was sent before; `matched` are the leading blocks of
    /// it that endpoints were.
    fn known_tokens(endpoint: &Endpoint, matched: &[(Owner, usize)]) -> u32 {
        let mut known = matched.iter();
        let known = known.find(|(owner, _)| *owner == endpoint.live.id);
        let bytes = known.map_or(0, |(_, blocks)| blocks.saturating_mul(BLOCK_BYTES));
        u32::try_from(bytes).unwrap_or(u32::MAX) / BYTES_PER_TOKEN
    }

    /// What it finds at the endpoint; `matched` are the leading blocks of its prompt that endpoints were sent before.
    fn situation_at(&self, endpoint: &Endpoint, matched: &[(Owner, usize)]) -> Situation {
        let engine = endpoint.live.engine.at(self.now_ms);
        Situation {
            work: self.work_before(endpoint),
            cached_tokens: Self::known_tokens(endpoint, matched),
            kv_use: engine.kv_use.unwrap_or(0.0),
        }
    }

    /// What `Adaptive` foresees of it at the endpoint.
    pub fn foreseen_at(&self, endpoint: &Endpoint, matched: &[(Owner, usize)]) -> Foreseen {
        let situation = self.situation_at(endpoint, matched);
        let model = endpoint.live.adaptive.predict(&situation, self.now_ms);
        Foreseen {
            situation,
            ttft_ms: model.ttft_ms,
            peak_ms: self.known_ms(endpoint),
        }
    }

    /// What `Adaptive` compares.
    pub fn forecast_at(
        &self,
        slot: &Slot,
        endpoint: &Endpoint,
        matched: &[(Owner, usize)],
        weight: f32,
    ) -> Forecast {
        let situation = self.situation_at(endpoint, matched);
        Forecast {
            model: endpoint.live.adaptive.predict(&situation, self.now_ms),
            peak_ms: self.expected_ms(endpoint),
            peak_cost_ms: self.cost_at(slot, endpoint),
            is_busy: situation.work.in_flight > 0,
            weight,
        }
    }

    /// What is wanted of an endpoint, with the rule's targets.
    pub fn aim(&self, slo: &Slo) -> Aim {
        let target =
            |ms: Option<u64>| ms.map(|ms| Duration::from_millis(ms).as_secs_f32() * 1000.0);
        Aim {
            answer_tokens: u16::try_from(self.answer_tokens).map_or(f32::from(u16::MAX), f32::from),
            ttft_ms: target(slo.ttft_ms),
            tpot_ms: target(slo.tpot_ms),
        }
    }

    /// What the endpoint is taken to need for it, in ms: to the first token of a stream, to the end of another answer.
    pub fn expected_ms(&self, endpoint: &Endpoint) -> f32 {
        let average_ms = endpoint.live.latency(self.stream).at(self.now_ms);
        let in_flight = endpoint.live.in_flight.load(Ordering::Relaxed);
        peak_ewma::cost(average_ms, self.work_at(endpoint), in_flight, 1.0)
    }

    /// That, and 0 where nothing is known.
    pub fn known_ms(&self, endpoint: &Endpoint) -> f32 {
        endpoint.live.latency(self.stream).at(self.now_ms) * self.work_at(endpoint)
    }

    /// [`Self::expected_ms`] per share of the traffic.
    pub fn cost_at(&self, slot: &Slot, endpoint: &Endpoint) -> f32 {
        self.expected_ms(endpoint) / slot.share
    }

    /// What `PeakEwma` compares: less at endpoints that know the prompt, which are `homes`.
    pub fn home_cost_at(&self, slot: &Slot, endpoint: &Endpoint, homes: &[(Owner, usize)]) -> f32 {
        let cost = self.cost_at(slot, endpoint);
        match Self::known_tokens(endpoint, homes) {
            0 => cost,
            known => cost * peak_ewma::at_home(self.work_before(endpoint), known),
        }
    }

    /// How many times dearer the fill of the engine's KV cache makes it; 1 where that is not known.
    pub fn pressure_at(&self, endpoint: &Endpoint) -> f32 {
        let kv_use = endpoint.live.engine.at(self.now_ms).kv_use;
        kv_use.map_or(1.0, kv_aware::pressure)
    }

    /// When the first token of a stream like it is expected of the endpoint, in ms from now; 0 where nothing is known.
    pub fn ttft_ms(&self, endpoint: &Endpoint) -> f32 {
        let work = self.work_before(endpoint).until_first_token();
        endpoint.live.latency(true).at(self.now_ms) * work
    }

    /// What it costs at a backend, as far as can be told before, in pico-USD.
    pub fn price_at(&self, candidate: &Candidate) -> u128 {
        let price = candidate.backend.profile.price;
        let (prompt, answer) = (self.prompt_tokens, self.answer_tokens);
        price.map_or(0, |price| price.of(prompt.into(), 0, answer.into()))
    }
}

/// Requests that share an endpoint, one more included.
#[expect(clippy::cast_precision_loss, reason = "far below 2^23")]
pub fn sharing(in_flight: u32) -> f32 {
    in_flight as f32 + 1.0
}

/// Hashes of the prompt's leading blocks, where the rule's strategy asks for them.
pub fn blocks(rule: &Rule, call: &Call<'_>) -> Vec<u64> {
    let has_choice = || rule.tiers.iter().any(|tier| tier.slots.len() > 1);
    let are_asked = match rule.strategy {
        Strategy::PrefixAffinity | Strategy::Adaptive => true,
        // What is not streamed says nothing of what its prompt cost.
        Strategy::PeakEwma => call.stream && has_choice(),
        _ => false,
    };
    if are_asked {
        prefix_affinity::blocks(&[call.system, call.prompt])
    } else {
        Vec::new()
    }
}

/// What requests have in common that are kept together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashOn {
    /// What their bodies name, see [`crate::session::Names::session`].
    Body,
    /// A header.
    Header(HeaderName),
    /// The conversation that their bodies name.
    Conversation,
    /// The user that their bodies name, or whose key they show.
    User,
    /// The team whose key they show.
    Team,
}

/// Hash of what the rule's strategy keeps together, if it does and the request has it.
pub fn key(
    rule: &Rule,
    headers: &HeaderMap,
    call: &Call<'_>,
    who: Option<&Principal>,
) -> Option<u64> {
    if !matches!(rule.strategy, Strategy::Hash | Strategy::Sticky) {
        return None;
    }
    let kept = match &rule.hash_on {
        HashOn::Body => call.names.session()?.as_bytes(),
        HashOn::Header(header) => headers.get(header)?.as_bytes(),
        HashOn::Conversation => call.names.conversation()?.as_bytes(),
        HashOn::User => {
            let known = || who?.user.as_deref();
            call.names.user().or_else(known)?.as_bytes()
        }
        HashOn::Team => who?.team.as_bytes(),
    };
    Some(xxh3_64(kept))
}

/// About how many tokens count for it where a provider has a limit: OpenAI and Azure count the longest answer that a
/// request asks for before it is made.
pub fn limit_tokens(call: &Call<'_>) -> u32 {
    call.prompt_tokens
        .saturating_add(call.max_tokens.unwrap_or(0))
}

/// About how many tokens the answer will have.
pub fn answer_tokens(call: &Call<'_>) -> u32 {
    call.max_tokens.unwrap_or(USUAL_TOKENS).min(USUAL_TOKENS)
}
