//! (IO) The clocks, read in one place: wall time for what leaves the process, monotonic time for durations.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time since 1970-01-01T00:00:00Z; zero if the clock is set before it.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub fn since_epoch() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// [`since_epoch`] in whole milliseconds.
pub fn unix_ms() -> u64 {
    u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
}

/// The monotonic clock, for durations and deadlines.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub fn now() -> Instant {
    Instant::now()
}
