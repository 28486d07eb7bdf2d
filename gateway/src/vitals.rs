//! How well an endpoint answers, compared with its peers. Pure: times come in.
//!
//! A gray failure is no failure of any request: an endpoint that is slow, breaks one stream in three, or answers
//! nothing. Only its peers, the other endpoints of the same backend, show that it could do better. Each endpoint keeps
//! means over the last [`TAU_MS`]; once a second [`shares`] turns them into the share of its usual traffic that each is
//! to get. A share changes smoothly with the comparison, so it does not flap, and never reaches 0: what is left tells
//! when the endpoint has recovered. The best of a backend keeps all of its share, so they are never all shunned.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// Time in which the weight of a sample falls to 1/e: that of `PeakEwma`, so that both forget alike.
const TAU_MS: f32 = 10_000.0;
/// Fewer samples than this say nothing.
const ENOUGH: f32 = 3.0;
/// And more than this say nothing new: older ones count less. Of an endpoint that has become slow few samples come, and
/// those of its better time would keep its mean down until they are forgotten.
const MOST: f32 = 16.0;
/// A mean up to this many times the median of the peers is usual: prompts and batches differ by as much.
const USUAL_RATIO: f32 = 2.0;
/// A part of failed or empty answers up to this much above that of the peers is usual.
const USUAL_EXCESS: f32 = 0.1;
/// What a shunned endpoint still gets of its share: one request in fifty.
const LEAST: f32 = 0.02;

/// What is kept of one endpoint.
#[derive(Debug)]
pub struct Vitals {
    sums: Mutex<Sums>,
    /// The share as `f32` bits.
    share: AtomicU32,
}

/// Sums that fade.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    at_ms: u64,
    first_token: Mean,
    gap: Mean,
    whole: Mean,
    failed: Mean,
    empty: Mean,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f32,
    weight: f32,
}

impl Mean {
    fn add(&mut self, sample: f32) {
        if self.weight > MOST - 1.0 {
            self.fade((MOST - 1.0) / self.weight);
        }
        self.sum += sample;
        self.weight += 1.0;
    }

    fn fade(&mut self, keep: f32) {
        self.sum *= keep;
        self.weight *= keep;
    }

    fn value(self) -> Option<f32> {
        (self.weight >= ENOUGH).then(|| self.sum / self.weight)
    }
}

/// One thing that was seen.
#[derive(Clone, Copy, Debug)]
pub enum Sample {
    /// A stream began after so many ms per unit of work before it.
    FirstToken(f32),
    /// Mean ms between tokens of a stream.
    Gap(f32),
    /// Ms for each token of an answer that came whole.
    Whole(f32),
    /// An attempt failed, or a stream broke.
    Failed,
    /// An answer came to its end.
    Ended {
        /// It had nothing in it.
        empty: bool,
    },
}

/// Means of one endpoint at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Means([Option<f32>; 5]);

impl Default for Vitals {
    fn default() -> Self {
        Self {
            sums: Mutex::default(),
            share: AtomicU32::new(1.0_f32.to_bits()),
        }
    }
}

impl Vitals {
    /// Takes in what was seen.
    pub fn note(&self, sample: Sample, now_ms: u64) {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.fade(now_ms);
        match sample {
            Sample::FirstToken(ms) => sums.first_token.add(ms),
            Sample::Gap(ms) => sums.gap.add(ms),
            Sample::Whole(ms) => sums.whole.add(ms),
            Sample::Failed => sums.failed.add(1.0),
            Sample::Ended { empty } => {
                sums.failed.add(0.0);
                sums.empty.add(if empty { 1.0 } else { 0.0 });
            }
        }
    }

    /// The means at `now_ms`.
    pub fn means(&self, now_ms: u64) -> Means {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.fade(now_ms);
        let means = [
            sums.first_token,
            sums.gap,
            sums.whole,
            sums.failed,
            sums.empty,
        ];
        Means(means.map(Mean::value))
    }

    /// The share of its usual traffic that it is to get, above 0 up to 1.
    pub fn share(&self) -> f32 {
        f32::from_bits(self.share.load(Ordering::Relaxed))
    }

    /// See [`shares`].
    pub fn set_share(&self, share: f32) {
        self.share.store(share.to_bits(), Ordering::Relaxed);
    }
}

impl Sums {
    #[expect(clippy::cast_precision_loss, reason = "an age is a rough figure")]
    fn fade(&mut self, now_ms: u64) {
        let age_ms = now_ms.saturating_sub(self.at_ms);
        self.at_ms = self.at_ms.max(now_ms);
        let keep = (-(age_ms as f32) / TAU_MS).exp();
        for mean in [
            &mut self.first_token,
            &mut self.gap,
            &mut self.whole,
            &mut self.failed,
            &mut self.empty,
        ] {
            mean.fade(keep);
        }
    }
}

/// The shares of a backend's endpoints, in their order.
pub fn shares(peers: &[Means]) -> Vec<f32> {
    let mut shares = vec![1.0_f32; peers.len()];
    for figure in 0..Means::default().0.len() {
        let is_part = figure >= 3;
        let mut known: Vec<f32> = peers.iter().filter_map(|means| means.0[figure]).collect();
        if known.len() < 2 {
            continue;
        }
        known.sort_by(f32::total_cmp);
        // Of two, the better one.
        let median = known[(known.len() - 1) / 2];
        for (share, means) in shares.iter_mut().zip(peers) {
            let Some(own) = means.0[figure] else { continue };
            let fit = if is_part {
                let excess = (own - median - USUAL_EXCESS).max(0.0) / (1.0 - USUAL_EXCESS);
                (1.0 - excess).powi(4)
            } else if own > USUAL_RATIO * median && median > 0.0 {
                (USUAL_RATIO * median / own).powi(2)
            } else {
                1.0
            };
            *share = share.min(fit);
        }
    }
    let best = shares.iter().copied().fold(0.0, f32::max);
    if best <= 0.0 {
        // All are as bad as can be: none is worse than the others.
        return vec![1.0; peers.len()];
    }
    shares
        .iter()
        .map(|share| (share / best).clamp(LEAST, 1.0))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with(samples: &[Sample]) -> Means {
        let vitals = Vitals::default();
        for sample in samples {
            for _ in 0..5 {
                vitals.note(*sample, 1_000);
            }
        }
        vitals.means(1_000)
    }

    #[test]
    fn one_that_is_ten_times_slower_than_its_peers_gets_a_twentieth() {
        for slow in [
            Sample::FirstToken as fn(f32) -> Sample,
            Sample::Gap,
            Sample::Whole,
        ] {
            let peers = [
                with(&[slow(40.0)]),
                with(&[slow(400.0)]),
                with(&[slow(42.0)]),
            ];
            let shares = shares(&peers);
            assert_eq!((shares[0], shares[2]), (1.0, 1.0));
            assert!(shares[1] <= 0.05, "{shares:?}");
        }
    }

    #[test]
    fn a_good_past_is_outweighed_by_a_few_samples() {
        let (slow, quick) = (Vitals::default(), Vitals::default());
        for vitals in [&slow, &quick] {
            (0..1_000).for_each(|_| vitals.note(Sample::FirstToken(40.0), 0));
        }
        let share = |samples: usize| {
            (0..samples).for_each(|_| slow.note(Sample::FirstToken(400.0), 0));
            shares(&[slow.means(0), quick.means(0), quick.means(0)])[0]
        };
        assert_eq!(share(1), 1.0, "one may be an accident");
        assert!(share(9) < 0.2);
        assert!(share(10) < 0.1);
    }

    #[test]
    fn what_is_usual_costs_nothing() {
        let peers = [
            with(&[Sample::FirstToken(40.0), Sample::Ended { empty: false }]),
            with(&[Sample::FirstToken(79.0), Sample::Ended { empty: false }]),
        ];
        assert_eq!(shares(&peers), [1.0, 1.0]);
    }

    #[test]
    fn failures_and_empty_answers_count_only_where_peers_have_fewer() {
        let works = with(&[Sample::Ended { empty: false }]);
        let halves = with(&[Sample::Ended { empty: false }, Sample::Failed]);
        let says_nothing = with(&[Sample::Ended { empty: true }]);
        let found = shares(&[works, halves, works, says_nothing]);
        assert_eq!((found[0], found[2]), (1.0, 1.0));
        assert!(found[1] < 0.15 && found[3] <= LEAST, "{found:?}");
        assert_eq!(shares(&[halves, halves]), [1.0, 1.0], "the same everywhere");
    }

    #[test]
    fn what_is_unknown_or_long_ago_is_not_compared() {
        let slow = Vitals::default();
        slow.note(Sample::FirstToken(900.0), 0);
        slow.note(Sample::FirstToken(900.0), 0);
        let quick = with(&[Sample::FirstToken(10.0)]);
        assert_eq!(shares(&[slow.means(0), quick]), [1.0, 1.0], "two samples");
        slow.note(Sample::FirstToken(900.0), 0);
        slow.note(Sample::FirstToken(900.0), 0);
        assert!(shares(&[slow.means(1_000), quick])[0] < 0.05);
        assert_eq!(shares(&[slow.means(10_000), quick]), [1.0, 1.0], "faded");
        assert_eq!(shares(&[quick]), [1.0]);
        assert_eq!(shares(&[]), [] as [f32; 0]);
    }

    proptest! {
        #[test]
        fn somebody_always_keeps_a_full_share(
            peers in prop::collection::vec(prop::array::uniform5(prop::option::of(0.0f32..1_000.0)), 1..8)
        ) {
            let peers: Vec<Means> = peers
                .into_iter()
                .map(|[a, b, c, failed, empty]| {
                    let part = |value: Option<f32>| value.map(|value| value / 1_000.0);
                    Means([a, b, c, part(failed), part(empty)])
                })
                .collect();
            let shares = shares(&peers);
            prop_assert!(shares.contains(&1.0), "{:?}", shares);
            prop_assert!(shares.iter().all(|share| (LEAST..=1.0).contains(share)));
        }
    }
}
