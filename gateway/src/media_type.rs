//! What an answer says that it is (`Content-Type`). Pure.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};

const EVENT_STREAM: &[u8] = b"text/event-stream";

/// Whether it is a stream of events.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let kind = kind.and_then(|kind| kind.split(|byte| *byte == b';').next());
    kind.is_some_and(|kind| kind.trim_ascii().eq_ignore_ascii_case(EVENT_STREAM))
}

/// Whether a body is one that is read before it goes out. What does not say what it is, may be.
pub(crate) fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is = |part: &[u8], word: &[u8]| part.eq_ignore_ascii_case(word);
    kind.is_none_or(|kind| {
        let is_text = kind.get(..5).is_some_and(|kind| is(kind, b"text/"));
        is_text || kind.windows(4).any(|part| is(part, b"json"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))])
    }

    #[test]
    fn types_are_read_in_any_case_and_with_parameters() {
        for kind in [
            "text/event-stream",
            "Text/Event-Stream; charset=utf-8",
            "text/event-stream ;x",
        ] {
            assert!(is_event_stream(&of(kind)) && is_text(&of(kind)), "{kind}");
        }
        for kind in ["application/json", "Application/Problem+JSON", "text/plain"] {
            assert!(!is_event_stream(&of(kind)) && is_text(&of(kind)), "{kind}");
        }
        for kind in ["audio/mpeg", "text/event-streams"] {
            assert!(!is_event_stream(&of(kind)), "{kind}");
        }
        assert!(!is_text(&of("audio/mpeg")) && is_text(&HeaderMap::new()));
    }
}
