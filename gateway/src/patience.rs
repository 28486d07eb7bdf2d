//! How long callers wait for an answer to begin before they give up. Nobody tells a gateway, but those
//! who left show it. Pure: times come in.
//!
//! It is known only while many leave ([`SHARE_PERCENT`] of those whose wait ended in the last window): then the
//! backends have more to do than they can, and requests that would wait for longer are better refused at once. While
//! nobody leaves, nothing is refused.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// In which departures are compared with answers.
const WINDOW_MS: u64 = 2_000;
/// So many departures at least: a few callers who change their mind are no sign.
const MIN_LEFT: u32 = 8;
/// So many of those whose wait ended.
const SHARE_PERCENT: u32 = 20;
/// What was learned is kept for so long after it mattered last, because while it is heeded hardly anybody leaves.
const KEEP_MS: u64 = 30_000;
/// Ages of as many departures are looked at.
const AGES: usize = 64;
/// Shorter waits are no patience: that is how callers behave who race several requests.
const MIN_PATIENCE_MS: u32 = 200;

/// How much of it may pass at an endpoint.
pub fn at_endpoint(patience: Duration) -> Duration {
    patience / 2
}

/// How much of it may pass before an endpoint is asked; the rest is for what cannot be foreseen.
pub fn in_queue(patience: Duration) -> Duration {
    patience / 4
}

/// What is known of one rule's callers, or of one backend's.
#[derive(Debug, Default)]
pub struct Patience {
    /// In ms; 0: not known.
    known_ms: AtomicU32,
    keep_until_ms: AtomicU64,
    answered: AtomicU32,
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    since_ms: u64,
    left: u32,
    /// How long those who left had waited; the newest last.
    ages_ms: Vec<u32>,
}

impl Patience {
    /// An answer has begun.
    pub fn answered(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// A caller left, or a limit of waiting was reached, after so long without the beginning of an answer.
    pub fn left(&self, waited: Duration, now_ms: u64) {
        let waited_ms = u32::try_from(waited.as_millis()).unwrap_or(u32::MAX);
        if waited_ms < MIN_PATIENCE_MS {
            return;
        }
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if now_ms.saturating_sub(window.since_ms) >= WINDOW_MS {
            window.since_ms = now_ms;
            window.left = 0;
            window.ages_ms.clear();
            self.answered.store(0, Ordering::Relaxed);
        }
        window.left += 1;
        if window.ages_ms.len() == AGES {
            window.ages_ms.remove(0);
        }
        window.ages_ms.push(waited_ms);
        let all = window.left + self.answered.load(Ordering::Relaxed);
        if window.left >= MIN_LEFT && window.left * 100 >= all * SHARE_PERCENT {
            self.known_ms
                .store(quartile(&window.ages_ms), Ordering::Relaxed);
            self.heeded(now_ms);
        }
    }

    /// What is known mattered just now.
    pub fn heeded(&self, now_ms: u64) {
        self.keep_until_ms
            .store(now_ms + KEEP_MS, Ordering::Relaxed);
    }

    /// How long callers wait, if there is reason to heed it: three of four waited at least that long.
    pub fn known(&self, now_ms: u64) -> Option<Duration> {
        match self.known_ms.load(Ordering::Relaxed) {
            0 => None,
            _ if now_ms >= self.keep_until_ms.load(Ordering::Relaxed) => {
                self.known_ms.store(0, Ordering::Relaxed);
                None
            }
            ms => Some(Duration::from_millis(u64::from(ms))),
        }
    }
}

fn quartile(ages_ms: &[u32]) -> u32 {
    let mut sorted = ages_ms.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 4).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_SECONDS: Duration = Duration::from_secs(2);

    #[test]
    fn a_few_who_leave_say_nothing() {
        let patience = Patience::default();
        (0..MIN_LEFT - 1).for_each(|_| patience.left(TWO_SECONDS, 100));
        assert_eq!(patience.known(100), None);
        let patience = Patience::default();
        patience.left(TWO_SECONDS, 0);
        (0..100).for_each(|_| patience.answered());
        (0..20).for_each(|_| patience.left(TWO_SECONDS, 100));
        assert_eq!(patience.known(100), None, "a small share of all");
        let patience = Patience::default();
        (0..100).for_each(|_| patience.left(Duration::from_millis(150), 100));
        assert_eq!(patience.known(100), None, "they did not wait at all");
    }

    #[test]
    fn many_who_leave_show_how_long_callers_wait_until_it_no_longer_matters() {
        let patience = Patience::default();
        for step in 0..40 {
            let waited = if step % 10 == 0 { 300 } else { 2_000 + step };
            patience.left(Duration::from_millis(waited), 100);
        }
        let known = patience.known(100).unwrap();
        assert!(known >= TWO_SECONDS, "{known:?}: most waited for longer");
        patience.heeded(20_000);
        assert!(patience.known(20_000 + KEEP_MS - 1).is_some());
        assert_eq!(patience.known(20_000 + KEEP_MS), None);
        assert_eq!(patience.known(20_001), None, "forgotten is forgotten");
    }

    #[test]
    fn departures_of_long_ago_do_not_add_up() {
        let patience = Patience::default();
        for second in 0..100 {
            patience.left(TWO_SECONDS, second * WINDOW_MS);
        }
        assert_eq!(patience.known(100 * WINDOW_MS), None);
        assert!(patience.window.lock().unwrap().ages_ms.len() <= AGES);
    }
}
