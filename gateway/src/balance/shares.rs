//! What priorities and weights mean, under every strategy alike: one table.

use std::sync::Arc;

use penstock_core::config::{NameMatch, Slo, Strategy};
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::balance::prefix_affinity;
use crate::capability::Needed;
use crate::choose::choose;
use crate::fallback::Failed;
use crate::in_flight::{InFlight, Kind};
use crate::load::Ticket;
use crate::outlier::FAILURES;
use crate::snapshot::tests::{build, config, endpoints, rule, rule_of};
use crate::snapshot::{Endpoint, Rule};
use crate::source::Credentials;
use crate::wish::{Unfit, Wish};

/// Requests under way at one time: so many that shares show.
const REQUESTS: u64 = 400;
/// How far a share may be off, of all requests: hashes of so many keys are off by 0.1 once in thousands of tables.
const OFF: f64 = 0.12;
/// In the process's ms.
const NOW_MS: u64 = 1_000;

/// What a weight is a share of.
#[derive(Clone, Copy, Debug)]
enum Weighs {
    /// The requests, whatever number of endpoints the backend has.
    Backend,
    /// Speed: of two endpoints equally quick, one whose backend has twice the weight counts as twice as quick.
    Speed,
}

/// A strategy, and what it goes by.
#[derive(Clone, Copy, Debug)]
struct Case {
    strategy: Strategy,
    /// Which target it has for the first token.
    ttft_ms: Option<u64>,
    /// Whether its models know the endpoints.
    is_trained: bool,
    weighs: Weighs,
}

const fn case(strategy: Strategy) -> Case {
    Case {
        strategy,
        ttft_ms: None,
        is_trained: false,
        weighs: Weighs::Backend,
    }
}

fn cases() -> Vec<Case> {
    use Strategy::{
        Adaptive, Capability, Cost, CostLatency, Hash, KvAware, Latency, LeastRequests, PeakEwma,
        PowerOfTwo, PrefixAffinity, Region, RoundRobin, Sticky,
    };
    let speed = |strategy| Case {
        weighs: Weighs::Speed,
        ..case(strategy)
    };
    vec![
        case(PeakEwma),
        case(PowerOfTwo),
        case(LeastRequests),
        case(RoundRobin),
        case(Hash),
        case(Sticky),
        case(PrefixAffinity),
        case(KvAware),
        case(Region),
        case(Cost),
        case(Capability),
        case(CostLatency),
        // No backend is as quick as is wanted.
        Case {
            ttft_ms: Some(1),
            ..speed(CostLatency)
        },
        speed(Latency),
        // `PeakEwma` decides.
        case(Adaptive),
        Case {
            is_trained: true,
            ..speed(Adaptive)
        },
    ]
}

/// A backend of the rule: its weight, its priority and how many endpoints it has.
type Given = (u32, u32, u16);

fn built(case: Case, given: &[Given]) -> Arc<Rule> {
    let names = ["a", "b", "c", "d"];
    let backends: Vec<_> = names
        .iter()
        .zip(given)
        .map(|(name, (weight, priority, _))| (*name, *weight, *priority))
        .collect();
    let ports: Vec<Vec<u16>> = (1..)
        .zip(given)
        .map(|(base, (_, _, count))| (base * 100..base * 100 + count).collect())
        .collect();
    let services: Vec<_> = names
        .iter()
        .zip(&ports)
        .map(|(name, ports)| (*name, &ports[..]))
        .collect();
    let mut rule = rule("r", &[NameMatch::Exact("m".to_owned())], &backends);
    rule.strategy = case.strategy;
    rule.slo = Slo {
        ttft_ms: case.ttft_ms,
        tpot_ms: None,
    };
    let snapshot = build(
        config(&names[..given.len()], vec![rule]),
        &endpoints(&services),
        &Credentials::default(),
        None,
    );
    rule_of(&snapshot, "m").unwrap()
}

fn all(rule: &Rule, tier: usize) -> impl Iterator<Item = &Arc<Endpoint>> {
    let candidates = rule.tiers[tier].candidates.iter();
    candidates.flat_map(|candidate| &candidate.backend.endpoints)
}

static NOBODY: Unfit = Unfit {
    protocols: Vec::new(),
    models: Vec::new(),
    needed: Needed::NOTHING,
    only: None,
    trial: None,
    failed: Failed::NOTHING,
};

fn wish(stream: bool, key: Option<u64>, blocks: &[u64]) -> Wish<'_> {
    Wish {
        now_ms: NOW_MS,
        stream,
        model: "m",
        prompt_tokens: 100,
        limit_tokens: 100,
        answer_tokens: 100,
        blocks,
        key,
        region: None,
        unfit: &NOBODY,
    }
}

/// All of them are known to be equally quick.
fn make_known(rule: &Rule, is_trained: bool) {
    for tier in 0..rule.tiers.len() {
        for endpoint in all(rule, tier) {
            for stream in [true, false] {
                endpoint.live.latency(stream).observe(100.0, NOW_MS);
            }
            if is_trained {
                let foreseen = wish(true, None, &[]).foreseen_at(endpoint, &[]);
                // Slower than `PeakEwma` thinks, so that the model is right more often.
                let work = foreseen.situation.work.until_first_token();
                for _ in 0..60 {
                    let foreseen = wish(true, None, &[]).foreseen_at(endpoint, &[]);
                    endpoint
                        .live
                        .adaptive
                        .begun(&foreseen, 150.0 * work, NOW_MS);
                }
            }
        }
    }
}

/// A place at an endpoint, in the balancer's figures and in its backend's.
fn hold(
    rule: &Rule,
    tier: usize,
    candidate: usize,
    endpoint: &Arc<Endpoint>,
    stream: bool,
) -> Held {
    let now = penstock_shell::clock::now();
    let kind = if stream { Kind::Stream } else { Kind::Whole };
    let ledger = &rule.tiers[tier].candidates[candidate].backend.ledger;
    (
        InFlight::enter(endpoint, kind, 100, now, NOW_MS),
        Ticket::enter(ledger, 0, 400, stream, now),
    )
}

type Held = (InFlight, Ticket);

/// Which part of as many requests as there are under way each candidate of the first tier has.
fn shares(rule: &Rule, stream: bool, seed: u64) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut counts = vec![0_u32; rule.tiers[0].candidates.len()];
    let mut held = Vec::new();
    for number in 0..REQUESTS {
        let key = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let blocks = prefix_affinity::blocks(&[key.to_string().repeat(100).as_bytes()]);
        let wish = wish(stream, Some(key), &blocks);
        let choice = choose(rule, &[], wish, &mut rng).ok().unwrap();
        assert_eq!(choice.tier, 0);
        counts[choice.candidate] += 1;
        held.push(hold(rule, 0, choice.candidate, &choice.endpoint, stream));
    }
    let requests = f64::from(u32::try_from(REQUESTS).unwrap());
    counts
        .into_iter()
        .map(|count| f64::from(count) / requests)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn equals_share_requests_under_way_by_weight(
        weights in prop::collection::vec(1_u32..6, 2..4),
        counts in prop::collection::vec(1_u16..4, 4),
        stream in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let given: Vec<Given> = weights.iter().zip(counts).map(|(weight, count)| (*weight, 0, count)).collect();
        for case in cases() {
            // Of other answers a target for the first token says little: most of their time there is fixed.
            let stream = stream || case.ttft_ms.is_some();
            let rule = built(case, &given);
            make_known(&rule, case.is_trained);
            let parts = given.iter().map(|(weight, _, count)| match case.weighs {
                // Without streams nothing is known of the first token, and `PeakEwma` decides.
                Weighs::Speed if stream || case.strategy != Strategy::Adaptive => f64::from(*weight) * f64::from(*count),
                _ => f64::from(*weight),
            });
            let parts: Vec<f64> = parts.collect();
            let sum: f64 = parts.iter().sum();
            let shares = shares(&rule, stream, seed);
            for (share, part) in shares.iter().zip(&parts) {
                prop_assert!((share - part / sum).abs() < OFF, "{case:?} {given:?} {stream}: {shares:?} for {parts:?}");
            }
        }
    }

    #[test]
    fn a_lower_priority_gets_nothing_while_a_higher_one_can_answer_and_all_when_none_can(
        given in prop::collection::vec((1_u32..6, 0_u32..2, 1_u16..4), 2..5),
        busy in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..30), 0..4),
        slow in prop::collection::vec((any::<prop::sample::Index>(), 1.0_f32..5_000.0), 0..6),
        failing in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        stream in any::<bool>(),
        seed in any::<u64>(),
    ) {
        // Both priorities are there.
        let given: Vec<Given> = given.iter().enumerate().map(|(at, (weight, priority, count))| match at {
            0 | 1 => (*weight, u32::from(at == 1), *count),
            _ => (*weight, *priority, *count),
        }).collect();
        for case in cases() {
            let rule = built(case, &given);
            make_known(&rule, case.is_trained);
            let first: Vec<_> = all(&rule, 0).collect();
            let mut held = Vec::new();
            for (index, count) in &busy {
                let endpoint = index.get(&first);
                let candidates = rule.tiers[0].candidates.iter();
                let has = |endpoints: &[Arc<Endpoint>]| endpoints.iter().any(|one| Arc::ptr_eq(one, endpoint));
                let candidate = candidates.clone().position(|candidate| has(&candidate.backend.endpoints)).unwrap();
                held.extend((0..*count).map(|_| hold(&rule, 0, candidate, endpoint, stream)));
            }
            for (index, ms) in &slow {
                index.get(&first).live.latency(stream).observe(*ms, NOW_MS);
            }
            let fail = |endpoint: &Endpoint| endpoint.live.outlier.failed(FAILURES, NOW_MS, 0, 100);
            // One of them works.
            for index in failing.iter().filter(|_| first.len() > 1) {
                fail(first[1 + index.index(first.len() - 1)]);
            }
            let mut rng = StdRng::seed_from_u64(seed);
            let tiers = |rng: &mut StdRng| -> Vec<usize> {
                let tiers = (0..20_u64).map(|key| choose(&rule, &[], wish(stream, Some(key), &[key]), rng).ok().unwrap().tier);
                tiers.collect()
            };
            prop_assert_eq!(tiers(&mut rng), [0; 20], "{:?}", case);
            for endpoint in &first {
                fail(endpoint);
            }
            prop_assert_eq!(tiers(&mut rng), [1; 20], "{:?}", case);
        }
    }
}
