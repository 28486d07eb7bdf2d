//! The count of a message's tokens, asked of an engine as vLLM has it: `POST /tokenize` with the conversation of a chat
//! completion. It counts a picture as its mark in the prompt (<https://github.com/vllm-project/vllm/issues/16191>), so
//! only text is carried.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::request::{Draft, Takes};
use crate::provider::chat::{Message, Tool};
use crate::provider::fields::Fields;
use crate::provider::{Misfit, Rest, Translated, with_model};

/// What an engine is asked, less `model`.
#[derive(Serialize)]
struct Request<'a> {
    messages: Vec<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<Vec<Tool<'a>>>,
    /// As for an answer.
    add_generation_prompt: bool,
}

/// From the body of a count to that of `/tokenize`.
pub(in crate::provider) fn request(body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
    let fields = Fields::of(body)?;
    let (model, chat) = Draft::of(&fields, rest, Takes::Text)?.finish()?;
    let request = Request {
        messages: chat.messages,
        tools: chat.tools,
        add_generation_prompt: true,
    };
    with_model(&model, &request, false)
}

/// From what an engine counted to the answer to a count.
pub(in crate::provider) fn count(body: &[u8]) -> Option<Bytes> {
    #[derive(Deserialize)]
    struct Counted {
        count: u64,
    }
    let Counted { count } = serde_json::from_slice(body).ok()?;
    Some(Bytes::from(format!("{{\"input_tokens\":{count}}}")))
}
