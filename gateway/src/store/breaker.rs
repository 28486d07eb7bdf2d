//! When a server that fails is left alone, so that requests that need it are refused at once and not after a timeout
//! each. Pure: times come in.

use std::time::{Duration, Instant};

/// Failures in a row until it is left alone: one dropped connection fails every call that was on it.
const FAILURES: u32 = 8;
/// For how long. Then one call may try.
const PAUSE: Duration = Duration::from_secs(1);

/// Failures of one server.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    until: Option<Instant>,
}

impl Breaker {
    /// Whether a call may be made at `now`. After the pause one may, and the next ones when it has succeeded.
    pub(super) fn may_pass(&mut self, now: Instant) -> bool {
        match self.until {
            Some(until) if now < until => false,
            Some(_) => {
                self.until = Some(now + PAUSE);
                true
            }
            None => true,
        }
    }

    /// A call succeeded.
    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// A call failed at `now`. Returns whether the server is left alone from now on.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        self.failures = self.failures.saturating_add(1);
        if self.failures < FAILURES {
            return false;
        }
        let opens = self.until.is_none();
        self.until = Some(now + PAUSE);
        opens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a starting point for arithmetic")]
    fn a_server_that_fails_is_asked_once_a_second() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        for call in 1..=FAILURES {
            assert!(breaker.may_pass(start));
            assert_eq!(breaker.failed(start), call == FAILURES);
        }
        assert!(!breaker.may_pass(start + PAUSE / 2));
        let later = start + PAUSE;
        assert!(breaker.may_pass(later), "one tries");
        assert!(!breaker.may_pass(later), "the others wait for it");
        assert!(!breaker.failed(later), "that it is away is known");
        breaker.succeeded();
        assert!(breaker.may_pass(later));
    }
}
