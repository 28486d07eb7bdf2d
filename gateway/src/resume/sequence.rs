//! Events of the Responses API count themselves, from wherever their backend begins, and say which response they are
//! of. So their callers may come back by the response's id and `starting_after`. Pure.

use std::borrow::Cow;

use serde::Deserialize;

use crate::sse::Decoder;

/// Longer ids are no path.
const MAX_ID_BYTES: usize = 64;

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(default)]
    sequence_number: Option<u64>,
    #[serde(default)]
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Response {
    #[serde(default)]
    id: Option<String>,
}

/// What `read` makes of an event as it stands in a stream.
fn of<T>(text: &[u8], read: impl Fn(Event<'_>) -> Option<T>) -> Option<T> {
    let mut found = None;
    let fed = Decoder::default().feed(text, |data, _| {
        found = serde_json::from_slice(data).ok().and_then(&read);
    });
    fed.ok().and(found)
}

/// The id of the response that begins with this event.
pub(super) fn response_id(text: &[u8]) -> Option<String> {
    of(text, |event| {
        let response = event
            .response
            .filter(|_| event.kind == "response.created")?;
        response.id.filter(|id| id.len() <= MAX_ID_BYTES)
    })
}

/// An event's own number.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    of(text, |event| event.sequence_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREATED: &[u8] = b"event: response.created\ndata: {\"type\":\"response.created\",\"sequence_number\":0,\"response\":{\"id\":\"resp_1\",\"output\":[]}}\nid: s:1\n\n";
    const DELTA: &[u8] =
        b"data: {\"type\":\"response.output_text.delta\",\"sequence_number\":4,\"delta\":\"a\"}\n\n";

    #[test]
    fn the_first_event_names_the_response() {
        assert_eq!(response_id(CREATED).as_deref(), Some("resp_1"));
        for text in [
            DELTA,
            b"data: [DONE]\n\n",
            b"data: {\"choices\":[]}\n\n",
            b": x\n\n",
        ] {
            assert_eq!(response_id(text), None);
        }
    }

    #[test]
    fn events_have_numbers_of_their_own() {
        assert_eq!((number(CREATED), number(DELTA)), (Some(0), Some(4)));
        assert_eq!(number(b"data: [DONE]\n\n"), None);
    }
}
