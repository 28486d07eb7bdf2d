//! Whose fault an error is that a backend tells inside a stream of chunks. Pure.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// What backends call a failure of their own, in lower case and letters only. `InternalServerError` is vLLM's and
/// SGLang's, the others are OpenAI's and its likes'.
const OWN: [&str; 6] = [
    "internalerror",
    "internalservererror",
    "overloadederror",
    "servererror",
    "serviceunavailable",
    "serviceunavailableerror",
];

#[derive(Deserialize)]
struct View<'a> {
    #[serde(borrow, default)]
    code: Option<&'a RawValue>,
    #[serde(borrow, rename = "type", default)]
    kind: Option<&'a RawValue>,
}

/// Whether an `error` says that the backend failed, and not that the request is at fault. A status decides, else a
/// name; one that is not known says nothing.
pub(crate) fn is_backends(error: &RawValue) -> bool {
    let Ok(View { code, kind }) = serde_json::from_str::<View<'_>>(error.get()) else {
        return false;
    };
    if let Some(status) = code.and_then(|code| code.get().parse::<u16>().ok()) {
        return (500..600).contains(&status);
    }
    let mut names = [code, kind].into_iter().flatten().filter_map(name);
    names.any(|name| OWN.contains(&name.as_str()))
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
    use super::*;

    #[test]
    fn a_status_decides_and_else_a_name_that_is_known() {
        for (error, expected) in [
            (
                r#"{"message":"x","type":"InternalServerError","code":500}"#,
                true,
            ),
            (r#"{"type":"Internal Server Error","code":null}"#, true),
            (r#"{"type":"server_error"}"#, true),
            (r#"{"type":"x","code":"internal_error"}"#, true),
            (r#"{"code":503}"#, true),
            (r#"{"type":"InternalServerError","code":400}"#, false),
            (r#"{"type":"BadRequestError","code":400}"#, false),
            (
                r#"{"type":"invalid_request_error","code":"content_filter"}"#,
                false,
            ),
            (r#"{"code":429,"type":"server_error"}"#, false),
            (r#"{"message":"InternalServerError"}"#, false),
            (r#"{"code":600}"#, false),
            (r#""InternalServerError""#, false),
            ("[]", false),
        ] {
            let raw: &RawValue = serde_json::from_str(error).unwrap();
            assert_eq!(is_backends(raw), expected, "{error}");
        }
    }
}
