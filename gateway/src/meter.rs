//! `Meter`: what an answer's bytes say while they pass through: whether it ended, how many tokens it used, whether
//! it was cut. Sans I/O; the bytes themselves are never changed.
//!
//! Each event is parsed once: for what it says, which tells too whether it is JSON at all.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use self::fault::Fault;
use crate::openai::Wire;
use crate::sse::{Decoder, EventTooLarge, MAX_PICTURE_BYTES};

mod events;
pub(crate) mod fault;

/// Tokens as the backend counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, those that a cache of the backend held included.
    pub prompt_tokens: u64,
    /// Those of them that a cache of the backend held.
    pub cached_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
}

impl Usage {
    /// Of two attempts.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            cached_tokens: self.cached_tokens.saturating_add(other.cached_tokens),
            completion_tokens: self
                .completion_tokens
                .saturating_add(other.completion_tokens),
        }
    }
}

/// What chat completions and Responses say of a prompt's tokens.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Option<u64>,
}

/// The members by which protocols count.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: Option<u64>,
    #[serde(default)]
    completion_tokens: Option<u64>,
    #[serde(default)]
    input_tokens: Option<u64>,
    #[serde(default)]
    output_tokens: Option<u64>,
    // Anthropic counts what its prompt cache read and wrote apart.
    #[serde(default)]
    cache_creation_input_tokens: Option<u64>,
    #[serde(default)]
    cache_read_input_tokens: Option<u64>,
    #[serde(default)]
    prompt_tokens_details: Option<Details>,
    #[serde(default)]
    input_tokens_details: Option<Details>,
}

impl Counts {
    fn usage(self) -> Usage {
        let written = self.cache_creation_input_tokens.unwrap_or(0);
        let read = self.cache_read_input_tokens.unwrap_or(0);
        let prompt = self.prompt_tokens.or(self.input_tokens).unwrap_or(0);
        Usage {
            prompt_tokens: prompt.saturating_add(written).saturating_add(read),
            cached_tokens: self.cached().unwrap_or(0),
            completion_tokens: self.completion_tokens.or(self.output_tokens).unwrap_or(0),
        }
    }

    fn cached(self) -> Option<u64> {
        let details = self.prompt_tokens_details.or(self.input_tokens_details);
        self.cache_read_input_tokens
            .or_else(|| details.and_then(|details| details.cached_tokens))
    }

    /// What came later counts, where it says anything.
    fn over(self, before: Self) -> Self {
        let creation = self.cache_creation_input_tokens;
        let read = self.cache_read_input_tokens;
        Self {
            prompt_tokens: self.prompt_tokens.or(before.prompt_tokens),
            completion_tokens: self.completion_tokens.or(before.completion_tokens),
            input_tokens: self.input_tokens.or(before.input_tokens),
            output_tokens: self.output_tokens.or(before.output_tokens),
            cache_creation_input_tokens: creation.or(before.cache_creation_input_tokens),
            cache_read_input_tokens: read.or(before.cache_read_input_tokens),
            prompt_tokens_details: self.prompt_tokens_details.or(before.prompt_tokens_details),
            input_tokens_details: self.input_tokens_details.or(before.input_tokens_details),
        }
    }
}

/// What the bytes of one frame meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Events that carried part of an answer.
    pub tokens: u32,
    /// There was more than signs that the connection is there.
    pub is_progress: bool,
    /// The offset of the event with which the answer begins, if it is here.
    pub starts_at: Option<usize>,
    /// The backend gave up; the offset behind the event that says so.
    pub cut_at: Option<usize>,
    /// The offset from which on bytes belong to an unfinished event.
    pub open_at: usize,
    /// Events that not every caller can, or wants to, read, in order.
    pub odd: Vec<(Range<usize>, Odd)>,
}

impl Seen {
    /// Where something is first missing: an event that cannot be read, or all after the one that gives up.
    pub fn first_gap(&self) -> Option<usize> {
        let mut odd = self.odd.iter();
        let unread = odd.find(|(_, odd)| *odd != Odd::Count);
        let unread = unread.map(|(place, _)| place.start);
        unread.into_iter().chain(self.cut_at).min()
    }
}

/// What is odd about an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Odd {
    /// It counts tokens and does nothing else, which chat completions do for those who ask for it.
    Count,
    /// It is no JSON. Callers' decoders break at it.
    NoJson,
    /// It is not even text.
    NoText,
}

/// How a backend gave up inside an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// `finish_reason: abort`: vLLM is stopping. Status 200 and `[DONE]` around it do not make it an end.
    Abort,
    /// An event with an `error` member.
    Error,
    /// One that says that the backend itself failed.
    Failure,
    /// One that says that the gateway is over its limit there.
    Limit,
}

/// Follows one event stream.
#[derive(Debug, Default)]
pub struct Meter {
    wire: Wire,
    decoder: Decoder,
    counts: Option<Counts>,
    done: bool,
    cut: Option<Cut>,
    /// What the event said that cut it.
    last_words: Vec<u8>,
    started: bool,
    /// The choices of which something came, and those that said why they ended; a bit for each index.
    opened: u128,
    ended: u128,
}

/// What one event meant.
#[derive(Default)]
struct Meaning {
    counts: Option<Counts>,
    carries: Carries,
    /// It is more than an opening.
    starts: bool,
    /// The choices that it has, and those that it ends; a bit for each index.
    opens: u128,
    ends: u128,
    done: bool,
    cut: Option<Cut>,
    odd: Option<Odd>,
}

/// What an event is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Carries {
    /// It says that the connection is there, and no more.
    Nothing,
    /// Something about the answer.
    #[default]
    Other,
    /// A part of it: text, thoughts, a call of a tool.
    Token,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Choices<'a>,
    #[serde(default)]
    usage: Option<Counts>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
    /// Azure's verdict on the prompt, in a first chunk without choices.
    #[serde(default)]
    prompt_filter_results: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

/// What a chunk's choices say together; engines send one at a time. Collecting them would cost a fifth of the parse.
#[derive(Default)]
struct Choices<'a> {
    count: usize,
    /// What the last one holds.
    delta: Option<&'a RawValue>,
    /// A bit for the index of each.
    opens: u128,
    /// The same of those that say why they ended.
    ends: u128,
    /// One ended because its engine stopped.
    aborts: bool,
}

impl<'de: 'a, 'a> Deserialize<'de> for Choices<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<'a>(PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for List<'a> {
            type Value = Choices<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of choices")
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut list: S) -> Result<Choices<'a>, S::Error> {
                let mut choices = Choices::default();
                while let Some(choice) = list.next_element::<Choice<'a>>()? {
                    choices.count += 1;
                    choices.delta = choice.delta;
                    // Nobody asks for so many that two share the last bit.
                    let bit = 1 << choice.index.min(u128::BITS - 1);
                    choices.opens |= bit;
                    if choice.finish_reason.is_some() {
                        choices.ends |= bit;
                    }
                    choices.aborts |= choice.finish_reason.as_deref() == Some("abort");
                }
                Ok(choices)
            }
        }
        deserializer.deserialize_seq(List(PhantomData))
    }
}

const DONE_DATA: &[u8] = b"[DONE]";

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""usage""#));
static ABORT: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""abort""#));
static ERROR: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(br#""error""#));

impl Meter {
    /// For a stream made of `wire`.
    pub fn new(wire: Wire) -> Self {
        let decoder = match wire {
            Wire::Media => Decoder::up_to(MAX_PICTURE_BYTES),
            _ => Decoder::default(),
        };
        Self {
            wire,
            decoder,
            ..Self::default()
        }
    }

    /// Takes the next frame.
    pub fn feed(&mut self, frame: &[u8]) -> Result<Seen, EventTooLarge> {
        let mut seen = Seen::default();
        let Self {
            wire,
            decoder,
            counts,
            done,
            cut,
            last_words,
            started,
            opened,
            ended,
        } = self;
        let end = decoder.feed(frame, |data, place| {
            let meaning = of_event(*wire, data, *started);
            let start = place.start;
            if let Some(now) = meaning.counts {
                *counts = Some(now.over(counts.unwrap_or_default()));
            }
            if meaning.cut.is_some() {
                if cut.is_none() {
                    *last_words = data.to_vec();
                }
                *cut = cut.or(meaning.cut);
                seen.cut_at = seen.cut_at.or(Some(place.end));
            }
            if let Some(odd) = meaning.odd {
                seen.odd.push((place, odd));
            }
            seen.tokens += u32::from(meaning.carries == Carries::Token);
            seen.is_progress |= meaning.carries != Carries::Nothing;
            if meaning.starts && !*started {
                seen.starts_at = Some(start);
            }
            *started |= meaning.starts;
            *opened |= meaning.opens;
            *ended |= meaning.ends;
            *done |= meaning.done;
        })?;
        seen.open_at = end;
        // Of a large event each part counts; a comment is none.
        seen.is_progress |= decoder.is_inside_event();
        Ok(seen)
    }

    /// Whether some event carried more than the opening role: from here on another backend cannot take over without
    /// the caller seeing it.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Whether the stream's proper end came: `[DONE]`, or the event that stands for it.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Whether an answer of so many choices is whole though its stream has no proper end: some backends send no
    /// `[DONE]`.
    pub fn lacks_done_only(&self, choices: u32) -> bool {
        let opened = self.opened.count_ones();
        let has_all = opened >= choices.clamp(1, u128::BITS) && self.ended == self.opened;
        has_all && !self.done && self.cut.is_none() && !self.is_inside_event()
    }

    /// Whether all that is missing is the empty line behind the last event.
    pub fn lacks_last_line_only(&self) -> bool {
        let is_last = |data: &[u8]| data.trim_ascii() == DONE_DATA;
        let says_done =
            self.wire != Wire::Messages && self.decoder.open_data().is_some_and(is_last);
        says_done && !self.done && self.cut.is_none()
    }

    /// Whether and how the backend gave up.
    pub fn cut(&self) -> Option<Cut> {
        self.cut
    }

    /// What the event said with which the backend gave up; empty if it did not.
    pub fn last_words(&self) -> &[u8] {
        &self.last_words
    }

    /// The last usage that was reported.
    pub fn usage(&self) -> Option<Usage> {
        self.counts.map(Counts::usage)
    }

    /// Whether bytes of an unfinished event went through.
    pub fn is_inside_event(&self) -> bool {
        self.decoder.is_inside_event()
    }
}

fn of_event(wire: Wire, data: &[u8], started: bool) -> Meaning {
    match wire {
        Wire::Media => return events::of_media(data),
        Wire::Plain => return events::plain(),
        Wire::Chunks | Wire::Responses | Wire::Messages => {}
    }
    if data.trim_ascii() == DONE_DATA {
        return Meaning {
            // A message ends with an event of its own.
            done: wire != Wire::Messages,
            ..Meaning::default()
        };
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return Meaning {
            odd: Some(Odd::NoText),
            ..Meaning::default()
        };
    };
    let read = match wire {
        Wire::Chunks | Wire::Media | Wire::Plain => of_chunk(text, started),
        Wire::Responses => events::of_response(text),
        Wire::Messages => events::of_message(text),
    };
    read.unwrap_or_else(|_| of_other(wire, text))
}

/// An event that is not of its protocol's shape: no JSON, or one that is new. Rare enough to be read twice.
fn of_other(wire: Wire, text: &str) -> Meaning {
    if serde_json::from_str::<IgnoredAny>(text).is_err() {
        return Meaning {
            odd: Some(Odd::NoJson),
            ..Meaning::default()
        };
    }
    let is_chunk = wire == Wire::Chunks;
    Meaning {
        carries: if is_chunk {
            Carries::Token
        } else {
            Carries::Other
        },
        starts: is_chunk,
        ..Meaning::default()
    }
}

fn of_chunk(text: &str, started: bool) -> Result<Meaning, serde_json::Error> {
    let chunk: Chunk<'_> = serde_json::from_str(text)?;
    let cut = cut_of(&chunk);
    if cut.is_some() {
        return Ok(Meaning {
            counts: chunk.usage,
            cut,
            ..Meaning::default()
        });
    }
    let has_choices = chunk.choices.count > 0;
    let says_other = chunk.usage.is_some() || chunk.prompt_filter_results.is_some();
    let token = has_choices || !says_other;
    let counts_only = chunk.usage.is_some() && !has_choices;
    Ok(Meaning {
        counts: chunk.usage,
        carries: if token {
            Carries::Token
        } else {
            Carries::Other
        },
        starts: token && (started || !is_opening(&chunk.choices)),
        opens: chunk.choices.opens,
        ends: chunk.choices.ends,
        odd: counts_only.then_some(Odd::Count),
        ..Meaning::default()
    })
}

fn may_matter(data: &[u8]) -> bool {
    USAGE.find(data).is_some() || ABORT.find(data).is_some() || ERROR.find(data).is_some()
}

fn cut_of(chunk: &Chunk<'_>) -> Option<Cut> {
    let told = chunk.error.map(|error| cut_by(error.get()));
    told.or(chunk.choices.aborts.then_some(Cut::Abort))
}

/// How the backend gave up that says `error`.
fn cut_by(error: &str) -> Cut {
    match fault::of(error) {
        Fault::Backend | Fault::Overloaded => Cut::Failure,
        Fault::Limit => Cut::Limit,
        Fault::Other => Cut::Error,
    }
}

/// What may come before an answer: a role and nothing else, or no choices at all (Azure's verdict on the prompt). Asked
/// until the answer starts, so its parse of what the chunk holds is that of an event or two.
fn is_opening(choices: &Choices<'_>) -> bool {
    type Delta<'a> = HashMap<Cow<'a, str>, Value>;
    let is_void = |(name, value): (&Cow<'_, str>, &Value)| {
        name == "role" || value.is_null() || value.as_str() == Some("")
    };
    let delta = choices.delta.map(RawValue::get);
    let delta = delta.and_then(|delta| serde_json::from_str::<Delta<'_>>(delta).ok());
    match choices.count {
        0 => true,
        1 => choices.ends == 0 && delta.is_some_and(|delta| delta.iter().all(is_void)),
        _ => false,
    }
}

/// What a whole JSON answer says: its usage, and whether the backend gave up.
pub fn of_whole(body: &[u8]) -> (Option<Usage>, Option<Cut>) {
    if !may_matter(body) {
        return (None, None);
    }
    match serde_json::from_slice::<Chunk<'_>>(body) {
        Ok(chunk) => {
            let cut = cut_of(&chunk);
            (chunk.usage.map(Counts::usage), cut)
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
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2,\"total_tokens\":9,\"prompt_tokens_details\":{\"cached_tokens\":5}}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn an_end_without_its_empty_line_is_known() {
        for (text, expected) in [
            ("data: [DONE]", true),
            ("data: [DONE]\n", true),
            ("data:[DONE]\r\n", true),
            ("data: [DONE]\n\n", false),
            ("data: [DON", false),
            ("data: x\ndata: [DONE]", false),
            ("data: x", false),
            ("", false),
        ] {
            let mut meter = Meter::new(Wire::Chunks);
            meter.feed(text.as_bytes()).unwrap();
            assert_eq!(meter.lacks_last_line_only(), expected, "{text}");
        }
    }

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
                cached_tokens: 5,
                completion_tokens: 2
            })
        );
    }

    #[test]
    fn an_answer_that_said_why_it_ended_lacks_only_its_mark() {
        let end = "data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"stop\"}]}\n\n";
        assert!(feed(&[ROLE, WORD, end].concat()).0.lacks_done_only(1));
        assert!(!feed(&[ROLE, WORD].concat()).0.lacks_done_only(1));
        assert!(!feed(&[ROLE, WORD, end, DONE].concat()).0.lacks_done_only(1));
        assert!(!feed(&[ROLE, ABORT].concat()).0.lacks_done_only(1));
        assert!(
            !feed(&[ROLE, WORD, end, "data: {\"cho"].concat())
                .0
                .lacks_done_only(1)
        );
    }

    #[test]
    fn of_several_choices_all_have_to_end() {
        let end = |index: u8| {
            format!(
                "data: {{\"choices\":[{{\"index\":{index},\"delta\":{{}},\"finish_reason\":\"stop\"}}]}}\n\n"
            )
        };
        let other = ROLE.replace("\"index\":0", "\"index\":1");
        let begun = [ROLE, &other, WORD, &end(0)].concat();
        assert!(!feed(&begun).0.lacks_done_only(1));
        let both = feed(&(begun + &end(1))).0;
        assert!(both.lacks_done_only(2) && !both.lacks_done_only(3));
        let first = feed(&[ROLE, WORD, &end(0)].concat()).0;
        assert!(first.lacks_done_only(1) && !first.lacks_done_only(2));
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
    fn what_azure_says_of_the_prompt_is_not_yet_an_answer() {
        let filter = "data: {\"choices\":[],\"created\":0,\"id\":\"\",\"model\":\"\",\"object\":\"\",\"prompt_filter_results\":[{\"prompt_index\":0}]}\n\n";
        let (meter, tokens) = feed(&[filter, ROLE].concat());
        assert!(!meter.has_started() && tokens == 1);
        assert!(feed(&[filter, WORD].concat()).0.has_started());
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
                    cached_tokens: 0,
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
