//! From a whole answer of Gemini's to a whole chat completion.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{AnswerIn, CallIn, CandidateIn, LogprobIn, LogprobsIn, call_id, finish_reason, usage};
use crate::provider::chat::{
    Answer, AnswerMessage, Choice, Extra, FunctionCall, GoogleExtra, Logprob, Logprobs, ToolCall,
};
use crate::provider::foreign::{About, shaped};

/// See [`crate::provider::foreign::Foreign::answer`].
pub(in crate::provider) fn answer(body: &[u8], about: &About<'_>) -> Option<Bytes> {
    let whole: AnswerIn<'_> = serde_json::from_slice(body).ok()?;
    let id = whole.response_id.clone().unwrap_or(Cow::Borrowed(about.id));
    let choices = if whole.is_blocked() {
        vec![choice(0, AnswerMessage::default(), None, "content_filter")]
    } else {
        let candidates = whole.candidates.into_iter();
        candidates.map(|one| candidate(&id, one)).collect()
    };
    if choices.is_empty() {
        return None;
    }
    let answer = Answer {
        id: &id,
        object: "chat.completion",
        created: about.created,
        model: whole.model_version.as_deref().unwrap_or(about.model),
        choices,
        usage: whole.usage_metadata.map(usage),
    };
    serde_json::to_vec(&answer).ok().map(Bytes::from)
}

fn choice<'a>(
    index: u32,
    message: AnswerMessage<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: &'static str,
) -> Choice<'a> {
    Choice {
        index,
        message: Some(message),
        delta: None,
        logprobs,
        finish_reason: Some(finish_reason),
    }
}

fn candidate<'a>(id: &str, candidate: CandidateIn<'a>) -> Choice<'a> {
    let mut message = AnswerMessage::default();
    for part in candidate
        .content
        .into_iter()
        .flat_map(|content| content.parts)
    {
        match part.text {
            Some(text) if part.thought => {
                message
                    .reasoning_content
                    .get_or_insert_default()
                    .push_str(&text);
            }
            Some(text) => {
                message.content = Some(match message.content.take() {
                    None => text,
                    Some(before) => before + text,
                });
            }
            None => {}
        }
        if let Some(function) = part.function_call {
            let number = message.tool_calls.len();
            let call = call(
                id,
                candidate.index,
                number,
                function,
                part.thought_signature,
            );
            message.tool_calls.push(call);
        }
    }
    let reason = candidate.finish_reason.unwrap_or_default();
    let finish_reason = finish_reason(&reason, !message.tool_calls.is_empty());
    let logprobs = candidate.logprobs_result.map(logprobs);
    choice(candidate.index, message, logprobs, finish_reason)
}

/// A call of a tool, with its signature where Google's own chat completions have it.
pub(super) fn call<'a>(
    answer: &str,
    candidate: u32,
    number: usize,
    function: CallIn<'a>,
    signature: Option<Cow<'a, str>>,
) -> ToolCall<'a> {
    let id = function.id.filter(|id| !id.is_empty());
    ToolCall {
        index: None,
        id: Some(id.unwrap_or_else(|| Cow::Owned(call_id(answer, candidate, number)))),
        kind: Some("function"),
        function: FunctionCall {
            name: Some(function.name),
            arguments: Cow::Borrowed(function.args.map_or("{}", RawValue::get)),
        },
        extra_content: signature.map(|signature| Extra {
            google: Some(GoogleExtra {
                thought_signature: Some(signature),
            }),
        }),
    }
}

pub(super) fn logprobs(result: LogprobsIn<'_>) -> Logprobs<'_> {
    let mut tops = result.top_candidates.into_iter();
    let content = result.chosen_candidates.into_iter().map(|chosen| {
        let top = tops.next().into_iter().flat_map(|top| top.candidates);
        Logprob {
            top_logprobs: Some(top.map(logprob).collect()),
            ..logprob(chosen)
        }
    });
    Logprobs {
        content: content.collect(),
        refusal: None,
    }
}

fn logprob(one: LogprobIn<'_>) -> Logprob<'_> {
    Logprob {
        bytes: one.token.as_bytes().to_vec(),
        token: one.token,
        logprob: one.log_probability,
        top_logprobs: None,
    }
}

/// A refusal in the shape of chat completions; empty if it is none.
pub(in crate::provider) fn error(body: &[u8]) -> Bytes {
    let read: Option<AnswerIn<'_>> = serde_json::from_slice(body).ok();
    let Some(error) = read.and_then(|answer| answer.error) else {
        return Bytes::new();
    };
    shaped(error.status.as_deref().unwrap_or("error"), &error.message)
}

/// When to come back, in whole seconds, which Gemini says in the body of its refusal (`RetryInfo`).
pub(in crate::provider) fn retry_after(body: &[u8]) -> Option<u64> {
    let error: Value = serde_json::from_slice(body).ok()?;
    let details = error.pointer("/error/details")?.as_array()?;
    let delay = details
        .iter()
        .find_map(|detail| detail.get("retryDelay")?.as_str())?;
    let whole = delay.strip_suffix('s')?.split('.').next()?;
    // Rounded up: a part of a second is one more.
    Some(
        whole
            .parse::<u64>()
            .ok()?
            .saturating_add(u64::from(delay.contains('.'))),
    )
}
