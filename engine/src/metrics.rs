//! The figures of one engine, counted as vLLM counts them and written with vLLM 0.32's names, labels and buckets.
//!
//! Step plans, events and refusals flow in; Prometheus text flows out. Gauges are what the last step left behind, as
//! in vLLM. Families for things that a stand-in does not have (other cache tiers, multi-modal input) are there and
//! 0; those of Python and of its HTTP middleware are left out.

mod exposition;
mod families;
mod histogram;

use std::time::Duration;

use exposition::{Labels, Writer};
use families::{COUNTERS, ESTIMATES, HISTOGRAMS};
use histogram::Histogram;

use crate::model::{Ending, Event, Limits, Load, Refusal, StepPlan, Summary};

const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_LATENCY_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const REQUEST_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const ITERATION_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const COMPLETIONS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
/// Buckets for lengths; vLLM cuts them at the longest length that the model takes.
const LENGTHS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5,
    5e5, 1e6, 2e6, 5e6,
];

/// How a request that was taken came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Stop,
    Length,
    Abort,
    Error,
    Repetition,
}

/// In the order in which vLLM lists them.
const REASONS: [(Reason, &str); 5] = [
    (Reason::Stop, "stop"),
    (Reason::Length, "length"),
    (Reason::Abort, "abort"),
    (Reason::Error, "error"),
    (Reason::Repetition, "repetition"),
];

/// Everything that `/metrics` shows of one engine.
#[derive(Clone, Debug)]
pub struct Metrics {
    served_model: String,
    limits: Limits,
    blocks_overridden: bool,
    /// When the engine began to serve, since 1970.
    created: Duration,
    load: Load,
    cache_queries: u64,
    cache_hits: u64,
    preemptions: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    generated_tokens: u64,
    ended: [u64; REASONS.len()],
    refused: u64,
    prompt: Histogram,
    generation: Histogram,
    iteration: Histogram,
    max_generation: Histogram,
    params_n: Histogram,
    params_max_tokens: Histogram,
    ttft: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_preemptions: Histogram,
    prefill_computed: Histogram,
}

impl Metrics {
    /// Nothing counted yet. `created` is the time of day, since 1970, at which the engine began to serve;
    /// `blocks_overridden` whether the number of blocks was given by hand.
    pub fn new(
        served_model: &str,
        limits: Limits,
        blocks_overridden: bool,
        created: Duration,
    ) -> Self {
        let longest = f64::from(limits.max_model_len);
        let lengths = &LENGTHS[..LENGTHS.partition_point(|&edge| edge <= longest)];
        Self {
            served_model: served_model.to_owned(),
            limits,
            blocks_overridden,
            created,
            load: Load::default(),
            cache_queries: 0,
            cache_hits: 0,
            preemptions: 0,
            prompt_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
            ended: [0; REASONS.len()],
            refused: 0,
            prompt: Histogram::new(lengths),
            generation: Histogram::new(lengths),
            iteration: Histogram::new(ITERATION_TOKENS),
            max_generation: Histogram::new(lengths),
            params_n: Histogram::new(COMPLETIONS),
            params_max_tokens: Histogram::new(lengths),
            ttft: Histogram::new(TTFT_S),
            inter_token: Histogram::new(TOKEN_LATENCY_S),
            per_output_token: Histogram::new(TOKEN_LATENCY_S),
            end_to_end: Histogram::new(REQUEST_S),
            queue: Histogram::new(REQUEST_S),
            inference: Histogram::new(REQUEST_S),
            prefill: Histogram::new(REQUEST_S),
            decode: Histogram::new(REQUEST_S),
            request_preemptions: Histogram::new(PREEMPTIONS),
            prefill_computed: Histogram::new(lengths),
        }
    }

    /// Counts a step that has finished, what it brought about, and what it left behind.
    pub fn step(&mut self, plan: &StepPlan, events: &[Event], load: Load) {
        self.preemptions += u64::from(plan.preempted);
        self.cache_queries += plan.cache_queries;
        self.cache_hits += plan.cache_hits;
        let mut tokens = 0_u32;
        for event in events {
            match event {
                Event::FirstToken {
                    prompt_tokens,
                    cached_tokens,
                    after,
                    ..
                } => {
                    tokens += 1;
                    self.prompt_tokens += u64::from(*prompt_tokens);
                    self.cached_tokens += u64::from(*cached_tokens);
                    self.ttft.observe(after.as_secs_f64());
                }
                Event::Token { after, .. } => {
                    tokens += 1;
                    self.inter_token.observe(after.as_secs_f64());
                }
                Event::Finished {
                    ending, summary, ..
                } => self.finished(*ending, summary),
            }
        }
        self.generated_tokens += u64::from(tokens);
        self.iteration
            .observe(f64::from(plan.prefill_tokens) + f64::from(tokens));
        self.load = load;
    }

    fn finished(&mut self, ending: Ending, summary: &Summary) {
        self.ended(match ending {
            Ending::Stop => Reason::Stop,
            Ending::Length => Reason::Length,
        });
        let generated = f64::from(summary.generated_tokens);
        self.prompt.observe(f64::from(summary.prompt_tokens));
        self.generation.observe(generated);
        self.max_generation.observe(generated);
        self.params_n.observe(1.0);
        self.params_max_tokens
            .observe(f64::from(summary.max_tokens));
        let per_token = summary.decode.as_secs_f64() / (generated - 1.0).max(1.0);
        self.per_output_token.observe(per_token);
        self.end_to_end.observe(summary.end_to_end.as_secs_f64());
        self.queue.observe(summary.queue.as_secs_f64());
        self.inference
            .observe((summary.prefill + summary.decode).as_secs_f64());
        self.prefill.observe(summary.prefill.as_secs_f64());
        self.decode.observe(summary.decode.as_secs_f64());
        self.request_preemptions
            .observe(f64::from(summary.preemptions));
        self.prefill_computed.observe(f64::from(
            summary.prompt_tokens.saturating_sub(summary.cached_tokens),
        ));
    }

    fn ended(&mut self, reason: Reason) {
        self.ended[reason as usize] += 1;
    }

    /// Counts a request that was aborted by its client or by shutdown.
    pub fn aborted(&mut self) {
        self.ended(Reason::Abort);
    }

    /// Counts a request that was not taken. Only a full queue is a rejection; vLLM checks lengths before.
    pub fn refused(&mut self, refusal: Refusal) {
        self.refused += u64::from(refusal == Refusal::QueueFull);
    }

    /// Shows `load` from now on, without a step. (vLLM's gauges stay stale after an abort until the next step.)
    pub fn set_load(&mut self, load: Load) {
        self.load = load;
    }

    /// Writes the Prometheus text format, version 0.0.4.
    pub fn render(&self) -> String {
        let mut out = Writer::new(self.created);
        out.family(
            "process_start_time_seconds",
            "gauge",
            "Start of the engine, in seconds since 1970.",
        );
        out.sample(
            "process_start_time_seconds",
            &Labels::none(),
            self.created.as_secs_f64(),
        );
        let labels = Labels::engine(&self.served_model);
        self.render_gauges(&mut out, &labels);
        self.render_caches(&mut out, &labels);
        self.render_counters(&mut out, &labels);
        self.render_histograms(&mut out, &labels);
        self.render_cache_config(&mut out);
        out.finish()
    }

    fn render_gauges(&self, out: &mut Writer, labels: &Labels) {
        for (name, help) in ESTIMATES {
            out.counter(name, help, labels, 0);
        }
        out.gauge(
            "vllm:num_requests_running",
            "Requests in execution batches.",
            labels,
            f64::from(self.load.running),
        );
        let waiting = f64::from(self.load.waiting);
        out.gauge(
            "vllm:num_requests_waiting",
            "Requests that wait to be processed.",
            labels,
            waiting,
        );
        let by_reason = "vllm:num_requests_waiting_by_reason";
        out.family(by_reason, "gauge", "Waiting requests by reason.");
        out.sample(by_reason, &labels.with("reason", "capacity"), waiting);
        out.sample(by_reason, &labels.with("reason", "deferred"), 0.0);
        out.family(
            "vllm:engine_sleep_state",
            "gauge",
            "Whether the engine sleeps; it never does here.",
        );
        for (state, value) in [
            ("awake", 1.0),
            ("weights_offloaded", 0.0),
            ("discard_all", 0.0),
        ] {
            out.sample(
                "vllm:engine_sleep_state",
                &labels.with("sleep_state", state),
                value,
            );
        }
        let help = "Share of the KV cache in use; 1 is all of it.";
        out.gauge("vllm:kv_cache_usage_perc", help, labels, self.load.kv_usage);
    }

    fn render_caches(&self, out: &mut Writer, labels: &Labels) {
        let (queries, hits) = (self.cache_queries, self.cache_hits);
        let values = [
            queries,
            hits,
            0,
            0,
            0,
            0,
            self.preemptions,
            self.prompt_tokens,
        ];
        for ((name, help), value) in COUNTERS.iter().zip(values) {
            out.counter(name, help, labels, value);
        }
        let computed = self.prompt_tokens - self.cached_tokens;
        let sources = [
            ("local_compute", computed),
            ("local_cache_hit", self.cached_tokens),
            ("external_kv_transfer", 0),
        ];
        out.counters(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by source.",
            labels,
            "source",
            &sources,
        );
        out.counter(
            "vllm:prompt_tokens_cached",
            "Prompt tokens found in a cache.",
            labels,
            self.cached_tokens,
        );
        let tiers = [
            ("device", self.cached_tokens),
            ("host", 0),
            ("p2p", 0),
            ("disk", 0),
            ("external_unspecified", 0),
        ];
        let help = "Prompt tokens found in a cache, by the tier that held them.";
        out.counters(
            "vllm:prompt_tokens_cached_by_source",
            help,
            labels,
            "source",
            &tiers,
        );
    }

    fn render_counters(&self, out: &mut Writer, labels: &Labels) {
        out.counter(
            "vllm:generation_tokens",
            "Tokens generated.",
            labels,
            self.generated_tokens,
        );
        let ended = REASONS.map(|(reason, name)| (name, self.ended[reason as usize]));
        out.counters(
            "vllm:request_success",
            "Requests that ended, by reason.",
            labels,
            "finished_reason",
            &ended,
        );
        let refused = [
            ("max_num_queued_reqs", self.refused),
            ("max_num_queued_tokens", 0),
        ];
        let labels = Labels::frontend(&self.served_model);
        let help = "Requests refused by a queue limit, by limit.";
        out.counters(
            "vllm:admission_rejections",
            help,
            &labels,
            "reason",
            &refused,
        );
    }

    fn render_histograms(&self, out: &mut Writer, labels: &Labels) {
        let histograms = [
            &self.prompt,
            &self.generation,
            &self.iteration,
            &self.max_generation,
            &self.params_n,
            &self.params_max_tokens,
            &self.ttft,
            &self.inter_token,
            &self.per_output_token,
            &self.end_to_end,
            &self.queue,
            &self.inference,
            &self.prefill,
            &self.decode,
            &self.request_preemptions,
            &self.prefill_computed,
        ];
        for ((name, help), histogram) in HISTOGRAMS.iter().zip(histograms) {
            out.histogram(name, help, labels, histogram);
        }
    }

    fn render_cache_config(&self, out: &mut Writer) {
        let limits = &self.limits;
        let python_bool = |value: bool| if value { "True" } else { "False" };
        let block_size = limits.block_size.to_string();
        let num_gpu_blocks = limits.num_gpu_blocks.to_string();
        let kv_tokens = limits.kv_tokens().to_string();
        #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
        let concurrency = format!(
            "{:?}",
            limits.kv_tokens() as f64 / f64::from(limits.max_model_len)
        );
        let values = [
            ("block_size", block_size.as_str()),
            ("effective_attention_block_size", block_size.as_str()),
            ("enable_prefix_caching", python_bool(limits.prefix_caching)),
            ("kv_cache_max_concurrency", concurrency.as_str()),
            ("kv_cache_size_tokens", kv_tokens.as_str()),
            ("num_gpu_blocks", num_gpu_blocks.as_str()),
            (
                "num_gpu_blocks_override",
                if self.blocks_overridden {
                    &num_gpu_blocks
                } else {
                    "None"
                },
            ),
        ];
        out.cache_config(&values);
    }
}

#[cfg(test)]
mod tests;
