//! Follows the bytes of an HTTP/1 connection from head to head, only to see what the parser hides: a head that gives
//! its body's length twice over, by Content-Length and by Transfer-Encoding. Whoever sits in front of the gateway may
//! have believed the other one, and what follows the body would be somebody else's request (RFC 9112, 6.1 and 11.2).
//! Pure.
//!
//! Bytes come in as they are read; out comes the number of the first head that cannot be trusted. Nothing is kept but
//! the beginning of one line. Line ends are those of `httparse`: LF, with or without CR before it.

/// The beginning of a line that is kept: a name, white space and 20 digits.
const LINE_BYTES: usize = 64;
const PREFACE: &[u8] = b"PRI * HTTP/2.0";

/// Where in the connection the next byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the line that begins a request, or before it.
    Start,
    /// In a header.
    Header,
    /// In a body; so many bytes are left of it.
    Body(u64),
    /// In the line that gives the length of a chunk.
    ChunkSize,
    /// In a chunk; so many bytes are left of it.
    Chunk(u64),
    /// In the line end that follows a chunk.
    ChunkEnd,
    /// In a trailer.
    Trailer,
    /// Nothing more can be told, or need be: another protocol, or an error that ends the connection.
    Off,
}

/// What a head says of its body's length.
#[derive(Clone, Copy, Debug, Default)]
struct Lengths {
    length: Option<u64>,
    is_encoded: bool,
}

/// What the bytes say of their connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The head of this number, from 0, is the first whose body has no one length; nothing behind it is looked at.
    Doubtful(u64),
    /// It is HTTP/2.
    Http2,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Framing {
    place: Place,
    line: [u8; LINE_BYTES],
    /// Length of the present line, which may be longer than what is kept.
    line_bytes: usize,
    lengths: Lengths,
    /// Heads that ended.
    heads: u64,
    found: Option<Found>,
}

impl Framing {
    /// At the beginning of a connection.
    pub(crate) fn new() -> Self {
        Self {
            place: Place::Start,
            line: [0; LINE_BYTES],
            line_bytes: 0,
            lengths: Lengths::default(),
            heads: 0,
            found: None,
        }
    }

    /// Whether more must come before a request is whole.
    pub(crate) fn is_inside(&self) -> bool {
        match self.place {
            Place::Off => false,
            Place::Start => self.line_bytes > 0,
            _ => true,
        }
    }

    /// Takes in what was read. What was found stays found.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) -> Option<Found> {
        while !bytes.is_empty() {
            match &mut self.place {
                Place::Off => break,
                Place::Body(left) | Place::Chunk(left) => {
                    let some = usize::try_from(*left).unwrap_or(usize::MAX);
                    let some = some.min(bytes.len());
                    *left -= some as u64;
                    bytes = &bytes[some..];
                    if *left == 0 {
                        self.place = match self.place {
                            Place::Chunk(_) => Place::ChunkEnd,
                            _ => Place::Start,
                        };
                    }
                }
                _ => bytes = self.line(bytes),
            }
        }
        self.found
    }

    /// Takes the rest of a line, and returns what follows it.
    fn line<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let end = memchr::memchr(b'\n', bytes);
        let piece = &bytes[..end.unwrap_or(bytes.len())];
        if let Some(room) = self.line.get_mut(self.line_bytes..) {
            let kept = piece.len().min(room.len());
            room[..kept].copy_from_slice(&piece[..kept]);
        }
        self.line_bytes = self.line_bytes.saturating_add(piece.len());
        let Some(end) = end else { return &[] };
        let kept = self.line;
        let is_cut = self.line_bytes > LINE_BYTES;
        let line = &kept[..self.line_bytes.min(LINE_BYTES)];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        self.line_bytes = 0;
        self.place = match self.place {
            Place::Start if line.is_empty() => Place::Start,
            Place::Start if line.starts_with(PREFACE) => {
                self.found = Some(Found::Http2);
                Place::Off
            }
            Place::Start => Place::Header,
            Place::Header if line.is_empty() => self.head(),
            Place::Header => self.header(line, is_cut),
            Place::ChunkSize => chunk(line),
            Place::ChunkEnd => Place::ChunkSize,
            Place::Trailer if line.is_empty() => Place::Start,
            place => place,
        };
        &bytes[end + 1..]
    }

    fn header(&mut self, line: &[u8], is_cut: bool) -> Place {
        if is_named(line, b"transfer-encoding:") {
            self.lengths.is_encoded = true;
        } else if is_named(line, b"content-length:") {
            let value = line[b"content-length:".len()..].trim_ascii();
            let length = number(value, 10).filter(|_| !is_cut);
            if length.is_none()
                || self
                    .lengths
                    .length
                    .is_some_and(|before| length != Some(before))
            {
                return self.doubt();
            }
            self.lengths.length = length;
        }
        Place::Header
    }

    /// A head has ended.
    fn head(&mut self) -> Place {
        let Lengths { length, is_encoded } = std::mem::take(&mut self.lengths);
        let next = match (length, is_encoded) {
            (Some(_), true) => return self.doubt(),
            (None, true) => Place::ChunkSize,
            (None | Some(0), false) => Place::Start,
            (Some(length), false) => Place::Body(length),
        };
        self.heads += 1;
        next
    }

    fn doubt(&mut self) -> Place {
        self.found = Some(Found::Doubtful(self.heads));
        Place::Off
    }
}

fn is_named(line: &[u8], name: &[u8]) -> bool {
    line.len() >= name.len() && line[..name.len()].eq_ignore_ascii_case(name)
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    let digits = std::str::from_utf8(digits).ok()?;
    let starts_well = digits.starts_with(|first: char| first.is_ascii_hexdigit());
    starts_well.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// What follows the line that gives a chunk's length.
fn chunk(line: &[u8]) -> Place {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit());
    match number(&line[..digits.count()], 16) {
        Some(0) => Place::Trailer,
        Some(length) => Place::Chunk(length),
        None => Place::Off,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The verdict, whatever pieces the bytes come in.
    fn found(text: &str) -> Option<Found> {
        let whole = Framing::new().feed(text.as_bytes());
        let mut framing = Framing::new();
        let mut last = None;
        for byte in text.as_bytes() {
            last = framing.feed(std::slice::from_ref(byte));
        }
        assert_eq!(whole, last, "{text:?}");
        whole
    }

    const BOTH: &str =
        "POST / HTTP/1.1\r\ncontent-length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    const EITHER: [&str; 7] = [
        "GET /?content-length: 1 HTTP/1.1\r\nhost: x\r\n\r\n",
        "\r\nPOST / HTTP/1.1\r\nContent-Length: 5\r\nx: transfer-encoding: y\r\n\r\nhello",
        "POST / HTTP/1.1\ncontent-length:5\n\n\r\n\r\nx",
        "POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n12;x=y\r\ncontent-length: 3\n\r\n0\r\nx: y\r\n\r\n",
        "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nA\r\n\r\n0\r\n\r\n\r\n\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\n{}",
    ];

    #[test]
    fn a_body_with_two_lengths_is_found_in_any_order_and_case() {
        for text in [
            BOTH,
            "POST / HTTP/1.1\r\nTRANSFER-ENCODING:chunked\r\nx: y\r\nCONTENT-LENGTH:3\r\n\r\n",
            "POST / HTTP/1.1\ntransfer-encoding: chunked\ncontent-length: 3\n\n",
            "POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: +3\r\n\r\n",
            &format!(
                "POST / HTTP/1.1\r\ncontent-length:{}3\r\n\r\n",
                " ".repeat(80)
            ),
        ] {
            assert_eq!(found(text), Some(Found::Doubtful(0)), "{text:?}");
        }
    }

    #[test]
    fn it_is_found_behind_other_requests_and_their_bodies() {
        for before in EITHER {
            assert_eq!(found(before), None, "{before:?}");
            let text = format!("{before}{before}{BOTH}");
            assert_eq!(found(&text), Some(Found::Doubtful(2)), "{text:?}");
        }
    }

    #[test]
    fn http_2_is_seen_and_left_alone() {
        let text =
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\ncontent-length: 3\r\ntransfer-encoding: x\r\n\r\n";
        assert_eq!(found(text), Some(Found::Http2));
    }

    #[test]
    fn a_request_is_whole_with_its_last_byte() {
        for text in [
            "GET / HTTP/1.1\r\nhost: x\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ] {
            let mut framing = Framing::new();
            for request in text.repeat(2).as_bytes().chunks(text.len()) {
                assert!(!framing.is_inside());
                for at in 0..request.len() - 1 {
                    framing.feed(&request[at..=at]);
                    assert!(framing.is_inside(), "{at} of {text}");
                }
                framing.feed(&request[request.len() - 1..]);
            }
            assert!(!framing.is_inside(), "{text}");
        }
        let mut framing = Framing::new();
        framing.feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        assert!(!framing.is_inside(), "HTTP/2 has no such order");
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_give_one_verdict(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            cut in 0..300_usize,
        ) {
            let whole = Framing::new().feed(&bytes);
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let mut framing = Framing::new();
            framing.feed(first);
            prop_assert_eq!(framing.feed(second), whole);
        }
    }
}
