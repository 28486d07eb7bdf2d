//! How far what engines say that they did is from what gateways counted of it, and so put on somebody's account. Pure.
//!
//! Tokens of a request count when it is over; so what is under way makes both differ while load rises or falls, and a
//! difference that stays is one of work that nobody is charged for, or twice.

use std::collections::{BTreeMap, VecDeque};

/// Compared over so long.
pub const WINDOW_MS: u64 = 600_000;
/// Between two marks of the window.
const EVERY_MS: u64 = 10_000;
/// Fewer tokens say nothing.
const LEAST_TOKENS: f64 = 10_000.0;
/// A difference worth a warning: above what is under way at usual loads, see the module.
pub const ALARM: f64 = 0.05;

/// Tokens of prompts and of answers.
pub type Tokens = [f64; 2];

/// Who counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// An engine, by its pod.
    Engine,
    /// A gateway replica.
    Gateway,
}

/// The last that was heard of one counter.
#[derive(Clone, Copy, Debug)]
struct Last {
    start: u64,
    tokens: Tokens,
    at_ms: u64,
}

/// See the module. What was counted on both sides since this process began to look.
#[derive(Debug, Default)]
pub struct Drift {
    sources: BTreeMap<(Side, String), Last>,
    engines: Tokens,
    gateways: Tokens,
    marks: VecDeque<(u64, Tokens, Tokens)>,
}

impl Drift {
    /// One of them says how many tokens it has counted since its process started, at `start` in whatever unit.
    pub fn hear(&mut self, side: Side, name: &str, start: u64, tokens: Tokens, now_ms: u64) {
        let last = Last {
            start,
            tokens,
            at_ms: now_ms,
        };
        let before = self.sources.insert((side, name.to_owned()), last);
        // What was before the first look is of no window.
        let Some(before) = before else { return };
        let total = match side {
            Side::Engine => &mut self.engines,
            Side::Gateway => &mut self.gateways,
        };
        for ((total, now), before_tokens) in total.iter_mut().zip(tokens).zip(before.tokens) {
            let began_anew = start != before.start || now < before_tokens;
            *total += if began_anew { now } else { now - before_tokens };
        }
    }

    /// The share of the engines' tokens that gateways did not count, over the last ten minutes: negative where they
    /// counted more. `None` while too little is known.
    pub fn shares(&mut self, now_ms: u64) -> [Option<f64>; 2] {
        self.sources
            .retain(|_, last| now_ms.saturating_sub(last.at_ms) < WINDOW_MS);
        let is_due = self
            .marks
            .back()
            .is_none_or(|(at_ms, ..)| now_ms >= at_ms.saturating_add(EVERY_MS));
        if is_due {
            self.marks.push_back((now_ms, self.engines, self.gateways));
        }
        // The first one is the last that is as old as the window.
        while self
            .marks
            .get(1)
            .is_some_and(|(at_ms, ..)| now_ms.saturating_sub(*at_ms) >= WINDOW_MS)
        {
            self.marks.pop_front();
        }
        let Some((at_ms, engines, gateways)) = self.marks.front().copied() else {
            return [None; 2];
        };
        if now_ms.saturating_sub(at_ms) < WINDOW_MS {
            return [None; 2];
        }
        std::array::from_fn(|kind| {
            let did = self.engines[kind] - engines[kind];
            let counted = self.gateways[kind] - gateways[kind];
            (did >= LEAST_TOKENS).then(|| (did - counted) / did)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: u64 = 60_000;

    /// Minutes in which an engine does `did` and a gateway counts `counted` tokens of answers.
    fn after(minutes: u64, did: f64, counted: f64) -> [Option<f64>; 2] {
        let mut drift = Drift::default();
        let mut shares = [None; 2];
        let mut totals = (0.0, 0.0);
        for minute in 0..=minutes {
            let now_ms = minute * MINUTE;
            drift.hear(Side::Engine, "pod", 1, [0.0, totals.0], now_ms);
            drift.hear(Side::Gateway, "gateway", 1, [0.0, totals.1], now_ms);
            shares = drift.shares(now_ms);
            totals = (totals.0 + did, totals.1 + counted);
        }
        shares
    }

    #[test]
    fn what_nobody_counts_shows() {
        assert_eq!(after(20, 10_000.0, 10_000.0), [None, Some(0.0)]);
        assert_eq!(after(20, 10_000.0, 7_500.0), [None, Some(0.25)]);
        assert_eq!(after(20, 10_000.0, 20_000.0), [None, Some(-1.0)]);
        assert_eq!(after(9, 10_000.0, 0.0), [None; 2], "too soon");
        assert_eq!(after(20, 500.0, 0.0), [None; 2], "too few");
    }

    #[test]
    fn counters_that_begin_anew_lose_nothing_and_count_nothing_twice() {
        let mut drift = Drift::default();
        drift.shares(0);
        drift.hear(Side::Engine, "pod", 1, [0.0, 900_000.0], 0);
        drift.hear(Side::Gateway, "gateway", 1, [0.0, 50.0], 0);
        drift.hear(Side::Engine, "pod", 1, [0.0, 910_000.0], MINUTE);
        // Both begin anew: the engine by its time, the gateway by its count.
        drift.hear(Side::Engine, "pod", 2, [0.0, 10_000.0], 2 * MINUTE);
        drift.hear(Side::Gateway, "gateway", 1, [0.0, 20.0], 2 * MINUTE);
        let [_, share] = drift.shares(WINDOW_MS);
        assert!((share.unwrap() - (20_000.0 - 20.0) / 20_000.0).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_bounded(pods in prop::collection::vec(0_u16..500, 1..2_000)) {
            let mut drift = Drift::default();
            for (minute, pod) in (0..).zip(pods) {
                let now_ms = minute * MINUTE;
                drift.hear(Side::Engine, &pod.to_string(), 1, [1.0, 1.0], now_ms);
                drift.shares(now_ms);
                prop_assert!(drift.sources.len() <= 11);
                prop_assert!(drift.marks.len() <= 62);
            }
        }
    }
}
