//! `GET /v1/models` and `GET /v1/models/{id}`: the models that rules name, as each protocol tells of them, to
//! those who may ask for them. Pure.

use std::collections::BTreeMap;

use bytes::Bytes;
use penstock_core::config::{GatewayConfig, NameMatch};
use serde_json::{Value, json};

use crate::openai::Dialect;

/// The models of one config, and the rules that name each.
pub struct Models {
    exact: BTreeMap<String, Vec<usize>>,
    /// Not the empty one: who takes any name does not say that there is a model of it.
    prefixes: BTreeMap<String, Vec<usize>>,
}

impl Models {
    /// Those that the config's rules name.
    pub fn new(config: &GatewayConfig) -> Self {
        let mut exact: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut prefixes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, rule) in config.rules.iter().enumerate() {
            for name in &rule.models {
                let (names, name) = match name {
                    NameMatch::Exact(name) => (&mut exact, name),
                    NameMatch::Prefix(prefix) if prefix.is_empty() => continue,
                    NameMatch::Prefix(prefix) => (&mut prefixes, prefix),
                };
                names.entry(name.clone()).or_default().push(index);
            }
        }
        Self { exact, prefixes }
    }

    /// Those with a whole name which `is_open` takes: a name, and the number of a rule that names it.
    pub fn list(&self, dialect: Dialect, is_open: impl Fn(&str, usize) -> bool) -> Bytes {
        let open: Vec<&String> = self
            .exact
            .iter()
            .filter(|(name, rules)| rules.iter().any(|rule| is_open(name, *rule)))
            .map(|(name, _)| name)
            .collect();
        let data: Vec<Value> = open.iter().map(|id| told(id, dialect)).collect();
        let list = match dialect {
            Dialect::OpenAi => json!({"object": "list", "data": data}),
            Dialect::Anthropic => json!({
                "data": data, "first_id": open.first(), "last_id": open.last(), "has_more": false
            }),
        };
        Bytes::from(list.to_string())
    }

    /// The one of this name, if a rule that `is_open` takes names it, or the beginning of it.
    pub fn one(
        &self,
        id: &str,
        dialect: Dialect,
        is_open: impl Fn(&str, usize) -> bool,
    ) -> Option<Bytes> {
        let by_beginning = self.prefixes.iter();
        let by_beginning = by_beginning.filter(|(prefix, _)| id.starts_with(prefix.as_str()));
        let mut rules = self
            .exact
            .get(id)
            .into_iter()
            .chain(by_beginning.map(|(_, rules)| rules))
            .flatten();
        let is_known = rules.any(|rule| is_open(id, *rule));
        is_known.then(|| Bytes::from(told(id, dialect).to_string()))
    }
}

fn told(id: &str, dialect: Dialect) -> Value {
    match dialect {
        Dialect::OpenAi => {
            json!({"id": id, "object": "model", "created": 0, "owned_by": "penstock"})
        }
        Dialect::Anthropic => {
            json!({"id": id, "type": "model", "display_name": id, "created_at": "1970-01-01T00:00:00Z"})
        }
    }
}

/// What stands for a model's name in the path of `GET /v1/models/{id}`. A name may have slashes, as they are or
/// encoded.
pub fn of_path(path: &str) -> Option<&str> {
    let id = path.strip_prefix("/v1/models/")?;
    (!id.is_empty()).then_some(id)
}

/// The name that a part of a path stands for: `%2F` is a slash. What cannot be decoded stands for itself.
pub fn decoded(part: &str) -> String {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        let byte = match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => u8::try_from(high * 16 + low).ok(),
            _ => None,
        };
        bytes.push(byte.unwrap_or(*first));
        rest = byte.map_or(after, |_| &after[2..]);
    }
    String::from_utf8(bytes).unwrap_or_else(|_| part.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::tests::{config, rule};

    fn models(names: &[NameMatch]) -> Models {
        let rules = vec![
            rule("r", names, &[("a", 1, 0)]),
            rule("s", &names[..1], &[("a", 1, 0)]),
        ];
        Models::new(&config(&["a"], rules))
    }

    #[test]
    fn whole_names_are_listed_once_and_beginnings_are_known() {
        let exact = |name: &str| NameMatch::Exact(name.to_owned());
        let prefix = |name: &str| NameMatch::Prefix(name.to_owned());
        let models = models(&[exact("b"), exact("org/a"), prefix("gpt-"), prefix("")]);
        let ids = |dialect| -> Vec<String> {
            let list: Value = serde_json::from_slice(&models.list(dialect, |_, _| true)).unwrap();
            let data = list["data"].as_array().unwrap().iter();
            data.map(|one| one["id"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(ids(Dialect::OpenAi), ["b", "org/a"]);
        assert_eq!(ids(Dialect::Anthropic), ["b", "org/a"]);
        for (id, is_known) in [
            ("b", true),
            ("org/a", true),
            ("gpt-5", true),
            ("org", false),
            ("c", false),
        ] {
            for dialect in [Dialect::OpenAi, Dialect::Anthropic] {
                let one = models.one(id, dialect, |_, _| true);
                let one = one.map(|one| serde_json::from_slice::<Value>(&one).unwrap());
                assert_eq!(one.map(|one| one["id"] == id), is_known.then_some(true));
            }
        }
    }

    #[test]
    fn a_path_names_a_model_with_its_slashes() {
        assert_eq!(of_path("/v1/models/org/a"), Some("org/a"));
        assert_eq!(of_path("/v1/models/"), None);
        assert_eq!(of_path("/v1/models"), None);
        for (part, name) in [
            ("org%2Fa", "org/a"),
            ("org/a", "org/a"),
            ("a%3a1%20", "a:1 "),
            ("100%", "100%"),
            ("%4", "%4"),
            ("%zz%41", "%zzA"),
            ("%ff", "%ff"),
            ("%C3%A9", "é"),
        ] {
            assert_eq!(decoded(part), name);
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(name in "\\PC{0,20}") {
            let bytes = name.bytes().map(|byte| format!("%{byte:02x}"));
            let encoded: Vec<String> = bytes.collect();
            prop_assert_eq!(decoded(&encoded.concat()), name);
        }
    }
}
