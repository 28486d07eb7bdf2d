//! `Failure`: why an attempt gave no answer, what that says of the endpoint, and what the caller is told when nothing
//! else is left. Pure.

use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{Response, StatusCode};
use penstock_core::config::FailureClass;

use crate::attempt::Answer;
use crate::cooldown;
use crate::openai::{self, Api};
use crate::outlier::CONNECT_WEIGHT;
use crate::reject::Reject;
use crate::trust::HandshakeError;

/// The label of [`Failure::Budget`].
pub(crate) const BUDGET: &str = "budget";

/// Why an attempt gave no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No connection.
    Connect,
    /// No connection in time.
    ConnectTimeout,
    /// A connection, but no TLS over it.
    Handshake(HandshakeError),
    /// The backend took no request on any of several connections.
    NotTaken,
    /// The connection ended before an answer began.
    Broken,
    /// An answer began and did not go on in time.
    Stalled,
    /// No answer began in time.
    FirstTokenTimeout,
    /// The rule's limit for the whole request passed.
    Deadline,
    /// The caller broke off its body on the way.
    BodyBroken,
    /// The caller did not go on with its body.
    BodyTimeout,
    /// The answer began with the backend giving up.
    GaveUp,
    /// 429 or 5xx.
    Status { head: Response<()>, bytes: Bytes },
    /// A refusal that is about the backend, not about the request (see [`is_backends_own`]).
    Denied { head: Response<()>, bytes: Bytes },
    /// What it would take there is not left of a budget, or cannot be told.
    Budget(Box<Reject>),
    /// A refusal that another backend may not share.
    Refused {
        class: FailureClass,
        head: Response<()>,
        bytes: Bytes,
    },
}

impl Failure {
    pub(crate) fn class(&self) -> FailureClass {
        match self {
            Self::Connect
            | Self::Handshake(_)
            | Self::NotTaken
            | Self::Broken
            | Self::BodyBroken => FailureClass::Connection,
            Self::ConnectTimeout
            | Self::Stalled
            | Self::FirstTokenTimeout
            | Self::Deadline
            | Self::BodyTimeout => FailureClass::Timeout,
            Self::Status { head, .. } if head.status() == StatusCode::TOO_MANY_REQUESTS => {
                FailureClass::RateLimit
            }
            Self::Budget(_) => FailureClass::RateLimit,
            Self::GaveUp | Self::Status { .. } | Self::Denied { .. } => FailureClass::ServerError,
            Self::Refused { class, .. } => *class,
        }
    }

    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect_timeout",
            Self::Handshake(failed) => failed.label(),
            Self::NotTaken => "not_taken",
            Self::Broken => "broken",
            Self::Stalled => "stalled",
            Self::FirstTokenTimeout => "first_token_timeout",
            Self::Deadline => "deadline",
            Self::BodyBroken => "body_broken",
            Self::BodyTimeout => "body_timeout",
            Self::GaveUp => "gave_up",
            Self::Status { head, .. } if head.status() == StatusCode::TOO_MANY_REQUESTS => {
                "status_429"
            }
            Self::Status { .. } => "status_5xx",
            Self::Denied { .. } => "status_4xx",
            Self::Budget(_) => BUDGET,
            Self::Refused {
                class: FailureClass::ContextLength,
                ..
            } => "context_length",
            Self::Refused { .. } => "content_policy",
        }
    }

    /// What it counts against the endpoint. A 429 says that the endpoint works, and so does one that lacks a model.
    pub(crate) fn weight(&self) -> u32 {
        match self {
            Self::Connect | Self::ConnectTimeout | Self::Handshake(_) => CONNECT_WEIGHT,
            Self::Status { head, .. } if head.status() == StatusCode::TOO_MANY_REQUESTS => 0,
            Self::Denied { .. } if self.lacks_model() => 0,
            // The limit counts all attempts, a refusal is about the request, a body is the caller's: none says a thing
            // of the endpoint.
            Self::Deadline
            | Self::BodyBroken
            | Self::BodyTimeout
            | Self::Budget(_)
            | Self::Refused { .. } => 0,
            _ => 1,
        }
    }

    /// Whether the same endpoint may be asked again when no other is left. Not where that would only wait again.
    pub(crate) fn again(&self) -> bool {
        match self {
            Self::Connect | Self::NotTaken | Self::Broken | Self::GaveUp => true,
            Self::ConnectTimeout
            | Self::Handshake(_)
            | Self::Stalled
            | Self::FirstTokenTimeout
            | Self::Deadline
            | Self::BodyBroken
            | Self::BodyTimeout
            | Self::Denied { .. }
            | Self::Budget(_)
            | Self::Refused { .. } => false,
            Self::Status { head, .. } => head.status() != StatusCode::TOO_MANY_REQUESTS,
        }
    }

    /// Whether the body may have gone upstream.
    pub(crate) fn sent(&self) -> bool {
        !matches!(
            self,
            Self::Connect
                | Self::ConnectTimeout
                | Self::Handshake(_)
                | Self::NotTaken
                | Self::Budget(_)
        )
    }

    /// Whether the backend may have worked for it.
    pub(crate) fn costs(&self) -> bool {
        self.sent() && !self.is_answered()
    }

    /// Whether the backend said that it does not answer, so that it costs nothing.
    fn is_answered(&self) -> bool {
        matches!(
            self,
            Self::Status { .. } | Self::Denied { .. } | Self::Refused { .. }
        )
    }

    /// What the caller is told when this was the last attempt.
    pub(crate) fn conclude(self) -> Result<Answer, Reject> {
        match self {
            Self::Connect | Self::ConnectTimeout | Self::Handshake(_) | Self::NotTaken => {
                Err(Reject::Unreachable)
            }
            Self::Budget(reject) => Err(*reject),
            Self::Broken | Self::GaveUp => Err(Reject::UpstreamBroken),
            Self::FirstTokenTimeout | Self::Stalled => Err(Reject::UpstreamTimeout),
            Self::Deadline => Err(Reject::DeadlineExceeded),
            Self::BodyBroken => Err(Reject::BodyBroken),
            Self::BodyTimeout => Err(Reject::BodyTimeout),
            Self::Status { head, bytes } if openai::is_error(&bytes) => {
                Ok(Answer::Refused { head, bytes })
            }
            Self::Denied { head, bytes } | Self::Refused { head, bytes, .. } => {
                Ok(Answer::Refused { head, bytes })
            }
            Self::Status { head, .. } if head.status() == StatusCode::TOO_MANY_REQUESTS => {
                Err(Reject::UpstreamBusy {
                    retry_after: head.headers().get(RETRY_AFTER).cloned(),
                })
            }
            Self::Status { head, .. } => Err(Reject::UpstreamFailed {
                status: head.status().as_u16(),
            }),
        }
    }

    /// Whether it is the request's end, whatever else could be tried.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Deadline | Self::BodyBroken | Self::BodyTimeout)
    }

    /// Whether the endpoint does not have the model, or what is asked of it.
    pub(crate) fn lacks_model(&self) -> bool {
        matches!(self, Self::Denied { head, .. } if head.status() == StatusCode::NOT_FOUND)
    }

    /// Whether the backend's other endpoints would say the same: they have the same model, credential and account.
    pub(crate) fn is_of_all_endpoints(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Budget(_) => true,
            Self::Denied { head, .. } => matches!(head.status().as_u16(), 401..=403),
            _ => false,
        }
    }

    /// Whether the endpoint is over a limit, or says when to come back.
    pub(crate) fn is_limit(&self) -> bool {
        match self {
            Self::Status { head, .. } => {
                head.status() == StatusCode::TOO_MANY_REQUESTS
                    || (head.status() == StatusCode::SERVICE_UNAVAILABLE
                        && head.headers().contains_key(RETRY_AFTER))
            }
            _ => false,
        }
    }

    /// After which time it may be asked again, if it says so. `since_epoch` is now.
    pub(crate) fn retry_after(&self, since_epoch: Duration) -> Option<Duration> {
        let Self::Status { head, .. } = self else {
            return None;
        };
        let value = head.headers().get(RETRY_AFTER)?;
        cooldown::retry_after(value.to_str().ok()?, since_epoch)
    }
}

/// Why a backend refused, where another one may not: by the codes of OpenAI and Azure, and the words of vLLM, SGLang,
/// Anthropic, Gemini and Bedrock, which have no code for it.
pub(crate) fn class_of_refusal(status: StatusCode, bytes: &[u8]) -> Option<FailureClass> {
    const TOO_LONG: [&[u8]; 8] = [
        b"context_length_exceeded",
        b"maximum context length",
        b"longer than the model",
        b"exceeds the model's context",
        b"prompt is too long",
        b"maximum model length",
        b"exceeds the maximum number of tokens",
        b"Input is too long",
    ];
    let says_too_long = || TOO_LONG.iter().any(|words| says(bytes, words));
    match status.as_u16() {
        400 | 413 | 422 if says_too_long() => Some(FailureClass::ContextLength),
        400 | 403 | 413 | 422 if is_of_policy(status, bytes) => Some(FailureClass::ContentPolicy),
        _ => None,
    }
}

/// Whether a refusal is about what the request says. OpenRouter and others tell of it with 403, which is also what who
/// lacks a permission gets: models for moderation have names like `omni-moderation-latest`.
fn is_of_policy(status: StatusCode, bytes: &[u8]) -> bool {
    const POLICY: [&[u8]; 6] = [
        b"content_policy",
        b"content policy",
        b"content_filter",
        b"content filtering policy",
        b"ResponsibleAIPolicyViolation",
        b"content management policy",
    ];
    let speaks_of_moderation = || {
        let mut found = memchr::memmem::find_iter(bytes, b"oderation");
        found.any(|at| at < 2 || bytes.get(at - 2) != Some(&b'-'))
    };
    POLICY.iter().any(|words| says(bytes, words))
        || status == StatusCode::FORBIDDEN && speaks_of_moderation()
}

fn says(bytes: &[u8], words: &[u8]) -> bool {
    memchr::memmem::find(bytes, words).is_some()
}

/// Whether a refusal is about the backend: the gateway's credential or account there (calls of models never carry those
/// of their callers), a request that it did not read in time, a model that failed behind it (424, Bedrock's
/// `ModelErrorException`), or a model or path that it does not have. A 404 may also be about what the caller says is
/// kept there, a file or an earlier response.
pub(crate) fn is_backends_own(status: StatusCode, api: Api, body: &[u8], bytes: &[u8]) -> bool {
    match status.as_u16() {
        401..=403 | 408 | 424 => true,
        404 => {
            let names_kept = api == Api::Responses || says(body, b"\"file_id\"");
            // Azure calls models deployments.
            let is_model = says(bytes, b"odel") || says(bytes, b"eployment");
            !names_kept || is_model || !openai::is_error(bytes)
        }
        _ => false,
    }
}

/// What a refusal of the backend becomes: passed on if it is shaped like an error, else in the gateway's words. What a
/// provider says about the gateway's own credential is never passed on.
pub(crate) fn refusal(status: StatusCode, bytes: &[u8]) -> Option<Reject> {
    match status {
        StatusCode::UNAUTHORIZED => Some(Reject::UpstreamAuth),
        StatusCode::FORBIDDEN if !is_of_policy(status, bytes) => Some(Reject::UpstreamAuth),
        // An error with status 200 passes however it is shaped.
        _ if status.is_success() || openai::is_error(bytes) => None,
        status if status.is_client_error() => Some(Reject::UpstreamRefused {
            status: status.as_u16(),
        }),
        status => Some(Reject::UpstreamFailed {
            status: status.as_u16(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_for_what_is_said_are_told_from_those_for_who_asks() {
        let policy = Some(FailureClass::ContentPolicy);
        for (status, message, expected) in [
            (400, "Output blocked by content filtering policy", policy),
            (
                400,
                "The response was filtered due to Azure's content management policy",
                policy,
            ),
            (
                403,
                "openai/o1 requires moderation and your input was flagged",
                policy,
            ),
            (403, "Moderation: the prompt was flagged", policy),
            (403, "This goes against our content policy", policy),
            (403, "No access to model omni-moderation-latest", None),
            (403, "This key is not allowed here", None),
            (400, "moderation must be one of low, auto", None),
            (401, "content policy", None),
        ] {
            let body = format!(r#"{{"error":{{"message":"{message}"}}}}"#);
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                class_of_refusal(status, body.as_bytes()),
                expected,
                "{message}"
            );
            let is_auth = matches!(refusal(status, body.as_bytes()), Some(Reject::UpstreamAuth));
            let hides = matches!(status.as_u16(), 401 | 403) && expected.is_none();
            assert_eq!(is_auth, hides, "{message}");
        }
    }
}
