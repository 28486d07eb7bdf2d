//! `Broken`: the closed list of reasons for which an answer that has begun cannot be finished. Each has one label, and
//! one event in the protocol of the stream. Pure.

use serde_json::{Value, json};

use super::anthropic_error;
use super::shape::SERVER;
use crate::openai::Wire;

/// Why an answer that has begun cannot be finished; becomes the event that ends its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The connection to the backend ended early, or the stream ended without `[DONE]`.
    Cut,
    /// The backend said `finish_reason: abort`.
    Aborted,
    /// The backend sent an error of its own, which is kept from the caller.
    Failed,
    /// The backend stopped sending.
    Stalled,
    /// The backend sent an event beyond all bounds.
    Malformed,
    /// The rule's limit for the whole request.
    Deadline,
    /// Its caller left and did not come back in time.
    Abandoned,
    /// The gateway drained, and the time for that is over.
    Stopping,
}

impl Broken {
    /// The value of the `outcome` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Aborted => "aborted",
            // As where the caller gets the backend's own event.
            Self::Failed => "upstream_error",
            Self::Stalled => "stalled",
            Self::Malformed => "malformed",
            Self::Deadline => "deadline",
            Self::Abandoned => "abandoned",
            Self::Stopping => "stopping",
        }
    }

    /// The event, as the caller's stream has it. `inside` says that part of another event went out before, which must
    /// be closed first.
    pub fn event(self, wire: Wire, inside: bool) -> Vec<u8> {
        let message = match self {
            Self::Cut => "The backend broke off. The answer is incomplete.",
            Self::Aborted => "The backend stopped and aborted the answer. It is incomplete.",
            Self::Failed => "The backend failed inside the answer. It is incomplete.",
            Self::Stalled => "The backend stopped sending. The answer is incomplete.",
            Self::Malformed => {
                "The backend sent an event that cannot be read. The answer is incomplete."
            }
            Self::Deadline => {
                "The answer took longer than the rule of this model allows. It is incomplete."
            }
            Self::Abandoned => "Nobody came back for the answer in time. It is incomplete.",
            Self::Stopping => "The gateway is stopping. The answer is incomplete.",
        };
        let code = format!("stream_{}", self.label());
        let event = match wire {
            Wire::Messages => in_event(wire, &anthropic_error(500, message)),
            Wire::Chunks | Wire::Responses | Wire::Media | Wire::Plain => in_event(
                wire,
                &json!({"message": message, "type": SERVER, "param": null, "code": code}),
            ),
        };
        let start = if inside { "\n\n" } else { "" };
        format!("{start}{event}").into_bytes()
    }
}

/// The event for an error whose answer would have had this body, in the caller's protocol.
pub fn error_event(wire: Wire, body: &[u8]) -> Vec<u8> {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = match wire {
        Wire::Messages => Some(&body).filter(|body| body["type"] == "error"),
        Wire::Chunks | Wire::Responses | Wire::Media | Wire::Plain => Some(&body["error"]),
    };
    match error.filter(|error| error.is_object()) {
        Some(error) => in_event(wire, error).into_bytes(),
        // What it answers is no stream, and no error either.
        None => Broken::Malformed.event(wire, false),
    }
}

/// `error` is all of it for callers of Anthropic's protocol, the member `error` for others.
fn in_event(wire: Wire, error: &Value) -> String {
    match wire {
        Wire::Chunks | Wire::Media | Wire::Plain => {
            format!("data: {}\n\n", json!({ "error": error }))
        }
        // The official SDK raises an error only for an event with a member `error`.
        Wire::Responses => format!(
            "event: error\ndata: {}\n\n",
            json!({
                "type": "error",
                "code": error["code"],
                "message": error["message"],
                "param": error["param"],
                "error": error,
            })
        ),
        Wire::Messages => format!("event: error\ndata: {error}\n\n"),
    }
}
