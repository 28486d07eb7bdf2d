use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;
use crate::balance::peak_ewma::{PeakEwma, cost};
use crate::balance::prefix_affinity::{Owner, PrefixIndex};

fn situation(in_flight: u32, waiting_tokens: u32, prompt_tokens: u32) -> Situation {
    let work = Work {
        in_flight,
        waiting_tokens,
        prompt_tokens,
    };
    Situation {
        work,
        cached_tokens: 0,
        kv_use: 0.0,
    }
}

fn foreseen(adaptive: &Adaptive, situation: Situation, peak_ms: f32) -> Foreseen {
    Foreseen {
        situation,
        ttft_ms: adaptive.predict(&situation, 0).ttft_ms,
        peak_ms,
    }
}

/// An endpoint whose streams took `ttft_ms` and came `itl_ms` apart, and of which `PeakEwma` foresaw `peak_ms`.
fn taught(ttft_ms: f32, itl_ms: f32, peak_ms: f32) -> Adaptive {
    let adaptive = Adaptive::default();
    for _ in 0..100 {
        let foreseen = foreseen(&adaptive, situation(0, 0, 200), peak_ms);
        adaptive.begun(&foreseen, ttft_ms, 0);
        adaptive.written(&foreseen, itl_ms);
    }
    adaptive
}

fn forecast(adaptive: &Adaptive, peak_ms: f32, now_ms: u64) -> Forecast {
    Forecast {
        model: adaptive.predict(&situation(0, 0, 200), now_ms),
        peak_ms,
        peak_cost_ms: peak_ms,
        is_busy: false,
        weight: 1.0,
    }
}

const AIM: Aim = Aim {
    answer_tokens: 200.0,
    ttft_ms: None,
    tpot_ms: None,
};

/// How many of 1,000 requests go to each of two.
fn shares(forecasts: [Forecast; 2], aim: Aim) -> [u32; 2] {
    let mut rng = StdRng::seed_from_u64(5);
    let mut counts = [0; 2];
    for _ in 0..1_000 {
        counts[pick(&forecasts, aim, &[0.5, 1.0], &mut rng).unwrap()] += 1;
    }
    counts
}

#[test]
fn it_learns_what_a_known_prefix_a_queue_and_a_full_cache_mean() {
    let adaptive = Adaptive::default();
    let mut rng = StdRng::seed_from_u64(2);
    let truth = |found: &Situation| {
        let cached = found.cached_tokens as f32;
        let tokens = (found.work.waiting_tokens + found.work.prompt_tokens) as f32 - cached;
        (10.0 + tokens / 20.0) * (1.0 + 4.0 * found.kv_use)
    };
    let mut draw = || {
        let prompt_tokens = rng.random_range(100..4_000);
        Situation {
            cached_tokens: rng.random_range(0..prompt_tokens),
            kv_use: rng.random_range(0.0..1.0),
            ..situation(
                rng.random_range(0..30),
                rng.random_range(0..4_000),
                prompt_tokens,
            )
        }
    };
    for _ in 0..2_000 {
        let found = draw();
        let foreseen = foreseen(&adaptive, found, 100.0);
        adaptive.begun(&foreseen, truth(&found), 0);
    }
    let errors = adaptive.predict(&draw(), 0).errors;
    assert!(
        errors.model < 0.35 && errors.peak > 2.0 * errors.model,
        "{errors:?}"
    );
}

#[test]
fn the_least_predicted_cost_wins_and_others_are_explored() {
    let (quick, slow) = (taught(50.0, 20.0, 100.0), taught(90.0, 20.0, 100.0));
    let both = [forecast(&slow, 10.0, 0), forecast(&quick, 100.0, 0)];
    let [slow, _] = shares(both, AIM);
    assert!((1..30).contains(&slow), "{slow}");
}

#[test]
fn later_tokens_count_where_they_come_slower_than_they_are_read() {
    let (late, slow) = (taught(70.0, 10.0, 100.0), taught(50.0, 101.0, 100.0));
    let both = [forecast(&late, 1.0, 0), forecast(&slow, 1.0, 0)];
    assert!(shares(both, AIM)[0] > 950);
    let soon = taught(50.0, 90.0, 100.0);
    assert!(shares([both[0], forecast(&soon, 1.0, 0)], AIM)[1] > 950);
}

#[test]
fn with_targets_that_counts_which_is_nearer_to_being_missed() {
    let (late, slow) = (taught(700.0, 10.0, 900.0), taught(50.0, 40.0, 90.0));
    let both = [forecast(&late, 1.0, 0), forecast(&slow, 1.0, 0)];
    let aim = |ttft_ms, tpot_ms| Aim {
        ttft_ms,
        tpot_ms,
        ..AIM
    };
    assert!(shares(both, aim(Some(1_000.0), Some(30.0)))[0] > 950);
    assert!(shares(both, aim(Some(500.0), Some(50.0)))[1] > 950);
    assert!(shares(both, aim(Some(500.0), None))[1] > 950);
}

#[test]
fn peak_ewma_decides_while_the_model_knows_little_or_errs() {
    let (good, bad) = (taught(50.0, 20.0, 500.0), taught(80.0, 20.0, 80.0));
    assert_eq!(forecast(&good, 1.0, 0).model.trust, Trust::Full);
    // It is right again and again, and so is `PeakEwma`; then times change, which an average sees at once.
    for _ in 0..20 {
        let foreseen = foreseen(&bad, situation(0, 0, 200), 800.0);
        bad.begun(&foreseen, 800.0, 0);
    }
    assert_eq!(forecast(&bad, 800.0, 0).model.trust, Trust::None);
    let new = Adaptive::default();
    assert_eq!(forecast(&new, 0.0, 0).model.trust, Trust::None);
    // One of two drawn, without exploring.
    assert_eq!(
        shares([forecast(&bad, 800.0, 0), forecast(&new, 40.0, 0)], AIM),
        [0, 1_000]
    );
    assert_eq!(pick(&[], AIM, &[], &mut StdRng::seed_from_u64(1)), None);
}

#[test]
fn what_was_slow_long_ago_gets_one_request_to_show_what_it_does_now() {
    let (slow, quick) = (taught(500.0, 20.0, 900.0), taught(50.0, 20.0, 90.0));
    let later = FRESH_MS + 1;
    let foreseen = foreseen(&quick, situation(0, 0, 200), 90.0);
    quick.begun(&foreseen, 50.0, later);
    let idle = forecast(&slow, 25.0, later);
    assert_eq!(idle.model.trust, Trust::Old);
    let busy = Forecast {
        is_busy: true,
        ..idle
    };
    let quick = forecast(&quick, 90.0, later);
    assert!(shares([idle, quick], AIM)[0] > 950);
    assert!(shares([busy, quick], AIM)[0] < 30);
}

proptest! {
    #[test]
    fn whatever_was_seen_costs_are_numbers(
        seen in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>(), any::<f32>(), any::<f32>()), 0..80),
        targets in prop::option::of((any::<f32>(), any::<f32>())),
        seed in any::<u64>(),
    ) {
        let adaptive = Adaptive::default();
        let mut found = situation(1, 1, 1);
        for (in_flight, waiting, prompt, cached, kv_use, took_ms) in seen {
            found = Situation { cached_tokens: cached, kv_use, ..situation(in_flight, waiting, prompt) };
            let foreseen = foreseen(&adaptive, found, took_ms);
            adaptive.begun(&foreseen, took_ms, 0);
            adaptive.written(&foreseen, took_ms);
            let said = adaptive.predict(&found, 0);
            prop_assert!(said.ttft_ms >= 0.0 && said.ttft_ms <= MOST_MS);
            prop_assert!(said.itl_ms >= 0.0 && said.itl_ms <= MOST_MS);
            prop_assert!(said.errors.model.is_finite() && said.errors.peak.is_finite());
        }
        let aim = Aim { ttft_ms: targets.map(|both| both.0), tpot_ms: targets.map(|both| both.1), ..AIM };
        let said = adaptive.predict(&found, 0);
        prop_assert!(aim.cost(said.ttft_ms, said.itl_ms).is_finite());
        let one = Forecast { model: said, peak_ms: 1.0, peak_cost_ms: 1.0, is_busy: false, weight: 1.0 };
        let picked = pick(&[one, one], aim, &[0.5, 1.0], &mut StdRng::seed_from_u64(seed));
        prop_assert!(picked.is_some_and(|at| at < 2));
    }
}

/// A simulated engine: prompts one after another, then tokens, slower in larger batches.
struct Engine {
    slower: f32,
    /// Until when prompts are computed.
    busy_until: f32,
    /// Prefixes in its cache, the last used ones first.
    cached: VecDeque<u64>,
    peak: PeakEwma,
    adaptive: Adaptive,
    in_flight: u32,
    waiting_tokens: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum By {
    PeakEwma,
    Adaptive,
}

/// Where load comes from.
struct Load {
    engines: [f32; 3],
    prompt_tokens: std::ops::Range<u32>,
    answer_tokens: std::ops::Range<u32>,
    /// How many beginnings of 2,048 tokens prompts share.
    prefixes: u64,
    gap_ms: f32,
}

const PREFIX_TOKENS: u32 = 2_048;
const PREFIXES_IN_CACHE: usize = 12;
/// Tokens of a block.
const BLOCK_TOKENS: u32 = 64;

/// What is to happen, first to last; times in µs.
type Events = BinaryHeap<Reverse<(u64, usize, Event)>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives,
    Begins(usize),
    Ends(usize),
}

struct Request {
    at: f32,
    endpoint: usize,
    foreseen: Foreseen,
    itl_ms: f32,
    answer_tokens: u32,
}

/// Mean time to the first token, in ms, of all requests but the first quarter.
fn simulate(load: &Load, by: By, seed: u64) -> f32 {
    const REQUESTS: usize = 6_000;
    let mut rng = StdRng::seed_from_u64(seed);
    let index = PrefixIndex::default();
    let mut engines = load.engines.map(|slower| Engine {
        slower,
        busy_until: 0.0,
        cached: VecDeque::new(),
        peak: PeakEwma::default(),
        adaptive: Adaptive::default(),
        in_flight: 0,
        waiting_tokens: 0,
    });
    let mut events = Events::from([Reverse((0, 0, Event::Arrives))]);
    let mut requests: Vec<Request> = Vec::new();
    let (mut sum, mut count) = (0.0, 0.0);
    while let Some(Reverse((at_us, number, event))) = events.pop() {
        let now = at_us as f32 / 1_000.0;
        match event {
            Event::Arrives => {
                let request = arrives(load, by, now, &mut engines, &index, &mut rng);
                let begins = engines[request.endpoint].busy_until;
                let begins = Event::Begins(request.endpoint).at(begins, number);
                events.push(begins);
                requests.push(request);
                if number + 1 < REQUESTS {
                    let gap = -load.gap_ms * (1.0 - rng.random::<f32>()).ln();
                    events.push(Event::Arrives.at(now + gap, number + 1));
                }
            }
            Event::Begins(endpoint) => {
                let (request, engine) = (&mut requests[number], &mut engines[endpoint]);
                let took_ms = now - request.at;
                let work = request.foreseen.situation.work;
                engine.waiting_tokens -= work.prompt_tokens;
                engine
                    .peak
                    .observe(took_ms / work.until_first_token(), now as u64);
                engine
                    .adaptive
                    .begun(&request.foreseen, took_ms, now as u64);
                request.itl_ms = engine.slower * (10.0 + 0.2 * engine.in_flight as f32);
                let ends = now + request.itl_ms * request.answer_tokens as f32;
                events.push(Event::Ends(endpoint).at(ends, number));
                if number > REQUESTS / 4 {
                    sum += took_ms;
                    count += 1.0;
                }
            }
            Event::Ends(endpoint) => {
                let request = &requests[number];
                engines[endpoint].in_flight -= 1;
                engines[endpoint]
                    .adaptive
                    .written(&request.foreseen, request.itl_ms);
            }
        }
    }
    sum / count
}

impl Event {
    fn at(self, ms: f32, number: usize) -> Reverse<(u64, usize, Self)> {
        Reverse(((ms * 1_000.0) as u64, number, self))
    }
}

/// A request comes and is sent to an engine, which is busy with prompts until its first token then.
fn arrives(
    load: &Load,
    by: By,
    now: f32,
    engines: &mut [Engine; 3],
    index: &PrefixIndex,
    rng: &mut StdRng,
) -> Request {
    let prefix = (load.prefixes > 0).then(|| rng.random_range(0..load.prefixes));
    let own = rng.random_range(load.prompt_tokens.clone());
    let prompt_tokens = own + prefix.map_or(0, |_| PREFIX_TOKENS);
    let blocks: Vec<u64> = prefix.map_or(Vec::new(), |prefix| {
        (0..u64::from(PREFIX_TOKENS / BLOCK_TOKENS))
            .map(|block| prefix << 32 | block)
            .collect()
    });
    let matched = index.matched(&blocks);
    let answer_tokens = rng.random_range(load.answer_tokens.clone());
    let found: Vec<(Situation, Forecast)> = (1..)
        .zip(engines.iter())
        .map(|(owner, engine): (Owner, &Engine)| {
            let known = matched.iter().find(|known| known.0 == owner);
            let cached_tokens = known.map_or(0, |known| known.1 as u32 * BLOCK_TOKENS);
            let found = situation(engine.in_flight, engine.waiting_tokens, prompt_tokens);
            let found = Situation {
                cached_tokens,
                ..found
            };
            let work = found.work.until_first_token();
            let peak_ms = cost(engine.peak.at(now as u64), work, engine.in_flight, 1.0);
            let forecast = Forecast {
                model: engine.adaptive.predict(&found, now as u64),
                peak_ms,
                peak_cost_ms: 3.0 * peak_ms,
                is_busy: engine.in_flight > 0,
                weight: 1.0,
            };
            (found, forecast)
        })
        .collect();
    let cumulative = [1.0 / 3.0, 2.0 / 3.0, 1.0];
    let forecasts: Vec<Forecast> = found.iter().map(|both| both.1).collect();
    let endpoint = match by {
        By::Adaptive => pick(&forecasts, AIM, &cumulative, rng),
        By::PeakEwma => {
            power_of_two::pick(&cumulative, rng, |_| true, |at| forecasts[at].peak_cost_ms)
        }
    };
    let endpoint = endpoint.unwrap();
    index.learn(&blocks, Owner::try_from(endpoint + 1).unwrap());
    let (situation, forecast) = found[endpoint];
    let engine = &mut engines[endpoint];
    let computed = match prefix {
        Some(prefix) if engine.holds(prefix) => own,
        _ => prompt_tokens,
    };
    let crowd = 1.0 + engine.in_flight as f32 / 64.0;
    let needs_ms = engine.slower * (8.0 + 0.03 * computed as f32) * crowd;
    engine.busy_until = engine.busy_until.max(now) + needs_ms;
    engine.in_flight += 1;
    engine.waiting_tokens += prompt_tokens;
    let average_ms = engine.peak.at(now as u64);
    Request {
        at: now,
        endpoint,
        foreseen: Foreseen {
            situation,
            ttft_ms: forecast.model.ttft_ms,
            peak_ms: average_ms * situation.work.until_first_token(),
        },
        itl_ms: 0.0,
        answer_tokens,
    }
}

impl Engine {
    /// Whether its cache has the prefix, which it then has in any case.
    fn holds(&mut self, prefix: u64) -> bool {
        let at = self.cached.iter().position(|known| *known == prefix);
        if let Some(at) = at {
            self.cached.remove(at);
        }
        self.cached.push_front(prefix);
        self.cached.truncate(PREFIXES_IN_CACHE);
        at.is_some()
    }
}

#[test]
fn in_simulated_pools_first_tokens_come_no_later_than_under_peak_ewma() {
    let one_slow = Load {
        engines: [1.0, 1.0, 5.0],
        prompt_tokens: 200..600,
        answer_tokens: 60..120,
        prefixes: 0,
        gap_ms: 20.0,
    };
    let mixed = Load {
        engines: [1.0; 3],
        prompt_tokens: 50..6_000,
        answer_tokens: 8..256,
        gap_ms: 50.0,
        ..one_slow
    };
    let shared = Load {
        engines: [1.0; 3],
        prompt_tokens: 50..1_000,
        answer_tokens: 16..96,
        prefixes: 30,
        gap_ms: 30.0,
    };
    for (name, load) in [
        ("one slow", one_slow),
        ("mixed sizes", mixed),
        ("shared prefixes", shared),
    ] {
        let mean = |by: By| (1..=4).map(|seed| simulate(&load, by, seed)).sum::<f32>() / 4.0;
        let (peak, ours) = (mean(By::PeakEwma), mean(By::Adaptive));
        assert!(ours <= peak * 1.05, "{name}: {ours} ms, PeakEwma {peak} ms");
    }
}
