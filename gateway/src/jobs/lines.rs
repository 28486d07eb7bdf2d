//! The lines of a batch's input, and those of its output. Pure.

use std::collections::HashSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_128;

use crate::openai::{Api, Call, CallError, Dialect, Wanted};

/// Requests of one batch; OpenAI's limit.
pub(super) const MAX_LINES: u64 = 50_000;
/// One line, pictures included.
pub(super) const MAX_LINE_BYTES: usize = 4 << 20;
/// Mistakes that are told.
pub(super) const MAX_ERRORS: usize = 100;
const MAX_CUSTOM_ID_CHARS: usize = 512;

/// A line as its writer wrote it.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(default)]
    custom_id: Option<String>,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    url: Option<String>,
    #[serde(borrow, default)]
    body: Option<&'a RawValue>,
}

/// A line that can be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) custom_id: String,
    pub(super) body: Bytes,
}

/// A mistake in a line, as the API tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LineError {
    pub(super) code: String,
    pub(super) line: Option<u64>,
    pub(super) message: String,
    pub(super) param: Option<String>,
}

impl LineError {
    pub(super) fn new(code: &str, line: Option<u64>, param: Option<&str>, message: &str) -> Self {
        Self {
            code: code.to_owned(),
            line,
            message: message.to_owned(),
            param: param.map(str::to_owned),
        }
    }
}

/// The calls that a batch may make: those of OpenAI and vLLM whose requests and answers are JSON.
pub(super) fn endpoint(url: &str) -> Option<Api> {
    let api = Api::of_path(url)?;
    let is_json = matches!(
        api,
        Api::Chat
            | Api::Completions
            | Api::Embeddings
            | Api::Rerank
            | Api::Score
            | Api::Responses
            | Api::ImageGeneration
            | Api::Messages
    );
    is_json.then_some(api)
}

/// Reads line `number`, from 1, of a batch for `endpoint`.
pub(super) fn read(bytes: &[u8], number: u64, endpoint: &str) -> Result<Request, LineError> {
    let wrong = |code: &str, param: Option<&str>, message: &str| {
        LineError::new(code, Some(number), param, message)
    };
    let missing = |param: &str| {
        let message = format!("Missing required parameter: '{param}'.");
        wrong("missing_required_parameter", Some(param), &message)
    };
    let not_json = "This line is not parseable as valid JSON.";
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(wrong("invalid_json_line", None, not_json));
    }
    let line: Line<'_> =
        serde_json::from_slice(bytes).map_err(|_| wrong("invalid_json_line", None, not_json))?;
    let custom_id = line.custom_id.ok_or_else(|| missing("custom_id"))?;
    if custom_id.chars().count() > MAX_CUSTOM_ID_CHARS {
        let message = "'custom_id' is longer than 512 characters.";
        return Err(wrong("invalid_custom_id", Some("custom_id"), message));
    }
    let method = line.method.ok_or_else(|| missing("method"))?;
    if method != "POST" {
        return Err(wrong(
            "invalid_method",
            Some("method"),
            "'method' must be POST.",
        ));
    }
    let url = line.url.ok_or_else(|| missing("url"))?;
    if url != endpoint {
        let message =
            format!("The URL of this line does not match the batch's endpoint, {endpoint}.");
        return Err(wrong("invalid_url", Some("url"), &message));
    }
    let body = line.body.ok_or_else(|| missing("body"))?.get();
    let call = Call::parse(body.as_bytes()).map_err(|err| match err {
        CallError::NoModel => missing("body.model"),
        CallError::Json { .. } | CallError::TooDeep => wrong(
            "invalid_body",
            Some("body"),
            "'body' must be a JSON object that names a model.",
        ),
    })?;
    if call.stream || call.wanted == Wanted::Later {
        let message = "A batch's requests can neither stream nor run in the background.";
        return Err(wrong("invalid_body", Some("body"), message));
    }
    Ok(Request {
        custom_id,
        body: Bytes::copy_from_slice(body.as_bytes()),
    })
}

/// The model that a line asks for, if it can be told.
pub(super) fn model_of(line: &[u8]) -> Option<String> {
    let line: Line<'_> = serde_json::from_slice(line).ok()?;
    let call = Call::parse(line.body?.get().as_bytes()).ok()?;
    Some(call.model.into_owned())
}

/// Checks a file line by line.
pub(super) struct Check<'a> {
    endpoint: &'a str,
    seen: HashSet<u128>,
    pub(super) errors: Vec<LineError>,
    pub(super) total: u64,
}

impl<'a> Check<'a> {
    pub(super) fn new(endpoint: &'a str) -> Self {
        Self {
            endpoint,
            seen: HashSet::new(),
            errors: Vec::new(),
            total: 0,
        }
    }

    /// Takes line `number`; `false` if there is no use in going on.
    pub(super) fn take(&mut self, line: &[u8], number: u64) -> bool {
        self.total += 1;
        if self.total > MAX_LINES {
            let message = "The file has more than 50,000 requests.";
            self.errors
                .push(LineError::new("too_many_tasks", None, None, message));
            return false;
        }
        match read(line, number, self.endpoint) {
            Ok(request) => {
                if !self.seen.insert(xxh3_128(request.custom_id.as_bytes())) {
                    let message = "The custom_id of this line is that of another one, too.";
                    self.errors.push(LineError::new(
                        "duplicate_custom_id",
                        Some(number),
                        Some("custom_id"),
                        message,
                    ));
                }
            }
            Err(error) => self.errors.push(error),
        }
        self.errors.len() < MAX_ERRORS
    }

    /// Ends the check.
    pub(super) fn finish(&mut self) {
        if self.total == 0 && self.errors.is_empty() {
            let message = "The file has no requests.";
            self.errors
                .push(LineError::new("empty_file", None, None, message));
        }
    }
}

/// A line of the output for an answer. A body that is no JSON becomes a text.
pub(super) fn answered(
    id: &str,
    custom_id: &str,
    status: u16,
    request_id: &str,
    body: &[u8],
) -> Bytes {
    let raw = serde_json::from_slice::<&RawValue>(body).ok();
    // JSON allows line ends between members; a line has none.
    let one_line = raw.filter(|raw| !raw.get().contains(['\n', '\r']));
    let body = match (one_line, raw) {
        (Some(raw), _) => raw.get().to_owned(),
        (None, Some(raw)) => serde_json::from_str::<serde_json::Value>(raw.get())
            .map_or_else(|_| "null".to_owned(), |value| value.to_string()),
        (None, None) => json!(String::from_utf8_lossy(body)).to_string(),
    };
    let (id, custom_id, request_id) = (json!(id), json!(custom_id), json!(request_id));
    Bytes::from(format!(
        "{{\"id\":{id},\"custom_id\":{custom_id},\"response\":{{\"status_code\":{status},\"request_id\":{request_id},\"body\":{body}}},\"error\":null}}\n"
    ))
}

/// A line of the output for a request that was not made.
pub(super) fn not_made(id: &str, custom_id: &str, code: &str, message: &str) -> Bytes {
    let line = json!({
        "id": id, "custom_id": custom_id, "response": null, "error": {"code": code, "message": message},
    });
    Bytes::from(format!("{line}\n"))
}

/// How a call's errors are written.
pub(super) fn dialect(endpoint: &str) -> Dialect {
    Api::of_path(endpoint).map(Api::dialect).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "/v1/chat/completions";

    fn line(custom_id: &str, url: &str, body: &str) -> String {
        format!(
            "{{\"custom_id\":\"{custom_id}\",\"method\":\"POST\",\"url\":\"{url}\",\"body\":{body}}}"
        )
    }

    #[test]
    fn a_line_is_a_request() {
        let text = line("a", CHAT, "{ \"model\": \"m\" }");
        let request = read(text.as_bytes(), 1, CHAT).unwrap();
        assert_eq!(request.custom_id, "a");
        assert_eq!(request.body, "{ \"model\": \"m\" }");
        assert_eq!(model_of(text.as_bytes()).as_deref(), Some("m"));
    }

    #[test]
    fn mistakes_have_codes_and_lines() {
        let body = "{\"model\":\"m\"}";
        let no_id = format!("{{\"method\":\"POST\",\"url\":\"{CHAT}\",\"body\":{body}}}");
        let get = line("a", CHAT, body).replace("POST", "GET");
        for (text, code, param) in [
            ("nonsense".to_owned(), "invalid_json_line", None),
            ("[1]".to_owned(), "invalid_json_line", None),
            (no_id, "missing_required_parameter", Some("custom_id")),
            (get, "invalid_method", Some("method")),
            (
                line("a", "/v1/embeddings", body),
                "invalid_url",
                Some("url"),
            ),
            (
                line("a", CHAT, "{}"),
                "missing_required_parameter",
                Some("body.model"),
            ),
            (line("a", CHAT, "[]"), "invalid_body", Some("body")),
            (
                line("a", CHAT, "{\"model\":\"m\",\"stream\":true}"),
                "invalid_body",
                Some("body"),
            ),
        ] {
            let error = read(text.as_bytes(), 7, CHAT).unwrap_err();
            assert_eq!(
                (error.code.as_str(), error.param.as_deref()),
                (code, param),
                "{text}"
            );
            assert_eq!(error.line, Some(7));
        }
    }

    #[test]
    fn a_file_is_checked_as_a_whole() {
        let mut check = Check::new(CHAT);
        check.finish();
        assert_eq!(check.errors[0].code, "empty_file");
        let mut check = Check::new(CHAT);
        for number in 1..=3 {
            assert!(check.take(line("same", CHAT, "{\"model\":\"m\"}").as_bytes(), number));
        }
        check.finish();
        let lines: Vec<_> = check.errors.iter().map(|error| error.line).collect();
        assert_eq!(lines, [Some(2), Some(3)]);
        let mut check = Check::new(CHAT);
        let taken = (1..1_000)
            .take_while(|number| check.take(b"x", *number))
            .count();
        assert_eq!(taken + 1, MAX_ERRORS);
    }

    #[test]
    fn output_is_one_line_whatever_the_answer() {
        for body in ["{\"a\":\n1}", "{\"a\":1}", "broken", ""] {
            let line = answered("i", "c\"", 200, "r", body.as_bytes());
            let text = std::str::from_utf8(&line).unwrap();
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(value["custom_id"], "c\"");
            assert_eq!(value["response"]["status_code"], 200);
        }
        let value: serde_json::Value =
            serde_json::from_slice(&not_made("i", "c", "batch_expired", "late")).unwrap();
        assert_eq!(value["error"]["code"], "batch_expired");
    }

    #[test]
    fn calls_with_json_on_both_sides_may_be_in_a_batch() {
        for (url, is_one) in [
            (CHAT, true),
            ("/v1/embeddings", true),
            ("/v1/audio/speech", false),
            ("/v1/images/edits", false),
            ("/v1/batches", false),
            ("x", false),
        ] {
            assert_eq!(endpoint(url).is_some(), is_one, "{url}");
        }
    }
}
