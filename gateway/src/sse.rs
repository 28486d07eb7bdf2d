//! Server-sent events, sans I/O: bytes in, events out, whatever the chunk boundaries. Bytes are only looked at, never
//! changed; line ends may be LF, CRLF or CR (HTML standard, 9.2.6). An event without end is refused at
//! [`MAX_EVENT_BYTES`], or what its decoder was made for, so a hostile upstream cannot make the gateway grow.

use std::ops::Range;

use memchr::memchr2;

/// Largest event that is kept when it comes in pieces. Real chunks are below 64 KiB; embeddings of tool calls and
/// log probabilities stay below 1 MiB.
pub const MAX_EVENT_BYTES: usize = 1 << 20;
/// The same of events that carry a picture: one of 1536 × 1024 in PNG has some 4 MiB in base64.
pub const MAX_PICTURE_BYTES: usize = 8 << 20;

/// Room that is kept from one event for the next. Most events need none of it, so what a large one needed is given
/// back: thousands of streams may wait for their callers.
const KEPT_BYTES: usize = 16 << 10;

/// Events of this size are rare: copying them anew for little room each time costs more than what lies idle.
const LARGE_BYTES: usize = 256 << 10;

/// A text may begin with it, and it means nothing there (HTML standard, 9.2.5: "one leading U+FEFF").
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// An event that never ends, or one larger than its decoder takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is too large")]
pub struct EventTooLarge;

/// What came before the next byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Before {
    /// No whole line.
    #[default]
    Nothing,
    /// CR: an LF that follows belongs to it.
    Cr,
    Other,
}

/// Incremental decoder; one for each stream.
#[derive(Debug)]
pub struct Decoder {
    /// Bytes of the largest event that is kept.
    most: usize,
    /// A line whose end has not come yet.
    line: Vec<u8>,
    /// Data lines of the event so far, joined by LF.
    data: Vec<u8>,
    has_data: bool,
    before: Before,
    /// Some byte of an unfinished event was seen.
    inside: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::up_to(MAX_EVENT_BYTES)
    }
}

impl Decoder {
    /// For events of at most `most` bytes.
    pub fn up_to(most: usize) -> Self {
        Self {
            most,
            line: Vec::new(),
            data: Vec::new(),
            has_data: false,
            before: Before::default(),
            inside: false,
        }
    }

    /// Whether bytes of an unfinished event were seen.
    pub fn is_inside_event(&self) -> bool {
        self.inside
    }

    /// The data of the unfinished event, if it ended here.
    pub fn open_data(&self) -> Option<&[u8]> {
        match (self.has_data, self.line.is_empty()) {
            (true, true) => Some(&self.data),
            (false, false) => data_of(&self.line),
            _ => None,
        }
    }

    /// Takes the next bytes and calls `event` with the data of each event that they finish, and with its place in
    /// `chunk`; one that began earlier starts at 0. Events without data (comments, heartbeats) are not reported. Gives
    /// the offset from which on bytes belong to an unfinished event.
    pub fn feed(
        &mut self,
        chunk: &[u8],
        mut event: impl FnMut(&[u8], Range<usize>),
    ) -> Result<usize, EventTooLarge> {
        if chunk.is_empty() {
            return Ok(0);
        }
        let mut start = 0;
        let mut position = 0;
        if self.before == Before::Cr {
            self.before = Before::Other;
            position = usize::from(chunk.first() == Some(&b'\n'));
        }
        // The event's only data line, when it lies whole in this chunk: then nothing is copied.
        let mut borrowed: Option<&[u8]> = None;
        while position < chunk.len() {
            let Some(length) = memchr2(b'\n', b'\r', &chunk[position..]) else {
                break;
            };
            let end = position + length;
            let mut next = end + 1;
            let is_first = self.before == Before::Nothing;
            self.before = Before::Other;
            if chunk[end] == b'\r' {
                match chunk.get(next) {
                    Some(b'\n') => next += 1,
                    Some(_) => {}
                    None => self.before = Before::Cr,
                }
            }
            if !self.line.is_empty() {
                self.grow(chunk.get(position..end).unwrap_or_default())?;
                let mut line = std::mem::take(&mut self.line);
                if let Some(value) = data_of(unmarked(&line, is_first)) {
                    self.keep(borrowed.take())?;
                    self.keep(Some(value))?;
                }
                empty(&mut line);
                self.line = line;
                self.inside = true;
            } else if length == 0 {
                if let Some(data) = borrowed.take() {
                    event(data, start..next);
                } else if self.has_data {
                    event(&self.data, start..next);
                }
                start = next;
                empty(&mut self.data);
                self.has_data = false;
                self.inside = false;
            } else {
                self.inside = true;
                let line = unmarked(&chunk[position..end], is_first);
                if let Some(value) = data_of(line) {
                    if self.has_data || borrowed.is_some() {
                        self.keep(borrowed.take())?;
                        self.keep(Some(value))?;
                    } else {
                        borrowed = Some(value);
                    }
                }
            }
            position = next;
        }
        self.keep(borrowed)?;
        let rest = chunk.get(position..).unwrap_or_default();
        if !rest.is_empty() {
            self.inside = true;
            self.grow(rest)?;
        }
        Ok(if self.inside { start } else { chunk.len() })
    }

    fn grow(&mut self, bytes: &[u8]) -> Result<(), EventTooLarge> {
        if self.line.len() + self.data.len() + bytes.len() > self.most {
            return Err(EventTooLarge);
        }
        let length = self.line.len();
        if self.line.capacity() - length < bytes.len() {
            // Twice as much each time would be held as long as the stream waits. What is rarely so large may have more,
            // in few steps: what each of them leaves behind is not given back at once.
            let more = if length < LARGE_BYTES {
                length / 4
            } else {
                (7 * length).min(self.most - length)
            };
            self.line.reserve_exact(bytes.len().max(more));
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn keep(&mut self, value: Option<&[u8]>) -> Result<(), EventTooLarge> {
        let Some(value) = value else { return Ok(()) };
        if self.line.len() + self.data.len() + value.len() > self.most {
            return Err(EventTooLarge);
        }
        if self.has_data {
            self.data.push(b'\n');
        }
        self.has_data = true;
        self.data.extend_from_slice(value);
        Ok(())
    }
}

fn empty(bytes: &mut Vec<u8>) {
    bytes.clear();
    bytes.shrink_to(KEPT_BYTES);
}

/// A line without what only the first one may begin with.
fn unmarked(line: &[u8], is_first: bool) -> &[u8] {
    let rest = line.strip_prefix(BYTE_ORDER_MARK);
    rest.filter(|_| is_first).unwrap_or(line)
}

/// The value of a `data` field; one space behind the colon is not part of it.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    match line.strip_prefix(b"data")? {
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        [] => Some(&[]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same by the book: whole text at once.
    fn reference(text: &[u8]) -> Vec<Vec<u8>> {
        let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
        let text: Vec<u8> = {
            let mut out = Vec::new();
            let mut bytes = text.iter().copied().peekable();
            while let Some(byte) = bytes.next() {
                if byte == b'\r' {
                    bytes.next_if_eq(&b'\n');
                    out.push(b'\n');
                } else {
                    out.push(byte);
                }
            }
            out
        };
        let mut events = Vec::new();
        let mut data: Option<Vec<u8>> = None;
        let complete = text.split(|byte| *byte == b'\n').count() - 1;
        for line in text.split(|byte| *byte == b'\n').take(complete) {
            if line.is_empty() {
                events.extend(data.take());
            } else if let Some(value) = data_of(line) {
                match &mut data {
                    Some(data) => {
                        data.push(b'\n');
                        data.extend_from_slice(value);
                    }
                    None => data = Some(value.to_vec()),
                }
            }
        }
        events
    }

    fn decode(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for chunk in chunks {
            decoder
                .feed(chunk, |data, place| {
                    assert!(place.end <= chunk.len() && place.start < place.end);
                    events.push(data.to_vec());
                })
                .unwrap();
        }
        events
    }

    #[test]
    fn what_a_large_event_took_is_given_back_and_no_more_is_taken_than_it_needs() {
        let mut decoder = Decoder::default();
        decoder.feed(b"data: ", |_, _| ()).unwrap();
        for _ in 0..20 {
            decoder.feed(&[b'x'; 10 << 10], |_, _| ()).unwrap();
        }
        let (kept, room) = (decoder.line.len(), decoder.line.capacity());
        assert!(room <= kept + kept / 4, "{room} for {kept}");
        let mut seen = 0;
        decoder.feed(b"\n\n", |data, _| seen = data.len()).unwrap();
        assert_eq!(seen, 200 << 10);
        for room in [&decoder.line, &decoder.data] {
            assert!(room.capacity() <= KEPT_BYTES, "{}", room.capacity());
        }
    }

    #[test]
    fn line_ends_comments_and_fields_are_told_apart() {
        let text = b": hi\n\ndata: a\n\ndata:b\r\n\r\nevent: x\rdata: c\rdata:  d\r\rid: 1\n\ndata\n\ndatax: no\n\n";
        assert_eq!(decode(&[text]), [&b"a"[..], b"b", b"c\n d", b""]);
    }

    #[test]
    fn one_mark_before_the_first_line_means_nothing_and_is_part_of_the_first_event() {
        let marked = "\u{feff}data: a\n\ndata: b\n\n";
        assert_eq!(decode(&[marked.as_bytes()]), [b"a", b"b"]);
        let mut places = Vec::new();
        let mut decoder = Decoder::default();
        let fed = decoder.feed(marked.as_bytes(), |_, place| places.push(place));
        assert_eq!((fed, &places[0]), (Ok(marked.len()), &(0..12)));
        for text in ["\u{feff}\u{feff}data: a\n\n", "\n\u{feff}data: a\n\n"] {
            assert_eq!(decode(&[text.as_bytes()]).len(), 0, "{text:?}");
        }
    }

    #[test]
    fn an_unfinished_event_is_known_as_such() {
        let mut decoder = Decoder::default();
        decoder.feed(b"data: a\n\n", |_, _| {}).unwrap();
        assert!(!decoder.is_inside_event());
        decoder.feed(b"data: {\"x", |_, _| {}).unwrap();
        assert!(decoder.is_inside_event());
    }

    #[test]
    fn an_endless_event_is_refused_at_the_limit() {
        let mut decoder = Decoder::default();
        let chunk = vec![b'x'; 64 << 10];
        let fed = (0..100)
            .take_while(|_| decoder.feed(&chunk, |_, _| {}).is_ok())
            .count();
        assert_eq!(fed, MAX_EVENT_BYTES / chunk.len());
        assert!(decoder.line.capacity() <= 2 * MAX_EVENT_BYTES);

        let mut decoder = Decoder::default();
        let lines = b"data: 0123456789abcdef\n".repeat(1000);
        assert!(
            (0..100).any(|_| decoder.feed(&lines, |_, _| {}).is_err()),
            "lines without a blank one"
        );
    }

    proptest! {
        #[test]
        fn events_do_not_depend_on_chunk_boundaries(
            text in "\\x{feff}{0,2}(data: ?[a-z\\x{e9}]{0,6}|:c|event: e|data|\\n|\\r\\n|\\r|\\n\\n|x|\\x{feff}){0,24}",
            cuts in prop::collection::vec(0_usize..200, 0..12),
        ) {
            let text = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let whole = decode(&[text]);
            prop_assert_eq!(&whole, &reference(text));
            prop_assert_eq!(decode(&chunks), whole);
            let single: Vec<&[u8]> = text.chunks(1).collect();
            prop_assert_eq!(decode(&single), reference(text));
        }
    }
}
