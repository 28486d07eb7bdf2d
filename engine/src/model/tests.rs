//! Claims about the step model: properties over random loads, and replays of measured runs.

use proptest::prelude::*;

use super::*;

const STEP: StepTime = StepTime {
    base_ns: 1_000_000,
    prefill_token_ns: 10_000,
    kv_token_ns: 10,
    sequence_ns: 1_000,
};

fn limits() -> Limits {
    Limits {
        block_size: 4,
        num_gpu_blocks: 33,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 128,
        max_num_queued_reqs: 1_000,
        prefix_caching: true,
    }
}

fn request(prompt_tokens: u32, output_tokens: u32) -> Submission {
    Submission {
        prompt_tokens,
        output_tokens,
        ending: Ending::Length,
        max_tokens: output_tokens,
        block_hashes: Vec::new(),
    }
}

/// A model on a virtual clock, with what came out of it.
struct Bench {
    model: Model,
    now: Duration,
    events: Vec<Event>,
    plans: Vec<StepPlan>,
}

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            model: Model::new(limits, STEP).unwrap(),
            now: Duration::ZERO,
            events: Vec::new(),
            plans: Vec::new(),
        }
    }

    fn submit(&mut self, submission: Submission) -> RequestId {
        self.model.submit(submission, self.now).unwrap()
    }

    fn step(&mut self) -> Option<StepPlan> {
        let plan = self.model.begin_step(self.now)?;
        self.check();
        self.now += plan.duration;
        self.model.finish_step(self.now, &mut self.events);
        self.check();
        self.plans.push(plan);
        Some(plan)
    }

    fn drain(&mut self) {
        while self.step().is_some() {
            assert!(self.plans.len() < 1_000_000, "the model makes no progress");
        }
    }

    fn check(&self) {
        let held = self
            .model
            .running
            .iter()
            .flat_map(|request| request.blocks.iter().copied());
        self.model.pool.check(held);
        assert!(self.model.running.is_sorted_by_key(|request| request.id));
        assert!(
            self.model
                .waiting
                .values()
                .all(|request| request.blocks.is_empty())
        );
        assert!(self.model.running.len() <= self.model.limits.max_num_seqs as usize);
    }

    fn finished(&self) -> Vec<(RequestId, Summary)> {
        let ends = self.events.iter().filter_map(|event| match event {
            Event::Finished { id, summary, .. } => Some((*id, *summary)),
            _ => None,
        });
        ends.collect()
    }
}

#[test]
fn idle_engine_has_no_step() {
    let mut bench = Bench::new(limits());
    assert_eq!(bench.step(), None);
}

#[test]
fn lone_request_takes_a_prefill_step_and_a_step_per_further_token() {
    let mut bench = Bench::new(limits());
    bench.submit(request(10, 3));
    bench.drain();
    let shape: Vec<_> = bench
        .plans
        .iter()
        .map(|plan| (plan.prefill_tokens, plan.decode_tokens))
        .collect();
    assert_eq!(shape, [(10, 0), (0, 1), (0, 1)]);
    assert_eq!(bench.plans[0].duration, STEP.of(10, 0, 1));
    assert_eq!(bench.plans[2].duration, STEP.of(0, 11, 1));
    let (_, summary) = bench.finished()[0];
    assert_eq!(summary.end_to_end, bench.now);
    assert_eq!(summary.prefill, STEP.of(10, 0, 1));
    assert_eq!(summary.prefill + summary.decode, bench.now);
}

#[test]
fn decodes_come_before_a_long_prompt_that_is_cut_to_the_budget() {
    let mut bench = Bench::new(limits());
    bench.submit(request(2, 20));
    bench.step();
    bench.submit(request(40, 1));
    bench.drain();
    let shape: Vec<_> = bench
        .plans
        .iter()
        .take(4)
        .map(|plan| (plan.prefill_tokens, plan.decode_tokens))
        .collect();
    assert_eq!(shape, [(2, 0), (15, 1), (15, 1), (10, 1)]);
}

#[test]
fn equal_prefix_is_computed_once() {
    let mut bench = Bench::new(limits());
    let hashes = vec![1, 2, 3];
    for _ in 0..2 {
        bench.submit(Submission {
            block_hashes: hashes.clone(),
            ..request(14, 2)
        });
        bench.drain();
    }
    let cached: Vec<_> = bench
        .finished()
        .iter()
        .map(|(_, summary)| summary.cached_tokens)
        .collect();
    assert_eq!(cached, [0, 12]);
    let hits: u64 = bench.plans.iter().map(|plan| plan.cache_hits).sum();
    let queries: u64 = bench.plans.iter().map(|plan| plan.cache_queries).sum();
    assert_eq!((hits, queries), (12, 28));
}

#[test]
fn last_prompt_token_is_computed_even_if_all_is_cached() {
    let mut bench = Bench::new(limits());
    for _ in 0..2 {
        bench.submit(Submission {
            block_hashes: vec![1, 2, 3],
            ..request(12, 1)
        });
        bench.drain();
    }
    assert_eq!(bench.finished()[1].1.cached_tokens, 8);
}

#[test]
fn blocks_that_run_out_preempt_the_youngest_which_finishes_later() {
    // Room for 8 blocks; each request ends up with 6.
    let mut bench = Bench::new(Limits {
        num_gpu_blocks: 9,
        max_model_len: 32,
        ..limits()
    });
    let old = bench.submit(request(8, 16));
    let young = bench.submit(request(8, 16));
    bench.drain();
    let ends = bench.finished();
    assert_eq!(
        ends.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [old, young]
    );
    assert_eq!(ends[0].1.preemptions, 0);
    assert!(ends[1].1.preemptions > 0);
    assert_eq!(ends[1].1.generated_tokens, 16);
    let first_tokens = bench
        .events
        .iter()
        .filter(|event| matches!(event, Event::FirstToken { .. }))
        .count();
    assert_eq!(
        first_tokens, 2,
        "a request that starts again has had its first token"
    );
}

#[test]
fn request_whose_prompt_does_not_fit_whole_waits_and_so_do_those_behind_it() {
    let mut bench = Bench::new(Limits {
        num_gpu_blocks: 9,
        max_model_len: 32,
        ..limits()
    });
    bench.submit(request(16, 4));
    bench.step();
    bench.submit(request(20, 1));
    bench.submit(request(1, 1));
    bench.step();
    assert_eq!(
        bench.model.load(),
        Load {
            running: 1,
            waiting: 2,
            kv_usage: 5.0 / 8.0
        }
    );
    bench.drain();
    assert_eq!(bench.finished().len(), 3);
}

#[test]
fn abort_frees_blocks_at_once_even_in_the_middle_of_a_step() {
    let mut bench = Bench::new(limits());
    let id = bench.submit(request(16, 50));
    let waiting = bench.submit(request(16, 50));
    bench.model.begin_step(bench.now).unwrap();
    assert!(bench.model.load().kv_usage > 0.0);
    assert!(bench.model.abort(id));
    assert!(bench.model.abort(waiting));
    assert!(!bench.model.abort(id));
    assert_eq!(bench.model.load(), Load::default());
    bench.model.finish_step(bench.now, &mut bench.events);
    assert_eq!(bench.events, []);
    assert_eq!(bench.step(), None);
}

#[test]
fn request_above_the_queue_limit_is_refused_until_one_ends() {
    let mut bench = Bench::new(Limits {
        max_num_queued_reqs: 2,
        ..limits()
    });
    bench.submit(request(1, 1));
    bench.submit(request(1, 1));
    assert_eq!(
        bench.model.submit(request(1, 1), bench.now),
        Err(Refusal::QueueFull)
    );
    bench.step();
    bench.submit(request(1, 1));
}

#[test]
fn request_longer_than_the_model_is_refused() {
    let mut bench = Bench::new(limits());
    for (prompt, output) in [(0, 1), (1, 0), (100, 29), (u32::MAX, u32::MAX)] {
        assert_eq!(
            bench.model.submit(request(prompt, output), bench.now),
            Err(Refusal::Length)
        );
    }
    bench.submit(request(100, 28));
    bench.drain();
    assert_eq!(bench.finished().len(), 1);
}

#[test]
fn limits_that_cannot_work_are_named() {
    let refused = |limits| Model::new(limits, STEP).unwrap_err();
    assert_eq!(
        refused(Limits {
            block_size: 0,
            ..limits()
        }),
        LimitsError::Zero("block-size")
    );
    assert_eq!(
        refused(Limits {
            max_model_len: 129,
            ..limits()
        }),
        LimitsError::LongestRequest {
            kv_tokens: 128,
            max_model_len: 129
        }
    );
    assert_eq!(
        refused(Limits {
            max_num_seqs: 17,
            ..limits()
        }),
        LimitsError::Budget {
            tokens: 16,
            sequences: 17
        }
    );
}

#[derive(Clone, Debug)]
enum Operation {
    Submit {
        prompt: u32,
        output: u32,
        family: u64,
        shared: u32,
    },
    Steps(u32),
    Abort(usize),
    AbortDuringStep(usize),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        4 => (1..60_u32, 1..40_u32, 0..3_u64, 0..20_u32)
            .prop_map(|(prompt, output, family, shared)| Operation::Submit { prompt, output, family, shared }),
        3 => (1..20_u32).prop_map(Operation::Steps),
        1 => any::<prop::sample::Index>().prop_map(|index| Operation::Abort(index.index(1_000))),
        1 => any::<prop::sample::Index>().prop_map(|index| Operation::AbortDuringStep(index.index(1_000))),
    ];
    prop::collection::vec(operation, 1..60)
}

/// Blocks before `shared` are the family's, those after it the request's own.
fn hashes(
    prompt: u32,
    output: u32,
    family: u64,
    shared: u32,
    unique: u64,
    block_size: u32,
) -> Vec<u64> {
    let blocks = (prompt + output) / block_size;
    (0..blocks)
        .map(|block| {
            if block < shared {
                family * 1_000 + u64::from(block)
            } else {
                (unique + 1) << 32 | u64::from(block)
            }
        })
        .collect()
}

/// Plays `operations`, checks every step, and returns the bench with what was submitted and what aborted.
fn play(
    limits: Limits,
    operations: &[Operation],
) -> (Bench, Vec<(RequestId, u32)>, Vec<RequestId>) {
    let mut bench = Bench::new(limits);
    let (mut submitted, mut aborted) = (Vec::new(), Vec::new());
    for operation in operations {
        match *operation {
            Operation::Submit {
                prompt,
                output,
                family,
                shared,
            } => {
                let block_hashes =
                    hashes(prompt, output, family, shared, submitted.len() as u64, 4);
                let id = bench.submit(Submission {
                    block_hashes,
                    ..request(prompt, output)
                });
                submitted.push((id, output));
            }
            Operation::Steps(count) => {
                for _ in 0..count {
                    bench.step();
                }
            }
            Operation::Abort(index) | Operation::AbortDuringStep(index)
                if !submitted.is_empty() =>
            {
                let (id, _) = submitted[index % submitted.len()];
                let stepping = matches!(operation, Operation::AbortDuringStep(_));
                let plan = if stepping {
                    bench.model.begin_step(bench.now)
                } else {
                    None
                };
                if bench.model.abort(id) {
                    aborted.push(id);
                }
                bench.check();
                if let Some(plan) = plan {
                    bench.now += plan.duration;
                    bench.model.finish_step(bench.now, &mut bench.events);
                    bench.plans.push(plan);
                }
            }
            _ => {}
        }
    }
    bench.drain();
    (bench, submitted, aborted)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_conserved_and_budgets_kept(operations in operations(), blocks in 26..60_u32, caching: bool) {
        let limits = Limits { num_gpu_blocks: blocks, max_model_len: 100, prefix_caching: caching, ..limits() };
        let (bench, _, _) = play(limits, &operations);
        for plan in &bench.plans {
            prop_assert!(plan.prefill_tokens + plan.decode_tokens <= limits.max_num_batched_tokens);
            prop_assert!(plan.sequences >= 1 && plan.sequences <= limits.max_num_seqs);
            prop_assert!(plan.duration >= Duration::from_nanos(STEP.base_ns));
        }
        prop_assert_eq!(bench.model.load(), Load::default());
    }

    #[test]
    fn every_request_ends_exactly_once_with_all_its_tokens(
        operations in operations(),
        blocks in 26..60_u32,
        caching: bool,
    ) {
        let limits = Limits { num_gpu_blocks: blocks, max_model_len: 100, prefix_caching: caching, ..limits() };
        let (bench, submitted, aborted) = play(limits, &operations);
        let ends = bench.finished();
        prop_assert_eq!(ends.len() + aborted.len(), submitted.len());
        for (id, output) in submitted {
            let times = ends.iter().filter(|(ended, _)| *ended == id).count();
            prop_assert_eq!(times, usize::from(!aborted.contains(&id)));
            let tokens = bench.events.iter().filter(|event| match event {
                Event::FirstToken { id: of, .. } | Event::Token { id: of, .. } => *of == id,
                Event::Finished { .. } => false,
            });
            if times == 1 {
                prop_assert_eq!(tokens.count(), output as usize);
            }
        }
        prop_assert!(ends.iter().all(|(_, summary)| caching || summary.cached_tokens == 0));
    }

    #[test]
    fn admission_is_in_order_of_arrival(operations in operations(), blocks in 26..60_u32) {
        let limits = Limits { num_gpu_blocks: blocks, max_model_len: 100, ..limits() };
        let (bench, _, _) = play(limits, &operations);
        let mut ends = bench.finished();
        ends.sort_by_key(|(id, _)| *id);
        // Arrival is when the clock stood at submission; admission is arrival plus queue time.
        let first_tokens: Vec<_> = bench.events.iter().filter_map(|event| match event {
            Event::FirstToken { id, .. } => Some(*id),
            _ => None,
        }).filter(|id| ends.iter().any(|(ended, _)| ended == id)).collect();
        prop_assert!(first_tokens.is_sorted(), "{first_tokens:?}");
    }

    #[test]
    fn same_load_gives_the_same_run(operations in operations()) {
        let (first, _, _) = play(limits(), &operations);
        let (second, _, _) = play(limits(), &operations);
        prop_assert_eq!(first.plans, second.plans);
        prop_assert_eq!(first.events, second.events);
    }
}

/// A measured run: arrival, prompt, output, time to first token, decode time; times in milliseconds.
fn measured(text: &str) -> Vec<[u32; 5]> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let fields: Vec<u32> = line
                .split(',')
                .map(|field| field.parse().unwrap())
                .collect();
            fields.try_into().unwrap()
        })
        .collect()
}

/// Means of time to first token and of time per further token, in ms, and the last token's time, in s.
fn means(rows: impl Iterator<Item = (f64, f64, f64)>) -> (f64, f64, f64) {
    let (mut count, mut ttft, mut tpot, mut end) = (0.0, 0.0, 0.0, 0.0_f64);
    for (row_ttft, row_tpot, row_end) in rows {
        count += 1.0;
        ttft += row_ttft;
        tpot += row_tpot;
        end = end.max(row_end);
    }
    (ttft / count, tpot / count, end / 1_000.0)
}

/// Replays a measured run; returns the relative errors of mean TTFT, mean time per token, and span.
fn replay(text: &str, profile: &str, max_num_seqs: u32) -> (f64, f64, f64) {
    let rows = measured(text);
    let profile = Profile::named(profile).unwrap();
    let limits = Limits {
        block_size: 16,
        num_gpu_blocks: profile.num_gpu_blocks,
        max_num_seqs,
        max_num_batched_tokens: 2_048,
        max_model_len: 32_768,
        max_num_queued_reqs: 1_000,
        prefix_caching: true,
    };
    let mut model = Model::new(limits, profile.step_time).unwrap();
    let (mut now, mut events, mut next) = (Duration::ZERO, Vec::new(), 0);
    loop {
        while rows
            .get(next)
            .is_some_and(|row| Duration::from_millis(row[0].into()) <= now)
        {
            let [arrival, prompt, output, ..] = rows[next];
            // Keys of its own: a preempted request finds what is left of its blocks in the prefix cache.
            let block_hashes = hashes(prompt, output, 0, 0, next as u64, 16);
            let submission = Submission {
                block_hashes,
                ..request(prompt, output)
            };
            model
                .submit(submission, Duration::from_millis(arrival.into()))
                .unwrap();
            next += 1;
        }
        if let Some(plan) = model.begin_step(now) {
            now += plan.duration;
            model.finish_step(now, &mut events);
        } else if let Some(row) = rows.get(next) {
            now = Duration::from_millis(row[0].into());
        } else {
            break;
        }
    }
    let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
    let modelled = means(events.iter().filter_map(|event| match event {
        Event::Finished { id, summary, .. } => {
            let ttft = ms(summary.queue + summary.prefill);
            let arrival = f64::from(rows[usize::try_from(id.0).unwrap()][0]);
            let tpot = ms(summary.decode) / f64::from(summary.generated_tokens - 1).max(1.0);
            Some((ttft, tpot, arrival + ms(summary.end_to_end)))
        }
        _ => None,
    }));
    let real = means(rows.iter().map(|&[arrival, _, output, ttft, decode]| {
        let tpot = f64::from(decode) / f64::from(output - 1).max(1.0);
        (f64::from(ttft), tpot, f64::from(arrival + ttft + decode))
    }));
    println!("modelled {modelled:?}, measured {real:?}");
    (
        modelled.0 / real.0 - 1.0,
        modelled.1 / real.1 - 1.0,
        modelled.2 / real.2 - 1.0,
    )
}

#[test]
fn replay_of_a_run_bound_by_sequence_slots_is_close_to_what_was_measured() {
    let text = include_str!("../../tests/fixtures/llama-3.1-8b-rtxpro6000.csv");
    let (ttft, tpot, span) = replay(text, "llama-3.1-8b-rtxpro6000", 128);
    assert!(
        ttft.abs() < 0.08 && tpot.abs() < 0.03 && span.abs() < 0.03,
        "{ttft:.3} {tpot:.3} {span:.3}"
    );
}

#[test]
fn replay_of_a_larger_model_is_close_to_what_was_measured() {
    let text = include_str!("../../tests/fixtures/qwen3-32b-rtxpro6000-tp2.csv");
    let (ttft, tpot, span) = replay(text, "qwen3-32b-rtxpro6000-tp2", 128);
    assert!(
        ttft.abs() < 0.08 && tpot.abs() < 0.03 && span.abs() < 0.03,
        "{ttft:.3} {tpot:.3} {span:.3}"
    );
}

#[test]
fn replay_of_a_run_bound_by_kv_blocks_is_close_to_what_was_measured() {
    let text = include_str!("../../tests/fixtures/llama-3.1-8b-rtx4090.csv");
    let (ttft, tpot, span) = replay(text, "llama-3.1-8b-rtx4090", 256);
    assert!(
        ttft.abs() < 0.08 && tpot.abs() < 0.03 && span.abs() < 0.03,
        "{ttft:.3} {tpot:.3} {span:.3}"
    );
}
