//! Whether an endpoint still says something. Pure: times come in.
//!
//! An engine that is frozen, or whose node is, accepts requests and answers none of them; nothing fails, so nothing
//! counts failures. But an engine that works sends tokens at each step, to some stream or other. So one that has
//! streams and sends nothing to any of them comes after its peers of equal priority after [`QUIET_MS`], and after all
//! others after [`SILENT_MS`], until it is heard again. One that computes a very long prompt for its only stream is
//! quiet as well: there, too, its peers are the better choice, but not yet a dearer backend.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Many times the longest step of the engine profiles at usual loads, and still short for whoever waits.
pub const QUIET_MS: u64 = 3_000;
/// The slowest of the engine profiles computes a prompt of 65,000 tokens in that time.
pub const SILENT_MS: u64 = 12_000;

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

    /// For how many ms it has said nothing although there are streams.
    pub fn silence_ms(&self, now_ms: u64) -> u64 {
        match self.streams.load(Ordering::Relaxed) {
            0 => 0,
            _ => now_ms.saturating_sub(self.heard_ms.load(Ordering::Relaxed)),
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
        pulse.leave();
        assert_eq!(pulse.silence_ms(1_010_000), 4_000);
        pulse.leave();
        assert_eq!(pulse.silence_ms(1_010_000), 0, "nobody waits");
    }
}
