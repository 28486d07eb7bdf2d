//! Whether a JSON text that passes in pieces is whole. Pure.
//!
//! Where a connection ends with its answer, one that is cut looks like one that is whole: brackets tell.

/// What was opened so far.
#[derive(Debug, Default)]
pub(crate) struct JsonEnd {
    depth: usize,
    has_begun: bool,
    in_text: bool,
    is_escaped: bool,
}

impl JsonEnd {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.in_text => self.is_escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ if self.in_text => {}
                b'{' | b'[' => {
                    self.depth += 1;
                    self.has_begun = true;
                }
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }

    /// Whether all that was opened is closed.
    pub(crate) fn is_whole(&self) -> bool {
        self.has_begun && self.depth == 0 && !self.in_text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_whole(pieces: &[&[u8]]) -> bool {
        let mut end = JsonEnd::default();
        for piece in pieces {
            end.feed(piece);
        }
        end.is_whole()
    }

    proptest! {
        #[test]
        fn an_object_is_whole_at_its_last_byte_and_not_before(
            keys in prop::collection::vec("[a-z\"\\\\{}\\[\\]]{0,6}", 0..6), cut in any::<prop::sample::Index>(),
        ) {
            let value = serde_json::json!({"all": keys, "of": {"them": [1, {"x": null}]}});
            let text = value.to_string().into_bytes();
            let at = cut.index(text.len());
            prop_assert!(is_whole(&[&text[..at], &text[at..], b"\n"]));
            prop_assert!(!is_whole(&[&text[..at]]));
        }
    }
}
