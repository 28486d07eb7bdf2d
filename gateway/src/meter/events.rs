//! What the typed events of Anthropic's Messages API, of OpenAI's Responses API, and of its sounds and pictures mean.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Carries, Counts, Cut, Meaning, cut_by};

#[derive(Deserialize)]
struct MessageEvent<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Cow<'a, str>,
    /// `message_start`.
    #[serde(borrow, default)]
    message: Option<Answer<'a>>,
    /// `content_block_start`.
    #[serde(borrow, default)]
    content_block: Option<Block<'a>>,
    /// `message_delta`.
    #[serde(default)]
    usage: Option<Counts>,
    /// `error`; some backends send one in the shape of chat completions.
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ResponseEvent<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Cow<'a, str>,
    /// `response.completed` and its like.
    #[serde(borrow, default)]
    response: Option<Answer<'a>>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct MediaEvent<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(default)]
    usage: Option<Counts>,
    /// `response.failed`.
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Block<'a> {
    #[serde(borrow, rename = "type", default)]
    kind: Cow<'a, str>,
}

fn token() -> Meaning {
    Meaning {
        carries: Carries::Token,
        starts: true,
        ..Meaning::default()
    }
}

fn idle() -> Meaning {
    Meaning {
        carries: Carries::Nothing,
        ..Meaning::default()
    }
}

fn error(error: &str) -> Meaning {
    Meaning {
        cut: Some(cut_by(error)),
        ..Meaning::default()
    }
}

/// An event of Anthropic's.
pub(super) fn of_message(text: &str) -> Result<Meaning, serde_json::Error> {
    let event: MessageEvent<'_> = serde_json::from_str(text)?;
    Ok(match event.kind.as_ref() {
        "content_block_delta" => token(),
        "message_start" => Meaning {
            counts: event.message.and_then(|message| message.usage),
            ..Meaning::default()
        },
        "content_block_start" => {
            let opens = ["text", "thinking"];
            let block = event.content_block;
            Meaning {
                // The call of a tool says its name here.
                starts: block.is_some_and(|block| !opens.contains(&block.kind.as_ref())),
                ..Meaning::default()
            }
        }
        "message_delta" => Meaning {
            counts: event.usage,
            starts: true,
            ..Meaning::default()
        },
        "ping" => idle(),
        "message_stop" => Meaning {
            done: true,
            starts: true,
            ..Meaning::default()
        },
        "error" => error(event.error.map_or(text, RawValue::get)),
        _ => event
            .error
            .map_or_else(Meaning::default, |told| error(told.get())),
    })
}

/// An event of OpenAI's Responses API.
pub(super) fn of_response(text: &str) -> Result<Meaning, serde_json::Error> {
    let event: ResponseEvent<'_> = serde_json::from_str(text)?;
    Ok(match event.kind.as_ref() {
        kind if kind.rsplit('.').next() == Some("delta") => token(),
        "response.completed" | "response.incomplete" => Meaning {
            counts: event.response.and_then(|response| response.usage),
            done: true,
            starts: true,
            ..Meaning::default()
        },
        "response.failed" => {
            let told = event.response.and_then(|response| response.error);
            Meaning {
                cut: Some(told.map_or(Cut::Error, |told| cut_by(told.get()))),
                ..Meaning::default()
            }
        }
        "keepalive" => idle(),
        // OpenAI's has its members beside the type, others' in one of their own.
        "error" => error(event.error.map_or(text, RawValue::get)),
        _ => event
            .error
            .map_or_else(Meaning::default, |told| error(told.get())),
    })
}

/// What the types of OpenAI's events of sounds, transcripts and pictures begin with.
const MEDIA: [&str; 4] = ["speech", "transcript", "image_generation", "image_edit"];

/// An event of one of them; of one that has none of these types nothing is known.
pub(super) fn of_media(data: &[u8]) -> Meaning {
    let Ok(event) = serde_json::from_slice::<MediaEvent<'_>>(data) else {
        return plain();
    };
    let family = event.kind.split('.').next().unwrap_or_default();
    match (event.error, event.kind.rsplit('.').next()) {
        (Some(told), _) => error(told.get()),
        (None, _) if event.kind == "error" => error(std::str::from_utf8(data).unwrap_or_default()),
        (None, _) if !MEDIA.contains(&family) => plain(),
        (None, Some("done" | "completed")) => Meaning {
            done: true,
            starts: true,
            ..Meaning::default()
        },
        (None, _) => token(),
    }
}

/// An event whose meaning is not known: any may be the last.
pub(super) fn plain() -> Meaning {
    Meaning {
        done: true,
        ..token()
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
    fn an_error_event_of_a_message_is_a_cut_of_its_kind() {
        for (kind, cut) in [
            ("overloaded_error", Cut::Failure),
            ("api_error", Cut::Failure),
            ("rate_limit_error", Cut::Limit),
            ("invalid_request_error", Cut::Error),
        ] {
            let error = format!(r#"{{"type":"error","error":{{"type":"{kind}","message":"x"}}}}"#);
            let (meter, _) = feed(Wire::Messages, &[START, WORD, &error, STOP]);
            assert_eq!(meter.cut(), Some(cut), "{kind}");
        }
    }

    #[test]
    fn an_error_event_of_a_response_is_a_cut_of_its_kind() {
        let failed = |code: &str| {
            format!(
                r#"{{"type":"response.failed","response":{{"status":"failed","error":{{"code":"{code}","message":"response.x.delta"}}}}}}"#
            )
        };
        let flat = |code: &str| {
            format!(r#"{{"type":"error","code":"{code}","message":"x","param":null}}"#)
        };
        let nested = |code: &str| {
            format!(r#"{{"type":"error","error":{{"type":"x","code":"{code}","message":"x"}}}}"#)
        };
        for (code, cut) in [
            ("server_error", Cut::Failure),
            ("rate_limit_exceeded", Cut::Limit),
            ("invalid_prompt", Cut::Error),
        ] {
            for event in [failed(code), flat(code), nested(code)] {
                let (meter, _) = feed(Wire::Responses, &[&event]);
                assert_eq!(meter.cut(), Some(cut), "{event}");
            }
        }
    }

    const SOUND: &str = r#"{"type":"speech.audio.delta","audio":"UklGRg=="}"#;
    const SAID: &str = r#"{"type":"speech.audio.done","usage":{"input_tokens":2,"output_tokens":4,"total_tokens":6}}"#;

    #[test]
    fn sounds_and_pictures_end_with_their_last_event_and_no_other() {
        let picture = r#"{"type":"image_generation.partial_image","partial_image_index":0,"b64_json":"ZG9uZQ=="}"#;
        let heard = r#"{"type":"transcript.text.delta","delta":"all.done"}"#;
        for (part, last) in [
            (SOUND, SAID),
            (
                heard,
                r#"{"type":"transcript.text.done","text":"a","usage":{"type":"duration","seconds":4}}"#,
            ),
            (
                picture,
                r#"{"type":"image_generation.completed","b64_json":"eA=="}"#,
            ),
            (
                r#"{"type":"image_edit.partial_image"}"#,
                r#"{"type":"image_edit.completed"}"#,
            ),
        ] {
            let (meter, tokens) = feed(Wire::Media, &[part, part]);
            assert_eq!((tokens, meter.has_started()), (2, true), "{part}");
            assert!(!meter.is_done() && !meter.lacks_done_only(1), "{part}");
            let (meter, tokens) = feed(Wire::Media, &[part, last, "[DONE]"]);
            assert!(
                tokens >= 1 && meter.is_done() && meter.cut().is_none(),
                "{last}"
            );
        }
    }

    #[test]
    fn an_error_event_of_a_sound_or_picture_is_a_cut_of_its_kind() {
        for (event, cut) in [
            (
                r#"{"type":"error","error":{"type":"server_error","code":null,"message":"x"}}"#,
                Cut::Failure,
            ),
            (
                r#"{"type":"error","code":"rate_limit_exceeded","message":"x"}"#,
                Cut::Limit,
            ),
            (r#"{"error":{"message":"x"}}"#, Cut::Error),
        ] {
            let (meter, _) = feed(Wire::Media, &[SOUND, event]);
            assert_eq!(
                (meter.cut(), meter.is_done()),
                (Some(cut), false),
                "{event}"
            );
        }
    }

    #[test]
    fn of_events_of_their_own_any_may_be_the_last() {
        for event in [
            r#"{"object":"transcription.chunk","choices":[{"delta":{"content":"a"}}],"error":null}"#,
            r#"{"type":"audio","data":"UklGRg=="}"#,
            r#"{"type":7}"#,
            "UklGRg==",
            "[DONE]",
        ] {
            for wire in [Wire::Media, Wire::Plain] {
                let (meter, tokens) = feed(wire, &[event]);
                let is_done = meter.is_done() && meter.has_started() && meter.cut().is_none();
                assert_eq!((tokens, is_done), (1, true), "{event}");
            }
        }
        let error = r#"{"type":"error","error":{"message":"x"}}"#;
        assert_eq!(feed(Wire::Plain, &[error]).0.cut(), None);
    }

    #[test]
    fn only_the_type_says_what_an_event_is() {
        let completed = r#"{"type":"response.completed","response":{"output":[{"type":"message","content":[{"type":"output_text","text":"see a.delta"}]}]}}"#;
        let (meter, tokens) = feed(Wire::Responses, &[completed]);
        assert_eq!((tokens, meter.is_done()), (0, true));
        let start = r#"{"type":"message_start","message":{"model":"content_block_delta"}}"#;
        assert!(!feed(Wire::Messages, &[start]).0.has_started());
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
        let (meter, _) = feed(Wire::Responses, &[word, failed]);
        assert_eq!((meter.cut(), meter.is_done()), (Some(Cut::Error), false));
        assert!(
            !feed(Wire::Responses, &[r#"{"type":"response.created"}"#])
                .0
                .has_started()
        );
    }
}
