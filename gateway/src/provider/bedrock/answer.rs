//! From a whole answer of Converse's to a whole chat completion.

use std::borrow::Cow;

use bytes::Bytes;
use http::HeaderMap;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{AnswerIn, finish_reason, usage};
use crate::provider::chat::{Answer, AnswerMessage, Choice, FunctionCall, ToolCall};
use crate::provider::foreign::{About, shaped};

/// See [`crate::provider::foreign::Foreign::answer`].
pub(in crate::provider) fn answer(body: &[u8], about: &About<'_>) -> Option<Bytes> {
    let whole: AnswerIn<'_> = serde_json::from_slice(body).ok()?;
    let mut message = AnswerMessage::default();
    for block in whole.output.message.content {
        if let Some(text) = block.text {
            message.content = Some(match message.content.take() {
                None => text,
                Some(before) => before + text,
            });
        }
        if let Some(thought) = block
            .reasoning_content
            .and_then(|block| block.reasoning_text)
        {
            let thoughts = message.reasoning_content.get_or_insert_default();
            thoughts.push_str(&thought.text);
        }
        if let Some(tool_use) = block.tool_use {
            message.tool_calls.push(ToolCall {
                index: None,
                id: Some(tool_use.tool_use_id),
                kind: Some("function"),
                function: FunctionCall {
                    name: Some(tool_use.name),
                    arguments: Cow::Borrowed(tool_use.input.map_or("{}", RawValue::get)),
                },
                extra_content: None,
            });
        }
    }
    let answer = Answer {
        id: about.id,
        object: "chat.completion",
        created: about.created,
        model: about.model,
        choices: vec![Choice {
            index: 0,
            message: Some(message),
            delta: None,
            logprobs: None,
            finish_reason: Some(finish_reason(&whole.stop_reason)),
        }],
        usage: Some(usage(whole.usage)),
    };
    serde_json::to_vec(&answer).ok().map(Bytes::from)
}

/// The words of a refusal.
#[derive(Deserialize)]
pub(super) struct Refusal<'a> {
    #[serde(borrow, default, alias = "Message")]
    pub(super) message: Option<Cow<'a, str>>,
}

/// A refusal in the shape of chat completions; empty if it is none.
pub(in crate::provider) fn error(headers: &HeaderMap, body: &[u8]) -> Bytes {
    let refusal: Option<Refusal<'_>> = serde_json::from_slice(body).ok();
    let Some(message) = refusal.and_then(|refusal| refusal.message) else {
        return Bytes::new();
    };
    let kind = headers
        .get("x-amzn-errortype")
        .and_then(|kind| kind.to_str().ok());
    // It may be followed by the address of its namespace.
    let kind = kind
        .and_then(|kind| kind.split(':').next())
        .unwrap_or("error");
    shaped(kind, &message)
}
