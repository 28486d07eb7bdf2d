//! Several `/v1/embeddings` calls as one, and its answer taken apart again. Pure.
//!
//! Calls can be joined when they differ in `input` only, and when each input is a text. What each caller gets is what
//! it would have got alone, but for `usage`: a backend counts the tokens of all inputs together, so each call is told a
//! part of that in proportion to the bytes of its inputs; the parts add up to what the backend counted.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use xxhash_rust::xxh3::Xxh3Default;

/// One call.
#[derive(Debug)]
pub struct Part {
    /// Equal for calls that differ in `input` only.
    pub key: u128,
    rest: BTreeMap<String, Box<RawValue>>,
    inputs: Vec<Box<RawValue>>,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Input {
    One(String),
    Several(Vec<String>),
}

impl Part {
    /// Reads a call. `None`: it cannot be joined with others.
    pub fn of(body: &[u8]) -> Option<Self> {
        let mut rest: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).ok()?;
        let input = rest.remove("input")?;
        let texts = match serde_json::from_str(input.get()).ok()? {
            Input::One(text) => vec![text],
            Input::Several(texts) if !texts.is_empty() => texts,
            Input::Several(_) => return None,
        };
        let bytes = texts.iter().map(|text| text.len().max(1)).sum::<usize>();
        let inputs = if texts.len() == 1 && input.get().trim_start().starts_with('"') {
            vec![input]
        } else {
            serde_json::from_str(input.get()).ok()?
        };
        let mut hash = Xxh3Default::new();
        for (name, value) in &rest {
            hash.update(name.as_bytes());
            hash.update(&[0]);
            hash.update(value.get().as_bytes());
            hash.update(&[0]);
        }
        Some(Self {
            key: hash.digest128(),
            rest,
            inputs,
            bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
        })
    }

    /// How many inputs it has, at least one.
    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// About how large it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The body of one call for all of `parts`, which have the same key.
pub fn joined(parts: &[&Part]) -> Option<Bytes> {
    let inputs = parts.iter().flat_map(|part| &part.inputs);
    let inputs = to_raw_value(&inputs.collect::<Vec<_>>()).ok()?;
    let rest = parts.first()?.rest.iter();
    let mut members: BTreeMap<&str, &RawValue> = rest
        .map(|(name, value)| (name.as_str(), &**value))
        .collect();
    members.insert("input", &inputs);
    serde_json::to_vec(&members).ok().map(Bytes::from)
}

#[derive(Clone, Copy, Default, Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    total_tokens: u64,
}

#[derive(Clone, Copy, Serialize)]
struct PartUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

/// What one call gets.
#[derive(Debug, PartialEq, Eq)]
pub struct Share {
    /// Its answer.
    pub body: Bytes,
    /// Its part of the prompt tokens, if the backend counted them.
    pub prompt_tokens: Option<u64>,
}

/// The answers of `parts` out of the answer to all of them. `None`: it does not hold one embedding for each input.
pub fn split(answer: &[u8], parts: &[&Part]) -> Option<Vec<Share>> {
    let answer: BTreeMap<String, &RawValue> = serde_json::from_slice(answer).ok()?;
    let data: Vec<BTreeMap<String, &RawValue>> =
        serde_json::from_str(answer.get("data")?.get()).ok()?;
    let all: Option<Counts> = answer
        .get("usage")
        .and_then(|usage| serde_json::from_str(usage.get()).ok());
    let count: usize = parts.iter().map(|part| part.inputs()).sum();
    let mut by_index: BTreeMap<usize, &BTreeMap<String, &RawValue>> = BTreeMap::new();
    for entry in &data {
        let index = entry.get("index")?.get().parse().ok()?;
        by_index.insert(index, entry);
    }
    if by_index.len() != count || data.len() != count || !by_index.contains_key(&(count - 1)) {
        return None;
    }
    let mut entries = by_index.into_values();
    let mut shares = Vec::new();
    let whole: u64 = parts.iter().map(|part| part.bytes).sum();
    let (mut told, mut counted) = (Counts::default(), 0);
    for part in parts {
        counted += part.bytes;
        // Up to here, less what the calls before were told: rounding errors do not add up.
        let until = |all: u64| {
            let share = u128::from(all) * u128::from(counted) / u128::from(whole.max(1));
            u64::try_from(share).unwrap_or(u64::MAX)
        };
        let usage = all.map(|usage| {
            let (prompt, total) = (until(usage.prompt_tokens), until(usage.total_tokens));
            let own = PartUsage {
                prompt_tokens: prompt - told.prompt_tokens,
                total_tokens: total - told.total_tokens,
            };
            (told.prompt_tokens, told.total_tokens) = (prompt, total);
            own
        });
        let own = entries.by_ref().take(part.inputs()).enumerate();
        let own: Option<Vec<_>> = own.map(|(index, entry)| with_index(entry, index)).collect();
        let own = to_raw_value(&own?).ok()?;
        let usage_text = usage.and_then(|usage| to_raw_value(&usage).ok());
        let rest = answer.iter();
        let mut members: BTreeMap<&str, &RawValue> =
            rest.map(|(name, value)| (name.as_str(), *value)).collect();
        members.insert("data", &own);
        if let Some(usage) = &usage_text {
            members.insert("usage", usage);
        }
        shares.push(Share {
            body: Bytes::from(serde_json::to_vec(&members).ok()?),
            prompt_tokens: usage.map(|usage| usage.prompt_tokens),
        });
    }
    Some(shares)
}

/// An embedding as the `index`th of its answer.
fn with_index(entry: &BTreeMap<String, &RawValue>, index: usize) -> Option<Box<RawValue>> {
    let index = to_raw_value(&index).ok()?;
    let members = entry.iter().map(|(name, value)| (name.as_str(), *value));
    let mut members: BTreeMap<&str, &RawValue> = members.collect();
    members.insert("index", &index);
    to_raw_value(&members).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn part(body: &Value) -> Option<Part> {
        Part::of(body.to_string().as_bytes())
    }

    #[test]
    fn only_calls_that_differ_in_their_texts_are_joined() {
        let one = part(&json!({"model": "m", "input": "a", "dimensions": 4})).unwrap();
        let other = part(&json!({"input": ["b", "c"], "dimensions": 4, "model": "m"})).unwrap();
        assert_eq!(one.key, other.key);
        assert_eq!((one.inputs(), other.inputs()), (1, 2));
        let longer = part(&json!({"model": "m", "input": "a", "dimensions": 8})).unwrap();
        assert_ne!(one.key, longer.key);
        for input in [
            json!([1, 2]),
            json!([[1], [2]]),
            json!([]),
            json!(7),
            json!(null),
        ] {
            assert!(
                part(&json!({"model": "m", "input": input})).is_none(),
                "{input}"
            );
        }
        assert!(part(&json!({"model": "m"})).is_none());
    }

    #[test]
    fn each_call_gets_its_own_embeddings_from_zero_and_its_part_of_the_usage() {
        let parts = [
            part(&json!({"model": "m", "input": "aaaa"})).unwrap(),
            part(&json!({"model": "m", "input": ["bb", "cc"]})).unwrap(),
        ];
        let parts: Vec<&Part> = parts.iter().collect();
        let body: Value = serde_json::from_slice(&joined(&parts).unwrap()).unwrap();
        assert_eq!(body, json!({"model": "m", "input": ["aaaa", "bb", "cc"]}));
        let answer = r#"{"object":"list","model":"m","id":"e","data":[{"index":2,"embedding":[3.10]},{"index":0,"embedding":[1e0]},{"index":1,"embedding":[2.0]}],"usage":{"prompt_tokens":9,"total_tokens":9}}"#;
        let shares = split(answer.as_bytes(), &parts).unwrap();
        let texts: Vec<&str> = shares
            .iter()
            .map(|share| std::str::from_utf8(&share.body).unwrap())
            .collect();
        assert!(texts[0].contains(r#""embedding":[1e0]"#), "{}", texts[0]);
        assert!(texts[1].contains("[3.10]"), "as the backend wrote it");
        let second: Value = serde_json::from_str(texts[1]).unwrap();
        assert_eq!(second["data"][0]["index"], 0);
        assert_eq!(second["data"][1]["index"], 1);
        assert_eq!(
            (&second["id"], &second["object"]),
            (&json!("e"), &json!("list"))
        );
        assert_eq!(shares[0].prompt_tokens, Some(4));
        assert_eq!(shares[1].prompt_tokens, Some(5));
    }

    #[test]
    fn an_answer_that_lacks_an_embedding_is_none() {
        let one = part(&json!({"model": "m", "input": ["a", "b"]})).unwrap();
        for data in [
            json!([{"index": 0, "embedding": []}]),
            json!([{"index": 0, "embedding": []}, {"index": 0, "embedding": []}]),
            json!([{"index": 0, "embedding": []}, {"index": 7, "embedding": []}]),
            json!([{"embedding": []}, {"index": 1, "embedding": []}]),
        ] {
            let answer = json!({"data": data}).to_string();
            assert_eq!(split(answer.as_bytes(), &[&one]), None, "{answer}");
        }
        assert_eq!(split(b"no", &[&one]), None);
    }

    proptest! {
        #[test]
        fn order_and_sums_are_kept(
            calls in prop::collection::vec(prop::collection::vec("[a-z]{0,9}", 1..4), 1..6),
            tokens in 0u64..1_000,
        ) {
            let parts: Vec<Part> = calls
                .iter()
                .map(|texts| part(&json!({"model": "m", "input": texts})).unwrap())
                .collect();
            let parts: Vec<&Part> = parts.iter().collect();
            let body: Value = serde_json::from_slice(&joined(&parts).unwrap()).unwrap();
            let echo: Vec<Value> = body["input"].as_array().unwrap().iter().enumerate()
                .map(|(index, text)| json!({"index": index, "embedding": text}))
                .collect();
            let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
            let answer = json!({"data": echo, "usage": usage}).to_string();
            let shares = split(answer.as_bytes(), &parts).unwrap();
            let sum: u64 = shares.iter().map(|share| share.prompt_tokens.unwrap()).sum();
            prop_assert_eq!(sum, tokens);
            for (share, texts) in shares.iter().zip(&calls) {
                let own: Value = serde_json::from_slice(&share.body).unwrap();
                let got: Vec<&str> = own["data"].as_array().unwrap().iter()
                    .map(|entry| entry["embedding"].as_str().unwrap())
                    .collect();
                prop_assert_eq!(&got, texts);
            }
        }
    }
}
