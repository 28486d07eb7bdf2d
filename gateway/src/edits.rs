//! Changes to a request body. All bytes that no change covers stay as they came. Pure.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Changes to one body, in any order; they do not overlap.
#[derive(Debug, Default)]
pub struct Edits(Vec<(Range<usize>, String)>);

impl Edits {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts `text` in the place of what stands at `at`. What is put at one place stays in the order in which it came.
    pub fn replace(&mut self, at: Range<usize>, text: String) {
        self.0.push((at, text));
    }

    /// Gives the object that `body` is another member, whose name needs no escape. The object has members already.
    pub fn add_member(&mut self, body: &[u8], name: &str, value: &str) {
        let open = body.iter().position(|byte| *byte == b'{');
        let inside = open.map_or(0, |open| open + 1);
        self.replace(inside..inside, format!("\"{name}\":{value},"));
    }

    /// Takes the member whose value stands at `value` out of its object, which has others.
    pub fn remove_member(&mut self, body: &[u8], value: Range<usize>) {
        let before = body.get(..value.start).unwrap_or_default();
        let quote = |bytes: &[u8]| bytes.iter().rposition(|byte| *byte == b'"');
        // No name of a member that the gateway knows has a quote in it, however it is escaped.
        let name = quote(before).and_then(|end| quote(before.get(..end)?));
        let start = name.unwrap_or(value.start);
        let behind = body.get(value.end..).unwrap_or_default();
        let next = behind.iter().position(|byte| !byte.is_ascii_whitespace());
        if let Some(comma) = next.filter(|at| behind.get(*at) == Some(&b',')) {
            self.replace(start..value.end + comma + 1, String::new());
        } else {
            let before = body.get(..start).unwrap_or_default();
            let comma = before.iter().rposition(|byte| *byte == b',');
            self.replace(comma.unwrap_or(start)..value.end, String::new());
        }
    }

    /// The body with all of them made.
    pub fn apply(mut self, body: &[u8]) -> Bytes {
        self.0.sort_by_key(|(at, _)| (at.start, at.end));
        let added: usize = self.0.iter().map(|(_, text)| text.len()).sum();
        let mut out = Vec::with_capacity(body.len() + added);
        let mut done = 0;
        for (at, text) in self.0 {
            out.extend_from_slice(body.get(done..at.start).unwrap_or_default());
            out.extend_from_slice(text.as_bytes());
            done = at.end;
        }
        out.extend_from_slice(body.get(done..).unwrap_or_default());
        Bytes::from(out)
    }
}

/// The value of a member that is there. `null` is one too: it must be replaced where it stands.
pub fn given<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Where `part`, which was read of `body` without a copy, stands in it.
pub fn place(body: &[u8], part: &str) -> Range<usize> {
    let start = part.as_ptr().addr().wrapping_sub(body.as_ptr().addr());
    start..start + part.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn members_come_first_and_in_order() {
        let body = br#" {"model":"m"} "#;
        let mut edits = Edits::default();
        assert!(edits.is_empty());
        edits.add_member(body, "a", "1");
        edits.add_member(body, "b", "[]");
        assert_eq!(edits.apply(body), r#" {"a":1,"b":[],"model":"m"} "#);
    }

    #[test]
    fn a_member_goes_with_its_comma_wherever_it_stands() {
        for (body, rest) in [
            (r#"{ "x" : {"a":"}"} , "model":"m"}"#, r#"{  "model":"m"}"#),
            (r#"{"model":"m", "x": 1 }"#, r#"{"model":"m" }"#),
            (r#"{"a":1,"\u0078":[2,3],"b":2}"#, r#"{"a":1,"b":2}"#),
        ] {
            #[derive(Deserialize)]
            struct View<'a> {
                #[serde(borrow)]
                x: &'a RawValue,
            }
            let view: View<'_> = serde_json::from_str(body).unwrap();
            let mut edits = Edits::default();
            edits.remove_member(body.as_bytes(), place(body.as_bytes(), view.x.get()));
            assert_eq!(edits.apply(body.as_bytes()), rest);
        }
    }

    #[test]
    fn the_first_member_goes_where_another_one_comes() {
        let body = br#"{"x":1,"model":"m"}"#;
        let mut edits = Edits::default();
        edits.remove_member(body, 5..6);
        edits.add_member(body, "a", "2");
        assert_eq!(edits.apply(body), r#"{"a":2,"model":"m"}"#);
    }

    proptest! {
        #[test]
        fn what_no_change_covers_stays(parts in prop::collection::vec(("[a-z]{0,5}", "[A-Z]{0,5}", "[0-9]{0,5}"), 0..8), reversed in any::<bool>()) {
            let (mut body, mut expected, mut edits) = (String::new(), String::new(), Edits::default());
            let mut changes = Vec::new();
            for (kept, old, new) in &parts {
                body.push_str(kept);
                changes.push((body.len()..body.len() + old.len(), new.clone()));
                body.push_str(old);
                expected.push_str(kept);
                expected.push_str(new);
            }
            // Only what is put at one place has an order.
            let distinct = changes.windows(2).all(|pair| pair[0].0.start < pair[1].0.start);
            if reversed && distinct {
                changes.reverse();
            }
            for (at, text) in changes {
                edits.replace(at, text);
            }
            prop_assert_eq!(edits.apply(body.as_bytes()), expected);
        }
    }
}
