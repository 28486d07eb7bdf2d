//! Endpoints that answered 429 or 503 and asked to be left alone. Pure: times come in.
//!
//! With `Retry-After` nothing is sent there until then. Without, or when it says that the time has come, others come
//! first for a moment: one request over a limit does not mean that the next one is.

use std::time::{Duration, SystemTime};

/// Longer waits are cut to this: limits are lifted by hand, and a wrong clock must not switch a backend off.
const MOST: Duration = Duration::from_mins(1);
/// How long others come first after a 429 that does not say when to come back.
const ASIDE_MS: u64 = 1_000;

/// What an endpoint asks for.
#[derive(Debug, Default)]
pub struct Cooldown {
    closed_until_ms: u64,
    aside_until_ms: u64,
}

impl Cooldown {
    /// It asked to be left alone, for a time or without saying for how long.
    pub fn ask(&mut self, wait: Option<Duration>, now_ms: u64) {
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            let wait_ms = u64::try_from(wait.min(MOST).as_millis()).unwrap_or(u64::MAX);
            let until_ms = now_ms.saturating_add(wait_ms);
            self.closed_until_ms = self.closed_until_ms.max(until_ms);
        } else {
            let until_ms = now_ms.saturating_add(ASIDE_MS);
            self.aside_until_ms = self.aside_until_ms.max(until_ms);
        }
    }

    /// For how many ms nothing may be sent there.
    pub fn closed_ms(&self, now_ms: u64) -> u64 {
        self.closed_until_ms.saturating_sub(now_ms)
    }

    /// Whether others should come first.
    pub fn is_aside(&self, now_ms: u64) -> bool {
        self.aside_until_ms > now_ms
    }
}

/// What a `Retry-After` says (RFC 9110, 10.2.3): seconds, or a date. `None` for anything else.
pub fn retry_after(value: &str, since_epoch: Duration) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    let date = date.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(date.saturating_sub(since_epoch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_after_of_nothing_puts_aside() {
        let mut cooldown = Cooldown::default();
        cooldown.ask(Some(Duration::ZERO), 100);
        assert_eq!(cooldown.closed_ms(100), 0);
        assert!(cooldown.is_aside(100 + ASIDE_MS - 1) && !cooldown.is_aside(100 + ASIDE_MS));
    }

    #[test]
    fn a_wait_closes_and_no_wait_puts_aside() {
        let mut cooldown = Cooldown::default();
        assert!(cooldown.closed_ms(5) == 0 && !cooldown.is_aside(5));
        cooldown.ask(None, 100);
        assert!(cooldown.is_aside(100 + ASIDE_MS - 1) && !cooldown.is_aside(100 + ASIDE_MS));
        cooldown.ask(Some(Duration::from_secs(2)), 100);
        cooldown.ask(Some(Duration::from_secs(1)), 100);
        assert_eq!(cooldown.closed_ms(1_100), 1_000);
        assert_eq!(cooldown.closed_ms(2_100), 0);
        cooldown.ask(Some(Duration::from_hours(10)), 0);
        assert_eq!(cooldown.closed_ms(0), 60_000);
    }

    #[test]
    fn seconds_and_dates_are_read() {
        let now = Duration::from_secs(784_111_777);
        assert_eq!(retry_after("7", now), Some(Duration::from_secs(7)));
        let date = "Sun, 06 Nov 1994 08:49:47 GMT";
        assert_eq!(retry_after(date, now), Some(Duration::from_secs(10)));
        assert_eq!(
            retry_after(date, now + Duration::from_mins(1)),
            Some(Duration::ZERO)
        );
        for text in ["", "-1", "soon", "1.5"] {
            assert_eq!(retry_after(text, now), None, "{text}");
        }
    }
}
