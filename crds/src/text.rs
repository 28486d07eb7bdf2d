//! Values that specs hold as text: durations such as `500ms`.

use std::borrow::Cow;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A duration as people write it: `0s`, or a whole number above 0 and `ms`, `s`, `m` or `h`, such as `500ms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DurationText(pub String);

/// What the API server checks; [`DurationText::parse`] accepts exactly these texts.
const PATTERN: &str = "^(0s|[1-9][0-9]{0,7}(ms|s|m|h))$";

impl JsonSchema for DurationText {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": PATTERN, "maxLength": 10 })
    }
}

impl DurationText {
    /// The duration, or what is wrong with the text.
    pub fn parse(&self) -> Result<Duration, ParseDurationError> {
        let error = || ParseDurationError {
            text: self.0.clone(),
        };
        if self.0 == "0s" {
            return Ok(Duration::ZERO);
        }
        let digits = self
            .0
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(error)?;
        let (number, unit) = self.0.split_at(digits);
        if number.len() > 8 || number.starts_with('0') {
            return Err(error());
        }
        let number: u64 = number.parse().map_err(|_| error())?;
        let ms = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(error()),
        };
        Ok(Duration::from_millis(number * ms))
    }
}

impl From<&str> for DurationText {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// Text that is not a duration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a duration: write a whole number and ms, s, m or h, such as 500ms or 10m")]
pub struct ParseDurationError {
    text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_parse_in_each_unit() {
        let parse = |text: &str| DurationText::from(text).parse().unwrap();
        assert_eq!(parse("500ms"), Duration::from_millis(500));
        assert_eq!(parse("0s"), Duration::ZERO);
        assert_eq!(parse("2s"), Duration::from_secs(2));
        assert_eq!(parse("10m"), Duration::from_mins(10));
        assert_eq!(parse("99999999h"), Duration::from_hours(99_999_999));
    }

    #[test]
    fn durations_refuse_what_the_pattern_refuses() {
        for text in [
            "",
            "0",
            "0ms",
            "00s",
            "01s",
            "5",
            "s",
            "1.5s",
            "-1s",
            "5 s",
            "5d",
            "123456789s",
            "5S",
        ] {
            assert!(DurationText::from(text).parse().is_err(), "{text}");
        }
    }
}
