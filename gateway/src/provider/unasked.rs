//! Takes out of a stream of chunks the one that only counts tokens, for callers who did not ask for it. Pure.
//!
//! That chunk comes behind the last reason to finish. Up to there all bytes pass as they are, however they are cut into
//! pieces; from there on whole events pass, each byte for byte.

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::sse::{Decoder, EventTooLarge};

/// One stream.
#[derive(Debug, Default)]
pub struct Unasked {
    /// Once something finished.
    decoder: Option<Decoder>,
    /// Bytes of an event whose end has not come.
    held: Vec<u8>,
}

#[derive(Deserialize)]
struct Chunk {
    choices: Vec<IgnoredAny>,
    usage: Option<IgnoredAny>,
}

impl Unasked {
    /// Whether it may have let part of an event out.
    pub fn passes_parts(&self) -> bool {
        self.decoder.is_none()
    }

    /// Takes the next bytes. `finished_at` is the place behind the first event that says why something ended, if that
    /// is among them.
    pub fn feed(
        &mut self,
        bytes: Bytes,
        finished_at: Option<usize>,
    ) -> Result<Bytes, EventTooLarge> {
        let (mut decoder, from) = match (self.decoder.take(), finished_at) {
            (Some(decoder), _) => (decoder, 0),
            (None, Some(at)) => (Decoder::default(), at.min(bytes.len())),
            (None, None) => return Ok(bytes),
        };
        let (before, behind) = bytes.split_at(from);
        let mut out = before.to_vec();
        let mut start = 0;
        decoder.feed(behind, |data, end| {
            if is_count(data) {
                self.held.clear();
            } else {
                out.append(&mut self.held);
                out.extend_from_slice(behind.get(start..end).unwrap_or_default());
            }
            start = end;
        })?;
        let rest = behind.get(start..).unwrap_or_default();
        if decoder.is_inside_event() {
            self.held.extend_from_slice(rest);
        } else {
            out.append(&mut self.held);
            out.extend_from_slice(rest);
        }
        self.decoder = Some(decoder);
        Ok(Bytes::from(out))
    }
}

fn is_count(data: &[u8]) -> bool {
    serde_json::from_slice::<Chunk>(data)
        .is_ok_and(|chunk| chunk.choices.is_empty() && chunk.usage.is_some())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::meter::Meter;

    const WORD: &str =
        "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"},\"finish_reason\":null}]}\n\n";
    const BEAT: &str = ": beat\n\n";
    const END: &str =
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null}\r\n\r\n";
    const COUNT: &str = "data: {\"id\":\"x\",\"choices\":[],\"usage\":{\"prompt_tokens\":7}}\n\n";
    const LATE: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"ho\"},\"index\":1}]}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    /// What goes out, piece by piece.
    fn pass(pieces: &[&[u8]]) -> Vec<Bytes> {
        let (mut meter, mut unasked) = (Meter::default(), Unasked::default());
        let mut out = Vec::new();
        for piece in pieces {
            let seen = meter.feed(piece).unwrap();
            let bytes = Bytes::copy_from_slice(piece);
            out.push(unasked.feed(bytes, seen.finished_at).unwrap());
        }
        out
    }

    #[test]
    fn until_the_end_every_piece_passes_at_once() {
        let text = [WORD, BEAT].concat();
        let pieces: Vec<&[u8]> = text.as_bytes().chunks(3).collect();
        assert_eq!(pass(&pieces), pieces);
    }

    #[test]
    fn an_event_without_its_end_stays_here() {
        let text = [END, LATE].concat();
        let cut = &text.as_bytes()[..END.len() + 9];
        assert_eq!(pass(&[cut]).concat(), END.as_bytes());
    }

    proptest! {
        #[test]
        fn all_but_the_count_passes_wherever_it_is_cut(cuts in prop::collection::vec(0usize..500, 0..40)) {
            let text = [WORD, BEAT, END, BEAT, LATE, COUNT, DONE].concat();
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % bytes.len()).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let passed = String::from_utf8(pass(&pieces).concat()).unwrap();
            prop_assert_eq!(passed, [WORD, BEAT, END, BEAT, LATE, DONE].concat());
        }
    }
}
