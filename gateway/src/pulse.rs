//! Whether an endpoint still says something. Pure: times come in.
//!
//! An engine that is frozen, or whose node is, accepts requests and answers none of them; nothing fails, so nothing
//! counts failures. But an engine that works sends tokens at each step, to some stream or other. So one that has
//! streams and sends nothing to any of them comes after its peers of equal priority after [`QUIET_MS`], and after all
//! others after [`SILENT_MS`], until it is heard again, also when those who waited there have left. One that computes a
//! very long prompt for its only stream is quiet as well: there, too, its peers are the better choice, but not yet a
//! dearer backend. Calls that are not streamed say nothing until they end: see `doubt`.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::doubt::Doubt;

/// Many times the longest step of the engine profiles at usual loads, and still short for whoever waits.
pub const QUIET_MS: u64 = 3_000;
/// The slowest of the engine profiles computes a prompt of 65,000 tokens in that time.
pub const SILENT_MS: u64 = 12_000;
/// Between two requests that see whether a silent endpoint answers again.
pub const PROBE_MS: u64 = 10_000;

/// One endpoint's signs of life.
#[derive(Debug, Default)]
pub struct Pulse {
    streams: AtomicU32,
    /// When a stream was sent there first since the last word, at least 1; 0: nothing is unanswered.
    asked_ms: AtomicU64,
    /// When a stream was sent there last.
    entered_ms: AtomicU64,
    /// What is known where nothing is streamed.
    pub doubt: Doubt,
}

impl Pulse {
    /// A stream was sent there.
    pub fn enter(&self, now_ms: u64) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.entered_ms.store(now_ms, Ordering::Relaxed);
        if self.asked_ms.load(Ordering::Relaxed) == 0 {
            self.asked_ms.store(now_ms.max(1), Ordering::Relaxed);
        }
    }

    /// A stream has ended, whatever way.
    pub fn leave(&self, now_ms: u64) {
        let was_last = self.streams.fetch_sub(1, Ordering::Relaxed) == 1;
        // Who leaves early says nothing; a silence that was one already stays one.
        if was_last && self.of_streams_ms(now_ms) < QUIET_MS {
            self.asked_ms.store(0, Ordering::Relaxed);
        }
    }

    /// Something came from there, for one of at least as many streams as there are.
    pub fn hear(&self, now_ms: u64) {
        self.asked_ms.store(now_ms.max(1), Ordering::Relaxed);
        self.doubt.heard(now_ms);
    }

    /// For how many ms it has said nothing although it was asked.
    pub fn silence_ms(&self, now_ms: u64) -> u64 {
        let mute_ms = self.doubt.mute_ms(now_ms);
        let of_mute_ms = mute_ms.map_or(0, |mute_ms| QUIET_MS + 1 + mute_ms);
        self.of_streams_ms(now_ms).max(of_mute_ms)
    }

    /// Nobody is sent to a silent one without need, so one request may look again after [`PROBE_MS`].
    fn of_streams_ms(&self, now_ms: u64) -> u64 {
        let asked_ms = self.asked_ms.load(Ordering::Relaxed);
        let is_alone = self.streams.load(Ordering::Relaxed) == 0;
        let entered_ms = self.entered_ms.load(Ordering::Relaxed);
        if asked_ms == 0 || (is_alone && now_ms.saturating_sub(entered_ms) >= PROBE_MS) {
            0
        } else {
            now_ms.saturating_sub(asked_ms)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_first_stream_or_the_last_word() {
        let pulse = Pulse::default();
        assert_eq!(pulse.silence_ms(1_000_000), 0, "nobody asked");
        pulse.enter(1_000_000);
        assert_eq!(pulse.silence_ms(1_003_000), 3_000);
        pulse.enter(1_004_000);
        assert_eq!(
            pulse.silence_ms(1_005_000),
            5_000,
            "further streams are no answer"
        );
        pulse.hear(1_006_000);
        assert_eq!(pulse.silence_ms(1_006_001), 1);
        pulse.leave(1_007_000);
        assert_eq!(pulse.silence_ms(1_008_000), 2_000);
        pulse.leave(1_008_000);
        assert_eq!(pulse.silence_ms(1_010_000), 0, "nobody waits");
    }

    #[test]
    fn one_that_answers_no_probe_is_quiet_at_once_and_silent_after_a_while() {
        let pulse = Pulse::default();
        pulse.doubt.enter(1_000);
        assert_eq!(pulse.silence_ms(100_000), 0, "calls may take their time");
        pulse.doubt.probed(false, 100_000);
        assert!(pulse.silence_ms(100_000) > QUIET_MS && pulse.silence_ms(100_000) < SILENT_MS);
        assert!(pulse.silence_ms(100_000 + SILENT_MS) > SILENT_MS);
        pulse.hear(101_000);
        assert_eq!(pulse.silence_ms(101_000), 0);
    }

    #[test]
    fn a_silent_one_stays_silent_when_those_who_waited_have_left_and_is_looked_at_by_one() {
        let pulse = Pulse::default();
        pulse.enter(1_000);
        pulse.enter(2_000);
        pulse.leave(4_000);
        pulse.leave(5_000);
        assert_eq!(pulse.silence_ms(6_000), 5_000);
        let later = 2_000 + PROBE_MS;
        assert_eq!(pulse.silence_ms(later), 0, "one may look");
        pulse.enter(later);
        assert!(pulse.silence_ms(later + 1) > QUIET_MS, "the others wait");
        pulse.leave(later + 3_000);
        assert!(pulse.silence_ms(later + 3_000) > QUIET_MS);
        pulse.enter(later + PROBE_MS);
        pulse.hear(later + PROBE_MS + 100);
        assert_eq!(pulse.silence_ms(later + PROBE_MS + 101), 1);
        pulse.leave(later + PROBE_MS + 200);
        assert_eq!(pulse.silence_ms(later + PROBE_MS + 300), 0);
    }
}
