//! Whether what a rule's `match` says, besides model names, holds of a request. Pure.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, Method};
use memchr::memmem;
use penstock_core::config::{self, Condition, NameMatch, Need};
use penstock_core::ids::Id;
use regex::Regex;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::capability;
use crate::openai::{Api, Call};
use crate::principal::Principal;
use crate::tasks::{TaskSet, Told};

/// Patterns are looked for in the beginning of the user's last message: what it is about stands there.
const MAX_TEXT_BYTES: usize = 64 << 10;

/// What is known of a request before its rule is.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// How it was sent.
    pub method: &'a Method,
    /// Where it was sent.
    pub path: &'a str,
    /// As the caller sent them.
    pub headers: &'a HeaderMap,
    /// Where it came from.
    pub region: Option<&'a str>,
    /// Who sent it, if the gateway knows.
    pub principal: Option<&'a Principal>,
    /// Its body.
    pub call: &'a Call<'a>,
    /// What it is about, as far as anybody asked.
    pub tasks: &'a [Told],
}

/// Conditions of one rule, ready for use.
#[derive(Debug, Default)]
pub struct Conditions {
    tests: Vec<Test>,
    task: Option<Task>,
}

/// What a request must be about.
#[derive(Debug)]
struct Task {
    /// `None`, and it never is: the config has no such tasks.
    set: Option<Arc<TaskSet>>,
    name: String,
}

/// Whether conditions hold.
#[derive(Debug)]
pub enum Held<'a> {
    /// All of them.
    Yes,
    /// Not all of them.
    No,
    /// All others do; it depends on which of these tasks the request is about.
    Unclassified(&'a Arc<TaskSet>),
}

#[derive(Debug)]
enum Test {
    Paths(Vec<NameMatch>),
    Methods(BTreeSet<String>),
    Header(HeaderName, NameMatch),
    PromptTokens { min: u32, max: u32 },
    ContextTokens { min: u32, max: u32 },
    Needs(BTreeSet<Need>),
    Stream(bool),
    Region(NameMatch),
    Team(NameMatch),
    User(NameMatch),
    Attribute(String, NameMatch),
    Text(Regex),
}

impl Conditions {
    /// `None` if one of them cannot be used; the compiler of configs lets none such through.
    pub fn new(conditions: &[Condition], sets: &BTreeMap<Id, Arc<TaskSet>>) -> Option<Self> {
        let mut all = Self::default();
        for condition in conditions {
            if let Condition::Task(policy, name) = condition {
                all.task = Some(Task {
                    set: sets.get(policy).cloned(),
                    name: name.clone(),
                });
            } else {
                all.tests.push(Test::new(condition)?);
            }
        }
        Some(all)
    }

    /// Whether requests of this caller are among those that it takes, as far as that is the caller's to decide.
    pub fn are_open_to(&self, principal: Option<&Principal>) -> bool {
        self.tests.iter().all(|test| test.is_of(principal))
    }

    /// Whether all of them hold.
    pub fn hold(&self, asked: &Asked<'_>) -> Held<'_> {
        if !self.tests.iter().all(|test| test.holds(asked)) {
            return Held::No;
        }
        self.task
            .as_ref()
            .map_or(Held::Yes, |task| task.holds(asked))
    }
}

impl Task {
    fn holds(&self, asked: &Asked<'_>) -> Held<'_> {
        // Calls for embeddings are what finds tasks.
        let is_asked = Api::of_path(asked.path).is_some_and(Api::has_user);
        let Some(set) = self.set.as_ref().filter(|_| is_asked) else {
            return Held::No;
        };
        let told = asked.tasks.iter().find(|told| told.policy == set.policy);
        match told.map(|told| told.task.as_ref()) {
            None => Held::Unclassified(set),
            Some(task) if task == Some(&self.name) => Held::Yes,
            Some(_) => Held::No,
        }
    }
}

impl Test {
    /// `None` for what is no test, or cannot be used.
    fn new(condition: &Condition) -> Option<Self> {
        Some(match condition {
            Condition::Paths(paths) => Self::Paths(paths.clone()),
            Condition::Methods(methods) => Self::Methods(methods.clone()),
            Condition::Header(name, value) => {
                Self::Header(HeaderName::try_from(name).ok()?, value.clone())
            }
            Condition::PromptTokens { min, max } => Self::PromptTokens {
                min: min.unwrap_or(0),
                max: max.unwrap_or(u32::MAX),
            },
            Condition::ContextTokens { min, max } => Self::ContextTokens {
                min: min.unwrap_or(0),
                max: max.unwrap_or(u32::MAX),
            },
            Condition::Needs(needs) => Self::Needs(needs.clone()),
            Condition::Stream(stream) => Self::Stream(*stream),
            Condition::Region(region) => Self::Region(region.clone()),
            Condition::Team(team) => Self::Team(team.clone()),
            Condition::User(user) => Self::User(user.clone()),
            Condition::Attribute(name, value) => Self::Attribute(name.clone(), value.clone()),
            Condition::Text(text) => Self::Text(config::pattern(text).ok()?),
            Condition::Task(..) => return None,
        })
    }

    /// Whether it does not speak of callers, or takes this one.
    fn is_of(&self, principal: Option<&Principal>) -> bool {
        match self {
            Self::Team(wanted) => principal.is_some_and(|of| wanted.matches(&of.team)),
            Self::User(wanted) => {
                let user = principal.and_then(|of| of.user.as_ref());
                user.is_some_and(|user| wanted.matches(user))
            }
            Self::Attribute(name, wanted) => {
                let value = principal.and_then(|of| of.attributes.get(name));
                value.is_some_and(|value| wanted.matches(value))
            }
            _ => true,
        }
    }

    fn holds(&self, asked: &Asked<'_>) -> bool {
        match self {
            Self::Paths(paths) => paths.iter().any(|path| path.matches(asked.path)),
            Self::Methods(methods) => methods.contains(asked.method.as_str()),
            Self::Header(name, wanted) => asked
                .headers
                .get_all(name)
                .iter()
                .filter_map(|value| value.to_str().ok())
                .any(|value| wanted.matches(value)),
            Self::PromptTokens { min, max } => (*min..=*max).contains(&asked.call.prompt_tokens),
            Self::ContextTokens { min, max } => Api::of_path(asked.path)
                .and_then(|api| capability::context_tokens(api, asked.call))
                .is_some_and(|tokens| (*min..=*max).contains(&tokens)),
            Self::Needs(needs) => needs.iter().all(|need| is_needed(*need, asked.call)),
            Self::Stream(stream) => asked.call.stream == *stream,
            Self::Region(wanted) => asked.region.is_some_and(|region| wanted.matches(region)),
            Self::Team(_) | Self::User(_) | Self::Attribute(..) => self.is_of(asked.principal),
            Self::Text(pattern) => pattern.is_match(&last_text(asked.call.prompt)),
        }
    }
}

/// Types of parts with a picture: of chat completions, Messages and Responses.
/// vLLM's videos and vectors of pictures are for the same models.
const PICTURES: [&str; 6] = [
    "image_url",
    "image",
    "input_image",
    "computer_screenshot",
    "video_url",
    "image_embeds",
];
/// Types of parts with sound; `audio_url` is vLLM's.
const SOUNDS: [&str; 2] = ["input_audio", "audio_url"];
/// Messages, their parts, and the parts of a tool's answer: deeper there are no pictures.
const PART_LEVELS: usize = 3;

/// Whether a request needs this of a model.
pub(crate) fn is_needed(need: Need, call: &Call<'_>) -> bool {
    match need {
        Need::Vision => has_part(call.prompt, &PICTURES),
        Need::Audio => has_part(call.prompt, &SOUNDS),
        Need::Tools => call.has_tools,
        Need::JsonSchema => call.has_schema,
    }
}

/// Whether a prompt has a part of one of these types. Most prompts do not hold the word in quotes, and are not parsed:
/// a text may be that word, and so may a name or value that a tool is called with.
fn has_part(prompt: &[u8], types: &[&str]) -> bool {
    let holds = |word: &&str| {
        let mut found = memmem::find_iter(prompt, word.as_bytes());
        found
            .any(|at| prompt[..at].ends_with(b"\"") && prompt[at + word.len()..].starts_with(b"\""))
    };
    types.iter().any(holds)
        && serde_json::from_slice(prompt).is_ok_and(|raw| is_or_has(raw, types, PART_LEVELS))
}

/// Whether this is a part of one of these types, or a list or message of such, `levels` deep.
fn is_or_has(raw: &RawValue, types: &[&str], levels: usize) -> bool {
    #[derive(Deserialize)]
    struct Part<'a> {
        #[serde(borrow, default, rename = "type")]
        kind: Option<Cow<'a, str>>,
        #[serde(borrow, default)]
        content: Option<&'a RawValue>,
        /// What a tool answered, as Responses has it.
        #[serde(borrow, default)]
        output: Option<&'a RawValue>,
    }
    let all: Vec<&RawValue> = match raw.get().as_bytes().first() {
        Some(b'[') => serde_json::from_str(raw.get()).unwrap_or_default(),
        Some(b'{') => vec![raw],
        _ => return false,
    };
    // A derived struct also reads arrays.
    let mut objects = all.into_iter().filter(|one| one.get().starts_with('{'));
    objects.any(|one| {
        let Ok(part) = serde_json::from_str::<Part<'_>>(one.get()) else {
            return false;
        };
        let is_one = part.kind.is_some_and(|kind| types.contains(&&*kind));
        let mut inner = part.content.into_iter().chain(part.output);
        is_one || levels > 1 && inner.any(|inner| is_or_has(inner, types, levels - 1))
    })
}

/// The text of the user's last message that has one, or a prompt that is no list of messages. What tools answer stands
/// in messages of the user too, in Anthropic's protocol.
pub(crate) fn last_text(prompt: &[u8]) -> Cow<'_, str> {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(borrow, default)]
        role: Cow<'a, str>,
        #[serde(borrow, default)]
        content: Option<&'a RawValue>,
    }
    if let Ok(text) = serde_json::from_slice::<Text<'_>>(prompt) {
        return beginning(text.0);
    }
    let messages: Vec<Message<'_>> = serde_json::from_slice(prompt).unwrap_or_default();
    let of_user = messages
        .iter()
        .rev()
        .filter(|message| message.role == "user");
    let said = of_user
        .filter_map(|message| message.content)
        .map(|content| {
            serde_json::from_str::<Text<'_>>(content.get())
                .map_or_else(|_| Cow::Owned(texts(content)), |text| text.0)
        });
    let mut said = said.filter(|text| !text.is_empty());
    beginning(said.next().unwrap_or_default())
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

fn texts(content: &RawValue) -> String {
    #[derive(Deserialize)]
    struct Part<'a> {
        #[serde(borrow, default)]
        text: Option<Cow<'a, str>>,
    }
    let parts: Vec<Part<'_>> = serde_json::from_str(content.get()).unwrap_or_default();
    let texts: Vec<Cow<'_, str>> = parts.into_iter().filter_map(|part| part.text).collect();
    texts.join("\n")
}

fn beginning(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.len() <= MAX_TEXT_BYTES {
        return text;
    }
    let mut end = MAX_TEXT_BYTES;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Cow::Owned(text[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn holds(condition: Condition, path: &str, headers: &HeaderMap, body: &str) -> bool {
        let call = Call::parse(body.as_bytes()).unwrap();
        let asked = Asked {
            method: &Method::POST,
            path,
            headers,
            region: Some("eu-west-1"),
            principal: None,
            call: &call,
            tasks: &[],
        };
        let conditions = Conditions::new(&[condition], &BTreeMap::new()).unwrap();
        matches!(conditions.hold(&asked), Held::Yes)
    }

    fn of_body(condition: Condition, body: &str) -> bool {
        holds(condition, "/v1/chat/completions", &HeaderMap::new(), body)
    }

    #[test]
    fn paths_and_headers_are_matched_whole_or_by_their_beginning() {
        let headers = HeaderMap::from_iter([(
            HeaderName::from_static("x-team"),
            HeaderValue::from_static("research-2"),
        )]);
        let body = r#"{"model":"m"}"#;
        let path = |text: NameMatch| {
            let condition = Condition::Paths(vec![text]);
            holds(condition, "/v1/chat/completions", &headers, body)
        };
        assert!(path(NameMatch::Exact("/v1/chat/completions".into())));
        assert!(path(NameMatch::Prefix("/v1/chat".into())));
        assert!(!path(NameMatch::Exact("/v1/chat".into())));
        let header = |name: &str, value: NameMatch| {
            holds(
                Condition::Header(name.to_owned(), value),
                "/",
                &headers,
                body,
            )
        };
        assert!(header("x-team", NameMatch::Prefix("research".into())));
        assert!(header("x-team", NameMatch::Prefix(String::new())));
        assert!(!header("x-team", NameMatch::Exact("research".into())));
        assert!(!header("x-other", NameMatch::Prefix(String::new())));
    }

    #[test]
    fn a_region_is_matched_whole_or_by_its_beginning() {
        let region = |wanted| of_body(Condition::Region(wanted), r#"{"model":"m"}"#);
        assert!(region(NameMatch::Exact("eu-west-1".into())));
        assert!(region(NameMatch::Prefix("eu-".into())));
        assert!(!region(NameMatch::Exact("eu-west".into())));
    }

    #[test]
    fn what_a_request_needs_is_seen_in_every_protocol() {
        let needs = |need, body: &str| of_body(Condition::Needs(BTreeSet::from([need])), body);
        for (need, body) in [
            (
                Need::Vision,
                r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#,
            ),
            (
                Need::Vision,
                r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image","source":{}}]}]}"#,
            ),
            (
                Need::Vision,
                r#"{"model":"m","input":[{"role":"user","content":[{"type":"input_image"}]}]}"#,
            ),
            (
                Need::Audio,
                r#"{"model":"m","messages":[{"role":"user","content":[{"type":"input_audio"}]}]}"#,
            ),
            (
                Need::Tools,
                r#"{"model":"m","tools":[{"type":"function"}]}"#,
            ),
            (
                Need::JsonSchema,
                r#"{"model":"m","response_format":{"type":"json_schema"}}"#,
            ),
            (
                Need::JsonSchema,
                r#"{"model":"m","output_config":{"format":{"type":"json_schema"}}}"#,
            ),
            (
                Need::JsonSchema,
                r#"{"model":"m","text":{"format":{"type":"json_schema"}}}"#,
            ),
        ] {
            assert!(needs(need, body), "{body}");
        }
        let plain = r#"{"model":"m","tools":[],"response_format":{"type":"text"},"messages":[{"role":"user","content":"an \"image_url\" and \"input_audio\""}]}"#;
        for need in [Need::Vision, Need::Audio, Need::Tools, Need::JsonSchema] {
            assert!(!needs(need, plain), "{need:?}");
        }
    }

    #[test]
    fn only_parts_are_pictures_and_sound() {
        let has = |prompt: &str| {
            let body = format!(r#"{{"model":"m","messages":{prompt}}}"#);
            let call = Call::parse(body.as_bytes()).unwrap();
            [Need::Vision, Need::Audio].map(|need| is_needed(need, &call))
        };
        let said = |content: &str| format!(r#"[{{"role":"user","content":{content}}}]"#);
        for word in [
            "image",
            "image_url",
            "input_image",
            "video_url",
            "input_audio",
            "audio_url",
        ] {
            for content in [
                format!(r#""{word}""#),
                format!(r#"[{{"type":"text","text":"{word}"}}]"#),
                format!(r#"[{{"type":"text","{word}":"type"}}]"#),
                format!(
                    r#"[{{"type":"tool_use","id":"1","name":"{word}","input":{{"{word}":1}}}}]"#
                ),
                format!(
                    r#"[{{"type":"tool_use","id":"1","name":"f","input":{{"type":"{word}"}}}}]"#
                ),
                format!(r#"[{{"type":"tool_result","content":"{word}"}}]"#),
                format!(r#"[["{word}"]]"#),
            ] {
                assert_eq!(has(&said(&content)), [false; 2], "{content}");
            }
            let part = format!(r#"[{{"a":[1],"type" : "{word}"}}]"#);
            let answered =
                format!(r#"[{{"type":"tool_result","tool_use_id":"1","content":{part}}}]"#);
            let output =
                format!(r#"[{{"type":"function_call_output","call_id":"1","output":{part}}}]"#);
            let is_sound = word.contains("audio");
            for prompt in [said(&part), said(&answered), output, part] {
                assert_eq!(has(&prompt), [!is_sound, is_sound], "{prompt}");
            }
        }
    }

    #[test]
    fn a_pattern_is_looked_for_in_the_users_last_message_only() {
        let text = |pattern: &str, body: &str| of_body(Condition::Text(pattern.to_owned()), body);
        let chat = r#"{"model":"m","messages":[{"role":"user","content":"earlier"},{"role":"assistant","content":"said"},
            {"role":"user","content":[{"type":"text","text":"Write SQL"},{"type":"text","text":"please"}]}]}"#;
        assert!(text(r"\bsql\b", chat) && text("please", chat));
        assert!(!text("earlier|said", chat));
        assert!(text("^prompt$", r#"{"model":"m","prompt":"prompt"}"#));
        // What a tool answers is nothing that the user says.
        let agent = r#"{"model":"m","messages":[{"role":"user","content":"Write SQL"},
            {"role":"assistant","content":[{"type":"tool_use","id":"1","name":"f","input":{}}]},
            {"role":"user","content":[{"type":"tool_result","tool_use_id":"1","content":"poem"}]}]}"#;
        assert!(text("sql", agent) && !text("poem", agent));
        assert!(!text(".", r#"{"model":"m"}"#));
    }

    #[test]
    fn a_context_holds_prompt_and_answer_where_bytes_tell() {
        let body = |rest: &str| {
            let text = "x".repeat(398);
            format!(r#"{{"model":"m","prompt":"{text}","max_tokens":50{rest}}}"#)
        };
        let range = |min, max, path: &str, body: &str| {
            let condition = Condition::ContextTokens { min, max };
            holds(condition, path, &HeaderMap::new(), body)
        };
        let (text, path) = (body(""), "/v1/completions");
        assert!(range(Some(150), Some(150), path, &text));
        assert!(!range(Some(151), None, path, &text) && !range(None, Some(149), path, &text));
        let list = body("")
            .replace("\"prompt\":", "\"prompt\":[")
            .replace("\",\"max", "\"],\"max");
        assert!(!range(None, Some(u32::MAX), path, &list), "many prompts");
        assert!(!range(None, Some(u32::MAX), "/v1/embeddings", &text));
        let shown =
            r#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        assert!(!range(None, Some(u32::MAX), "/v1/chat/completions", shown));
    }

    #[test]
    fn tokens_and_streams_are_as_the_balancer_counts_them() {
        let body = format!(
            r#"{{"model":"m","stream":true,"prompt":"{}"}}"#,
            "x".repeat(398)
        );
        let range = |min, max| of_body(Condition::PromptTokens { min, max }, &body);
        assert!(range(Some(100), Some(100)) && range(None, Some(100)) && range(Some(50), None));
        assert!(!range(Some(101), None) && !range(None, Some(99)));
        assert!(of_body(Condition::Stream(true), &body));
        assert!(!of_body(Condition::Stream(false), &body));
    }

    proptest! {
        #[test]
        fn long_texts_are_cut_at_a_character(text in "[aé\u{1F600}]{0,40}", times in 0usize..4_000) {
            let long = text.repeat(times);
            let cut = beginning(Cow::Borrowed(&long));
            prop_assert!(cut.len() <= MAX_TEXT_BYTES && long.starts_with(cut.as_ref()));
        }
    }
}
