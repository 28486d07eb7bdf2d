//! Whether an endpoint still says something. Pure: times come in.
//!
//! An engine that is frozen, or whose node is, accepts requests and answers none of them; nothing fails, so nothing
//! counts failures. But an engine that works sends tokens at each step, to some stream or other. So one that has
//! streams and is silent for [`SILENCE_MS`] comes after its peers until it is heard again. One that computes a very
//! long prompt is silent as well: there, too, others are the better choice.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Thirty times the longest step of the engine profiles at usual loads, and still short for whoever waits.
pub const SILENCE_MS: u64 = 3_000;

/// One endpoint's signs of life.
#[derive(Debug, Default)]
pub struct Pulse {
    streams: AtomicU32,
    heard_ms: AtomicU64,
}

impl Pulse {
    /// A stream was sent there.
    pub fn enter(&self, now_ms: u64) {
        if self.streams.fetch_add(1, Ordering::Relaxed) == 0 {
            self.hear(now_ms);
        }
    }

    /// A stream has ended, whatever way.
    pub fn leave(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// Something came from there.
    pub fn hear(&self, now_ms: u64) {
        self.heard_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Whether it should have said something.
    pub fn is_silent(&self, now_ms: u64) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
            && now_ms.saturating_sub(self.heard_ms.load(Ordering::Relaxed)) > SILENCE_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_first_stream_or_the_last_word() {
        let pulse = Pulse::default();
        assert!(!pulse.is_silent(1_000_000), "nobody asked");
        pulse.enter(1_000_000);
        assert!(!pulse.is_silent(1_000_000 + SILENCE_MS));
        assert!(pulse.is_silent(1_000_001 + SILENCE_MS));
        pulse.enter(1_002_000);
        assert!(
            pulse.is_silent(1_000_001 + SILENCE_MS),
            "further streams are no answer"
        );
        pulse.hear(1_004_000);
        assert!(!pulse.is_silent(1_004_001));
        pulse.leave();
        assert!(pulse.is_silent(1_010_000));
        pulse.leave();
        assert!(!pulse.is_silent(1_010_000), "nobody waits");
    }
}
