//! `fanOut` of a rule: one request, several backends at once.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::DurationText;

/// Each request goes to several of the rule's backends at once, the first ones by priority and strategy. All of them
/// compute it, and all are paid for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FanOutSpec {
    /// What the caller gets.
    pub mode: FanOutModeSpec,
    /// Backends that are asked at most. Default 8.
    #[serde(default = "eight")]
    #[schemars(range(min = 2, max = 8))]
    pub max: i32,
    /// How long answers are waited for with `mode: All`; what comes later is an error in its place. Default `60s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<DurationText>,
}

fn eight() -> i32 {
    8
}

/// What the caller of a rule with `fanOut` gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FanOutModeSpec {
    /// The answer that begins first; the others are ended.
    First,
    /// All answers in one JSON document. For answers that are not streamed.
    All,
}
