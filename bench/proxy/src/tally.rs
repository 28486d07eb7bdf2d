//! What was counted, and how it is told.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Longer times count as this.
const LONGEST_NS: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

pub(crate) struct Tally {
    /// Whole answers, also those outside the window.
    answers: u64,
    in_window: u64,
    deltas: u64,
    failures: BTreeMap<String, u64>,
    whole: Histogram<u64>,
    first: Histogram<u64>,
}

impl Tally {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            answers: 0,
            in_window: 0,
            deltas: 0,
            failures: BTreeMap::new(),
            whole: Histogram::new_with_bounds(1, LONGEST_NS, DIGITS)?,
            first: Histogram::new_with_bounds(1, LONGEST_NS, DIGITS)?,
        })
    }

    pub(crate) fn answered(&mut self, deltas: u64) {
        self.answers += 1;
        self.deltas += deltas;
    }

    /// Times of an answer in the window: to its first mark and to its end.
    pub(crate) fn times(&mut self, first: Duration, whole: Duration) {
        self.in_window += 1;
        self.first.saturating_record(nanoseconds(first));
        self.whole.saturating_record(nanoseconds(whole));
    }

    pub(crate) fn failed(&mut self, reason: &str) {
        *self.failures.entry(reason.to_owned()).or_default() += 1;
    }

    pub(crate) fn json(&self, window: Duration) -> Value {
        json!({
            "answers": self.answers,
            "deltas": self.deltas,
            "failures": self.failures,
            "in_window": self.in_window,
            "window_s": window.as_secs_f64(),
            "p50_us": microseconds(&self.whole, 0.5),
            "p99_us": microseconds(&self.whole, 0.99),
            "first_p50_us": microseconds(&self.first, 0.5),
            "first_p99_us": microseconds(&self.first, 0.99),
        })
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn microseconds(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    Duration::from_nanos(histogram.value_at_quantile(quantile)).as_secs_f64() * 1e6
}
