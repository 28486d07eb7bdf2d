//! `Events`: lets an event stream through by whole events, less those that its caller must not see. Sans I/O.
//!
//! What comes in whole events, as engines send it, passes uncopied. The beginning of an event waits for its end, so
//! that a stream which breaks never ends inside one, and one that cannot be read can be left out.

use bytes::{Bytes, BytesMut};

use crate::meter::{Meter, Odd, Seen};
use crate::openai::Wire;
use crate::sse::EventTooLarge;

/// An event that is larger passes as it comes: chunks of engines have below 1 KiB, those with log probabilities or the
/// arguments of tools below 64.
const MAX_OPEN_BYTES: usize = 32 << 10;
/// So many events that cannot be read are left out of one stream: a backend that sends more of them says nothing.
const MAX_LEFT_OUT: u8 = 3;
/// In the place of an event that was left out.
const LEFT_OUT: &[u8] = b": an event that cannot be read was left out here\n\n";

/// What becomes of events that do not go to every caller.
#[derive(Clone, Copy, Debug)]
pub struct Care {
    /// Whether the chunk that only counts tokens goes to the caller.
    pub wants_count: bool,
    /// Whether the rest of an answer is of use without a part of it: texts are, programs' input is not.
    pub stands_gaps: bool,
    /// How many choices a whole answer has.
    pub choices: u32,
}

/// One stream.
#[derive(Debug)]
pub struct Events {
    meter: Meter,
    wire: Wire,
    care: Care,
    /// The beginning of an event whose end has not come.
    open: BytesMut,
    /// That beginning was too large and went out.
    is_part_out: bool,
    left_out: u8,
}

/// What may go on of a frame.
#[derive(Debug, Default)]
pub struct Passed {
    /// The events.
    pub bytes: Bytes,
    /// How many of them carried part of an answer.
    pub tokens: u32,
    /// How many were left out because they cannot be read.
    pub left_out: u8,
    /// Nothing more may go on: the backend gave up, or sent what cannot be read.
    pub ends: bool,
    /// One of both was so before any part of an answer.
    pub lacks_beginning: bool,
    /// There was more than signs that the connection is there.
    pub is_progress: bool,
}

impl Events {
    /// For a stream made of `wire`.
    pub fn new(wire: Wire, care: Care) -> Self {
        Self {
            meter: Meter::new(wire),
            wire,
            care,
            open: BytesMut::new(),
            is_part_out: false,
            left_out: 0,
        }
    }

    /// See [`Meter::lacks_done_only`].
    pub fn lacks_done_only(&self) -> bool {
        self.meter.lacks_done_only(self.care.choices)
    }

    /// What the stream said so far.
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Whether part of an event went out that has not ended.
    pub fn is_part_out(&self) -> bool {
        self.is_part_out
    }

    /// Takes the next frame.
    pub fn feed(&mut self, frame: Bytes) -> Result<Passed, EventTooLarge> {
        let had_started = self.meter.has_started();
        let seen = self.meter.feed(&frame)?;
        if frame.is_empty() {
            return Ok(Passed::default());
        }
        let was_part_out = self.is_part_out;
        if self.wire == Wire::Plain {
            self.is_part_out = self.meter.is_inside_event();
            return Ok(Passed {
                bytes: frame,
                tokens: seen.tokens,
                is_progress: true,
                ..Passed::default()
            });
        }
        let mut passed = Passed {
            tokens: seen.tokens,
            is_progress: seen.is_progress,
            ..Passed::default()
        };
        let before = self.open.len();
        if seen.open_at == 0 {
            if !was_part_out && before + frame.len() <= MAX_OPEN_BYTES {
                self.open.extend_from_slice(&frame);
                return Ok(passed);
            }
            self.is_part_out = true;
            passed.bytes = self.behind_open(frame);
            return Ok(passed);
        }
        let at = |offset: usize| if offset == 0 { 0 } else { before + offset };
        passed.bytes = self.behind_open(frame);
        let open_at = at(seen.open_at);
        self.is_part_out = passed.bytes.len() - open_at > MAX_OPEN_BYTES;
        if !self.is_part_out {
            let open = passed.bytes.split_off(open_at);
            self.open.extend_from_slice(&open);
        }
        if seen.cut_at.is_some() || !seen.odd.is_empty() {
            let gap = seen.first_gap();
            let starts_at = seen.starts_at;
            self.leave_out(&mut passed, seen, at, was_part_out);
            passed.lacks_beginning = !had_started
                && gap.is_some_and(|gap| starts_at.is_none_or(|starts_at| gap <= starts_at));
        }
        Ok(passed)
    }

    /// The held beginning of an event, and what follows it.
    fn behind_open(&mut self, frame: Bytes) -> Bytes {
        if self.open.is_empty() {
            return frame;
        }
        let mut open = std::mem::take(&mut self.open);
        open.extend_from_slice(&frame);
        open.freeze()
    }

    /// Takes out of `passed` what must not go on. `at` makes an offset of the frame one of `passed`; `was_part_out`:
    /// whether the first event there began to go out before.
    fn leave_out(
        &mut self,
        passed: &mut Passed,
        seen: Seen,
        at: impl Fn(usize) -> usize,
        was_part_out: bool,
    ) {
        let mut end = seen.cut_at.map(&at);
        let mut kept = BytesMut::with_capacity(passed.bytes.len());
        let mut from = 0;
        for (place, odd) in seen.odd {
            let (start, behind) = (at(place.start), at(place.end));
            if end.is_some_and(|end| start >= end) {
                break;
            }
            let is_part_out = was_part_out && start == 0;
            let notice = match odd {
                Odd::Count if self.care.wants_count || is_part_out => continue,
                Odd::Count => &[],
                Odd::NoJson if self.may_leave_out() && !is_part_out => {
                    self.left_out += 1;
                    passed.left_out += 1;
                    LEFT_OUT
                }
                Odd::NoJson | Odd::NoText => {
                    end = Some(start);
                    break;
                }
            };
            kept.extend_from_slice(passed.bytes.get(from..start).unwrap_or_default());
            kept.extend_from_slice(notice);
            from = behind;
        }
        let rest = passed.bytes.get(from..end.unwrap_or(passed.bytes.len()));
        kept.extend_from_slice(rest.unwrap_or_default());
        if let Some(end) = end {
            passed.ends = true;
            self.open.clear();
            self.is_part_out = was_part_out && end == 0;
        }
        passed.bytes = kept.freeze();
    }

    fn may_leave_out(&self) -> bool {
        self.care.stands_gaps && self.left_out < MAX_LEFT_OUT
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sse::MAX_PICTURE_BYTES;

    const WORD: &str =
        "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"},\"finish_reason\":null}]}\n\n";
    const BEAT: &str = ": beat\n\n";
    const END: &str =
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null}\r\n\r\n";
    const COUNT: &str = "data: {\"id\":\"x\",\"choices\":[],\"usage\":{\"prompt_tokens\":7}}\n\n";
    const LATE: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"ho\"},\"index\":1}]}\n\n";
    const BAD: &str = "event: x\ndata: {\"choices\":[{\"delta\":{\"content\":\"gar\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    const TEXT: Care = Care {
        wants_count: false,
        stands_gaps: true,
        choices: 1,
    };
    const PROGRAM: Care = Care {
        wants_count: true,
        stands_gaps: false,
        choices: 1,
    };

    fn notice() -> &'static str {
        std::str::from_utf8(LEFT_OUT).unwrap()
    }

    /// What goes out, piece by piece, until it ends, and how it stands then.
    fn pass(care: Care, pieces: &[&[u8]]) -> (Vec<Bytes>, bool, Events) {
        let mut events = Events::new(Wire::Chunks, care);
        let mut out = Vec::new();
        for piece in pieces {
            let passed = events.feed(Bytes::copy_from_slice(piece)).unwrap();
            out.push(passed.bytes);
            if passed.ends {
                return (out, true, events);
            }
        }
        (out, false, events)
    }

    fn cut_up<'a>(text: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % text.len()).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        cuts.windows(2)
            .map(|pair| &text[pair[0]..pair[1]])
            .collect()
    }

    #[test]
    fn whole_events_pass_uncopied() {
        let mut events = Events::new(Wire::Chunks, TEXT);
        let frame = Bytes::from([WORD, BEAT, WORD].concat());
        let passed = events.feed(frame.clone()).unwrap();
        assert_eq!(passed.bytes.as_ptr(), frame.as_ptr());
        assert_eq!((passed.bytes, passed.tokens), (frame, 2));
    }

    #[test]
    fn the_beginning_of_an_event_waits_for_its_end() {
        let (start, end) = LATE.split_at(9);
        let first = [WORD, start].concat();
        let (out, _, events) = pass(TEXT, &[first.as_bytes(), end.as_bytes()]);
        assert_eq!(out, [WORD, LATE]);
        assert!(!events.is_part_out());
    }

    #[test]
    fn what_no_program_reads_is_left_out_of_a_text_and_ends_all_else() {
        let text = [WORD, BAD, LATE].concat();
        let (out, ends, _) = pass(TEXT, &[text.as_bytes()]);
        assert_eq!(out.concat(), [WORD, notice(), LATE].concat().as_bytes());
        assert!(!ends);
        let (out, ends, events) = pass(PROGRAM, &[text.as_bytes()]);
        assert_eq!(out, [WORD]);
        assert!(ends && !events.is_part_out());
    }

    #[test]
    fn what_is_missing_before_an_answer_is_told_whether_events_come_together_or_not() {
        for (stream, lacks) in [([BEAT, BAD, WORD], true), ([WORD, BAD, WORD], false)] {
            for pieces in [&[stream.concat().as_str()][..], &stream] {
                let mut events = Events::new(Wire::Chunks, TEXT);
                let told = pieces.iter().any(|piece| {
                    let piece = Bytes::copy_from_slice(piece.as_bytes());
                    events.feed(piece).unwrap().lacks_beginning
                });
                assert_eq!(told, lacks, "{pieces:?}");
            }
        }
    }

    #[test]
    fn what_is_not_text_ends_every_stream() {
        let text = [
            WORD.as_bytes(),
            b"data: {\"a\":\"\xff\"}\n\n",
            LATE.as_bytes(),
        ]
        .concat();
        let (out, ends, _) = pass(TEXT, &[&text]);
        assert_eq!(out, [WORD]);
        assert!(ends);
    }

    #[test]
    fn a_stream_of_nothing_else_ends() {
        let text = BAD.repeat(9);
        let (out, ends, _) = pass(TEXT, &[text.as_bytes()]);
        assert!(ends);
        assert_eq!(out.concat(), LEFT_OUT.repeat(MAX_LEFT_OUT.into()));
    }

    #[test]
    fn large_events_pass_as_they_come_and_little_is_held() {
        let mut events = Events::new(Wire::Chunks, TEXT);
        let large = format!("data: {{\"a\":\"{}\"}}\n\n", "x".repeat(3 * MAX_OPEN_BYTES));
        let text = [&large, WORD].concat();
        let mut out = Vec::new();
        let mut was_part_out = false;
        for piece in text.as_bytes().chunks(1000) {
            out.extend(events.feed(Bytes::copy_from_slice(piece)).unwrap().bytes);
            was_part_out |= events.is_part_out();
            assert!(events.open.len() <= MAX_OPEN_BYTES);
        }
        assert!(was_part_out && !events.is_part_out());
        assert_eq!(out, text.as_bytes());
    }

    #[test]
    fn a_large_event_that_cannot_be_read_ends_the_stream_inside_it() {
        let large = format!("data: {{\"a\":\"{}\n\n", "x".repeat(3 * MAX_OPEN_BYTES));
        let text = [WORD, &large, LATE].concat();
        let pieces: Vec<&[u8]> = text.as_bytes().chunks(1000).collect();
        let (out, ends, events) = pass(TEXT, &pieces);
        assert!(ends && events.is_part_out());
        assert!(text.as_bytes().starts_with(&out.concat()));
    }

    #[test]
    fn pictures_may_be_larger_than_other_events_but_not_endless() {
        let pixels = "x".repeat(4 << 20);
        let picture =
            format!("data: {{\"type\":\"image_edit.completed\",\"b64_json\":\"{pixels}\"}}\n\n");
        let mut events = Events::new(Wire::Media, PROGRAM);
        let mut out = Vec::new();
        for piece in picture.as_bytes().chunks(64 << 10) {
            out.extend(events.feed(Bytes::copy_from_slice(piece)).unwrap().bytes);
        }
        assert!(out == picture.as_bytes() && events.meter().is_done());
        let piece = Bytes::from(vec![b'x'; 64 << 10]);
        let fed = (0..1000).take_while(|_| events.feed(piece.clone()).is_ok());
        assert_eq!(fed.count(), MAX_PICTURE_BYTES / piece.len());
    }

    #[test]
    fn nothing_passes_behind_an_error() {
        let error = "data: {\"error\":{\"message\":\"x\"}}\n\n";
        let text = [WORD, error, LATE, BAD].concat();
        let (out, ends, events) = pass(TEXT, &[text.as_bytes()]);
        assert_eq!(out.concat(), [WORD, error].concat().as_bytes());
        assert!(ends && !events.is_part_out());
    }

    proptest! {
        #[test]
        fn the_same_goes_out_wherever_it_is_cut(cuts in prop::collection::vec(0usize..900, 0..60)) {
            let text = [WORD, BEAT, BAD, END, BEAT, LATE, BAD, COUNT, DONE].concat();
            let (out, ends, _) = pass(TEXT, &cut_up(text.as_bytes(), &cuts));
            let wanted = [WORD, BEAT, notice(), END, BEAT, LATE, notice(), DONE].concat();
            prop_assert_eq!(String::from_utf8(out.concat()).unwrap(), wanted);
            prop_assert!(!ends);
        }

        #[test]
        fn what_goes_out_are_whole_events_whatever_comes(
            text in "(data: ?(1|\\{|\\[DONE\\])?|:c|event: e|\\n|\\r\\n|\\r|\\n\\n){1,24}",
            cuts in prop::collection::vec(0usize..200, 0..12),
        ) {
            let (out, _, events) = pass(TEXT, &cut_up(text.as_bytes(), &cuts));
            let mut decoder = crate::sse::Decoder::default();
            let out = out.concat();
            let open_at = decoder.feed(&out, |_, _| {}).unwrap();
            prop_assert_eq!(open_at, out.len());
            prop_assert!(!events.is_part_out());
        }
    }
}
