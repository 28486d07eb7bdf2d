//! Reads an engine's `/metrics` page (Prometheus text) into a [`Sample`]. Bounded in lines and buckets, never fails on
//! a line that it does not need, and never takes "absent" for zero.
//!
//! Names are vLLM 0.32's and SGLang's; a table lists what older releases call the same thing.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Most bytes of a page that are read. vLLM 0.32 sends 57 KB; a page grows with each LoRA adapter.
pub const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Lines above this are skipped. The longest of vLLM's, which is not needed, has 1.2 KB.
const MAX_LINE_BYTES: usize = 16 * 1024;
/// Most distinct bucket bounds. vLLM has 23; `--custom-histogram-buckets` can add some.
const MAX_BUCKETS: usize = 128;

/// What one scrape of one pod said. Values of several engines (data-parallel ranks) in a pod are added; KV use is their
/// mean, since each rank has its own cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// KV blocks in use, 0..=1; none if the page has no such gauge.
    pub kv_use: Option<f64>,
    /// Requests in the batch.
    pub running: Option<f64>,
    /// Requests that wait in the engine.
    pub waiting: Option<f64>,
    /// Prompt tokens processed, cumulative.
    pub prompt_tokens: Option<f64>,
    /// Tokens generated, cumulative.
    pub generation_tokens: Option<f64>,
    /// Requests ended, for whatever reason, cumulative.
    pub ended: Option<f64>,
    /// Time to first token.
    pub ttft: Buckets,
    /// When the engine's process started, Unix seconds.
    pub process_start_s: Option<f64>,
}

/// A cumulative Prometheus histogram: `(upper bound in seconds, count at or below)`, bounds ascending.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Buckets(Vec<(f64, f64)>);

/// A page that says nothing about an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// None of the gauges is there.
    #[error(
        "the page has no gauge of vLLM (vllm:num_requests_running, vllm:kv_cache_usage_perc) or SGLang \
         (sglang:num_running_reqs, sglang:token_usage)"
    )]
    NoEngineMetrics,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    KvUse,
    KvUseOld,
    Running,
    Waiting,
    PromptTokens,
    GenerationTokens,
    /// Prompt tokens or generated ones, by the label `mode`.
    Tokens,
    Ended,
    TtftBucket,
    ProcessStart,
}

/// Which name means what. Sources: vLLM 0.32's page (tests/fixtures), and for the older KV gauge vLLM's deprecation
/// notes (renamed in 0.10, removed two minor releases later). SGLang: its documentation (production metrics) and
/// `metrics_collector.py`. Its `prompt_tokens_total`, `generation_tokens_total` and `num_requests_total` grow
/// only when a request ends: an engine that is busy with long answers would look stuck. They are not read.
const NAMES: [(&str, Field); 14] = [
    ("vllm:kv_cache_usage_perc", Field::KvUse),
    ("vllm:gpu_cache_usage_perc", Field::KvUseOld),
    ("vllm:num_requests_running", Field::Running),
    ("vllm:num_requests_waiting", Field::Waiting),
    ("vllm:prompt_tokens_total", Field::PromptTokens),
    ("vllm:generation_tokens_total", Field::GenerationTokens),
    ("vllm:request_success_total", Field::Ended),
    ("vllm:time_to_first_token_seconds_bucket", Field::TtftBucket),
    ("sglang:token_usage", Field::KvUse),
    ("sglang:num_running_reqs", Field::Running),
    ("sglang:num_queue_reqs", Field::Waiting),
    ("sglang:realtime_tokens_total", Field::Tokens),
    (
        "sglang:time_to_first_token_seconds_bucket",
        Field::TtftBucket,
    ),
    ("process_start_time_seconds", Field::ProcessStart),
];

#[derive(Default)]
struct Mean {
    sum: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1.0;
    }

    fn value(&self) -> Option<f64> {
        (self.count > 0.0).then(|| (self.sum / self.count).clamp(0.0, 1.0))
    }
}

/// Reads a page.
pub fn parse(page: &str) -> Result<Sample, ParseError> {
    let mut sample = Sample::default();
    let (mut kv_use, mut kv_use_old) = (Mean::default(), Mean::default());
    for line in page.lines() {
        let Some((field, labels, value)) = needed(line) else {
            continue;
        };
        match field {
            Field::KvUse => kv_use.add(value),
            Field::KvUseOld => kv_use_old.add(value),
            Field::Running => add(&mut sample.running, value),
            Field::Waiting => add(&mut sample.waiting, value),
            Field::PromptTokens => add(&mut sample.prompt_tokens, value),
            Field::GenerationTokens => add(&mut sample.generation_tokens, value),
            Field::Tokens => match label(labels, "mode") {
                // Those that the cache held are part of prompts, as in vLLM's count.
                Some("prefill_compute" | "prefill_cache") => {
                    add(&mut sample.prompt_tokens, value);
                }
                Some("decode") => add(&mut sample.generation_tokens, value),
                _ => {}
            },
            Field::Ended => add(&mut sample.ended, value),
            Field::TtftBucket => {
                if let Some(bound) = upper_bound(labels) {
                    sample.ttft.add(bound, value);
                }
            }
            Field::ProcessStart => sample.process_start_s = Some(value),
        }
    }
    sample.kv_use = kv_use.value().or(kv_use_old.value());
    if sample.kv_use.is_none() && sample.running.is_none() && sample.waiting.is_none() {
        return Err(ParseError::NoEngineMetrics);
    }
    Ok(sample)
}

fn add(field: &mut Option<f64>, value: f64) {
    *field = Some(field.unwrap_or(0.0) + value);
}

/// The field, label block and value of a line that is in [`NAMES`]; none for every other line.
fn needed(line: &str) -> Option<(Field, &str, f64)> {
    let is_engines = ["vllm:", "sglang:", "process_start"]
        .iter()
        .any(|start| line.starts_with(start));
    if line.len() > MAX_LINE_BYTES || !is_engines {
        return None;
    }
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    let (_, field) = NAMES.into_iter().find(|(known, _)| *known == name)?;
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(block) => block.split_at(labels_end(block)?),
        None => ("", rest),
    };
    // With `--enable-priority-scheduling` SGLang says how many of the whole each priority has, beside the whole, whose
    // priority is empty.
    let priority = label(labels, "priority").filter(|priority| !priority.is_empty());
    if priority.is_some() && field != Field::TtftBucket {
        return None;
    }
    // A timestamp or an exemplar may follow the value.
    let text = rest
        .trim_start_matches('}')
        .split_ascii_whitespace()
        .next()?;
    let value: f64 = text.parse().ok()?;
    // Every field is a gauge or counter that cannot be negative.
    (value.is_finite() && value >= 0.0).then_some((field, labels, value))
}

/// Where the closing brace is; braces inside quoted label values do not count.
fn labels_end(block: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in block.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

/// The value of a label, one that needs no escapes.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = labels.split(',');
    let value = pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix("=\""))?;
    value.split('"').next()
}

/// The `le` label: `+Inf` becomes infinity.
fn upper_bound(labels: &str) -> Option<f64> {
    let text = label(labels, "le")?;
    let bound: f64 = if text == "+Inf" {
        f64::INFINITY
    } else {
        text.parse().ok()?
    };
    (!bound.is_nan()).then_some(bound)
}

impl Buckets {
    /// Makes one from `(bound, cumulative count)` pairs, for tests and scripted engines.
    pub fn new(pairs: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let mut buckets = Self::default();
        for (bound, count) in pairs {
            buckets.add(bound, count);
        }
        buckets
    }

    fn add(&mut self, bound: f64, count: f64) {
        match self
            .0
            .binary_search_by(|(known, _)| known.total_cmp(&bound))
        {
            Ok(at) => self.0[at].1 += count,
            Err(at) if self.0.len() < MAX_BUCKETS => self.0.insert(at, (bound, count)),
            Err(_) => {}
        }
    }

    /// How many were observed.
    pub fn count(&self) -> f64 {
        self.0.last().map_or(0.0, |(_, count)| *count)
    }

    /// How many were at or below `limit`: exact at a bound, linear between two, as Prometheus interpolates.
    pub fn at_or_below(&self, limit: Duration) -> f64 {
        let limit = limit.as_secs_f64();
        let (mut low_bound, mut low_count) = (0.0, 0.0);
        for &(bound, count) in &self.0 {
            if limit < bound {
                if bound.is_infinite() {
                    return low_count;
                }
                return low_count
                    + (count - low_count)
                        * ((limit - low_bound) / (bound - low_bound)).clamp(0.0, 1.0);
            }
            (low_bound, low_count) = (bound, count);
        }
        low_count
    }

    /// What was observed since `earlier`; none if a count fell or the bounds changed (another process).
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        if self.0.len() != earlier.0.len() {
            return None;
        }
        let pairs = self.0.iter().zip(&earlier.0);
        let deltas = pairs.map(|(now, then)| {
            // The same text parses to the same float.
            (now.0.total_cmp(&then.0).is_eq() && now.1 >= then.1).then_some((now.0, now.1 - then.1))
        });
        deltas.collect::<Option<Vec<_>>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::*;

    const VLLM: &str = include_str!("../tests/fixtures/vllm-0.32.txt");
    /// Names, labels and bounds as in SGLang's documentation and `metrics_collector.py`.
    const SGLANG: &str = include_str!("../tests/fixtures/sglang.txt");
    const HALF: Duration = Duration::from_millis(500);

    #[test]
    fn real_page_of_vllm_0_32_is_read() {
        let sample = parse(VLLM).unwrap();
        assert_eq!(sample.kv_use, Some(0.0));
        assert_eq!(sample.running, Some(0.0));
        assert_eq!(sample.waiting, Some(0.0));
        assert_eq!(sample.prompt_tokens, Some(13_419.0));
        assert_eq!(sample.generation_tokens, Some(11_552.0));
        assert_eq!(sample.ended, Some(271.0));
        assert_eq!(sample.process_start_s, Some(1_795_251_740.7));
        assert_eq!(sample.ttft.count(), 271.0);
        assert_eq!(sample.ttft.at_or_below(HALF), 271.0);
        assert_eq!(sample.ttft.at_or_below(Duration::from_millis(250)), 247.0);
        // Half-way between the bounds 0.1 (210) and 0.25 (247).
        assert!((sample.ttft.at_or_below(Duration::from_millis(175)) - 228.5).abs() < 1e-6);
    }

    #[test]
    fn page_of_sglang_says_the_same_under_its_own_names() {
        let sample = parse(SGLANG).unwrap();
        assert_eq!(sample.kv_use, Some(0.28));
        assert_eq!((sample.running, sample.waiting), (Some(162.0), Some(26.0)));
        assert_eq!(sample.prompt_tokens, Some(8_000_000.0 + 128_902.0));
        assert_eq!(sample.generation_tokens, Some(7_557_572.0));
        assert_eq!((sample.ended, sample.process_start_s), (None, None));
        assert_eq!(sample.ttft.count(), 11_008.0);
        // Half-way between the bounds 0.4 (6,000) and 0.6 (8,000).
        assert!((sample.ttft.at_or_below(HALF) - 7_000.0).abs() < 1e-6);
    }

    #[test]
    fn what_sglang_counts_at_the_end_of_requests_is_no_counter_to_judge_it_by() {
        let page = "sglang:num_running_reqs{tp_rank=\"0\"} 2\nsglang:prompt_tokens_total{tp_rank=\"0\"} 5\n\
                    sglang:generation_tokens_total 5\nsglang:num_requests_total 1\n";
        let sample = parse(page).unwrap();
        assert_eq!((sample.running, sample.prompt_tokens), (Some(2.0), None));
        assert_eq!((sample.generation_tokens, sample.ended), (None, None));
    }

    #[test]
    fn parts_of_a_queue_by_priority_are_not_counted_beside_the_whole() {
        let page = "sglang:num_queue_reqs{model_name=\"m\",priority=\"\",tp_rank=\"0\"} 14\n\
                    sglang:num_queue_reqs{model_name=\"m\",priority=\"-1\",tp_rank=\"0\"} 4\n\
                    sglang:num_queue_reqs{priority=\"0\",tp_rank=\"0\"} 10\n";
        assert_eq!(parse(page).unwrap().waiting, Some(14.0));
    }

    #[test]
    fn data_parallel_ranks_add_up_and_their_kv_use_is_averaged() {
        let page = "vllm:kv_cache_usage_perc{engine=\"0\"} 0.2\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.6\n\
                    vllm:num_requests_running{engine=\"0\"} 3\nvllm:num_requests_running{engine=\"1\"} 4\n";
        let sample = parse(page).unwrap();
        assert!((sample.kv_use.unwrap() - 0.4).abs() < 1e-9);
        assert_eq!(sample.running, Some(7.0));
        assert_eq!(sample.waiting, None, "absent is not zero");
    }

    #[test]
    fn older_name_counts_only_where_the_new_one_is_absent() {
        let old = "vllm:gpu_cache_usage_perc{model_name=\"m\"} 0.9\n";
        assert_eq!(parse(old).unwrap().kv_use, Some(0.9));
        let both = format!("{old}vllm:kv_cache_usage_perc 0.3\n");
        assert_eq!(parse(&both).unwrap().kv_use, Some(0.3));
    }

    #[test]
    fn page_without_engine_gauges_is_an_error_not_an_idle_engine() {
        assert_eq!(parse(""), Err(ParseError::NoEngineMetrics));
        assert_eq!(
            parse("go_goroutines 7\nprocess_start_time_seconds 5\n"),
            Err(ParseError::NoEngineMetrics)
        );
        assert_eq!(
            parse("vllm:num_requests_running NaN\n"),
            Err(ParseError::NoEngineMetrics)
        );
    }

    #[test]
    fn odd_but_valid_lines_are_read() {
        let page = "vllm:num_requests_running{model_name=\"a}b\\\"{ c\",engine=\"0\"} 2 1700000000000\n\
                    vllm:num_requests_waiting 1e0\n\
                    vllm:time_to_first_token_seconds_bucket{le=\"0.5\"} 3 # {trace_id=\"x\"} 0.4\n\
                    vllm:time_to_first_token_seconds_bucket{engine=\"0\",le=\"+Inf\"} 4\n";
        let sample = parse(page).unwrap();
        assert_eq!((sample.running, sample.waiting), (Some(2.0), Some(1.0)));
        assert_eq!(
            (sample.ttft.at_or_below(HALF), sample.ttft.count()),
            (3.0, 4.0)
        );
    }

    #[test]
    fn buckets_and_lines_are_bounded() {
        let mut page = "vllm:num_requests_running 1\n".to_owned();
        for bound in 0..2 * MAX_BUCKETS {
            writeln!(
                page,
                "vllm:time_to_first_token_seconds_bucket{{le=\"{bound}\"}} 1"
            )
            .unwrap();
        }
        let long = "x".repeat(MAX_LINE_BYTES);
        writeln!(page, "vllm:num_requests_running{{a=\"{long}\"}} 5").unwrap();
        let sample = parse(&page).unwrap();
        assert_eq!(sample.ttft.0.len(), MAX_BUCKETS);
        assert_eq!(sample.running, Some(1.0));
    }

    #[test]
    fn restarted_engine_gives_no_delta() {
        let before = Buckets::new([(0.5, 10.0), (f64::INFINITY, 12.0)]);
        let after = Buckets::new([(0.5, 1.0), (f64::INFINITY, 1.0)]);
        assert_eq!(after.since(&before), None);
        let later = Buckets::new([(0.5, 11.0), (f64::INFINITY, 15.0)]);
        let delta = later.since(&before).unwrap();
        assert_eq!((delta.at_or_below(HALF), delta.count()), (1.0, 3.0));
        assert_eq!(later.since(&Buckets::default()), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(page in "\\PC*") {
            let _outcome = parse(&page);
        }

        #[test]
        fn damaged_real_page_never_gives_a_bad_number(cut in 0..VLLM.len(), noise in "[ -~]{0,40}") {
            let cut = (0..=cut).rev().find(|at| VLLM.is_char_boundary(*at)).unwrap();
            if let Ok(sample) = parse(&format!("{}{noise}\n{}", &VLLM[..cut], &VLLM[cut..])) {
                for value in [sample.kv_use, sample.running, sample.waiting, sample.prompt_tokens].into_iter().flatten() {
                    prop_assert!(value.is_finite() && value >= 0.0);
                }
                prop_assert!(sample.kv_use.is_none_or(|kv| kv <= 1.0));
            }
        }

        #[test]
        fn share_within_a_limit_grows_with_the_limit(counts in prop::collection::vec(0_u32..100, 6), a in 0_u64..20_000, b in 0_u64..20_000) {
            let bounds = [0.1, 0.5, 1.0, 5.0, 10.0, f64::INFINITY];
            let mut total = 0.0;
            let buckets = Buckets::new(bounds.into_iter().zip(counts).map(|(bound, count)| { total += f64::from(count); (bound, total) }));
            let (low, high) = (Duration::from_millis(a.min(b)), Duration::from_millis(a.max(b)));
            prop_assert!(buckets.at_or_below(low) <= buckets.at_or_below(high) + 1e-9);
            prop_assert!(buckets.at_or_below(high) <= buckets.count());
        }
    }
}
