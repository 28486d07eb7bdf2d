//! Why a request would go where it goes: every candidate, what speaks against it, and the figures that the strategy
//! compares. For `penstock explain`, the sampled decision log (see `decisions`) and nothing on the path of other
//! requests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use penstock_core::acks::LimitStand;
use penstock_core::config::{Protocol, Strategy};
use serde::Serialize;

use crate::balance::adaptive::Trust;
use crate::balance::region;
use crate::budgets::{Limit, account};
use crate::capability::{Lack, Needed};
use crate::choose::{Choice, Nowhere, Standing, Tried, UNSUPPORTED, choose};
use crate::conditions::Asked;
use crate::fallback::{self, Failed};
use crate::openai::Api;
use crate::pick::has_credential;
use crate::process::Process;
use crate::provider::{Misfit, Rest, Route};
use crate::silence;
use crate::snapshot::{Candidate, Endpoint, Rule, Slot, Tier};
use crate::tasks::Told;
use crate::wish::{self, BackendModel, Unfit, Wish};

/// Texts of a request, such as the names of its members, are cut off here.
const MAX_TEXT_CHARS: usize = 100;

/// What is known about one request before it is sent.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The request and its rule.
    #[serde(flatten)]
    pub about: About,
    /// Where it would go.
    #[serde(flatten)]
    pub look: Look,
}

/// A request and its rule.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct About {
    /// `namespace/policy/rule`.
    pub rule: String,
    /// `metadata.generation` of the policy; 0 where objects come from files.
    pub generation: i64,
    /// Digest of the config that the rule is of.
    pub digest: String,
    /// The rule's strategy.
    pub strategy: String,
    /// Whether an event stream is asked for.
    pub stream: bool,
    /// About how many tokens the prompt has.
    pub prompt_tokens: u32,
    /// What the rule makes another in the request: names of members.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<String>,
    /// What it is about, where rules depend on that.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<Told>,
    /// How the limits stand that it counts in, as far as this replica knows them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<LimitStand>,
}

/// One choice of an endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Look {
    /// By priority, then in the order written.
    pub candidates: Vec<CandidateView>,
    /// Where it goes; `None` if it is held or refused.
    pub chosen: Option<Chosen>,
    /// Why it goes nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nowhere: Option<&'static str>,
}

/// A backend as the rule uses it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CandidateView {
    /// `namespace/name`.
    pub backend: String,
    /// 0 is tried first.
    pub tier: usize,
    /// Relative to others of its tier.
    pub weight: u32,
    /// Why it cannot answer this request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<String>,
    /// Those that are ready.
    pub endpoints: Vec<EndpointView>,
    /// How many more there are that are not told of.
    #[serde(skip_serializing_if = "is_zero")]
    pub more_endpoints: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// One endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    /// Where it is.
    pub address: String,
    /// See [`Standing`].
    pub standing: &'static str,
    /// Why it cannot answer this request, though its backend can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<&'static str>,
    /// How the request fared there before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried: Option<&'static str>,
    /// Why TLS could not be agreed on last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<String>,
    /// Requests of this gateway replica there.
    pub in_flight: u32,
    /// Prompt tokens of those without a first token.
    pub waiting_tokens: u32,
    /// Recent latency as `PeakEwma` keeps it, in ms; 0 if nothing is known.
    pub average_ms: f32,
    /// What `PeakEwma` compares, in ms per share of the traffic.
    pub cost: f32,
    /// What the rule's strategy compares besides.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<&'static str, f64>,
}

/// Where a request would go.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Chosen {
    /// `namespace/name`.
    pub backend: String,
    /// Where.
    pub address: String,
    /// See [`crate::choose::Pass`].
    pub pass: &'static str,
}

/// Where a request would go now, without sending it.
pub(crate) fn ask(
    process: &Process,
    rule: &Rule,
    api: Api,
    asked: &Asked<'_>,
    body: &[u8],
    changes: &[String],
) -> Explanation {
    let call = asked.call;
    let protocols: BTreeSet<Protocol> = rule
        .candidates()
        .map(|candidate| candidate.backend.protocol)
        .collect();
    let misfits: Vec<(Protocol, Misfit)> = protocols
        .into_iter()
        .filter_map(|protocol| Some((protocol, misfit(api, protocol, body, rule.rest)?)))
        .collect();
    let is_unnamed = |candidate: &&Candidate| !takes_name(candidate, &call.model);
    let unnamed = rule.candidates().filter(is_unnamed);
    let unfit = Unfit {
        protocols: misfits.iter().map(|(protocol, _)| *protocol).collect(),
        models: unnamed.map(BackendModel::of).collect(),
        needed: Needed::of(rule, api, call),
        ..Unfit::default()
    };
    let blocks = wish::blocks(rule, call);
    let wish = Wish {
        now_ms: process.ms(penstock_shell::clock::now()),
        stream: call.stream,
        model: &call.model,
        prompt_tokens: call.prompt_tokens,
        limit_tokens: wish::limit_tokens(call),
        answer_tokens: wish::answer_tokens(call),
        blocks: &blocks,
        key: wish::key(rule, asked.headers, call, asked.principal),
        region: process.elsewhere(asked.region),
        unfit: &unfit,
    };
    let found = choose(rule, &[], wish, &mut rand::rng());
    let (found, failed) = match fallback::in_place(&found, rule, &[], wish, &mut rand::rng()) {
        Some((choice, failed)) => (Ok(choice), failed),
        None => (silence::heeded(found, rule, wish), Failed::NOTHING),
    };
    let unfit = Unfit {
        failed,
        ..unfit.clone()
    };
    let wish = Wish {
        unfit: &unfit,
        ..wish
    };
    let looked = Looked {
        rule,
        wish,
        misfits: &misfits,
        tried: &[],
        found: found.as_ref().map_err(|nowhere| *nowhere),
        most_endpoints: usize::MAX,
    };
    Explanation {
        about: About {
            tasks: asked.tasks.to_vec(),
            budgets: budgets(process, api, asked),
            ..about(rule, wish, changes)
        },
        look: looked.look(),
    }
}

/// How the limits stand that a request counts in.
fn budgets(process: &Process, api: Api, asked: &Asked<'_>) -> Vec<LimitStand> {
    let snapshot = process.snapshot.load();
    let Some(snapshot) = snapshot.as_deref() else {
        return Vec::new();
    };
    let model = (api != Api::Http).then_some(&*asked.call.model);
    let shares = snapshot.budgets.of(asked.principal, model);
    let counts = |standing: &account::Standing| {
        let own = &standing.limit;
        shares.iter().any(|share| {
            let mut limits = share.budget.limits.iter();
            let is_own = |limit: &Limit| (&limit.budget, &limit.name) == (&own.budget, &own.name);
            share.of == standing.of && limits.any(|limit| is_own(limit))
        })
    };
    let standings = process.books.standings();
    let standings = standings.iter().filter(|standing| counts(standing));
    standings.map(account::Standing::report).collect()
}

/// Why a backend of this protocol cannot carry the request.
fn misfit(api: Api, protocol: Protocol, body: &[u8], rest: Rest) -> Option<Misfit> {
    match Route::of(api, protocol) {
        None => Some(Misfit::Unsupported(api.path().to_owned())),
        Some(route) if route.is_straight() => None,
        Some(route) => route.request(body, rest).err(),
    }
}

/// A request and its rule.
pub(crate) fn about(rule: &Rule, wish: Wish<'_>, changes: &[String]) -> About {
    About {
        rule: rule.label.clone(),
        generation: rule.version.generation,
        digest: rule.version.digest.to_string(),
        strategy: format!("{:?}", rule.strategy),
        stream: wish.stream,
        prompt_tokens: wish.prompt_tokens,
        changes: changes.to_vec(),
        tasks: Vec::new(),
        budgets: Vec::new(),
    }
}

/// What a choice was made of, and how it came out.
pub(crate) struct Looked<'a> {
    pub(crate) rule: &'a Rule,
    pub(crate) wish: Wish<'a>,
    /// Protocols that cannot carry the request, and why.
    pub(crate) misfits: &'a [(Protocol, Misfit)],
    pub(crate) tried: &'a [Tried],
    pub(crate) found: Result<&'a Choice, Nowhere>,
    /// Of each candidate are told at most so many, and those that were chosen or tried.
    pub(crate) most_endpoints: usize,
}

impl Looked<'_> {
    pub(crate) fn look(&self) -> Look {
        let tiers = self.rule.tiers.iter().enumerate();
        Look {
            candidates: tiers
                .flat_map(|(tier, group)| self.candidates(tier, group))
                .collect(),
            chosen: self.found.ok().and_then(|choice| chosen(self.rule, choice)),
            nowhere: self.found.err().map(Nowhere::label),
        }
    }

    fn candidates<'a>(
        &'a self,
        tier: usize,
        group: &'a Tier,
    ) -> impl Iterator<Item = CandidateView> + 'a {
        let both = group.candidates.iter().zip(&group.weights).enumerate();
        both.map(move |(index, (candidate, weight))| {
            let slots = group.slots.iter().filter(|slot| slot.candidate == index);
            let count = slots.clone().count();
            let mut endpoints = Vec::new();
            for slot in slots {
                let Some(endpoint) = candidate.backend.endpoints.get(slot.endpoint) else {
                    continue;
                };
                if endpoints.len() < self.most_endpoints || self.is_needed(tier, index, endpoint) {
                    endpoints.push(self.endpoint(tier, group, candidate, slot, endpoint));
                }
            }
            CandidateView {
                backend: candidate.backend.id.to_string(),
                tier,
                weight: *weight,
                dropped: self.dropped(tier, index, candidate),
                more_endpoints: count - endpoints.len(),
                endpoints,
            }
        })
    }

    /// Whether it must be told of.
    fn is_needed(&self, tier: usize, candidate: usize, endpoint: &Endpoint) -> bool {
        let is_chosen = self.found.is_ok_and(|choice| {
            (choice.tier, choice.candidate) == (tier, candidate)
                && Arc::ptr_eq(&choice.endpoint.live, &endpoint.live)
        });
        is_chosen || self.tried(tier, candidate, endpoint).is_some()
    }

    /// Where nothing was sent, the candidate is dropped instead.
    fn tried(&self, tier: usize, candidate: usize, endpoint: &Endpoint) -> Option<&'static str> {
        let sent = self
            .tried
            .iter()
            .filter(|tried| tried.reason != UNSUPPORTED);
        let mut here = sent.filter(|tried| tried.is_at(tier, candidate, endpoint));
        here.next_back().map(|tried| tried.reason)
    }

    /// Why a candidate cannot answer the request.
    fn dropped(&self, tier: usize, index: usize, candidate: &Candidate) -> Option<String> {
        let Wish { unfit, model, .. } = self.wish;
        let lack = unfit.needed.lack_of(candidate);
        let protocol = candidate.backend.protocol;
        let misfit = self.misfits.iter().find(|(unfit, _)| *unfit == protocol);
        match misfit {
            Some((_, Misfit::Unsupported(param))) => {
                let param = cut(param);
                Some(format!("its protocol cannot carry '{param}'"))
            }
            Some((_, Misfit::Invalid(param, expected))) => {
                Some(format!("'{}' must be {expected}", cut(param)))
            }
            None if lack.is_some() => lack.map(lacking),
            None if !takes_name(candidate, model) => {
                Some("the model's name cannot stand in its path".to_owned())
            }
            None if unfit.had(candidate) => Some("it had the request already".to_owned()),
            None if !unfit.goes_on_at(tier, index) => {
                Some("the answer began at another one".to_owned())
            }
            None if !unfit.failed.lets(candidate) => Some(shut_out(candidate)),
            None if !has_credential(candidate) => Some("its credential has not arrived".to_owned()),
            None if !candidate.has_endpoint() => Some(match &candidate.backend.unsecured {
                Some(why) => format!("TLS cannot be spoken with it: {why}"),
                None => "it has no ready endpoint".to_owned(),
            }),
            None => None,
        }
    }

    fn endpoint(
        &self,
        tier: usize,
        group: &Tier,
        candidate: &Candidate,
        slot: &Slot,
        endpoint: &Endpoint,
    ) -> EndpointView {
        let (live, wish) = (&endpoint.live, self.wish);
        let limit = wish.limit_at(candidate, endpoint);
        let fits = wish.unfit.takes(tier, slot.candidate, endpoint);
        let is_elsewhere = !wish.unfit.goes_on_at(tier, slot.candidate);
        let homes = match self.rule.strategy {
            Strategy::PeakEwma => group.prefixes.homes(wish.blocks),
            _ => Vec::new(),
        };
        EndpointView {
            address: endpoint.address.to_string(),
            standing: Standing::of(live, limit, wish.now_ms).label(),
            dropped: (!fits && !is_elsewhere).then_some("its pod is of another template"),
            tried: self.tried(tier, slot.candidate, endpoint),
            tls: live.handshake.failed().map(|failed| failed.to_string()),
            in_flight: live.in_flight.load(Ordering::Relaxed),
            waiting_tokens: live.waiting_tokens.load(Ordering::Relaxed),
            average_ms: live.latency(wish.stream).at(wish.now_ms),
            cost: wish.home_cost_at(slot, endpoint, &homes),
            figures: figures(self.rule, group, candidate, slot, endpoint, wish),
        }
    }
}

/// Whether the model's name, as the candidate has it, can be asked for there.
fn takes_name(candidate: &Candidate, model: &str) -> bool {
    let name = candidate.model_name(model);
    let mut endpoints = candidate.backend.endpoints.iter();
    endpoints.all(|endpoint| endpoint.targets.take(name))
}

fn cut(text: &str) -> &str {
    let end = text.char_indices().nth(MAX_TEXT_CHARS);
    end.map_or(text, |(end, _)| text.get(..end).unwrap_or_default())
}

fn chosen(rule: &Rule, choice: &Choice) -> Option<Chosen> {
    let tier = rule.tiers.get(choice.tier)?;
    let candidate = tier.candidates.get(choice.candidate)?;
    Some(Chosen {
        backend: candidate.backend.id.to_string(),
        address: choice.endpoint.address.to_string(),
        pass: choice.pass.label(),
    })
}

/// What the rule's strategy compares besides `PeakEwma`'s cost.
#[expect(clippy::cast_precision_loss, reason = "rough figures")]
fn figures(
    rule: &Rule,
    group: &Tier,
    candidate: &Candidate,
    slot: &Slot,
    endpoint: &Endpoint,
    wish: Wish<'_>,
) -> BTreeMap<&'static str, f64> {
    let price = || ("priceMicroUsd", wish.price_at(candidate) as f64 / 1e6);
    let mut figures = match rule.strategy {
        Strategy::Latency => BTreeMap::from([("expectedMs", wish.expected_ms(endpoint).into())]),
        Strategy::Cost => BTreeMap::from([price()]),
        Strategy::Capability => {
            let said = &candidate.backend.profile.capabilities;
            let context = said
                .context_tokens
                .map(|tokens| ("contextTokens", tokens.into()));
            let lacks = ("lacks", said.lacks.len() as f64);
            context.into_iter().chain([lacks]).collect()
        }
        Strategy::CostLatency => {
            let target_ms = rule.slo.ttft_ms.unwrap_or(0) as f64;
            let ttft_ms = wish.ttft_ms(endpoint).into();
            BTreeMap::from([price(), ("targetMs", target_ms), ("ttftMs", ttft_ms)])
        }
        Strategy::KvAware => {
            let known = endpoint.live.engine.at(wish.now_ms);
            let queue = known.queue.map(|queue| {
                let (running, waiting) = (queue.running.into(), queue.waiting.into());
                [("engineRunning", running), ("engineWaiting", waiting)]
            });
            let kv_use = known.kv_use.map(|kv_use| ("kvUse", kv_use.into()));
            let pressure = ("pressure", wish.pressure_at(endpoint).into());
            let figures = queue.into_iter().flatten().chain(kv_use);
            figures.chain([pressure]).collect()
        }
        Strategy::Adaptive if wish.stream => {
            let matched = group.prefixes.matched(wish.blocks);
            let forecast = wish.forecast_at(slot, endpoint, &matched, 1.0);
            let model = forecast.model;
            let decides = f64::from(u8::from(model.trust == Trust::Full));
            BTreeMap::from([
                ("modelDecides", decides),
                ("modelError", model.errors.model.into()),
                ("peakEwmaError", model.errors.peak.into()),
                ("itlMs", model.itl_ms.into()),
                ("ttftMs", model.ttft_ms.into()),
                ("peakEwmaTtftMs", forecast.peak_ms.into()),
            ])
        }
        Strategy::Region => {
            let distance = wish.distance_to(slot, candidate);
            let penalty_ms = region::penalty(distance, rule.region_penalty_ms).into();
            let expected_ms = wish.known_ms(endpoint).into();
            BTreeMap::from([("expectedMs", expected_ms), ("penaltyMs", penalty_ms)])
        }
        _ => BTreeMap::new(),
    };
    let left = wish.limit_at(candidate, endpoint).share;
    if left < 1.0 {
        figures.insert("quotaShare", left.into());
    }
    figures
}

fn shut_out(candidate: &Candidate) -> String {
    let after: Vec<String> = candidate
        .after
        .iter()
        .map(|one| format!("{one:?}"))
        .collect();
    if after.is_empty() {
        "what is known of it leads to those that name that in 'after'".to_owned()
    } else {
        format!("only after: {}", after.join(", "))
    }
}

fn lacking(lack: Lack) -> String {
    match lack {
        Lack::Feature(need) => format!("it lacks {need:?}"),
        Lack::Count => "it is not known to count tokens: see capabilities.tokenize".to_owned(),
        Lack::Context { needed, has } => {
            format!("its context has {has} tokens, the request takes about {needed}")
        }
    }
}
