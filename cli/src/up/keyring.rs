//! Keys of VirtualKeys whose Secrets are in no file: what a cluster's operator would make. They are good for as long as
//! the process runs.

use std::collections::BTreeMap;

use penstock_core::ids::Id;
use penstock_core::key::{self, PEPPER_BYTES, RANDOM_BYTES};
use penstock_core::names;
use penstock_crds::manifest::Manifests;

/// What was made so far.
#[derive(Debug)]
pub(super) struct Keyring {
    pepper: String,
    keys: BTreeMap<Id, String>,
}

impl Keyring {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self {
            pepper: key::hexadecimal(&rand::random::<[u8; PEPPER_BYTES]>()),
            keys: BTreeMap::new(),
        }
    }

    /// Adds what is missing, and returns one line for each key that is new.
    pub(super) fn complete(&mut self, manifests: &mut Manifests) -> Vec<String> {
        let mut told = Vec::new();
        let keys = manifests.objects.keys.iter();
        let keys = keys.map(|(id, object)| (id, &object.spec.gateway));
        let policies = manifests.objects.policies.iter();
        let policies = policies.map(|(id, object)| (id, &object.spec.gateway));
        // Of a gateway that has its keys in its store, nothing else may name one.
        for (id, gateway) in keys.chain(policies) {
            let pepper = Id::new(&id.namespace, names::gateway_pepper(gateway));
            let pepper = manifests.secrets.entry(pepper);
            pepper.or_insert_with(|| {
                let value = self.pepper.as_bytes().to_vec();
                BTreeMap::from([(names::PEPPER_KEY.to_owned(), value)])
            });
        }
        for (id, object) in &manifests.objects.keys {
            let name = object.spec.secret(&id.name);
            if manifests
                .secrets
                .contains_key(&Id::new(&id.namespace, &name))
            {
                continue;
            }
            let made = self.keys.entry(id.clone()).or_insert_with(|| {
                let key = key::text(rand::random::<[u8; RANDOM_BYTES]>());
                told.push(format!("key of VirtualKey {id}: {key}"));
                key
            });
            let made = made.clone();
            let values = [
                (names::SECRET_KEY, made.as_str()),
                (names::SECRET_REVISION, "1"),
            ];
            let values = values.map(|(key, value)| (key.to_owned(), value.as_bytes().to_vec()));
            let secret = Id::new(&id.namespace, name);
            manifests.secrets.insert(secret, BTreeMap::from(values));
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use penstock_crds::manifest::{self, File};

    use super::*;

    fn manifests(secret: &str) -> Manifests {
        let text = format!(
            "apiVersion: penstock.dev/v1alpha1\nkind: VirtualKey\nmetadata: {{name: alice}}\nspec: {{team: a}}\n{secret}"
        );
        let file = File {
            path: "a.yaml".to_owned(),
            text,
        };
        let (manifests, problems) = manifest::read(&[file]);
        assert_eq!(problems, []);
        manifests
    }

    fn key_of(manifests: &Manifests) -> String {
        let secret = &manifests.secrets[&Id::new("default", "alice-key")];
        String::from_utf8(secret["key"].clone()).unwrap()
    }

    #[test]
    fn a_key_is_made_once_and_told_once() {
        let mut keyring = Keyring::new();
        let (mut first, mut second) = (manifests(""), manifests(""));
        let told = keyring.complete(&mut first);
        let key = key_of(&first);
        assert_eq!(told, [format!("key of VirtualKey default/alice: {key}")]);
        assert!(key.starts_with(key::PREFIX));
        assert_eq!(keyring.complete(&mut second), Vec::<String>::new());
        assert_eq!(key_of(&second), key);
        assert!(
            first
                .secrets
                .contains_key(&Id::new("default", "default-pepper"))
        );
    }

    #[test]
    fn a_key_in_a_file_is_used_as_it_is() {
        let secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: alice-key}\nstringData: {key: my-own-key-of-alice}\n";
        let mut manifests = manifests(secret);
        assert_eq!(
            Keyring::new().complete(&mut manifests),
            Vec::<String>::new()
        );
        assert_eq!(key_of(&manifests), "my-own-key-of-alice");
    }
}
