//! Protocols that backends speak and no caller does. Each is made to look like chat completions: requests are
//! translated from one, answers, events and errors to one. Callers that speak Messages go the same way, by way of a
//! chat completion. Pure.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue};
use serde_json::json;

use super::chunks::Chunks;
use super::{Misfit, Rest, Translated, bedrock, gemini};
use crate::openai::Api;

/// One such protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Google's Gemini API.
    Gemini,
    /// Its embeddings, which are made to look like OpenAI's.
    GeminiEmbeddings,
    /// AWS Bedrock's Converse API.
    Bedrock,
}

/// Bytes that are no stream of the backend's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream cannot be read")]
pub struct Unreadable;

/// What an answer says of itself that the backend's does not.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// Now, in seconds since 1970.
    pub created: u64,
    /// The request's id.
    pub id: &'a str,
    /// The model that was asked.
    pub model: &'a str,
    /// How its vectors are written.
    pub vectors: Vectors,
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vectors {
    /// As lists of numbers.
    #[default]
    Numbers,
    /// As the base64 of their numbers' bytes, little-endian `f32`.
    Base64,
}

impl About<'_> {
    pub(super) fn chunks(&self) -> Chunks {
        Chunks {
            id: self.id.to_owned(),
            model: self.model.to_owned(),
            created: self.created,
        }
    }
}

impl Foreign {
    /// Whether it has something for `api`.
    pub fn takes(self, api: Api) -> bool {
        match self {
            Self::Gemini | Self::Bedrock => api == Api::Chat,
            Self::GeminiEmbeddings => api == Api::Embeddings,
        }
    }

    /// From the body of a chat completion, or of a call of embeddings.
    pub fn request(self, body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
        match self {
            Self::Gemini => gemini::request(body, rest),
            Self::GeminiEmbeddings => gemini::embeddings::request(body, rest),
            Self::Bedrock => bedrock::request(body, rest),
        }
    }

    /// To a whole chat completion, or to embeddings; `None` if it is no answer of the protocol.
    pub fn answer(self, body: &[u8], about: &About<'_>) -> Option<Bytes> {
        match self {
            Self::Gemini => gemini::answer(body, about),
            Self::GeminiEmbeddings => gemini::embeddings::answer(body, about),
            Self::Bedrock => bedrock::answer(body, about),
        }
    }

    /// What makes chunks of a chat completion of an answer's bytes, if the headers say that it is a stream; they then
    /// say that it is one of events.
    pub fn chunks(self, headers: &mut HeaderMap, about: &About<'_>) -> Option<Incoming> {
        const EVENTS: &str = "text/event-stream";
        let kind = headers.get(CONTENT_TYPE)?.as_bytes();
        match self {
            Self::Gemini if kind.starts_with(EVENTS.as_bytes()) => {
                Some(Incoming::Gemini(Box::new(gemini::Stream::new(about))))
            }
            Self::Bedrock if kind.starts_with(bedrock::EVENT_STREAM.as_bytes()) => {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static(EVENTS));
                Some(Incoming::Bedrock(Box::new(bedrock::Stream::new(about))))
            }
            Self::Gemini | Self::GeminiEmbeddings | Self::Bedrock => None,
        }
    }

    /// To an error of chat completions, empty if it is none; what the body says of when to come back becomes a header.
    pub fn error(self, headers: &mut HeaderMap, body: &[u8]) -> Bytes {
        match self {
            Self::Gemini | Self::GeminiEmbeddings => {
                if let Some(seconds) = gemini::retry_after(body) {
                    headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
                }
                gemini::error(body)
            }
            Self::Bedrock => bedrock::error(headers, body),
        }
    }
}

/// Makes chunks of a chat completion of a stream's bytes.
#[derive(Debug)]
pub enum Incoming {
    /// See [`Foreign::Gemini`].
    Gemini(Box<gemini::Stream>),
    /// See [`Foreign::Bedrock`].
    Bedrock(Box<bedrock::Stream>),
}

impl Incoming {
    /// Takes the backend's next bytes; gives whole events, or nothing yet.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Unreadable> {
        let mut out = Vec::with_capacity(bytes.len() * 2);
        let fed = match self {
            Self::Gemini(stream) => stream.feed(bytes, &mut out).is_ok(),
            Self::Bedrock(stream) => stream.feed(bytes, &mut out).is_ok(),
        };
        if fed { Ok(out) } else { Err(Unreadable) }
    }

    /// The body came to its proper end: what is left to say.
    pub fn end(mut self) -> Vec<u8> {
        let mut out = Vec::new();
        match &mut self {
            Self::Gemini(stream) => stream.end(&mut out),
            Self::Bedrock(stream) => stream.end(&mut out),
        }
        out
    }
}

/// An error in the shape of chat completions.
pub(super) fn shaped(kind: &str, message: &str) -> Bytes {
    let error = json!({"error": {"message": message, "type": kind, "param": null, "code": null}});
    Bytes::from(error.to_string())
}
