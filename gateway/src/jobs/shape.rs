//! How background responses look: requests as they go to the backend, answers and events as the caller gets them.
//! Pure.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

/// The members of an object, in order and as they are.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    members.push((member.0.0, member.1));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// A name, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// The request without `background`; everything else stays as it is.
pub(super) fn request(body: &Bytes) -> Bytes {
    let Ok(Members(members)) = serde_json::from_slice::<Members<'_>>(body) else {
        return body.clone();
    };
    let mut text = String::with_capacity(body.len());
    for (name, value) in members.iter().filter(|(name, _)| name != "background") {
        text.push(if text.is_empty() { '{' } else { ',' });
        text.push_str(&json!(name).to_string());
        text.push(':');
        text.push_str(value.get());
    }
    if text.is_empty() {
        text.push('{');
    }
    text.push('}');
    Bytes::from(text)
}

/// Where a response stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl Status {
    pub(super) fn is_over(self) -> bool {
        !matches!(self, Self::Queued | Self::InProgress)
    }

    /// Of an answer; one that does not say is whole.
    pub(super) fn of(answer: &Value) -> Self {
        match answer["status"].as_str() {
            Some("incomplete") => Self::Incomplete,
            Some("failed") => Self::Failed,
            Some("cancelled") => Self::Cancelled,
            _ => Self::Completed,
        }
    }
}

/// Members of a request that its response repeats.
const REPEATED: [&str; 16] = [
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "truncation",
];

/// A response that has no answer, or none yet.
pub(super) fn pending(
    id: &str,
    created_at: u64,
    status: Status,
    error: Option<&Value>,
    request: &[u8],
) -> Value {
    let request: Map<String, Value> = serde_json::from_slice(request).unwrap_or_default();
    let mut response = json!({
        "id": id, "object": "response", "created_at": created_at, "status": status, "background": true,
        "error": error, "incomplete_details": null, "instructions": null, "metadata": {}, "output": [],
        "parallel_tool_calls": true, "temperature": null, "tool_choice": "auto", "tools": [], "top_p": null,
        "usage": null, "model": request.get("model"),
    });
    for name in REPEATED {
        if let Some(value) = request.get(name) {
            response[name] = value.clone();
        }
    }
    response
}

/// The backend's answer as the caller's: its id is the job's.
pub(super) fn answer(mut answer: Value, id: &str, created_at: u64) -> Value {
    answer["id"] = json!(id);
    answer["background"] = json!(true);
    answer["created_at"] = json!(created_at);
    answer
}

/// What is wrong, out of an error body of the gateway or a backend.
pub(super) fn error(body: &[u8]) -> Value {
    let told: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &told["error"];
    let message = error["message"].as_str().unwrap_or("The backend failed.");
    let code = error["code"].as_str().or(error["type"].as_str());
    json!({"code": code.unwrap_or("server_error"), "message": message})
}

/// What an event of a backend is for a job.
pub(super) enum Event {
    /// To be kept.
    Goes(Bytes),
    /// To be kept; the stream ends with it, and this is the answer.
    Ends(Bytes, Value),
    /// Told already, or meant for no caller.
    Dropped,
    /// The backend failed.
    Broken,
}

/// An event's data as the caller gets it, under `number`.
pub(super) fn event(data: &[u8], number: u64, id: &str, created_at: u64) -> Event {
    if data == b"[DONE]" {
        return Event::Dropped;
    }
    let Ok(mut event) = serde_json::from_slice::<Value>(data) else {
        return Event::Broken;
    };
    let kind = event["type"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        // Told when the job was accepted.
        "response.created" | "response.queued" => return Event::Dropped,
        "error" | "" => return Event::Broken,
        _ => {}
    }
    let ends = matches!(
        kind.as_str(),
        "response.completed" | "response.incomplete" | "response.failed"
    );
    event["sequence_number"] = json!(number);
    let mut whole = Value::Null;
    if event["response"].is_object() {
        let response = answer(event["response"].take(), id, created_at);
        if ends {
            whole = response.clone();
        }
        event["response"] = response;
    }
    let text = written(&kind, &event);
    if ends {
        Event::Ends(text, whole)
    } else {
        Event::Goes(text)
    }
}

/// An event as it goes out. Its `id` is what a client names in `Last-Event-ID`.
pub(super) fn written(kind: &str, event: &Value) -> Bytes {
    let number = &event["sequence_number"];
    Bytes::from(format!("id: {number}\nevent: {kind}\ndata: {event}\n\n"))
}

/// Events that are told when a job is accepted.
pub(super) fn opening(response: &Value) -> Vec<Bytes> {
    let kinds = ["response.created", "response.queued"];
    let events = kinds.iter().zip(0..).map(|(kind, number)| {
        let event = json!({"type": kind, "sequence_number": number, "response": response});
        written(kind, &event)
    });
    events.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_loses_background_and_nothing_else() {
        for (before, after) in [
            (
                r#"{ "model" : "m", "background": true, "input":"a\u00e9","x":1.50 }"#,
                r#"{"model":"m","input":"a\u00e9","x":1.50}"#,
            ),
            (r#"{"background":true}"#, "{}"),
            (r#"{"b\u0061ckground":true,"a":{}}"#, r#"{"a":{}}"#),
            ("[]", "[]"),
        ] {
            assert_eq!(request(&Bytes::from_static(before.as_bytes())), after);
        }
    }

    #[test]
    fn a_pending_response_repeats_what_was_asked() {
        let request =
            br#"{"model":"m","instructions":"be brief","metadata":{"a":"b"},"input":"x"}"#;
        let response = pending("resp_1", 7, Status::Queued, None, request);
        assert_eq!(response["status"], "queued");
        assert_eq!(response["model"], "m");
        assert_eq!(response["instructions"], "be brief");
        assert_eq!(response["metadata"]["a"], "b");
        assert!(response.get("input").is_none());
    }

    #[test]
    fn events_get_the_jobs_id_and_numbers() {
        let data = br#"{"type":"response.completed","sequence_number":9,"response":{"id":"b","status":"completed"}}"#;
        let Event::Ends(text, whole) = event(data, 4, "resp_1", 7) else {
            panic!("it ends the stream");
        };
        let text = std::str::from_utf8(&text).unwrap();
        assert!(
            text.starts_with("id: 4\nevent: response.completed\ndata: {"),
            "{text}"
        );
        assert!(
            text.contains("\"sequence_number\":4") && !text.contains("\"b\""),
            "{text}"
        );
        assert_eq!(
            (&whole["id"], &whole["background"]),
            (&json!("resp_1"), &json!(true))
        );
        let delta = br#"{"type":"response.output_text.delta","delta":"a"}"#;
        assert!(matches!(event(delta, 1, "r", 7), Event::Goes(_)));
        assert!(matches!(
            event(br#"{"type":"response.created"}"#, 1, "r", 7),
            Event::Dropped
        ));
        assert!(matches!(event(b"[DONE]", 1, "r", 7), Event::Dropped));
        assert!(matches!(
            event(br#"{"type":"error"}"#, 1, "r", 7),
            Event::Broken
        ));
        assert!(matches!(event(b"nonsense", 1, "r", 7), Event::Broken));
    }
}
