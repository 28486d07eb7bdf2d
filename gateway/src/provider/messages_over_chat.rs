//! A caller's Anthropic message, or the count of its tokens, asked of a backend that speaks chat completions. Pure.

mod answer;
mod calls;
mod count;
mod request;
mod stream;

pub(super) use answer::answer;
pub(super) use count::{count, request as count_request};
pub(super) use request::request;
pub use stream::Stream;

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::chat::UsageIn;
use super::messages::Usage;

/// `stop_reason` for a `finish_reason`; `stopped_at` is the stop text that vLLM reports. Calls that `tool_choice`
/// forces end in `stop` with OpenAI and vLLM, and in `tool_use` with Anthropic.
fn stop_reason(finish_reason: &str, stopped_at: Option<&str>, has_calls: bool) -> &'static str {
    match finish_reason {
        "stop" if stopped_at.is_some() => "stop_sequence",
        "stop" if has_calls => "tool_use",
        "length" => "max_tokens",
        "tool_calls" | "function_call" => "tool_use",
        "content_filter" => "refusal",
        _ => "end_turn",
    }
}

/// The stop text, if `stop_reason` of vLLM is one; it is a number where a token stopped the answer.
fn stop_text(raw: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(raw?.get()).ok()
}

/// Anthropic counts cached tokens apart.
fn usage(usage: Option<UsageIn>) -> Usage {
    let Some(usage) = usage else {
        return Usage::default();
    };
    let details = usage.prompt_tokens_details;
    let cached = details
        .and_then(|details| details.cached_tokens)
        .unwrap_or(0);
    Usage {
        input_tokens: usage.prompt_tokens.saturating_sub(cached),
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: cached,
        output_tokens: usage.completion_tokens,
    }
}

/// Ids of messages begin with `msg_`.
fn message_id(id: &str) -> String {
    if id.starts_with("msg_") {
        id.to_owned()
    } else {
        format!("msg_{id}")
    }
}

/// What a tool call's arguments are as an object. Those that are none (a model's mistake, or an answer that was cut
/// at its limit) are kept in the form that Anthropic recommends for them.
fn input(arguments: Cow<'_, str>) -> Box<RawValue> {
    let text = match arguments.trim() {
        "" => "{}".to_owned(),
        _ => arguments.into_owned(),
    };
    match RawValue::from_string(text.clone()) {
        Ok(object) if object.get().trim_start().starts_with('{') => object,
        _ => {
            let kept = serde_json::json!({"INVALID_JSON": text}).to_string();
            RawValue::from_string(kept).unwrap_or_default()
        }
    }
}
