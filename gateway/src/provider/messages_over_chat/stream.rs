//! From the chunks of a chat completion to the events of a message.

use std::borrow::Cow;

use serde_json::Value;
use serde_json::value::RawValue;

use super::calls::{Call, Calls, Piece};
use super::{message_id, stop_reason, stop_text, usage};
use crate::meter::fault::{self, Fault};
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
    calls: Calls,
    has_calls: bool,
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
    Tool,
}

impl Stream {
    /// Takes the backend's next bytes and writes the caller's.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), EventTooLarge> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let mut kept = Ok(());
        let fed = decoder.feed(bytes, |data, _| {
            if kept.is_ok() {
                kept = self.chunk(data, out);
            }
        });
        self.decoder = decoder;
        fed.and(kept)
    }

    fn chunk(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), EventTooLarge> {
        if data.trim_ascii() == b"[DONE]" {
            self.end(out);
            return Ok(());
        }
        let Ok(chunk) = serde_json::from_slice::<AnswerIn<'_>>(data) else {
            return Ok(());
        };
        if let Some(error) = chunk.error {
            fail(error, out);
            return Ok(());
        }
        // Azure's first chunk tells of its filters alone: neither id nor model.
        let says_nothing = chunk.choices.is_empty() && chunk.usage.is_none();
        if says_nothing {
            return Ok(());
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
        match chunk.choices.into_iter().next() {
            Some(choice) => self.choice(choice, out),
            None => Ok(()),
        }
    }

    fn choice(&mut self, choice: ChoiceIn<'_>, out: &mut Vec<u8>) -> Result<(), EventTooLarge> {
        if let Some(delta) = choice.message {
            if let Some(thinking) = delta.thought() {
                if self.calls.lets_pass() {
                    self.thinking(thinking, out);
                } else {
                    self.call(Piece::Thinking(thinking.to_string()), out)?;
                }
            }
            for text in [&delta.content, &delta.refusal].into_iter().flatten() {
                if text.is_empty() {
                    continue;
                }
                if self.calls.lets_pass() {
                    self.text(text, out);
                } else {
                    self.call(Piece::Text(text.to_string()), out)?;
                }
            }
            if delta.refusal.is_some_and(|text| !text.is_empty()) {
                self.finish = Some(("refusal", None));
            }
            for call in delta.tool_calls.into_iter().flatten() {
                self.has_calls = true;
                self.call(Piece::Call(piece(call)), out)?;
            }
        }
        if let Some(reason) = choice.finish_reason {
            let stopped_at = stop_text(choice.stop_reason);
            let reason = stop_reason(&reason, stopped_at.as_deref(), self.has_calls);
            self.finish.get_or_insert((reason, stopped_at));
        }
        Ok(())
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
                    Kind::Text | Kind::Tool => Block::Text {
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

    fn call(&mut self, piece: Piece, out: &mut Vec<u8>) -> Result<(), EventTooLarge> {
        for piece in self.calls.feed(piece)? {
            self.piece(piece, out);
        }
        Ok(())
    }

    fn piece(&mut self, piece: Piece, out: &mut Vec<u8>) {
        match piece {
            Piece::Text(text) => self.text(&text, out),
            Piece::Thinking(text) => self.thinking(&text, out),
            Piece::Arguments(partial_json) => self.arguments(&partial_json, out),
            Piece::Call(call) => {
                let tool_use = Block::ToolUse {
                    id: call.id.into(),
                    name: call.name.into(),
                    input: super::input(Cow::Borrowed("")),
                };
                self.start(Kind::Tool, tool_use, out);
                self.arguments(&call.arguments, out);
            }
        }
    }

    fn text(&mut self, text: &str, out: &mut Vec<u8>) {
        let index = self.at(Kind::Text, out);
        let delta = Delta::Text { text };
        write(&Event::ContentBlockDelta { index, delta }, out);
    }

    fn thinking(&mut self, thinking: &str, out: &mut Vec<u8>) {
        let index = self.at(Kind::Thinking, out);
        let delta = Delta::Thinking { thinking };
        write(&Event::ContentBlockDelta { index, delta }, out);
    }

    fn arguments(&mut self, partial_json: &str, out: &mut Vec<u8>) {
        if let (false, Some((_, index))) = (partial_json.is_empty(), self.open) {
            let delta = Delta::InputJson { partial_json };
            write(&Event::ContentBlockDelta { index, delta }, out);
        }
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        for piece in self.calls.end() {
            self.piece(piece, out);
        }
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

fn piece(call: AnswerToolCallIn<'_>) -> Call {
    let function = call
        .function
        .map(|function| (function.name, function.arguments));
    let (name, arguments) = function.unwrap_or_default();
    Call {
        index: call.index.unwrap_or(0),
        id: call.id.unwrap_or_default().into_owned(),
        name: name.unwrap_or_default().into_owned(),
        arguments: arguments.unwrap_or_default().into_owned(),
    }
}

fn fail(error: &RawValue, out: &mut Vec<u8>) {
    let value: Value = serde_json::from_str(error.get()).unwrap_or_default();
    let message = value.get("message").and_then(Value::as_str);
    let kind = match fault::of(error.get()) {
        Fault::Limit => "rate_limit_error",
        Fault::Overloaded => "overloaded_error",
        Fault::Backend | Fault::Other => "api_error",
    };
    let error = ErrorOut {
        kind,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A call as it is meant: its id and its arguments.
    type Meant = (String, Value);

    fn chunk(delta: &Value) -> Vec<u8> {
        let chunk = json!({"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta}]});
        format!("data: {chunk}\n\n").into_bytes()
    }

    /// The chunks of a call: its head, then its arguments in pieces of `size` characters.
    fn chunks(index: usize, (id, arguments): &Meant, size: usize) -> Vec<Vec<u8>> {
        let head = json!({"index": index, "id": id, "function": {"name": id, "arguments": ""}});
        let text: Vec<char> = arguments.to_string().chars().collect();
        let pieces = text.chunks(size).map(|piece| {
            let piece: String = piece.iter().collect();
            json!({"index": index, "function": {"arguments": piece}})
        });
        let all = std::iter::once(head).chain(pieces);
        all.map(|call| chunk(&json!({"tool_calls": [call]})))
            .collect()
    }

    fn events(out: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(out).unwrap();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }

    /// The texts and the calls of the message; fails where its blocks are not one after another.
    fn read(out: &[u8]) -> (String, Vec<Meant>) {
        let (mut said, mut calls) = (String::new(), Vec::new());
        let mut open: Option<(u64, String, String)> = None;
        let mut next = 0;
        for event in events(out) {
            let index = event["index"].as_u64();
            match event["type"].as_str().unwrap() {
                "content_block_start" => {
                    assert!(open.is_none() && index == Some(next), "{event}");
                    let id = event["content_block"]["id"].as_str().unwrap_or_default();
                    assert_eq!(
                        event["content_block"]["name"].as_str().unwrap_or_default(),
                        id
                    );
                    open = Some((next, id.to_owned(), String::new()));
                    next += 1;
                }
                "content_block_delta" => {
                    let (at, _, json) = open.as_mut().unwrap();
                    assert_eq!(index, Some(*at));
                    said.push_str(event["delta"]["text"].as_str().unwrap_or_default());
                    json.push_str(event["delta"]["partial_json"].as_str().unwrap_or_default());
                }
                "content_block_stop" => {
                    let (at, id, json) = open.take().unwrap();
                    assert_eq!(index, Some(at));
                    if !id.is_empty() {
                        calls.push((id, serde_json::from_str(&json).unwrap()));
                    }
                }
                _ => {}
            }
        }
        assert!(open.is_none());
        (said, calls)
    }

    proptest! {
        #[test]
        fn calls_are_whole_however_their_chunks_are_mixed(
            arguments in prop::collection::vec(
                prop::collection::btree_map("[a-z]{1,3}", "[a-z{}\"\\\\é ]{0,9}", 0..3),
                1..5,
            ),
            size in 1usize..6,
            order in prop::collection::vec(any::<prop::sample::Index>(), 400),
        ) {
            let meant: Vec<Meant> = arguments
                .iter()
                .enumerate()
                .map(|(index, arguments)| (format!("call_{index}"), json!(arguments)))
                .collect();
            let mut lanes: Vec<Vec<Vec<u8>>> = meant
                .iter()
                .enumerate()
                .map(|(index, meant)| chunks(index, meant, size))
                .collect();
            lanes.push(vec![chunk(&json!({"content": "a"})), chunk(&json!({"content": "b"}))]);
            let (mut stream, mut out) = (Stream::default(), Vec::new());
            for pick in order.iter().cycle() {
                lanes.retain(|lane| !lane.is_empty());
                if lanes.is_empty() {
                    break;
                }
                let lane = pick.index(lanes.len());
                let next = lanes[lane].remove(0);
                stream.feed(&next, &mut out).unwrap();
            }
            stream.feed(b"data: [DONE]\n\n", &mut out).unwrap();
            let (said, mut calls) = read(&out);
            calls.sort_by(|one, other| one.0.cmp(&other.0));
            prop_assert_eq!(calls, meant);
            prop_assert_eq!(said, "ab");
        }
    }

    #[test]
    fn more_than_fits_between_two_pieces_of_a_call_ends_the_stream() {
        let (mut stream, mut out) = (Stream::default(), Vec::new());
        let begun = json!({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}]});
        stream.feed(&chunk(&begun), &mut out).unwrap();
        let text = chunk(&json!({"content": "x".repeat(300_000)}));
        let fed: Vec<bool> = (0..4)
            .map(|_| stream.feed(&text, &mut out).is_ok())
            .collect();
        assert_eq!(fed, [true, true, true, false]);
    }
}
