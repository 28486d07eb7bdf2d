//! YAML in and out: the only file that knows the YAML library (docs/decisions/0002).
//!
//! Text is read into a `serde_json::Value` first: the library's own enum notation (`!tag`) is not Kubernetes'.

use serde::Deserialize as _;
use serde_json::Value;

/// Text that is not YAML.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct YamlError {
    /// What the parser said, with line and column.
    message: String,
}

/// All documents of `text`, empty ones left out.
pub fn documents(text: &str) -> Result<Vec<Value>, YamlError> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| {
            Value::deserialize(document).map_err(|err| YamlError {
                message: err.to_string(),
            })
        })
        .filter(|document| !matches!(document, Ok(Value::Null)))
        .collect()
}

/// `value` as one YAML document.
pub fn to_text(value: &Value) -> Result<String, YamlError> {
    serde_yaml::to_string(value).map_err(|err| YamlError {
        message: err.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_split_and_empty_ones_left_out() {
        assert_eq!(
            documents("---\na: 1\n---\n---\nb: {c: [x]}\n")
                .unwrap()
                .len(),
            2
        );
    }

    #[test]
    fn broken_yaml_says_where() {
        let error = documents("a: 1\n b: 2\n").unwrap_err().to_string();
        assert!(error.contains("line"), "{error}");
    }
}
