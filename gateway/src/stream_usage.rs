//! Asks backends to count the tokens of every stream (`stream_options.include_usage`), so that costs and budgets rest
//! on what the engine counted. Callers who did not ask get the stream without that chunk (see `events`). Pure.

use std::ops::Range;

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::edits::{Edits, place};
use crate::job::Job;
use crate::openai::{self, Api, Call, Encoding, Pieces};
use crate::provider::Route;
use crate::snapshot::Candidate;

/// Behind the value of `model` in a body without `stream_options`.
const OPTIONS: &[u8] = br#","stream_options":{"include_usage":true}"#;

/// How a body that does not ask for the count is made to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asking {
    /// It has no `stream_options`.
    Insert,
    /// It has other ones, there.
    Replace(Range<usize>, String),
}

/// What has to change; `None` where the caller asks for the count, or the backend is not to be asked.
pub(crate) fn asking(job: &Job<'_>, candidate: &Candidate, route: Route) -> Option<Asking> {
    let has_count = matches!(job.api, Api::Chat | Api::Completions);
    let can_count = !candidate.backend.profile.capabilities.lacks_stream_usage;
    let is_stream = job.call.stream && job.call.encoding == Encoding::Json;
    if !has_count || !can_count || !is_stream || !route.is_straight() {
        return None;
    }
    of_call(job.body, job.call)
}

fn of_call(body: &[u8], call: &Call<'_>) -> Option<Asking> {
    let Some(options) = call.stream_options else {
        return Some(Asking::Insert);
    };
    let mut members: Map<String, Value> = match serde_json::from_str(options).ok()? {
        Value::Object(members) => members,
        Value::Null => Map::new(),
        // The backend says what is wrong with it.
        _ => return None,
    };
    if members.get("include_usage") == Some(&Value::Bool(true)) {
        return None;
    }
    members.insert("include_usage".to_owned(), Value::Bool(true));
    let value = Value::Object(members).to_string();
    Some(Asking::Replace(place(body, options), value))
}

/// The body with the value at `model_at` replaced by the JSON text `model`, made to ask.
pub(crate) fn patched(
    body: &Bytes,
    model_at: Range<usize>,
    model: &Bytes,
    asking: &Asking,
) -> Pieces {
    match asking {
        Asking::Insert => {
            let value = [model, OPTIONS].concat();
            openai::patched(body, model_at, Bytes::from(value))
        }
        Asking::Replace(at, value) => {
            let mut edits = Edits::default();
            edits.replace(model_at, String::from_utf8_lossy(model).into_owned());
            edits.replace(at.clone(), value.clone());
            openai::unpatched(edits.apply(body))
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Buf as _;
    use serde_json::json;

    use super::*;

    /// The body that goes upstream; `None` where it stays as it is.
    fn sent(body: &str) -> Option<String> {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let call = Call::parse(&body).unwrap();
        let asking = of_call(&body, &call)?;
        let model = Bytes::from_static(b"\"other\"");
        let mut pieces = patched(&body, call.model_at.clone(), &model, &asking);
        let sent = pieces.copy_to_bytes(pieces.remaining());
        Some(String::from_utf8(sent.to_vec()).unwrap())
    }

    #[test]
    fn a_body_without_options_gets_them_and_keeps_all_else() {
        assert_eq!(
            sent(r#"{ "model" : "m", "stream":true, "x": 1.0 }"#).unwrap(),
            r#"{ "model" : "other","stream_options":{"include_usage":true}, "stream":true, "x": 1.0 }"#
        );
    }

    #[test]
    fn other_options_stay_wherever_they_stand() {
        let wanted = json!({"model": "other", "stream_options": {"include_usage": true, "x": [1]}});
        for body in [
            r#"{"model":"m","stream_options":{"x":[1]}}"#,
            r#"{"stream_options":{"x":[1],"include_usage":false},"model":"m"}"#,
        ] {
            let sent: Value = serde_json::from_str(&sent(body).unwrap()).unwrap();
            assert_eq!(sent, wanted);
        }
        let sent = sent(r#"{"stream_options":null,"model":"m"}"#).unwrap();
        assert_eq!(
            sent,
            r#"{"stream_options":{"include_usage":true},"model":"other"}"#
        );
    }

    #[test]
    fn who_asks_or_asks_wrongly_is_left_alone() {
        assert_eq!(
            sent(r#"{"model":"m","stream_options":{"include_usage":true}}"#),
            None
        );
        assert_eq!(sent(r#"{"model":"m","stream_options":7}"#), None);
    }
}
