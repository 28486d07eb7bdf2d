//! `Delivered`: the text of a stream as far as its caller has it, with the names that its events carry. Events flow
//! in, as they go out; the beginning for a further attempt flows out. Sans I/O.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::meter::fault::{self, Fault};
use crate::sse::Decoder;

/// A longer text is not continued. 256 KiB are about 65,000 tokens.
const MAX_TEXT_BYTES: usize = 256 << 10;
/// Models whose engine does not tell their thoughts apart begin with them.
const THOUGHTS: &str = "<think>";

/// A chunk of a chat or text completion, as far as it matters here. Values are JSON texts where they stood.
#[derive(Deserialize)]
pub(super) struct Chunk<'a> {
    #[serde(borrow, default)]
    pub(super) id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) created: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) model: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) choices: Vec<Members<'a>>,
    #[serde(borrow, default)]
    pub(super) usage: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) error: Option<&'a RawValue>,
}

/// Members of an object.
pub(super) type Members<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

/// Whether a value says nothing. Engines write members of which there is nothing to say.
pub(super) fn is_void(value: &RawValue) -> bool {
    matches!(value.get(), "null" | "\"\"" | "[]" | "{}")
}

/// What a member's value is, if it is a text.
pub(super) fn text_of(value: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    let Text(text) = serde_json::from_str(value.get()).ok()?;
    Some(text)
}

/// What all events of a stream carry alike, as JSON texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) id: Option<Box<str>>,
    pub(super) created: Option<Box<str>>,
    pub(super) model: Option<Box<str>>,
}

impl Names {
    fn of(chunk: &Chunk<'_>) -> Self {
        let text = |value: Option<&RawValue>| value.map(|value| value.get().into());
        Self {
            id: text(chunk.id),
            created: text(chunk.created),
            model: text(chunk.model),
        }
    }
}

/// What one stream has delivered.
#[derive(Debug, Default)]
pub(super) struct Delivered {
    decoder: Decoder,
    text: Text,
}

#[derive(Debug, Default)]
struct Text {
    text: String,
    tokens: u64,
    names: Option<Names>,
    /// Something came that cannot be continued, or the end.
    is_over: bool,
}

/// The beginning of an answer, for whoever goes on with it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Beginning {
    /// Without white space at its end: tokens of words begin with it, and templates cut it off.
    pub(super) text: String,
    /// That white space, which the caller has.
    pub(super) space: String,
    /// Events that carried text.
    pub(super) tokens: u64,
    pub(super) names: Names,
}

impl Delivered {
    /// Takes whole events that are to go out. As many of their bytes may: all, or those before the event by which the
    /// engine says that it stopped, or failed.
    pub(super) fn feed(&mut self, events: &[u8]) -> usize {
        let Self { decoder, text } = self;
        let mut passes = events.len();
        let fed = decoder.feed(events, |data, place| {
            if !text.is_over && text.take(data) == Said::Gone {
                passes = passes.min(place.start);
            }
        });
        // An event of which only a part has come is larger than any that carries a text.
        text.is_over |=
            fed.is_err() || decoder.is_inside_event() || text.text.len() > MAX_TEXT_BYTES;
        if text.is_over {
            text.text = String::new();
        }
        passes
    }

    /// Bytes of text that are kept.
    pub(super) fn bytes(&self) -> usize {
        self.text.text.capacity()
    }

    /// Whether there is nothing that could be continued any more.
    pub(super) fn is_over(&self) -> bool {
        self.text.is_over
    }

    /// What can be continued.
    pub(super) fn beginning(self) -> Option<Beginning> {
        let Text {
            mut text,
            tokens,
            names,
            is_over,
        } = self.text;
        if is_over || text.trim_start().starts_with(THOUGHTS) {
            return None;
        }
        let space = text.split_off(text.trim_end().len());
        Some(Beginning {
            text,
            space,
            tokens,
            names: names.unwrap_or_default(),
        })
    }
}

#[derive(PartialEq, Eq)]
enum Said {
    Text,
    /// The engine stopped or failed.
    Gone,
}

impl Text {
    fn take(&mut self, data: &[u8]) -> Said {
        let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) else {
            // `[DONE]`, or what is no chunk.
            self.is_over = true;
            return Said::Text;
        };
        let fault = chunk.error.map(|error| fault::of(error.get()));
        if fault.is_some_and(Fault::is_backends) {
            return Said::Gone;
        }
        self.names.get_or_insert_with(|| Names::of(&chunk));
        match &chunk.choices[..] {
            [] => Said::Text,
            [choice] => self.take_choice(choice),
            _ => {
                self.is_over = true;
                Said::Text
            }
        }
    }

    fn take_choice(&mut self, choice: &Members<'_>) -> Said {
        let reason = choice.get("finish_reason");
        if reason.is_some_and(|reason| reason.get() == "\"abort\"") {
            return Said::Gone;
        }
        for (name, value) in choice {
            match &**name {
                "index" => self.is_over |= value.get() != "0",
                "text" => self.add(value),
                "delta" => self.take_delta(value),
                // A reason to end, log probabilities, token ids, what is not known.
                _ => self.is_over |= !is_void(value),
            }
        }
        Said::Text
    }

    fn take_delta(&mut self, delta: &RawValue) {
        if is_void(delta) {
            return;
        }
        let Ok(delta) = serde_json::from_str::<Members<'_>>(delta.get()) else {
            self.is_over = true;
            return;
        };
        for (name, value) in &delta {
            match &**name {
                "role" => {}
                "content" => self.add(value),
                // Thoughts, calls of tools, refusals.
                _ => self.is_over |= !is_void(value),
            }
        }
    }

    fn add(&mut self, value: &RawValue) {
        if is_void(value) {
            return;
        }
        match text_of(value) {
            Some(text) => {
                self.tokens += 1;
                self.text.push_str(&text);
            }
            None => self.is_over = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(choice: &str) -> String {
        format!("data: {{\"id\":\"a\",\"created\":7,\"model\":\"m\",\"choices\":[{choice}]}}\n\n")
    }

    fn word(text: &str) -> String {
        chunk(&format!(
            r#"{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}"#
        ))
    }

    fn beginning(events: &[String]) -> Option<Beginning> {
        let mut delivered = Delivered::default();
        for event in events {
            assert_eq!(delivered.feed(event.as_bytes()), event.len());
        }
        delivered.beginning()
    }

    #[test]
    fn text_is_collected_with_its_names_and_its_last_space_apart() {
        let role =
            chunk(r#"{"index":0,"delta":{"role":"assistant","content":"","tool_calls":null}}"#);
        let found = beginning(&[
            role,
            ": beat\n\n".to_owned(),
            word("a\\u00e9 "),
            word("b \\n"),
        ]);
        let found = found.unwrap();
        assert_eq!((found.text.as_str(), found.space.as_str()), ("aé b", " \n"));
        assert_eq!(found.tokens, 2);
        assert_eq!(found.names.id.as_deref(), Some("\"a\""));
        assert_eq!(found.names.created.as_deref(), Some("7"));
        let completion = chunk(r#"{"index":0,"text":"x","logprobs":null,"finish_reason":null}"#);
        assert_eq!(beginning(&[completion]).unwrap().text, "x");
    }

    #[test]
    fn what_is_more_than_a_text_ends_the_chance() {
        for choice in [
            r#"{"delta":{"content":"x"},"finish_reason":"stop"}"#,
            r#"{"delta":{"reasoning_content":"x"}}"#,
            r#"{"delta":{"reasoning":"x"}}"#,
            r#"{"delta":{"tool_calls":[{"index":0}]}}"#,
            r#"{"delta":{"refusal":"x"}}"#,
            r#"{"delta":{"content":[1]}}"#,
            r#"{"delta":{"content":"x"},"logprobs":{"content":[1]}}"#,
            r#"{"index":1,"delta":{"content":"x"}}"#,
            r#"{"delta":{"content":"x"}},{"delta":{"content":"x"}}"#,
        ] {
            assert_eq!(
                beginning(&[word("a"), chunk(choice), word("b")]),
                None,
                "{choice}"
            );
        }
        assert_eq!(beginning(&[word("a"), "data: [DONE]\n\n".to_owned()]), None);
        assert_eq!(beginning(&[word("\\n<think>a")]), None);
        assert_eq!(beginning(&[word("a"), "data: {\"cho".to_owned()]), None);
    }

    #[test]
    fn an_abort_is_kept_from_the_caller() {
        let mut delivered = Delivered::default();
        let abort = chunk(r#"{"delta":{"content":"lost"},"finish_reason":"abort"}"#);
        let events = word("a") + &abort;
        assert_eq!(delivered.feed(events.as_bytes()), word("a").len());
        assert_eq!(delivered.beginning().unwrap().text, "a");
        // It is nothing to keep where the stream is not continued anyway.
        let mut over = Delivered::default();
        over.feed(b"data: [DONE]\n\n");
        assert_eq!(over.feed(events.as_bytes()), events.len());
    }

    #[test]
    fn a_text_is_kept_up_to_its_bound() {
        let mut delivered = Delivered::default();
        let long = word(&"x".repeat(MAX_TEXT_BYTES / 4));
        for _ in 0..4 {
            delivered.feed(long.as_bytes());
        }
        assert!(!delivered.is_over() && delivered.bytes() >= MAX_TEXT_BYTES);
        delivered.feed(word("x").as_bytes());
        assert!(delivered.is_over());
        assert_eq!(delivered.bytes(), 0);
    }
}
