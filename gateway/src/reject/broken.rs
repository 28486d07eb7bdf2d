//! `Broken`: the closed list of reasons for which an answer that has begun cannot be finished. Each has one label, and
//! one event in the protocol of the stream. Pure.

use serde_json::json;

use super::{SERVER, anthropic_error};
use crate::openai::Wire;

/// Why an answer that has begun cannot be finished; becomes the event that ends its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The connection to the backend ended early, or the stream ended without `[DONE]`.
    Cut,
    /// The backend said `finish_reason: abort`.
    Aborted,
    /// The backend stopped sending.
    Stalled,
    /// The backend sent an event beyond all bounds.
    Malformed,
    /// The rule's limit for the whole request.
    Deadline,
}

impl Broken {
    /// The value of the `outcome` label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Aborted => "aborted",
            Self::Stalled => "stalled",
            Self::Malformed => "malformed",
            Self::Deadline => "deadline",
        }
    }

    /// The event, as the caller's stream has it. `inside` says that part of another event went out before, which must
    /// be closed first.
    pub fn event(self, wire: Wire, inside: bool) -> Vec<u8> {
        let message = match self {
            Self::Cut => "The backend broke off. The answer is incomplete.",
            Self::Aborted => "The backend stopped and aborted the answer. It is incomplete.",
            Self::Stalled => "The backend stopped sending. The answer is incomplete.",
            Self::Malformed => {
                "The backend sent an event that cannot be read. The answer is incomplete."
            }
            Self::Deadline => {
                "The answer took longer than the rule of this model allows. It is incomplete."
            }
        };
        let code = format!("stream_{}", self.label());
        let error = json!({"message": message, "type": SERVER, "param": null, "code": code});
        let event = match wire {
            Wire::Chunks | Wire::Plain => format!("data: {}", json!({ "error": error })),
            // The official SDK raises an error only for an event with a member `error`.
            Wire::Responses => format!(
                "event: error\ndata: {}",
                json!({"type": "error", "code": code, "message": message, "param": null, "error": error})
            ),
            Wire::Messages => format!("event: error\ndata: {}", anthropic_error(500, message)),
        };
        let start = if inside { "\n\n" } else { "" };
        format!("{start}{event}\n\n").into_bytes()
    }
}
