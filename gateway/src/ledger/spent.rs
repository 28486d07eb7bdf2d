//! What was spent in a window. Pure.
//!
//! A sliding window is kept in at most [`PARTS`] + 2 parts. A part counts until all of it is out of the window, so the
//! sum is never below what was spent in any window of that length, and above it by one part's share at most.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Parts of a sliding window.
pub const PARTS: u64 = 60;

/// The time that a limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// What is under way, and nothing that is over: how many at one time.
    Held,
    /// So long back from any moment, in ms.
    Sliding {
        /// Its length, at least 1.
        ms: u64,
    },
    /// From one moment to another, in ms: a day, a week or a month of a calendar.
    Fixed {
        /// When it began.
        starts_ms: u64,
        /// When the next one begins.
        ends_ms: u64,
    },
}

/// What was spent at about one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Part {
    /// Of a period's only part, when something was added last.
    starts_ms: u64,
    amount: u64,
}

/// What was spent, as far as it counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Spent {
    parts: VecDeque<Part>,
}

impl Spent {
    /// Leaves out what counts no more.
    pub fn roll(&mut self, window: Window, now_ms: u64) {
        match window {
            Window::Held => self.parts.clear(),
            Window::Sliding { ms } => {
                let counts = |part: &Part| ends_ms(part, ms) > now_ms;
                while self.parts.front().is_some_and(|part| !counts(part)) {
                    self.parts.pop_front();
                }
            }
            // A part is as old as the last that was added to it: so a period that turns out to begin later, because its
            // zone is another one now, has all that was spent in it. What is newer than the period is of a clock that
            // was set back.
            Window::Fixed { starts_ms, .. } => {
                self.parts.retain(|part| part.starts_ms >= starts_ms);
            }
        }
    }

    /// Adds what was spent now. [`Spent::roll`] was called at this time.
    pub fn add(&mut self, window: Window, now_ms: u64, amount: u64) {
        let starts_ms = match window {
            Window::Held => return,
            Window::Sliding { ms } => now_ms - now_ms % part_ms(ms),
            Window::Fixed { .. } => now_ms,
        };
        if amount == 0 {
            return;
        }
        let is_period = matches!(window, Window::Fixed { .. });
        match self.parts.back_mut() {
            Some(last) if last.starts_ms >= starts_ms || is_period => {
                last.starts_ms = last.starts_ms.max(starts_ms);
                last.amount = last.amount.saturating_add(amount);
            }
            _ => self.parts.push_back(Part { starts_ms, amount }),
        }
    }

    /// All of it.
    pub fn sum(&self) -> u64 {
        let amounts = self.parts.iter().map(|part| part.amount);
        amounts.fold(0, u64::saturating_add)
    }

    /// How long until `amount` of it counts no more, in ms; `None`: not by waiting.
    pub fn gone_in(&self, window: Window, now_ms: u64, amount: u64) -> Option<u64> {
        match window {
            Window::Held => None,
            Window::Fixed { ends_ms, .. } => {
                (self.sum() >= amount).then_some(ends_ms.saturating_sub(now_ms))
            }
            Window::Sliding { ms } => {
                let mut left = amount;
                let end = self.parts.iter().find(|part| {
                    left = left.saturating_sub(part.amount);
                    left == 0
                })?;
                Some(ends_ms(end, ms).saturating_sub(now_ms))
            }
        }
    }
}

fn part_ms(window_ms: u64) -> u64 {
    window_ms.div_ceil(PARTS).max(1)
}

/// When all of a part is out of the window.
fn ends_ms(part: &Part, window_ms: u64) -> u64 {
    let end = part.starts_ms.saturating_add(part_ms(window_ms));
    end.saturating_add(window_ms)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: Window = Window::Sliding { ms: 60_000 };

    #[test]
    fn a_sliding_window_forgets_after_its_length_and_not_before() {
        let mut spent = Spent::default();
        spent.add(MINUTE, 500, 7);
        spent.add(MINUTE, 30_000, 5);
        for (now_ms, sum) in [
            (30_000, 12),
            (60_999, 12),
            (61_000, 5),
            (90_999, 5),
            (91_000, 0),
        ] {
            let mut spent = spent.clone();
            spent.roll(MINUTE, now_ms);
            assert_eq!(spent.sum(), sum, "{now_ms}");
        }
        assert_eq!(spent.gone_in(MINUTE, 30_000, 7), Some(31_000));
        assert_eq!(spent.gone_in(MINUTE, 30_000, 8), Some(61_000));
        assert_eq!(spent.gone_in(MINUTE, 30_000, 13), None);
    }

    #[test]
    fn a_fixed_window_begins_anew_and_never_again() {
        let day = |number: u64| Window::Fixed {
            starts_ms: number * 1_000,
            ends_ms: (number + 1) * 1_000,
        };
        let mut spent = Spent::default();
        spent.add(day(1), 1_500, 7);
        spent.roll(day(1), 1_999);
        assert_eq!(spent.sum(), 7);
        assert_eq!(spent.gone_in(day(1), 1_999, 3), Some(1));
        spent.roll(day(2), 2_000);
        assert_eq!(spent.sum(), 0);
        spent.add(day(2), 2_000, 3);
        // The clock is set back: what was spent stays spent.
        spent.roll(day(1), 1_900);
        spent.add(day(1), 1_900, 1);
        assert_eq!(spent.sum(), 4);
    }

    #[test]
    fn a_period_that_turns_out_to_begin_later_keeps_what_was_spent_in_it() {
        let from = |starts_ms| Window::Fixed {
            starts_ms,
            ends_ms: starts_ms + 10_000,
        };
        let mut spent = Spent::default();
        spent.add(from(0), 1_000, 7);
        spent.roll(from(0), 6_000);
        spent.add(from(0), 6_000, 3);
        // Its midnight is five hours later, say: more than what was spent since then counts, not less.
        spent.roll(from(5_000), 7_000);
        assert_eq!((spent.sum(), spent.parts.len()), (10, 1));
        spent.roll(from(10_000), 10_000);
        assert_eq!(spent.sum(), 0);
    }

    #[test]
    fn what_is_held_is_never_spent() {
        let mut spent = Spent::default();
        spent.add(Window::Held, 1, 7);
        assert_eq!((spent.sum(), spent.gone_in(Window::Held, 1, 1)), (0, None));
    }

    proptest! {
        /// Whatever comes when: no window of the length has more in it than the sum says, and few parts are kept.
        #[test]
        fn the_sum_is_never_below_the_window(
            length in 1_u64..100_000,
            steps in proptest::collection::vec((0_u64..20_000, 0_u64..1_000), 1..200),
        ) {
            let window = Window::Sliding { ms: length };
            let (mut spent, mut now_ms, mut all) = (Spent::default(), 0, Vec::new());
            for (step, amount) in steps {
                now_ms += step;
                spent.roll(window, now_ms);
                spent.add(window, now_ms, amount);
                all.push((now_ms, amount));
                let within = |from_ms: u64| -> u64 {
                    let inside = all.iter().filter(|(at_ms, _)| *at_ms > from_ms || from_ms == 0);
                    inside.map(|(_, amount)| amount).sum()
                };
                prop_assert!(spent.sum() >= within(now_ms.saturating_sub(length)));
                let slack = part_ms(length) + length;
                prop_assert!(spent.sum() <= within(now_ms.saturating_sub(slack + 1)));
                prop_assert!(spent.parts.len() as u64 <= PARTS + 2);
            }
        }
    }
}
