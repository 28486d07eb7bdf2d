//! What callers see of each reason: one table. Pure.

use penstock_core::config::Unit;

use super::Reject;
use crate::depth::MAX_DEPTH;

/// Callers see at most this much of the model name that they sent.
const SHOWN_MODEL_CHARS: usize = 128;

/// Everything about a reason that callers see.
pub(super) struct Shape {
    pub(super) status: u16,
    pub(super) label: &'static str,
    pub(super) kind: &'static str,
    pub(super) message: String,
    pub(super) param: Option<String>,
    pub(super) retry_after_s: Option<u32>,
}

const INVALID: &str = "invalid_request_error";
pub(super) const SERVER: &str = "server_error";
const LIMIT: &str = "rate_limit_error";
const AUTHENTICATION: &str = "authentication_error";
const PERMISSION: &str = "permission_error";

/// What callers call a unit.
fn counted(unit: Unit) -> &'static str {
    match unit {
        Unit::Requests => "requests",
        Unit::Tokens => "tokens",
        Unit::InputTokens => "tokens of prompts",
        Unit::OutputTokens => "tokens of answers",
        Unit::MicroUsd => "micro-USD",
        Unit::Concurrency => "requests at one time",
    }
}

/// What callers see of a name that they sent.
fn shown(model: &str) -> String {
    model.chars().take(SHOWN_MODEL_CHARS).collect()
}

impl Reject {
    #[expect(
        clippy::too_many_lines,
        reason = "one arm a reason: the table is clearer whole"
    )]
    pub(super) fn shape(&self) -> Shape {
        let shape = |status: u16, label: &'static str, kind: &'static str, message: &str| Shape {
            status,
            label,
            kind,
            message: message.to_owned(),
            param: None,
            retry_after_s: None,
        };
        match self {
            Self::PathNotFound => shape(
                404,
                "path_not_found",
                INVALID,
                "This path does not exist here. Use POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, \
                 /v1/messages/count_tokens, /v1/embeddings, /v1/rerank, /v1/score, /v1/audio/…, /v1/images/…, /v1/files or /v1/batches, or GET \
                 /v1/models.",
            ),
            Self::MethodNotAllowed { allowed } => shape(
                405,
                "method_not_allowed",
                INVALID,
                &format!("This path takes {allowed} only."),
            ),
            Self::DotSegments => shape(
                400,
                "dot_segments",
                INVALID,
                "The path has segments '.' or '..': send it without them.",
            ),
            Self::UpgradeUnsupported => shape(
                501,
                "upgrade_unsupported",
                INVALID,
                "WebSockets and other upgrades do not pass through here. Use plain requests or event streams.",
            ),
            Self::HeadersTooLarge => shape(
                431,
                "headers_too_large",
                INVALID,
                "The request has too many headers, or too large ones.",
            ),
            Self::EncodedBody => shape(
                415,
                "encoded_body",
                INVALID,
                "Send the body without content-encoding.",
            ),
            Self::BodyTooLarge { max_bytes } => shape(
                413,
                "body_too_large",
                INVALID,
                &format!("The body is larger than {max_bytes} bytes."),
            ),
            Self::BodyTimeout => shape(
                408,
                "body_timeout",
                INVALID,
                "The body did not arrive in time.",
            ),
            Self::BodyBroken => shape(
                400,
                "body_broken",
                INVALID,
                "The body could not be read to its end.",
            ),
            Self::AmbiguousLength => shape(
                400,
                "ambiguous_length",
                INVALID,
                "Give the length of the body once: as content-length, or by transfer-encoding: chunked and nothing else.",
            ),
            Self::InvalidJson { line, column } => shape(
                400,
                "invalid_json",
                INVALID,
                &format!(
                    "The body is not a JSON object of the right shape: see line {line}, column {column}."
                ),
            ),
            Self::TooDeep => shape(
                400,
                "too_deep",
                INVALID,
                &format!("The body is nested deeper than {MAX_DEPTH} levels."),
            ),
            Self::MissingModel => Shape {
                param: Some("model".to_owned()),
                ..shape(400, "missing_model", INVALID, "The body must name a model.")
            },
            Self::InvalidField { param, expected } => Shape {
                param: Some(param.clone()),
                ..shape(
                    400,
                    "invalid_field",
                    INVALID,
                    &format!("'{param}' must be {expected}."),
                )
            },
            Self::InvalidPrompt { param, message } => Shape {
                param: Some((*param).to_owned()),
                ..shape(400, "invalid_prompt", INVALID, message)
            },
            Self::ParameterOutOfRange { param, bound } => Shape {
                param: Some((*param).to_owned()),
                ..shape(
                    400,
                    "parameter_out_of_range",
                    INVALID,
                    &format!("'{param}' may be {bound} here."),
                )
            },
            Self::UnsupportedByBackend { param } => Shape {
                param: Some(param.clone()),
                ..shape(
                    400,
                    "unsupported_by_backend",
                    INVALID,
                    &format!(
                        "No backend for this model can carry '{param}': leave it out, or ask for another model."
                    ),
                )
            },
            Self::DeadlineExceeded => shape(
                504,
                "deadline_exceeded",
                SERVER,
                "The request was not answered within the limit that its rule sets.",
            ),
            Self::ModelNotFound { model } => {
                let shown = shown(model);
                Shape {
                    param: Some("model".to_owned()),
                    ..shape(
                        404,
                        "model_not_found",
                        INVALID,
                        &format!(
                            "The model '{shown}' does not exist here. GET /v1/models lists the models."
                        ),
                    )
                }
            }
            Self::NoRule { model } => {
                let shown = shown(model);
                shape(
                    404,
                    "no_rule",
                    INVALID,
                    &format!(
                        "The model '{shown}' is served here, but no rule takes this request: see 'match' of its rules."
                    ),
                )
            }
            Self::KeyMissing => shape(
                401,
                "key_missing",
                AUTHENTICATION,
                "Callers need a key here: send one as 'Authorization: Bearer …' or 'x-api-key: …'.",
            ),
            Self::KeyUnknown => shape(
                401,
                "key_unknown",
                AUTHENTICATION,
                "This key is not known here, or no longer.",
            ),
            Self::KeyExpired => shape(
                401,
                "key_expired",
                AUTHENTICATION,
                "This key has expired: ask for a new one.",
            ),
            Self::KeySuspended => shape(403, "key_suspended", PERMISSION, "This key is suspended."),
            Self::TokenInvalid { why } => shape(
                401,
                "token_invalid",
                AUTHENTICATION,
                &format!("This token is not good: {why}."),
            ),
            Self::TokenExpired => shape(
                401,
                "token_expired",
                AUTHENTICATION,
                "This token has expired: get a new one from its issuer.",
            ),
            Self::IdentityIncomplete { claim } => shape(
                403,
                "identity_incomplete",
                PERMISSION,
                &format!(
                    "This token does not say who its caller is: its claim '{}' is missing, or no text that can be used.",
                    shown(claim)
                ),
            ),
            Self::ScopeMissing => shape(
                403,
                "scope_missing",
                PERMISSION,
                "This token or certificate has none of the scopes that are needed here.",
            ),
            Self::IdentityUnavailable { .. } => Shape {
                retry_after_s: Some(2),
                ..shape(
                    503,
                    "identity_unavailable",
                    SERVER,
                    "The keys of this token's issuer could not be read yet. Try again.",
                )
            },
            Self::KeysUnavailable { .. } => Shape {
                retry_after_s: Some(2),
                ..shape(
                    503,
                    "keys_unavailable",
                    SERVER,
                    "The gateway's store, which has its keys, does not answer. Try again.",
                )
            },
            Self::ModelNotAllowed { model } => Shape {
                param: Some("model".to_owned()),
                ..shape(
                    403,
                    "model_not_allowed",
                    PERMISSION,
                    &format!("This key is not for the model '{}'.", shown(model)),
                )
            },
            Self::PolicyNotAllowed => shape(
                403,
                "policy_not_allowed",
                PERMISSION,
                "This key is not for what would answer this request.",
            ),
            Self::BudgetExceeded {
                budget,
                unit,
                max,
                left,
                retry_ms,
                ..
            } => Shape {
                retry_after_s: retry_ms
                    .map(|ms| u32::try_from(ms.div_ceil(1000).max(1)).unwrap_or(u32::MAX)),
                ..shape(
                    429,
                    "budget_exceeded",
                    LIMIT,
                    &format!(
                        "The budget '{budget}' has {left} of {max} {} left, and this request may take more{}.",
                        counted(*unit),
                        if retry_ms.is_some() {
                            ""
                        } else {
                            ", also when all of it is left: ask for less"
                        }
                    ),
                )
            },
            Self::BudgetUnavailable { budget } => Shape {
                retry_after_s: Some(1),
                ..shape(
                    503,
                    "budget_unavailable",
                    SERVER,
                    &format!("What the budget '{budget}' has left cannot be told now."),
                )
            },
            Self::BudgetNotDurable { budget } => shape(
                503,
                "budget_not_durable",
                SERVER,
                &format!(
                    "The budget '{budget}' is hard, and the gateway's store may forget what was spent: it must write a log to its disk, and evict nothing."
                ),
            ),
            Self::BudgetBroken { budget } => shape(
                503,
                "budget_broken",
                SERVER,
                &format!(
                    "The budget '{budget}' is hard and has a mistake: see the conditions of the TokenBudget."
                ),
            ),
            Self::BudgetUnbounded { budget, why } => shape(
                400,
                "budget_unbounded",
                INVALID,
                &format!(
                    "The budget '{budget}' is hard, and nothing bounds what this request takes: {why}."
                ),
            ),
            Self::BudgetUnpriced { budget } => shape(
                403,
                "budget_unpriced",
                PERMISSION,
                &format!(
                    "The budget '{budget}' counts money, and no backend for this request has a price: give its LLMBackend one, or the TokenBudget 'unpricedMicroUsd'."
                ),
            ),
            Self::LoopDetected => shape(
                508,
                "loop_detected",
                SERVER,
                "The request came back to a gateway that it already went through: a backend leads into the gateway.",
            ),
            Self::Overloaded => Shape {
                retry_after_s: Some(1),
                ..shape(
                    503,
                    "overloaded",
                    SERVER,
                    "The gateway carries as many requests as it may. Try again.",
                )
            },
            Self::Saturated => Shape {
                retry_after_s: Some(1),
                ..shape(
                    503,
                    "saturated",
                    SERVER,
                    "The backends of this model have more requests than they can answer in time. Try again.",
                )
            },
            Self::EndsBackends { retry_after_s } => Shape {
                retry_after_s: Some(*retry_after_s),
                ..shape(
                    503,
                    "ends_backends",
                    SERVER,
                    "Two backends broke off when they read this request. It is not sent again for a while: change it, or \
                     report it to whoever runs them.",
                )
            },
            Self::NoStore => shape(
                501,
                "no_store",
                INVALID,
                "This gateway keeps nothing: background responses, batches and files need one that was started with \
                 --store.",
            ),
            Self::StoreAway => Shape {
                retry_after_s: Some(1),
                ..shape(
                    503,
                    "store_unavailable",
                    SERVER,
                    "The store cannot be reached, or does not answer. Try again.",
                )
            },
            Self::StoreFull => shape(
                507,
                "store_full",
                SERVER,
                "The store has no room. Delete files, or try again later.",
            ),
            Self::TooManyJobs => Shape {
                retry_after_s: Some(30),
                ..shape(
                    429,
                    "too_many_jobs",
                    LIMIT,
                    "As many jobs wait as may. Try again later.",
                )
            },
            Self::StorageQuota { max_bytes } => Shape {
                message: format!(
                    "Your files and background responses may take {max_bytes} bytes. \
                     Delete some, or wait until they expire."
                ),
                ..shape(403, "storage_quota_exceeded", PERMISSION, "")
            },
            Self::NotFound { what, id } => Shape {
                param: Some("id".to_owned()),
                ..shape(
                    404,
                    "not_found",
                    INVALID,
                    &format!("No such {what}: '{id}'."),
                )
            },
            Self::StreamNotFound => shape(
                404,
                "stream_not_found",
                INVALID,
                "There is no stream with the event of 'Last-Event-ID', or it is kept no longer: send the request anew.",
            ),
            Self::Conflict { message } => shape(409, "conflict", INVALID, message),
            Self::NotConfigured => Shape {
                retry_after_s: Some(1),
                ..shape(
                    503,
                    "not_configured",
                    SERVER,
                    "The gateway has no configuration yet. Try again.",
                )
            },
            Self::NoEndpoint => Shape {
                retry_after_s: Some(5),
                ..shape(
                    503,
                    "no_endpoint",
                    SERVER,
                    "No replica is ready for this model. Try again.",
                )
            },
            Self::CredentialMissing => Shape {
                retry_after_s: Some(5),
                ..shape(
                    503,
                    "credential_missing",
                    SERVER,
                    "The credential for this model's backend has not arrived. Try again.",
                )
            },
            Self::Unreachable => Shape {
                retry_after_s: Some(1),
                ..shape(
                    503,
                    "upstream_unreachable",
                    SERVER,
                    "No backend for this model could be reached, or all broke off before they answered. Try again.",
                )
            },
            Self::UpstreamTimeout => Shape {
                retry_after_s: Some(1),
                ..shape(
                    504,
                    "upstream_timeout",
                    SERVER,
                    "The backend did not begin to answer in time, or not go on.",
                )
            },
            Self::UpstreamSilent {
                waited,
                retry_after_s,
            } => Shape {
                retry_after_s: Some(*retry_after_s),
                ..shape(
                    503,
                    "upstream_silent",
                    SERVER,
                    &format!(
                        "No backend for this model answers: for more than {} s earlier requests have waited in vain for \
                         a first token, or for a connection. Try again later.",
                        waited.as_secs_f32()
                    ),
                )
            },
            Self::UpstreamBroken => Shape {
                retry_after_s: Some(1),
                ..shape(
                    502,
                    "upstream_broken",
                    SERVER,
                    "The backend broke off before it answered.",
                )
            },
            Self::UpstreamFailed { status } => Shape {
                retry_after_s: Some(1),
                ..shape(
                    if *status == 503 { 503 } else { 502 },
                    "upstream_failed",
                    SERVER,
                    &format!("The backend failed with status {status}."),
                )
            },
            Self::UpstreamBusy { .. } => shape(
                429,
                "upstream_busy",
                LIMIT,
                "Every backend for this model limits requests now.",
            ),
            Self::UpstreamUnavailable { retry_after_s } => Shape {
                retry_after_s: Some(*retry_after_s),
                ..shape(
                    503,
                    "upstream_unavailable",
                    SERVER,
                    "Every backend for this model says that it is not available now.",
                )
            },
            Self::UpstreamAuth => shape(
                502,
                "upstream_auth",
                SERVER,
                "The backend does not accept the gateway's credential.",
            ),
            Self::UpstreamRefused { status } => shape(
                *status,
                "upstream_refused",
                INVALID,
                &format!("The backend refused the request with status {status}."),
            ),
        }
    }
}
