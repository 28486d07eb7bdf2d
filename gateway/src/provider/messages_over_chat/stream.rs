//! From the chunks of a chat completion to the events of a message.

use std::borrow::Cow;

use serde_json::Value;
use serde_json::value::RawValue;

use super::{message_id, stop_reason, stop_text, usage};
use crate::provider::chat::{AnswerIn, AnswerToolCallIn, ChoiceIn};
use crate::provider::messages::{Answer, Block, Delta, End, ErrorOut, Event, Usage};
use crate::sse::{Decoder, EventTooLarge};

/// One stream.
#[derive(Debug, Default)]
pub struct Stream {
    decoder: Decoder,
    begun: bool,
    /// The block that is open, and its position.
    open: Option<(Kind, usize)>,
    /// Position of the next block.
    next: usize,
    finish: Option<(&'static str, Option<String>)>,
    /// The backend's last count.
    usage: Usage,
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Thinking,
    /// The tool call with this index.
    Tool(usize),
}

impl Stream {
    /// Takes the backend's next bytes and writes the caller's.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), EventTooLarge> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let fed = decoder.feed(bytes, |data, _| self.chunk(data, out));
        self.decoder = decoder;
        fed.map(|_open_at| ())
    }

    fn chunk(&mut self, data: &[u8], out: &mut Vec<u8>) {
        if data.trim_ascii() == b"[DONE]" {
            return self.end(out);
        }
        let Ok(chunk) = serde_json::from_slice::<AnswerIn<'_>>(data) else {
            return;
        };
        if let Some(error) = chunk.error {
            return fail(error, out);
        }
        // Azure's first chunk tells of its filters alone: neither id nor model.
        let says_nothing = chunk.choices.is_empty() && chunk.usage.is_none();
        if says_nothing {
            return;
        }
        if !std::mem::replace(&mut self.begun, true) {
            let message = Answer {
                id: message_id(&chunk.id),
                kind: "message",
                role: "assistant",
                model: &chunk.model,
                content: Vec::new(),
                stop_reason: None,
                stop_sequence: None,
                // Chat completions tell it at the end.
                usage: Usage::default(),
            };
            write(&Event::MessageStart { message }, out);
        }
        if chunk.usage.is_some() {
            self.usage = usage(chunk.usage);
        }
        // Anthropic has one answer to a request, and so has every request that was translated.
        if let Some(choice) = chunk.choices.into_iter().next() {
            self.choice(choice, out);
        }
    }

    fn choice(&mut self, choice: ChoiceIn<'_>, out: &mut Vec<u8>) {
        if let Some(delta) = choice.message {
            if let Some(thinking) = delta.thought() {
                let index = self.at(Kind::Thinking, out);
                let delta = Delta::Thinking { thinking };
                write(&Event::ContentBlockDelta { index, delta }, out);
            }
            for text in [&delta.content, &delta.refusal].into_iter().flatten() {
                if !text.is_empty() {
                    let index = self.at(Kind::Text, out);
                    let delta = Delta::Text { text };
                    write(&Event::ContentBlockDelta { index, delta }, out);
                }
            }
            if delta.refusal.is_some_and(|text| !text.is_empty()) {
                self.finish = Some(("refusal", None));
            }
            for call in delta.tool_calls.into_iter().flatten() {
                self.tool(call, out);
            }
        }
        if let Some(reason) = choice.finish_reason {
            let stopped_at = stop_text(choice.stop_reason);
            let reason = stop_reason(&reason, stopped_at.as_deref());
            self.finish.get_or_insert((reason, stopped_at));
        }
    }

    /// Sees to it that a block of this kind is open.
    fn at(&mut self, kind: Kind, out: &mut Vec<u8>) -> usize {
        match self.open {
            Some((open, index)) if open == kind => index,
            _ => {
                let content_block = match kind {
                    Kind::Thinking => Block::Thinking {
                        thinking: Cow::Borrowed(""),
                        signature: "",
                    },
                    Kind::Text | Kind::Tool(_) => Block::Text {
                        text: Cow::Borrowed(""),
                    },
                };
                self.start(kind, content_block, out)
            }
        }
    }

    fn start(&mut self, kind: Kind, content_block: Block<'_>, out: &mut Vec<u8>) -> usize {
        self.close(out);
        let index = self.next;
        self.next += 1;
        self.open = Some((kind, index));
        let event = Event::ContentBlockStart {
            index,
            content_block,
        };
        write(&event, out);
        index
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if let Some((_, index)) = self.open.take() {
            write(&Event::ContentBlockStop { index }, out);
        }
    }

    fn tool(&mut self, call: AnswerToolCallIn<'_>, out: &mut Vec<u8>) {
        let kind = Kind::Tool(call.index.unwrap_or(0));
        let (name, arguments) = call
            .function
            .map(|function| (function.name, function.arguments))
            .unwrap_or_default();
        let is_open = self.open.is_some_and(|(open, _)| open == kind);
        if !is_open {
            let tool_use = Block::ToolUse {
                id: call.id.unwrap_or_default(),
                name: name.unwrap_or_default(),
                input: super::input(Cow::Borrowed("")),
            };
            self.start(kind, tool_use, out);
        }
        let partial_json = arguments.unwrap_or_default();
        if let (false, Some((_, index))) = (partial_json.is_empty(), self.open) {
            let delta = Delta::InputJson {
                partial_json: &partial_json,
            };
            write(&Event::ContentBlockDelta { index, delta }, out);
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        self.close(out);
        let (stop_reason, stop_sequence) = self.finish.take().unwrap_or(("end_turn", None));
        let delta = End {
            stop_reason,
            stop_sequence: stop_sequence.map(Cow::Owned),
        };
        let usage = self.usage;
        write(&Event::MessageDelta { delta, usage }, out);
        write(&Event::MessageStop, out);
    }
}

fn fail(error: &RawValue, out: &mut Vec<u8>) {
    let value: Value = serde_json::from_str(error.get()).unwrap_or_default();
    let message = value.get("message").and_then(Value::as_str);
    let error = ErrorOut {
        kind: "api_error",
        message: Cow::Borrowed(message.unwrap_or("The backend failed.")),
    };
    write(&Event::Error { error }, out);
}

fn write(event: &Event<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(event.name().as_bytes());
    out.extend_from_slice(b"\ndata: ");
    // Writing to memory what consists of texts and numbers cannot fail.
    let _ = serde_json::to_writer(&mut *out, event);
    out.extend_from_slice(b"\n\n");
}
