//! What the typed events of Anthropic's Messages API and of OpenAI's Responses API mean.
//!
//! A substring search finds the kind: in valid JSON a quote inside a text is escaped, so the quoted name cannot be
//! part of an answer's text.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;

use super::{Counts, Cut, Meaning};

static CONTENT_DELTA: LazyLock<Finder<'static>> =
    LazyLock::new(|| Finder::new(br#""content_block_delta""#));
static DELTA: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#".delta""#));

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type", default)]
    kind: String,
    /// `message_start`.
    #[serde(default)]
    message: Option<Counted>,
    /// `response.completed` and its like.
    #[serde(default)]
    response: Option<Counted>,
    /// `content_block_start`.
    #[serde(default)]
    content_block: Option<Block>,
    /// `message_delta`.
    #[serde(default)]
    usage: Option<Counts>,
    /// Some backends send an error in the shape of chat completions.
    #[serde(default)]
    error: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Counted {
    #[serde(default)]
    usage: Option<Counts>,
}

#[derive(Deserialize)]
struct Block {
    #[serde(rename = "type", default)]
    kind: String,
}

fn token() -> Meaning {
    Meaning {
        token: true,
        starts: true,
        ..Meaning::default()
    }
}

fn error() -> Meaning {
    Meaning {
        cut: Some(Cut::Error),
        ..Meaning::default()
    }
}

/// An event of Anthropic's.
pub(super) fn of_message(data: &[u8]) -> Meaning {
    if CONTENT_DELTA.find(data).is_some() {
        return token();
    }
    let Ok(event) = serde_json::from_slice::<Event>(data) else {
        return Meaning::default();
    };
    match event.kind.as_str() {
        "message_start" => Meaning {
            counts: event.message.and_then(|message| message.usage),
            ..Meaning::default()
        },
        "content_block_start" => {
            let opens = ["text", "thinking"];
            let block = event.content_block;
            Meaning {
                // The call of a tool says its name here.
                starts: block.is_some_and(|block| !opens.contains(&block.kind.as_str())),
                ..Meaning::default()
            }
        }
        "message_delta" => Meaning {
            counts: event.usage,
            starts: true,
            ..Meaning::default()
        },
        "message_stop" => Meaning {
            done: true,
            starts: true,
            ..Meaning::default()
        },
        "error" => error(),
        _ if event.error.is_some() => error(),
        _ => Meaning::default(),
    }
}

/// An event of OpenAI's Responses API.
pub(super) fn of_response(data: &[u8]) -> Meaning {
    if DELTA.find(data).is_some() {
        return token();
    }
    if data.trim_ascii() == b"[DONE]" {
        return Meaning {
            done: true,
            ..Meaning::default()
        };
    }
    let Ok(event) = serde_json::from_slice::<Event>(data) else {
        return Meaning::default();
    };
    match event.kind.as_str() {
        "response.completed" | "response.incomplete" => Meaning {
            counts: event.response.and_then(|response| response.usage),
            done: true,
            starts: true,
            ..Meaning::default()
        },
        "response.failed" | "error" => error(),
        _ if event.error.is_some() => error(),
        _ => Meaning::default(),
    }
}

#[cfg(test)]
mod tests {
    use crate::meter::{Cut, Meter, Usage};
    use crate::openai::Wire;

    fn feed(wire: Wire, events: &[&str]) -> (Meter, u32) {
        let mut meter = Meter::new(wire);
        let events: Vec<String> = events
            .iter()
            .map(|event| format!("data: {event}\n\n"))
            .collect();
        let text = events.concat();
        let tokens = text
            .as_bytes()
            .chunks(5)
            .map(|chunk| meter.feed(chunk).unwrap().tokens)
            .sum();
        (meter, tokens)
    }

    const START: &str = r#"{"type":"message_start","message":{"usage":{"input_tokens":5,"cache_read_input_tokens":2,"output_tokens":1}}}"#;
    const TEXT: &str =
        r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#;
    const TOOL: &str = r#"{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"t","name":"n","input":{}}}"#;
    const WORD: &str = r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"say \"message_stop\""}}"#;
    const END: &str = r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":9}}"#;
    const STOP: &str = r#"{"type":"message_stop"}"#;

    #[test]
    fn a_message_ends_with_its_stop_event_and_is_counted_from_both_ends() {
        let (meter, tokens) = feed(Wire::Messages, &[START, TEXT, WORD, WORD, END, STOP]);
        assert_eq!(tokens, 2);
        assert!(meter.is_done() && meter.cut().is_none());
        let usage = Usage {
            prompt_tokens: 7,
            cached_tokens: 2,
            completion_tokens: 9,
        };
        assert_eq!(meter.usage(), Some(usage));
    }

    #[test]
    fn a_message_has_started_when_it_says_something() {
        assert!(
            !feed(Wire::Messages, &[START, TEXT, r#"{"type":"ping"}"#])
                .0
                .has_started()
        );
        assert!(feed(Wire::Messages, &[START, TEXT, WORD]).0.has_started());
        assert!(feed(Wire::Messages, &[START, TOOL]).0.has_started());
        assert!(!feed(Wire::Messages, &[START, TEXT, WORD]).0.is_done());
    }

    #[test]
    fn an_error_event_of_a_message_is_a_cut() {
        let error = r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#;
        assert_eq!(
            feed(Wire::Messages, &[START, error]).0.cut(),
            Some(Cut::Error)
        );
    }

    #[test]
    fn a_response_ends_completed_or_incomplete_and_fails_as_a_cut() {
        let word = r#"{"type":"response.output_text.delta","delta":"hi"}"#;
        let completed = r#"{"type":"response.completed","response":{"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":1},"output_tokens":4}}}"#;
        let (meter, tokens) = feed(
            Wire::Responses,
            &[r#"{"type":"response.created"}"#, word, completed],
        );
        assert_eq!(
            (tokens, meter.is_done(), meter.has_started()),
            (1, true, true)
        );
        let usage = Usage {
            prompt_tokens: 3,
            cached_tokens: 1,
            completion_tokens: 4,
        };
        assert_eq!(meter.usage(), Some(usage));
        let failed = r#"{"type":"response.failed","response":{"error":{"message":"x"}}}"#;
        assert_eq!(
            feed(Wire::Responses, &[word, failed]).0.cut(),
            Some(Cut::Error)
        );
        assert!(
            !feed(Wire::Responses, &[r#"{"type":"response.created"}"#])
                .0
                .has_started()
        );
    }
}
