//! Protocols: what a caller speaks, what a backend speaks, and the translations between the two. Pure.
//!
//! A call whose backend speaks the caller's protocol passes byte for byte. Else `chat_over_messages` or
//! `messages_over_chat` carries it, and `foreign` makes of a chat completion what no caller speaks: each member of a
//! request is carried, emulated, left out as without meaning for the answer, or refused; docs/protocols.md lists them
//! all.

pub mod bedrock;
pub mod chat_over_messages;
pub mod fields;
pub mod foreign;
pub mod gemini;
pub mod messages_over_chat;
pub mod target;
pub mod translations;

mod chat;
mod chunks;
mod messages;
mod open_calls;
mod reading;

#[cfg(test)]
mod tests;

use bytes::Bytes;
use http::StatusCode;
use penstock_core::config::Protocol;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use self::foreign::{Foreign, Vectors};
use crate::edits::Edits;
use crate::openai::{Api, Dialect};
use crate::reject::anthropic_error;
use crate::sse::EventTooLarge;

/// How a call reaches a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// From the caller to a backend that speaks one of the protocols that callers may speak.
    pub way: Way,
    /// From there to one that speaks another: made to look as if it spoke chat completions.
    pub foreign: Option<Foreign>,
}

impl Route {
    /// How `api` reaches a backend that speaks `protocol`; `None` if it cannot.
    pub fn of(api: Api, protocol: Protocol) -> Option<Self> {
        let (near, foreign) = match (protocol, api) {
            (Protocol::Gemini, Api::Embeddings) => {
                (Protocol::OpenAi, Some(Foreign::GeminiEmbeddings))
            }
            (Protocol::Gemini, _) => (Protocol::OpenAi, Some(Foreign::Gemini)),
            (Protocol::Bedrock, _) => (Protocol::OpenAi, Some(Foreign::Bedrock)),
            (near, _) => (near, None),
        };
        let way = Way::of(api, near)?;
        let route = Self { way, foreign };
        let is_taken = foreign.is_none_or(|foreign| foreign.takes(route.api(api)));
        is_taken.then_some(route)
    }

    /// Whether the backend gets the caller's very bytes, and the caller the backend's.
    pub fn is_straight(self) -> bool {
        self.way == Way::Straight && self.foreign.is_none()
    }

    /// The call that the backend gets for `api`, or that it is made to look as if it got.
    pub fn api(self, api: Api) -> Api {
        self.way.api(api)
    }

    /// Translates a request body.
    pub fn request(self, body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
        match (self.way, self.foreign) {
            (way, None) => way.request(body, rest),
            (Way::Straight, Some(foreign)) => foreign.request(body, rest),
            (way, Some(foreign)) => {
                let chat = way.request(body, rest)?;
                foreign.request(&chat.body, rest).map_err(in_messages)
            }
        }
    }
}

/// Between a caller and a backend that both speak what callers may speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The backend has this call itself.
    Straight,
    /// A chat completion, asked of a backend that speaks Anthropic Messages.
    ChatOverMessages,
    /// An Anthropic message, asked of a backend that speaks chat completions.
    MessagesOverChat,
    /// The count of an Anthropic message's tokens, asked of an engine that counts those of a chat completion.
    CountOverTokenize,
}

impl Way {
    fn of(api: Api, protocol: Protocol) -> Option<Self> {
        use Protocol::{Anthropic, AzureOpenAi, Http, OpenAi};
        match (protocol, api) {
            (Http, Api::Http) => Some(Self::Straight),
            (Http, _) | (_, Api::Http) => None,
            (Anthropic, Api::Messages | Api::CountTokens) => Some(Self::Straight),
            (Anthropic, Api::Chat) => Some(Self::ChatOverMessages),
            (OpenAi, Api::CountTokens) => Some(Self::CountOverTokenize),
            (Anthropic, _) | (_, Api::CountTokens) => None,
            (_, Api::Messages) => Some(Self::MessagesOverChat),
            (
                AzureOpenAi,
                Api::Rerank | Api::Score | Api::ImageVariation | Api::Audio | Api::Images,
            ) => None,
            (_, _) => Some(Self::Straight),
        }
    }

    fn api(self, api: Api) -> Api {
        match self {
            // Where it is answered is the target's to know.
            Self::Straight | Self::CountOverTokenize => api,
            Self::ChatOverMessages => Api::Messages,
            Self::MessagesOverChat => Api::Chat,
        }
    }

    /// Translates a request body.
    pub fn request(self, body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
        match self {
            Self::ChatOverMessages => chat_over_messages::request(body, rest),
            Self::MessagesOverChat => messages_over_chat::request(body, rest),
            Self::CountOverTokenize => messages_over_chat::count_request(body, rest),
            Self::Straight => Err(Misfit::Unsupported("model".to_owned())),
        }
    }

    /// Translates a whole answer, behind [`Foreign::answer`]; `created` is now in seconds since 1970. `None` if it is
    /// no answer of the backend's protocol.
    pub fn answer(self, body: &[u8], created: u64) -> Option<Bytes> {
        match self {
            Self::Straight => None,
            Self::ChatOverMessages => chat_over_messages::answer(body, created),
            Self::MessagesOverChat => messages_over_chat::answer(body),
            Self::CountOverTokenize => messages_over_chat::count(body),
        }
    }

    /// What translates the event stream of a call, behind [`Foreign::chunks`].
    pub fn stream(self, created: u64, include_usage: bool) -> Option<Translator> {
        match self {
            Self::Straight | Self::CountOverTokenize => None,
            Self::ChatOverMessages => {
                let stream = chat_over_messages::Stream::new(created, include_usage);
                Some(Translator::ChatOverMessages(Box::new(stream)))
            }
            Self::MessagesOverChat => Some(Translator::MessagesOverChat(Box::default())),
        }
    }
}

/// What becomes of members that the backend's protocol cannot carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rest {
    /// They make the request unfit for the backend.
    #[default]
    Refuse,
    /// They are left out.
    Drop,
}

/// Why a request cannot be translated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// It is not of its own protocol's shape: the member, and what it must be.
    Invalid(String, &'static str),
    /// The backend's protocol has nothing for this member.
    Unsupported(String),
}

/// A request in the backend's protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translated {
    /// Its body.
    pub body: Bytes,
    /// Where the value of `model` stands in it; `None` where the path has it.
    pub model_at: Option<std::ops::Range<usize>>,
    /// Where the backend's name of the model is to be put into texts of it.
    pub names_at: Vec<usize>,
    /// Whether the caller asked for a stream's usage (`stream_options.include_usage`).
    pub include_usage: bool,
    /// How the caller wants vectors to be written.
    pub vectors: Vectors,
}

impl Translated {
    /// Its body with a model's name where it is to be.
    pub fn named(&self, model: &str) -> Bytes {
        let text = Value::from(model).to_string();
        let inner = text.get(1..text.len() - 1).unwrap_or_default();
        let mut edits = Edits::default();
        for at in &self.names_at {
            edits.replace(*at..*at, inner.to_owned());
        }
        edits.apply(&self.body)
    }

    fn without_model(request: &impl serde::Serialize, include_usage: bool) -> Result<Self, Misfit> {
        let body = serde_json::to_vec(request)
            .map_err(|_| Misfit::Invalid("body".to_owned(), "an object"))?;
        Ok(Self {
            body: Bytes::from(body),
            model_at: None,
            names_at: Vec::new(),
            include_usage,
            vectors: Vectors::default(),
        })
    }
}

/// A misfit that was found in a chat completion, by the name that a message has for it.
fn in_messages(misfit: Misfit) -> Misfit {
    let name = |name: String| match name.as_str() {
        "parallel_tool_calls" => "tool_choice.disable_parallel_tool_use".to_owned(),
        "reasoning_effort" => "thinking".to_owned(),
        "response_format" => "output_config.format".to_owned(),
        _ => name,
    };
    match misfit {
        Misfit::Invalid(param, expected) => Misfit::Invalid(name(param), expected),
        Misfit::Unsupported(param) => Misfit::Unsupported(name(param)),
    }
}

/// Follows an event stream and gives the caller's events for the backend's.
#[derive(Debug)]
pub enum Translator {
    /// See [`Way::ChatOverMessages`].
    ChatOverMessages(Box<chat_over_messages::Stream>),
    /// See [`Way::MessagesOverChat`].
    MessagesOverChat(Box<messages_over_chat::Stream>),
}

impl Translator {
    /// Takes the backend's next bytes, gives the caller's.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Bytes, EventTooLarge> {
        let mut out = Vec::new();
        match self {
            Self::ChatOverMessages(stream) => stream.feed(bytes, &mut out)?,
            Self::MessagesOverChat(stream) => stream.feed(bytes, &mut out)?,
        }
        Ok(Bytes::from(out))
    }
}

impl Rest {
    /// Something that cannot be carried.
    fn leave(self, param: impl Into<String>) -> Result<(), Misfit> {
        match self {
            Self::Refuse => Err(Misfit::Unsupported(param.into())),
            Self::Drop => Ok(()),
        }
    }
}

/// A backend's error body, for callers that speak `dialect`; empty if it is shaped like no error.
pub fn error(body: &[u8], status: StatusCode, dialect: Dialect) -> Bytes {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = value.get("error");
    let Some(message) = error.and_then(|error| error.get("message")?.as_str()) else {
        return Bytes::new();
    };
    let told = match dialect {
        Dialect::OpenAi => {
            let kind = error.and_then(|error| error.get("type"));
            json!({"error": {"message": message, "type": kind, "param": null, "code": null}})
        }
        Dialect::Anthropic => anthropic_error(status.as_u16(), message),
    };
    Bytes::from(told.to_string())
}

/// Reads one member of a request.
fn read<'a, T: Deserialize<'a>>(
    param: &str,
    raw: &'a RawValue,
    expected: &'static str,
) -> Result<T, Misfit> {
    serde_json::from_str(raw.get()).map_err(|_| Misfit::Invalid(param.to_owned(), expected))
}

/// Whether a member is as good as absent.
fn is_null(raw: &RawValue) -> bool {
    raw.get() == "null"
}

/// Writes a request whose first member is `model`, so that its place is known.
fn with_model(
    model: &str,
    rest: &impl serde::Serialize,
    include_usage: bool,
) -> Result<Translated, Misfit> {
    const START: &[u8] = br#"{"model":"#;
    let shape = |_| Misfit::Invalid("model".to_owned(), "a text");
    let name = serde_json::to_vec(model).map_err(shape)?;
    let members = serde_json::to_vec(rest).map_err(shape)?;
    let mut body = Vec::with_capacity(START.len() + name.len() + members.len());
    body.extend_from_slice(START);
    body.extend_from_slice(&name);
    body.push(b',');
    body.extend_from_slice(members.get(1..).unwrap_or_default());
    Ok(Translated {
        body: Bytes::from(body),
        model_at: Some(START.len()..START.len() + name.len()),
        names_at: Vec::new(),
        include_usage,
        vectors: Vectors::default(),
    })
}
