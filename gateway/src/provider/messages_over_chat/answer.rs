//! From a whole chat completion to a whole message.

use bytes::Bytes;

use super::{input, message_id, stop_reason, stop_text, usage};
use crate::provider::chat::AnswerIn;
use crate::provider::messages::{Answer, Block};

/// See [`crate::provider::Way::answer`].
pub(in crate::provider) fn answer(body: &[u8]) -> Option<Bytes> {
    let answer: AnswerIn<'_> = serde_json::from_slice(body).ok()?;
    let choice = answer.choices.into_iter().next()?;
    let message = choice.message?;
    let mut content = Vec::new();
    if let Some(thought) = message.thought() {
        content.push(Block::Thinking {
            thinking: thought.clone(),
            signature: "",
        });
    }
    let refuses = message.refusal.is_some();
    for text in [message.content, message.refusal].into_iter().flatten() {
        if !text.is_empty() {
            content.push(Block::Text { text });
        }
    }
    let calls = message.tool_calls.unwrap_or_default();
    let has_calls = !calls.is_empty();
    for call in calls {
        let function = call.function?;
        content.push(Block::ToolUse {
            id: call.id.unwrap_or_default(),
            name: function.name.unwrap_or_default(),
            input: input(function.arguments.unwrap_or_default()),
        });
    }
    let stopped_at = stop_text(choice.stop_reason);
    let finish_reason = choice.finish_reason.unwrap_or_default();
    let answer = Answer {
        id: message_id(&answer.id),
        kind: "message",
        role: "assistant",
        model: &answer.model,
        content,
        stop_reason: Some(if refuses {
            "refusal"
        } else {
            stop_reason(&finish_reason, stopped_at.as_deref(), has_calls)
        }),
        stop_sequence: stopped_at.map(Into::into),
        usage: usage(answer.usage),
    };
    serde_json::to_vec(&answer).ok().map(Bytes::from)
}
