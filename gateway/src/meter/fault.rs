//! Whose fault an error is that a backend tells inside an answer, in the words of any protocol. Pure.

use std::borrow::Cow;

use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;

/// What backends call a failure of their own, in lower case and letters only. `InternalServerError` is vLLM's and
/// SGLang's; `internal` to `dataloss` are Google's, names that end in `exception` are AWS's, `apierror` and
/// `timeouterror` are Anthropic's; the others are OpenAI's and its likes'.
const OWN: [&str; 14] = [
    "apierror",
    "dataloss",
    "deadlineexceeded",
    "internal",
    "internalerror",
    "internalfailure",
    "internalservererror",
    "internalserverexception",
    "modelerrorexception",
    "modelstreamerrorexception",
    "modeltimeoutexception",
    "servererror",
    "timeouterror",
    "vectorstoretimeout",
];
/// What they call it when there is more to do than they can.
const OVERLOADED: [&str; 7] = [
    "modelnotreadyexception",
    "overloaded",
    "overloadederror",
    "serviceunavailable",
    "serviceunavailableerror",
    "serviceunavailableexception",
    "unavailable",
];
/// What they call it when this caller is over its limit.
const LIMIT: [&str; 6] = [
    "insufficientquota",
    "ratelimiterror",
    "ratelimitexceeded",
    "resourceexhausted",
    "throttlingexception",
    "toomanyrequests",
];

/// What they call it when the request is at fault.
const REQUESTS: [&str; 9] = [
    "badrequest",
    "badrequesterror",
    "contentfilter",
    "contentpolicyviolation",
    "contextlengthexceeded",
    "invalidargument",
    "invalidprompt",
    "invalidrequesterror",
    "validationexception",
];

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The backend failed.
    Backend,
    /// The backend has more to do than it can.
    Overloaded,
    /// The gateway is over its limit there.
    Limit,
    /// The request is at fault, or nothing is known.
    Other,
}

/// An event, or a body, with an error: beside its other members, or in `error`, or in that of `response`.
#[derive(Deserialize)]
struct Told<'a> {
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
    #[serde(borrow, default)]
    response: Option<Within<'a>>,
}

#[derive(Deserialize)]
struct Within<'a> {
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct View<'a> {
    #[serde(borrow, default)]
    code: Option<&'a RawValue>,
    #[serde(borrow, rename = "type", default)]
    kind: Option<&'a RawValue>,
}

/// What an error object says, by its members `code` and `type`. A status decides, else a name; one that is not known
/// says nothing.
pub(crate) fn of(error: &str) -> Fault {
    let Ok(View { code, kind }) = serde_json::from_str::<View<'_>>(error) else {
        return Fault::Other;
    };
    // Some proxies write the status as a text.
    let status = code.and_then(|code| code.get().trim_matches('"').parse::<u16>().ok());
    match status {
        Some(429) => return Fault::Limit,
        Some(503 | 529) => return Fault::Overloaded,
        Some(500..600) => return Fault::Backend,
        Some(_) => return Fault::Other,
        None => {}
    }
    let names = [code, kind].into_iter().flatten().filter_map(name);
    let mut faults = names.map(|name| named(&name));
    faults
        .find(|fault| *fault != Fault::Other)
        .unwrap_or(Fault::Other)
}

/// The body that would have said what the last event of a stream says; empty for what is no error.
pub(crate) fn body(event: &[u8]) -> Bytes {
    let Ok(told) = serde_json::from_slice::<Told<'_>>(event) else {
        return Bytes::new();
    };
    let within = told.response.and_then(|response| response.error);
    match (within, told.error) {
        (Some(error), _) => Bytes::from(format!(r#"{{"error":{}}}"#, error.get())),
        (None, Some(_)) => Bytes::copy_from_slice(event),
        (None, None) => {
            let event = String::from_utf8_lossy(event);
            Bytes::from(format!(r#"{{"error":{event}}}"#))
        }
    }
}

/// The status that an error body would have come with, if it is about the request.
pub(crate) fn of_request(body: &[u8]) -> Option<StatusCode> {
    let told: Told<'_> = serde_json::from_slice(body).ok()?;
    let View { code, kind } = serde_json::from_str(told.error?.get()).ok()?;
    let status = code.and_then(|code| code.get().trim_matches('"').parse::<u16>().ok());
    if let Some(status) = status.filter(|status| (400..600).contains(status)) {
        return matches!(status, 400 | 413 | 422)
            .then(|| StatusCode::from_u16(status).ok())
            .flatten();
    }
    let mut names = [code, kind].into_iter().flatten().filter_map(name);
    let is_known = names.any(|name| REQUESTS.contains(&name.as_str()));
    is_known.then_some(StatusCode::BAD_REQUEST)
}

fn named(name: &str) -> Fault {
    if OWN.contains(&name) {
        Fault::Backend
    } else if OVERLOADED.contains(&name) {
        Fault::Overloaded
    } else if LIMIT.contains(&name) {
        Fault::Limit
    } else {
        Fault::Other
    }
}

impl Fault {
    /// Whether the backend failed, and not the request.
    pub(crate) fn is_backends(self) -> bool {
        matches!(self, Self::Backend | Self::Overloaded)
    }
}

fn name(raw: &RawValue) -> Option<String> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    let Text(text) = serde_json::from_str(raw.get()).ok()?;
    let letters = text.chars().filter(char::is_ascii_alphabetic);
    Some(letters.map(|letter| letter.to_ascii_lowercase()).collect())
}

#[cfg(test)]
mod tests {
    use super::Fault::{Backend, Limit, Other, Overloaded};
    use super::*;

    #[test]
    fn an_error_about_the_request_has_a_status() {
        for (event, expected) in [
            (
                r#"{"error":{"message":"x","type":"BadRequestError","code":400}}"#,
                Some(400),
            ),
            (r#"{"error":{"message":"x","code":"422"}}"#, Some(422)),
            (
                r#"{"type":"error","error":{"type":"invalid_request_error","message":"x"}}"#,
                Some(400),
            ),
            (
                r#"{"type":"error","code":"context_length_exceeded","message":"x"}"#,
                Some(400),
            ),
            (
                r#"{"type":"response.failed","response":{"error":{"code":"invalid_prompt"}}}"#,
                Some(400),
            ),
            (
                r#"{"error":{"type":"invalid_request_error","code":503}}"#,
                None,
            ),
            (r#"{"error":{"type":"BadRequestError","code":404}}"#, None),
            (r#"{"error":{"message":"x","type":"x","code":1}}"#, None),
            (r#"{"error":{"type":"api_error"}}"#, None),
            (r#"{"error":"x"}"#, None),
            ("{}", None),
            ("[DONE]", None),
        ] {
            let status = of_request(&body(event.as_bytes()));
            assert_eq!(status.map(|status| status.as_u16()), expected, "{event}");
        }
    }

    #[test]
    fn a_status_decides_and_else_a_name_that_is_known() {
        for (error, expected) in [
            (
                r#"{"message":"x","type":"InternalServerError","code":500}"#,
                Backend,
            ),
            (r#"{"type":"Internal Server Error","code":null}"#, Backend),
            (r#"{"type":"server_error"}"#, Backend),
            (r#"{"type":"x","code":"internal_error"}"#, Backend),
            (r#"{"code":503}"#, Overloaded),
            (r#"{"type":"InternalServerError","code":400}"#, Other),
            (r#"{"type":"BadRequestError","code":400}"#, Other),
            (
                r#"{"type":"invalid_request_error","code":"content_filter"}"#,
                Other,
            ),
            (r#"{"code":429,"type":"server_error"}"#, Limit),
            (r#"{"code":"429","type":"None"}"#, Limit),
            (r#"{"code":"502"}"#, Backend),
            (r#"{"message":"InternalServerError"}"#, Other),
            (r#"{"code":600}"#, Other),
            (r#""InternalServerError""#, Other),
            ("[]", Other),
        ] {
            assert_eq!(of(error), expected, "{error}");
        }
    }

    #[test]
    fn each_vendors_words_are_known() {
        for (names, expected) in [
            // Anthropic: https://docs.anthropic.com/en/api/errors
            (&["api_error", "timeout_error"][..], Backend),
            (&["overloaded_error"], Overloaded),
            (&["rate_limit_error"], Limit),
            (&["invalid_request_error", "not_found_error"], Other),
            // OpenAI's Responses.
            (&["server_error", "vector_store_timeout"], Backend),
            (&["rate_limit_exceeded", "insufficient_quota"], Limit),
            (&["invalid_prompt", "image_parse_error"], Other),
            // Google.
            (&["INTERNAL", "DEADLINE_EXCEEDED"], Backend),
            (&["UNAVAILABLE"], Overloaded),
            (&["RESOURCE_EXHAUSTED"], Limit),
            (&["INVALID_ARGUMENT", "UNKNOWN"], Other),
            // Bedrock.
            (
                &["internalServerException", "modelStreamErrorException"],
                Backend,
            ),
            (&["serviceUnavailableException"], Overloaded),
            (&["throttlingException"], Limit),
            (&["validationException"], Other),
        ] {
            for name in names {
                for member in ["type", "code"] {
                    let error = format!(r#"{{"message":"x","{member}":"{name}"}}"#);
                    assert_eq!(of(&error), expected, "{error}");
                }
            }
        }
        let both = r#"{"type":"server_error","code":"rate_limit_exceeded"}"#;
        assert_eq!(of(both), Limit);
    }
}
