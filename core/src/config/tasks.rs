//! What requests are about, told by examples.

use serde::{Deserialize, Serialize};

/// The tasks that a policy's rules tell apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Tasks {
    /// The embedding model. The gateway's own rules say who answers for it.
    pub model: String,
    /// A text that is less similar than this to every example belongs to no task; cosine, in thousandths.
    pub min_similarity_thousandths: u32,
    /// How long a request waits for its task, in ms.
    pub timeout_ms: u64,
    /// By name.
    pub tasks: Vec<Task>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// What rules call it.
    pub name: String,
    /// What users write who want it.
    pub examples: Vec<String>,
}
