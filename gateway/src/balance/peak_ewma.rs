//! How slow an endpoint has been lately. Pure: times come in.
//!
//! A peak-sensitive moving average as in Finagle's load balancer (`PeakEwma.scala`): a sample above the average takes
//! its place at once, samples below it pull it down over [`TAU_MS`]. Without samples it decays as well, so that an
//! endpoint that was slow is tried again.

use std::sync::atomic::{AtomicU64, Ordering};

/// Time in which the weight of a sample falls to 1/e (Finagle's default decay, 10 s).
const TAU_MS: f32 = 10_000.0;
/// What an endpoint is taken to need while its first request is under way or got no answer, in ms: enough that others
/// which are known to be quick come first, little enough that slow ones do not.
const UNKNOWN_MS: f32 = 1_000.0;
/// Prompt tokens that take as long as the fixed part of an engine's step: 270 on an RTX PRO 6000, 280 on an H100, 150
/// on an RTX 4090 with Llama 3.1 8B (the constants of `engine/src/model/profile.rs`).
pub(super) const STEP_TOKENS: f32 = 256.0;
/// Prompt tokens that take as long as what a sequence adds to the steps until another one's first token: about three
/// a step (same source), for a few steps.
pub(super) const REQUEST_TOKENS: f32 = 16.0;
/// Below this an average says nothing any more, in ms.
const FORGOTTEN_MS: f32 = 0.01;

/// One endpoint's average: its value (ms, `f32` bits) above the time of its last sample (ms, low 32 bits, wrapping).
/// Both change together; of two samples at the same moment one may be lost, which an average bears.
#[derive(Debug, Default)]
pub struct PeakEwma(AtomicU64);

impl PeakEwma {
    /// Takes in that a request needed `sample_ms`.
    pub fn observe(&self, sample_ms: f32, now_ms: u64) {
        let (value, keep) = self.parts(now_ms);
        let next = if sample_ms > value * keep {
            sample_ms
        } else {
            value * keep + sample_ms * (1.0 - keep)
        };
        let packed = (u64::from(next.to_bits()) << 32) | (now_ms & u64::from(u32::MAX));
        self.0.store(packed, Ordering::Relaxed);
    }

    /// Takes in that a request got no answer: where nothing is known, it is taken to need [`UNKNOWN_MS`].
    pub fn presume_slow(&self, now_ms: u64) {
        if self.at(now_ms) <= 0.0 {
            self.observe(UNKNOWN_MS, now_ms);
        }
    }

    /// The average at `now_ms`, in ms; 0 where nothing is known.
    pub fn at(&self, now_ms: u64) -> f32 {
        let (value, keep) = self.parts(now_ms);
        Some(value * keep)
            .filter(|ms| *ms > FORGOTTEN_MS)
            .unwrap_or(0.0)
    }

    /// The last value and how much of it is left.
    fn parts(&self, now_ms: u64) -> (f32, f32) {
        let packed = self.0.load(Ordering::Relaxed);
        let [high, low] = [packed >> 32, packed & u64::from(u32::MAX)]
            .map(|half| u32::try_from(half).unwrap_or(0));
        let now = u32::try_from(now_ms & u64::from(u32::MAX)).unwrap_or(0);
        // Another thread may have stored a moment that is later than ours.
        let age_ms = Some(now.wrapping_sub(low))
            .filter(|age| *age < u32::MAX / 2)
            .unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "an age is a rough figure")]
        let keep = (-(age_ms as f32) / TAU_MS).exp();
        (f32::from_bits(high), keep)
    }
}

/// What a request finds at an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Requests in flight, the new one not counted.
    pub in_flight: u32,
    /// Prompt tokens of those that have no first token yet.
    pub waiting_tokens: u32,
    /// The new one's own.
    pub prompt_tokens: u32,
}

impl Work {
    /// How much there is to do before the new one's first token, 1 for a short prompt at an idle endpoint.
    #[expect(clippy::cast_precision_loss, reason = "a rough figure")]
    pub fn until_first_token(self) -> f32 {
        let tokens = self.waiting_tokens.saturating_add(self.prompt_tokens) as f32;
        (STEP_TOKENS + tokens + REQUEST_TOKENS * self.in_flight as f32) / STEP_TOKENS
    }
}

/// What an endpoint is taken to need, for an average of `average_ms` per unit of `work`, and per `share` of the traffic
/// that it is meant to get.
pub fn cost(average_ms: f32, work: f32, in_flight: u32, share: f32) -> f32 {
    let latency = match (average_ms > 0.0, in_flight) {
        (true, _) => average_ms,
        (false, 0) => 0.0,
        (false, _) => UNKNOWN_MS,
    };
    latency * work / share
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn peaks_count_at_once_and_fade() {
        let average = PeakEwma::default();
        assert_eq!(average.at(5), 0.0);
        average.observe(100.0, 1_000);
        assert_eq!(average.at(1_000), 100.0);
        average.observe(900.0, 1_100);
        assert_eq!(average.at(1_100), 900.0);
        average.observe(100.0, 2_100);
        let after = average.at(2_100);
        assert!(after > 800.0 && after < 900.0, "{after}");
        assert!(average.at(12_100) < after * 0.37);
        assert_eq!(average.at(2_000_000), 0.0, "forgotten");
    }

    #[test]
    fn an_endpoint_that_nobody_knows_gets_one_request_and_then_waits_for_its_answer() {
        assert_eq!(cost(0.0, 1.0, 0, 1.0), 0.0);
        assert!(cost(0.0, 1.0, 1, 1.0) > cost(80.0, 5.0, 5, 1.0));
        assert!(cost(0.0, 1.0, 1, 1.0) < cost(5_000.0, 1.0, 1, 1.0));
    }

    #[test]
    fn an_endpoint_that_only_refused_does_not_look_idle_until_that_is_long_ago() {
        let average = PeakEwma::default();
        average.presume_slow(1_000);
        assert_eq!(average.at(1_000), UNKNOWN_MS);
        assert!(average.at(61_000) < 5.0);
        average.observe(80.0, 200_000);
        average.presume_slow(200_000);
        assert_eq!(average.at(200_000), 80.0, "known");
    }

    #[test]
    fn the_clock_may_wrap_and_step_back() {
        let average = PeakEwma::default();
        let late = u64::from(u32::MAX) - 5;
        average.observe(100.0, late);
        assert!(average.at(late + 10) > 99.0);
        assert_eq!(average.at(late - 10), 100.0);
    }

    proptest! {
        #[test]
        fn it_stays_between_the_samples(samples in prop::collection::vec((1.0_f32..10_000.0, 0_u64..60_000), 1..40)) {
            let average = PeakEwma::default();
            let mut now = 1;
            let mut highest = 0.0_f32;
            for (sample, gap) in samples {
                now += gap;
                let before = average.at(now);
                average.observe(sample, now);
                highest = highest.max(sample);
                prop_assert!(average.at(now) <= highest * 1.001);
                prop_assert!(average.at(now) >= sample.min(before) * 0.999);
            }
        }

        #[test]
        fn more_work_never_costs_less(
            average in 0.0_f32..10_000.0,
            in_flight in 0_u32..1_000,
            waiting_tokens in 0_u32..1_000_000,
            prompt_tokens in 0_u32..1_000_000,
            share in 0.001_f32..1.0,
        ) {
            let work = Work { in_flight, waiting_tokens, prompt_tokens };
            let of = |work: Work, share: f32| cost(average, work.until_first_token(), in_flight, share);
            let cost = of(work, share);
            prop_assert!(cost.is_finite() && cost >= 0.0);
            let longer = Work { waiting_tokens: waiting_tokens + 1_000, ..work };
            let fuller = Work { in_flight: in_flight + 1, ..work };
            prop_assert!(of(longer, share) >= cost && of(fuller, share) >= cost);
            prop_assert!(of(work, share / 2.0) >= cost);
        }
    }
}
