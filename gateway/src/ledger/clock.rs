//! The time that a record goes by: the store's, less its jumps. Pure.
//!
//! All gateways ask the same store, so its clock is the one that they agree on; but it may be set. A gateway that asked
//! before knows by its own monotonic clock how long ago that was. Where the store's clock says otherwise, it was set,
//! and the record goes on at its own time: no window ends early, no lease of a gateway that lives is over. The
//! difference is made up for slowly, as NTP does it.

use serde::{Deserialize, Serialize};

/// Clocks that differ less were not set: a round trip, a pause of a process, drift.
const TOLERANCE_MS: u64 = 2_000;
/// Clocks drift apart by less than one part in so many.
const DRIFT: u64 = 1_000;
/// One part in so many of the time that passes is made up for.
const SLEW: u64 = 100;

/// What a record's time is ahead of the store's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Correction {
    offset_ms: i64,
    /// How often the clock was found to be set.
    steps: u32,
}

/// A moment that a gateway remembers of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What the store's clock said then, in Unix ms.
    pub store_ms: u64,
    /// How long ago that is by the gateway's own clock.
    pub elapsed_ms: u64,
    /// The record's correction then.
    pub correction: Correction,
}

/// The record's time when the store's clock says `store_ms`, and its correction from now on. `last_ms` is its time when
/// it was changed last: it never goes back.
pub fn now(
    correction: Correction,
    last_ms: u64,
    store_ms: u64,
    seen: Option<Seen>,
) -> (u64, Correction) {
    let mut correction = correction;
    if let Some(seen) = seen
        // Who else saw the jump has corrected it.
        && seen.correction.steps == correction.steps
    {
        let expected_ms = seen.store_ms.saturating_add(seen.elapsed_ms);
        let tolerance_ms = TOLERANCE_MS.saturating_add(seen.elapsed_ms / DRIFT);
        let expected_now_ms = expected_ms.saturating_add_signed(correction.offset_ms);
        // Others who remembered nothing have gone along with it: there is no way back.
        let is_taken = last_ms > expected_now_ms.saturating_add(tolerance_ms);
        if expected_ms.abs_diff(store_ms) > tolerance_ms && !is_taken {
            correction.step(difference(expected_ms, store_ms));
        }
    }
    let told_ms = store_ms.saturating_add_signed(correction.offset_ms);
    if told_ms.saturating_add(TOLERANCE_MS) < last_ms {
        // It was set back, and nobody remembers by how much: time goes on from where it was.
        correction.step(difference(last_ms, told_ms));
    }
    let now_ms = store_ms
        .saturating_add_signed(correction.offset_ms)
        .max(last_ms);
    // A record that is new has no last time.
    let passed_ms = if last_ms == 0 {
        0
    } else {
        now_ms.saturating_sub(last_ms) / SLEW
    };
    let back_ms = i64::try_from(passed_ms.min(correction.offset_ms.unsigned_abs())).unwrap_or(0);
    correction.offset_ms -= back_ms * correction.offset_ms.signum();
    (now_ms, correction)
}

impl Correction {
    fn step(&mut self, by_ms: i64) {
        self.offset_ms = self.offset_ms.saturating_add(by_ms);
        self.steps = self.steps.wrapping_add(1);
    }
}

fn difference(a: u64, b: u64) -> i64 {
    let size = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
    if a < b { -size } else { size }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOON: u64 = 1_800_000_000_000;
    const HOUR: u64 = 3_600_000;

    fn seen(store_ms: u64, elapsed_ms: u64, correction: Correction) -> Seen {
        Seen {
            store_ms,
            elapsed_ms,
            correction,
        }
    }

    #[test]
    fn a_clock_that_goes_on_is_followed() {
        let none = Correction::default();
        let (now_ms, after) = now(none, NOON, NOON + 5_000, Some(seen(NOON, 5_000, none)));
        assert_eq!((now_ms, after), (NOON + 5_000, none));
        // Nobody remembers: it was off, or everybody was.
        let (now_ms, after) = now(none, NOON, NOON + HOUR, None);
        assert_eq!((now_ms, after), (NOON + HOUR, none));
    }

    #[test]
    fn a_clock_that_is_set_moves_nothing() {
        let none = Correction::default();
        for set in [NOON + HOUR, NOON - HOUR] {
            let (first_ms, after) = now(none, NOON, set + 1_000, Some(seen(NOON, 1_000, none)));
            assert_eq!(first_ms, NOON + 1_000);
            // The next one, who has not seen it, finds it corrected.
            let (next_ms, _) = now(
                after,
                first_ms,
                set + 2_000,
                Some(seen(NOON + 500, 1_500, none)),
            );
            assert!(next_ms.abs_diff(NOON + 2_000) <= 20, "{next_ms}");
        }
    }

    #[test]
    fn time_goes_on_where_nobody_remembers_what_it_was() {
        let none = Correction::default();
        // Forward: nobody can tell. Who remembers, and comes later, changes nothing.
        let (now_ms, after) = now(none, NOON, NOON + HOUR, None);
        let late = Some(seen(NOON, 5_000, none));
        let (later_ms, after) = now(after, now_ms, NOON + HOUR + 5_000, late);
        assert_eq!((later_ms, after), (NOON + HOUR + 5_000, none));
        // A new record keeps what is known of the clock.
        let (first_ms, after) = now(none, 0, NOON + HOUR, Some(seen(NOON, 0, none)));
        let (next_ms, _) = now(after, first_ms, NOON + HOUR + 1_000, None);
        assert_eq!((first_ms, next_ms), (NOON, NOON + 1_000));
        // Back: it neither goes back nor stands still.
        let (now_ms, after) = now(none, NOON, NOON - HOUR, None);
        assert_eq!(now_ms, NOON);
        let (now_ms, _) = now(after, now_ms, NOON - HOUR + 60_000, None);
        assert!(now_ms.abs_diff(NOON + 60_000) < 1_000, "{now_ms}");
    }

    #[test]
    fn what_a_jump_moved_is_made_up_for() {
        let none = Correction::default();
        let (mut last_ms, mut correction) = now(none, NOON, NOON + HOUR, Some(seen(NOON, 0, none)));
        for minute in 1..=100 * 60 {
            let store_ms = NOON + HOUR + minute * 60_000;
            let before = Some(seen(store_ms - 60_000, 60_000, correction));
            (last_ms, correction) = now(correction, last_ms, store_ms, before);
        }
        assert!(
            correction.offset_ms.unsigned_abs() < HOUR / 100,
            "{correction:?}"
        );
        assert!(last_ms.abs_diff(NOON + 101 * HOUR) < HOUR / 100);
    }

    proptest! {
        #[test]
        fn time_never_goes_back(stores in proptest::collection::vec(0..u64::MAX, 1..20), elapsed in 0..u64::MAX) {
            let mut correction = Correction::default();
            let (mut last_ms, mut before) = (0, None);
            for store_ms in stores {
                let (now_ms, after) = now(correction, last_ms, store_ms, before);
                prop_assert!(now_ms >= last_ms);
                (last_ms, correction) = (now_ms, after);
                before = Some(seen(store_ms, elapsed, correction));
            }
        }
    }
}
