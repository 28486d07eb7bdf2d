//! Which endpoints are left out for a while because requests to them keep failing. Pure: the time comes in.
//!
//! An endpoint leaves after [`FAILURES`] failures in a row; connections that cannot be made count more. Answers that
//! break off are failures too, and once one did, only one that came to its end is a success. It comes back for a trial
//! when its time is over; a further failure sends it away for longer, a success clears it. At most half of a backend's
//! endpoints (at least one) are away at a time, and those that are away are still used when nothing else is left.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

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
    /// Answers that broke off since one came to its end.
    cuts: AtomicU32,
    absences: AtomicU32,
    until_ms: AtomicU64,
    /// What failures in a row count that were waits in vain.
    silences: AtomicU32,
    /// Until when it is taken to be as it was then, in ms.
    silent_until_ms: AtomicU64,
    /// The last wait was for a connection.
    is_unreached: AtomicBool,
}

/// What a request waited for in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A connection.
    Connection,
    /// The beginning of an answer.
    FirstToken,
}

impl Outlier {
    /// Whether it is left out at `now_ms`.
    pub fn is_away(&self, now_ms: u64) -> bool {
        self.until_ms.load(Ordering::Relaxed) > now_ms
    }

    /// What requests waited for in vain, as often as sends an endpoint away, and for how many ms more nobody looks
    /// whether it still is so. Any number of a backend's endpoints may be silent.
    pub fn silence(&self, now_ms: u64) -> Option<(Wait, u64)> {
        let left_ms = self
            .silent_until_ms
            .load(Ordering::Relaxed)
            .saturating_sub(now_ms);
        let wait = if self.is_unreached.load(Ordering::Relaxed) {
            Wait::Connection
        } else {
            Wait::FirstToken
        };
        (left_ms > 0).then_some((wait, left_ms))
    }

    /// A request failed, after a wait in vain or in another way.
    pub fn waited(&self, in_vain: Option<Wait>, now_ms: u64) {
        let Some(wait) = in_vain else {
            self.silences.store(0, Ordering::Relaxed);
            self.silent_until_ms.store(0, Ordering::Relaxed);
            return;
        };
        let weight = match wait {
            Wait::Connection => CONNECT_WEIGHT,
            Wait::FirstToken => 1,
        };
        let silences = self.silences.fetch_add(weight, Ordering::Relaxed);
        let silences = silences.saturating_add(weight);
        self.is_unreached
            .store(wait == Wait::Connection, Ordering::Relaxed);
        let absence_ms = u64::from(silences / FAILURES).saturating_mul(ABSENCE_MS);
        if absence_ms > 0 {
            self.silent_until_ms.store(
                now_ms.saturating_add(absence_ms.min(MAX_ABSENCE_MS)),
                Ordering::Relaxed,
            );
        }
    }

    /// Whether the last request to it failed.
    pub fn is_failing(&self) -> bool {
        self.failures.load(Ordering::Relaxed) > 0
    }

    /// An answer began: a success, unless those that begin break off.
    pub fn began(&self) {
        if self.cuts.load(Ordering::Relaxed) == 0 {
            self.succeeded();
        }
    }

    /// An answer broke off; what that failure counts is told to [`Self::failed`].
    pub fn broke_off(&self) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
    }

    /// A request was answered, to the end.
    pub fn succeeded(&self) {
        if self.cuts.load(Ordering::Relaxed) != 0 {
            self.cuts.store(0, Ordering::Relaxed);
        }
        // Loads first: a store would take the cache line from other cores on each request.
        if self.failures.load(Ordering::Relaxed) != 0 || self.absences.load(Ordering::Relaxed) != 0
        {
            self.failures.store(0, Ordering::Relaxed);
            self.silences.store(0, Ordering::Relaxed);
            self.silent_until_ms.store(0, Ordering::Relaxed);
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
    fn waits_in_vain_are_silence_until_one_is_not() {
        let outlier = Outlier::default();
        (0..4).for_each(|_| outlier.waited(Some(Wait::FirstToken), 100));
        assert_eq!(outlier.silence(100), None);
        outlier.waited(Some(Wait::FirstToken), 100);
        let first_token = Some((Wait::FirstToken, ABSENCE_MS));
        assert_eq!(outlier.silence(100), first_token);
        assert_eq!(outlier.silence(100 + ABSENCE_MS), None, "a trial");
        outlier.waited(None, 100);
        assert_eq!(outlier.silence(100), None, "it failed otherwise");
        (0..2).for_each(|_| outlier.waited(Some(Wait::Connection), 200));
        assert_eq!(outlier.silence(200), Some((Wait::Connection, ABSENCE_MS)));
        (0..2).for_each(|_| outlier.waited(Some(Wait::Connection), 200));
        let longer = Some((Wait::Connection, 2 * ABSENCE_MS));
        assert_eq!(outlier.silence(200), longer);
        outlier.failed(1, 200, 0, 4);
        outlier.succeeded();
        assert_eq!(outlier.silence(200), None);
    }

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
    fn answers_that_begin_and_break_off_are_failures_in_a_row() {
        let outlier = Outlier::default();
        let cut = || {
            outlier.began();
            outlier.broke_off();
            outlier.failed(1, 100, 0, 4)
        };
        assert!((0..4).all(|_| !cut()));
        outlier.succeeded();
        assert!((0..4).all(|_| !cut()));
        assert!(cut());
        outlier.began();
        assert!(outlier.is_away(100), "that says nothing");
        outlier.succeeded();
        assert!(!outlier.is_away(100));
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
