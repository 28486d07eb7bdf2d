//! Canonical JSON for cache keys: no white space, members sorted, texts and numbers exactly as written. Pure.
//!
//! Two texts with one canonical form mean the same. The reverse may fail (`1.0` and `1`, `"a"` and `"\u0061"` stay
//! apart), which costs a miss and never a wrong answer.

use memchr::memchr2;

/// Deeper documents have no canonical form: bounds the recursion. Tool schemas stay below 20.
pub const MAX_DEPTH: usize = 64;

/// The canonical form of `text`, which must be valid JSON; `None` if it is not, or is nested deeper than
/// [`MAX_DEPTH`].
pub fn canonical(text: &[u8]) -> Option<Vec<u8>> {
    let mut reader = Reader { text, position: 0 };
    let mut out = Vec::with_capacity(text.len());
    reader.value(&mut out, 0)?;
    reader.skip_space();
    (reader.position == text.len()).then_some(out)
}

struct Reader<'a> {
    text: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn skip_space(&mut self) {
        while matches!(
            self.text.get(self.position),
            Some(b' ' | b'\t' | b'\n' | b'\r')
        ) {
            self.position += 1;
        }
    }

    /// The next byte that is not white space, consumed.
    fn next(&mut self) -> Option<u8> {
        self.skip_space();
        let byte = *self.text.get(self.position)?;
        self.position += 1;
        Some(byte)
    }

    /// Whether the next byte that is not white space is `wanted`; consumed only then.
    fn next_if(&mut self, wanted: u8) -> bool {
        self.skip_space();
        let found = self.text.get(self.position) == Some(&wanted);
        self.position += usize::from(found);
        found
    }

    /// A text with its quotes; the opening one is consumed already.
    fn string(&mut self) -> Option<&'a [u8]> {
        let start = self.position - 1;
        loop {
            let length = memchr2(b'"', b'\\', self.text.get(self.position..)?)?;
            self.position += length + 1;
            if self.text.get(self.position - 1) == Some(&b'"') {
                return self.text.get(start..self.position);
            }
            self.position += 1;
        }
    }

    fn value(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        match self.next()? {
            b'{' if depth < MAX_DEPTH => self.object(out, depth + 1),
            b'[' if depth < MAX_DEPTH => self.array(out, depth + 1),
            b'"' => {
                out.extend_from_slice(self.string()?);
                Some(())
            }
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
                let start = self.position - 1;
                let rest = &self.text[start..];
                let is_end =
                    |byte: &u8| matches!(byte, b',' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r');
                let length = rest.iter().position(is_end).unwrap_or(rest.len());
                out.extend_from_slice(&rest[..length]);
                self.position = start + length;
                Some(())
            }
            _ => None,
        }
    }

    fn array(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        out.push(b'[');
        if !self.next_if(b']') {
            loop {
                self.value(out, depth)?;
                match self.next()? {
                    b',' => out.push(b','),
                    b']' => break,
                    _ => return None,
                }
            }
        }
        out.push(b']');
        Some(())
    }

    fn object(&mut self, out: &mut Vec<u8>, depth: usize) -> Option<()> {
        let mut members: Vec<(&[u8], Vec<u8>)> = Vec::new();
        if !self.next_if(b'}') {
            loop {
                if self.next()? != b'"' {
                    return None;
                }
                let key = self.string()?;
                if self.next()? != b':' {
                    return None;
                }
                let mut value = Vec::new();
                self.value(&mut value, depth)?;
                members.push((key, value));
                match self.next()? {
                    b',' => {}
                    b'}' => break,
                    _ => return None,
                }
            }
        }
        // Stable: a key that occurs twice keeps its order, since the last one may win.
        members.sort_by_key(|(key, _)| *key);
        out.push(b'{');
        for (index, (key, value)) in members.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            out.extend_from_slice(key);
            out.push(b':');
            out.extend_from_slice(value);
        }
        out.push(b'}');
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn text(canonical: Option<Vec<u8>>) -> String {
        String::from_utf8(canonical.unwrap()).unwrap()
    }

    #[test]
    fn space_and_order_do_not_matter_but_numbers_and_arrays_do() {
        assert_eq!(
            text(canonical(b" {\"b\" : [1, 2 ,{ }],\n\"a\":\"x \\\" y\" } ")),
            r#"{"a":"x \" y","b":[1,2,{}]}"#
        );
        assert_ne!(canonical(b"[1,2]"), canonical(b"[2,1]"));
        assert_ne!(
            canonical(b"18446744073709551616"),
            canonical(b"18446744073709551617")
        );
    }

    #[test]
    fn deeper_than_the_limit_has_no_form() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(canonical(nested(MAX_DEPTH).as_bytes()).is_some());
        assert!(canonical(nested(MAX_DEPTH + 1).as_bytes()).is_none());
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>()
                // Minus zero equals zero and is written otherwise.
                .prop_filter("finite", |n| n.is_finite()
                    && n.to_bits() != (-0.0_f64).to_bits())
                .prop_map(Value::from),
            "[a-c\"\\\\\\n é]{0,5}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"]{0,3}", inner, 0..5)
                    .prop_map(|members| json!(members)),
            ]
        })
    }

    /// Writes with members in reverse order and with white space.
    fn shuffled(value: &Value) -> String {
        match value {
            Value::Object(members) => {
                let members: Vec<String> = members
                    .iter()
                    .rev()
                    .map(|(key, value)| format!(" {} :\n{}", json!(key), shuffled(value)))
                    .collect();
                format!("{{{}\t}}", members.join(" ,"))
            }
            Value::Array(items) => format!(
                "[ {} ]",
                items.iter().map(shuffled).collect::<Vec<_>>().join(", ")
            ),
            other => other.to_string(),
        }
    }

    proptest! {
        #[test]
        fn equal_values_have_one_form_and_others_another(a in values(), b in values()) {
            let form = canonical(a.to_string().as_bytes());
            prop_assert!(form.is_some());
            prop_assert_eq!(&canonical(shuffled(&a).as_bytes()), &form);
            // Read from its text: serde_json rounds some numbers in their last digit.
            let read: Value = serde_json::from_str(&a.to_string()).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Value>(&form.clone().unwrap()).unwrap(), read);
            prop_assert_eq!(canonical(b.to_string().as_bytes()) == form, a == b);
        }

        #[test]
        fn any_bytes_end_without_a_panic(bytes in prop::collection::vec(prop::sample::select(b"{}[]\",:\\ 1at".to_vec()), 0..40)) {
            let _ = canonical(&bytes);
        }
    }
}
