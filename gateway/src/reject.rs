//! `Reject`: the closed list of reasons for which the gateway itself refuses or ends a request. Each has one status,
//! one label for metrics, logs and the header `x-penstock-reason`, and one body in the protocol of the caller. Nothing
//! else in this crate makes error answers.
//!
//! Messages are for callers: no secret, no address of a backend.

use std::time::Duration;

use http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use penstock_core::config::Unit;
use penstock_core::key::Hash;
use penstock_core::names::REASON_HEADER;
use serde_json::{Value, json};

use crate::openai::{CallError, Dialect};
use shape::Shape;

mod broken;
mod shape;

pub use broken::{Broken, error_event};

const REASON: HeaderName = HeaderName::from_static(REASON_HEADER);
/// Limit, remaining, reset (<https://platform.openai.com/docs/guides/rate-limits>).
static RATE_OF_REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
/// Whether it is worth the while to ask again.
static SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
static RATE_OF_TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Why a request is not answered by a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reject {
    /// No such path.
    PathNotFound,
    /// The path has segments that a backend may resolve to another path.
    DotSegments,
    /// The caller wants another protocol on the connection.
    UpgradeUnsupported,
    /// The path exists, the method is another one.
    MethodNotAllowed {
        /// The one that is allowed.
        allowed: &'static str,
    },
    /// More or larger headers than allowed.
    HeadersTooLarge,
    /// The body has a content encoding.
    EncodedBody,
    /// The body is larger than allowed.
    BodyTooLarge {
        /// The limit.
        max_bytes: usize,
    },
    /// The body did not arrive in time.
    BodyTimeout,
    /// The body broke off.
    BodyBroken,
    /// Where the body ends can be read in two ways.
    AmbiguousLength,
    /// The body is not a JSON object of the right shape.
    InvalidJson {
        /// Line of the mistake, from 1.
        line: usize,
        /// Column of the mistake, from 1.
        column: usize,
    },
    /// The body is nested too deep.
    TooDeep,
    /// No `model` in the body.
    MissingModel,
    /// A member of the body has the wrong shape.
    InvalidField {
        /// Which one.
        param: String,
        /// What it must be.
        expected: &'static str,
    },
    /// The stored prompt that the caller asks for cannot be used so.
    InvalidPrompt {
        /// The member that is wrong.
        param: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// A parameter lies beyond a bound of the rule.
    ParameterOutOfRange {
        /// Which one.
        param: &'static str,
        /// The bound, such as `at most 4096`.
        bound: String,
    },
    /// No backend for the model can carry a member of the body.
    UnsupportedByBackend {
        /// Which one.
        param: String,
    },
    /// The rule's limit for the whole request.
    DeadlineExceeded,
    /// No rule takes this model.
    ModelNotFound {
        /// As the caller wrote it.
        model: String,
    },
    /// Rules name this model, but the conditions of none hold.
    NoRule {
        /// As the caller wrote it.
        model: String,
    },
    /// The gateway knows its callers, and this one shows no key.
    KeyMissing,
    /// What the caller shows is no key, or none any more.
    KeyUnknown,
    /// The key was good until some time ago.
    KeyExpired,
    /// The key is refused for the time being.
    KeySuspended,
    /// A token of a provider that is known, and no proof of anything.
    TokenInvalid {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A token that was good once.
    TokenExpired,
    /// A good token that does not say who its caller is.
    IdentityIncomplete {
        /// The claim that it lacks, or says nothing with.
        claim: String,
    },
    /// A good token or certificate of a caller who may do nothing.
    ScopeMissing,
    /// The keys of a provider are not known.
    IdentityUnavailable {
        /// They are being read.
        is_awaited: bool,
    },
    /// Keys cannot be read from the store.
    KeysUnavailable {
        /// The one that was not read yet.
        unread: Option<Hash>,
    },
    /// The key is not for this model.
    ModelNotAllowed {
        /// As the caller wrote it.
        model: String,
    },
    /// The key is not for the rules of the policy that takes the request.
    PolicyNotAllowed,
    /// A budget has not enough left.
    BudgetExceeded {
        /// `TokenBudget/limit`.
        budget: String,
        /// What is counted.
        unit: Unit,
        /// The most of it.
        max: u64,
        /// What is left of that.
        left: u64,
        /// When there may be enough, in ms; `None`: not by waiting.
        retry_ms: Option<u64>,
        /// How long an answer may be for which there is enough, in tokens.
        fits_tokens: Option<u32>,
    },
    /// A budget must not be exceeded, and the store does not say what is left.
    BudgetUnavailable {
        /// See above.
        budget: String,
    },
    /// A budget must not be exceeded, and the store may forget what was spent.
    BudgetNotDurable {
        /// See above.
        budget: String,
    },
    /// All backends said that they are not available.
    UpstreamUnavailable {
        /// For so long.
        retry_after_s: u32,
    },
    /// A budget must not be exceeded, and has a mistake.
    BudgetBroken {
        /// The TokenBudget.
        budget: String,
    },
    /// A budget must not be exceeded, and nothing bounds what the request takes.
    BudgetUnbounded {
        /// See above.
        budget: String,
        /// What has no bound.
        why: &'static str,
    },
    /// A budget counts money, and the backends that could answer have no price.
    BudgetUnpriced {
        /// See above.
        budget: String,
    },
    /// The request went through this gateway before.
    LoopDetected,
    /// Too many requests or request bytes at one time.
    Overloaded,
    /// More requests wait for the backends than they answer before callers give up.
    Saturated,
    /// Backends ended when they read this body.
    EndsBackends {
        /// When it may be sent again.
        retry_after_s: u32,
    },
    /// The gateway was started without a store.
    NoStore,
    /// The store cannot be reached.
    StoreAway,
    /// The store has no room.
    StoreFull,
    /// As many jobs wait as may.
    TooManyJobs,
    /// One caller's files and responses would take more than they may.
    StorageQuota {
        /// What they may take.
        max_bytes: u64,
    },
    /// No such file, batch or response, or it is somebody else's.
    NotFound {
        /// What it would be.
        what: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// No stream has events with the id that the caller saw last, or it is somebody else's.
    StreamNotFound,
    /// It cannot be done any more.
    Conflict {
        /// Why.
        message: &'static str,
    },
    /// No config has arrived yet.
    NotConfigured,
    /// No endpoint became ready while the request waited, or too many wait already.
    NoEndpoint,
    /// Every candidate needs a credential that has not arrived.
    CredentialMissing,
    /// No endpoint could be reached, or none that did not break off.
    Unreachable,
    /// The backend sent no answer in time.
    UpstreamTimeout,
    /// All backends are known to take requests and to answer none.
    UpstreamSilent {
        /// How long earlier requests waited for a first token, at least.
        waited: Duration,
        /// When it may be over.
        retry_after_s: u32,
    },
    /// The backend closed the connection or answered what is not HTTP.
    UpstreamBroken,
    /// The backend answered with a server error that has no OpenAI shape.
    UpstreamFailed {
        /// Its status.
        status: u16,
    },
    /// The backend limits requests.
    UpstreamBusy {
        /// What it said about when to come back.
        retry_after: Option<HeaderValue>,
    },
    /// The backend does not accept the gateway's credential.
    UpstreamAuth,
    /// The backend refused the request in a body that has no OpenAI shape.
    UpstreamRefused {
        /// Its status, 4xx.
        status: u16,
    },
}

impl From<CallError> for Reject {
    fn from(err: CallError) -> Self {
        match err {
            CallError::Json { line, column } => Self::InvalidJson { line, column },
            CallError::NoModel => Self::MissingModel,
            CallError::TooDeep => Self::TooDeep,
        }
    }
}

impl Reject {
    /// The value of the `outcome` label.
    pub fn label(&self) -> &'static str {
        self.shape().label
    }

    /// Status, headers and body of the answer to a caller that speaks `protocol`.
    pub fn parts(&self, dialect: Dialect) -> (StatusCode, HeaderMap, Vec<u8>) {
        let Shape {
            status,
            label,
            kind,
            message,
            param,
            retry_after_s,
        } = self.shape();
        let body = match dialect {
            Dialect::OpenAi => {
                json!({"error": {"message": message, "type": kind, "param": param, "code": label}})
            }
            Dialect::Anthropic => anthropic_error(status, &message),
        };
        let mut headers = HeaderMap::with_capacity(4);
        headers.insert(REASON, HeaderValue::from_static(label));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Self::UpstreamBusy {
            retry_after: Some(value),
        } = self
        {
            headers.insert(RETRY_AFTER, value.clone());
        }
        self.limits(&mut headers);
        if let Self::MethodNotAllowed { allowed } = self {
            headers.insert(http::header::ALLOW, HeaderValue::from_static(allowed));
        }
        if status == 401 {
            // RFC 9110, 11.6.1: a 401 says how it would be taken.
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
        (status, headers, body.to_string().into_bytes())
    }
}

impl Reject {
    /// What a limit allows, in the headers by which OpenAI says it.
    fn limits(&self, headers: &mut HeaderMap) {
        let Self::BudgetExceeded {
            unit,
            max,
            left,
            retry_ms,
            ..
        } = self
        else {
            return;
        };
        if retry_ms.is_none() {
            // The official SDKs heed it.
            headers.insert(&SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        let names = match unit {
            Unit::Requests | Unit::Concurrency => &RATE_OF_REQUESTS,
            Unit::Tokens | Unit::InputTokens | Unit::OutputTokens => &RATE_OF_TOKENS,
            Unit::MicroUsd => return,
        };
        let [limit, remaining, reset] = names;
        headers.insert(limit, HeaderValue::from(*max));
        headers.insert(remaining, HeaderValue::from(*left));
        let seconds = retry_ms.map(|ms| format!("{}s", ms.div_ceil(1000)));
        if let Some(reset_in) = seconds.and_then(|text| HeaderValue::from_str(&text).ok()) {
            headers.insert(reset, reset_in);
        }
    }
}

/// An error body in Anthropic's shape, with the type that goes with the status
/// (<https://docs.anthropic.com/en/api/errors>).
pub fn anthropic_error(status: u16, message: &str) -> Value {
    let kind = match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::Wire;

    /// Those about callers.
    fn of_callers() -> Vec<Reject> {
        vec![
            Reject::KeyMissing,
            Reject::KeyUnknown,
            Reject::KeyExpired,
            Reject::KeySuspended,
            Reject::TokenInvalid {
                why: "its signature is wrong",
            },
            Reject::TokenExpired,
            Reject::IdentityIncomplete {
                claim: "team".to_owned(),
            },
            Reject::ScopeMissing,
            Reject::IdentityUnavailable { is_awaited: false },
            Reject::ModelNotAllowed {
                model: "chat".to_owned(),
            },
            Reject::PolicyNotAllowed,
            Reject::BudgetExceeded {
                budget: "search/monthly".to_owned(),
                unit: Unit::Tokens,
                max: 1_000,
                left: 7,
                retry_ms: Some(1_500),
                fits_tokens: None,
            },
            Reject::BudgetUnavailable {
                budget: "search/monthly".to_owned(),
            },
            Reject::BudgetNotDurable {
                budget: "search/monthly".to_owned(),
            },
            Reject::UpstreamUnavailable { retry_after_s: 7 },
            Reject::BudgetBroken {
                budget: "team".to_owned(),
            },
            Reject::BudgetUnbounded {
                budget: "search/monthly".to_owned(),
                why: "it does not say how long its answer may be",
            },
            Reject::BudgetUnpriced {
                budget: "search/monthly".to_owned(),
            },
        ]
    }

    fn all() -> Vec<Reject> {
        [of_callers(), others()].concat()
    }

    fn others() -> Vec<Reject> {
        vec![
            Reject::PathNotFound,
            Reject::DotSegments,
            Reject::UpgradeUnsupported,
            Reject::MethodNotAllowed { allowed: "POST" },
            Reject::HeadersTooLarge,
            Reject::EncodedBody,
            Reject::BodyTooLarge { max_bytes: 1024 },
            Reject::BodyTimeout,
            Reject::BodyBroken,
            Reject::AmbiguousLength,
            Reject::InvalidJson { line: 1, column: 2 },
            Reject::TooDeep,
            Reject::MissingModel,
            Reject::InvalidField {
                param: "stop".to_owned(),
                expected: "a text or a list of texts",
            },
            Reject::InvalidPrompt {
                param: "prompt.id",
                message: "There is no prompt 'support'.".to_owned(),
            },
            Reject::ParameterOutOfRange {
                param: "max_tokens",
                bound: "at most 4096".to_owned(),
            },
            Reject::UnsupportedByBackend {
                param: "logit_bias".to_owned(),
            },
            Reject::DeadlineExceeded,
            Reject::ModelNotFound {
                model: format!("no\"pe{}", "x".repeat(1000)),
            },
            Reject::NoRule {
                model: "chat".to_owned(),
            },
            Reject::LoopDetected,
            Reject::Overloaded,
            Reject::NoStore,
            Reject::StoreAway,
            Reject::StoreFull,
            Reject::TooManyJobs,
            Reject::StorageQuota { max_bytes: 1 << 30 },
            Reject::NotFound {
                what: "batch",
                id: "batch_1".to_owned(),
            },
            Reject::StreamNotFound,
            Reject::Conflict {
                message: "The batch is over and cannot be cancelled.",
            },
            Reject::NotConfigured,
            Reject::NoEndpoint,
            Reject::CredentialMissing,
            Reject::Unreachable,
            Reject::UpstreamTimeout,
            Reject::UpstreamSilent {
                waited: Duration::from_mins(5),
                retry_after_s: 10,
            },
            Reject::UpstreamBroken,
            Reject::UpstreamFailed { status: 500 },
            Reject::UpstreamBusy {
                retry_after: Some(HeaderValue::from_static("7")),
            },
            Reject::UpstreamAuth,
            Reject::UpstreamRefused { status: 422 },
        ]
    }

    #[test]
    fn every_reason_has_its_answer() {
        insta::assert_snapshot!(answers(Dialect::OpenAi));
    }

    #[test]
    fn anthropic_callers_get_its_error_shape() {
        insta::assert_snapshot!(answers(Dialect::Anthropic));
    }

    fn answers(dialect: Dialect) -> String {
        let answers: Vec<String> = all()
            .iter()
            .map(|reject| {
                let (status, headers, body) = reject.parts(dialect);
                let retry = headers
                    .get(RETRY_AFTER)
                    .map_or("-", |value| value.to_str().unwrap());
                assert!(crate::openai::is_error(&body));
                format!(
                    "{} {retry} {}",
                    status.as_u16(),
                    String::from_utf8(body).unwrap()
                )
            })
            .collect();
        answers.join("\n")
    }

    #[test]
    fn labels_are_distinct() {
        let labels: std::collections::BTreeSet<_> = all().iter().map(Reject::label).collect();
        assert_eq!(labels.len(), all().len());
    }

    #[test]
    fn the_last_event_of_a_broken_stream_closes_an_open_one_first() {
        let event = String::from_utf8(Broken::Cut.event(Wire::Chunks, true)).unwrap();
        assert!(event.starts_with("\n\ndata: {\"error\""), "{event}");
        assert!(event.ends_with("}\n\n"));
        let event = Broken::Stalled.event(Wire::Chunks, false);
        assert!(event.starts_with(b"data: "));
    }

    #[test]
    fn a_broken_stream_ends_as_its_protocol_ends_broken_ones() {
        for wire in [Wire::Responses, Wire::Messages] {
            let event = String::from_utf8(Broken::Deadline.event(wire, false)).unwrap();
            let data = event.strip_prefix("event: error\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data.trim_end()).unwrap();
            assert_eq!(data["type"], "error");
            assert!(data["error"]["message"].is_string());
        }
    }
}
