//! Prompts that a policy keeps.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One version of a prompt: a system prompt, messages, or both. Texts may hold variables such as `{{name}}`, for which
/// callers give values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PromptSpec {
    /// What rules and callers call it. Several versions have the same name.
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9_-]+$"))]
    pub name: String,
    /// The greatest number is the newest version.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub version: i32,
    /// Comes before the caller's own system prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16_384))]
    pub system: Option<String>,
    /// Come before the caller's messages. Only callers can ask for prompts that have some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub messages: Vec<PromptMessageSpec>,
}

/// A message of a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PromptMessageSpec {
    /// Who says it.
    pub role: RoleSpec,
    /// What is said.
    #[schemars(length(min = 1, max = 16_384))]
    pub text: String,
}

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RoleSpec {
    /// The caller.
    User,
    /// The model.
    Assistant,
}

/// A prompt of the same policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PromptRefSpec {
    /// Its name.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Its version. Default: the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub version: Option<i32>,
}
