//! From a whole message to a whole chat completion.

use std::borrow::Cow;

use bytes::Bytes;

use super::{finish_reason, usage};
use crate::provider::chat::{Answer, AnswerMessage, Choice, FunctionCall, ToolCall};
use crate::provider::messages::AnswerIn;

/// See [`crate::provider::Way::answer`].
pub(in crate::provider) fn answer(body: &[u8], created: u64) -> Option<Bytes> {
    let message: AnswerIn<'_> = serde_json::from_slice(body).ok()?;
    let mut content: Option<Cow<'_, str>> = None;
    let mut reasoning: Option<String> = None;
    let mut tool_calls = Vec::new();
    for block in message.content {
        match block.kind.as_ref() {
            "text" => {
                let text = block.text.unwrap_or_default();
                content = Some(match content.take() {
                    None => text,
                    Some(before) => before + text,
                });
            }
            "thinking" => {
                let thought = block.thinking.unwrap_or_default();
                reasoning.get_or_insert_default().push_str(&thought);
            }
            "tool_use" => tool_calls.push(ToolCall {
                index: None,
                id: block.id,
                kind: Some("function"),
                function: FunctionCall {
                    name: block.name,
                    arguments: Cow::Borrowed(block.input.map_or("{}", |input| input.get())),
                },
                extra_content: None,
            }),
            // Blocks of tools that run at Anthropic, which no translated request can ask for.
            _ => {}
        }
    }
    let answer = Answer {
        id: &message.id,
        object: "chat.completion",
        created,
        model: &message.model,
        choices: vec![Choice {
            index: 0,
            message: Some(AnswerMessage {
                content,
                reasoning_content: reasoning,
                tool_calls,
                ..AnswerMessage::default()
            }),
            delta: None,
            logprobs: None,
            finish_reason: Some(finish_reason(message.stop_reason.as_deref().unwrap_or(""))),
        }],
        usage: Some(usage(message.usage)),
    };
    serde_json::to_vec(&answer).ok().map(Bytes::from)
}
