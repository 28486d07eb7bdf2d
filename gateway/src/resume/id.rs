//! Ids of events, as callers see them: `strm_<32 hexadecimal digits>:<number>`. The first part names the stream and
//! cannot be guessed, the second one counts its events from 1; so one id is all that a caller needs to come back. Pure.

/// What ids of streams begin with.
pub(super) const PREFIX: &str = "strm_";
const DIGITS: usize = 32;

/// An event of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EventId {
    /// The stream's id.
    pub(super) stream: String,
    /// Its number; 0 is before the first one.
    pub(super) number: u64,
}

/// What a `Last-Event-ID` is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// An id of an event.
    Ours(EventId),
    /// Meant to be one.
    Malformed,
    /// Of another server.
    Foreign,
}

/// Reads a `Last-Event-ID`.
pub(super) fn read(value: &[u8]) -> Told {
    let text = std::str::from_utf8(value).unwrap_or_default().trim();
    let Some(rest) = text.strip_prefix(PREFIX) else {
        return Told::Foreign;
    };
    let Some((digits, number)) = rest.split_once(':') else {
        return Told::Malformed;
    };
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    // `parse` would take a sign.
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    match number.parse() {
        Ok(number) if is_number && digits.len() == DIGITS && digits.bytes().all(is_digit) => {
            Told::Ours(EventId {
                stream: format!("{PREFIX}{digits}"),
                number,
            })
        }
        _ => Told::Malformed,
    }
}

/// The line that gives an event its id.
pub(super) fn line(stream: &str, number: u64) -> String {
    format!("id: {stream}:{number}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "strm_0123456789abcdef0123456789abcdef";

    #[test]
    fn what_a_line_says_is_read_again() {
        for number in [0, 7, u64::MAX] {
            let line = line(STREAM, number);
            let value = line.strip_prefix("id: ").unwrap();
            let id = EventId {
                stream: STREAM.to_owned(),
                number,
            };
            assert_eq!(read(value.as_bytes()), Told::Ours(id));
        }
    }

    #[test]
    fn what_is_not_of_the_form_is_malformed_and_what_others_gave_is_not_ours() {
        for text in [
            STREAM,
            "strm_",
            "strm_:1",
            "strm_0123456789ABCDEF0123456789abcdef:1",
            "strm_0123456789abcdef0123456789abcdef:",
            "strm_0123456789abcdef0123456789abcdef:+1",
            "strm_0123456789abcdef0123456789abcdef:-1",
            "strm_0123456789abcdef0123456789abcdef:18446744073709551616",
            "strm_0123456789abcdef0123456789abcdef0:1",
            "strm_0123456789abcdef0123456789abcde}:1",
        ] {
            assert_eq!(read(text.as_bytes()), Told::Malformed, "{text}");
        }
        for text in ["", "7", "evt_1:2", "\u{e9}"] {
            assert_eq!(read(text.as_bytes()), Told::Foreign, "{text}");
        }
        assert_eq!(read(b"\xff"), Told::Foreign);
    }
}
