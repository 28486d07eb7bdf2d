//! A histogram of durations that can be merged, subtracted and sent as JSON.
//!
//! Logarithmic buckets with a bounded relative error (the mapping of DDSketch, Masson et al., VLDB 2019). The
//! libraries at hand cannot subtract an earlier state from a later one and stay readable on the wire, which is what a
//! sliding window over cumulative reports needs; that is all this adds.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Ratio of two neighbouring bucket bounds. A quantile is off by at most 2.5 %.
const RATIO: f64 = 1.05;
/// Everything at or below this is bucket 0.
const SMALLEST: Duration = Duration::from_micros(100);
/// Highest bucket: 100 µs · 1.05^400 ≈ 29,900 s. Longer durations are counted there, so the map is bounded.
const LAST_BUCKET: u16 = 400;

/// Counts of durations per logarithmic bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    /// Bucket number → count; empty buckets are absent.
    buckets: BTreeMap<u16, u64>,
}

fn bucket(duration: Duration) -> u16 {
    if duration <= SMALLEST {
        return 0;
    }
    let steps = (duration.as_secs_f64() / SMALLEST.as_secs_f64()).ln() / RATIO.ln();
    // A bucket holds its upper bound: the tiny allowance keeps exact bounds from rounding up.
    let steps = (steps - 1e-9).ceil().clamp(0.0, f64::from(LAST_BUCKET));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=400 above"
    )]
    let bucket = steps as u16;
    bucket
}

fn upper_bound(bucket: u16) -> Duration {
    SMALLEST.mul_f64(RATIO.powi(i32::from(bucket)))
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        *self.buckets.entry(bucket(duration)).or_default() += 1;
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.buckets.values().sum()
    }

    /// How many were at or below `limit`, within the bucket's relative error.
    pub fn count_at_or_below(&self, limit: Duration) -> u64 {
        self.buckets
            .range(..=bucket(limit))
            .map(|(_, count)| count)
            .sum()
    }

    /// The smallest bucket bound that at least the share `quantile` (0..=1) of all durations does not exceed;
    /// `None` without any.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a rank within 1..=total"
        )]
        let rank = ((total as f64 * quantile.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let mut seen = 0;
        for (&bucket, &count) in &self.buckets {
            seen += count;
            if seen >= rank {
                return Some(upper_bound(bucket));
            }
        }
        None
    }

    /// Adds all counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (&bucket, &count) in &other.buckets {
            *self.buckets.entry(bucket.min(LAST_BUCKET)).or_default() += count;
        }
    }

    /// What was counted since `earlier`, an older state of the same histogram. A bucket that shrank (the process
    /// restarted) counts as new.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let restarted = self.buckets_below(earlier);
        let buckets = self
            .buckets
            .iter()
            .filter_map(|(&bucket, &count)| {
                let before = if restarted {
                    0
                } else {
                    earlier.buckets.get(&bucket).copied().unwrap_or(0)
                };
                let new = count.saturating_sub(before);
                (new > 0).then_some((bucket, new))
            })
            .collect();
        Self { buckets }
    }

    fn buckets_below(&self, earlier: &Self) -> bool {
        earlier
            .buckets
            .iter()
            .any(|(bucket, &count)| self.buckets.get(bucket).copied().unwrap_or(0) < count)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(durations: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for &micros in durations {
            histogram.record(Duration::from_micros(micros));
        }
        histogram
    }

    #[test]
    fn quantile_of_nothing_is_absent_not_zero() {
        assert_eq!(Histogram::default().quantile(0.9), None);
    }

    #[test]
    fn longest_duration_stays_within_the_last_bucket() {
        let histogram = of(&[u64::MAX]);
        assert_eq!(
            histogram.buckets.keys().copied().collect::<Vec<_>>(),
            [LAST_BUCKET]
        );
    }

    proptest! {
        #[test]
        fn quantile_is_within_five_percent(mut micros in prop::collection::vec(101_u64..600_000_000, 1..200), of_128 in 0_u8..128) {
            let got = of(&micros).quantile(f64::from(of_128) / 128.0).unwrap();
            micros.sort_unstable();
            let rank = (micros.len() * usize::from(of_128)).div_ceil(128).max(1);
            let exact = Duration::from_micros(micros[rank - 1]);
            prop_assert!(got >= exact.mul_f64(0.999) && got <= exact.mul_f64(1.051), "{got:?} for {exact:?}");
        }

        #[test]
        fn merge_is_commutative_and_since_undoes_it(a in prop::collection::vec(0_u64..90_000_000, 0..50), b in prop::collection::vec(0_u64..90_000_000, 0..50)) {
            let (a, b) = (of(&a), of(&b));
            let mut ab = a.clone();
            ab.merge(&b);
            let mut ba = b.clone();
            ba.merge(&a);
            prop_assert_eq!(&ab, &ba);
            prop_assert_eq!(ab.since(&a), b);
        }

        #[test]
        fn since_a_restart_is_everything_new(a in prop::collection::vec(0_u64..90_000_000, 2..50)) {
            let after_restart = of(&a[..1]);
            let before = of(&a);
            if before.count_at_or_below(Duration::MAX) > 1 {
                let mut doubled = before.clone();
                doubled.merge(&before);
                prop_assert_eq!(after_restart.since(&doubled), after_restart);
            }
        }
    }
}
