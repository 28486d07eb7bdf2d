//! Whether an endpoint is doubtful that holds calls which are not streamed. Pure: times and answers come in.
//!
//! Such a call says nothing until its answer is whole, which may take minutes, so silence alone tells a frozen engine
//! from a busy one only when it is too late. But a server that works answers a small question at once, whatever its
//! engine computes. So one that holds such calls and has answered none of them for [`DOUBT_MS`] is asked such a
//! question (see `probe`), and counts as quiet from the first one that it leaves unanswered until it says anything.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Most engines that are used for more than one call at a time answer one in less.
const DOUBT_MS: u64 = 1_000;
/// Between two questions.
const EVERY_MS: u64 = 1_000;
/// What a question may take. A server whose event loop is blocked for longer is no good place either.
pub const LIMIT: Duration = Duration::from_secs(1);

/// One endpoint's calls that are not streamed.
#[derive(Debug, Default)]
pub struct Doubt {
    held: AtomicU32,
    /// When one was sent there first since the last word, at least 1; 0: nothing is unanswered.
    asked_ms: AtomicU64,
    /// When a question was left unanswered first since the last word, at least 1; 0: none was.
    mute_ms: AtomicU64,
    /// When the next question is due.
    next_ms: AtomicU64,
}

impl Doubt {
    /// A call was sent there.
    pub fn enter(&self, now_ms: u64) {
        self.held.fetch_add(1, Ordering::Relaxed);
        if self.asked_ms.load(Ordering::Relaxed) == 0 {
            self.asked_ms.store(now_ms.max(1), Ordering::Relaxed);
        }
    }

    /// A call has ended, whatever way. Who leaves says nothing of one that is mute.
    pub fn leave(&self) {
        if self.held.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.asked_ms.store(0, Ordering::Relaxed);
        }
    }

    /// Something came from there.
    pub fn heard(&self, now_ms: u64) {
        if self.held.load(Ordering::Relaxed) > 0 {
            self.asked_ms.store(now_ms.max(1), Ordering::Relaxed);
        }
        if self.mute_ms.load(Ordering::Relaxed) != 0 {
            self.mute_ms.store(0, Ordering::Relaxed);
        }
    }

    /// Whether it is to be asked a question now. Then the next one is [`EVERY_MS`] later at the earliest.
    pub fn is_due(&self, now_ms: u64) -> bool {
        let asked_ms = self.asked_ms.load(Ordering::Relaxed);
        let waits = asked_ms != 0 && now_ms.saturating_sub(asked_ms) >= DOUBT_MS;
        let is_mute = self.mute_ms.load(Ordering::Relaxed) != 0;
        let is_due = (waits || is_mute) && now_ms >= self.next_ms.load(Ordering::Relaxed);
        if is_due {
            let next_ms = now_ms.saturating_add(EVERY_MS);
            self.next_ms.store(next_ms, Ordering::Relaxed);
        }
        is_due
    }

    /// Takes in how a question ended; `true` if it has made another of it.
    pub fn probed(&self, is_answered: bool, now_ms: u64) -> bool {
        let was_mute = self.mute_ms.load(Ordering::Relaxed) != 0;
        match (was_mute, is_answered) {
            (_, true) => self.heard(now_ms),
            (false, false) => self.mute_ms.store(now_ms.max(1), Ordering::Relaxed),
            (true, false) => {}
        }
        was_mute == is_answered
    }

    /// For how many ms it has left questions unanswered; `None` if it has not.
    pub fn mute_ms(&self, now_ms: u64) -> Option<u64> {
        let since_ms = self.mute_ms.load(Ordering::Relaxed);
        (since_ms != 0).then(|| now_ms.saturating_sub(since_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_calls_and_answers_none_is_asked_every_second() {
        let doubt = Doubt::default();
        assert!(!doubt.is_due(1_000_000), "it holds nothing");
        doubt.enter(1_000_000);
        doubt.enter(1_000_900);
        assert!(!doubt.is_due(1_000_999));
        assert!(doubt.is_due(1_001_000));
        assert!(!doubt.is_due(1_001_999));
        assert!(doubt.is_due(1_002_000));
        doubt.heard(1_002_500);
        assert!(!doubt.is_due(1_003_499), "an answer to any of them will do");
        assert!(doubt.is_due(1_003_500));
        doubt.leave();
        doubt.leave();
        assert!(!doubt.is_due(2_000_000));
    }

    #[test]
    fn who_leaves_a_question_unanswered_is_mute_until_it_says_anything() {
        let doubt = Doubt::default();
        doubt.enter(1_000);
        assert!(!doubt.probed(true, 2_000));
        assert_eq!(doubt.mute_ms(2_000), None);
        assert!(doubt.probed(false, 3_000));
        assert!(!doubt.probed(false, 4_000));
        assert_eq!(doubt.mute_ms(4_000), Some(1_000));
        doubt.leave();
        assert_eq!(doubt.mute_ms(5_000), Some(2_000), "its callers gave up");
        assert!(doubt.is_due(5_000), "it is asked on");
        assert!(doubt.probed(true, 6_000));
        assert_eq!(doubt.mute_ms(6_000), None);
        assert!(!doubt.is_due(100_000));
    }

    #[test]
    fn a_frozen_one_is_found_within_three_seconds() {
        let tick = crate::probe::TICK.as_millis();
        let all = u128::from(DOUBT_MS) + tick + LIMIT.as_millis();
        assert!(all < 3_000, "{all}");
    }
}
