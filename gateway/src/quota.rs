//! What is left of a provider's limits, as it says with each answer. Pure: headers and times come in.
//!
//! OpenAI: `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, the reset as `6m0s`. Anthropic:
//! `anthropic-ratelimit-{requests,tokens,input-tokens}-{limit,remaining,reset}`, the reset in RFC 3339. Both refill
//! little by little, so what is left is taken to grow until the reset, where all of it is back. What was sent since the
//! request whose answer told of it is taken off: a burst must not find out one by one.
//!
//! Azure OpenAI says only what remains. Its limit is then the most that ever remained, and it is back after
//! [`WINDOW_MS`].

use std::time::Duration;

use http::HeaderMap;

/// Below this part of a limit requests begin to go elsewhere.
const RESERVE: f32 = 0.1;
/// Resets that are farther away are cut to this: daily limits, and wrong clocks.
const MOST: Duration = Duration::from_hours(1);
/// When all is back where an answer does not say: OpenAI and Azure count requests and tokens by the minute.
const WINDOW_MS: u64 = 60_000;

/// What is left of the limits that answers told of.
#[derive(Debug, Default)]
pub struct Quota {
    left: [Option<Left>; 2],
    /// Requests and tokens of prompts that were sent.
    sent: [u64; 2],
    /// The most that ever remained.
    most: [f32; 2],
}

/// When a request was sent, and what was sent up to and with it.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    at_ms: u64,
    sent: [u64; 2],
}

impl Mark {
    /// At `now_ms`, before anything was counted.
    pub fn at(now_ms: u64) -> Self {
        Self {
            at_ms: now_ms,
            sent: [0; 2],
        }
    }
}

/// What is left of one limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Left {
    /// As it was told; [`Quota::hear`] puts one where none was.
    limit: Option<f32>,
    remaining: f32,
    at_ms: u64,
    reset_ms: u64,
    /// What was sent before that does not count: position in [`Quota::sent`].
    sent: u64,
}

/// What a limit counts: positions in [`Quota::left`].
const REQUESTS: usize = 0;
const TOKENS: usize = 1;

/// The headers that tell of one limit.
struct Names {
    limit: &'static str,
    remaining: &'static str,
    reset: &'static str,
}

const OPENAI: [Names; 2] = [
    Names {
        limit: "x-ratelimit-limit-requests",
        remaining: "x-ratelimit-remaining-requests",
        reset: "x-ratelimit-reset-requests",
    },
    Names {
        limit: "x-ratelimit-limit-tokens",
        remaining: "x-ratelimit-remaining-tokens",
        reset: "x-ratelimit-reset-tokens",
    },
];
const ANTHROPIC_REQUESTS: Names = Names {
    limit: "anthropic-ratelimit-requests-limit",
    remaining: "anthropic-ratelimit-requests-remaining",
    reset: "anthropic-ratelimit-requests-reset",
};
/// Of two limits of tokens the one that leaves less counts.
const ANTHROPIC_TOKENS: [Names; 2] = [
    Names {
        limit: "anthropic-ratelimit-tokens-limit",
        remaining: "anthropic-ratelimit-tokens-remaining",
        reset: "anthropic-ratelimit-tokens-reset",
    },
    Names {
        limit: "anthropic-ratelimit-input-tokens-limit",
        remaining: "anthropic-ratelimit-input-tokens-remaining",
        reset: "anthropic-ratelimit-input-tokens-reset",
    },
];

impl Quota {
    /// A request of `tokens` is sent.
    pub fn send(&mut self, tokens: u32, now_ms: u64) -> Mark {
        for (sent, more) in self.sent.iter_mut().zip([1, u64::from(tokens)]) {
            *sent = sent.saturating_add(more);
        }
        Mark {
            at_ms: now_ms,
            sent: self.sent,
        }
    }

    /// Takes in what an answer says, see [`read`]. That of a request which was sent earlier than the one that told last
    /// is old.
    pub fn hear(&mut self, found: [Option<Left>; 2]) {
        let all = self.left.iter_mut().zip(self.sent).zip(&mut self.most);
        for (((left, sent), most), found) in all.zip(found) {
            let Some(found) = found else { continue };
            *most = most.max(found.remaining);
            // What was sent may have been forgotten meanwhile.
            let found = found.at_most(sent);
            if left.is_none_or(|left| found.sent >= left.sent) {
                *left = Some(Left {
                    limit: found.limit.or(Some(*most)),
                    ..found
                });
            }
        }
    }

    /// Which part of its requests it can still take, 0 to 1: 1 while more than [`RESERVE`] is left, then less in
    /// proportion, and 0 for a request of `tokens` that is more than what is left.
    pub fn share(&self, now_ms: u64, tokens: u32) -> f32 {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let needed = [1.0, tokens as f32];
        let limits = self.left.iter().zip(self.sent).zip(needed);
        let shares = limits
            .filter_map(|((left, sent), needed)| left.map(|left| left.share(now_ms, sent, needed)));
        shares.fold(1.0, f32::min)
    }
}

impl Left {
    fn at_most(self, sent: u64) -> Self {
        Self {
            sent: self.sent.min(sent),
            ..self
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "times within an hour, an estimate"
    )]
    fn share(self, now_ms: u64, sent: u64, needed: f32) -> f32 {
        let whole = self.reset_ms.saturating_sub(self.at_ms) as f32;
        let passed = now_ms.saturating_sub(self.at_ms) as f32;
        if passed >= whole {
            return 1.0;
        }
        let since = sent.saturating_sub(self.sent) as f32;
        let limit = self.limit();
        let remaining = self.remaining + (limit - self.remaining) * passed / whole - since;
        if remaining < needed.min(limit) {
            return 0.0;
        }
        (remaining / (RESERVE * limit)).clamp(0.0, 1.0)
    }
}

/// What the headers of an answer say of requests and of tokens, at `now_ms` of the process and `since_epoch`, for a
/// request that was sent at `mark`: they tell how it was when that one was let in, however long its answer took.
pub fn read(
    headers: &HeaderMap,
    mark: Mark,
    now_ms: u64,
    since_epoch: Duration,
) -> [Option<Left>; 2] {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let number = |name: &str| {
        let number: f32 = text(name)?.parse().ok()?;
        Some(number).filter(|number| number.is_finite() && *number >= 0.0)
    };
    let after = |from_ms: u64, wait: Duration| {
        let wait_ms = u64::try_from(wait.min(MOST).as_millis()).ok()?;
        Some(from_ms.saturating_add(wait_ms))
    };
    let left = |kind: usize, names: &Names, reset_ms: &dyn Fn(&str) -> Option<u64>| {
        Some(Left {
            remaining: number(names.remaining)?,
            limit: number(names.limit),
            at_ms: mark.at_ms,
            reset_ms: text(names.reset)
                .and_then(reset_ms)
                .unwrap_or_else(|| mark.at_ms.saturating_add(WINDOW_MS)),
            sent: mark.sent[kind],
        })
    };
    let openai = |kind: usize| {
        let reset_ms = |text: &str| after(mark.at_ms, until(text)?);
        left(kind, &OPENAI[kind], &reset_ms)
    };
    let anthropic = |kind: usize, names: &Names| {
        let reset_ms = |text: &str| after(now_ms, rfc_3339(text)?.saturating_sub(since_epoch));
        left(kind, names, &reset_ms)
    };
    let mut found = [None, None];
    found[REQUESTS] = openai(REQUESTS).or_else(|| anthropic(REQUESTS, &ANTHROPIC_REQUESTS));
    found[TOKENS] = openai(TOKENS).or_else(|| {
        let tokens = ANTHROPIC_TOKENS.iter();
        let tokens = tokens.filter_map(|names| anthropic(TOKENS, names));
        tokens.min_by(|a, b| a.part().total_cmp(&b.part()))
    });
    found
}

impl Left {
    /// Never less than remains, nor than one.
    fn limit(self) -> f32 {
        self.limit.unwrap_or(0.0).max(self.remaining).max(1.0)
    }

    fn part(self) -> f32 {
        self.remaining / self.limit()
    }
}

/// A time from now as Go writes durations (`6m0s`, `1.5s`, `20ms`, `1h2m3s`), or in bare seconds.
fn until(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, behind) = rest.split_at(end);
        let number: f64 = number.parse().ok()?;
        let unit = behind.find(|c: char| c.is_ascii_digit());
        let (unit, behind) = behind.split_at(unit.unwrap_or(behind.len()));
        total += number
            * match unit {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3_600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = behind;
    }
    Some(Duration::try_from_secs_f64(total).ok()).filter(|_| !text.is_empty())?
}

/// A moment in UTC as RFC 3339 writes it (`2026-01-02T03:04:05Z`, with or without parts of seconds), since 1970.
fn rfc_3339(text: &str) -> Option<Duration> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let numbers = |text: &str, mark: char| -> Option<[u64; 3]> {
        let numbers: Option<Vec<u64>> = text.split(mark).map(|part| part.parse().ok()).collect();
        numbers?.try_into().ok()
    };
    let [year, month, day] = numbers(date, '-')?;
    let whole = time.split('.').next().unwrap_or(time);
    let [hour, minute, second] = numbers(whole, ':')?;
    let is_date =
        (1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !is_date || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days from the civil calendar with years that begin in March (Hinnant, *chrono-Compatible Low-Level Date
    // Algorithms*, 2013).
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let (era, of_era) = (year / 400, year % 400);
    let of_year = (153 * month + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    let days = days.checked_sub(719_468)?;
    Some(Duration::from_secs(
        days * 86_400 + hour * 3_600 + minute * 60 + second,
    ))
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let value = HeaderValue::from_str(value).unwrap();
            (HeaderName::from_static(name), value)
        });
        pairs.collect()
    }

    fn heard(pairs: &[(&'static str, &str)]) -> Quota {
        let mut quota = Quota::default();
        let since_epoch = Duration::from_hours(490_896);
        let mark = quota.send(0, 1_000);
        quota.hear(read(&headers(pairs), mark, 1_000, since_epoch));
        quota
    }

    #[test]
    fn resets_are_read_as_providers_write_them() {
        let ms = |text| until(text).map(|wait| wait.as_millis());
        for (text, expected) in [
            ("6m0s", 360_000),
            ("1s", 1_000),
            ("20ms", 20),
            ("1h2m3.5s", 3_723_500),
            ("0.5", 500),
            ("60", 60_000),
        ] {
            assert_eq!(ms(text), Some(expected), "{text}");
        }
        for text in ["", "m", "5x", "-1", "1s2", "NaN"] {
            assert_eq!(ms(text), None, "{text}");
        }
    }

    #[test]
    fn moments_are_read_as_http_dates_say_the_same() {
        for (text, same) in [
            ("2026-01-01T00:00:00Z", "Thu, 01 Jan 2026 00:00:00 GMT"),
            ("2024-02-29T23:59:58.25Z", "Thu, 29 Feb 2024 23:59:58 GMT"),
            ("1970-01-01T00:00:01Z", "Thu, 01 Jan 1970 00:00:01 GMT"),
            ("2100-03-01T12:00:00Z", "Mon, 01 Mar 2100 12:00:00 GMT"),
        ] {
            let same = httpdate::parse_http_date(same).unwrap();
            let same = same
                .duration_since(std::time::SystemTime::UNIX_EPOCH)
                .unwrap();
            assert_eq!(rfc_3339(text), Some(same), "{text}");
        }
        for text in [
            "",
            "2026-01-01",
            "2026-13-01T00:00:00Z",
            "2026-01-01T00:00:00+01:00",
        ] {
            assert_eq!(rfc_3339(text), None, "{text}");
        }
    }

    #[test]
    fn the_share_falls_as_the_limit_nears_and_comes_back_until_the_reset() {
        let quota = heard(&[
            ("x-ratelimit-limit-requests", "100"),
            ("x-ratelimit-remaining-requests", "2"),
            ("x-ratelimit-reset-requests", "1m0s"),
        ]);
        let share = |ms| quota.share(ms, 0);
        assert!((share(1_000) - 0.2).abs() < 0.01);
        assert!(share(3_000) > 0.4 && share(3_000) < 0.7);
        assert!((share(61_000) - 1.0).abs() < f32::EPSILON);
        assert!((Quota::default().share(0, 0) - 1.0).abs() < f32::EPSILON);
    }

    #[test]
    fn what_was_sent_since_is_taken_off_until_it_is_told_of() {
        let said = |remaining: &str| {
            headers(&[
                ("x-ratelimit-limit-requests", "20"),
                ("x-ratelimit-remaining-requests", remaining),
                ("x-ratelimit-reset-requests", "60m"),
                ("x-ratelimit-limit-tokens", "1000"),
                ("x-ratelimit-remaining-tokens", "500"),
                ("x-ratelimit-reset-tokens", "60m"),
            ])
        };
        let mut quota = Quota::default();
        let told = |quota: &mut Quota, mark: Mark, remaining: &str| {
            quota.hear(read(&said(remaining), mark, 0, Duration::ZERO));
        };
        let first = quota.send(10, 0);
        told(&mut quota, first, "5");
        let marks: Vec<Mark> = (0..5).map(|_| quota.send(10, 0)).collect();
        assert!(quota.share(0, 10) <= 0.0, "all five are under way");
        told(&mut quota, marks[2], "2");
        told(&mut quota, marks[4], "4");
        assert!(quota.share(0, 10) > 0.9);
        told(&mut quota, marks[3], "0");
        assert!(quota.share(0, 10) > 0.9, "older than what is known");
        quota.send(450, 0);
        assert!(quota.share(0, 60) <= 0.0, "tokens are counted too");
    }

    #[test]
    fn who_says_only_what_remains_has_the_most_of_it_as_limit_and_a_minute_to_get_it_back() {
        let mut quota = Quota::default();
        let mut told = |requests: &str, tokens: &str, now_ms: u64| {
            let headers = headers(&[
                ("x-ratelimit-remaining-requests", requests),
                ("x-ratelimit-remaining-tokens", tokens),
            ]);
            let mark = quota.send(100, now_ms);
            quota.hear(read(&headers, mark, now_ms, Duration::ZERO));
            [0, 30_000, 60_000].map(|later| quota.share(now_ms + later, 600))
        };
        assert_eq!(told("99", "9900", 0), [1.0; 3]);
        let near = told("50", "500", 1_000);
        assert!(near[0] <= 0.0, "the prompt takes more than the 500 tokens");
        assert_eq!(near[1..], [1.0; 2]);
        let scarce = told("2", "9000", 2_000);
        assert!((scarce[0] - 2.0 / 9.9).abs() < 0.01, "of 99 requests");
        assert_eq!(told("0", "9000", 3_000), [0.0, 1.0, 1.0]);
        assert_eq!(told("90", "9000", 4_000), [1.0; 3]);
    }

    #[test]
    fn a_prompt_that_is_more_than_what_is_left_goes_elsewhere() {
        let quota = heard(&[
            ("anthropic-ratelimit-requests-limit", "50"),
            ("anthropic-ratelimit-requests-remaining", "49"),
            ("anthropic-ratelimit-requests-reset", "2026-01-01T00:00:02Z"),
            ("anthropic-ratelimit-input-tokens-limit", "30000"),
            ("anthropic-ratelimit-input-tokens-remaining", "6000"),
            (
                "anthropic-ratelimit-input-tokens-reset",
                "2026-01-01T00:01:00Z",
            ),
            ("anthropic-ratelimit-tokens-limit", "80000"),
            ("anthropic-ratelimit-tokens-remaining", "70000"),
            ("anthropic-ratelimit-tokens-reset", "2026-01-01T00:01:00Z"),
        ]);
        assert!((quota.share(1_000, 500) - 1.0).abs() < f32::EPSILON);
        assert!(quota.share(1_000, 9_000) <= 0.0);
        assert!(quota.share(20_000, 9_000) > 0.9, "some came back");
    }

    proptest! {
        #[test]
        fn shares_are_parts_and_more_left_is_never_less(
            limit in 1_u32..10_000,
            remaining in 0_u32..10_000,
            tokens in 0_u32..10_000,
            after in 0_u64..200_000,
        ) {
            let of = |remaining: u32| heard(&[
                ("x-ratelimit-limit-tokens", &limit.to_string()),
                ("x-ratelimit-remaining-tokens", &remaining.to_string()),
                ("x-ratelimit-reset-tokens", "90s"),
            ]).share(1_000 + after, tokens);
            let share = of(remaining);
            prop_assert!((0.0..=1.0).contains(&share));
            prop_assert!(of(remaining + 1) >= share - 1e-6 || remaining + 1 > limit);
        }

        #[test]
        fn any_text_is_read_or_not_without_a_panic(text in "[0-9a-zTZ:.+-]{0,24}") {
            let _ = (until(&text), rfc_3339(&text));
        }
    }
}
