//! Values that specs hold as text: durations such as `500ms`, quantities such as `16Gi` and fractions such as `0.7`.

use std::borrow::Cow;
use std::time::Duration;

use penstock_core::duration::{self, PATTERN, ParseDurationError};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A duration as people write it: `0s`, or a whole number above 0 and `ms`, `s`, `m` or `h`, such as `500ms`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DurationText(pub String);

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
        duration::parse(&self.0)
    }
}

impl From<&str> for DurationText {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// A number from 0 with up to three decimals, in quotes: `"0.7"`, `"2"`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DecimalText(pub String);

impl JsonSchema for DecimalText {
    fn schema_name() -> Cow<'static, str> {
        "Decimal".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": r"^[0-9]{1,3}(\.[0-9]{1,3})?$", "maxLength": 7 })
    }
}

impl DecimalText {
    /// In thousandths, 0..=999_999; `None` if it is no such number.
    pub fn thousandths(&self) -> Option<u32> {
        let (whole, fraction) = self.0.split_once('.').unwrap_or((&self.0, "0"));
        let digits = |text: &str| {
            (1..=3).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        if !digits(whole) || !digits(fraction) {
            return None;
        }
        format!("{whole}{fraction:0<3}").parse().ok()
    }
}

/// An amount of a resource, as Kubernetes writes it: `4`, `0.5`, `500m`, `16Gi`. A whole number needs no quotes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "IntOrString")]
pub struct QuantityText(pub String);

impl QuantityText {
    /// Kubernetes' form without sign and exponent.
    const PATTERN: &'static str = r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[numkMGTPE])?$";
    const MAX_LENGTH: usize = 32;
    const SUFFIXES: [&'static str; 16] = [
        "", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
    ];

    /// Whether it is one.
    pub fn is_valid(&self) -> bool {
        let end = self.0.find(|c: char| c.is_ascii_alphabetic());
        let (number, suffix) = self.0.split_at(end.unwrap_or(self.0.len()));
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let fits = self.0.len() <= Self::MAX_LENGTH;
        fits && digits(whole) && digits(fraction) && Self::SUFFIXES.contains(&suffix)
    }
}

/// `x-kubernetes-int-or-string`, with Kubernetes' own range of integers.
#[derive(Deserialize)]
#[serde(untagged)]
enum IntOrString {
    Int(i64),
    String(String),
}

impl From<IntOrString> for QuantityText {
    fn from(value: IntOrString) -> Self {
        Self(match value {
            IntOrString::Int(number) => number.to_string(),
            IntOrString::String(text) => text,
        })
    }
}

impl JsonSchema for QuantityText {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "x-kubernetes-int-or-string": true, "pattern": Self::PATTERN, "maxLength": Self::MAX_LENGTH })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantity_is_a_whole_number_or_text() {
        let read = |json: &str| serde_json::from_str::<QuantityText>(json).unwrap().0;
        assert_eq!(read("34359738368"), "34359738368");
        assert_eq!(read("\"16Gi\""), "16Gi");
    }

    #[test]
    fn quantities_are_told_from_other_text() {
        for text in ["4", "0.5", "500m", "16Gi", "2Ei", "3k"] {
            assert!(QuantityText(text.into()).is_valid(), "{text}");
        }
        for text in [
            "",
            "lots",
            "-1",
            "1.",
            ".5",
            "16GB",
            "1e3",
            "1 Gi",
            "Gi",
            &"1".repeat(33),
        ] {
            assert!(!QuantityText(text.into()).is_valid(), "{text}");
        }
    }
}
