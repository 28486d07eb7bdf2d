//! `Joint`: makes the events of a second stream the rest of a first one. Its opening is left out, ids and times are
//! those of the first, white space that the caller has is not given twice, tokens are counted as one answer's. All
//! other bytes stay. Sans I/O.

use bytes::{Bytes, BytesMut};
use memchr::memmem;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::delivered::{Chunk, Members, Names, is_void, text_of};
use crate::edits::{Edits, place};
use crate::meter::Usage;
use crate::sse::Decoder;

/// Between two streams.
#[derive(Debug)]
pub(super) struct Joint {
    decoder: Decoder,
    names: Names,
    /// White space at the end of the first stream that the second one may say again.
    space: String,
    first: First,
}

/// Tokens of the stream that was cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct First {
    /// As its engine counted them, if it did.
    pub(super) counted: Option<Usage>,
    /// Events that carried text.
    pub(super) events: u64,
    /// About what its prompt has.
    pub(super) prompt_tokens: u64,
}

impl First {
    /// Tokens of its answer. No text has fewer tokens than events.
    pub(super) fn tokens(&self) -> u64 {
        let counted = self.counted.map(|counted| counted.completion_tokens);
        self.events.max(counted.unwrap_or(0))
    }

    /// What it took, as far as that is known. The second prompt is the first one and its answer.
    pub(super) fn usage(&self, second_prompt_tokens: Option<u64>) -> Usage {
        let completion_tokens = self.tokens();
        let prompt = second_prompt_tokens.map(|prompt| prompt.saturating_sub(completion_tokens));
        let (prompt_tokens, cached_tokens) = self.counted.map_or_else(
            || (prompt.unwrap_or(self.prompt_tokens), 0),
            |counted| (counted.prompt_tokens, counted.cached_tokens),
        );
        Usage {
            prompt_tokens,
            cached_tokens,
            completion_tokens,
        }
    }
}

/// What becomes of an event.
enum Rest {
    Kept,
    LeftOut,
    /// It says something that does not go on with a text.
    Else,
    /// It has this data now.
    Changed(Bytes),
}

impl Joint {
    pub(super) fn new(names: Names, space: String, first: First) -> Self {
        Self {
            decoder: Decoder::default(),
            names,
            space,
            first,
        }
    }

    /// What the first attempt took; `second` is what the second one says of itself.
    pub(super) fn first(&self, second: Option<Usage>) -> Usage {
        self.first.usage(second.map(|second| second.prompt_tokens))
    }

    /// Takes whole events of the second stream and gives what goes out; `None` if they are not whole, since so large an
    /// event is no part of a text, or say something else than a text, such as thoughts.
    pub(super) fn pass(&mut self, events: &[u8]) -> Option<Bytes> {
        let Self {
            decoder,
            names,
            space,
            first,
        } = self;
        let mut out = BytesMut::with_capacity(events.len());
        let mut from = 0;
        let mut is_text = true;
        let open_at = decoder.feed(events, |data, at| {
            out.extend_from_slice(events.get(from..at.start).unwrap_or_default());
            from = at.end;
            let event = events.get(at).unwrap_or_default();
            match rest(data, names, space, first) {
                Rest::Kept => out.extend_from_slice(event),
                Rest::LeftOut => {}
                Rest::Else => is_text = false,
                Rest::Changed(new) => write(&mut out, event, data, &new),
            }
        });
        out.extend_from_slice(events.get(from..).unwrap_or_default());
        let is_whole = open_at == Ok(events.len());
        (is_whole && is_text).then(|| out.freeze())
    }
}

/// Writes `event` with `new` in the place of its `data`.
fn write(out: &mut BytesMut, event: &[u8], data: &[u8], new: &[u8]) {
    if let Some(at) = memmem::find(event, data) {
        out.extend_from_slice(event.get(..at).unwrap_or_default());
        out.extend_from_slice(new);
        out.extend_from_slice(event.get(at + data.len()..).unwrap_or_default());
    } else {
        // It came in several lines; in JSON what joins them is white space.
        out.extend_from_slice(b"data: ");
        out.extend(
            new.iter()
                .map(|byte| if *byte == b'\n' { b' ' } else { *byte }),
        );
        out.extend_from_slice(b"\n\n");
    }
}

fn rest(data: &[u8], names: &Names, space: &mut String, first: &First) -> Rest {
    let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) else {
        return Rest::Kept;
    };
    let mut edits = Edits::default();
    if let [choice] = &chunk.choices[..] {
        match join_choice(data, choice, space, &mut edits) {
            Some(true) => {}
            Some(false) => return Rest::LeftOut,
            None => return Rest::Else,
        }
    }
    let named = [
        (&names.id, chunk.id),
        (&names.created, chunk.created),
        (&names.model, chunk.model),
    ];
    for (wanted, found) in named {
        if let (Some(wanted), Some(found)) = (wanted, found)
            && **wanted != *found.get()
        {
            edits.replace(place(data, found.get()), wanted.to_string());
        }
    }
    if let Some((usage, sum)) = chunk
        .usage
        .and_then(|usage| Some((usage, sum(usage, first)?)))
    {
        edits.replace(place(data, usage.get()), sum);
    }
    if edits.is_empty() {
        Rest::Kept
    } else {
        Rest::Changed(edits.apply(data))
    }
}

/// Changes what is said twice in a choice. Whether anything is left of it then; `None` if it is more than a text.
fn join_choice(
    data: &[u8],
    choice: &Members<'_>,
    space: &mut String,
    edits: &mut Edits,
) -> Option<bool> {
    let delta = choice.get("delta");
    let delta: Option<Members<'_>> = delta.and_then(|delta| serde_json::from_str(delta.get()).ok());
    let in_delta = |name: &str| delta.as_ref().and_then(|delta| delta.get(name)).copied();
    let said = choice.get("text").copied().or_else(|| in_delta("content"));
    let mut has_text = said.is_some_and(|said| !is_void(said));
    if let Some(said) = said.filter(|_| !space.is_empty())
        && let Some(new) = text_of(said).and_then(|text| without(space, &text))
    {
        has_text = !new.is_empty();
        edits.replace(place(data, said.get()), Value::from(new).to_string());
    }
    let beside = |members: &Members<'_>, known: &[&str]| {
        let mut members = members.iter();
        members.any(|(name, value)| !known.contains(&&**name) && !is_void(value))
    };
    if delta
        .as_ref()
        .is_some_and(|delta| beside(delta, &["role", "content"]))
    {
        return None;
    }
    let says_more = beside(choice, &["index", "delta", "text"]);
    if let Some(role) =
        in_delta("role").filter(|_| delta.as_ref().is_some_and(|delta| delta.len() > 1))
    {
        edits.remove_member(data, place(data, role.get()));
    }
    Some(has_text || says_more)
}

/// `text` without what `space` begins with too, if that is anything; what is left of `space` may still come.
fn without(space: &mut String, text: &str) -> Option<String> {
    let alike = text.chars().zip(space.chars()).take_while(|(a, b)| a == b);
    let bytes: usize = alike.map(|(letter, _)| letter.len_utf8()).sum();
    let rest = text.get(bytes..).unwrap_or_default();
    if rest.is_empty() {
        space.drain(..bytes);
    } else {
        space.clear();
    }
    (bytes > 0).then(|| rest.to_owned())
}

/// The usage of both as that of one answer: the first one's prompt, and the tokens of both answers.
fn sum(usage: &RawValue, first: &First) -> Option<String> {
    let mut usage: Map<String, Value> = serde_json::from_str(usage.get()).ok()?;
    let count = |name: &str| usage.get(name).and_then(Value::as_u64);
    let (prompt, completion) = (count("prompt_tokens")?, count("completion_tokens")?);
    let prompt = first.usage(Some(prompt)).prompt_tokens;
    let completion = completion.saturating_add(first.tokens());
    let total = prompt.saturating_add(completion);
    for (name, value) in [
        ("prompt_tokens", prompt),
        ("completion_tokens", completion),
        ("total_tokens", total),
    ] {
        usage.insert(name.to_owned(), value.into());
    }
    // The second engine's cache may have held part of the answer too.
    let details = usage.get_mut("prompt_tokens_details");
    if let Some(cached) = details.and_then(|details| details.get_mut("cached_tokens"))
        && cached.as_u64().is_some_and(|cached| cached > prompt)
    {
        *cached = prompt.into();
    }
    Some(Value::Object(usage).to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::events::{Care, Events};
    use crate::openai::Wire;
    use crate::rescue::delivered::{Beginning, Delivered};

    fn event(id: &str, choice: &Value) -> String {
        let chunk = json!({"id": id, "created": id.len(), "model": "m", "choices": [choice]});
        format!("data: {chunk}\n\n")
    }

    fn word(id: &str, text: &str) -> String {
        event(
            id,
            &json!({"index": 0, "delta": {"content": text}, "finish_reason": null}),
        )
    }

    fn role(id: &str) -> String {
        event(
            id,
            &json!({"index": 0, "delta": {"role": "assistant", "content": ""}}),
        )
    }

    fn end(id: &str) -> String {
        event(
            id,
            &json!({"index": 0, "delta": {}, "finish_reason": "stop"}),
        )
    }

    const DONE: &str = "data: [DONE]\n\n";

    fn joint(space: &str) -> Joint {
        let names = Names {
            id: Some("\"first\"".into()),
            created: Some("5".into()),
            model: None,
        };
        let first = First {
            counted: None,
            events: 4,
            prompt_tokens: 50,
        };
        Joint::new(names, space.to_owned(), first)
    }

    fn passed(joint: &mut Joint, events: &str) -> String {
        let bytes = joint.pass(events.as_bytes()).unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn events_get_the_names_of_the_first_stream_and_stay_otherwise() {
        let text = "id: 3\r\ndata:{ \"id\" : \"x\",\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"k\":1.0, \"created\":9}\r\n\r\n";
        let events = [&role("x"), ": beat\n\n", text, DONE].concat();
        let wanted = text.replace("\"x\"", "\"first\"").replace(":9", ":5");
        assert_eq!(
            passed(&mut joint(""), &events),
            [": beat\n\n", &wanted, DONE].concat()
        );
    }

    #[test]
    fn an_opening_that_says_something_loses_its_role_only() {
        let greeting = event(
            "x",
            &json!({"index": 0, "delta": {"role": "assistant", "content": "a"}}),
        );
        assert_eq!(
            passed(&mut joint(""), &greeting),
            event("first", &json!({"index": 0, "delta": {"content": "a"}}))
        );
        let only = event("x", &json!({"index": 0, "delta": {"role": "assistant"}}));
        assert_eq!(passed(&mut joint(""), &only), "");
    }

    #[test]
    fn an_opening_that_counts_is_left_out_too() {
        let usage = "\"usage\":{\"prompt_tokens\":14,\"completion_tokens\":1,\"total_tokens\":15}";
        let counted = |event: String| event.replace("\"id\"", &format!("{usage},\"id\""));
        let events = counted(role("x")) + &counted(word("x", "a"));
        let sum = "\"usage\":{\"completion_tokens\":5,\"prompt_tokens\":10,\"total_tokens\":15}";
        let wanted = counted(word("first", "a")).replace(usage, sum);
        assert_eq!(passed(&mut joint(""), &events), wanted);
    }

    #[test]
    fn data_in_several_lines_comes_in_one() {
        let events = "data: {\"id\":\"x\",\ndata: \"choices\":[]}\n\n";
        assert_eq!(
            passed(&mut joint(""), events),
            "data: {\"id\":\"first\", \"choices\":[]}\n\n"
        );
    }

    #[test]
    fn white_space_is_not_given_twice() {
        for (space, said, wanted) in [
            (" ", vec![" a"], vec!["a"]),
            (" ", vec!["a", " b"], vec!["a", " b"]),
            (" \n", vec![" ", "\n", "\n", "a"], vec!["\n", "a"]),
            ("\n\n", vec!["\n- a"], vec!["- a"]),
            ("", vec![" a"], vec![" a"]),
        ] {
            let events: String = said.iter().map(|text| word("x", text)).collect();
            let wanted: String = wanted.iter().map(|text| word("first", text)).collect();
            assert_eq!(
                passed(&mut joint(space), &events),
                wanted,
                "{space:?} {said:?}"
            );
        }
    }

    #[test]
    fn the_end_stays_though_it_says_no_text() {
        assert_eq!(passed(&mut joint(" "), &end("x")), end("first"));
    }

    #[test]
    fn usage_is_that_of_one_answer() {
        let count = |prompt: u64, completion: u64, cached: u64| {
            let details = json!({"cached_tokens": cached});
            let total = prompt + completion;
            let usage = json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, "prompt_tokens_details": details});
            format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n")
        };
        // Of the second prompt's 14 tokens 4 were the first answer.
        assert_eq!(passed(&mut joint(""), &count(14, 3, 12)), count(10, 7, 10));
        let mut counted = joint("");
        counted.first.counted = Some(Usage {
            prompt_tokens: 9,
            cached_tokens: 1,
            completion_tokens: 6,
        });
        assert_eq!(passed(&mut counted, &count(14, 3, 8)), count(9, 9, 8));
        assert_eq!(joint("").first(None).prompt_tokens, 50);
    }

    #[test]
    fn a_part_of_an_event_and_what_is_no_text_are_refused() {
        assert!(joint("").pass(b"data: {\"cho").is_none());
        for delta in [
            json!({"reasoning_content": "hm"}),
            json!({"content": "a", "tool_calls": [{"index": 0}]}),
        ] {
            let events = word("x", "a") + &event("x", &json!({"index": 0, "delta": delta}));
            assert!(joint("").pass(events.as_bytes()).is_none());
        }
    }

    /// Sends `stream` in pieces through what the gateway makes of events, and gives what goes out.
    fn pieces(stream: &str, cuts: &[usize]) -> Vec<Bytes> {
        let care = Care {
            wants_count: true,
            stands_gaps: true,
            choices: 1,
        };
        let mut events = Events::new(Wire::Chunks, care);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let frames = cuts
            .windows(2)
            .map(|pair| &stream.as_bytes()[pair[0]..pair[1]]);
        frames
            .map(|frame| events.feed(Bytes::copy_from_slice(frame)).unwrap().bytes)
            .collect()
    }

    /// The texts of a stream joined, its ids and its marks of the end.
    fn read(stream: &[u8]) -> (String, Vec<String>, usize) {
        let (mut text, mut ids, mut ends) = (String::new(), Vec::new(), 0);
        let mut decoder = Decoder::default();
        let open_at = decoder.feed(stream, |data, _| {
            match serde_json::from_slice::<Value>(data) {
                Ok(chunk) => {
                    ids.push(chunk["id"].as_str().unwrap().to_owned());
                    text += chunk["choices"][0]["delta"]["content"]
                        .as_str()
                        .unwrap_or("");
                }
                Err(_) => ends += 1,
            }
        });
        assert_eq!(open_at, Ok(stream.len()));
        (text, ids, ends)
    }

    /// Events that say `text` in words cut as `cuts` say.
    fn say(id: &str, text: &str, cuts: &[usize]) -> String {
        let letters: Vec<char> = text.chars().collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (letters.len() + 1)).collect();
        cuts.extend([0, letters.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        let words = cuts
            .windows(2)
            .map(|pair| letters[pair[0]..pair[1]].iter().collect::<String>());
        words.map(|text| word(id, &text)).collect()
    }

    proptest! {
        #[test]
        fn the_joined_text_is_that_of_an_uncut_stream(
            text in "[ab \\n\\u{e9}\\u{1F600}\"]{1,40}",
            words in prop::collection::vec(0usize..99, 0..20),
            other_words in prop::collection::vec(0usize..99, 0..20),
            cut in 0usize..5_000,
            frames in prop::collection::vec(0usize..5_000, 0..20),
            other_frames in prop::collection::vec(0usize..5_000, 0..20),
        ) {
            let first = role("one") + &say("one", &text, &words);
            let mut delivered = Delivered::default();
            let mut out = Vec::new();
            // Nobody sees a role alone: the request is repeated from its start then.
            let cut = role("one").len() + cut % (first.len() - role("one").len() + 1);
            for piece in pieces(&String::from_utf8_lossy(&first.as_bytes()[..cut]), &frames) {
                prop_assert_eq!(delivered.feed(&piece), piece.len());
                out.extend_from_slice(&piece);
            }
            let Beginning { text: begun, space, tokens, names } = delivered.beginning().unwrap();
            let sent = begun.clone() + &space;
            prop_assert!(text.starts_with(&sent));
            let rest = text.strip_prefix(&begun).unwrap();
            let second = role("other") + &say("other", rest, &other_words) + &end("other") + DONE;
            let counts = First { counted: None, events: tokens, prompt_tokens: 0 };
            let mut joint = Joint::new(names, space, counts);
            for piece in pieces(&second, &other_frames) {
                out.extend_from_slice(&joint.pass(&piece).unwrap());
            }
            let (joined, ids, ends) = read(&out);
            prop_assert_eq!(joined, text);
            prop_assert!(ids.iter().all(|id| id == "one"));
            prop_assert_eq!(ends, 1);
        }
    }
}
