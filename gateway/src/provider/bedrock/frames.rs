//! AWS event streams, sans I/O: bytes in, messages out, whatever the chunk boundaries. Both checksums of a message are
//! checked.
//! Source: <https://smithy.io/2.0/aws/amazon-eventstream.html>.
//!
//! A message: its length, its headers' length, CRC-32 of these eight bytes; headers; payload; CRC-32 of all before.

use crate::sse::MAX_EVENT_BYTES;

/// Lengths and their checksum.
const PRELUDE_BYTES: usize = 12;
/// The checksum at the end.
const TRAILER_BYTES: usize = 4;
/// The header type of a text.
const TEXT: u8 = 7;

/// What is no message, or one that is larger than [`MAX_EVENT_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a message of an event stream")]
pub(in crate::provider) struct Malformed;

/// Incremental decoder; one for each stream.
#[derive(Debug, Default)]
pub(super) struct Frames {
    held: Vec<u8>,
}

/// A message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Message<'a> {
    /// The header `:message-type`: `event`, `exception` or `error`.
    pub(super) kind: &'a str,
    /// The headers `:event-type`, `:exception-type` or `:error-code`.
    pub(super) name: &'a str,
    /// The header `:error-message`.
    pub(super) error: &'a str,
    pub(super) payload: &'a [u8],
}

impl Frames {
    /// Whether bytes of an unfinished message were seen.
    pub(super) fn is_inside(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes the next bytes and calls `message` with each that they finish.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        mut message: impl FnMut(&Message<'_>),
    ) -> Result<(), Malformed> {
        self.held.extend_from_slice(bytes);
        let mut start = 0;
        loop {
            let rest = self.held.get(start..).unwrap_or_default();
            let Some(length) = length(rest)? else { break };
            let Some(frame) = rest.get(..length) else {
                break;
            };
            message(&read(frame)?);
            start += length;
        }
        self.held.drain(..start);
        Ok(())
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_be_bytes(four.try_into().ok()?))
}

/// The length of the message that begins here, once that can be told.
fn length(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(prelude) = bytes.get(..PRELUDE_BYTES) else {
        return Ok(None);
    };
    let (lengths, sum) = prelude.split_at(PRELUDE_BYTES - 4);
    if number(sum, 0) != Some(crc32(lengths)) {
        return Err(Malformed);
    }
    let length = number(lengths, 0).and_then(|length| usize::try_from(length).ok());
    let least = PRELUDE_BYTES + TRAILER_BYTES;
    let length = length.filter(|length| (least..=MAX_EVENT_BYTES).contains(length));
    length.map(Some).ok_or(Malformed)
}

fn read(frame: &[u8]) -> Result<Message<'_>, Malformed> {
    let (signed, sum) = frame.split_at(frame.len() - TRAILER_BYTES);
    if number(sum, 0) != Some(crc32(signed)) {
        return Err(Malformed);
    }
    let headers = number(frame, 4).and_then(|length| usize::try_from(length).ok());
    let headers = headers.ok_or(Malformed)?;
    let behind = signed.get(PRELUDE_BYTES..).unwrap_or_default();
    let (mut headers, payload) = behind.split_at_checked(headers).ok_or(Malformed)?;
    let mut message = Message {
        payload,
        ..Message::default()
    };
    while !headers.is_empty() {
        let (name, value, rest) = header(headers).ok_or(Malformed)?;
        match name {
            ":message-type" => message.kind = value,
            ":event-type" | ":exception-type" | ":error-code" => message.name = value,
            ":error-message" => message.error = value,
            _ => {}
        }
        headers = rest;
    }
    Ok(message)
}

/// A header's name, its value if that is a text, and what follows.
fn header(bytes: &[u8]) -> Option<(&str, &str, &[u8])> {
    let (&length, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(length.into())?;
    let (&kind, rest) = rest.split_first()?;
    let size = match kind {
        0 | 1 => 0,
        2 => 1,
        3 => 2,
        4 => 4,
        5 | 8 => 8,
        6 | TEXT => 2 + usize::from(u16::from_be_bytes(rest.get(..2)?.try_into().ok()?)),
        9 => 16,
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(size)?;
    let text = if kind == TEXT {
        std::str::from_utf8(value.get(2..)?).ok()?
    } else {
        ""
    };
    Some((std::str::from_utf8(name).ok()?, text, rest))
}

/// CRC-32 as in gzip and zlib.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        let index = (crc ^ u32::from(*byte)) & 0xff;
        (crc >> 8)
            ^ TABLE
                .get(usize::try_from(index).unwrap_or(0))
                .copied()
                .unwrap_or(0)
    };
    !bytes.iter().fold(!0, step)
}

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0_u32;
    while index < 256 {
        let mut crc = index;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index as usize] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message as AWS writes it.
    pub(crate) fn frame(headers: &[(&str, &str)], payload: &[u8]) -> Vec<u8> {
        let mut written = Vec::new();
        for (name, value) in headers {
            written.push(u8::try_from(name.len()).unwrap());
            written.extend(name.bytes());
            written.push(TEXT);
            written.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
            written.extend(value.bytes());
        }
        let length = PRELUDE_BYTES + written.len() + payload.len() + TRAILER_BYTES;
        let mut frame = u32::try_from(length).unwrap().to_be_bytes().to_vec();
        frame.extend(u32::try_from(written.len()).unwrap().to_be_bytes());
        frame.extend(crc32(&frame).to_be_bytes());
        frame.extend(written);
        frame.extend(payload);
        frame.extend(crc32(&frame).to_be_bytes());
        frame
    }

    fn names(pieces: &[&[u8]]) -> Result<Vec<String>, Malformed> {
        let mut frames = Frames::default();
        let mut names = Vec::new();
        for piece in pieces {
            frames.feed(piece, |message| {
                let payload = String::from_utf8_lossy(message.payload);
                names.push(format!("{} {} {payload}", message.kind, message.name));
            })?;
        }
        Ok(names)
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        // The check value of CRC-32/ISO-HDLC.
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn headers_of_all_types_are_stepped_over() {
        let mut headers = Vec::new();
        for (kind, size) in [
            (0, 0),
            (1, 0),
            (2, 1),
            (3, 2),
            (4, 4),
            (5, 8),
            (8, 8),
            (9, 16),
        ] {
            headers.extend([1, b'x', kind]);
            headers.extend(vec![0; size]);
        }
        headers.extend([1, b'y', 6, 0, 1, 9]);
        let mut rest = headers.as_slice();
        while !rest.is_empty() {
            rest = header(rest).unwrap().2;
        }
        assert_eq!(header(&[1, b'x', 10]), None);
    }

    #[test]
    fn a_flipped_bit_is_seen_wherever_it_is() {
        let good = frame(&[(":message-type", "event"), (":event-type", "x")], b"{}");
        assert_eq!(names(&[&good]).unwrap(), ["event x {}"]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            assert_eq!(names(&[&bad]), Err(Malformed), "{at}");
        }
    }

    #[test]
    fn a_message_beyond_all_bounds_is_refused_before_it_comes() {
        let mut frame = u32::MAX.to_be_bytes().to_vec();
        frame.extend([0; 4]);
        frame.extend(crc32(&frame).to_be_bytes());
        assert_eq!(names(&[&frame]), Err(Malformed));
    }

    proptest! {
        #[test]
        fn messages_do_not_depend_on_chunk_boundaries(cuts in prop::collection::vec(0usize..500, 0..20)) {
            let all = [frame(&[(":message-type", "event"), (":event-type", "a")], b"{\"x\":1}"), frame(&[(":exception-type", "b")], b""), frame(&[], b"c")].concat();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % all.len()).collect();
            cuts.extend([0, all.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &all[pair[0]..pair[1]]).collect();
            prop_assert_eq!(names(&pieces), names(&[&all]));
        }

        #[test]
        fn any_bytes_end_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = names(&[&bytes]);
            let _ = header(&bytes);
        }
    }
}
