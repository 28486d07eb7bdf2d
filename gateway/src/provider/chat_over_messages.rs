//! A caller's chat completion, asked of a backend that speaks Anthropic Messages. Pure.

mod answer;
mod request;
mod stream;

pub(super) use answer::answer;
pub(super) use request::request;
pub use stream::Stream;

use super::chat::Usage;
use super::messages::UsageIn;

/// `finish_reason` for a `stop_reason`.
fn finish_reason(stop_reason: &str) -> &'static str {
    match stop_reason {
        "max_tokens" | "model_context_window_exceeded" => "length",
        "tool_use" => "tool_calls",
        "refusal" => "content_filter",
        // end_turn, stop_sequence, pause_turn
        _ => "stop",
    }
}

/// Anthropic counts what its prompt cache read and wrote apart from the rest of the prompt; OpenAI counts all of it
/// as prompt.
fn usage(usage: UsageIn) -> Usage {
    let cached_tokens = usage.cache_read_input_tokens.unwrap_or(0);
    let written = usage.cache_creation_input_tokens.unwrap_or(0);
    let prompt = [usage.input_tokens.unwrap_or(0), cached_tokens, written];
    Usage::of(prompt, cached_tokens, usage.output_tokens.unwrap_or(0))
}
