//! How slow an endpoint has been lately. Pure: times come in.
//!
//! A peak-sensitive moving average as in Finagle's load balancer (`PeakEwma.scala`): a sample above the average takes
//! its place at once, samples below it pull it down over [`TAU_MS`]. Without samples it decays as well, so that an
//! endpoint that was slow is tried again.

use std::sync::atomic::{AtomicU64, Ordering};

use rand::{Rng, RngExt as _};

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
/// How much later an endpoint that knows a prompt may begin than others and still be taken. Elsewhere the prompt would
/// be computed again, and push another one out of that endpoint's cache, which is then computed again as well.
const HOME: f32 = 2.0;
/// Of larger tiers so many endpoints are compared: the time that a choice takes stays bounded.
const MOST_COMPARED: usize = 16;
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

/// What the cost of `work` is to be multiplied with at an endpoint that knows so many tokens of its prompt.
pub fn at_home(work: Work, known_tokens: u32) -> f32 {
    let left = Work {
        prompt_tokens: work.prompt_tokens.saturating_sub(known_tokens),
        ..work
    };
    left.until_first_token() / work.until_first_token() / HOME
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

/// The eligible one that costs least: of all, or where they are more than [`MOST_COMPARED`] of so many drawn by weight
/// and of `homes`. Of equals one by weight. `cumulative` holds the sums of weights up to and with each one.
///
/// Costs are a gateway's own figures, which its own choices change at once: unlike with figures that many share and
/// that are a little old, taking the least does not make everybody run to the same one.
pub fn pick(
    cumulative: &[f32],
    homes: impl Iterator<Item = usize>,
    rng: &mut impl Rng,
    eligible: impl Fn(usize) -> bool,
    cost: impl Fn(usize) -> f32,
) -> Option<usize> {
    let total = *cumulative.last()?;
    let count = cumulative.len();
    let mut draw = || {
        let at = rng.random_range(0.0..1.0_f32) * total;
        let index = cumulative.partition_point(|sum| *sum <= at);
        index.min(count - 1)
    };
    let least = |best: Option<(usize, f32)>, index: usize| {
        let here = cost(index);
        match best {
            Some((_, lowest)) if here >= lowest => best,
            _ => Some((index, here)),
        }
    };
    let first = draw();
    let all = (0..count).map(|step| (first + step) % count);
    let all = all.filter(|index| eligible(*index));
    let best = if count <= MOST_COMPARED {
        all.fold(None, least)
    } else {
        let drawn = std::iter::once(first).chain((1..MOST_COMPARED).map(|_| draw()));
        let some = drawn.chain(homes).filter(|index| eligible(*index));
        let best = some.fold(None, least);
        best.or_else(|| all.fold(None, least))
    };
    best.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn even(count: u16) -> Vec<f32> {
        (1..=count).map(f32::from).collect()
    }

    #[test]
    fn nobody_is_nobody() {
        let mut rng = StdRng::seed_from_u64(1);
        let nobody = std::iter::empty;
        assert_eq!(pick(&[], nobody(), &mut rng, |_| true, |_| 0.0), None);
        for count in [1, 100] {
            let none = pick(&even(count), nobody(), &mut rng, |_| false, |_| 0.0);
            assert_eq!(none, None);
        }
    }

    #[test]
    fn equals_get_as_much_as_they_weigh() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut counts = [0_u16; 3];
        for _ in 0..4_000 {
            let picked = pick(
                &[1.0, 2.0, 4.0],
                [].into_iter(),
                &mut rng,
                |_| true,
                |_| 5.0,
            );
            counts[picked.unwrap()] += 1;
        }
        assert!(
            (900..1_100).contains(&counts[0]) && (1_850..2_150).contains(&counts[2]),
            "{counts:?}"
        );
    }

    #[test]
    fn of_many_some_are_compared_and_a_home_always() {
        let mut rng = StdRng::seed_from_u64(1);
        let cumulative = even(1_000);
        let compared = std::cell::Cell::new(0);
        let cost = |index: usize| {
            compared.set(compared.get() + 1);
            if index == 700 { 1.0 } else { 2.0 }
        };
        for _ in 0..100 {
            compared.set(0);
            let picked = pick(&cumulative, [700].into_iter(), &mut rng, |_| true, cost);
            assert_eq!(picked, Some(700));
            assert!(compared.get() <= MOST_COMPARED + 1);
        }
        let only = |index: usize| index == 3;
        assert_eq!(
            pick(&cumulative, [].into_iter(), &mut rng, only, |_| 1.0),
            Some(3)
        );
    }

    #[test]
    fn a_home_is_left_for_what_begins_in_less_than_half_of_the_time() {
        let work = |waiting_tokens| Work {
            in_flight: 0,
            waiting_tokens,
            prompt_tokens: 3_000,
        };
        let home = |waiting_tokens| {
            let work = work(waiting_tokens);
            at_home(work, 2_700) * cost(10.0, work.until_first_token(), 1, 1.0)
        };
        let elsewhere = cost(10.0, work(0).until_first_token(), 1, 1.0);
        assert!(home(0) < elsewhere && home(5_000) < elsewhere);
        assert!(home(7_000) > elsewhere);
    }

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
        fn of_few_the_cheapest_is_taken(
            given in prop::collection::vec((0.0_f32..100.0, any::<bool>(), 0.01_f32..10.0), 1..MOST_COMPARED),
            seed in any::<u64>(),
        ) {
            let sums = given.iter().scan(0.0, |sum, one| {
                *sum += one.2;
                Some(*sum)
            });
            let sums: Vec<f32> = sums.collect();
            let mut rng = StdRng::seed_from_u64(seed);
            let picked = pick(&sums, [].into_iter(), &mut rng, |index| given[index].1, |index| given[index].0);
            let least = given.iter().filter(|one| one.1).map(|one| one.0).min_by(f32::total_cmp);
            prop_assert_eq!(picked.map(|index| given[index].0), least);
            prop_assert!(picked.is_none_or(|index| given[index].1));
        }

        #[test]
        fn to_know_a_prompt_never_costs_more(
            in_flight in 0_u32..1_000,
            waiting_tokens in 0_u32..1_000_000,
            prompt_tokens in 0_u32..1_000_000,
            known in 0_u32..2_000_000,
        ) {
            let work = Work { in_flight, waiting_tokens, prompt_tokens };
            let factor = at_home(work, known);
            prop_assert!(factor > 0.0 && factor <= 1.0 / HOME);
            prop_assert!(at_home(work, known + 1_000) <= factor);
        }

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
