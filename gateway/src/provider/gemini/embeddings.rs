//! Google's `batchEmbedContents` behind `/v1/embeddings`: a request for each text, a vector for each. Pure.
//! Source: <https://ai.google.dev/api/embeddings>, read in 2026-11.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::UsageIn;
use crate::provider::fields::Fields;
use crate::provider::foreign::{About, Vectors};
use crate::provider::{Misfit, Rest, Translated, is_null, read};

/// Google refuses more with 400.
const MAX_TEXTS: usize = 100;

const INPUT: &str = "a text or a list of texts";

/// From the body of a call of embeddings. The model's name is put in later: all backends have one translation.
pub(in crate::provider) fn request(body: &[u8], rest: Rest) -> Result<Translated, Misfit> {
    let Fields(fields) = Fields::of(body)?;
    let mut texts = Vec::new();
    let mut dimensions: Option<u32> = None;
    let mut vectors = Vectors::Numbers;
    for (name, raw) in fields.iter().filter(|(_, raw)| !is_null(raw)) {
        match name.as_ref() {
            "input" => texts = input(raw)?,
            "dimensions" => dimensions = Some(read(name, raw, "a whole number")?),
            "encoding_format" => {
                vectors = match raw.get() {
                    r#""float""# => Vectors::Numbers,
                    r#""base64""# => Vectors::Base64,
                    _ => return Err(Misfit::Invalid(name.to_string(), "float or base64")),
                };
            }
            // The path and each text's request have the one, the other is book-keeping.
            "model" | "user" => {}
            _ => rest.leave(name.as_ref())?,
        }
    }
    if texts.is_empty() {
        return Err(Misfit::Invalid("input".to_owned(), INPUT));
    }
    Ok(written(&texts, dimensions, vectors))
}

/// The JSON of each text, as it was written.
fn input(raw: &RawValue) -> Result<Vec<&RawValue>, Misfit> {
    let is_text = |raw: &&RawValue| raw.get().starts_with('"');
    if is_text(&raw) {
        return Ok(vec![raw]);
    }
    let texts: Vec<&RawValue> = read("input", raw, INPUT)?;
    // Ids of another model's tokens mean nothing here.
    if texts.len() > MAX_TEXTS || !texts.iter().all(is_text) {
        return Err(Misfit::Unsupported("input".to_owned()));
    }
    Ok(texts)
}

fn written(texts: &[&RawValue], dimensions: Option<u32>, vectors: Vectors) -> Translated {
    let mut body = br#"{"requests":["#.to_vec();
    let mut names_at = Vec::with_capacity(texts.len());
    let dimensions = dimensions.map(|count| format!(r#","outputDimensionality":{count}"#));
    for (index, text) in texts.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(br#"{"model":"models/"#);
        names_at.push(body.len());
        body.extend_from_slice(br#"","content":{"parts":[{"text":"#);
        body.extend_from_slice(text.get().as_bytes());
        body.extend_from_slice(b"}]}");
        body.extend_from_slice(dimensions.as_deref().unwrap_or_default().as_bytes());
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    Translated {
        body: Bytes::from(body),
        model_at: None,
        names_at,
        include_usage: false,
        vectors,
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerIn<'a> {
    #[serde(borrow)]
    embeddings: Vec<EmbeddingIn<'a>>,
    #[serde(default)]
    usage_metadata: Option<UsageIn>,
}

#[derive(Deserialize)]
struct EmbeddingIn<'a> {
    #[serde(borrow)]
    values: &'a RawValue,
}

#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    data: Vec<Embedding<'a>>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector<'a> {
    /// As Google wrote them.
    Numbers(&'a RawValue),
    Base64(String),
}

/// SDKs demand it. Zeros where nobody counted.
#[derive(Serialize)]
struct Usage {
    prompt_tokens: u64,
    total_tokens: u64,
}

/// To the answer to a call of embeddings; `None` if it holds no vectors.
pub(in crate::provider) fn answer(body: &[u8], about: &About<'_>) -> Option<Bytes> {
    let whole: AnswerIn<'_> = serde_json::from_slice(body).ok()?;
    let embeddings = whole.embeddings.iter().enumerate();
    let data: Option<Vec<Embedding<'_>>> = embeddings
        .map(|(index, embedding)| {
            Some(Embedding {
                object: "embedding",
                index,
                embedding: vector(embedding.values, about.vectors)?,
            })
        })
        .collect();
    let counted = whole.usage_metadata.unwrap_or_default().prompt_token_count;
    let answer = Answer {
        object: "list",
        data: data.filter(|data| !data.is_empty())?,
        model: about.model,
        usage: Usage {
            prompt_tokens: counted,
            total_tokens: counted,
        },
    };
    serde_json::to_vec(&answer).ok().map(Bytes::from)
}

fn vector(values: &RawValue, vectors: Vectors) -> Option<Vector<'_>> {
    let numbers: Vec<f32> = serde_json::from_str(values.get()).ok()?;
    Some(match vectors {
        Vectors::Numbers => Vector::Numbers(values),
        Vectors::Base64 => {
            let bytes: Vec<u8> = numbers.into_iter().flat_map(f32::to_le_bytes).collect();
            Vector::Base64(STANDARD.encode(bytes))
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sent(request: &Value) -> Result<Value, Misfit> {
        let translated = super::request(request.to_string().as_bytes(), Rest::Refuse)?;
        Ok(serde_json::from_slice(&translated.named("a \"b\"")).unwrap())
    }

    fn refused(request: &Value) -> Misfit {
        sent(request).unwrap_err()
    }

    #[test]
    fn each_text_is_a_request_that_names_the_model() {
        let one = |text: &str| json!({"model": "models/a \"b\"", "content": {"parts": [{"text": text}]}, "outputDimensionality": 3});
        let request = json!({"model": "m", "input": ["é\n", ""], "dimensions": 3, "user": "u"});
        let expected = json!({"requests": [one("é\n"), one("")]});
        assert_eq!(sent(&request).unwrap(), expected);
        let plain = sent(&json!({"model": "m", "input": "x"})).unwrap();
        let content = json!({"parts": [{"text": "x"}]});
        let expected = json!({"requests": [{"model": "models/a \"b\"", "content": content}]});
        assert_eq!(plain, expected);
    }

    #[test]
    fn what_google_does_not_take_is_refused_by_name() {
        let unsupported = |param: &str| Misfit::Unsupported(param.to_owned());
        for input in [json!([1, 2]), json!([[1], [2]]), json!(vec!["x"; 101])] {
            let request = json!({"model": "m", "input": input});
            assert_eq!(refused(&request), unsupported("input"));
        }
        assert!(sent(&json!({"model": "m", "input": vec!["x"; 100]})).is_ok());
        let unknown = json!({"model": "m", "input": "x", "truncate_prompt_tokens": 7});
        assert_eq!(refused(&unknown), unsupported("truncate_prompt_tokens"));
        for wrong in [
            json!({"input": []}),
            json!({"input": 7}),
            json!({}),
            json!({"input": "x", "dimensions": "3"}),
            json!({"input": "x", "encoding_format": "int8"}),
        ] {
            assert!(matches!(refused(&wrong), Misfit::Invalid(..)), "{wrong}");
        }
    }

    fn answered(body: &str, vectors: Vectors) -> Option<Value> {
        let about = About {
            created: 7,
            id: "id",
            model: "m",
            vectors,
        };
        let answer = answer(body.as_bytes(), &about)?;
        Some(serde_json::from_slice(&answer).unwrap())
    }

    #[test]
    fn vectors_are_told_as_numbers_or_as_their_bytes() {
        let body = r#"{"embeddings":[{"values":[1.0,-0.5]},{"values":[0.25,2]}]}"#;
        let entry = |index: usize, embedding: Value| json!({"object": "embedding", "index": index, "embedding": embedding});
        let whole = |data: [Value; 2]| json!({"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 0, "total_tokens": 0}});
        let numbers = whole([entry(0, json!([1.0, -0.5])), entry(1, json!([0.25, 2]))]);
        assert_eq!(answered(body, Vectors::Numbers).unwrap(), numbers);
        // Little-endian: 00 00 80 3F, 00 00 00 BF; 00 00 80 3E, 00 00 00 40.
        let bytes = whole([
            entry(0, json!("AACAPwAAAL8=")),
            entry(1, json!("AACAPgAAAEA=")),
        ]);
        assert_eq!(answered(body, Vectors::Base64).unwrap(), bytes);
    }

    #[test]
    fn tokens_are_told_where_google_counts_them() {
        let body = r#"{"embeddings":[{"values":[1]}],"usageMetadata":{"promptTokenCount":4}}"#;
        let answer = answered(body, Vectors::Numbers).unwrap();
        let expected = json!({"prompt_tokens": 4, "total_tokens": 4});
        assert_eq!(answer["usage"], expected);
        for body in [
            "{}",
            r#"{"embeddings":[]}"#,
            r#"{"embeddings":[{"values":"x"}]}"#,
            "[]",
        ] {
            assert_eq!(answered(body, Vectors::Numbers), None, "{body}");
        }
    }
}
