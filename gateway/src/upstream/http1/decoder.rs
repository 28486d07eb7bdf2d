//! `Decoder`: where the body of an answer ends, and what of it is content (RFC 9112, 6 and 7.1). Pure.

use bytes::Bytes;
use http::HeaderMap;

use super::head::{self, Length, Malformed};

/// Digits of the size of a chunk: more do not fit in 64 bits.
const MAX_SIZE_DIGITS: u8 = 16;
/// All chunk extensions of a body together. They have no meaning here, so they could go on for ever.
const MAX_EXTENSION_BYTES: u32 = 16 << 10;
const MAX_TRAILER_BYTES: usize = 16 << 10;

/// Takes a body as it comes.
#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
    extension_bytes: u32,
    trailers: Option<Box<HeaderMap>>,
    /// More came than belongs to the body.
    has_surplus: bool,
}

#[derive(Debug)]
enum State {
    /// So much content is still to come.
    Content(u64),
    UntilClose,
    /// Within the line that says how large the next chunk is.
    Size {
        size: u64,
        digits: u8,
    },
    /// In the blanks behind its digits.
    SizeBlank(u64),
    /// In what follows them.
    Extension(u64),
    /// The line feed of that line is due.
    SizeEnd(u64),
    /// So much of a chunk is still to come.
    Chunk(u64),
    /// The line break after a chunk is due.
    ChunkEnd,
    /// Its line feed is.
    ChunkEndFeed,
    /// What came of the trailers.
    Trailers(Vec<u8>),
    Over,
    /// What came is no body.
    Malformed,
}

/// Before the line that says how large a chunk is.
const NEXT_CHUNK: State = State::Size { size: 0, digits: 0 };

impl Decoder {
    pub(super) fn new(length: Length) -> Self {
        Self {
            state: match length {
                Length::Known(0) => State::Over,
                Length::Known(length) => State::Content(length),
                Length::Chunked => NEXT_CHUNK,
                Length::UntilClose => State::UntilClose,
            },
            extension_bytes: 0,
            trailers: None,
            has_surplus: false,
        }
    }

    /// Whether the body has ended.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Whether what came last is no body.
    pub(super) fn is_malformed(&self) -> bool {
        matches!(self.state, State::Malformed)
    }

    /// Whether what is left are trailers.
    pub(super) fn has_trailers(&self) -> bool {
        self.trailers.is_some()
    }

    /// Whether it has, and nothing came after it.
    pub(super) fn is_over_alone(&self) -> bool {
        self.is_over() && !self.has_surplus
    }

    pub(super) fn take_trailers(&mut self) -> Option<Box<HeaderMap>> {
        self.trailers.take()
    }

    /// The connection was closed, which is how some bodies end.
    pub(super) fn close(&mut self) -> Result<(), Malformed> {
        if matches!(self.state, State::UntilClose) {
            self.state = State::Over;
        }
        if self.is_over() {
            Ok(())
        } else {
            Err(Malformed)
        }
    }

    /// Takes what came. Afterwards the content stands at the beginning of `bytes`: so many of them. What is good comes
    /// first; that the rest is not is said the next time, see [`Self::is_malformed`].
    pub(super) fn decode(&mut self, bytes: &mut [u8]) -> Result<usize, Malformed> {
        let mut content = 0;
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.len() - at;
            match &mut self.state {
                State::Over => {
                    self.has_surplus = true;
                    break;
                }
                State::UntilClose => {
                    bytes.copy_within(at.., content);
                    content += rest;
                    at = bytes.len();
                }
                State::Content(left) | State::Chunk(left) => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(rest);
                    bytes.copy_within(at..at + taken, content);
                    content += taken;
                    at += taken;
                    *left -= u64::try_from(taken).unwrap_or(u64::MAX);
                    if *left == 0 {
                        self.state = match self.state {
                            State::Chunk(_) => State::ChunkEnd,
                            _ => State::Over,
                        };
                    }
                }
                State::Malformed => break,
                _ => {
                    if self.take(bytes[at]).is_err() {
                        self.state = State::Malformed;
                    }
                    at += 1;
                }
            }
        }
        if self.is_malformed() && content == 0 {
            return Err(Malformed);
        }
        Ok(content)
    }

    /// Takes a byte that has no meaning here.
    fn pass_over(&mut self) -> Result<(), Malformed> {
        self.extension_bytes += 1;
        if self.extension_bytes > MAX_EXTENSION_BYTES {
            return Err(Malformed);
        }
        Ok(())
    }

    /// Takes a byte that is no content.
    fn take(&mut self, byte: u8) -> Result<(), Malformed> {
        let next = match (&mut self.state, byte) {
            (State::Size { size, digits }, byte) => match (hex(byte), byte) {
                (Some(_), _) if *digits == MAX_SIZE_DIGITS => return Err(Malformed),
                (Some(digit), _) => {
                    *size = (*size << 4) | u64::from(digit);
                    *digits += 1;
                    return Ok(());
                }
                _ if *digits == 0 => return Err(Malformed),
                (None, b'\r') => State::SizeEnd(*size),
                (None, b' ' | b'\t') => State::SizeBlank(*size),
                (None, b';') => State::Extension(*size),
                _ => return Err(Malformed),
            },
            (State::SizeBlank(_), b' ' | b'\t') => return self.pass_over(),
            (State::SizeBlank(size), b';') => State::Extension(*size),
            (State::SizeBlank(size) | State::Extension(size), b'\r') => State::SizeEnd(*size),
            // A lone line feed ends a line for some, and none for others.
            (State::Extension(_), byte) if byte != b'\n' => return self.pass_over(),
            (State::SizeEnd(0), b'\n') => State::Trailers(Vec::new()),
            (State::SizeEnd(size), b'\n') => State::Chunk(*size),
            (State::ChunkEnd, b'\r') => State::ChunkEndFeed,
            (State::ChunkEndFeed, b'\n') => NEXT_CHUNK,
            (State::Trailers(came), byte) => {
                came.push(byte);
                if came.len() > MAX_TRAILER_BYTES {
                    return Err(Malformed);
                }
                if came.as_slice() != b"\r\n" && !came.ends_with(b"\r\n\r\n") {
                    return Ok(());
                }
                if came.len() > b"\r\n".len() {
                    let trailers = head::read_trailers(&Bytes::from(std::mem::take(came)))?;
                    self.trailers = Some(Box::new(trailers));
                }
                State::Over
            }
            _ => return Err(Malformed),
        };
        self.state = next;
        Ok(())
    }
}

fn hex(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What comes of `pieces`, one after another, and the decoder that read them.
    fn decoded<'a>(
        length: Length,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(Vec<u8>, Decoder), Malformed> {
        let mut decoder = Decoder::new(length);
        let mut all = Vec::new();
        for piece in pieces {
            let mut piece = piece.to_vec();
            let content = decoder.decode(&mut piece)?;
            all.extend_from_slice(&piece[..content]);
        }
        Ok((all, decoder))
    }

    fn chunked(body: &str) -> Result<(Vec<u8>, Decoder), Malformed> {
        decoded(Length::Chunked, [body.as_bytes()])
    }

    #[test]
    fn chunks_become_content() {
        let body = "5\r\nhello\r\n00b;a=b\r\n, big earth\r\n0\r\n\r\n";
        let (content, mut decoder) = chunked(body).unwrap();
        assert_eq!(content, b"hello, big earth");
        assert!(decoder.is_over_alone());
        assert!(decoder.take_trailers().is_none());
    }

    #[test]
    fn what_is_good_comes_before_what_is_not() {
        let (content, mut decoder) = chunked("2\r\nok\r\nz\r\n").unwrap();
        assert_eq!(content, b"ok");
        assert!(decoder.is_malformed() && !decoder.is_over());
        assert_eq!(decoder.decode(&mut [0]), Err(Malformed));
        assert!(decoder.close().is_err());
    }

    #[test]
    fn trailers_follow_the_last_chunk() {
        let (content, mut decoder) = chunked("1 \r\nx\r\n0\r\nA: b\r\nc:d\r\n\r\n").unwrap();
        assert_eq!(content, b"x");
        assert!(decoder.is_over_alone());
        let trailers = decoder.take_trailers().unwrap();
        assert_eq!(
            (&trailers["a"], &trailers["c"]),
            (&"b".parse().unwrap(), &"d".parse().unwrap())
        );
    }

    #[test]
    fn what_is_no_chunk_is_taken() {
        for body in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "0x1\r\n",
            "1\nx",
            "1\r\nxy",
            "1\r\nx\n",
            "1\rx",
            "1;a\nb\r\n",
            "1 0\r\n",
            "0\r\nbad trailer\r\n\r\n",
            "00000000000000001\r\nx",
            "1\r\nx\r\r\n",
        ] {
            let read = chunked(body);
            let is_taken = read.is_ok_and(|(_, decoder)| !decoder.is_malformed());
            assert!(!is_taken, "{body:?}");
        }
    }

    #[test]
    fn what_has_no_meaning_has_a_bound() {
        let extension = |bytes: u32| format!("1;{}\r\nx", "a".repeat(bytes as usize));
        assert!(chunked(&extension(MAX_EXTENSION_BYTES)).is_ok());
        assert!(chunked(&extension(MAX_EXTENSION_BYTES + 1)).is_err());
        let trailers = |bytes: usize| format!("0\r\na: {}\r\n\r\n", "b".repeat(bytes));
        let around = "a: \r\n\r\n".len();
        assert!(chunked(&trailers(MAX_TRAILER_BYTES - around)).is_ok());
        assert!(chunked(&trailers(MAX_TRAILER_BYTES - around + 1)).is_err());
    }

    #[test]
    fn a_body_of_known_length_ends_there() {
        let (content, decoder) = decoded(Length::Known(3), [&b"ab"[..], b"c"]).unwrap();
        assert_eq!(content, b"abc");
        assert!(decoder.is_over_alone());
        let (content, decoder) = decoded(Length::Known(3), [&b"abcd"[..]]).unwrap();
        assert_eq!(content, b"abc");
        assert!(decoder.is_over() && !decoder.is_over_alone());
    }

    #[test]
    fn only_a_body_without_a_length_ends_with_its_connection() {
        let closed = |length, bytes: &'static [u8]| decoded(length, [bytes]).unwrap().1.close();
        assert!(closed(Length::UntilClose, b"abc").is_ok());
        assert!(closed(Length::Known(3), b"ab").is_err());
        assert!(closed(Length::Chunked, b"1\r\na\r\n").is_err());
        assert!(closed(Length::Chunked, b"1\r\na\r\n0\r\n").is_err());
    }

    proptest! {
        #[test]
        fn chunks_are_the_same_wherever_they_are_cut(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..8),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..12),
            has_trailers: bool,
        ) {
            let mut body = Vec::new();
            for chunk in &chunks {
                body.extend_from_slice(format!("{:X};e=1\r\n", chunk.len()).as_bytes());
                body.extend_from_slice(chunk);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(if has_trailers { b"0\r\na: b\r\n\r\n" } else { b"0\r\n\r\n" });
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &body[cut[0]..cut[1]]);
            let (content, mut decoder) = decoded(Length::Chunked, pieces).unwrap();
            prop_assert_eq!(content, chunks.concat());
            prop_assert!(decoder.is_over_alone());
            prop_assert_eq!(decoder.take_trailers().is_some(), has_trailers);
        }

        #[test]
        fn whatever_comes_means_the_same_wherever_it_is_cut(
            body in "[0-9a-f]{0,3}(;x)?\r?\n?[a-z\r\n0:;]{0,40}",
            cut: prop::sample::Index,
        ) {
            let body = body.as_bytes();
            let (before, after) = body.split_at(cut.index(body.len() + 1));
            let read = |pieces: &[&[u8]]| {
                let mut decoder = Decoder::new(Length::Chunked);
                let mut content = Vec::new();
                for piece in pieces {
                    let mut piece = piece.to_vec();
                    let came = decoder.decode(&mut piece).unwrap_or(0);
                    content.extend_from_slice(&piece[..came]);
                }
                (content, decoder.is_over(), decoder.is_malformed())
            };
            let (whole, parts) = (read(&[body]), read(&[before, after]));
            prop_assert_eq!(whole, parts);
        }
    }
}
