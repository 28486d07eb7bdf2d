//! What a run measured. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// One request's end.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// Answered whole.
    Answered {
        /// From its due time to the first token.
        ttft: Duration,
        /// Between tokens.
        gaps: Vec<Duration>,
        /// From its due time to the last byte.
        whole: Duration,
    },
    /// Not answered, or not whole.
    Failed(Failure),
}

/// Why a request failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// From a closed list.
    pub(crate) kind: &'static str,
    /// In the words of who said so; may be empty.
    pub(crate) detail: String,
}

impl From<&'static str> for Failure {
    fn from(kind: &'static str) -> Self {
        Self {
            kind,
            detail: String::new(),
        }
    }
}

/// Microseconds, three digits.
struct Durations(Histogram<u64>);

impl Default for Durations {
    fn default() -> Self {
        // 1 µs to one hour; both constants are within what the library accepts.
        let histogram = Histogram::new_with_bounds(1, 3_600_000_000, 3);
        Self(histogram.unwrap_or_else(|_| unreachable!("constant bounds")))
    }
}

impl Durations {
    fn record(&mut self, duration: Duration) {
        self.0
            .saturating_record(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    fn quantiles(&self) -> Quantiles {
        let at = |quantile| {
            let micros = self.0.value_at_quantile(quantile);
            #[expect(clippy::cast_precision_loss, reason = "at most an hour in µs")]
            let ms = micros as f64 / 1000.0;
            ms
        };
        if self.0.is_empty() {
            return Quantiles::default();
        }
        let (p50, p95) = (at(0.5), at(0.95));
        Quantiles {
            p50,
            p90: at(0.9),
            p95,
            p99: at(0.99),
            mean: self.0.mean() / 1000.0,
            p95_over_p50: if p50 > 0.0 { p95 / p50 } else { 0.0 },
        }
    }
}

/// Milliseconds at four quantiles and on average; zeros without samples.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Quantiles {
    p50: f64,
    p90: f64,
    p95: f64,
    p99: f64,
    mean: f64,
    p95_over_p50: f64,
}

/// Collects outcomes while the run goes on.
#[derive(Default)]
pub(crate) struct Report {
    /// Requests that were due.
    pub(crate) sent: u64,
    /// Length of the run.
    pub(crate) elapsed: Duration,
    answers: Vec<(Duration, Duration)>,
    errors: BTreeMap<&'static str, u64>,
    /// Details of each kind's first failure.
    details: BTreeMap<&'static str, String>,
    ttft: Durations,
    itl: Durations,
    whole: Durations,
    tokens: u64,
    recent_ttft: Durations,
}

/// The result, as printed and as JSON.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    sent: u64,
    ok: u64,
    errors: BTreeMap<&'static str, u64>,
    #[serde(skip)]
    details: BTreeMap<&'static str, String>,
    elapsed_s: f64,
    output_tokens_per_s: f64,
    ttft_ms: Quantiles,
    itl_ms: Quantiles,
    request_ms: Quantiles,
    ttft_attainment: f64,
    goodput: f64,
}

impl Report {
    /// Counts one end.
    pub(crate) fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Failed(failure) => self.fail(failure),
            Outcome::Answered { ttft, gaps, whole } => {
                self.ttft.record(ttft);
                self.recent_ttft.record(ttft);
                self.whole.record(whole);
                self.tokens += 1 + u64::try_from(gaps.len()).unwrap_or(u64::MAX - 1);
                let sum: Duration = gaps.iter().sum();
                let count = u32::try_from(gaps.len().max(1)).unwrap_or(u32::MAX);
                for gap in gaps {
                    self.itl.record(gap);
                }
                self.answers.push((ttft, sum / count));
            }
        }
    }

    /// Counts one failure.
    pub(crate) fn fail(&mut self, failure: Failure) {
        *self.errors.entry(failure.kind).or_default() += 1;
        self.details.entry(failure.kind).or_insert(failure.detail);
    }

    /// A line for people; the quantile covers the time since the last line.
    pub(crate) fn progress_line(&mut self, elapsed: Duration, in_flight: usize) -> String {
        let recent = std::mem::take(&mut self.recent_ttft);
        let p90 = if recent.0.is_empty() {
            "-".to_owned()
        } else {
            format!("{:.0} ms", recent.quantiles().p90)
        };
        let failed: u64 = self.errors.values().sum();
        let (ok, sent) = (self.answers.len(), self.sent);
        format!(
            "{:>4} s  sent {sent}  answered {ok}  failed {failed}  in flight {in_flight}  ttft p90 {p90}",
            elapsed.as_secs()
        )
    }

    /// Goodput counts requests that met both targets among all that were due: what failed missed them.
    pub(crate) fn summary(&self, slo_ttft: Duration, slo_tpot: Duration) -> Summary {
        #[expect(clippy::cast_precision_loss, reason = "counts of one run")]
        let share = |count: usize| {
            if self.sent == 0 {
                0.0
            } else {
                count as f64 / self.sent as f64
            }
        };
        let in_time = self.answers.iter().filter(|(ttft, _)| *ttft <= slo_ttft);
        let good = in_time
            .clone()
            .filter(|(_, tpot)| *tpot <= slo_tpot)
            .count();
        let elapsed_s = self.elapsed.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "counts of one run")]
        let tokens = self.tokens as f64;
        Summary {
            sent: self.sent,
            ok: u64::try_from(self.answers.len()).unwrap_or(u64::MAX),
            errors: self.errors.clone(),
            details: self.details.clone(),
            elapsed_s,
            output_tokens_per_s: if elapsed_s > 0.0 {
                tokens / elapsed_s
            } else {
                0.0
            },
            ttft_ms: self.ttft.quantiles(),
            itl_ms: self.itl.quantiles(),
            request_ms: self.whole.quantiles(),
            ttft_attainment: share(in_time.count()),
            goodput: share(good),
        }
    }
}

impl Summary {
    /// Whether requests were due and none of them was answered whole.
    pub(crate) fn nothing_worked(&self) -> bool {
        self.sent > 0 && self.ok == 0
    }

    /// Several lines for people.
    pub(crate) fn table(&self, slo_ttft: Duration, slo_tpot: Duration) -> String {
        let mut text = format!(
            "{:<22}{:>9}{:>9}{:>9}{:>9}{:>9}\n",
            "ms", "p50", "p90", "p95", "p99", "p95/p50"
        );
        let rows = [
            ("time to first token", self.ttft_ms),
            ("between tokens", self.itl_ms),
            ("whole answer", self.request_ms),
        ];
        for (name, q) in rows {
            if q.p99 <= 0.0 {
                let _ = writeln!(text, "{name:<22}{0:>9}{0:>9}{0:>9}{0:>9}{0:>9}", "-");
                continue;
            }
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "{name:<22}{:>9.1}{:>9.1}{:>9.1}{:>9.1}{:>9.2}",
                q.p50, q.p90, q.p95, q.p99, q.p95_over_p50
            );
        }
        let (ttft, tpot) = (slo_ttft.as_millis(), slo_tpot.as_millis());
        let _ = writeln!(
            text,
            "goodput {:.1} % (first token within {ttft} ms and {tpot} ms per token; first token alone {:.1} %)",
            self.goodput * 100.0,
            self.ttft_attainment * 100.0
        );
        for (kind, count) in &self.errors {
            let _ = match self.details.get(kind) {
                Some(detail) if !detail.is_empty() => {
                    writeln!(text, "error {kind}: {count}, the first: {detail}")
                }
                _ => writeln!(text, "error {kind}: {count}"),
            };
        }
        text
    }

    /// The line that programs read.
    pub(crate) fn last_line(&self) -> String {
        let errors: u64 = self.errors.values().sum();
        format!(
            "load: sent={} ok={} errors={errors} ttft_p50_ms={:.0} ttft_p90_ms={:.0} ttft_p99_ms={:.0} itl_p50_ms={:.1} \
             itl_p99_ms={:.1} tokens_per_s={:.0} goodput={:.3}",
            self.sent,
            self.ok,
            self.ttft_ms.p50,
            self.ttft_ms.p90,
            self.ttft_ms.p99,
            self.itl_ms.p50,
            self.itl_ms.p99,
            self.output_tokens_per_s,
            self.goodput
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(ttft_ms: u64, gap_ms: u64) -> Outcome {
        let gaps = vec![Duration::from_millis(gap_ms); 4];
        Outcome::Answered {
            ttft: Duration::from_millis(ttft_ms),
            gaps,
            whole: Duration::from_millis(ttft_ms + 4 * gap_ms),
        }
    }

    #[test]
    fn goodput_needs_both_targets_and_counts_failures_as_misses() {
        let mut report = Report {
            sent: 4,
            ..Report::default()
        };
        report.add(answered(100, 10));
        report.add(answered(900, 10));
        report.add(answered(100, 90));
        report.add(Outcome::Failed("status_503".into()));
        let summary = report.summary(Duration::from_millis(500), Duration::from_millis(50));
        assert!((summary.goodput - 0.25).abs() < 1e-9);
        assert!((summary.ttft_attainment - 0.5).abs() < 1e-9);
        assert!(summary.last_line().contains("errors=1"));
    }

    #[test]
    fn first_failure_of_a_kind_is_told_in_its_own_words() {
        let mut report = Report {
            sent: 2,
            ..Report::default()
        };
        for detail in ["no model nope", "another"] {
            let detail = detail.to_owned();
            let kind = "status_404";
            report.fail(Failure { kind, detail });
        }
        let summary = report.summary(Duration::from_millis(1), Duration::from_millis(1));
        let table = summary.table(Duration::from_millis(1), Duration::from_millis(1));
        assert!(
            table.contains("error status_404: 2, the first: no model nope\n"),
            "{table}"
        );
        assert!(table.contains("time to first token           -"), "{table}");
        assert!(summary.nothing_worked());
    }

    #[test]
    fn empty_run_prints_zeros_and_no_nan() {
        let line = Report::default()
            .summary(Duration::from_millis(1), Duration::from_millis(1))
            .last_line();
        assert!(!line.contains("NaN") && line.contains("sent=0"), "{line}");
    }
}
