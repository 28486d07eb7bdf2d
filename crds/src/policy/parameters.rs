//! What a rule says about parameters of a request.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::DecimalText;

/// Bounds of what callers may ask of a model, and what counts where they say nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ParametersSpec {
    /// Tokens of an answer: `max_tokens`, `max_completion_tokens` or `max_output_tokens`, whichever the protocol has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<TokenLimitSpec>,
    /// `temperature`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<DecimalLimitSpec>,
    /// `top_p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<DecimalLimitSpec>,
    /// How many answers are made of one prompt: `n`, and `best_of` of text completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<ChoiceLimitSpec>,
    /// What becomes of a value beyond its bound. Default `Clamp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_exceed: Option<OnExceedSpec>,
}

/// Limits of an answer's length, in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenLimitSpec {
    /// Where a request says nothing. Default: `max`; for text completions the 16 that their protocol has, if `max` is
    /// not below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub default: Option<i32>,
    /// At most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max: Option<i32>,
}

/// Limits of a number that may have a fraction.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DecimalLimitSpec {
    /// Where a request says nothing. Default: the backend's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<DecimalText>,
    /// At least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<DecimalText>,
    /// At most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<DecimalText>,
}

/// Limits of the number of answers to one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChoiceLimitSpec {
    /// At most.
    #[schemars(range(min = 1, max = 1024))]
    pub max: i32,
}

/// What becomes of a value beyond its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnExceedSpec {
    /// The bound takes its place.
    Clamp,
    /// The request is refused with status 400, which names the parameter and the bound.
    Refuse,
}
