//! Why a request would go where it goes: every candidate, what speaks against it, and the figures that the strategy
//! compares. For `penstock explain`, the sampled decision log and nothing on the path of other requests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use penstock_core::config::{Protocol, Strategy};
use rand::RngExt as _;
use serde::Serialize;

use crate::balance::adaptive::Trust;
use crate::balance::region;
use crate::capability::{Lack, Needed};
use crate::choose::{Choice, Standing, choose};
use crate::conditions::Asked;
use crate::fallback::{self, Failed};
use crate::job::Job;
use crate::openai::Api;
use crate::pick::has_credential;
use crate::process::Process;
use crate::provider::{Misfit, Rest, Route};
use crate::silence;
use crate::snapshot::{Candidate, Endpoint, Rule, Slot, Snapshot, Tier};
use crate::tasks::Told;
use crate::wish::{self, Unfit, Wish};

/// What is known about one request before it is sent.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// `namespace/policy/rule`.
    pub rule: String,
    /// `metadata.generation` of the policy; 0 where objects come from files.
    pub generation: i64,
    /// Digest of the config in force.
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
    /// By priority, then in the order written.
    pub candidates: Vec<CandidateView>,
    /// Where it would go; `None` if it would be held or refused.
    pub chosen: Option<Chosen>,
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
}

/// One endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointView {
    /// Where it is.
    pub address: String,
    /// See [`Standing`].
    pub standing: &'static str,
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
    snapshot: &Snapshot,
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
    let unfit = Unfit {
        protocols: misfits.iter().map(|(protocol, _)| *protocol).collect(),
        needed: Needed::of(rule, api, call),
        ..Unfit::default()
    };
    let blocks = wish::blocks(rule, call);
    let wish = Wish {
        now_ms: process.ms(penstock_shell::clock::now()),
        stream: call.stream,
        model: &call.model,
        prompt_tokens: call.prompt_tokens(),
        answer_tokens: wish::answer_tokens(call),
        blocks: &blocks,
        key: wish::key(rule, asked.headers, call),
        region: process.elsewhere(asked.region),
        unfit: &unfit,
    };
    let found = choose(rule, &[], wish, &mut rand::rng());
    let (choice, failed) = match fallback::in_place(&found, rule, &[], wish, &mut rand::rng()) {
        Some((choice, failed)) => (Some(choice), failed),
        None => (silence::heeded(found, rule, wish).ok(), Failed::NOTHING),
    };
    let unfit = Unfit {
        failed,
        ..unfit.clone()
    };
    let wish = Wish {
        unfit: &unfit,
        ..wish
    };
    let mut told = explanation(snapshot, rule, wish, &misfits, choice.as_ref(), changes);
    told.tasks = asked.tasks.to_vec();
    told
}

/// Why a backend of this protocol cannot carry the request.
fn misfit(api: Api, protocol: Protocol, body: &[u8], rest: Rest) -> Option<Misfit> {
    match Route::of(api, protocol) {
        None => Some(Misfit::Unsupported(api.path().to_owned())),
        Some(route) if route.is_straight() => None,
        Some(route) => route.request(body, rest).err(),
    }
}

/// One in so many requests is told in the decision log.
pub(crate) fn log(job: &Job<'_>, rule: &Rule, unfit: &Unfit, choice: &Choice, changes: &[String]) {
    let process = &job.worker.process;
    let share = process.settings.decision_log_share;
    if share <= 0.0 || rand::rng().random::<f64>() >= share {
        return;
    }
    if let Some(snapshot) = process.snapshot.load().as_deref() {
        let wish = job.wish(penstock_shell::clock::now(), unfit);
        let told = explanation(snapshot, rule, wish, &[], Some(choice), changes);
        let id = job.id.to_str().unwrap_or("");
        // One text: a log's field holds no structure.
        let told = serde_json::to_string(&told).unwrap_or_default();
        tracing::info!(target: "decision", { request.id = id, decision = told }, "decision");
    }
}

/// Of a request that goes, or would go, to `choice`. `misfits` are the protocols that cannot carry it, and why.
fn explanation(
    snapshot: &Snapshot,
    rule: &Rule,
    wish: Wish<'_>,
    misfits: &[(Protocol, Misfit)],
    choice: Option<&Choice>,
    changes: &[String],
) -> Explanation {
    let policy = rule.label.rsplit_once('/').map_or("", |(policy, _)| policy);
    let version = snapshot
        .config
        .objects
        .get(&format!("RoutingPolicy/{policy}"));
    Explanation {
        rule: rule.label.clone(),
        generation: version.map_or(0, |version| version.generation),
        digest: snapshot.digest.clone(),
        strategy: format!("{:?}", rule.strategy),
        stream: wish.stream,
        prompt_tokens: wish.prompt_tokens,
        changes: changes.to_vec(),
        tasks: Vec::new(),
        candidates: rule
            .tiers
            .iter()
            .enumerate()
            .flat_map(|(tier, group)| candidates(rule, tier, group, wish, misfits))
            .collect(),
        chosen: choice.and_then(|choice| chosen(rule, choice)),
    }
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

fn candidates<'a>(
    rule: &'a Rule,
    tier: usize,
    group: &'a Tier,
    wish: Wish<'a>,
    misfits: &'a [(Protocol, Misfit)],
) -> impl Iterator<Item = CandidateView> + 'a {
    let both = group.candidates.iter().zip(&group.weights).enumerate();
    both.map(move |(index, (candidate, weight))| CandidateView {
        backend: candidate.backend.id.to_string(),
        tier,
        weight: *weight,
        dropped: dropped(candidate, wish, misfits),
        endpoints: group
            .slots
            .iter()
            .filter(|slot| slot.candidate == index)
            .filter_map(|slot| endpoint(rule, group, candidate, slot, wish))
            .collect(),
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

fn dropped(
    candidate: &Candidate,
    wish: Wish<'_>,
    misfits: &[(Protocol, Misfit)],
) -> Option<String> {
    let lack = wish.unfit.needed.lack_of(candidate);
    let protocol = candidate.backend.protocol;
    let misfit = misfits.iter().find(|(unfit, _)| *unfit == protocol);
    match misfit {
        Some((_, Misfit::Unsupported(param))) => {
            Some(format!("its protocol cannot carry '{param}'"))
        }
        Some((_, Misfit::Invalid(param, expected))) => {
            Some(format!("'{param}' must be {expected}"))
        }
        None if lack.is_some() => lack.map(lacking),
        None if !wish.unfit.failed.lets(candidate) => Some(shut_out(candidate)),
        None if !has_credential(candidate) => Some("its credential has not arrived".to_owned()),
        None if !candidate.has_endpoint() => Some(match &candidate.backend.unsecured {
            Some(why) => format!("TLS cannot be spoken with it: {why}"),
            None => "it has no ready endpoint".to_owned(),
        }),
        None => None,
    }
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

fn endpoint(
    rule: &Rule,
    group: &Tier,
    candidate: &Candidate,
    slot: &Slot,
    wish: Wish<'_>,
) -> Option<EndpointView> {
    let endpoint = candidate.backend.endpoints.get(slot.endpoint)?;
    let live = &endpoint.live;
    let homes = match rule.strategy {
        Strategy::PeakEwma => group.prefixes.homes(wish.blocks),
        _ => Vec::new(),
    };
    Some(EndpointView {
        address: endpoint.address.to_string(),
        standing: Standing::of(live, wish.limit_at(candidate, endpoint), wish.now_ms).label(),
        tls: live.handshake.failed().map(|failed| failed.to_string()),
        in_flight: live.in_flight.load(Ordering::Relaxed),
        waiting_tokens: live.waiting_tokens.load(Ordering::Relaxed),
        average_ms: live.latency(wish.stream).at(wish.now_ms),
        cost: wish.home_cost_at(slot, endpoint, &homes),
        figures: figures(rule, group, candidate, slot, endpoint, wish),
    })
}
