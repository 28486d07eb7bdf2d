//! `Health`: what health checks have found of an endpoint. Pure: times and answers come in.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use penstock_core::config::HealthCheck;

/// One endpoint's health. It counts as well until checks say otherwise.
#[derive(Debug, Default)]
pub struct Health {
    is_down: AtomicBool,
    /// Answers in a row that say otherwise.
    against: AtomicU32,
    next_ms: AtomicU64,
}

impl Health {
    /// Whether checks found it down.
    pub fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    /// Whether it is time for a check. Then the next one is `interval_ms` later.
    pub fn is_due(&self, now_ms: u64, interval_ms: u64) -> bool {
        let is_due = now_ms >= self.next_ms.load(Ordering::Relaxed);
        if is_due {
            let next_ms = now_ms.saturating_add(interval_ms);
            self.next_ms.store(next_ms, Ordering::Relaxed);
        }
        is_due
    }

    /// Takes in a check's result; `true` if it has made another of it.
    pub fn note(&self, is_well: bool, check: &HealthCheck) -> bool {
        let is_down = self.is_down();
        if is_well != is_down {
            self.against.store(0, Ordering::Relaxed);
            return false;
        }
        let needed = if is_down {
            check.healthy_threshold
        } else {
            check.unhealthy_threshold
        };
        if self.against.fetch_add(1, Ordering::Relaxed) + 1 < needed {
            return false;
        }
        self.against.store(0, Ordering::Relaxed);
        self.is_down.store(!is_down, Ordering::Relaxed);
        true
    }

    /// Nobody checks it any more.
    pub fn forget(&self) {
        self.is_down.store(false, Ordering::Relaxed);
        self.against.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: HealthCheck = HealthCheck {
        path: String::new(),
        interval_ms: 1000,
        timeout_ms: 500,
        unhealthy_threshold: 3,
        healthy_threshold: 2,
    };

    #[test]
    fn only_answers_in_a_row_count() {
        let health = Health::default();
        let results = [
            false, false, true, false, false, false, true, false, true, true,
        ];
        let down = results.map(|is_well| {
            health.note(is_well, &CHECK);
            health.is_down()
        });
        let wanted = [
            false, false, false, false, false, true, true, true, true, false,
        ];
        assert_eq!(down, wanted);
    }

    #[test]
    fn changes_are_told_once() {
        let health = Health::default();
        let changes = [false; 5].map(|is_well| health.note(is_well, &CHECK));
        assert_eq!(changes, [false, false, true, false, false]);
        health.forget();
        assert!(!health.is_down());
    }

    #[test]
    fn checks_come_at_their_interval() {
        let health = Health::default();
        assert!(health.is_due(0, 1000));
        assert!(!health.is_due(999, 1000));
        assert!(health.is_due(1000, 1000));
    }
}
