//! HTTP/1.1 as far as the rig needs it: where a head ends, how long a body is, what lies in its chunks. Bytes come in
//! as they are read; nothing is copied but by [`Buffer`], which keeps what is not used yet.

use std::io;

use memchr::{memchr, memmem};
use tokio::io::{AsyncRead, AsyncReadExt as _};

const FIRST_BUFFER_BYTES: usize = 4 << 10;
/// A head that has not ended by then never will.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Of a chunk: hexadecimal digits and an extension.
const MAX_SIZE_LINE_BYTES: usize = 128;

/// The peer does not speak HTTP/1.1 as expected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

impl From<Malformed> for io::Error {
    fn from(_: Malformed) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, "malformed HTTP")
    }
}

/// What was read and is not used yet.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; FIRST_BUFFER_BYTES],
            start: 0,
            end: 0,
        }
    }

    pub(crate) fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.end);
    }

    pub(crate) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Reads once; false at the end. Cancel safe: either bytes are in the buffer or nothing was read.
    pub(crate) async fn fill(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
        if self.start == self.end {
            self.clear();
        } else if self.end == self.bytes.len() {
            if self.start > 0 {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                self.bytes.resize(self.bytes.len() * 2, 0);
            }
        }
        let read = stream.read(&mut self.bytes[self.end..]).await?;
        if read == self.bytes.len() - self.end && self.bytes.len() < MAX_HEAD_BYTES {
            // More lies in the socket: the next read may take it all.
            self.bytes.resize(MAX_HEAD_BYTES, 0);
        }
        self.end += read;
        Ok(read > 0)
    }
}

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(usize),
    Chunked,
    /// Neither was said: no body in a request, everything until the end of the connection in an answer.
    Unsaid,
}

/// The head of a request or an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// With the empty line at its end.
    pub(crate) bytes: usize,
    /// 0 in a request.
    pub(crate) status: u16,
    pub(crate) framing: Framing,
    /// The connection ends after this message.
    pub(crate) close: bool,
}

/// The head at the beginning of `data`, if all of it is there.
pub(crate) fn head(data: &[u8]) -> Result<Option<Head>, Malformed> {
    let Some(end) = memmem::find(data, b"\r\n\r\n") else {
        return if data.len() > MAX_HEAD_BYTES {
            Err(Malformed)
        } else {
            Ok(None)
        };
    };
    let text = std::str::from_utf8(&data[..end]).map_err(|_| Malformed)?;
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let status = match first.strip_prefix("HTTP/1.1 ") {
        Some(rest) => rest
            .get(..3)
            .and_then(|s| s.parse().ok())
            .ok_or(Malformed)?,
        None if first.ends_with(" HTTP/1.1") => 0,
        None => return Err(Malformed),
    };
    let mut head = Head {
        bytes: end + 4,
        status,
        framing: Framing::Unsaid,
        close: false,
    };
    for line in lines {
        let (name, value) = line.split_once(':').ok_or(Malformed)?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            head.framing = Framing::Length(value.parse().map_err(|_| Malformed)?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            head.framing = Framing::Chunked;
        } else if name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close") {
            head.close = true;
        }
    }
    Ok(Some(head))
}

/// Where in a body the reader is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// Bytes that are left.
    Length(usize),
    /// Before the line with a chunk's size.
    Size,
    /// Bytes of the chunk that are left.
    Data(usize),
    /// Before the end of line after a chunk.
    DataEnd,
    /// Before a line after the last chunk.
    Trailer,
    Done,
}

impl Body {
    pub(crate) fn new(framing: Framing) -> Self {
        match framing {
            Framing::Length(0) | Framing::Unsaid => Self::Done,
            Framing::Length(bytes) => Self::Length(bytes),
            Framing::Chunked => Self::Size,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        *self == Self::Done
    }

    /// Takes what it can, hands on what is content, and returns how many bytes it took.
    pub(crate) fn take(
        &mut self,
        data: &[u8],
        mut content: impl FnMut(&[u8]),
    ) -> Result<usize, Malformed> {
        let mut at = 0;
        loop {
            let rest = &data[at..];
            match *self {
                Self::Done => return Ok(at),
                _ if rest.is_empty() => return Ok(at),
                Self::Length(left) | Self::Data(left) => {
                    let now = left.min(rest.len());
                    content(&rest[..now]);
                    at += now;
                    *self = match (&self, left - now) {
                        (Self::Length(_), 0) => Self::Done,
                        (Self::Length(_), left) => Self::Length(left),
                        (_, 0) => Self::DataEnd,
                        (_, left) => Self::Data(left),
                    };
                }
                Self::Size | Self::DataEnd | Self::Trailer => {
                    let Some(end) = memchr(b'\n', rest) else {
                        return if rest.len() > MAX_SIZE_LINE_BYTES {
                            Err(Malformed)
                        } else {
                            Ok(at)
                        };
                    };
                    *self = self.after_line(rest[..end].trim_ascii())?;
                    at += end + 1;
                }
            }
        }
    }

    fn after_line(&self, line: &[u8]) -> Result<Self, Malformed> {
        match (self, line.is_empty()) {
            (Self::Size, false) => {
                let digits = line.split(|byte| *byte == b';').next().unwrap_or_default();
                let text = std::str::from_utf8(digits).map_err(|_| Malformed)?;
                let bytes = usize::from_str_radix(text.trim(), 16).map_err(|_| Malformed)?;
                Ok(if bytes == 0 {
                    Self::Trailer
                } else {
                    Self::Data(bytes)
                })
            }
            (Self::DataEnd, true) => Ok(Self::Size),
            (Self::Trailer, true) => Ok(Self::Done),
            (Self::Trailer, false) => Ok(Self::Trailer),
            _ => Err(Malformed),
        }
    }
}

/// Counts a word in bytes that come in pieces. The word's letters are all different, so that a letter which does not
/// fit can only be the first one of the next word.
pub(crate) struct Marker {
    word: &'static [u8],
    matched: usize,
    pub(crate) count: u64,
}

impl Marker {
    pub(crate) fn new(word: &'static [u8]) -> Self {
        Self {
            word,
            matched: 0,
            count: 0,
        }
    }

    pub(crate) fn read(&mut self, mut piece: &[u8]) {
        loop {
            if self.matched == 0 {
                match memchr(self.word[0], piece) {
                    Some(at) => piece = &piece[at + 1..],
                    None => return,
                }
                self.matched = 1;
            }
            let Some((byte, rest)) = piece.split_first() else {
                return;
            };
            if *byte == self.word[self.matched] {
                self.matched += 1;
                piece = rest;
                if self.matched == self.word.len() {
                    self.matched = 0;
                    self.count += 1;
                }
            } else {
                self.matched = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), Malformed> {
        let (mut body, mut content, mut kept) = (Body::new(framing), Vec::new(), Vec::new());
        for piece in pieces {
            kept.extend_from_slice(piece);
            let taken = body.take(&kept, |part| content.extend_from_slice(part))?;
            kept.drain(..taken);
        }
        Ok((content, body.is_done()))
    }

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
        assert_eq!(head(&answer[..50]), Ok(None));
        let expected = Head {
            bytes: answer.len() - 5,
            status: 200,
            framing: Framing::Length(5),
            close: true,
        };
        assert_eq!(head(answer), Ok(Some(expected)));
        assert_eq!(head(b"nonsense\r\n\r\n"), Err(Malformed));
    }

    #[test]
    fn chunks_are_read_wherever_they_are_split() {
        let whole = b"5\r\nhello\r\n1;x=y\r\n \r\n5\r\nworld\r\n0\r\n\r\n";
        for split in 0..whole.len() {
            let (first, second) = whole.split_at(split);
            let read = read(Framing::Chunked, &[first, second]).unwrap();
            assert_eq!(read, (b"hello world".to_vec(), true), "split at {split}");
        }
        assert_eq!(read(Framing::Chunked, &[b"zz\r\n"]), Err(Malformed));
    }

    #[test]
    fn a_body_by_length_ends_there() {
        let read = read(Framing::Length(4), &[b"ab", b"cdef"]).unwrap();
        assert_eq!(read, (b"abcd".to_vec(), true));
    }

    #[test]
    fn words_are_counted_wherever_they_are_split() {
        let text = b"qzx qqzx qz qzqzx x";
        for split in 0..text.len() {
            let mut marker = Marker::new(b"qzx");
            marker.read(&text[..split]);
            marker.read(&text[split..]);
            assert_eq!(marker.count, 3, "split at {split}");
        }
    }
}
