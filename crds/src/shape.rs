//! Whether a spec has the shape that its kind's schema asks for: fields, types, required fields, closed lists. Ranges
//! and meaning are `compile`'s. Pure. An API server says the same of an object that reaches it.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;
use serde_json::Value;

use crate::object::Kind;
use crate::{IdentityProvider, LLMBackend, RoutingPolicy, SemanticCache, TokenBudget, VirtualKey};

/// A place in an object, such as `spec.rules[0].name`, and what is wrong there.
pub(crate) type Misfit = (String, String);

/// Schemas of the specs, made once: that takes longer than a check.
static SPECS: LazyLock<BTreeMap<Kind, JSONSchemaProps>> = LazyLock::new(|| {
    let kinds = [
        (Kind::LLMBackend, LLMBackend::crd()),
        (Kind::RoutingPolicy, RoutingPolicy::crd()),
        (Kind::SemanticCache, SemanticCache::crd()),
        (Kind::VirtualKey, VirtualKey::crd()),
        (Kind::TokenBudget, TokenBudget::crd()),
        (Kind::IdentityProvider, IdentityProvider::crd()),
    ];
    let spec = |crd: CustomResourceDefinition| {
        let version = crd.spec.versions.into_iter().next()?;
        let mut properties = version.schema?.open_api_v3_schema?.properties?;
        properties.remove("spec")
    };
    let specs = kinds
        .into_iter()
        .filter_map(|(kind, crd)| Some((kind, spec(crd)?)));
    specs.collect()
});

/// Everything in a `spec` that does not fit, in the order of the schema.
pub(crate) fn misfits(kind: Kind, spec: &Value) -> Vec<Misfit> {
    let mut found = Vec::new();
    if let Some(schema) = SPECS.get(&kind) {
        check(schema, spec, "spec", &mut found);
    }
    found
}

fn check(schema: &JSONSchemaProps, value: &Value, path: &str, found: &mut Vec<Misfit>) {
    if value.is_null() && schema.nullable == Some(true) {
        return;
    }
    let mut misfit = |message: String| found.push((path.to_owned(), message));
    match (schema.type_.as_deref(), value) {
        (Some("object"), Value::Object(members)) => {
            let known = schema.properties.iter().flatten();
            for (name, property) in known {
                let path = format!("{path}.{name}");
                match members.get(name) {
                    Some(member) => check(property, member, &path, found),
                    None if schema.required.iter().flatten().any(|must| must == name) => {
                        found.push((path, "required, and missing".to_owned()));
                    }
                    None => {}
                }
            }
            let is_known = |name: &String| {
                let properties = schema.properties.as_ref();
                properties.is_some_and(|properties| properties.contains_key(name))
            };
            for (name, member) in members.iter().filter(|(name, _)| !is_known(name)) {
                let path = format!("{path}.{name}");
                match &schema.additional_properties {
                    Some(JSONSchemaPropsOrBool::Schema(schema)) => {
                        check(schema, member, &path, found);
                    }
                    Some(JSONSchemaPropsOrBool::Bool(true)) => {}
                    _ => found.push((path, unknown(schema))),
                }
            }
        }
        (Some("array"), Value::Array(items)) => {
            if let Some(JSONSchemaPropsOrArray::Schema(schema)) = &schema.items {
                for (index, item) in items.iter().enumerate() {
                    check(schema, item, &format!("{path}[{index}]"), found);
                }
            }
        }
        (Some("string"), Value::String(text)) => {
            let allowed: Vec<&str> = schema
                .enum_
                .iter()
                .flatten()
                .filter_map(|value| value.0.as_str())
                .collect();
            if !allowed.is_empty() && !allowed.contains(&text.as_str()) {
                misfit(format!("'{text}' is not one of {}", allowed.join(", ")));
            }
        }
        (Some("integer"), Value::Number(number)) if !number.is_f64() => {}
        (Some("number"), Value::Number(_)) | (Some("boolean"), Value::Bool(_)) => {}
        (Some(wanted), _) => misfit(format!("{}: write {}", shown(value), with_article(wanted))),
        // Our schemas leave the type out for x-kubernetes-int-or-string alone.
        (None, Value::String(_)) => {}
        (None, Value::Number(number)) if !number.is_f64() => {}
        (None, _) => misfit(format!(
            "{}: write a whole number or a string",
            shown(value)
        )),
    }
}

fn unknown(schema: &JSONSchemaProps) -> String {
    let known: Vec<&str> = schema
        .properties
        .iter()
        .flatten()
        .map(|(name, _)| name.as_str())
        .collect();
    format!(
        "unknown field: correct its spelling or remove it (known here: {})",
        known.join(", ")
    )
}

/// A short value as it is, a long one by its type.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "this is empty".to_owned(),
        Value::Bool(value) => format!("{value} is a boolean"),
        Value::Number(number) => format!("{number} is a number"),
        Value::String(text) if text.chars().count() <= 40 => format!("'{text}' is a string"),
        Value::String(_) => "this is a string".to_owned(),
        Value::Array(_) => "this is a list".to_owned(),
        Value::Object(_) => "this is a map".to_owned(),
    }
}

fn with_article(type_: &str) -> &str {
    match type_ {
        "object" => "a map",
        "array" => "a list",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        "string" => "a string (in quotes, if it looks like a number)",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(spec: Value) -> Vec<Misfit> {
        misfits(Kind::LLMBackend, &spec)
    }

    #[test]
    fn every_misfit_is_found_and_not_the_first_alone() {
        let found = of(json!({"pool": {
            "modle": "m",
            "accelerator": {"count": "one"},
            "scaling": {"maxReplicas": 8.5, "ttftP90": 500},
            "engine": "Fast",
            "args": "--x",
        }}));
        let paths: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "spec.pool.accelerator.count",
                "spec.pool.accelerator.resource",
                "spec.pool.args",
                "spec.pool.engine",
                "spec.pool.model",
                "spec.pool.scaling.maxReplicas",
                "spec.pool.scaling.ttftP90",
                "spec.pool.modle",
            ]
        );
        assert_eq!(found[0].1, "'one' is a string: write a whole number");
        assert_eq!(found[3].1, "'Fast' is not one of vLLM, Simulated");
        assert!(found[7].1.contains("model, "), "{}", found[7].1);
    }

    #[test]
    fn what_the_schema_allows_has_no_misfits() {
        assert_eq!(
            of(json!({"pool": {
                "model": "m", "image": null, "args": ["--x"], "env": {"A": "1"},
                "resources": {"requests": {"cpu": 1, "memory": "1Gi"}}, "scaling": {"maxReplicas": 8},
            }})),
            []
        );
        assert_eq!(
            of(json!({"external": {"url": "https://api.example.com/v1"}})),
            []
        );
    }
}
