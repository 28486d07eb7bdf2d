//! Durations as people write them, in specs, trigger metadata and on command lines alike: text in, [`Duration`] out.
//! One form everywhere, so that what is right in one place is right in all.

use std::time::Duration;

/// What [`parse`] accepts, as a regular expression: `0s`, or a whole number above 0 of up to 8 digits and its unit.
pub const PATTERN: &str = "^(0s|[1-9][0-9]{0,7}(ms|s|m|h))$";

/// Text that is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a duration: write a whole number and ms, s, m or h, such as 500ms or 10m")]
pub struct ParseDurationError {
    text: String,
}

/// The duration, or what is wrong with the text. At most 99,999,999 hours.
pub fn parse(text: &str) -> Result<Duration, ParseDurationError> {
    whole(text).ok_or_else(|| ParseDurationError {
        text: text.to_owned(),
    })
}

fn whole(text: &str) -> Option<Duration> {
    if text == "0s" {
        return Some(Duration::ZERO);
    }
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    if number.len() > 8 || number.starts_with('0') {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    let ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    Some(Duration::from_millis(number * ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_is_read() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("0s"), Ok(Duration::ZERO));
        assert_eq!(parse("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(parse("10m"), Ok(Duration::from_mins(10)));
        assert_eq!(parse("99999999h"), Ok(Duration::from_hours(99_999_999)));
    }

    #[test]
    fn what_the_pattern_refuses_is_refused() {
        for text in [
            "",
            "0",
            "0ms",
            "00s",
            "01s",
            "05s",
            "5",
            "s",
            "ms",
            "1.5s",
            "-1s",
            "5 s",
            "5d",
            "5S",
            "123456789s",
            "99999999999999999999s",
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{text}' is not")), "{error}");
        }
    }
}
