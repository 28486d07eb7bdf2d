//! From the events of a message to the chunks of a chat completion.

use std::borrow::Cow;

use super::{finish_reason, usage};
use crate::provider::chat::{Delta, FunctionCall, ToolCall};
use crate::provider::chunks::{self, Chunks};
use crate::provider::messages::{BlockIn, DeltaIn, EventIn, OpeningIn, UsageIn};
use crate::provider::open_calls::OpenCalls;
use crate::sse::{Decoder, EventTooLarge};

/// One stream.
#[derive(Debug)]
pub struct Stream {
    decoder: Decoder,
    chunks: Chunks,
    include_usage: bool,
    calls: OpenCalls,
    usage: UsageIn,
}

impl Stream {
    /// `created` is now in seconds since 1970.
    pub fn new(created: u64, include_usage: bool) -> Self {
        Self {
            decoder: Decoder::default(),
            chunks: Chunks {
                created,
                ..Chunks::default()
            },
            include_usage,
            calls: OpenCalls::default(),
            usage: UsageIn::default(),
        }
    }

    /// Takes the backend's next bytes and writes the caller's.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), EventTooLarge> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let fed = decoder.feed(bytes, |data, _| self.event(data, out));
        self.decoder = decoder;
        fed.map(|_open_at| ())
    }

    fn event(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let Ok(event) = serde_json::from_slice::<EventIn<'_>>(data) else {
            return;
        };
        match event.kind.as_ref() {
            "message_start" => self.open(event.message, out),
            "content_block_start" => self.block(event.index, event.content_block, out),
            "content_block_delta" => self.delta(event.index, event.delta, out),
            "content_block_stop" => self.close(event.index, out),
            "message_delta" => self.end(event.delta, event.usage, out),
            "message_stop" => {
                if self.include_usage {
                    self.chunks.usage(usage(self.usage), out);
                }
                chunks::done(out);
            }
            "ping" => out.extend_from_slice(b": ping\n\n"),
            "error" => {
                let (kind, message) = event
                    .error
                    .map(|error| (error.kind, error.message))
                    .unwrap_or_default();
                chunks::error(&kind, &message, out);
            }
            // Yet to be invented.
            _ => {}
        }
    }

    fn open(&mut self, message: Option<OpeningIn<'_>>, out: &mut Vec<u8>) {
        if let Some(message) = message {
            self.chunks.id = message.id.into_owned();
            self.chunks.model = message.model.into_owned();
            self.usage = message.usage;
        }
        let delta = Delta {
            role: Some("assistant"),
            content: Some(Cow::Borrowed("")),
            ..Delta::default()
        };
        self.chunks.say(0, delta, out);
    }

    fn block(&mut self, index: Option<usize>, block: Option<BlockIn<'_>>, out: &mut Vec<u8>) {
        let Some(block) = block else { return };
        let filled = |text: Option<Cow<'static, str>>| text.filter(|text| !text.is_empty());
        let delta = match block.kind.as_ref() {
            "tool_use" => {
                let call = ToolCall {
                    index: Some(self.calls.begin(index)),
                    id: block.id,
                    kind: Some("function"),
                    function: FunctionCall {
                        name: block.name,
                        arguments: Cow::Borrowed(""),
                    },
                    extra_content: None,
                };
                let delta = Delta {
                    tool_calls: vec![call],
                    ..Delta::default()
                };
                return self.chunks.say(0, delta, out);
            }
            "text" => Delta {
                content: filled(block.text.map(|text| Cow::Owned(text.into_owned()))),
                ..Delta::default()
            },
            "thinking" => Delta {
                reasoning_content: filled(block.thinking.map(|text| Cow::Owned(text.into_owned()))),
                ..Delta::default()
            },
            _ => return,
        };
        if delta.content.is_some() || delta.reasoning_content.is_some() {
            self.chunks.say(0, delta, out);
        }
    }

    fn delta(&mut self, index: Option<usize>, delta: Option<DeltaIn<'_>>, out: &mut Vec<u8>) {
        let Some(delta) = delta else { return };
        if let Some(arguments) = delta.partial_json.filter(|json| !json.is_empty()) {
            // Tools that run at Anthropic have their input too.
            if let Some(call) = self.calls.go_on(index) {
                self.arguments(call, arguments, out);
            }
            return;
        }
        let chunk = Delta {
            content: delta.text,
            reasoning_content: delta.thinking,
            ..Delta::default()
        };
        // Signatures and citations have no counterpart.
        if chunk.content.is_some() || chunk.reasoning_content.is_some() {
            self.chunks.say(0, chunk, out);
        }
    }

    /// A call without arguments has no delta here, and an empty object there.
    fn close(&mut self, index: Option<usize>, out: &mut Vec<u8>) {
        if let Some(call) = self.calls.end(index) {
            self.arguments(call, Cow::Borrowed("{}"), out);
        }
    }

    fn arguments(&self, call: usize, arguments: Cow<'_, str>, out: &mut Vec<u8>) {
        let call = ToolCall {
            index: Some(call),
            id: None,
            kind: None,
            function: FunctionCall {
                name: None,
                arguments,
            },
            extra_content: None,
        };
        let delta = Delta {
            tool_calls: vec![call],
            ..Delta::default()
        };
        self.chunks.say(0, delta, out);
    }

    fn end(&mut self, delta: Option<DeltaIn<'_>>, usage: Option<UsageIn>, out: &mut Vec<u8>) {
        if let Some(now) = usage {
            let before = self.usage;
            let creation = now.cache_creation_input_tokens;
            self.usage = UsageIn {
                input_tokens: now.input_tokens.or(before.input_tokens),
                cache_creation_input_tokens: creation.or(before.cache_creation_input_tokens),
                cache_read_input_tokens: now
                    .cache_read_input_tokens
                    .or(before.cache_read_input_tokens),
                output_tokens: now.output_tokens.or(before.output_tokens),
            };
        }
        if let Some(reason) = delta.and_then(|delta| delta.stop_reason) {
            self.chunks.finish(0, finish_reason(&reason), out);
        }
    }
}
