//! When a failed attempt is followed by another one.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::is_default;

/// When a failed attempt is followed by another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Retry {
    /// Attempts in all, the first one included, 1..=10.
    pub attempts: u32,
    /// What is followed by another attempt.
    #[serde(skip_serializing_if = "is_usual", default = "usual_failures")]
    pub on: BTreeSet<FailureClass>,
    /// Which requests to [`Protocol::Http`] may be sent again once they went upstream.
    #[serde(skip_serializing_if = "is_default", default)]
    pub repeat: Repeat,
    /// A stream that is cut is continued by another endpoint of its backend, where
    /// [`Capabilities::continue_final_message`] says that its engine can.
    #[serde(skip_serializing_if = "is_default", default)]
    pub rescue_streams: bool,
}

/// Which requests may be sent again once they, or part of them, went upstream: those that do no harm when they are
/// carried out twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Repeat {
    /// GET, HEAD, OPTIONS and TRACE (RFC 9110, 9.2.1).
    #[default]
    Safe,
    /// Also those with an `Idempotency-Key`.
    Keyed,
    /// All.
    Always,
}

/// Why an attempt gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FailureClass {
    /// No connection, or one that ended before the answer began.
    Connection,
    /// No connection or no first token in time.
    Timeout,
    /// Status 429.
    RateLimit,
    /// Status 5xx, an answer that begins with an error, or a refusal that is the backend's own fault: 401 to 404, 408.
    ServerError,
    /// A refusal because the request is longer than the model can take.
    ContextLength,
    /// A refusal because of what the request says.
    ContentPolicy,
}

/// What says nothing about the request itself.
pub fn usual_failures() -> BTreeSet<FailureClass> {
    use FailureClass::{Connection, RateLimit, ServerError, Timeout};
    BTreeSet::from([Connection, Timeout, RateLimit, ServerError])
}

fn is_usual(on: &BTreeSet<FailureClass>) -> bool {
    *on == usual_failures()
}
