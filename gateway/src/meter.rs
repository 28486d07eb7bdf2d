//! `Meter`: what an answer's bytes say while they pass through: whether it ended, how many tokens it used, whether
//! it was cut. Sans I/O; the bytes themselves are never changed.
//!
//! Most events are not parsed: a substring search tells whether a parse could find anything.

use std::borrow::Cow;
use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;

use crate::sse::{Decoder, EventTooLarge};

/// Tokens as the backend counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: u64,
}

/// What the bytes of one frame meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Events that carried part of an answer.
    pub tokens: u32,
    /// `[DONE]` was among them.
    pub done: bool,
    /// The backend gave up; the offset behind the event that says so.
    pub cut_at: Option<usize>,
}

/// How a backend gave up inside an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// `finish_reason: abort`: vLLM is stopping. Status 200 and `[DONE]` around it do not make it an end.
    Abort,
    /// An event with an `error` member.
    Error,
}

/// Follows one event stream.
#[derive(Debug, Default)]
pub struct Meter {
    decoder: Decoder,
    usage: Option<Usage>,
    done: bool,
    cut: Option<Cut>,
    started: bool,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

/// The first chunk of a chat stream: a role and nothing else.
#[derive(Deserialize)]
struct Opening<'a> {
    #[serde(borrow, default)]
    choices: Vec<OpeningChoice<'a>>,
}

#[derive(Deserialize)]
struct OpeningChoice<'a> {
    #[serde(borrow, default)]
    delta: Option<std::collections::HashMap<Cow<'a, str>, serde_json::Value>>,
    #[serde(default)]
    finish_reason: Option<Cow<'a, str>>,
}

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""usage""#));
static ABORT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""abort""#));
static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""error""#));

impl Meter {
    /// Takes the next frame.
    pub fn feed(&mut self, frame: &[u8]) -> Result<Seen, EventTooLarge> {
        let mut seen = Seen::default();
        let Self {
            decoder,
            usage,
            done,
            cut,
            started,
        } = self;
        decoder.feed(frame, |data, end| {
            if data.trim_ascii() == b"[DONE]" {
                *done = true;
                seen.done = true;
                return;
            }
            let mut carries_answer = true;
            if may_matter(data)
                && let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data)
            {
                *usage = chunk.usage.or(*usage);
                carries_answer = chunk.usage.is_none() || !chunk.choices.is_empty();
                let found = cut_of(&chunk);
                if found.is_some() {
                    *cut = cut.or(found);
                    seen.cut_at = seen.cut_at.or(Some(end));
                    carries_answer = false;
                }
            }
            if carries_answer {
                seen.tokens += 1;
                *started = *started || !is_opening(data);
            }
        })?;
        Ok(seen)
    }

    /// Whether some event carried more than the opening role: from here on another backend cannot take over without
    /// the caller seeing it.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Whether `[DONE]` came.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Whether and how the backend gave up.
    pub fn cut(&self) -> Option<Cut> {
        self.cut
    }

    /// The last usage that was reported.
    pub fn usage(&self) -> Option<Usage> {
        self.usage
    }

    /// Whether bytes of an unfinished event went through.
    pub fn is_inside_event(&self) -> bool {
        self.decoder.is_inside_event()
    }
}

fn may_matter(data: &[u8]) -> bool {
    USAGE.find(data).is_some() || ABORT.find(data).is_some() || ERROR.find(data).is_some()
}

fn cut_of(chunk: &Chunk<'_>) -> Option<Cut> {
    if chunk.error.is_some() {
        Some(Cut::Error)
    } else if chunk
        .choices
        .iter()
        .any(|choice| choice.finish_reason.as_deref() == Some("abort"))
    {
        Some(Cut::Abort)
    } else {
        None
    }
}

fn is_opening(data: &[u8]) -> bool {
    memchr::memmem::find(data, br#""role""#).is_some()
        && serde_json::from_slice::<Opening<'_>>(data).is_ok_and(|opening| {
            !opening.choices.is_empty()
                && opening.choices.iter().all(|choice| {
                    choice.finish_reason.is_none()
                        && choice.delta.as_ref().is_some_and(|delta| {
                            delta.iter().all(|(key, value)| {
                                key == "role" || value.is_null() || value.as_str() == Some("")
                            })
                        })
                })
        })
}

/// What a whole JSON answer says: its usage, and whether the backend gave up.
pub fn of_whole(body: &[u8]) -> (Option<Usage>, Option<Cut>) {
    if !may_matter(body) {
        return (None, None);
    }
    match serde_json::from_slice::<Chunk<'_>>(body) {
        Ok(chunk) => {
            let cut = cut_of(&chunk);
            (chunk.usage, cut)
        }
        Err(_) => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
    const WORD: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hi \\\"usage\\\" \\\"abort\\\"\"},\"finish_reason\":null}]}\n\n";
    const ABORT: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"abort\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2,\"total_tokens\":9}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn feed(text: &str) -> (Meter, u32) {
        let mut meter = Meter::default();
        let tokens = text
            .as_bytes()
            .chunks(7)
            .map(|chunk| meter.feed(chunk).unwrap().tokens)
            .sum();
        (meter, tokens)
    }

    #[test]
    fn a_whole_stream_ends_with_its_usage() {
        let (meter, tokens) = feed(&[ROLE, WORD, WORD, USAGE, DONE].concat());
        assert_eq!(tokens, 3);
        assert!(meter.is_done() && meter.cut().is_none());
        assert_eq!(
            meter.usage(),
            Some(Usage {
                prompt_tokens: 7,
                completion_tokens: 2
            })
        );
    }

    #[test]
    fn the_opening_role_is_not_yet_an_answer() {
        assert!(!feed(ROLE).0.has_started());
        assert!(feed(&[ROLE, WORD].concat()).0.has_started());
        assert!(feed(WORD).0.has_started());
        let greeting = ROLE.replace("\"content\":\"\"", "\"content\":\"Hi\"");
        assert!(feed(&greeting).0.has_started());
        assert!(
            feed("data: {\"choices\":[{\"text\":\"role \\\"role\\\"\"}]}\n\n")
                .0
                .has_started()
        );
    }

    #[test]
    fn abort_is_a_cut_though_done_follows() {
        let (meter, _) = feed(&[ROLE, ABORT, DONE].concat());
        assert_eq!(meter.cut(), Some(Cut::Abort));
        assert!(!meter.has_started());
        let mut meter = Meter::default();
        let text = [WORD, ABORT, DONE].concat();
        let seen = meter.feed(text.as_bytes()).unwrap();
        assert_eq!(seen.cut_at, Some(WORD.len() + ABORT.len()));
    }

    #[test]
    fn an_error_event_is_a_cut() {
        let (meter, _) = feed(&[WORD, "data: {\"error\":{\"message\":\"x\"}}\n\n", DONE].concat());
        assert_eq!(meter.cut(), Some(Cut::Error));
        let (meter, _) = feed(&WORD.replace("\"choices\"", "\"error\":null,\"choices\""));
        assert_eq!(meter.cut(), None);
    }

    #[test]
    fn a_whole_answer_is_read_once() {
        let body = br#"{"choices":[{"finish_reason":"stop","message":{"content":"\"abort\""}}],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#;
        assert_eq!(
            of_whole(body),
            (
                Some(Usage {
                    prompt_tokens: 3,
                    completion_tokens: 4
                }),
                None
            )
        );
        let body = br#"{"choices":[{"finish_reason":"abort"}],"usage":null}"#;
        assert_eq!(of_whole(body), (None, Some(Cut::Abort)));
        assert_eq!(of_whole(b"\xff\"usage\""), (None, None));
    }
}
