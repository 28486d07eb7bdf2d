//! Claims about `/metrics`: it has the families of a real vLLM 0.32, and counts what the model does.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::model::{Model, PROFILES, Submission};

const REAL: &str = include_str!("../../tests/fixtures/vllm-0.32-families.txt");

/// vLLM's own server, from which the fixture was read, had this length limit; it cuts the buckets of lengths.
const REAL_MAX_MODEL_LEN: u32 = 2048;

fn limits() -> Limits {
    Limits {
        block_size: 16,
        num_gpu_blocks: 129,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: REAL_MAX_MODEL_LEN,
        max_num_queued_reqs: 3,
        prefix_caching: true,
    }
}

fn metrics() -> Metrics {
    Metrics::new(
        "tiny",
        limits(),
        false,
        Duration::from_millis(1_795_251_888_171),
    )
}

/// The labels between the braces of a sample; values here hold no quotes.
fn labels(text: &str) -> Vec<(&str, &str)> {
    let pairs = text.split("\",").filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.trim_end_matches('"').split_once("=\"").unwrap())
        .collect()
}

/// Describes a page in the fixture's form: `name type keys(=values) edges`.
fn describe(page: &str) -> Vec<String> {
    const LISTED: [&str; 4] = ["reason", "finished_reason", "source", "sleep_state"];
    let mut described: Vec<String> = Vec::new();
    let mut family = String::new();
    let mut keys: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut edges: Vec<String> = Vec::new();
    let mut end =
        |family: &mut String, keys: &mut BTreeMap<String, Vec<String>>, edges: &mut Vec<String>| {
            if family.is_empty() {
                return;
            }
            let keys = std::mem::take(keys).into_iter().map(|(key, values)| {
                if LISTED.contains(&key.as_str()) {
                    format!("{key}={}", values.join("|"))
                } else {
                    key
                }
            });
            let or_none = |list: Vec<String>| {
                if list.is_empty() {
                    "-".to_owned()
                } else {
                    list.join(",")
                }
            };
            described.push(format!(
                "{family} {} {}",
                or_none(keys.collect()),
                or_none(std::mem::take(edges))
            ));
        };
    for line in page.lines() {
        if let Some(opening) = line.strip_prefix("# TYPE ") {
            end(&mut family, &mut keys, &mut edges);
            family = opening.to_owned();
        } else if let Some((name, rest)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            assert!(
                name.starts_with(family.split(' ').next().unwrap()),
                "{name} within {family}"
            );
            for (key, value) in labels(rest.split_once('}').unwrap().0) {
                if key == "le" {
                    edges.push(value.to_owned());
                } else {
                    keys.entry(key.to_owned())
                        .or_default()
                        .push(value.to_owned());
                }
            }
        }
    }
    end(&mut family, &mut keys, &mut edges);
    described
}

fn value<'a>(page: &'a str, series: &str) -> &'a str {
    let line = page.lines().find(|line| {
        line.strip_prefix(series)
            .is_some_and(|rest| rest.starts_with(' '))
    });
    line.unwrap_or_else(|| panic!("no {series}"))
        .rsplit_once(' ')
        .unwrap()
        .1
}

#[test]
fn families_types_labels_and_buckets_are_those_of_a_real_vllm() {
    let real: Vec<_> = REAL.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(describe(&metrics().render()), real);
}

#[test]
fn every_sample_has_sorted_labels_and_a_float() {
    for line in metrics()
        .render()
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let (series, number) = line.rsplit_once(' ').unwrap();
        assert!(number.contains('.') || number.contains("e+"), "{line}");
        if let Some((_, inner)) = series.split_once('{') {
            let names: Vec<_> = labels(inner.trim_end_matches('}'))
                .iter()
                .map(|(name, _)| *name)
                .collect();
            assert!(names.is_sorted(), "{line}");
        }
    }
}

#[test]
fn each_series_appears_once() {
    let page = metrics().render();
    let series: Vec<_> = page
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap().0)
        .collect();
    assert_eq!(series.iter().collect::<BTreeSet<_>>().len(), series.len());
}

#[test]
fn length_buckets_end_at_the_longest_request() {
    let page = Metrics::new(
        "m",
        Limits {
            max_model_len: 100,
            ..limits()
        },
        false,
        Duration::ZERO,
    )
    .render();
    assert!(page.contains("vllm:request_prompt_tokens_bucket{engine=\"0\",le=\"100.0\""));
    assert!(!page.contains("vllm:request_prompt_tokens_bucket{engine=\"0\",le=\"200.0\""));
}

/// Two rounds of three requests with one prompt, and a fourth that finds the queue full.
fn played() -> String {
    let mut model = Model::new(limits(), PROFILES[0].step_time).unwrap();
    let mut metrics = metrics();
    let mut now = Duration::ZERO;
    for _ in 0..2 {
        for output_tokens in [3, 3, 9, 1] {
            let submission = Submission {
                prompt_tokens: 40,
                output_tokens,
                ending: Ending::Length,
                max_tokens: 10,
                block_hashes: vec![1, 2],
            };
            if let Err(refusal) = model.submit(submission, now) {
                metrics.refused(refusal);
            }
        }
        let mut events = Vec::new();
        while let Some(plan) = model.begin_step(now) {
            now += plan.duration;
            events.clear();
            model.finish_step(now, &mut events);
            metrics.step(&plan, &events, model.load());
        }
    }
    metrics.aborted();
    metrics.set_load(Load {
        running: 2,
        waiting: 1,
        kv_usage: 0.25,
    });
    metrics.render()
}

#[test]
fn figures_follow_the_model() {
    let page = played();
    for (name, expected) in [
        ("vllm:num_requests_running", "2.0"),
        ("vllm:num_requests_waiting", "1.0"),
        ("vllm:kv_cache_usage_perc", "0.25"),
        ("vllm:prompt_tokens_total", "240.0"),
        ("vllm:generation_tokens_total", "30.0"),
        // The first request computes its two full blocks; the five after it find them.
        ("vllm:prompt_tokens_cached_total", "160.0"),
        ("vllm:prefix_cache_queries_total", "240.0"),
        ("vllm:prefix_cache_hits_total", "160.0"),
        ("vllm:time_to_first_token_seconds_count", "6.0"),
        ("vllm:inter_token_latency_seconds_count", "24.0"),
        ("vllm:request_params_max_tokens_sum", "60.0"),
        ("vllm:request_prefill_kv_computed_tokens_sum", "80.0"),
        ("vllm:iteration_tokens_total_sum", "110.0"),
    ] {
        let series = format!("{name}{{engine=\"0\",model_name=\"tiny\"}}");
        assert_eq!(value(&page, &series), expected, "{name}");
    }
}

#[test]
fn ends_and_refusals_are_counted_by_reason() {
    let page = played();
    for (series, expected) in [
        (
            "request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"tiny\"}",
            "6.0",
        ),
        (
            "request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"}",
            "1.0",
        ),
        (
            "admission_rejections_total{model_name=\"tiny\",reason=\"max_num_queued_reqs\"}",
            "2.0",
        ),
        (
            "admission_rejections_total{model_name=\"tiny\",reason=\"max_num_queued_tokens\"}",
            "0.0",
        ),
    ] {
        assert_eq!(
            value(&page, &format!("vllm:{series}")),
            expected,
            "{series}"
        );
    }
}

#[test]
fn buckets_are_cumulative() {
    let page = played();
    let buckets: Vec<f64> = page
        .lines()
        .filter(|line| line.starts_with("vllm:time_to_first_token_seconds_bucket"))
        .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
        .collect();
    assert!(buckets.is_sorted() && buckets.last() == Some(&6.0));
}
