//! A key as the store has it, and what those who manage keys may write. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use penstock_core::config::{Key, NameMatch};
use penstock_core::ids::Id;
use penstock_core::key::{Hash, hexadecimal};
use serde::{Deserialize, Serialize};

/// The bounds of a VirtualKey's fields.
const MAX_NAME_BYTES: usize = 253;
const MAX_TEAM_BYTES: usize = 63;
const MAX_USER_CHARS: usize = 253;
const MAX_ATTRIBUTES: usize = 16;
const MAX_ATTRIBUTE_BYTES: usize = 1_024;
const MAX_LIST: usize = 64;
const MAX_MODEL_CHARS: usize = 256;
pub(super) const MAX_OVERLAP: Duration = Duration::from_hours(720);
/// Texts of one key that are good at the same time: those who rotate more often end the oldest.
const MAX_HASHES: usize = 8;

/// What a key is for: the fields of a VirtualKey.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Spec {
    #[serde(default)]
    team: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    user: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    attributes: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    models: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    policies: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    suspended: bool,
}

/// A field that cannot be what it is, and why.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub(super) struct Wrong {
    field: &'static str,
    why: String,
}

fn wrong<T>(field: &'static str, why: impl Into<String>) -> Result<T, Wrong> {
    let why = why.into();
    Err(Wrong { field, why })
}

/// Whether a key can be called that.
pub(super) fn check_name(name: &str) -> Result<(), Wrong> {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let (first, last) = (name.bytes().next(), name.bytes().next_back());
    let is_good = name.len() <= MAX_NAME_BYTES
        && first.is_some_and(is_inner)
        && last.is_some_and(is_inner)
        && name
            .bytes()
            .all(|byte| is_inner(byte) || b"-.".contains(&byte));
    if is_good {
        return Ok(());
    }
    wrong(
        "name",
        "use 1 to 253 lower-case letters, digits, '-' and '.', a letter or digit first and last",
    )
}

impl Spec {
    /// What it allows, with policies of `namespace`.
    pub(super) fn read(&self, namespace: &str) -> Result<Key, Wrong> {
        self.check()?;
        let mut models = Vec::new();
        for text in &self.models {
            match NameMatch::read(text) {
                Some(name) if text.chars().count() <= MAX_MODEL_CHARS => models.push(name),
                _ => {
                    let why = format!(
                        "'{text}': write a model, or a beginning followed by one '*', of at most {MAX_MODEL_CHARS} characters"
                    );
                    return wrong("models", why);
                }
            }
        }
        // One that takes any makes the others needless; none means any.
        if models.contains(&NameMatch::Prefix(String::new())) {
            models.clear();
        }
        let expires_s = match self.expires_at.as_deref().map(str::parse::<Timestamp>) {
            None => None,
            // What is before 1970 is over.
            Some(Ok(time)) => Some(u64::try_from(time.as_second()).unwrap_or(0)),
            Some(Err(_)) => {
                return wrong("expiresAt", "write a time such as 2027-01-01T00:00:00Z");
            }
        };
        let policies = self.policies.iter();
        Ok(Key {
            team: self.team.clone(),
            user: self.user.clone(),
            attributes: self.attributes.clone(),
            models,
            policies: policies.map(|name| Id::new(namespace, name)).collect(),
            expires_s,
            suspended: self.suspended,
            hashes: BTreeMap::new(),
        })
    }

    fn check(&self) -> Result<(), Wrong> {
        let is_outer = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        let team = self.team.as_str();
        let is_team = team.len() <= MAX_TEAM_BYTES
            && is_outer(team.bytes().next())
            && is_outer(team.bytes().next_back())
            && team
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !is_team {
            return wrong(
                "team",
                "say whose key it is: 1 to 63 letters, digits, '-', '_' and '.', a letter or digit first and last",
            );
        }
        let user = self.user.as_ref().map(|user| user.chars().count());
        if user.is_some_and(|count| !(1..=MAX_USER_CHARS).contains(&count)) {
            return wrong("user", format!("use 1 to {MAX_USER_CHARS} characters"));
        }
        let is_long = |text: &String| text.len() > MAX_ATTRIBUTE_BYTES;
        let mut texts = self.attributes.iter();
        if self.attributes.len() > MAX_ATTRIBUTES
            || texts.any(|(name, value)| name.is_empty() || is_long(name) || is_long(value))
        {
            let why = format!(
                "use at most {MAX_ATTRIBUTES}, each with a name, and of at most {MAX_ATTRIBUTE_BYTES} bytes"
            );
            return wrong("attributes", why);
        }
        for (field, list) in [("models", &self.models), ("policies", &self.policies)] {
            if list.len() > MAX_LIST {
                return wrong(field, format!("use at most {MAX_LIST}"));
            }
        }
        Ok(())
    }

    /// One of its policies that is none of `known`.
    pub(super) fn unknown_policy(&self, namespace: &str, known: &BTreeSet<&Id>) -> Option<Wrong> {
        let mut policies = self.policies.iter();
        let unknown = policies.find(|name| !known.contains(&Id::new(namespace, name.as_str())))?;
        let why = format!("this gateway has no rules of a RoutingPolicy '{unknown}'");
        Some(Wrong {
            field: "policies",
            why,
        })
    }
}

/// A key as the store has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    pub(super) spec: Spec,
    /// Hashes of the texts that stand for it, and until when each does, in Unix seconds.
    pub(super) hashes: BTreeMap<String, Option<u64>>,
    /// How many texts it has had.
    pub(super) revision: u32,
    pub(super) created_s: u64,
}

impl Record {
    /// A key of which `hash` is the text's.
    pub(super) fn new(spec: Spec, hash: &Hash, now_s: u64) -> Self {
        Self {
            spec,
            hashes: BTreeMap::from([(hexadecimal(hash), None)]),
            revision: 1,
            created_s: now_s,
        }
    }

    /// `hash` takes the place of the text that is good now, which is so until `until_s`. Returns the hashes that stand
    /// for nothing any more.
    pub(super) fn rotate(&mut self, hash: &Hash, until_s: u64, now_s: u64) -> Vec<String> {
        for end in self.hashes.values_mut() {
            *end = Some(end.map_or(until_s, |end| end.min(until_s)));
        }
        let mut by_end: Vec<(u64, String)> = self
            .hashes
            .iter()
            .map(|(hash, end)| (end.unwrap_or(until_s), hash.clone()))
            .collect();
        by_end.sort_unstable();
        let over = by_end.iter().take_while(|(end, _)| *end <= now_s).count();
        let surplus = (by_end.len() + 1).saturating_sub(MAX_HASHES);
        let gone = by_end.into_iter().take(over.max(surplus));
        let gone: Vec<String> = gone.map(|(_, hash)| hash).collect();
        self.hashes.retain(|hash, _| !gone.contains(hash));
        self.hashes.insert(hexadecimal(hash), None);
        self.revision = self.revision.saturating_add(1);
        gone
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(value: serde_json::Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn it_allows_what_a_virtual_key_would() {
        let spec = spec(json!({
            "team": "search", "user": "alice@example.com", "attributes": {"tier": "gold"},
            "models": ["chat", "gpt-*"], "policies": ["default"], "expiresAt": "1970-01-01T00:01:00Z",
        }));
        let key = spec.read("ns").unwrap();
        assert_eq!((key.team.as_str(), key.expires_s), ("search", Some(60)));
        let models = [
            NameMatch::Exact("chat".to_owned()),
            NameMatch::Prefix("gpt-".to_owned()),
        ];
        assert_eq!(key.models, models);
        assert_eq!(key.policies, BTreeSet::from([Id::new("ns", "default")]));
        let (own, other) = (Id::new("ns", "default"), Id::new("ns", "other"));
        assert!(spec.unknown_policy("ns", &BTreeSet::from([&own])).is_none());
        assert!(
            spec.unknown_policy("ns", &BTreeSet::from([&other]))
                .is_some()
        );
    }

    #[test]
    fn its_fields_and_bounds_are_those_of_a_virtual_key() {
        let text = include_str!("../../../crds/yaml/penstock.dev_virtualkeys.yaml");
        let definition = penstock_crds::yaml::documents(text).unwrap().remove(0);
        let schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
        let schema = definition.pointer(schema).unwrap();
        let full = spec(json!({
            "team": "a", "user": "b", "attributes": {"c": "d"}, "models": ["e"], "policies": ["f"],
            "expiresAt": "2027-01-01T00:00:00Z", "suspended": true,
        }));
        let full = serde_json::to_value(full).unwrap();
        let mut own: BTreeSet<&str> = full
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        // What only objects of a cluster have: a gateway's store is one gateway's, and there are no Secrets in it.
        own.extend(["gateway", "secretName", "rotation"]);
        let theirs = schema.as_object().unwrap().keys().map(String::as_str);
        assert_eq!(own, theirs.collect());
        for (bound, value) in [
            ("/team/maxLength", MAX_TEAM_BYTES),
            ("/user/maxLength", MAX_USER_CHARS),
            ("/attributes/maxProperties", MAX_ATTRIBUTES),
            ("/models/maxItems", MAX_LIST),
            ("/models/items/maxLength", MAX_MODEL_CHARS),
            ("/policies/maxItems", MAX_LIST),
        ] {
            assert_eq!(schema.pointer(bound), Some(&json!(value)), "{bound}");
        }
        let pattern = schema["team"]["pattern"].as_str().unwrap();
        let pattern = regex::Regex::new(pattern).unwrap();
        for team in ["a", "A-b_c.9", "-a", "a-", "a b", "", "ä", ".a"] {
            let is_taken = spec(json!({"team": team})).read("ns").is_ok();
            assert_eq!(is_taken, pattern.is_match(team), "{team}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_by_its_field() {
        let long = "x".repeat(300);
        let many: Vec<String> = (0..65).map(|number| number.to_string()).collect();
        let attributes: BTreeMap<_, _> = (0..17).map(|number| (number.to_string(), "x")).collect();
        for (field, value) in [
            ("team", json!({})),
            ("team", json!({"team": "-a"})),
            ("team", json!({"team": long})),
            ("user", json!({"team": "a", "user": ""})),
            ("attributes", json!({"team": "a", "attributes": attributes})),
            ("models", json!({"team": "a", "models": ["a*b"]})),
            ("models", json!({"team": "a", "models": [long]})),
            ("models", json!({"team": "a", "models": many})),
            ("policies", json!({"team": "a", "policies": many})),
            ("expiresAt", json!({"team": "a", "expiresAt": "tomorrow"})),
        ] {
            assert_eq!(spec(value).read("ns").unwrap_err().field, field);
        }
        assert!(serde_json::from_value::<Spec>(json!({"team": "a", "model": "x"})).is_err());
        for name in ["", "A", "-a", "a-", "a_b", &long] {
            assert!(check_name(name).is_err(), "{name}");
        }
        assert!(check_name("alice.7-b").is_ok());
    }

    #[test]
    fn the_texts_before_end_when_they_should_and_are_few() {
        let mut record = Record::new(spec(json!({"team": "a"})), &[0; 32], 0);
        assert!(record.rotate(&[1; 32], 100, 10).is_empty());
        let first = hexadecimal(&[0; 32]);
        assert_eq!(record.hashes[&first], Some(100));
        // A longer overlap of the next one does not make the first last longer.
        assert!(record.rotate(&[2; 32], 500, 20).is_empty());
        assert_eq!(record.hashes[&first], Some(100));
        assert_eq!(record.rotate(&[3; 32], 600, 100), [first]);
        assert_eq!((record.hashes.len(), record.revision), (3, 4));
        for number in 4..40 {
            let gone = record.rotate(&[number; 32], 1_000, 101);
            assert_eq!(gone.len(), usize::from(number >= 9));
            assert!(record.hashes.len() <= MAX_HASHES);
            assert_eq!(record.hashes[&hexadecimal(&[number; 32])], None);
        }
    }
}
