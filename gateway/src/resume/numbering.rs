//! `Numbering`: gives each event of a stream its id as it passes, and says which bytes are which event. Comments pass
//! and are no events; the empty lines behind them do not pass, because with an id before them the official Python SDKs
//! read such a line as an event without data, and break at it (openai 1.x, anthropic 0.x). Sans I/O.
//!
//! The id is an event's last line: a field that comes twice counts as it comes last, so one that a backend gave is
//! overruled, and an event that comes in pieces need not be held back.

use bytes::{Bytes, BytesMut};

use memchr::memchr2;

use super::id;
use crate::sse::{Decoder, EventTooLarge};
use crate::store::Piece;

/// The number of a stream's first event.
pub(super) const FIRST: u64 = 1;
/// Room that is made for an id.
const LINE_BYTES: usize = 64;
/// Takes back the id that a client has: it shall not come back with it (HTML standard, 9.2.6).
const NO_ID: &str = "id:\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Counting,
    /// The next event takes back the id of the one before.
    TakingBack,
    Off,
}

/// One stream.
#[derive(Debug)]
pub(super) struct Numbering {
    stream: String,
    next: u64,
    mode: Mode,
    decoder: Decoder,
    /// What has passed of an event whose end has not come.
    open: BytesMut,
    comments: Comments,
    /// The last byte was CR: an LF that follows says nothing.
    after_cr: bool,
}

/// What has passed of a block that has no data yet.
#[derive(Debug, Default)]
struct Comments {
    /// It is more than comments.
    has_field: bool,
    /// A line has begun and not ended.
    is_in_line: bool,
}

impl Comments {
    /// Passes what is in no event, without the empty lines that end nothing but comments.
    fn pass(&mut self, mut bytes: &[u8], out: &mut BytesMut) {
        while let Some(first) = bytes.first() {
            let end = memchr2(b'\n', b'\r', bytes);
            let end = end.map(|at| at + line_end(&bytes[at..]));
            let (line, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            let is_empty = !self.is_in_line && matches!(first, b'\n' | b'\r');
            if !is_empty || self.has_field {
                out.extend_from_slice(line);
            }
            let is_field = !self.is_in_line && !is_empty && *first != b':';
            self.has_field = !is_empty && (self.has_field || is_field);
            self.is_in_line = end.is_none();
            bytes = rest;
        }
    }
}

/// Length of the end of a line that `bytes` begins with.
fn line_end(bytes: &[u8]) -> usize {
    if bytes.starts_with(b"\r\n") { 2 } else { 1 }
}

/// Bytes that go to the caller, and the events that end in them.
#[derive(Debug)]
pub(super) struct Numbered {
    pub(super) bytes: Bytes,
    /// Each with its number, whole, as the caller gets it.
    pub(super) events: Vec<Piece>,
}

impl Numbering {
    /// For the stream of this id.
    pub(super) fn new(stream: String) -> Self {
        Self {
            stream,
            next: FIRST,
            mode: Mode::Counting,
            decoder: Decoder::default(),
            open: BytesMut::new(),
            comments: Comments::default(),
            after_cr: false,
        }
    }

    /// No event after this gets an id.
    pub(super) fn stop(&mut self) {
        if self.mode == Mode::Counting {
            self.mode = Mode::TakingBack;
            self.open = BytesMut::new();
        }
    }

    /// Takes what passes next. After an error nothing is numbered any more.
    pub(super) fn feed(&mut self, bytes: &Bytes) -> Result<Numbered, EventTooLarge> {
        if self.mode == Mode::Off || bytes.is_empty() {
            return Ok(Numbered {
                bytes: bytes.clone(),
                events: Vec::new(),
            });
        }
        let mut places = Vec::new();
        let fed = self.decoder.feed(bytes, |_, place| places.push(place));
        let open_at = fed.inspect_err(|_| self.mode = Mode::Off)?;
        let mut out = BytesMut::with_capacity(bytes.len() + places.len() * LINE_BYTES);
        let mut numbered = Vec::with_capacity(places.len());
        let mut from = usize::from(self.after_cr && bytes.starts_with(b"\n"));
        self.after_cr = bytes.ends_with(b"\r");
        for place in places {
            let event = &bytes[place.clone()];
            let empty_line = if event.ends_with(b"\r\n") { 2 } else { 1 };
            let at = place.end - empty_line;
            let begins = place.start.max(from);
            self.comments.pass(&bytes[from..begins], &mut out);
            self.comments = Comments::default();
            let start = out.len();
            out.extend_from_slice(&bytes[begins..at]);
            let number = self.give_id(&mut out);
            out.extend_from_slice(&bytes[at..place.end]);
            from = place.end;
            if let Some(number) = number {
                numbered.push((number, start..out.len(), place.start == 0));
            }
        }
        self.comments.pass(&bytes[from..], &mut out);
        let out = out.freeze();
        let mut events = Vec::with_capacity(numbered.len());
        for (number, place, may_have_begun) in numbered {
            let rest = out.slice(place);
            // A comment that had begun has ended where this event starts.
            let open = std::mem::take(&mut self.open);
            events.push((
                number,
                if may_have_begun {
                    joined(open, rest)
                } else {
                    rest
                },
            ));
        }
        if open_at > 0 {
            self.open.clear();
        }
        if self.mode == Mode::Counting {
            self.open.extend_from_slice(&bytes[open_at.max(from)..]);
        }
        Ok(Numbered { bytes: out, events })
    }

    /// Writes the line for the event that ends here; returns its number.
    fn give_id(&mut self, out: &mut BytesMut) -> Option<u64> {
        match self.mode {
            Mode::Counting => {
                let number = self.next;
                self.next += 1;
                out.extend_from_slice(id::line(&self.stream, number).as_bytes());
                Some(number)
            }
            Mode::TakingBack => {
                self.mode = Mode::Off;
                out.extend_from_slice(NO_ID.as_bytes());
                None
            }
            Mode::Off => None,
        }
    }
}

fn joined(mut start: BytesMut, end: Bytes) -> Bytes {
    if start.is_empty() {
        return end;
    }
    start.extend_from_slice(&end);
    start.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(numbering: &mut Numbering, text: &str) -> (String, Vec<(u64, String)>) {
        let bytes = Bytes::copy_from_slice(text.as_bytes());
        let numbered = numbering.feed(&bytes).unwrap();
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        let events = numbered.events.iter();
        let events = events.map(|(number, event)| (*number, text(event)));
        (text(&numbered.bytes), events.collect())
    }

    fn all(pieces: &[&str]) -> (String, Vec<(u64, String)>) {
        let mut numbering = Numbering::new("s".to_owned());
        let mut out = (String::new(), Vec::new());
        for piece in pieces {
            let (bytes, events) = feed(&mut numbering, piece);
            out.0 += &bytes;
            out.1.extend(events);
        }
        out
    }

    #[test]
    fn each_event_gets_its_number_and_keeps_its_bytes() {
        let (out, events) = all(&["event: a\ndata: 1\n\ndata: 2\n\n"]);
        let first = "event: a\ndata: 1\nid: s:1\n\n";
        let second = "data: 2\nid: s:2\n\n";
        assert_eq!(out, [first, second].concat());
        assert_eq!(events, [(1, first.to_owned()), (2, second.to_owned())]);
    }

    #[test]
    fn a_backends_own_id_is_overruled_and_comments_pass_without_empty_lines() {
        let pieces = [
            ": beat\n\n: no",
            "te\r\n\r",
            "\nid: 7\ndata: 1\n\n: beat\n\n\nevent: x\n",
            "\n",
        ];
        let (out, events) = all(&pieces);
        let event = "id: 7\ndata: 1\nid: s:1\n\n";
        assert_eq!(
            out,
            format!(": beat\n: note\r\n{event}: beat\nevent: x\n\n")
        );
        assert_eq!(events, [(1, event.to_owned())]);
    }

    #[test]
    fn every_end_of_lines_will_do() {
        for end in ["\n", "\r\n", "\r"] {
            let (out, events) = all(&[&format!("data: 1{end}{end}data: 2{end}{end}")]);
            let event = |number| format!("data: {number}{end}id: s:{number}\n{end}");
            assert_eq!(out, [event(1), event(2)].concat(), "{end:?}");
            assert_eq!(events.len(), 2, "{end:?}");
        }
    }

    #[test]
    fn an_event_passes_as_it_comes_and_is_kept_whole() {
        let mut numbering = Numbering::new("s".to_owned());
        assert_eq!(feed(&mut numbering, "data: 1").0, "data: 1");
        assert_eq!(feed(&mut numbering, "23\n").0, "23\n");
        let (out, events) = feed(&mut numbering, "\n");
        assert_eq!(out, "id: s:1\n\n");
        assert_eq!(events, [(1, "data: 123\nid: s:1\n\n".to_owned())]);
    }

    #[test]
    fn when_it_stops_the_client_loses_its_id() {
        let mut numbering = Numbering::new("s".to_owned());
        feed(&mut numbering, "data: 1\n\nda");
        numbering.stop();
        let (out, events) = feed(&mut numbering, "ta: 2\n\ndata: 3\n\n");
        assert_eq!(
            (out.as_str(), events),
            ("ta: 2\nid:\n\ndata: 3\n\n", vec![])
        );
        assert_eq!(feed(&mut numbering, "data: 4\n\n").0, "data: 4\n\n");
    }

    fn has_fields_before_empty_lines(text: &str) -> bool {
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        let mut has_field = false;
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        text.is_empty()
            || complete.split('\n').all(|line| {
                let is_right = !line.is_empty() || has_field;
                has_field = !line.is_empty() && (has_field || !line.starts_with(':'));
                is_right
            })
    }

    proptest! {
        #[test]
        fn the_kept_events_are_what_passed_wherever_it_is_cut(
            text in "((data: [0-9]?|:c|event: e|id: 1)?(\\n|\\r\\n|\\r)){0,24}",
            cuts in prop::collection::vec(0usize..200, 0..12),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (text.len() + 1)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let (out, events) = all(&pieces);
            let mut data = Vec::new();
            Decoder::default().feed(text.as_bytes(), |event, _| data.push(event.to_vec())).unwrap();
            let mut passed = Vec::new();
            Decoder::default().feed(out.as_bytes(), |event, _| passed.push(event.to_vec())).unwrap();
            prop_assert_eq!(&passed, &data, "ids change no event");
            prop_assert!(has_fields_before_empty_lines(&out), "{:?}", out);
            let kept: String = events.iter().map(|(_, event)| event.as_str()).collect();
            let mut read = Vec::new();
            Decoder::default().feed(kept.as_bytes(), |event, _| read.push(event.to_vec())).unwrap();
            prop_assert_eq!(&read, &data);
            let numbers: Vec<u64> = events.iter().map(|(number, _)| *number).collect();
            let expected: Vec<u64> = (FIRST..).take(data.len()).collect();
            prop_assert_eq!(numbers, expected);
            for (number, event) in &events {
                let line = format!("id: s:{number}\n");
                prop_assert!(event.contains(&line));
            }
        }
    }
}
