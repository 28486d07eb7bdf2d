//! The few things that the gateway reads of a request: which call it is, the `model` member, whether it streams. All
//! other bytes stay as they came; only `model` is replaced for a backend. (Rules may change more: see `reshape`.
//! Translations to another protocol read more: see `provider`.)

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use bytes::buf::{Buf as _, Chain};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use crate::depth::is_too_deep;
use crate::edits::{given, place};
use crate::multipart;
use crate::prompt_size;
use crate::session::Names;

/// Longer model names are not looked up: no rule can hold one (512 in the schema, 256 for a match).
pub const MAX_MODEL_BYTES: usize = 512;

/// A call that goes to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Api {
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/embeddings`
    Embeddings,
    /// `POST /v1/rerank`, as Jina, Cohere and vLLM have it
    Rerank,
    /// `POST /v1/score`, as vLLM has it
    Score,
    /// `POST /v1/responses`
    Responses,
    /// `POST /v1/messages`, Anthropic's
    Messages,
    /// `POST /v1/messages/count_tokens`, Anthropic's
    CountTokens,
    /// `POST /v1/audio/speech`
    Speech,
    /// `POST /v1/audio/transcriptions`, a form
    Transcription,
    /// `POST /v1/audio/translations`, a form
    Translation,
    /// `POST /v1/images/generations`
    ImageGeneration,
    /// `POST /v1/images/edits`, a form
    ImageEdit,
    /// `POST /v1/images/variations`, a form
    ImageVariation,
    /// `POST` to another path below `/v1/audio/`
    Audio,
    /// `POST` to another path below `/v1/images/`
    Images,
    /// Anything else, to a backend that is no model (see `service`)
    Http,
}

impl Api {
    /// All of them, in the order of [`Api::index`].
    pub const ALL: [Self; 17] = [
        Self::Chat,
        Self::Completions,
        Self::Embeddings,
        Self::Rerank,
        Self::Score,
        Self::Responses,
        Self::Messages,
        Self::CountTokens,
        Self::Speech,
        Self::Transcription,
        Self::Translation,
        Self::ImageGeneration,
        Self::ImageEdit,
        Self::ImageVariation,
        Self::Audio,
        Self::Images,
        Self::Http,
    ];

    /// Whether its answers are made token by token. Others say how much they read, and nothing of what they wrote.
    pub fn generates(self) -> bool {
        matches!(
            self,
            Self::Chat | Self::Completions | Self::Responses | Self::Messages
        )
    }

    /// The call that a path leads to.
    pub fn of_path(path: &str) -> Option<Self> {
        let below = path.strip_prefix("/v1")?;
        let mut calls = Self::ALL.into_iter().filter(|api| !api.is_open());
        calls.find(|api| api.path() == below)
    }

    /// The call that a path without one of its own leads to, and what stands in it behind [`Self::path`].
    pub fn beside(path: &str) -> Option<(Self, &str)> {
        let below = path.strip_prefix("/v1")?;
        [Self::Audio, Self::Images].into_iter().find_map(|api| {
            let rest = below.strip_prefix(api.path())?;
            (rest.len() > 1 && rest.starts_with('/')).then_some((api, rest))
        })
    }

    /// What stands in a path to this call behind [`Self::path`].
    pub fn below(self, path: &str) -> &str {
        match self {
            Self::Audio | Self::Images => Self::beside(path).map_or("", |(_, rest)| rest),
            _ => "",
        }
    }

    /// Whether its requests have paths of their own.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Audio | Self::Images | Self::Http)
    }

    /// Whether it carries what a user says.
    pub fn has_user(self) -> bool {
        use Api::{Chat, Completions, CountTokens, Messages, Responses};
        matches!(
            self,
            Chat | Completions | Responses | Messages | CountTokens
        )
    }

    /// Position in tables that hold something for each call.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The path below a base URL that ends in `/v1`; of [`Self::Audio`] and [`Self::Images`] its beginning; that of
    /// [`Self::Http`] is the request's own.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/chat/completions",
            Self::Completions => "/completions",
            Self::Embeddings => "/embeddings",
            Self::Rerank => "/rerank",
            Self::Score => "/score",
            Self::Responses => "/responses",
            Self::Messages => "/messages",
            Self::CountTokens => "/messages/count_tokens",
            Self::Speech => "/audio/speech",
            Self::Transcription => "/audio/transcriptions",
            Self::Translation => "/audio/translations",
            Self::ImageGeneration => "/images/generations",
            Self::ImageEdit => "/images/edits",
            Self::ImageVariation => "/images/variations",
            Self::Audio => "/audio",
            Self::Images => "/images",
            Self::Http => "",
        }
    }

    /// Which protocol its callers speak.
    pub fn dialect(self) -> Dialect {
        match self {
            Self::Messages | Self::CountTokens => Dialect::Anthropic,
            _ => Dialect::OpenAi,
        }
    }

    /// What its event streams are made of.
    pub fn wire(self) -> Wire {
        match self {
            Self::Responses => Wire::Responses,
            Self::Messages | Self::CountTokens => Wire::Messages,
            Self::Speech
            | Self::Transcription
            | Self::Translation
            | Self::ImageGeneration
            | Self::ImageEdit
            | Self::ImageVariation => Wire::Media,
            Self::Audio | Self::Images | Self::Http => Wire::Plain,
            _ => Wire::Chunks,
        }
    }

    /// `gen_ai.operation.name` of the OpenTelemetry conventions, where these have one.
    pub fn operation(self) -> &'static str {
        match self {
            Self::Chat | Self::Responses | Self::Messages => "chat",
            Self::Completions => "text_completion",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::CountTokens => "count_tokens",
            Self::Speech => "speech",
            Self::Transcription | Self::Translation => "transcription",
            Self::Audio => "audio",
            Self::ImageGeneration | Self::ImageEdit | Self::ImageVariation | Self::Images => {
                "image_generation"
            }
            Self::Http => "http",
        }
    }
}

/// The protocols that callers may speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's.
    #[default]
    OpenAi,
    /// Anthropic's.
    Anthropic,
}

/// What an event stream is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// Chunks of completions, ended by `[DONE]`.
    #[default]
    Chunks,
    /// Typed events of OpenAI's Responses API, ended by `response.completed` or its like.
    Responses,
    /// Typed events of Anthropic's Messages API, ended by `message_stop`.
    Messages,
    /// Typed events of OpenAI's sounds, transcripts and pictures, ended by `….done` or `….completed`. Backends with
    /// events of their own are taken as [`Wire::Plain`].
    Media,
    /// Events whose meaning is not known here, ended by the end of the body.
    Plain,
}

/// The mark that ends a stream of chunks.
pub const DONE: &[u8] = b"data: [DONE]\n\n";
/// Ends an event, whether its last line has ended or not.
pub const EMPTY_LINE: &[u8] = b"\n\n";

/// What a request body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// A JSON object.
    Json,
    /// A form, in which texts have no quotes.
    Form,
}

/// When an answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The caller waits for it.
    Now,
    /// The caller comes back for it (`background: true`).
    Later,
}

/// What was read of a request body.
#[derive(Debug, PartialEq, Eq)]
pub struct Call<'a> {
    /// The model's name, unescaped.
    pub model: Cow<'a, str>,
    /// Where the value of `model` stands in the body, quotes included.
    pub model_at: Range<usize>,
    /// What the body is.
    pub encoding: Encoding,
    /// Whether an event stream is asked for.
    pub stream: bool,
    /// When the answer is wanted.
    pub wanted: Wanted,
    /// The JSON text of `system` or `instructions`, which come before the prompt; empty if there is none.
    pub system: &'a [u8],
    /// The JSON text of `messages`, `input` or `prompt`; empty if there is none.
    pub prompt: &'a [u8],
    /// About how many tokens a model reads: of the prompt, of what comes before it and of tools.
    pub prompt_tokens: u32,
    /// Whether tools are offered.
    pub has_tools: bool,
    /// Whether the answer must keep to a JSON schema.
    pub has_schema: bool,
    /// The JSON text of `stream_options`.
    pub stream_options: Option<&'a str>,
    /// What the body says that it belongs to.
    pub names: Names<'a>,
    /// How many tokens its answer may have, where it says so.
    pub max_tokens: Option<u32>,
    /// How many answers to one prompt are asked for: `n`.
    pub choices: u32,
}

impl Call<'_> {
    /// Of a request that is no call of a model.
    pub const NONE: Call<'static> = Call {
        model: Cow::Borrowed(""),
        model_at: 0..0,
        encoding: Encoding::Json,
        stream: false,
        system: &[],
        prompt: &[],
        prompt_tokens: 0,
        has_tools: false,
        has_schema: false,
        stream_options: None,
        names: Names::NONE,
        max_tokens: None,
        choices: 1,
        wanted: Wanted::Now,
    };
}

/// Why a body cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// Not a JSON object, or `model` or `stream` occurs twice or has the wrong type.
    Json {
        /// Line of the mistake, from 1.
        line: usize,
        /// Column of the mistake, from 1.
        column: usize,
    },
    /// No `model`, or an empty one.
    NoModel,
    /// Nested deeper than [`crate::depth::MAX_DEPTH`].
    TooDeep,
}

#[derive(Deserialize)]
struct View<'a> {
    #[serde(borrow, default)]
    model: Option<&'a RawValue>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    background: Option<bool>,
    /// Where Messages and Responses have the system prompt.
    #[serde(borrow, default)]
    system: Option<&'a RawValue>,
    #[serde(borrow, default)]
    instructions: Option<&'a RawValue>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    stream_options: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    /// Their older form.
    #[serde(borrow, default)]
    functions: Option<&'a RawValue>,
    /// What rerank and score compare.
    #[serde(borrow, default)]
    query: Option<&'a RawValue>,
    #[serde(borrow, default)]
    documents: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text_1: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text_2: Option<&'a RawValue>,
    /// Where chat completions, Messages and Responses have the form of the answer.
    #[serde(borrow, default)]
    response_format: Option<&'a RawValue>,
    #[serde(borrow, default)]
    output_config: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    /// Where vLLM has it, besides.
    #[serde(borrow, default)]
    structured_outputs: Option<&'a RawValue>,
    #[serde(borrow, default)]
    guided_json: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt_cache_key: Option<&'a RawValue>,
    #[serde(borrow, default)]
    user: Option<&'a RawValue>,
    #[serde(borrow, default)]
    safety_identifier: Option<&'a RawValue>,
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow, default)]
    conversation: Option<&'a RawValue>,
    #[serde(borrow, default)]
    previous_response_id: Option<&'a RawValue>,
    /// Where the protocols bound an answer.
    #[serde(borrow, default)]
    max_tokens: Option<&'a RawValue>,
    #[serde(borrow, default)]
    max_completion_tokens: Option<&'a RawValue>,
    #[serde(borrow, default)]
    max_output_tokens: Option<&'a RawValue>,
    #[serde(borrow, default)]
    n: Option<&'a RawValue>,
}

impl<'a> View<'a> {
    fn names(&self) -> Names<'a> {
        let json = |raw: Option<&'a RawValue>| raw.map(RawValue::get);
        Names {
            conversation: json(self.conversation),
            prompt_cache_key: json(self.prompt_cache_key),
            user: json(self.user),
            safety_identifier: json(self.safety_identifier),
            metadata: json(self.metadata),
            previous_response_id: json(self.previous_response_id),
        }
    }

    fn max_tokens(&self) -> Option<u32> {
        [
            self.max_completion_tokens,
            self.max_output_tokens,
            self.max_tokens,
        ]
        .into_iter()
        .flatten()
        .find_map(|raw| raw.get().parse().ok())
    }

    fn choices(&self) -> u32 {
        self.n.and_then(|raw| raw.get().parse().ok()).unwrap_or(1)
    }

    fn has_schema(&self) -> bool {
        let named = [self.response_format, self.output_config, self.text];
        let says = |form: &RawValue, word| form.get().contains(word);
        named
            .into_iter()
            .flatten()
            .any(|form| says(form, "\"json_schema\""))
            || self
                .structured_outputs
                .is_some_and(|form| says(form, "\"json\""))
            || self.guided_json.is_some_and(|form| form.get() != "null")
    }

    /// What a model reads besides a prompt and what comes before it.
    fn others(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let members = [
            self.tools,
            self.functions,
            self.query,
            self.documents,
            self.text_1,
            self.text_2,
        ];
        let given = members.into_iter().flatten();
        given.map(|raw| raw.get().as_bytes())
    }

    fn has_tools(&self) -> bool {
        let is_filled = |raw: &RawValue| raw.get().bytes().any(|byte| byte == b'{');
        [self.tools, self.functions]
            .into_iter()
            .flatten()
            .any(is_filled)
    }
}

impl<'a> Call<'a> {
    /// Reads a request body. The whole body is checked to be JSON.
    pub fn parse(body: &'a [u8]) -> Result<Self, CallError> {
        if is_too_deep(body) {
            return Err(CallError::TooDeep);
        }
        // A derived struct also reads arrays; a request is an object.
        if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
            return Err(CallError::Json { line: 1, column: 1 });
        }
        let json = |err: &serde_json::Error| CallError::Json {
            line: err.line(),
            column: err.column(),
        };
        let view: View<'_> = serde_json::from_slice(body).map_err(|err| json(&err))?;
        let raw = view
            .model
            .map(RawValue::get)
            .filter(|raw| *raw != "null")
            .ok_or(CallError::NoModel)?;
        let model_at = place(body, raw);
        let model = match raw
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'))
        {
            Some(plain) if !plain.contains('\\') => Cow::Borrowed(plain),
            Some(_) => Cow::Owned(serde_json::from_str(raw).map_err(|err| json(&err))?),
            None => {
                return Err(CallError::Json {
                    line: 1,
                    column: model_at.start + 1,
                });
            }
        };
        if model.is_empty() {
            return Err(CallError::NoModel);
        }
        let system = view.system.or(view.instructions);
        let system = system.map_or(&[][..], |raw| raw.get().as_bytes());
        let prompt = view.messages.or(view.input).or(view.prompt);
        let prompt = prompt.map_or(&[][..], |raw| raw.get().as_bytes());
        Ok(Self {
            encoding: Encoding::Json,
            prompt_tokens: prompt_size::tokens([system, prompt].into_iter().chain(view.others())),
            has_tools: view.has_tools(),
            has_schema: view.has_schema(),
            max_tokens: view.max_tokens(),
            choices: view.choices(),
            stream_options: view.stream_options.map(RawValue::get),
            names: view.names(),
            model,
            model_at,
            stream: view.stream.unwrap_or(false),
            wanted: match view.background {
                Some(true) => Wanted::Later,
                Some(false) | None => Wanted::Now,
            },
            system,
            prompt,
        })
    }
}

impl<'a> Call<'a> {
    /// Reads a form; `None` if it names no model.
    pub fn of_form(body: &'a [u8], boundary: &str) -> Option<Self> {
        let form = multipart::read(body, boundary)?;
        Some(Self {
            model: Cow::Borrowed(form.model),
            model_at: form.model_at,
            encoding: Encoding::Form,
            stream: form.stream,
            ..Call::NONE
        })
    }
}

/// A request body in up to three pieces: before, in place of and after the value of `model`.
pub type Pieces = Chain<Chain<Bytes, Bytes>, Bytes>;

/// The body as it is.
pub fn unpatched(body: Bytes) -> Pieces {
    body.chain(Bytes::new()).chain(Bytes::new())
}

/// The body with the value at `at` replaced by the JSON text `value`. Nothing is copied.
pub fn patched(body: &Bytes, at: Range<usize>, value: Bytes) -> Pieces {
    body.slice(..at.start)
        .chain(value)
        .chain(body.slice(at.end..))
}

/// Whether an error body has the OpenAI shape: an object with a member `error` that is an object with a text
/// `message`.
pub fn is_error(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Shape<'a> {
        #[serde(borrow)]
        error: Inner<'a>,
    }
    #[derive(Deserialize)]
    struct Inner<'a> {
        #[serde(borrow)]
        #[expect(dead_code, reason = "only its presence counts")]
        message: Cow<'a, str>,
    }
    serde_json::from_slice::<Shape<'_>>(body).is_ok_and(
        |Shape {
             error: Inner { .. },
         }| true,
    )
}

/// An error that has its members at the top, as vLLM up to 0.9 and SGLang write it, in the usual shape; `None` for
/// anything else.
pub fn nested_error(body: &[u8]) -> Option<Bytes> {
    #[derive(Deserialize)]
    struct Flat<'a> {
        #[serde(borrow)]
        object: Cow<'a, str>,
        #[serde(borrow)]
        message: Cow<'a, str>,
        #[serde(borrow, default, rename = "type")]
        kind: Option<Cow<'a, str>>,
        #[serde(borrow, default)]
        param: Option<&'a RawValue>,
        #[serde(borrow, default)]
        code: Option<&'a RawValue>,
    }
    let flat: Flat<'_> = serde_json::from_slice(body).ok()?;
    let error = json!({"error": {
        "message": flat.message,
        "type": flat.kind,
        "param": flat.param,
        "code": flat.code,
    }});
    (flat.object == "error").then(|| Bytes::from(error.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::depth::MAX_DEPTH;

    fn bytes(mut pieces: Pieces) -> Bytes {
        let length = pieces.remaining();
        pieces.copy_to_bytes(length)
    }

    #[test]
    fn calls_have_their_places_and_paths() {
        for (index, api) in Api::ALL.into_iter().enumerate() {
            assert_eq!(api.index(), index);
            let found = Some(api).filter(|api| !api.is_open());
            assert_eq!(Api::of_path(&format!("/v1{}", api.path())), found);
        }
        let paths = Api::ALL.into_iter().filter(|api| !api.is_open());
        let paths: Vec<String> = paths.map(|api| format!("/v1{}", api.path())).collect();
        assert_eq!(paths, penstock_core::names::CALL_PATHS);
        for path in penstock_core::names::OPEN_CALL_PATHS {
            assert!(Api::beside(path).is_none());
            assert!(Api::beside(&format!("{path}x")).is_some());
        }
        let found = Api::beside("/v1/images/inpainting/a");
        assert_eq!(found, Some((Api::Images, "/inpainting/a")));
        assert_eq!(Api::beside("/v1/audiox/a"), None);
        for path in [
            "",
            "/v1",
            "/chat/completions",
            "/v1/chat/completions/",
            "/v1/responses/",
        ] {
            assert_eq!(Api::of_path(path), None, "{path}");
        }
    }

    #[test]
    fn model_and_stream_are_read_wherever_they_stand() {
        let body = br#" {"messages":[{"role":"user","content":"\"model\":\"x\""}],"stream":true, "model" : "chat"}"#;
        let call = Call::parse(body).unwrap();
        assert_eq!(call.model, "chat");
        assert!(call.stream);
        assert_eq!(&body[call.model_at], br#""chat""#);
        assert!(call.prompt.starts_with(br#"[{"role":"user""#) && call.prompt.ends_with(b"}]"));
    }

    #[test]
    fn a_system_prompt_counts_where_it_is_a_member_of_its_own() {
        for name in ["system", "instructions"] {
            let text = "x".repeat(38);
            let body = format!(r#"{{"model":"m","{name}":"{text}","input":"abcdefghijklmnopqr"}}"#);
            let call = Call::parse(body.as_bytes()).unwrap();
            assert_eq!(call.system, format!("\"{text}\"").as_bytes());
            assert_eq!(call.prompt_tokens, 15);
        }
    }

    #[test]
    fn all_that_a_model_reads_counts() {
        let text = "x".repeat(398);
        for members in [
            format!(r#""tools":["{text}"]"#),
            format!(r#""functions":["{text}"]"#),
            format!(r#""documents":["{text}"]"#),
            format!(r#""query":"{text}""#),
            format!(r#""text_1":"{text}""#),
            format!(r#""messages":["{text}"]"#),
        ] {
            let body = format!(r#"{{"model":"m",{members}}}"#);
            let tokens = Call::parse(body.as_bytes()).unwrap().prompt_tokens;
            assert!((100..=101).contains(&tokens), "{tokens}: {members}");
        }
    }

    #[test]
    fn tools_and_forms_of_answers_are_known_by_their_other_names_too() {
        let call = |members: &str| {
            let body = format!(r#"{{"model":"m",{members}}}"#);
            let call = Call::parse(body.as_bytes()).unwrap();
            (call.has_tools, call.has_schema)
        };
        assert_eq!(call(r#""functions":[{"name":"f"}]"#), (true, false));
        assert_eq!(call(r#""structured_outputs":{"json":{}}"#), (false, true));
        assert_eq!(call(r#""guided_json":{"type":"object"}"#), (false, true));
        assert_eq!(
            call(r#""structured_outputs":{"regex":"a"}"#),
            (false, false)
        );
        assert_eq!(call(r#""guided_json":null,"functions":[]"#), (false, false));
    }

    #[test]
    fn an_escaped_key_is_still_the_model() {
        let call = Call::parse(br#"{"mod\u0065l":"a\u0062"}"#).unwrap();
        assert_eq!(call.model, "ab");
    }

    #[test]
    fn two_models_are_refused_because_parsers_disagree_on_them() {
        assert!(matches!(
            Call::parse(br#"{"model":"a","model":"b"}"#),
            Err(CallError::Json { .. })
        ));
    }

    #[test]
    fn what_is_not_a_request_is_refused() {
        for body in [
            "",
            "[]",
            "[\"a\",true]",
            "{",
            "{}x",
            "\"model\"",
            r#"{"model":"a"}}"#,
            r#"{"model":1}"#,
            r#"{"model":"a","stream":"yes"}"#,
        ] {
            assert!(
                matches!(Call::parse(body.as_bytes()), Err(CallError::Json { .. })),
                "{body}"
            );
        }
        for body in ["{}", r#"{"model":null}"#, r#"{"model":""}"#] {
            assert_eq!(
                Call::parse(body.as_bytes()),
                Err(CallError::NoModel),
                "{body}"
            );
        }
    }

    #[test]
    fn nesting_is_bounded_and_brackets_in_texts_do_not_count() {
        let nested = |levels: usize| {
            let (open, close) = ("[".repeat(levels), "]".repeat(levels));
            format!(r#"{{"model":"a","x":{open}{close}}}"#)
        };
        let parse = |body: String| Call::parse(body.as_bytes()).map(|call| call.model.into_owned());
        assert_eq!(parse(nested(MAX_DEPTH - 1)).unwrap(), "a");
        assert_eq!(parse(nested(MAX_DEPTH)), Err(CallError::TooDeep));
        assert_eq!(parse(nested(200_000)), Err(CallError::TooDeep));
        let wide = format!(r#"{{"model":"a","x":[{}[]]}}"#, "[],".repeat(10_000));
        assert_eq!(parse(wide).unwrap(), "a");
        let text = format!(r#"{{"model":"a","x":"\"{}"}}"#, "[".repeat(10_000));
        assert_eq!(parse(text).unwrap(), "a");
    }

    #[test]
    fn error_shape_is_recognised() {
        assert!(is_error(
            br#"{"error":{"message":"busy","type":"x","code":503}}"#
        ));
        assert!(!is_error(br#"{"error":"Unauthorized"}"#));
        assert!(!is_error(br#"{"detail":"Not Found"}"#));
        assert!(!is_error(b"<html>"));
    }

    #[test]
    fn an_error_with_its_members_at_the_top_gets_the_usual_shape() {
        let flat = br#"{"object":"error","message":"too \"long\"","type":"BadRequestError","param":null,"code":400}"#;
        let nested = nested_error(flat).unwrap();
        assert!(is_error(&nested));
        let expected = serde_json::json!({"error": {
            "message": "too \"long\"", "type": "BadRequestError", "param": null, "code": 400
        }});
        let value: serde_json::Value = serde_json::from_slice(&nested).unwrap();
        assert_eq!(value, expected);
        for other in [
            &br#"{"object":"list","message":"x"}"#[..],
            br#"{"object":"error"}"#,
            br#"{"error":{"message":"x"}}"#,
            b"<html>",
        ] {
            assert_eq!(nested_error(other), None);
        }
    }

    proptest! {
        #[test]
        fn patching_changes_nothing_but_the_model(before in "[ \\n]{0,3}", name in "[a-z/\\-]{1,12}", other in "[a-zA-Z0-9 é\\u{1F600}]{0,20}", new in "[a-z]{1,9}") {
            let body = format!(r#"{before}{{"x":{{"model":"inner"}},"model":{before}"{name}","y":"{other}"}}"#);
            let expected = format!(r#"{before}{{"x":{{"model":"inner"}},"model":{before}"{new}","y":"{other}"}}"#);
            let body = Bytes::from(body);
            let call = Call::parse(&body).unwrap();
            prop_assert_eq!(&call.model, &name);
            let value = Bytes::from(format!("\"{new}\""));
            prop_assert_eq!(bytes(patched(&body, call.model_at, value)), expected.as_bytes());
            prop_assert_eq!(bytes(unpatched(body.clone())), body);
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Call::parse(&body);
        }
    }
}
