//! How much an answer may take at most: that is what a hard limit reserves. Pure.
//!
//! A token of a prompt is at least one byte of it (byte-level BPE, and every other tokenizer of today's models), and
//! what templates put around messages is less than their names in JSON.

use std::borrow::Cow;

use bytes::Bytes;
use memchr::memmem;
use penstock_core::config::{Bounds, OnExceed, Parameters};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::Took;
use crate::edits::{Edits, given};
use crate::openai::{Api, Call, Encoding};
use crate::parameters;
use crate::reject::Reject;

/// What templates put before a conversation: today's date, what the model is called. The longest that we know, of
/// gpt-oss, has about 90 tokens.
const TEMPLATE_TOKENS: u64 = 256;
/// What a picture, a sound or a file may have where its bytes do not tell. Qwen2.5-VL has up to 16,384 for a picture;
/// OpenAI and Anthropic less than 2,000.
const MEDIA_TOKENS: u64 = 16_384;
/// What parts of a message say that are no text.
const MEDIA: [&[u8]; 10] = [
    b"\"image_url\"",
    b"\"input_image\"",
    b"\"image\"",
    b"\"input_audio\"",
    b"\"audio_url\"",
    b"\"video_url\"",
    b"\"input_file\"",
    b"\"file\"",
    b"\"document\"",
    b"\"file_id\"",
];
/// Shorter answers are not worth being sent for.
pub(crate) const LEAST_OUTPUT_TOKENS: u32 = 16;

/// How much a request may take, if that can be told, and is likely to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) most: Result<Took, Unbounded>,
    pub(crate) likely: Took,
    /// Answers to it, each as long as it may be.
    pub(crate) answers: u64,
}

/// Why nothing can be said of how much a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unbounded(pub(crate) &'static str);

#[derive(Deserialize)]
struct View<'a> {
    #[serde(borrow, default, deserialize_with = "given")]
    max_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    max_completion_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    max_output_tokens: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    n: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    best_of: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    previous_response_id: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    conversation: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    input: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    prompt: Option<&'a RawValue>,
    /// What `documents` or `text_2` are compared with.
    #[serde(borrow, default, deserialize_with = "given")]
    query: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    text_1: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    documents: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    text_2: Option<&'a RawValue>,
}

impl<'a> View<'a> {
    /// The prompt of a call of `api`. Backends leave out what other protocols call it.
    fn prompt_of(&self, api: Api) -> &'a [u8] {
        let prompt = match api {
            Api::Completions => self.prompt,
            Api::Responses => self.input,
            _ => self.messages,
        };
        prompt.map_or(&[], |raw| raw.get().as_bytes())
    }

    /// What bounds an answer of `api`: backends may take any of these, and none of another protocol's.
    fn bounds_of(&self, api: Api) -> [Option<&'a RawValue>; 2] {
        match api {
            Api::Chat => [self.max_completion_tokens, self.max_tokens],
            Api::Responses => [self.max_output_tokens, None],
            _ => [self.max_tokens, None],
        }
    }
}

/// The same members, as a body has them that hides nothing.
fn names_of_bounds(api: Api) -> &'static [&'static [u8]] {
    match api {
        Api::Chat => &[b"\"max_completion_tokens\"", b"\"max_tokens\""],
        Api::Responses => &[b"\"max_output_tokens\""],
        _ => &[b"\"max_tokens\""],
    }
}

/// Whether its answer is a text that can be told how long it may be.
fn makes_text(api: Api) -> bool {
    matches!(
        api,
        Api::Chat | Api::Completions | Api::Responses | Api::Messages
    )
}

/// A body that is not as it was, and which members are not.
pub(crate) type Edited = (Bytes, Vec<String>);

/// Gives a request that does not bound its answer a bound of `most` tokens; `None` where it has one.
pub(crate) fn fill(
    api: Api,
    call: &Call<'_>,
    body: &[u8],
    most: u32,
) -> Result<Option<Edited>, Reject> {
    if !makes_text(api) || call.encoding != Encoding::Json {
        return Ok(None);
    }
    // A quick look; where it is mistaken, `of` finds no bound.
    let mut names = names_of_bounds(api).iter();
    if call.max_tokens.is_some() && names.any(|name| memmem::find(body, name).is_some()) {
        return Ok(None);
    }
    // What completions have that say nothing is their protocol's.
    let default = if api == Api::Completions {
        most.min(parameters::COMPLETION_TOKENS)
    } else {
        most
    };
    let bounds = Bounds {
        default: Some(default),
        ..Bounds::default()
    };
    edited(api, body, bounds)
}

/// The request with an answer of `most` tokens at most.
pub(crate) fn shorten(api: Api, body: &[u8], most: u32) -> Result<Option<Edited>, Reject> {
    let bounds = Bounds {
        max: Some(most),
        default: Some(most),
        ..Bounds::default()
    };
    edited(api, body, bounds)
}

fn edited(api: Api, body: &[u8], bounds: Bounds) -> Result<Option<Edited>, Reject> {
    let parameters = Parameters {
        max_output_tokens: bounds,
        on_exceed: OnExceed::Clamp,
        ..Parameters::default()
    };
    let (mut edits, mut changed) = (Edits::default(), Vec::new());
    parameters::limit(api, &parameters, body, &mut edits, &mut changed)?;
    Ok((!edits.is_empty()).then(|| (edits.apply(body), changed)))
}

/// How much `call`, whose text is `body`, may take, where an answer is likely to have `length` tokens at most.
pub(crate) fn of(api: Api, call: &Call<'_>, body: &[u8], length: u32) -> Bound {
    let most = most(api, call, body);
    let (most, answers) = (
        most.map(|(most, _)| most),
        most.map_or(1, |(_, answers)| answers),
    );
    let prompt = if matches!(api, Api::CountTokens) {
        0
    } else {
        call.prompt_tokens
    };
    let answer = if makes_text(api) {
        u64::from(call.max_tokens.map_or(length, |most| most.min(length)))
    } else {
        0
    };
    Bound {
        most,
        likely: Took {
            input: prompt.into(),
            cached: 0,
            output: answer.saturating_mul(answers),
        },
        answers,
    }
}

/// The most that it may take, and in how many answers.
fn most(api: Api, call: &Call<'_>, body: &[u8]) -> Result<(Took, u64), Unbounded> {
    let bytes = u64::try_from(body.len()).unwrap_or(u64::MAX);
    if matches!(api, Api::CountTokens) {
        return Ok(without_answer(0));
    }
    if call.encoding == Encoding::Form || matches!(api, Api::Speech | Api::Http) {
        return Err(Unbounded("what this call makes has no bound in tokens"));
    }
    let view: View<'_> =
        serde_json::from_slice(body).map_err(|_| Unbounded("its body cannot be read"))?;
    match api {
        Api::Embeddings => Ok(without_answer(bytes)),
        Api::Rerank | Api::Score => {
            let compared = pairs(&view);
            Ok(without_answer(bytes.saturating_add(compared)))
        }
        _ if makes_text(api) => text(api, &view, bytes),
        _ => Err(Unbounded("what this call makes has no bound in tokens")),
    }
}

fn without_answer(input: u64) -> (Took, u64) {
    let took = Took {
        input,
        ..Took::default()
    };
    (took, 1)
}

/// What is compared with each of several texts is read with each of them.
fn pairs(view: &View<'_>) -> u64 {
    let length = |raw: Option<&RawValue>| {
        u64::try_from(raw.map_or(0, |raw| raw.get().len())).unwrap_or(u64::MAX)
    };
    let one = length(view.query).max(length(view.text_1));
    let others = items(view.documents).max(items(view.text_2));
    one.saturating_mul(others)
        .saturating_add(TEMPLATE_TOKENS.saturating_mul(others))
}

/// How many a list has; one for what is no list.
fn items(raw: Option<&RawValue>) -> u64 {
    let list = raw.and_then(|raw| serde_json::from_str::<Vec<IgnoredAny>>(raw.get()).ok());
    list.map_or(1, |list| u64::try_from(list.len()).unwrap_or(u64::MAX))
}

fn text(api: Api, view: &View<'_>, bytes: u64) -> Result<(Took, u64), Unbounded> {
    let is_said = |raw: Option<&RawValue>| raw.is_some_and(|raw| raw.get() != "null");
    if is_said(view.previous_response_id) || is_said(view.conversation) {
        return Err(Unbounded(
            "it goes on with what its backend keeps, which is not known here",
        ));
    }
    let said = view.bounds_of(api).into_iter().flatten();
    let said = said.filter(|raw| raw.get() != "null");
    let mut longest = None;
    for raw in said {
        let value: Result<u64, _> = raw.get().parse();
        let value = value.map_err(|_| Unbounded("its limit of tokens is not a whole number"))?;
        longest = Some(longest.unwrap_or(0).max(value));
    }
    let output = longest.ok_or(Unbounded("it does not say how long its answer may be"))?;
    let several = |raw: Option<&RawValue>| {
        let raw = raw.filter(|raw| raw.get() != "null");
        raw.map_or(Ok(1), |raw| raw.get().parse::<u64>())
            .map_err(|_| Unbounded("'n' or 'best_of' is not a whole number"))
    };
    let mut answers = several(view.n)?.max(several(view.best_of)?).max(1);
    if api == Api::Completions {
        answers = answers.saturating_mul(prompts(view.prompt_of(api)));
    }
    let media = u64::try_from(media(view.prompt_of(api))).unwrap_or(u64::MAX);
    let input = bytes
        .saturating_add(TEMPLATE_TOKENS)
        .saturating_add(media.saturating_mul(MEDIA_TOKENS));
    let output = output.saturating_mul(answers);
    let took = Took {
        input,
        cached: 0,
        output,
    };
    Ok((took, answers))
}

/// A list of texts, or of lists of tokens, is a prompt each; a list of tokens is one.
fn prompts(prompt: &[u8]) -> u64 {
    let list: Result<Vec<&RawValue>, _> = serde_json::from_slice(prompt);
    let Ok(list) = list else { return 1 };
    let is_prompt = |raw: &&RawValue| raw.get().starts_with(['"', '[', '{']);
    let several = list.into_iter().filter(is_prompt).count();
    u64::try_from(several).unwrap_or(u64::MAX).max(1)
}

fn media(prompt: &[u8]) -> usize {
    let prompt = spelled(prompt);
    let kinds = MEDIA.iter();
    kinds
        .map(|kind| memmem::find_iter(&prompt, kind).count())
        .sum()
}

/// A JSON text without the escapes that nobody needs (`\u005f`): names could hide behind them.
fn spelled(text: &[u8]) -> Cow<'_, [u8]> {
    const ESCAPE: &[u8] = b"\\u00";
    if memmem::find(text, ESCAPE).is_none() {
        return Cow::Borrowed(text);
    }
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = memmem::find(rest, ESCAPE) {
        let (before, escape) = rest.split_at(at);
        plain.extend_from_slice(before);
        let digits = escape.get(ESCAPE.len()..ESCAPE.len() + 2);
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let letter = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let letter = letter.filter(|letter| letter.is_ascii_alphanumeric() || *letter == b'_');
        let digits = usize::from(letter.is_some()) * 2;
        match letter {
            Some(letter) => plain.push(letter),
            None => plain.extend_from_slice(ESCAPE),
        }
        rest = escape.get(ESCAPE.len() + digits..).unwrap_or_default();
    }
    plain.extend_from_slice(rest);
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(api: Api, body: &str) -> Bound {
        let call = Call::parse(body.as_bytes()).unwrap();
        of(api, &call, body.as_bytes(), 200)
    }

    fn output(api: Api, body: &str) -> u64 {
        bound(api, body).most.unwrap().output
    }

    #[test]
    fn an_answer_is_as_long_as_any_of_its_bounds_lets_it_be() {
        for (api, body, tokens) in [
            (Api::Chat, r#"{"model":"m","max_tokens":7}"#, 7),
            (
                Api::Chat,
                r#"{"model":"m","max_tokens":7,"max_completion_tokens":9}"#,
                9,
            ),
            (Api::Chat, r#"{"model":"m","max_tokens":7,"n":3}"#, 21),
            (Api::Responses, r#"{"model":"m","max_output_tokens":7}"#, 7),
            (Api::Messages, r#"{"model":"m","max_tokens":7}"#, 7),
            (
                Api::Completions,
                r#"{"model":"m","max_tokens":7,"n":2,"best_of":3}"#,
                21,
            ),
            (
                Api::Completions,
                r#"{"model":"m","max_tokens":7,"prompt":["a","b"],"n":2}"#,
                28,
            ),
            (
                Api::Completions,
                r#"{"model":"m","max_tokens":7,"prompt":[1,2,3]}"#,
                7,
            ),
            (
                Api::Completions,
                r#"{"model":"m","max_tokens":7,"prompt":[[1,2],[3]]}"#,
                14,
            ),
            (Api::Embeddings, r#"{"model":"m","input":"text"}"#, 0),
            (Api::CountTokens, r#"{"model":"m","messages":[]}"#, 0),
            // What other protocols call it bounds nothing, and is no prompt.
            (
                Api::Completions,
                r#"{"model":"m","max_tokens":7,"messages":"x","prompt":["a","b"]}"#,
                14,
            ),
        ] {
            assert_eq!(output(api, body), tokens, "{body}");
        }
    }

    #[test]
    fn members_of_other_protocols_bound_nothing() {
        for (api, body, member) in [
            (
                Api::Responses,
                r#"{"model":"m","max_tokens":1,"max_completion_tokens":1}"#,
                "max_output_tokens",
            ),
            (
                Api::Chat,
                r#"{"model":"m","max_output_tokens":1}"#,
                "max_completion_tokens",
            ),
            (
                Api::Chat,
                r#"{"model":"m","max_output_tokens":1,"metadata":{"max\u005ftokens":"1"}}"#,
                "max_completion_tokens",
            ),
            (
                Api::Messages,
                r#"{"model":"m","max_output_tokens":1}"#,
                "max_tokens",
            ),
        ] {
            assert!(bound(api, body).most.is_err(), "{body}");
            let call = Call::parse(body.as_bytes()).unwrap();
            let (filled, _) = fill(api, &call, body.as_bytes(), 100).unwrap().unwrap();
            let filled = std::str::from_utf8(&filled).unwrap();
            assert!(filled.contains(&format!(r#""{member}":100"#)), "{filled}");
            assert_eq!(output(api, filled), 100);
        }
        // A text that looks like one is refused, not sent.
        let body = r#"{"model":"m","max_output_tokens":1,"metadata":{"max_tokens":"1"}}"#;
        assert!(bound(Api::Chat, body).most.is_err());
    }

    #[test]
    fn what_has_no_bound_is_told() {
        for (api, body) in [
            (Api::Chat, r#"{"model":"m"}"#),
            (Api::Chat, r#"{"model":"m","max_tokens":null}"#),
            (Api::Chat, r#"{"model":"m","max_tokens":-1}"#),
            (Api::Chat, r#"{"model":"m","max_tokens":"7"}"#),
            (Api::Chat, r#"{"model":"m","max_tokens":7,"n":1.5}"#),
            (
                Api::Responses,
                r#"{"model":"m","max_output_tokens":7,"previous_response_id":"r"}"#,
            ),
            (Api::Speech, r#"{"model":"m","input":"x"}"#),
            (Api::ImageGeneration, r#"{"model":"m","prompt":"x"}"#),
        ] {
            assert!(bound(api, body).most.is_err(), "{body}");
        }
    }

    #[test]
    fn a_prompt_has_no_more_tokens_than_bytes_unless_it_shows_something() {
        let body = r#"{"model":"m","max_tokens":7,"messages":[{"role":"user","content":"Hello"}]}"#;
        let plain = bound(Api::Chat, body);
        let most = plain.most.unwrap().input;
        assert_eq!(most, body.len() as u64 + TEMPLATE_TOKENS);
        assert!(plain.likely.input < most);
        let shows = r#"{"model":"m","max_tokens":7,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#;
        assert!(bound(Api::Chat, shows).most.unwrap().input > MEDIA_TOKENS);
        let hidden = shows.replace("image_url", r"im\u0061ge\u005furl");
        assert_ne!(hidden, shows);
        let hidden = hidden.replacen('{', r#"{"input":"x","#, 1);
        assert!(bound(Api::Chat, &hidden).most.unwrap().input > MEDIA_TOKENS);
        // The query is read with each document.
        let query = "q".repeat(100);
        let body = format!(r#"{{"model":"m","query":"{query}","documents":["a","b","c"]}}"#);
        assert!(bound(Api::Rerank, &body).most.unwrap().input > 300);
    }

    #[test]
    fn what_is_likely_is_known_without_a_bound() {
        for (api, body, tokens) in [
            (Api::Chat, r#"{"model":"m"}"#, 200),
            (Api::Chat, r#"{"model":"m","max_tokens":7}"#, 7),
            (Api::Chat, r#"{"model":"m","max_tokens":7000,"n":2}"#, 400),
            (
                Api::Responses,
                r#"{"model":"m","previous_response_id":"r"}"#,
                200,
            ),
            (Api::Embeddings, r#"{"model":"m","input":"text"}"#, 0),
            (Api::ImageGeneration, r#"{"model":"m","prompt":"x"}"#, 0),
        ] {
            assert_eq!(bound(api, body).likely.output, tokens, "{body}");
        }
    }

    #[test]
    fn an_answer_without_a_bound_gets_one() {
        let filled = |api, body: &str| {
            let call = Call::parse(body.as_bytes()).unwrap();
            let filled = fill(api, &call, body.as_bytes(), 100).unwrap();
            filled.map(|(body, _)| String::from_utf8(body.to_vec()).unwrap())
        };
        for (api, member, tokens) in [
            (Api::Chat, "max_completion_tokens", 100),
            (Api::Responses, "max_output_tokens", 100),
            (Api::Messages, "max_tokens", 100),
            (Api::Completions, "max_tokens", 16),
        ] {
            let body = filled(api, r#"{"model":"m"}"#).unwrap();
            assert_eq!(body, format!(r#"{{"{member}":{tokens},"model":"m"}}"#));
            assert_eq!(output(api, &body), tokens);
        }
        assert_eq!(filled(Api::Chat, r#"{"model":"m","max_tokens":7}"#), None);
        assert_eq!(filled(Api::Embeddings, r#"{"model":"m"}"#), None);
    }

    #[test]
    fn an_answer_can_be_made_shorter() {
        let body = br#"{"model":"m","max_tokens":700,"max_completion_tokens":20}"#;
        let (shorter, changed) = shorten(Api::Chat, body, 50).unwrap().unwrap();
        assert_eq!(changed, ["max_tokens"]);
        let expected = br#"{"model":"m","max_tokens":50,"max_completion_tokens":20}"#;
        assert_eq!(&shorter[..], expected);
        assert_eq!(shorten(Api::Chat, &shorter, 50).unwrap(), None);
    }
}
