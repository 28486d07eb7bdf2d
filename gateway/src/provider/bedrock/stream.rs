//! From Converse's event stream to the chunks of a chat completion.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::answer::Refusal;
use super::frames::{Frames, Malformed, Message};
use super::{ToolUseIn, UsageIn, finish_reason, usage};
use crate::provider::chat::{Delta, FunctionCall, ToolCall};
use crate::provider::chunks::{self, Chunks};
use crate::provider::foreign::About;
use crate::provider::open_calls::OpenCalls;

/// One stream.
#[derive(Debug)]
pub struct Stream {
    frames: Frames,
    chunks: Chunks,
    calls: OpenCalls,
    finished: bool,
    usage: Option<UsageIn>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EventIn<'a> {
    #[serde(default)]
    content_block_index: Option<usize>,
    #[serde(borrow, default)]
    start: Option<StartIn<'a>>,
    #[serde(borrow, default)]
    delta: Option<DeltaIn<'a>>,
    #[serde(borrow, default)]
    stop_reason: Option<Cow<'a, str>>,
    #[serde(default)]
    usage: Option<UsageIn>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct StartIn<'a> {
    #[serde(borrow, default)]
    tool_use: Option<ToolUseIn<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DeltaIn<'a> {
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    tool_use: Option<ToolUseIn<'a>>,
    #[serde(borrow, default)]
    reasoning_content: Option<ThoughtIn<'a>>,
}

#[derive(Deserialize)]
struct ThoughtIn<'a> {
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
}

impl Stream {
    pub(in crate::provider) fn new(about: &About<'_>) -> Self {
        Self {
            frames: Frames::default(),
            chunks: about.chunks(),
            calls: OpenCalls::default(),
            finished: false,
            usage: None,
        }
    }

    pub(in crate::provider) fn feed(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Malformed> {
        let mut frames = std::mem::take(&mut self.frames);
        let fed = frames.feed(bytes, |message| self.message(message, out));
        self.frames = frames;
        fed
    }

    /// The body is over: the count comes behind the reason to stop, and nothing marks the end.
    pub(in crate::provider) fn end(&mut self, out: &mut Vec<u8>) {
        if !self.finished || self.frames.is_inside() {
            return;
        }
        if let Some(counts) = self.usage {
            self.chunks.usage(usage(counts), out);
        }
        chunks::done(out);
    }

    fn message(&mut self, message: &Message<'_>, out: &mut Vec<u8>) {
        match message.kind {
            "exception" => {
                let refusal: Option<Refusal<'_>> = serde_json::from_slice(message.payload).ok();
                let words = refusal.and_then(|refusal| refusal.message);
                chunks::error(message.name, words.as_deref().unwrap_or(message.name), out);
            }
            "error" => chunks::error(message.name, message.error, out),
            _ => match serde_json::from_slice(message.payload) {
                Ok(event) => self.event(message.name, event, out),
                Err(_) => chunks::error("server_error", "The backend sent what is no answer.", out),
            },
        }
    }

    fn event(&mut self, name: &str, event: EventIn<'_>, out: &mut Vec<u8>) {
        match name {
            "messageStart" => {
                let delta = Delta {
                    role: Some("assistant"),
                    content: Some(Cow::Borrowed("")),
                    ..Delta::default()
                };
                self.chunks.say(0, delta, out);
            }
            "contentBlockStart" => {
                if let Some(tool_use) = event.start.and_then(|start| start.tool_use) {
                    let call = self.calls.begin(event.content_block_index);
                    let id = Some(tool_use.tool_use_id);
                    self.call(call, id, Some(tool_use.name), Cow::Borrowed(""), out);
                }
            }
            "contentBlockDelta" => {
                if let Some(delta) = event.delta {
                    self.delta(event.content_block_index, delta, out);
                }
            }
            "contentBlockStop" => {
                // A call without arguments has no delta here, and an empty object there.
                if let Some(call) = self.calls.end(event.content_block_index) {
                    self.call(call, None, None, Cow::Borrowed("{}"), out);
                }
            }
            "messageStop" => {
                let reason = event.stop_reason.unwrap_or_default();
                self.finished = true;
                self.chunks.finish(0, finish_reason(&reason), out);
            }
            "metadata" => self.usage = event.usage.or(self.usage),
            // Yet to be invented.
            _ => {}
        }
    }

    fn delta(&mut self, block: Option<usize>, delta: DeltaIn<'_>, out: &mut Vec<u8>) {
        let arguments = delta
            .tool_use
            .and_then(|tool_use| tool_use.input)
            .and_then(text);
        if let Some(arguments) = arguments.filter(|text| !text.is_empty()) {
            if let Some(call) = self.calls.go_on(block) {
                self.call(call, None, None, Cow::Owned(arguments), out);
            }
            return;
        }
        let chunk = Delta {
            content: delta.text,
            // Signatures and redacted thoughts have no counterpart.
            reasoning_content: delta.reasoning_content.and_then(|thought| thought.text),
            ..Delta::default()
        };
        if chunk.content.is_some() || chunk.reasoning_content.is_some() {
            self.chunks.say(0, chunk, out);
        }
    }

    fn call(
        &self,
        index: usize,
        id: Option<Cow<'_, str>>,
        name: Option<Cow<'_, str>>,
        arguments: Cow<'_, str>,
        out: &mut Vec<u8>,
    ) {
        let call = ToolCall {
            index: Some(index),
            kind: id.is_some().then_some("function"),
            id,
            function: FunctionCall { name, arguments },
            extra_content: None,
        };
        let delta = Delta {
            tool_calls: vec![call],
            ..Delta::default()
        };
        self.chunks.say(0, delta, out);
    }
}

/// Part of a call's arguments.
fn text(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}
