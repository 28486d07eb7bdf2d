//! Protocols that backends speak and no caller does. Each is made to look like chat completions: requests are
//! translated from one, answers, events and errors to one. Callers that speak Messages go the same way, by way of a chat
//! completion. Pure.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue};
use serde_json::json;

use super::chunks::Chunks;
use super::{Misfit, Rest, Translated, gemini};
use crate::sse::EventTooLarge;

/// One such protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Google's Gemini API.
    Gemini,
}

/// What an answer says of itself that the backend's does not.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// Now, in seconds since 1970.
    pub created: u64,
    /// The request's id.
    pub id: &'a str,
    /// The model that was asked.
    pub model: &'a str,
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
    /// From the body of a chat completion.
    pub fn request(self, body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
        match self {
            Self::Gemini => gemini::request(body, rest),
        }
    }

    /// To a whole chat completion; `None` if it is no answer of the protocol.
    pub fn answer(self, body: &[u8], about: &About<'_>) -> Option<Bytes> {
        match self {
            Self::Gemini => gemini::answer(body, about),
        }
    }

    /// What makes chunks of a chat completion of an answer's bytes, if the headers say that it is a stream; they then say
    /// that it is one of events.
    pub fn chunks(self, headers: &mut HeaderMap, about: &About<'_>) -> Option<Incoming> {
        let kind = headers.get(CONTENT_TYPE)?;
        match self {
            Self::Gemini => kind
                .as_bytes()
                .starts_with(b"text/event-stream")
                .then(|| Incoming::Gemini(Box::new(gemini::Stream::new(about)))),
        }
    }

    /// To an error of chat completions, empty if it is none; what the body says of when to come back becomes a header.
    pub fn error(self, headers: &mut HeaderMap, body: &[u8]) -> Bytes {
        match self {
            Self::Gemini => {
                if let Some(seconds) = gemini::retry_after(body) {
                    headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
                }
                gemini::error(body)
            }
        }
    }
}

/// Makes chunks of a chat completion of a stream's bytes.
#[derive(Debug)]
pub enum Incoming {
    /// See [`Foreign::Gemini`].
    Gemini(Box<gemini::Stream>),
}

impl Incoming {
    /// Takes the backend's next bytes; gives whole events, or nothing yet.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<u8>, EventTooLarge> {
        let mut out = Vec::with_capacity(bytes.len() * 2);
        match self {
            Self::Gemini(stream) => stream.feed(bytes, &mut out)?,
        }
        Ok(out)
    }

    /// The body came to its proper end: what is left to say.
    pub fn end(mut self) -> Vec<u8> {
        let mut out = Vec::new();
        match &mut self {
            Self::Gemini(stream) => stream.end(&mut out),
        }
        out
    }
}

/// An error in the shape of chat completions.
pub(super) fn shaped(kind: &str, message: &str) -> Bytes {
    let error = json!({"error": {"message": message, "type": kind, "param": null, "code": null}});
    Bytes::from(error.to_string())
}
