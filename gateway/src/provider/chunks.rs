//! Writes the chunks of a chat completion, whole events each. Pure.

use serde_json::json;

use super::chat::{Answer, Choice, Delta, Logprobs, Usage};
use crate::openai::DONE;

/// What all chunks of one stream repeat.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    pub(super) id: String,
    pub(super) model: String,
    /// In seconds since 1970.
    pub(super) created: u64,
}

impl Chunks {
    /// A part of choice `index`.
    pub(super) fn say(&self, index: u32, delta: Delta<'_>, out: &mut Vec<u8>) {
        self.choice(index, delta, None, None, out);
    }

    /// The end of choice `index`.
    pub(super) fn finish(&self, index: u32, reason: &'static str, out: &mut Vec<u8>) {
        self.choice(index, Delta::default(), None, Some(reason), out);
    }

    /// Everything that a chunk may say of choice `index`.
    pub(super) fn choice(
        &self,
        index: u32,
        delta: Delta<'_>,
        logprobs: Option<Logprobs<'_>>,
        finish_reason: Option<&'static str>,
        out: &mut Vec<u8>,
    ) {
        let choice = Choice {
            index,
            message: None,
            delta: Some(delta),
            logprobs,
            finish_reason,
        };
        self.write(vec![choice], None, out);
    }

    /// The chunk that counts.
    pub(super) fn usage(&self, usage: Usage, out: &mut Vec<u8>) {
        self.write(Vec::new(), Some(usage), out);
    }

    fn write(&self, choices: Vec<Choice<'_>>, usage: Option<Usage>, out: &mut Vec<u8>) {
        let chunk = Answer {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model,
            choices,
            usage,
        };
        out.extend_from_slice(b"data: ");
        // Writing to memory what consists of texts and numbers cannot fail.
        let _ = serde_json::to_writer(&mut *out, &chunk);
        out.extend_from_slice(b"\n\n");
    }
}

/// The mark of a stream's proper end.
pub(super) fn done(out: &mut Vec<u8>) {
    out.extend_from_slice(DONE);
}

/// The backend gave up.
pub(super) fn error(kind: &str, message: &str, out: &mut Vec<u8>) {
    let error = json!({"error": {"message": message, "type": kind, "param": null, "code": null}});
    out.extend_from_slice(format!("data: {error}\n\n").as_bytes());
}
