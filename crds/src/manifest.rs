//! Files of YAML → [`Objects`]. Pure: the caller reads the files. What the API server would refuse or silently drop
//! (unknown fields) is reported with file and path.

use std::collections::BTreeMap;

use penstock_core::ids::Id;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::object::{Kind, ObjectRef, Objects};
use crate::shape;
use crate::yaml;

/// Namespace of objects that name none.
const DEFAULT_NAMESPACE: &str = "default";

/// One file.
#[derive(Clone, Debug)]
pub struct File {
    /// As it should appear in messages.
    pub path: String,
    /// Its content.
    pub text: String,
}

/// What the files hold.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    /// Objects of our kinds.
    pub objects: Objects,
    /// `Secret` objects: key → value.
    pub secrets: BTreeMap<Id, BTreeMap<String, Vec<u8>>>,
    /// `ConfigMap` objects: key → value.
    pub config_maps: BTreeMap<Id, BTreeMap<String, Vec<u8>>>,
    /// Which file an object came from.
    pub origins: BTreeMap<ObjectRef, String>,
    /// Objects of other kinds, as `file: Kind name`: they are not needed without a cluster.
    pub ignored: Vec<String>,
}

/// Something in a file that is not an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileProblem {
    /// The file.
    pub file: String,
    /// `Kind/namespace/name`, or which document of the file.
    pub object: String,
    /// Where in the object; empty for the whole.
    pub path: String,
    /// What is wrong and what to change.
    pub message: String,
}

/// Reads all documents of all files. What cannot be read is left out and reported.
pub fn read(files: &[File]) -> (Manifests, Vec<FileProblem>) {
    let mut reader = Reader {
        manifests: Manifests::default(),
        problems: Vec::new(),
    };
    for file in files {
        match yaml::documents(&file.text) {
            Err(err) => reader.refuse(file, "the file".to_owned(), "", format!("not YAML: {err}")),
            Ok(documents) => {
                for (index, document) in documents.into_iter().enumerate() {
                    reader.document(file, index, document);
                }
            }
        }
    }
    (reader.manifests, reader.problems)
}

struct Reader {
    manifests: Manifests,
    problems: Vec<FileProblem>,
}

impl Reader {
    fn refuse(&mut self, file: &File, object: String, path: &str, message: String) {
        self.problems.push(FileProblem {
            file: file.path.clone(),
            object,
            path: path.to_owned(),
            message,
        });
    }

    fn document(&mut self, file: &File, index: usize, document: Value) {
        let place = format!("document {}", index + 1);
        let text = |path: &str| {
            document
                .pointer(path)
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let (Some(api_version), Some(kind)) = (text("/apiVersion"), text("/kind")) else {
            let message = "every document needs apiVersion and kind".to_owned();
            return self.refuse(file, place, "", message);
        };
        let Some(name) = text("/metadata/name") else {
            return self.refuse(
                file,
                format!("{kind} in {place}"),
                "metadata.name",
                "give it a name".to_owned(),
            );
        };
        let id = Id::new(
            text("/metadata/namespace").unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
            name,
        );
        if api_version == "v1" && kind == "Secret" {
            return self.secret(file, id, &document);
        }
        if api_version == "v1" && kind == "ConfigMap" {
            let keys = self.texts(file, &format!("ConfigMap/{id}"), &document, "data");
            self.manifests.config_maps.insert(id, keys);
            return;
        }
        if !api_version.starts_with("penstock.dev/") {
            return self
                .manifests
                .ignored
                .push(format!("{}: {kind} {id}", file.path));
        }
        if api_version != "penstock.dev/v1alpha1" {
            let message = format!("'{api_version}' is not served: write penstock.dev/v1alpha1");
            return self.refuse(file, format!("{kind}/{id}"), "apiVersion", message);
        }
        self.own(file, &kind, id, document);
    }

    /// Takes an object of one of our kinds.
    fn own(&mut self, file: &File, kind: &str, id: Id, document: Value) {
        match kind {
            "LLMBackend" => {
                let object = self.object(file, Kind::LLMBackend, &id, document);
                self.manifests
                    .objects
                    .backends
                    .extend(object.map(|object| (id, object)));
            }
            "RoutingPolicy" => {
                let object = self.object(file, Kind::RoutingPolicy, &id, document);
                self.manifests
                    .objects
                    .policies
                    .extend(object.map(|object| (id, object)));
            }
            "SemanticCache" => {
                let object = self.object(file, Kind::SemanticCache, &id, document);
                self.manifests
                    .objects
                    .caches
                    .extend(object.map(|object| (id, object)));
            }
            "VirtualKey" => {
                let object = self.object(file, Kind::VirtualKey, &id, document);
                self.manifests
                    .objects
                    .keys
                    .extend(object.map(|object| (id, object)));
            }
            "TokenBudget" => {
                let object = self.object(file, Kind::TokenBudget, &id, document);
                self.manifests
                    .objects
                    .budgets
                    .extend(object.map(|object| (id, object)));
            }
            "IdentityProvider" => {
                let object = self.object(file, Kind::IdentityProvider, &id, document);
                self.manifests
                    .objects
                    .identities
                    .extend(object.map(|object| (id, object)));
            }
            _ => {
                let kinds = Kind::ALL.map(Kind::name).join(", ");
                let message = format!("'{kind}' is not a kind of penstock.dev: {kinds} are");
                self.refuse(file, format!("{kind}/{id}"), "kind", message);
            }
        }
    }

    fn object<T>(&mut self, file: &File, kind: Kind, id: &Id, document: Value) -> Option<T>
    where
        T: DeserializeOwned,
    {
        let object = ObjectRef::new(kind, id.clone());
        if let Some(first) = self.manifests.origins.get(&object) {
            let message = format!("defined already in {first}: remove one of them");
            self.refuse(file, object.to_string(), "", message);
            return None;
        }
        let misfits = shape::misfits(kind, &document["spec"]);
        for (path, message) in &misfits {
            self.refuse(file, object.to_string(), path, message.clone());
        }
        let typed: T = match serde_path_to_error::deserialize(&document) {
            Ok(typed) => typed,
            Err(_) if !misfits.is_empty() => return None,
            Err(err) => {
                let path = err.path().to_string();
                let path = if path == "." { String::new() } else { path };
                self.refuse(file, object.to_string(), &path, err.inner().to_string());
                return None;
            }
        };
        self.manifests.origins.insert(object, file.path.clone());
        Some(typed)
    }

    fn secret(&mut self, file: &File, id: Id, document: &Value) {
        let object = format!("Secret/{id}");
        let keys = self.texts(file, &object, document, "stringData");
        if document.get("data").is_some() {
            let message = "without a cluster, write secret values under stringData".to_owned();
            self.refuse(file, object, "data", message);
        }
        self.manifests.secrets.insert(id, keys);
    }

    /// The values of one member, which are texts.
    fn texts(
        &mut self,
        file: &File,
        object: &str,
        document: &Value,
        member: &str,
    ) -> BTreeMap<String, Vec<u8>> {
        let mut keys = BTreeMap::new();
        for (key, value) in document
            .get(member)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            if let Some(value) = value.as_str() {
                keys.insert(key.clone(), value.as_bytes().to_vec());
            } else {
                let path = format!("{member}.{key}");
                let message = "write the value in quotes".to_owned();
                self.refuse(file, object.to_owned(), &path, message);
            }
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_one(text: &str) -> (Manifests, Vec<FileProblem>) {
        read(&[File {
            path: "a.yaml".into(),
            text: text.into(),
        }])
    }

    const BACKEND: &str =
        "apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {name: chat}\n";

    #[test]
    fn smallest_backend_is_read_with_defaults() {
        let (manifests, problems) = read_one(&format!(
            "{BACKEND}spec: {{pool: {{model: m, scaling: {{maxReplicas: 3}}}}}}\n"
        ));
        assert_eq!(problems, []);
        let backend = &manifests.objects.backends[&Id::new("default", "chat")];
        let scaling = backend
            .spec
            .pool
            .as_ref()
            .unwrap()
            .scaling
            .as_ref()
            .unwrap();
        assert_eq!(
            (scaling.min_replicas, scaling.ttft_p90.0.as_str()),
            (1, "500ms")
        );
    }

    #[test]
    fn unknown_field_is_reported_with_its_path() {
        let (_, problems) = read_one(&format!(
            "{BACKEND}spec: {{pool: {{model: m, scalling: {{a: 1}}}}}}\n"
        ));
        assert_eq!(problems[0].path, "spec.pool.scalling");
    }

    #[test]
    fn wrong_type_is_reported_with_its_path() {
        let (manifests, problems) = read_one(&format!(
            "{BACKEND}spec: {{pool: {{model: m, replicas: many}}}}\n"
        ));
        assert_eq!(problems[0].path, "spec.pool.replicas");
        assert!(manifests.objects.backends.is_empty());
    }

    #[test]
    fn same_object_twice_names_the_first_file() {
        let file = |path: &str| File {
            path: path.into(),
            text: format!("{BACKEND}spec: {{pool: {{model: m}}}}\n"),
        };
        let (_, problems) = read(&[file("a.yaml"), file("b.yaml")]);
        assert_eq!(problems[0].file, "b.yaml");
        assert!(problems[0].message.contains("a.yaml"));
    }

    #[test]
    fn other_kinds_are_ignored_and_listed() {
        let (manifests, problems) =
            read_one("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n");
        assert_eq!((manifests.ignored.len(), problems.len()), (1, 0));
    }

    #[test]
    fn unknown_kind_of_our_group_is_refused() {
        let (_, problems) =
            read_one("apiVersion: penstock.dev/v1alpha1\nkind: LlmBackend\nmetadata: {name: x}\n");
        assert_eq!(problems[0].path, "kind");
    }
}
