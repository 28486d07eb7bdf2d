//! What an engine says of itself, and for how long that counts. Pure: readings and times come in.
//!
//! A reading is fresh for [`FRESH_MS`]: queue and KV use count. Then only KV use does, which changes as slowly as
//! answers end, for [`OLD_MS`]. After that nothing is known, and strategies go by what this gateway saw itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use penstock_core::engine_page::Sample;

/// Readings come every second: two may fail.
const FRESH_MS: u64 = 3_000;
/// Answers of usual length end within this time.
const OLD_MS: u64 = 15_000;
/// Whoever asks for readings asks again within this time.
const WANTED_MS: u64 = 10_000;

/// The last reading of one engine.
#[derive(Debug, Default)]
pub struct EngineLoad {
    /// Whether there ever was one, so that others cost nothing.
    known: AtomicBool,
    last: Mutex<Option<Reading>>,
    /// Until when readings are wanted by more than strategies.
    wanted_until_ms: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    at_ms: u64,
    queue: Queue,
    kv_use: Option<f32>,
}

/// An engine's requests, those of other gateways included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// In the batch.
    pub running: u32,
    /// Before it.
    pub waiting: u32,
}

/// What counts of a reading.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Known {
    /// Its requests.
    pub queue: Option<Queue>,
    /// Fill of its KV cache, 0 to 1.
    pub kv_use: Option<f32>,
}

impl EngineLoad {
    /// Takes in a page that was read at `now_ms`.
    pub fn hear(&self, sample: &Sample, now_ms: u64) {
        let reading = Reading {
            at_ms: now_ms,
            queue: Queue {
                running: count(sample.running),
                waiting: count(sample.waiting),
            },
            kv_use: sample.kv_use.map(part),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(reading);
        self.known.store(true, Ordering::Relaxed);
    }

    /// Readings are wanted for a while.
    pub fn want(&self, now_ms: u64) {
        self.wanted_until_ms
            .store(now_ms + WANTED_MS, Ordering::Relaxed);
    }

    /// Whether readings are wanted.
    pub fn is_wanted(&self, now_ms: u64) -> bool {
        now_ms < self.wanted_until_ms.load(Ordering::Relaxed)
    }

    /// What is known at `now_ms`.
    pub fn at(&self, now_ms: u64) -> Known {
        if !self.known.load(Ordering::Relaxed) {
            return Known::default();
        }
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = last else {
            return Known::default();
        };
        let age_ms = now_ms.saturating_sub(last.at_ms);
        Known {
            queue: (age_ms <= FRESH_MS).then_some(last.queue),
            kv_use: last.kv_use.filter(|_| age_ms <= OLD_MS),
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "floats saturate, and none is negative"
)]
fn count(gauge: Option<f64>) -> u32 {
    gauge.unwrap_or(0.0) as u32
}

#[expect(clippy::cast_possible_truncation, reason = "a part of one")]
fn part(gauge: f64) -> f32 {
    gauge.clamp(0.0, 1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_ages_from_fresh_to_old_to_nothing() {
        let load = EngineLoad::default();
        assert_eq!(load.at(5), Known::default());
        let sample = Sample {
            kv_use: Some(0.5),
            running: Some(3.0),
            waiting: Some(1.0),
            ..Sample::default()
        };
        load.hear(&sample, 1_000);
        let queue = Some(Queue {
            running: 3,
            waiting: 1,
        });
        let kv_use = Some(0.5);
        assert_eq!(load.at(1_000 + FRESH_MS), Known { queue, kv_use });
        let old = Known {
            queue: None,
            kv_use,
        };
        assert_eq!(load.at(1_001 + FRESH_MS), old);
        assert_eq!(load.at(1_000 + OLD_MS), old);
        assert_eq!(load.at(1_001 + OLD_MS), Known::default());
        load.hear(&Sample::default(), 20_000);
        assert_eq!(load.at(20_000).kv_use, None);
    }

    #[test]
    fn readings_are_wanted_for_a_while_after_somebody_asked() {
        let load = EngineLoad::default();
        assert!(!load.is_wanted(0));
        load.want(5);
        assert!(load.is_wanted(4 + WANTED_MS));
        assert!(!load.is_wanted(5 + WANTED_MS));
    }
}
