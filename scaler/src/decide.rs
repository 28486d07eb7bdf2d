//! How many replicas: from [`Inputs`] up to one tick, what was learned, and the target's bounds to a [`Decision`] that
//! says which bound made it so. Pure; docs/scaler.md holds the same formulas in words.
//!
//! Invariants, tested: never outside [min, max], never below 1, never NaN; data that is missing holds or raises.

use serde::{Deserialize, Serialize};

use crate::inputs::{Inputs, Ledger, Rates, Ttft};
use crate::metadata::TargetSpec;

/// Share of first tokens that must be in time.
pub const ATTAINMENT: f64 = 0.90;
/// Fewer first tokens than this prove nothing, unless a request is overdue.
pub const MIN_SAMPLES: f64 = 20.0;
/// One step of the TTFT bound at most doubles the ready pods.
const MAX_STEP: f64 = 2.0;
/// A pod is loaded to this share of the rate at which misses began.
const MEMORY_MARGIN: f64 = 0.85;
/// For how long such a rate is remembered, ms.
const MEMORY_MS: u64 = 600_000;
/// Remembered rates are at least this far apart, ms, so that their number is bounded by [`MAX_MEMORIES`].
const MEMORY_SPACING_MS: u64 = 10_000;
/// [`MEMORY_MS`] / [`MEMORY_SPACING_MS`], and the newest.
const MAX_MEMORIES: usize = 61;
/// A breach must last this long before its rate is taken for the capacity: the rate's own span.
const BREACH_MS: u64 = 10_000;
/// After the supply grew, the breach that caused it holds what was ordered for this long, unless evidence comes first.
const BREACH_HOLD_MS: u64 = 75_000;
/// Below this share of pods heard, the others' mean says too little to take a pod away.
const FRESH_SHARE: f64 = 0.5;
/// No formula may ask for more; a guard against absurd input, far above what a cluster runs.
const MAX_REPLICAS: u32 = 10_000;
/// The HPA's default tolerance, percent.
pub const DEFAULT_TOLERANCE_PERCENT: u32 = 10;

/// What the cluster says about the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bounds {
    /// `minReplicaCount`.
    pub min: u32,
    /// `maxReplicaCount`.
    pub max: u32,
    /// `.spec.replicas`; none if unknown.
    pub ordered: Option<u32>,
    /// `.status.replicas`; none if unknown.
    pub current: Option<u32>,
    /// The HPA's tolerance in percent; none if unknown.
    pub tolerance_percent: Option<u32>,
}

/// What is remembered from tick to tick.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Replicas of the last decision.
    pub last: Option<u32>,
    breach_since_ms: Option<u64>,
    breach_seen_ms: u64,
    capacities: Vec<Capacity>,
}

/// Work per second and ready pod at which first tokens came too late.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Capacity {
    at_ms: u64,
    per_pod: Rates,
}

/// What KEDA is told, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Replicas that are wanted, within [max(min, 1), max].
    pub replicas: u32,
    /// The metric's value: `replicas`, moved only where the HPA's tolerance would swallow it.
    pub value: f64,
    /// Whether the target should run at all.
    pub active: bool,
    /// Why.
    pub reasons: Reasons,
}

/// The bound that made the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Bound {
    /// `minReplicaCount`, or 1.
    Floor,
    /// `maxReplicaCount`.
    Ceiling,
    /// KV-cache use.
    KvCache,
    /// First tokens come too late now.
    Ttft,
    /// They came too late at this load before.
    Memory,
    /// Data is missing: see [`Hold`].
    Hold,
}

impl Bound {
    /// For logs and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Ceiling => "ceiling",
            Self::KvCache => "kvCache",
            Self::Ttft => "ttft",
            Self::Memory => "memory",
            Self::Hold => "hold",
        }
    }
}

/// Why fewer replicas are not offered now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hold {
    /// Less than a full window was observed.
    Warming,
    /// Neither pods nor gateways were heard.
    Stale,
    /// Fewer than half of the pods were heard.
    PodsStale,
    /// A gateway was not heard.
    LedgerStale,
}

impl Hold {
    /// For logs and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warming => "warming",
            Self::Stale => "stale",
            Self::PodsStale => "podsStale",
            Self::LedgerStale => "ledgerStale",
        }
    }
}

/// Everything that answers "why 7?".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reasons {
    /// The bound that made the number.
    pub binding: Bound,
    /// Why it may not fall now.
    pub hold: Option<Hold>,
    /// Replicas by KV use; none if no engine tells it.
    pub kv_cache: Option<u32>,
    /// Replicas by TTFT; none while first tokens are in time or unproven.
    pub ttft: Option<u32>,
    /// Replicas by remembered misses; none without any.
    pub memory: Option<u32>,
    /// Share of first tokens in time; none without evidence.
    pub attainment: Option<f64>,
    /// Bounds that were applied.
    pub bounds: Bounds,
    /// Load that was seen.
    pub inputs: Inputs,
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 0..=MAX_REPLICAS"
)]
fn whole(replicas: f64) -> u32 {
    // The allowance keeps 0.75 / 0.75 and the like from becoming 2. NaN becomes 0.
    (replicas - 1e-9).ceil().clamp(0.0, f64::from(MAX_REPLICAS)) as u32
}

/// Decides. None if neither data nor `.spec.replicas` is known: then there is nothing to hold to.
pub fn decide(
    inputs: &Inputs,
    learned: &mut Learned,
    spec: &TargetSpec,
    bounds: Bounds,
    now_ms: u64,
) -> Option<Decision> {
    let floor = bounds.min.max(1);
    let ceiling = bounds.max.max(floor);
    let pods = inputs.ready + inputs.loading;
    let ordered = bounds.ordered.or((pods > 0).then_some(pods));
    let hold = hold(inputs);
    if hold == Some(Hold::Stale) && ordered.is_none() && learned.last.is_none() {
        return None;
    }
    let crowd = inputs.peak_concurrency.map(|peak| whole(peak).max(1));
    let kv_cache = kv_replicas(inputs, spec);
    let ttft = ttft_replicas(inputs, learned, ordered.unwrap_or(floor), now_ms)
        .map(|n| n.min(crowd.unwrap_or(n)));
    let memory = memory_replicas(inputs, learned, now_ms).map(|n| n.min(crowd.unwrap_or(n)));
    let candidates = [
        (Bound::Memory, memory),
        (Bound::Ttft, ttft),
        (Bound::KvCache, kv_cache),
    ];
    let (mut binding, mut replicas) = (Bound::Floor, floor);
    for (bound, wanted) in candidates {
        if let Some(wanted) = wanted.filter(|wanted| *wanted > replicas) {
            (binding, replicas) = (bound, wanted);
        }
    }
    let held = match hold {
        Some(Hold::Stale) => ordered.max(learned.last),
        Some(_) => ordered,
        None => None,
    };
    if let Some(held) = held.filter(|held| *held > replicas) {
        (binding, replicas) = (Bound::Hold, held);
    }
    if replicas > ceiling {
        (binding, replicas) = (Bound::Ceiling, ceiling);
    }
    learned.last = Some(replicas);
    let tolerance = spec
        .tolerance_percent
        .or(bounds.tolerance_percent)
        .unwrap_or(DEFAULT_TOLERANCE_PERCENT);
    let attainment = inputs.ttft.filter(enough).map(|ttft| attainment(&ttft));
    Some(Decision {
        replicas,
        value: value_for(replicas, bounds.current.or(bounds.ordered), tolerance),
        active: is_active(inputs, bounds),
        reasons: Reasons {
            binding,
            hold,
            kv_cache,
            ttft,
            memory,
            attainment,
            bounds,
            inputs: inputs.clone(),
        },
    })
}

/// What may be relied on, worst first.
fn hold(inputs: &Inputs) -> Option<Hold> {
    let pods_heard = inputs.fresh > 0;
    // With no pod to hear there is nothing missing, if the gateways say what is asked for.
    let pods_enough = f64::from(inputs.fresh) >= FRESH_SHARE * f64::from(inputs.counted);
    match inputs.ledger {
        Ledger::Absent | Ledger::Stale if !pods_heard => Some(Hold::Stale),
        _ if !inputs.full => Some(Hold::Warming),
        Ledger::Stale => Some(Hold::LedgerStale),
        _ if !pods_enough => Some(Hold::PodsStale),
        _ => None,
    }
}

/// `ceil((Σ kv + waiting · Σ kv / max(running, 1)) / threshold)`.
fn kv_replicas(inputs: &Inputs, spec: &TargetSpec) -> Option<u32> {
    let kv_use = inputs.kv_use?;
    // One waiting request is expected to need what a running one has, and never more than a whole pod.
    let per_request = (kv_use / inputs.running.max(1.0)).min(1.0);
    let demand = kv_use + inputs.waiting * per_request;
    Some(whole(demand * 100.0 / f64::from(spec.kv_percent)))
}

fn enough(ttft: &Ttft) -> bool {
    ttft.within + ttft.missed >= MIN_SAMPLES || ttft.overdue > 0.0
}

fn attainment(ttft: &Ttft) -> f64 {
    ttft.within / (ttft.within + ttft.missed + ttft.overdue).max(1.0)
}

/// Replicas that the TTFT asks for while it is breached, and the bookkeeping of the breach.
fn ttft_replicas(inputs: &Inputs, learned: &mut Learned, ordered: u32, now_ms: u64) -> Option<u32> {
    match inputs.ttft.filter(enough) {
        Some(ttft) if attainment(&ttft) < ATTAINMENT => {
            let since = *learned.breach_since_ms.get_or_insert(now_ms);
            learned.breach_seen_ms = now_ms;
            learned.remember(inputs, since, now_ms);
            let ready = f64::from(inputs.ready.max(1));
            let pressure = (inputs.running + inputs.waiting) / inputs.running.max(1.0);
            let step = if inputs.ready == 0 {
                1.0
            } else {
                pressure.clamp((1.0 + 1.0 / ready).min(MAX_STEP), MAX_STEP)
            };
            // Counted from pods that are ready: those that load were ordered for this very breach.
            Some(whole(ready * step).max(ordered))
        }
        Some(_) => {
            learned.breach_since_ms = None;
            None
        }
        None => {
            // The supply grew in answer to the breach and has not proved itself yet.
            let recent = now_ms.saturating_sub(learned.breach_seen_ms) < BREACH_HOLD_MS;
            if learned.breach_since_ms.is_some() && !recent {
                learned.breach_since_ms = None;
            }
            learned.breach_since_ms.map(|_| ordered)
        }
    }
}

/// `ceil(demand / (0.85 · least remembered rate per pod))`, by requests and by prompt tokens, whichever is less: it
/// must keep a known breach from coming back, not punish a change of the mix.
fn memory_replicas(inputs: &Inputs, learned: &mut Learned, now_ms: u64) -> Option<u32> {
    learned
        .capacities
        .retain(|capacity| now_ms.saturating_sub(capacity.at_ms) < MEMORY_MS);
    let least = |of: fn(&Rates) -> f64| {
        learned
            .capacities
            .iter()
            .map(|capacity| of(&capacity.per_pod))
            .filter(|rate| *rate > 0.0)
            .reduce(f64::min)
    };
    let by = |demand: f64, capacity: Option<f64>| Some(whole(demand / (MEMORY_MARGIN * capacity?)));
    let requests = by(inputs.demand.requests, least(|rates| rates.requests));
    let tokens = by(
        inputs.demand.prompt_tokens,
        least(|rates| rates.prompt_tokens),
    );
    match (requests, tokens) {
        (Some(requests), Some(tokens)) => Some(requests.min(tokens)),
        (requests, tokens) => requests.or(tokens),
    }
}

impl Learned {
    /// Notes the rate at which a breach happens, once it is that breach's rate and not the calm's before it.
    fn remember(&mut self, inputs: &Inputs, breach_since_ms: u64, now_ms: u64) {
        let proven = inputs
            .ttft
            .is_some_and(|ttft| ttft.within + ttft.missed >= MIN_SAMPLES);
        let settled = now_ms.saturating_sub(breach_since_ms) >= BREACH_MS
            && inputs.supply_age_ms >= BREACH_MS;
        let due = self
            .capacities
            .last()
            .is_none_or(|last| now_ms.saturating_sub(last.at_ms) >= MEMORY_SPACING_MS);
        if inputs.ready == 0 || !proven || !settled || !due {
            return;
        }
        let ready = f64::from(inputs.ready);
        let per_pod = Rates {
            requests: inputs.served.requests / ready,
            prompt_tokens: inputs.served.prompt_tokens / ready,
        };
        if self.capacities.len() == MAX_MEMORIES {
            self.capacities.remove(0);
        }
        self.capacities.push(Capacity {
            at_ms: now_ms,
            per_pod,
        });
    }
}

/// The metric's value for `wanted`, so that an HPA with this tolerance acts on it. It ignores `value / current` within
/// `1 ± tolerance`: a step up inside that band is emitted as the smallest milli-value above it, a step down as no step.
pub fn value_for(wanted: u32, current: Option<u32>, tolerance_percent: u32) -> f64 {
    let Some(current) = current.filter(|current| *current > 0) else {
        return f64::from(wanted);
    };
    let wanted_milli = u64::from(wanted) * 1000;
    let upper_milli = u64::from(current) * 10 * (100 + u64::from(tolerance_percent));
    let lower_milli = u64::from(current) * 10 * (100 - u64::from(tolerance_percent.min(100)));
    let milli = if wanted > current && wanted_milli <= upper_milli {
        upper_milli + 1
    } else if wanted < current && wanted_milli >= lower_milli {
        u64::from(current) * 1000
    } else {
        wanted_milli
    };
    #[expect(
        clippy::cast_precision_loss,
        reason = "at most 10,000 replicas in thousandths"
    )]
    let value = milli as f64 / 1000.0;
    value
}

/// "No" needs positive evidence: everything heard, and nothing asked for over a whole window.
fn is_active(inputs: &Inputs, bounds: Bounds) -> bool {
    let wanted_now = inputs.held + inputs.in_flight + inputs.running + inputs.waiting > 0.0;
    if bounds.min >= 1 || wanted_now {
        return true;
    }
    // Without a pod there is nothing to keep, whatever was asked for lately.
    if bounds.ordered == Some(0) {
        return false;
    }
    if inputs.busy {
        return true;
    }
    let heard =
        inputs.fresh == inputs.counted && (inputs.counted > 0 || inputs.ledger == Ledger::Fresh);
    !(inputs.full && heard && inputs.ledger != Ledger::Stale && inputs.loading == 0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kube::core::Selector;
    use proptest::prelude::*;

    use super::*;
    use crate::inputs::TtftSource;
    use crate::metadata::Source;

    const NOW: u64 = 1_000_000_000;

    fn spec() -> TargetSpec {
        TargetSpec {
            source: Source::Engines {
                backend: None,
                selector: Selector::default(),
                port: 8000,
            },
            kv_percent: 75,
            ttft_p90: Duration::from_millis(500),
            tolerance_percent: Some(0),
        }
    }

    fn bounds(min: u32, max: u32, ordered: u32) -> Bounds {
        Bounds {
            min,
            max,
            ordered: Some(ordered),
            current: Some(ordered),
            tolerance_percent: None,
        }
    }

    /// A pool of `ready` pods that was heard in full and for long.
    fn calm(ready: u32) -> Inputs {
        Inputs {
            ready,
            counted: ready,
            fresh: ready,
            kv_use: Some(0.0),
            peak_concurrency: Some(1_000.0),
            full: true,
            supply_age_ms: 600_000,
            ..Inputs::default()
        }
    }

    fn late(within: f64, missed: f64, overdue: f64) -> Ttft {
        Ttft {
            source: TtftSource::Gateway,
            within,
            missed,
            overdue,
        }
    }

    fn once(inputs: &Inputs, bounds: Bounds) -> Decision {
        decide(inputs, &mut Learned::default(), &spec(), bounds, NOW).unwrap()
    }

    #[test]
    fn idle_pool_stays_at_its_minimum() {
        let decision = once(&calm(1), bounds(1, 8, 1));
        assert_eq!(
            (decision.replicas, decision.reasons.binding),
            (1, Bound::Floor)
        );
        assert!(decision.active, "a pool with a minimum is always active");
    }

    #[test]
    fn kv_use_asks_for_pods_below_the_threshold() {
        for (kv_use, running, waiting, expected) in [
            (0.75, 10.0, 0.0, 1),
            (0.76, 10.0, 0.0, 2),
            (1.5, 10.0, 0.0, 2),
            (1.8, 10.0, 0.0, 3),
            // 0.9 of a pod runs 9; 9 more wait: 1.8 pods of KV, 2.4 with the threshold.
            (0.9, 9.0, 9.0, 3),
            // Nothing runs, nothing is known of what a waiting request needs.
            (0.0, 0.0, 50.0, 1),
            // No request needs more than a pod.
            (3.0, 1.0, 1.0, 6),
        ] {
            let inputs = Inputs {
                kv_use: Some(kv_use),
                running,
                waiting,
                ..calm(1)
            };
            assert_eq!(
                once(&inputs, bounds(1, 20, 1)).replicas,
                expected,
                "{kv_use} {running} {waiting}"
            );
        }
    }

    #[test]
    fn cpu_and_throughput_alone_ask_for_nothing() {
        let inputs = Inputs {
            served: Rates {
                requests: 500.0,
                prompt_tokens: 1e6,
            },
            busy: true,
            ttft: Some(late(1000.0, 0.0, 0.0)),
            ..calm(1)
        };
        assert_eq!(once(&inputs, bounds(1, 8, 1)).replicas, 1);
    }

    #[test]
    fn late_first_tokens_add_pods_by_pressure_between_one_and_double() {
        for (ready, running, waiting, expected) in [
            (1, 10.0, 0.0, 2),
            (4, 40.0, 0.0, 5),
            (4, 40.0, 20.0, 6),
            (4, 40.0, 400.0, 8),
        ] {
            let inputs = Inputs {
                running,
                waiting,
                ttft: Some(late(80.0, 20.0, 0.0)),
                ..calm(ready)
            };
            let decision = once(&inputs, bounds(1, 20, ready));
            assert_eq!(
                (decision.replicas, decision.reasons.binding),
                (expected, Bound::Ttft),
                "{ready} {running} {waiting}"
            );
        }
    }

    #[test]
    fn nine_in_ten_in_time_is_enough_and_few_samples_prove_nothing() {
        let replicas = |ttft| {
            once(
                &Inputs {
                    running: 9.0,
                    ttft,
                    ..calm(1)
                },
                bounds(1, 8, 1),
            )
            .replicas
        };
        assert_eq!(replicas(Some(late(90.0, 10.0, 0.0))), 1);
        assert_eq!(replicas(Some(late(89.0, 11.0, 0.0))), 2);
        assert_eq!(replicas(Some(late(1.0, 18.0, 0.0))), 1, "19 samples");
        assert_eq!(
            replicas(Some(late(0.0, 0.0, 1.0))),
            2,
            "one overdue request"
        );
        assert_eq!(
            replicas(Some(late(100.0, 0.0, 12.0))),
            2,
            "overdue requests are misses"
        );
        assert_eq!(replicas(None), 1);
    }

    #[test]
    fn never_more_pods_for_ttft_than_requests_at_once() {
        // One slow request at a time: no number of pods makes it faster.
        let inputs = Inputs {
            running: 1.0,
            peak_concurrency: Some(1.0),
            ttft: Some(late(0.0, 50.0, 0.0)),
            ..calm(1)
        };
        assert_eq!(once(&inputs, bounds(1, 8, 1)).replicas, 1);
        let inputs = Inputs {
            peak_concurrency: Some(2.4),
            ttft: Some(late(0.0, 50.0, 0.0)),
            ..calm(3)
        };
        assert_eq!(once(&inputs, bounds(1, 8, 3)).replicas, 3);
    }

    #[test]
    fn loading_pods_count_as_ordered_so_one_breach_does_not_run_away() {
        let mut learned = Learned::default();
        let mut ordered = 1;
        for second in 0..120 {
            let inputs = Inputs {
                loading: ordered - 1,
                running: 10.0,
                waiting: 90.0,
                ttft: Some(late(0.0, 50.0, 40.0)),
                ..calm(1)
            };
            ordered = decide(
                &inputs,
                &mut learned,
                &spec(),
                bounds(1, 50, ordered),
                NOW + second * 1000,
            )
            .unwrap()
            .replicas;
        }
        assert_eq!(ordered, 2);
    }

    #[test]
    fn breach_holds_what_was_ordered_until_the_new_pods_prove_themselves() {
        let mut learned = Learned::default();
        let breach = Inputs {
            running: 10.0,
            ttft: Some(late(0.0, 50.0, 0.0)),
            ..calm(1)
        };
        decide(&breach, &mut learned, &spec(), bounds(1, 8, 1), NOW).unwrap();
        let mut at = |ms: u64, ttft| {
            let inputs = Inputs {
                running: 10.0,
                ttft,
                ..calm(2)
            };
            decide(&inputs, &mut learned, &spec(), bounds(1, 8, 2), NOW + ms)
                .unwrap()
                .replicas
        };
        assert_eq!(at(5_000, None), 2, "no evidence yet");
        assert_eq!(at(10_000, Some(late(100.0, 0.0, 0.0))), 1, "in time again");
        assert_eq!(at(11_000, None), 1);
    }

    #[test]
    fn remembered_misses_keep_the_pool_from_shrinking_into_them_again() {
        let mut learned = Learned::default();
        let rates = |requests: f64| Rates {
            requests,
            prompt_tokens: requests * 100.0,
        };
        // 10 requests/s are too much for one pod: 12 come, 10 are served.
        for second in 0..20 {
            let inputs = Inputs {
                running: 10.0,
                served: rates(10.0),
                demand: rates(12.0),
                ttft: Some(late(10.0, 50.0, 0.0)),
                ..calm(1)
            };
            decide(
                &inputs,
                &mut learned,
                &spec(),
                bounds(1, 8, 1),
                NOW + second * 1000,
            )
            .unwrap();
        }
        let mut with_two = |minutes: u64, demand: f64| {
            let inputs = Inputs {
                running: 10.0,
                served: rates(demand),
                demand: rates(demand),
                ttft: Some(late(500.0, 0.0, 0.0)),
                ..calm(2)
            };
            let decision = decide(
                &inputs,
                &mut learned,
                &spec(),
                bounds(1, 8, 2),
                NOW + minutes * 60_000,
            )
            .unwrap();
            (decision.replicas, decision.reasons.binding)
        };
        assert_eq!(with_two(1, 12.0), (2, Bound::Memory));
        assert_eq!(with_two(1, 20.0), (3, Bound::Memory), "20 of 8.5 each");
        assert_eq!(with_two(2, 8.0), (1, Bound::Floor));
        assert_eq!(with_two(9, 12.0), (2, Bound::Memory));
        assert_eq!(
            with_two(11, 12.0),
            (1, Bound::Floor),
            "forgotten after ten minutes"
        );
    }

    #[test]
    fn rate_is_remembered_only_once_the_breach_has_lasted() {
        let mut learned = Learned::default();
        let inputs = Inputs {
            running: 9.0,
            served: Rates {
                requests: 0.1,
                prompt_tokens: 1.0,
            },
            ttft: Some(late(0.0, 50.0, 0.0)),
            ..calm(1)
        };
        for second in 0..10 {
            decide(
                &inputs,
                &mut learned,
                &spec(),
                bounds(1, 8, 1),
                NOW + second * 1000,
            )
            .unwrap();
        }
        assert!(
            learned.capacities.is_empty(),
            "the calm before the breach would look like a tiny capacity"
        );
    }

    #[test]
    fn memories_are_bounded() {
        let mut learned = Learned::default();
        let inputs = Inputs {
            running: 9.0,
            served: Rates {
                requests: 5.0,
                prompt_tokens: 5.0,
            },
            ttft: Some(late(0.0, 50.0, 0.0)),
            ..calm(1)
        };
        for second in 0..3_600 {
            decide(
                &inputs,
                &mut learned,
                &spec(),
                bounds(1, 8, 1),
                NOW + second * 1000,
            )
            .unwrap();
            assert!(learned.capacities.len() <= MAX_MEMORIES);
        }
        assert!(learned.capacities.len() >= MAX_MEMORIES - 1);
    }

    #[test]
    fn until_the_window_is_full_the_pool_may_grow_but_not_shrink() {
        let young = Inputs {
            full: false,
            ..calm(3)
        };
        let decision = once(&young, bounds(1, 8, 3));
        assert_eq!(
            (decision.replicas, decision.reasons.hold),
            (3, Some(Hold::Warming))
        );
        let decision = once(
            &Inputs {
                kv_use: Some(3.0),
                running: 30.0,
                ..young
            },
            bounds(1, 8, 3),
        );
        assert_eq!(
            (decision.replicas, decision.reasons.binding),
            (4, Bound::KvCache)
        );
    }

    #[test]
    fn lost_data_holds_at_each_step_of_the_ladder() {
        for (inputs, hold) in [
            (
                Inputs {
                    fresh: 1,
                    ..calm(3)
                },
                Hold::PodsStale,
            ),
            (
                Inputs {
                    ledger: Ledger::Stale,
                    ..calm(3)
                },
                Hold::LedgerStale,
            ),
            (
                Inputs {
                    fresh: 0,
                    ledger: Ledger::Stale,
                    ..calm(3)
                },
                Hold::Stale,
            ),
            (
                Inputs {
                    fresh: 0,
                    ..calm(3)
                },
                Hold::Stale,
            ),
            (
                Inputs {
                    fresh: 0,
                    ledger: Ledger::Fresh,
                    ..calm(3)
                },
                Hold::PodsStale,
            ),
        ] {
            let decision = once(&inputs, bounds(1, 8, 3));
            assert_eq!(
                (decision.replicas, decision.reasons.hold),
                (3, Some(hold)),
                "{inputs:?}"
            );
        }
        assert_eq!(
            once(
                &Inputs {
                    fresh: 2,
                    ..calm(3)
                },
                bounds(1, 8, 3)
            )
            .replicas,
            1,
            "most pods were heard"
        );
    }

    #[test]
    fn stale_pool_keeps_the_larger_of_the_last_answer_and_the_order() {
        let mut learned = Learned::default();
        let busy = Inputs {
            kv_use: Some(3.7),
            running: 40.0,
            ..calm(3)
        };
        assert_eq!(
            decide(&busy, &mut learned, &spec(), bounds(1, 8, 3), NOW)
                .unwrap()
                .replicas,
            5
        );
        let gone = Inputs {
            fresh: 0,
            kv_use: None,
            ..calm(3)
        };
        assert_eq!(
            decide(&gone, &mut learned, &spec(), bounds(1, 8, 3), NOW + 1)
                .unwrap()
                .replicas,
            5
        );
        assert_eq!(
            decide(&gone, &mut learned, &spec(), bounds(1, 8, 7), NOW + 2)
                .unwrap()
                .replicas,
            7
        );
    }

    #[test]
    fn nothing_known_is_no_decision() {
        let unknown = Bounds {
            min: 1,
            max: 8,
            ..Bounds::default()
        };
        assert_eq!(
            decide(
                &Inputs::default(),
                &mut Learned::default(),
                &spec(),
                unknown,
                NOW
            ),
            None
        );
        let known = decide(
            &Inputs::default(),
            &mut Learned::default(),
            &spec(),
            bounds(0, 8, 0),
            NOW,
        )
        .unwrap();
        assert_eq!((known.replicas, known.active), (1, false));
    }

    #[test]
    fn tolerance_is_crossed_upwards_and_accepted_downwards() {
        for (wanted, current, expected) in [
            (11, 10, 11.001),
            (12, 11, 12.101),
            (10, 9, 10.0),
            (21, 20, 22.001),
            (9, 10, 10.0),
            (8, 10, 8.0),
            (10, 10, 10.0),
            (1, 1, 1.0),
            (2, 1, 2.0),
        ] {
            assert_eq!(
                value_for(wanted, Some(current), 10),
                expected,
                "{wanted} of {current}"
            );
        }
        assert_eq!(value_for(12, Some(11), 0), 12.0);
        assert_eq!(value_for(5, None, 10), 5.0);
        assert_eq!(value_for(5, Some(0), 10), 5.0);
    }

    #[test]
    fn activity_ends_only_on_positive_evidence() {
        let idle = Inputs {
            ledger: Ledger::Fresh,
            ..calm(1)
        };
        assert!(!once(&idle, bounds(0, 8, 1)).active);
        for inputs in [
            Inputs {
                full: false,
                ..idle.clone()
            },
            Inputs {
                fresh: 0,
                ..idle.clone()
            },
            Inputs {
                loading: 1,
                ..idle.clone()
            },
            Inputs {
                ledger: Ledger::Stale,
                ..idle.clone()
            },
            Inputs {
                busy: true,
                ..idle.clone()
            },
            Inputs {
                in_flight: 1.0,
                ..idle.clone()
            },
        ] {
            assert!(once(&inputs, bounds(0, 8, 1)).active, "{inputs:?}");
        }
        let held = Inputs {
            held: 1.0,
            ledger: Ledger::Fresh,
            full: true,
            ..Inputs::default()
        };
        assert!(
            once(&held, bounds(0, 8, 0)).active,
            "one held request wakes the pool"
        );
        let lost = Inputs {
            ledger: Ledger::Stale,
            full: true,
            ..Inputs::default()
        };
        assert!(
            !once(&lost, bounds(0, 8, 0)).active,
            "missing data does not wake a pool from zero"
        );
    }

    fn any_inputs() -> impl Strategy<Value = Inputs> {
        let gauge = || prop_oneof![Just(0.0), 0.0..500.0_f64, Just(1e12)];
        let ttft = prop::option::of((gauge(), gauge(), gauge()).prop_map(
            |(within, missed, overdue)| Ttft {
                source: TtftSource::Pods,
                within,
                missed,
                overdue,
            },
        ));
        let pods = (0..60_u32, 0..10_u32, 0..60_u32);
        let ledger = prop_oneof![
            Just(Ledger::Absent),
            Just(Ledger::Fresh),
            Just(Ledger::Stale)
        ];
        let load = (
            prop::option::of(0.0..80.0_f64),
            gauge(),
            gauge(),
            gauge(),
            prop::option::of(gauge()),
        );
        (
            pods,
            load,
            ttft,
            ledger,
            any::<(bool, bool)>(),
            (gauge(), gauge(), gauge()),
        )
            .prop_map(
                |(
                    (ready, loading, fresh),
                    (kv_use, running, waiting, held, peak_concurrency),
                    ttft,
                    ledger,
                    (full, busy),
                    (a, b, c),
                )| Inputs {
                    ready,
                    loading,
                    counted: ready,
                    fresh: fresh.min(ready),
                    kv_use,
                    running,
                    waiting,
                    held,
                    in_flight: a,
                    peak_concurrency,
                    ttft,
                    served: Rates {
                        requests: b,
                        prompt_tokens: c,
                    },
                    demand: Rates {
                        requests: c,
                        prompt_tokens: b,
                    },
                    ledger,
                    full,
                    busy,
                    supply_age_ms: 600_000,
                },
            )
    }

    proptest! {
        #[test]
        fn decision_never_leaves_the_bounds_nor_becomes_nonsense(
            all in prop::collection::vec(any_inputs(), 1..30), min in 0..5_u32, extra in 0..30_u32, ordered in prop::option::of(0..40_u32),
            tolerance in 0..=100_u32, step in 1..30_000_u64,
        ) {
            let mut learned = Learned::default();
            let spec = TargetSpec { tolerance_percent: Some(tolerance), ..spec() };
            let bounds = Bounds { min, max: min + extra, ordered, current: ordered, tolerance_percent: None };
            for (tick, inputs) in (0_u64..).zip(&all) {
                let Some(decision) = decide(inputs, &mut learned, &spec, bounds, NOW + tick * step) else {
                    prop_assert!(ordered.is_none());
                    continue;
                };
                prop_assert!(decision.replicas >= min.max(1) && decision.replicas <= (min + extra).max(min.max(1)));
                prop_assert!(decision.value.is_finite() && decision.value >= 1.0);
            }
        }

        #[test]
        fn missing_data_never_answers_below_the_order(inputs in any_inputs(), ordered in 1..8_u32) {
            let decision = once(&inputs, bounds(1, 8, ordered));
            if inputs.fresh == 0 && inputs.ledger != Ledger::Fresh || inputs.ledger == Ledger::Stale || !inputs.full {
                prop_assert!(decision.replicas >= ordered);
            }
        }

        #[test]
        fn more_kv_use_or_more_waiting_never_asks_for_less(inputs in any_inputs(), more_kv in 0.0..20.0_f64, more_waiting in 0.0..50.0_f64) {
            let more = Inputs {
                kv_use: inputs.kv_use.map(|kv| kv + more_kv), waiting: inputs.waiting + more_waiting, ..inputs.clone()
            };
            prop_assert!(once(&more, bounds(1, 40, 1)).replicas >= once(&inputs, bounds(1, 40, 1)).replicas);
        }

        #[test]
        fn emitted_value_makes_the_hpa_reach_at_least_what_is_wanted(wanted in 1..200_u32, current in 1..200_i32, tolerance in 0..=20_u32) {
            use crate::hpa::{Behavior, Hpa, Metric, Scale, Spec, Sync, Target};
            let value = value_for(wanted, u32::try_from(current).ok(), tolerance);
            let spec = Spec { min: 1, max: 1000, behavior: Some(Behavior::default()), tolerance: f64::from(tolerance) / 100.0 };
            let scale = Scale { spec_replicas: current, status_replicas: current, ready_pods: current };
            let metric = Metric { target: Target::AverageValue(1000), value: Some(crate::keda::metric_milli(value, 0)) };
            let Sync::Scale { wanted: asked, .. } = Hpa::new(spec).sync(0, scale, &[metric]) else { panic!("no scale") };
            if i64::from(wanted) > i64::from(current) {
                prop_assert!(i64::from(asked) >= i64::from(wanted), "{asked} for {wanted} of {current}");
                // Whole milli-values: at most one pod above what the band forces.
                let band = i64::from(current) * i64::from(100 + tolerance);
                prop_assert!(i64::from(asked) * 100 <= (i64::from(wanted) * 100).max(band) + 100);
            } else {
                prop_assert!(asked <= current);
            }
        }
    }
}
