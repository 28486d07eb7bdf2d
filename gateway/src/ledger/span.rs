//! The time that a limit is for, as it is said, and which window that is at a moment. Pure.

use jiff::civil::{Date, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use penstock_core::config::{self, Period};

use super::spent::Window;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Span {
    /// What is under way, and nothing that is over.
    Held,
    /// So long back from any moment, in ms.
    Sliding {
        /// Its length, at least 1.
        ms: u64,
    },
    /// From one midnight to another.
    Calendar {
        /// How many days.
        period: Period,
        /// Whose midnight.
        zone: TimeZone,
    },
}

impl Span {
    /// That of a config's limit. A zone that is not known here is taken to be UTC's.
    pub fn of(window: Option<&config::Window>) -> Self {
        match window {
            None => Self::Held,
            Some(config::Window::SlidingMs(ms)) => Self::Sliding { ms: (*ms).max(1) },
            Some(config::Window::Calendar { period, time_zone }) => Self::Calendar {
                period: *period,
                zone: TimeZone::get(time_zone).unwrap_or(TimeZone::UTC),
            },
        }
    }

    /// The window at `now_ms`, in Unix ms.
    pub fn window(&self, now_ms: u64) -> Window {
        match self {
            Self::Held => Window::Held,
            Self::Sliding { ms } => Window::Sliding { ms: *ms },
            // Beyond the years that calendars know there is one period, which does not end.
            Self::Calendar { period, zone } => {
                bounds(*period, zone, now_ms).unwrap_or(Window::Fixed {
                    starts_ms: 0,
                    ends_ms: u64::MAX,
                })
            }
        }
    }
}

fn bounds(period: Period, zone: &TimeZone, now_ms: u64) -> Option<Window> {
    let now = Timestamp::from_millisecond(i64::try_from(now_ms).ok()?).ok()?;
    let today = zone.to_datetime(now).date();
    let (first, next) = match period {
        Period::Day => (today, today.checked_add(1.day()).ok()?),
        Period::Week => {
            let first = monday(today)?;
            (first, first.checked_add(7.days()).ok()?)
        }
        Period::Month => {
            let first = today.first_of_month();
            (first, first.checked_add(1.month()).ok()?)
        }
    };
    Some(Window::Fixed {
        starts_ms: midnight(first, zone)?,
        ends_ms: midnight(next, zone)?,
    })
}

fn monday(day: Date) -> Option<Date> {
    let since = day.weekday().since(Weekday::Monday);
    day.checked_sub(i64::from(since).days()).ok()
}

/// The first moment of a day: where clocks are put forward at midnight, a later one.
fn midnight(day: Date, zone: &TimeZone) -> Option<u64> {
    let moment = zone
        .to_ambiguous_zoned(day.at(0, 0, 0, 0))
        .compatible()
        .ok()?;
    u64::try_from(moment.timestamp().as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(text: &str) -> u64 {
        let time: Timestamp = text.parse().unwrap();
        u64::try_from(time.as_millisecond()).unwrap()
    }

    fn calendar(period: Period, zone: &str) -> Span {
        let time_zone = zone.to_owned();
        Span::of(Some(&config::Window::Calendar { period, time_zone }))
    }

    fn window(period: Period, zone: &str, at: &str) -> (u64, u64) {
        match calendar(period, zone).window(ms(at)) {
            Window::Fixed { starts_ms, ends_ms } => (starts_ms, ends_ms),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn periods_begin_at_the_midnight_of_their_zone() {
        for (period, zone, at, starts, ends) in [
            (
                Period::Day,
                "UTC",
                "2026-11-23T00:00:00Z",
                "2026-11-23T00:00:00Z",
                "2026-11-24T00:00:00Z",
            ),
            (
                Period::Day,
                "UTC",
                "2026-11-22T23:59:59.999Z",
                "2026-11-22T00:00:00Z",
                "2026-11-23T00:00:00Z",
            ),
            (
                Period::Day,
                "Asia/Kolkata",
                "2026-11-23T00:00:00Z",
                "2026-11-22T18:30:00Z",
                "2026-11-23T18:30:00Z",
            ),
            // Monday; the last Sunday of October has 25 hours in Berlin.
            (
                Period::Week,
                "UTC",
                "2026-11-22T12:00:00Z",
                "2026-11-16T00:00:00Z",
                "2026-11-23T00:00:00Z",
            ),
            (
                Period::Week,
                "Europe/Berlin",
                "2026-10-25T12:00:00Z",
                "2026-10-18T22:00:00Z",
                "2026-10-25T23:00:00Z",
            ),
            (
                Period::Month,
                "Europe/Berlin",
                "2026-10-31T22:59:59Z",
                "2026-09-30T22:00:00Z",
                "2026-10-31T23:00:00Z",
            ),
            (
                Period::Month,
                "UTC",
                "2028-02-29T12:00:00Z",
                "2028-02-01T00:00:00Z",
                "2028-03-01T00:00:00Z",
            ),
            // There, clocks go from 23:59:59 to 1:00 on the first Sunday of September.
            (
                Period::Day,
                "America/Santiago",
                "2026-09-06T12:00:00Z",
                "2026-09-06T04:00:00Z",
                "2026-09-07T03:00:00Z",
            ),
        ] {
            let found = window(period, zone, at);
            assert_eq!(found, (ms(starts), ms(ends)), "{period:?} {zone} {at}");
        }
    }

    proptest! {
        #[test]
        fn every_moment_is_in_its_window_and_windows_follow_each_other(
            // The first windows begin before 1970.
            now_ms in 40 * 86_400_000_u64..4_102_444_800_000,
            period in prop::sample::select(vec![Period::Day, Period::Week, Period::Month]),
            zone in prop::sample::select(vec!["UTC", "Europe/Berlin", "America/Sao_Paulo", "Pacific/Apia"]),
        ) {
            let span = calendar(period, zone);
            let Window::Fixed { starts_ms, ends_ms } = span.window(now_ms) else { unreachable!() };
            prop_assert!(starts_ms <= now_ms && now_ms < ends_ms);
            let Window::Fixed { starts_ms: next, .. } = span.window(ends_ms) else { unreachable!() };
            prop_assert_eq!(next, ends_ms);
        }
    }
}
