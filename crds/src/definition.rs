//! CustomResourceDefinitions as files: generated from the types, committed under `crds/yaml` and copied into the
//! chart. A test fails when they differ.

use kube::CustomResourceExt as _;
use serde_json::Value;

use crate::yaml::{self, YamlError};
use crate::{IdentityProvider, LLMBackend, RoutingPolicy, SemanticCache, TokenBudget, VirtualKey};

/// One generated file.
#[derive(Clone, Debug)]
pub struct Definition {
    /// File name, such as `penstock.dev_llmbackends.yaml`.
    pub file: String,
    /// Its text.
    pub text: String,
}

/// All kinds.
pub fn all() -> Result<Vec<Definition>, YamlError> {
    [
        LLMBackend::crd(),
        RoutingPolicy::crd(),
        SemanticCache::crd(),
        VirtualKey::crd(),
        TokenBudget::crd(),
        IdentityProvider::crd(),
    ]
    .into_iter()
    .map(|crd| {
        let names = &crd.spec.names.plural;
        let file = format!("{}_{names}.yaml", crd.spec.group);
        let mut value = serde_json::to_value(&crd).unwrap_or_default();
        drop_number_formats(&mut value);
        Ok(Definition {
            file,
            text: yaml::to_text(&value)?,
        })
    })
    .collect()
}

/// API servers warn about `format: int32` and the like on some versions; ranges say what matters.
fn drop_number_formats(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let number = matches!(
                map.get("type").and_then(Value::as_str),
                Some("integer" | "number")
            );
            if number && map.get("format").is_some_and(Value::is_string) {
                map.remove("format");
            }
            map.values_mut().for_each(drop_number_formats);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_number_formats),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Larger ones do not fit the annotation of client-side apply, and are a sign of inlined foreign types.
    const MAX_BYTES: usize = 64 * 1024;

    #[test]
    fn committed_files_equal_the_types_here_and_in_the_chart() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for folder in [root.join("yaml"), root.join("../charts/penstock/crds")] {
            for definition in all().unwrap() {
                let path = folder.join(&definition.file);
                let committed = std::fs::read_to_string(&path).unwrap_or_default();
                assert!(
                    committed == definition.text,
                    "{} is stale: run `penstock crds --out crds/yaml` and `penstock crds --out charts/penstock/crds`",
                    path.display()
                );
            }
        }
    }

    #[test]
    fn definitions_are_small() {
        for definition in all().unwrap() {
            assert!(
                definition.text.len() < MAX_BYTES,
                "{}: {} bytes",
                definition.file,
                definition.text.len()
            );
        }
    }

    #[test]
    fn specs_hold_no_floats() {
        for definition in all().unwrap() {
            assert!(
                !definition.text.contains("type: number"),
                "{}",
                definition.file
            );
        }
    }
}
