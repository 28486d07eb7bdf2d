//! Heads of messages of HTTP/1.1 (RFC 9112): a request's is written, an answer's is read. Pure.

use std::io::Write as _;
use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};

/// Headers of an answer, or fields of its trailers.
const MAX_FIELDS: usize = 100;

/// Headers that the gateway adds to most answers, for which there is room from the beginning.
const ADDED: usize = 4;

/// What came is not HTTP/1.1, or it is not clear where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// How long a body is (RFC 9112, 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Length {
    Known(u64),
    Chunked,
    /// Until the connection closes.
    UntilClose,
}

/// The head of an answer, and what it says of what follows.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) response: Response<()>,
    pub(super) length: Length,
    /// No other request may follow on this connection.
    pub(super) is_last: bool,
}

/// The head of `request`, whose body has `length` bytes; `None`: it goes in chunks.
pub(super) fn write<T>(request: &Request<T>, length: Option<u64>) -> Vec<u8> {
    let headers = request.headers();
    // A target may have a query and no path; here it has one.
    let (path, query) = (request.uri().path(), request.uri().query());
    let path = if path.is_empty() { "/" } else { path };
    let query_bytes = query.map_or(0, |query| query.len() + 1);
    let fields: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len())
        .sum();
    // The method, the version, and the length of the body fit in what is added.
    let mut head = Vec::with_capacity(path.len() + query_bytes + fields + 96);
    head.extend_from_slice(request.method().as_str().as_bytes());
    head.push(b' ');
    head.extend_from_slice(path.as_bytes());
    if let Some(query) = query {
        head.push(b'?');
        head.extend_from_slice(query.as_bytes());
    }
    head.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in headers {
        if *name == CONTENT_LENGTH || *name == TRANSFER_ENCODING {
            continue;
        }
        write_field(&mut head, name, value);
    }
    match length {
        // Where no body is expected, none is announced (RFC 9110, 8.6).
        Some(0) if ![Method::POST, Method::PUT, Method::PATCH].contains(request.method()) => {}
        Some(length) => {
            // Writing to memory does not fail.
            let _ = write!(head, "content-length: {length}\r\n");
        }
        None => head.extend_from_slice(b"transfer-encoding: chunked\r\n"),
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// One line of a head, or of trailers.
pub(super) fn write_field(to: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    to.extend_from_slice(name.as_str().as_bytes());
    to.extend_from_slice(b": ");
    to.extend_from_slice(value.as_bytes());
    to.extend_from_slice(b"\r\n");
}

/// Where the head of a message ends: behind its first empty line.
pub(super) fn end(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match &bytes[at + 1..] {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

/// The head that `bytes` are, of the answer to a request of `method`.
pub(super) fn read(bytes: &Bytes, method: &Method) -> Result<Head, Malformed> {
    let mut fields = [const { MaybeUninit::<httparse::Header<'_>>::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let status = config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut fields);
    match status {
        Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
        _ => return Err(Malformed),
    }
    let code = parsed.code.ok_or(Malformed)?;
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(code).map_err(|_| Malformed)?;
    *response.version_mut() = match parsed.version {
        Some(1) => Version::HTTP_11,
        _ => Version::HTTP_10,
    };
    let headers = response.headers_mut();
    headers.reserve(parsed.headers.len() + ADDED);
    read_fields(bytes, parsed.headers, headers)?;
    let length = length(&mut response, method)?;
    let is_last = is_last(&response) || length == Length::UntilClose;
    Ok(Head {
        response,
        length,
        is_last,
    })
}

/// The trailers that `bytes` are, with the empty line after them.
pub(super) fn read_trailers(bytes: &Bytes) -> Result<HeaderMap, Malformed> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let Ok(httparse::Status::Complete((_, fields))) = httparse::parse_headers(bytes, &mut fields)
    else {
        return Err(Malformed);
    };
    let mut trailers = HeaderMap::with_capacity(fields.len());
    read_fields(bytes, fields, &mut trailers)?;
    Ok(trailers)
}

fn read_fields(
    all: &Bytes,
    fields: &[httparse::Header<'_>],
    to: &mut HeaderMap,
) -> Result<(), Malformed> {
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Malformed)?;
        let value = HeaderValue::from_maybe_shared(all.slice_ref(field.value));
        to.append(name, value.map_err(|_| Malformed)?);
    }
    Ok(())
}

/// How long the body is; headers that say something else are taken away.
fn length(response: &mut Response<()>, method: &Method) -> Result<Length, Malformed> {
    let status = response.status();
    let has_none = status.is_informational()
        || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&status)
        || *method == Method::HEAD
        || (*method == Method::CONNECT && status.is_success());
    let version = response.version();
    let headers = response.headers_mut();
    let is_encoded = headers.contains_key(TRANSFER_ENCODING);
    if has_none {
        return Ok(Length::Known(0));
    }
    let known = known_length(headers)?;
    if is_encoded {
        // Who says both may mean either; it ought to be an error (RFC 9112, 6.3).
        if known.is_some() || version == Version::HTTP_10 {
            return Err(Malformed);
        }
        return Ok(if is_chunked(headers) {
            Length::Chunked
        } else {
            Length::UntilClose
        });
    }
    Ok(known.map_or(Length::UntilClose, Length::Known))
}

/// What `Content-Length` says, whose repetitions must agree and become one.
fn known_length(headers: &mut HeaderMap) -> Result<Option<u64>, Malformed> {
    let mut known = None;
    let mut count = 0;
    for value in headers.get_all(CONTENT_LENGTH) {
        for text in value.as_bytes().split(|byte| *byte == b',') {
            let text = text.trim_ascii();
            if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
                return Err(Malformed);
            }
            let text = std::str::from_utf8(text).map_err(|_| Malformed)?;
            let length: u64 = text.parse().map_err(|_| Malformed)?;
            if known.is_some_and(|known| known != length) {
                return Err(Malformed);
            }
            known = Some(length);
            count += 1;
        }
    }
    if let Some(length) = known
        && count > 1
    {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok(known)
}

/// Whether `chunked` is the last of the transfer codings.
fn is_chunked(headers: &HeaderMap) -> bool {
    let last = headers.get_all(TRANSFER_ENCODING).iter().next_back();
    last.and_then(|value| value.as_bytes().rsplit(|byte| *byte == b',').next())
        .is_some_and(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"chunked"))
}

/// Whether the connection ends after this message.
fn is_last(response: &Response<()>) -> bool {
    let says = |option: &[u8]| {
        let values = response.headers().get_all(CONNECTION).iter();
        values
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|said| said.trim_ascii().eq_ignore_ascii_case(option))
    };
    match response.version() {
        Version::HTTP_11 => says(b"close"),
        _ => says(b"close") || !says(b"keep-alive"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(head: &'static str, method: &Method) -> Result<Head, Malformed> {
        read(&Bytes::from_static(head.as_bytes()), method)
    }

    #[test]
    fn a_request_says_how_long_it_is() {
        let post = |length| {
            let request = Request::post("http://h/v1/x?a=b").header("host", "pod");
            // What somebody else said of its length counts nothing.
            let request = request.header("content-length", "9").body(()).unwrap();
            String::from_utf8(write(&request, length)).unwrap()
        };
        let start = "POST /v1/x?a=b HTTP/1.1\r\nhost: pod\r\n";
        assert_eq!(post(Some(3)), format!("{start}content-length: 3\r\n\r\n"));
        assert_eq!(post(Some(0)), format!("{start}content-length: 0\r\n\r\n"));
        let chunked = "transfer-encoding: chunked\r\n\r\n";
        assert_eq!(post(None), format!("{start}{chunked}"));
        let bare = Request::get("http://h?x=1").body(()).unwrap();
        assert_eq!(write(&bare, Some(0)), b"GET /?x=1 HTTP/1.1\r\n\r\n");
        let get = Request::get("/").body(()).unwrap();
        assert_eq!(write(&get, Some(0)), b"GET / HTTP/1.1\r\n\r\n");
    }

    #[test]
    fn a_head_ends_with_its_first_empty_line() {
        assert_eq!(end(b"HTTP/1.1 200 OK\r\na: b\r\n\r\nbody"), Some(25));
        assert_eq!(end(b"HTTP/1.1 200 OK\na: b\n\nbody"), Some(22));
        for part in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\n\r", "a\n"] {
            assert_eq!(end(part.as_bytes()), None, "{part:?}");
        }
    }

    /// The length of the body behind `fields`.
    fn length_of(fields: &str) -> Result<Length, Malformed> {
        let head = Bytes::from(format!("HTTP/1.1 200 OK\r\n{fields}\r\n"));
        read(&head, &Method::POST).map(|head| head.length)
    }

    #[test]
    fn the_length_of_a_body_is_certain() {
        use Length::{Chunked, Known, UntilClose};
        for (fields, expected) in [
            ("content-length: 12\r\n", Known(12)),
            ("content-length: 5, 5\r\n", Known(5)),
            ("transfer-encoding: Chunked\r\n", Chunked),
            ("transfer-encoding: gzip, chunked\r\n", Chunked),
            ("transfer-encoding: gzip\r\n", UntilClose),
            ("", UntilClose),
        ] {
            assert_eq!(length_of(fields), Ok(expected), "{fields:?}");
        }
        let none = "HTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(answer(none, &Method::GET).unwrap().length, Known(0));
        let doubt = "HTTP/1.1 304 Not Modified\r\ncontent-length: x\r\n\r\n";
        assert_eq!(answer(doubt, &Method::GET).unwrap().length, Known(0));
        let head = answer(
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n",
            &Method::HEAD,
        )
        .unwrap();
        assert_eq!(head.length, Known(0));
        assert_eq!(head.response.headers()[CONTENT_LENGTH], "5");
        let twice = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n";
        let head = answer(twice, &Method::GET).unwrap();
        let lengths = head.response.headers().get_all(CONTENT_LENGTH);
        assert_eq!(lengths.iter().count(), 1);
    }

    #[test]
    fn an_answer_whose_end_is_in_doubt_is_refused() {
        for fields in [
            "content-length: 5\r\ncontent-length: 6\r\n",
            "content-length: 5, 6\r\n",
            "content-length: +5\r\n",
            "content-length: \r\n",
            "content-length: 18446744073709551616\r\n",
            "content-length: 5\r\ntransfer-encoding: chunked\r\n",
            "a b: c\r\n",
            " folded: c\r\n",
        ] {
            assert_eq!(length_of(fields), Err(Malformed), "{fields:?}");
        }
        for head in [
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
        ] {
            assert!(answer(head, &Method::POST).is_err(), "{head:?}");
        }
    }

    #[test]
    fn what_carries_no_other_request_is_told() {
        for (head, is_last) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", false),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: x, Close\r\n\r\n",
                true,
            ),
            ("HTTP/1.1 200 OK\r\n\r\n", true),
            ("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\n", true),
            (
                "HTTP/1.0 200 OK\r\ncontent-length: 1\r\nconnection: keep-alive\r\n\r\n",
                false,
            ),
        ] {
            assert_eq!(
                answer(head, &Method::GET).unwrap().is_last,
                is_last,
                "{head:?}"
            );
        }
    }

    #[test]
    fn headers_have_a_bound() {
        let head = |count: usize| {
            let fields = "a: b\r\n".repeat(count);
            Bytes::from(format!("HTTP/1.1 200 OK\r\n{fields}\r\n"))
        };
        assert!(read(&head(MAX_FIELDS), &Method::GET).is_ok());
        assert!(read(&head(MAX_FIELDS + 1), &Method::GET).is_err());
    }
}
