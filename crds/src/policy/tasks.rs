//! What requests are about, told by examples.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::{DecimalText, DurationText};

/// What users want who write texts like the examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskSpec {
    /// What `match.task` calls it.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,
    /// What users write who want it, in their own words. Ten different ones say more than two.
    #[schemars(length(min = 1, max = 32), inner(length(min = 1, max = 1024)))]
    pub examples: Vec<String>,
}

/// How texts are compared with the examples of tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskEmbeddingSpec {
    /// An embedding model that a rule of this gateway takes.
    #[schemars(length(min = 1, max = 256))]
    pub model: String,
    /// The cosine similarity, from `"0"` to `"1"`, that a text must have to an example to belong to its task. What
    /// suits differs between models: `penstock explain` shows similarities. Default `"0.5"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_similarity: Option<DecimalText>,
    /// How long a request waits for its task, `10ms` to `5s`; then it belongs to none. Default `200ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationText>,
}
