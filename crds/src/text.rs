//! Values that specs hold as text: durations such as `500ms`.

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
