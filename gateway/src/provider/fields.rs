//! The members of a JSON object as they were written, for translations that decide member by member. Pure.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::Misfit;

/// An object with more members is refused: no protocol has as many, and each is compared with all before it.
pub const MAX_FIELDS: usize = 128;

/// Members in the order of the text. A name that occurs twice is an error, because parsers disagree on it.
#[derive(Debug)]
pub struct Fields<'a>(pub Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// The members of a request body.
    pub fn of(body: &'a [u8]) -> Result<Self, Misfit> {
        let expected = "an object that names nothing twice";
        serde_json::from_slice(body).map_err(|_| Misfit::Invalid("body".to_owned(), expected))
    }
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::new();
        while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
            if fields.len() == MAX_FIELDS || fields.iter().any(|(before, _)| *before == name) {
                return Err(A::Error::custom(
                    "a name occurs twice, or there are too many",
                ));
            }
            fields.push((name, value));
        }
        Ok(Fields(fields))
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_keep_their_text_and_order() {
        let fields: Fields<'_> =
            serde_json::from_str(r#"{"b": [1.0, 2], "\u0061": null}"#).unwrap();
        let read: Vec<(&str, &str)> = fields
            .0
            .iter()
            .map(|(name, value)| (name.as_ref(), value.get()))
            .collect();
        assert_eq!(read, [("b", "[1.0, 2]"), ("a", "null")]);
    }

    #[test]
    fn what_parsers_disagree_on_is_refused() {
        let many: Vec<String> = (0..=MAX_FIELDS).map(|n| format!("\"{n}\":0")).collect();
        for text in [
            "[]".to_owned(),
            r#"{"a":1,"\u0061":2}"#.to_owned(),
            format!("{{{}}}", many.join(",")),
        ] {
            assert!(serde_json::from_str::<Fields<'_>>(&text).is_err(), "{text}");
        }
    }
}
