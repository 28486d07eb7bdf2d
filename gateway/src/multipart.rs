//! The few things that the gateway reads of a form (`multipart/form-data`, RFC 7578): the value of `model` and where it
//! stands, and whether a stream is asked for. All other bytes, files above all, are never looked into. Pure.

use std::ops::Range;

use memchr::memmem;

/// Parts of a form that are looked at; a form with more has its `model` among the first or not at all.
const MAX_PARTS: usize = 64;
/// The head of one part.
const MAX_HEAD_BYTES: usize = 4 << 10;
/// RFC 2046, 5.1.1.
const MAX_BOUNDARY_BYTES: usize = 70;

/// What was read of a form.
#[derive(Debug, PartialEq, Eq)]
pub struct Form<'a> {
    /// The model's name.
    pub model: &'a str,
    /// Where it stands.
    pub model_at: Range<usize>,
    /// Whether an event stream is asked for.
    pub stream: bool,
}

/// The boundary that a `content-type` names; `None` if that is no form's.
pub fn boundary(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    parameters
        .split(';')
        .filter_map(|parameter| parameter.trim().split_once('='))
        .find(|(name, _)| name.eq_ignore_ascii_case("boundary"))
        .map(|(_, value)| value.trim_matches('"'))
        .filter(|value| !value.is_empty() && value.len() <= MAX_BOUNDARY_BYTES)
}

/// Reads a form; `None` if it has no `model`, or is no form with this boundary.
pub fn read<'a>(body: &'a [u8], boundary: &str) -> Option<Form<'a>> {
    let delimiter = format!("\r\n--{boundary}");
    let finder = memmem::Finder::new(delimiter.as_bytes());
    // The first delimiter may stand at the very beginning, without a line end before it.
    let first = delimiter.trim_start().as_bytes();
    let mut position = if body.starts_with(first) {
        first.len()
    } else {
        finder.find(body)? + delimiter.len()
    };
    let (mut model, mut stream) = (None, false);
    for _ in 0..MAX_PARTS {
        let rest = body.get(position..)?;
        // "--" behind a delimiter is the end of the form.
        if rest.starts_with(b"--") {
            break;
        }
        let head_end = memmem::find(rest.get(..MAX_HEAD_BYTES.min(rest.len()))?, b"\r\n\r\n")? + 4;
        let length = finder.find(rest.get(head_end..)?)?;
        let value = position + head_end..position + head_end + length;
        match name(rest.get(..head_end)?) {
            Some("model") if model.is_some() => return None,
            Some("model") => {
                let text = std::str::from_utf8(body.get(value.clone())?).ok()?;
                model = Some((text, value.clone()));
            }
            Some("stream") => stream = body.get(value.clone())?.eq_ignore_ascii_case(b"true"),
            _ => {}
        }
        position = value.end + delimiter.len();
    }
    let (model, model_at) = model.filter(|(model, _)| !model.is_empty())?;
    Some(Form {
        model,
        model_at,
        stream,
    })
}

/// The name that a part's head gives it, if it is no file.
fn name(head: &[u8]) -> Option<&str> {
    let head = std::str::from_utf8(head).ok()?;
    let line = head.split("\r\n").find(|line| {
        let name = line.split(':').next().unwrap_or_default();
        name.eq_ignore_ascii_case("content-disposition")
    })?;
    let mut parameters = line.split(';').skip(1).map(str::trim);
    if parameters.clone().any(|one| one.starts_with("filename")) {
        return None;
    }
    let quoted = parameters.find_map(|one| one.strip_prefix("name="))?;
    Some(quoted.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn form(parts: &[(&str, &str)]) -> String {
        let parts: Vec<String> = parts
            .iter()
            .map(|(head, value)| {
                format!("--XyZ\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n")
            })
            .collect();
        parts.concat() + "--XyZ--\r\n"
    }

    #[test]
    fn model_and_stream_are_found_among_files() {
        let body = form(&[
            (
                "name=\"file\"; filename=\"model\"",
                "RIFF\r\n--Xy\0name=\"model\"",
            ),
            ("name=\"model\"", "whisper-1"),
            ("name=\"stream\"", "True"),
        ]);
        let read = read(body.as_bytes(), "XyZ").unwrap();
        assert_eq!((read.model, read.stream), ("whisper-1", true));
        assert_eq!(&body[read.model_at], "whisper-1");
    }

    #[test]
    fn what_is_no_form_or_has_no_model_is_refused() {
        let twice = form(&[("name=\"model\"", "a"), ("name=\"model\"", "b")]);
        let file = form(&[("name=\"model\"; filename=\"x\"", "a")]);
        let empty = form(&[("name=\"model\"", "")]);
        let cut = &form(&[("name=\"model\"", "a")])[..60];
        for body in [twice.as_str(), &file, &empty, cut, "", "--XyZ", "{}"] {
            assert_eq!(read(body.as_bytes(), "XyZ"), None, "{body}");
        }
    }

    #[test]
    fn boundaries_are_read_quoted_or_not() {
        assert_eq!(boundary("multipart/form-data; boundary=a"), Some("a"));
        let quoted = "Multipart/Form-Data; charset=utf-8; Boundary=\"a b\"";
        assert_eq!(boundary(quoted), Some("a b"));
        for no in [
            "application/json",
            "multipart/form-data",
            "multipart/mixed; boundary=a",
        ] {
            assert_eq!(boundary(no), None, "{no}");
        }
        let long = format!("multipart/form-data; boundary={}", "a".repeat(71));
        assert_eq!(boundary(&long), None);
    }

    proptest! {
        #[test]
        fn a_model_is_found_wherever_it_stands(
            before in prop::collection::vec(("[a-z]{1,5}", "[ -~]{0,30}"), 0..5),
            model in "[a-z/-]{1,20}",
        ) {
            let mut parts: Vec<(String, String)> = before
                .into_iter()
                .filter(|(name, _)| name != "model")
                .map(|(name, value)| (format!("name=\"{name}\""), value))
                .collect();
            parts.push(("name=\"model\"".to_owned(), model.clone()));
            let parts: Vec<(&str, &str)> =
                parts.iter().map(|(head, value)| (head.as_str(), value.as_str())).collect();
            let body = form(&parts);
            prop_assert_eq!(read(body.as_bytes(), "XyZ").unwrap().model, model);
        }

        #[test]
        fn any_bytes_are_read_or_refused_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&body, "a");
            let mut framed = b"--a\r\n".to_vec();
            framed.extend_from_slice(&body);
            let _ = read(&framed, "a");
        }
    }
}
