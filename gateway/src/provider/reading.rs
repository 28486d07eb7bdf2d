//! What all translations of a caller's chat completion read alike. Pure.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Misfit, read};

/// What a message list must be.
pub(super) const MESSAGES: &str = "a list of messages";

/// Which tool is to be called.
pub(super) enum Choose<'a> {
    /// None.
    None,
    /// The model decides.
    Auto,
    /// Some tool.
    Any,
    /// This one.
    Tool(Cow<'a, str>),
}

/// `tool_choice`; `Ok(None)` for what other protocols do not have.
pub(super) fn tool_choice(raw: &RawValue) -> Result<Option<Choose<'_>>, Misfit> {
    const EXPECTED: &str = "none, auto, required or a function";
    Ok(match read::<Value>("tool_choice", raw, EXPECTED)? {
        Value::String(mode) => match mode.as_str() {
            "none" => Some(Choose::None),
            "auto" => Some(Choose::Auto),
            "required" => Some(Choose::Any),
            _ => return Err(Misfit::Invalid("tool_choice".to_owned(), EXPECTED)),
        },
        other => {
            let name = other.pointer("/function/name").and_then(Value::as_str);
            name.map(|name| Choose::Tool(Cow::Owned(name.to_owned())))
        }
    })
}

/// The form that an answer must have.
pub(super) enum Form<'a> {
    /// Text.
    Text,
    /// Some JSON object.
    Object,
    /// JSON that keeps to this schema.
    Schema(&'a RawValue),
}

/// `response_format`; `Ok(None)` for what other protocols do not have.
pub(super) fn response_format(raw: &RawValue) -> Result<Option<Form<'_>>, Misfit> {
    #[derive(Deserialize)]
    struct View<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
        #[serde(borrow, default)]
        json_schema: Option<Schema<'a>>,
    }
    #[derive(Deserialize)]
    struct Schema<'a> {
        #[serde(borrow, default)]
        schema: Option<&'a RawValue>,
    }
    let format: View<'_> = read("response_format", raw, "an object with a type")?;
    Ok(match (format.kind.as_ref(), format.json_schema) {
        ("text", _) => Some(Form::Text),
        ("json_object", _) => Some(Form::Object),
        ("json_schema", Some(Schema { schema })) => schema.map(Form::Schema),
        _ => None,
    })
}

/// The arguments of a call, which OpenAI writes as a text, as an object.
pub(super) fn arguments(at: &str, text: &str) -> Result<Box<RawValue>, Misfit> {
    let text = match text.trim() {
        "" => "{}",
        text => text,
    };
    let object = RawValue::from_string(text.to_owned()).ok();
    object
        .filter(|object| object.get().starts_with('{'))
        .ok_or_else(|| {
            let at = format!("{at}.function.arguments");
            Misfit::Invalid(at, "the text of a JSON object")
        })
}

/// The id of a tool's call as Anthropic and AWS take it. Other engines have more in theirs (`functions.weather:0`), and
/// a conversation may go on elsewhere than it began.
pub(super) fn tool_id(id: Cow<'_, str>) -> Cow<'_, str> {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
    if id.chars().all(is_plain) {
        return id;
    }
    Cow::Owned(id.replace(|letter| !is_plain(letter), "_"))
}

/// Media type and base64 text of a `data:` URL.
pub(super) fn data_url(url: &str) -> Option<(&str, &str)> {
    let (head, data) = url.strip_prefix("data:")?.split_once(',')?;
    Some((head.strip_suffix(";base64")?, data))
}

/// `stop`: a text or several.
pub(super) fn stop(raw: &RawValue) -> Result<Vec<Cow<'_, str>>, Misfit> {
    const EXPECTED: &str = "a text or a list of texts";
    if raw.get().starts_with('"') {
        return Ok(vec![read("stop", raw, EXPECTED)?]);
    }
    read("stop", raw, EXPECTED)
}

/// Whether `stream_options` ask for the usage.
pub(super) fn include_usage(raw: &RawValue) -> Result<bool, Misfit> {
    #[derive(Deserialize)]
    struct View {
        #[serde(default)]
        include_usage: Option<bool>,
    }
    let view: View = read("stream_options", raw, "an object")?;
    Ok(view.include_usage.unwrap_or(false))
}

/// Book-keeping and hints: the answer does not depend on them.
pub(super) fn is_hint(name: &str) -> bool {
    let hints = [
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
    ];
    hints.contains(&name)
}

/// Whether a member that has no counterpart says what is so without it.
pub(super) fn asks_for_nothing(name: &str, raw: &RawValue) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(raw.get()) else {
        return false;
    };
    match name {
        "n" => value.as_u64() == Some(1),
        "logprobs" | "store" => value == Value::Bool(false),
        "top_logprobs" | "presence_penalty" | "frequency_penalty" => value.as_f64() == Some(0.0),
        "logit_bias" => value.as_object().is_some_and(serde_json::Map::is_empty),
        "modalities" => value == serde_json::json!(["text"]),
        "verbosity" => value == "medium",
        _ => false,
    }
}
