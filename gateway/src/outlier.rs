//! Which endpoints are left out for a while because requests to them keep failing. Pure: the time comes in.
//!
//! An endpoint leaves after [`FAILURES`] failures in a row; connections that cannot be made count more. It comes back
//! for a trial when its time is over; a further failure sends it away for longer, a success clears it. At most half
//! of a backend's endpoints (at least one) are away at a time, and those that are away are still used when nothing
//! else is left.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Failures in a row that send an endpoint away (Envoy's `consecutive_5xx`, 5).
pub const FAILURES: u32 = 5;
/// What a connection that cannot be made counts: two of them are enough.
pub const CONNECT_WEIGHT: u32 = 3;
/// The first absence, in ms; the n-th in a row is n times as long.
const ABSENCE_MS: u64 = 5_000;
/// The longest absence, in ms.
const MAX_ABSENCE_MS: u64 = 30_000;

/// One endpoint's record of failures.
#[derive(Debug, Default)]
pub struct Outlier {
    failures: AtomicU32,
    absences: AtomicU32,
    until_ms: AtomicU64,
    /// Failures in a row that were waits in vain.
    silences: AtomicU32,
}

impl Outlier {
    /// Whether it is left out at `now_ms`.
    pub fn is_away(&self, now_ms: u64) -> bool {
        self.until_ms.load(Ordering::Relaxed) > now_ms
    }

    /// For how many ms more it is left out.
    pub fn away_ms(&self, now_ms: u64) -> u64 {
        self.until_ms.load(Ordering::Relaxed).saturating_sub(now_ms)
    }

    /// Whether all of the failures that sent it away were waits in vain.
    pub fn is_silent(&self) -> bool {
        self.silences.load(Ordering::Relaxed) >= FAILURES
    }

    /// A request failed: whether no answer began in time.
    pub fn waited(&self, in_vain: bool) {
        if in_vain {
            self.silences.fetch_add(1, Ordering::Relaxed);
        } else {
            self.silences.store(0, Ordering::Relaxed);
        }
    }

    /// Whether the last request to it failed.
    pub fn is_failing(&self) -> bool {
        self.failures.load(Ordering::Relaxed) > 0
    }

    /// A request was answered.
    pub fn succeeded(&self) {
        // Loads first: a store would take the cache line from other cores on each request.
        if self.failures.load(Ordering::Relaxed) != 0 || self.absences.load(Ordering::Relaxed) != 0
        {
            self.failures.store(0, Ordering::Relaxed);
            self.silences.store(0, Ordering::Relaxed);
            self.absences.store(0, Ordering::Relaxed);
            self.until_ms.store(0, Ordering::Relaxed);
        }
    }

    /// A request failed with `weight`. `away` and `all` count the backend's endpoints. Says whether it leaves now.
    pub fn failed(&self, weight: u32, now_ms: u64, away: usize, all: usize) -> bool {
        let failures = self
            .failures
            .fetch_add(weight, Ordering::Relaxed)
            .saturating_add(weight);
        if failures < FAILURES || self.is_away(now_ms) || away >= (all / 2).max(1) {
            return false;
        }
        let absences = self
            .absences
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        let absence_ms = ABSENCE_MS
            .saturating_mul(u64::from(absences))
            .min(MAX_ABSENCE_MS);
        self.until_ms
            .store(now_ms.saturating_add(absence_ms), Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_failures_in_a_row_send_it_away_and_time_brings_it_back() {
        let outlier = Outlier::default();
        for _ in 0..4 {
            assert!(!outlier.failed(1, 100, 0, 4));
        }
        outlier.succeeded();
        for _ in 0..4 {
            assert!(!outlier.failed(1, 100, 0, 4));
        }
        assert!(outlier.failed(1, 100, 0, 4));
        assert!(outlier.is_away(100 + ABSENCE_MS - 1));
        assert!(!outlier.is_away(100 + ABSENCE_MS));
        assert!(
            outlier.failed(1, 6000, 0, 4),
            "one failure in its trial is enough"
        );
        assert!(
            outlier.is_away(6000 + 2 * ABSENCE_MS - 1),
            "and it stays away longer"
        );
    }

    #[test]
    fn absences_grow_to_the_limit() {
        let outlier = Outlier::default();
        let mut now = 0;
        for _ in 0..20 {
            assert!(outlier.failed(FAILURES, now, 0, 4));
            now += MAX_ABSENCE_MS;
        }
        assert!(!outlier.is_away(now));
    }

    #[test]
    fn at_most_half_are_away() {
        let outlier = Outlier::default();
        assert!(!outlier.failed(FAILURES, 0, 2, 4));
        assert!(outlier.failed(1, 0, 1, 4));
        assert!(
            Outlier::default().failed(FAILURES, 0, 0, 1),
            "a lone one too: it is used when nothing else is left"
        );
    }
}
