//! Limits of what callers may ask of a model.

use serde::{Deserialize, Serialize};

use super::is_default;

/// Limits of what callers may ask of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Parameters {
    /// Tokens of an answer.
    #[serde(skip_serializing_if = "is_default", default)]
    pub max_output_tokens: Bounds,
    /// In thousandths.
    #[serde(skip_serializing_if = "is_default", default)]
    pub temperature: Bounds,
    /// In thousandths.
    #[serde(skip_serializing_if = "is_default", default)]
    pub top_p: Bounds,
    /// Answers to one prompt.
    #[serde(skip_serializing_if = "is_default", default)]
    pub n: Bounds,
    /// What becomes of a value beyond its bound.
    #[serde(skip_serializing_if = "is_default", default)]
    pub on_exceed: OnExceed,
}

/// Limits of one parameter; `min` <= `default` <= `max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Bounds {
    /// Where a request says nothing.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub default: Option<u32>,
    /// At least.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub min: Option<u32>,
    /// At most.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub max: Option<u32>,
}

/// What becomes of a value beyond its bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnExceed {
    /// The bound takes its place.
    #[default]
    Clamp,
    /// The request is refused.
    Refuse,
}
