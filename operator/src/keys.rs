//! Keys of VirtualKeys: which are to be made, and what those that there are stand for. Pure; `mint` makes them.
//!
//! A key is in a Secret of its own, with the number of its rotation; of the one before it the Secret holds the text and
//! until when it may be used. A Secret without a number was made by somebody else: its key is used as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use penstock_core::ids::Id;
use penstock_core::names::{self, PEPPER_KEY};
use penstock_crds::VirtualKey;
use penstock_crds::compile::KeyFacts;

use crate::observed::Observed;

/// A Secret that is missing, or holds an older key than is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// What a gateway hashes keys with.
    Pepper {
        /// The gateway.
        gateway: String,
    },
    /// The first key.
    Key {
        /// The VirtualKey's name.
        owner: String,
        /// Its uid.
        uid: String,
        /// The Secret's name.
        secret: String,
        /// Which of its keys.
        revision: i32,
    },
    /// A key after another one.
    Next {
        /// Uid of the VirtualKey.
        uid: String,
        /// The Secret's name.
        secret: String,
        /// Which of its keys.
        revision: i32,
        /// How long the one before it may still be used.
        overlap: Duration,
    },
}

/// Every Secret that gateways of a namespace know callers by.
pub(crate) fn secrets(observed: &Observed) -> impl Iterator<Item = Id> {
    let keys = observed.objects.keys.iter();
    let own = keys.map(|(id, object)| Id::new(&id.namespace, object.spec.secret(&id.name)));
    let shared = gateways(observed).into_iter().flat_map(|gateway| {
        let names = [
            names::gateway_pepper(gateway),
            names::gateway_admin(gateway),
        ];
        names.map(|name| Id::new(&observed.namespace, name))
    });
    own.chain(shared)
}

/// The gateways that objects name.
fn gateways(observed: &Observed) -> BTreeSet<&str> {
    let objects = &observed.objects;
    let keys = objects.keys.values().map(|key| &key.spec.gateway);
    let policies = objects.policies.values().map(|policy| &policy.spec.gateway);
    keys.chain(policies).map(String::as_str).collect()
}

/// Those of which somebody knows a key, or may.
fn with_keys(observed: &Observed) -> BTreeSet<&str> {
    let keys = observed.objects.keys.values();
    let named = keys.map(|key| key.spec.gateway.as_str());
    let managed = gateways(observed).into_iter().filter(|gateway| {
        let secret = Id::new(&observed.namespace, names::gateway_admin(gateway));
        observed.secrets.contains_key(&secret)
    });
    named.chain(managed).collect()
}

/// What is to be made, in this order.
pub(crate) fn wanted(observed: &Observed) -> Vec<Wanted> {
    let secret = |name: &str| observed.secrets.get(&Id::new(&observed.namespace, name));
    let mut wanted: Vec<Wanted> = with_keys(observed)
        .into_iter()
        .filter(|gateway| secret(&names::gateway_pepper(gateway)).is_none())
        .map(|gateway| Wanted::Pepper {
            gateway: gateway.to_owned(),
        })
        .collect();
    for (id, object) in &observed.objects.keys {
        let spec = &object.spec;
        let name = spec.secret(&id.name);
        let revision = spec.revision();
        match secret(&name) {
            None => wanted.push(Wanted::Key {
                owner: id.name.clone(),
                uid: object.metadata.uid.clone().unwrap_or_default(),
                secret: name,
                revision,
            }),
            Some(values) => {
                let rotation = spec.rotation.as_ref();
                // With an overlap that cannot be read, which `compile` says, the key before would end at once.
                let overlap = rotation.and_then(|rotation| rotation.overlap.parse().ok());
                let is_older = KeyFacts::revision(values).is_some_and(|made| made < revision);
                let uid = object.metadata.uid.clone().unwrap_or_default();
                wanted.extend(overlap.filter(|_| is_older).map(|overlap| Wanted::Next {
                    uid,
                    secret: name,
                    revision,
                    overlap,
                }));
            }
        }
    }
    wanted
}

/// What the Secrets of VirtualKeys hold.
pub(crate) fn facts(observed: &Observed) -> BTreeMap<Id, KeyFacts> {
    let keys = observed.objects.keys.iter();
    keys.map(|(id, object)| (id.clone(), facts_of(id, object, observed)))
        .collect()
}

fn facts_of(id: &Id, object: &VirtualKey, observed: &Observed) -> KeyFacts {
    let secret = |name: &str| observed.secrets.get(&Id::new(&id.namespace, name));
    let pepper = names::gateway_pepper(&object.spec.gateway);
    let name = object.spec.secret(&id.name);
    match (
        secret(&pepper).and_then(|values| values.get(PEPPER_KEY)),
        secret(&name),
    ) {
        (Some(pepper), Some(values)) => KeyFacts::of(&object.spec, &name, values, pepper),
        (Some(_), None) => KeyFacts::trouble(format!("Secret {name} is not made yet")),
        (None, _) => KeyFacts::trouble(format!(
            "Secret {pepper} has no '{PEPPER_KEY}': delete it, and a new one is made"
        )),
    }
}

/// When a key ends.
pub(crate) fn end(key: &VirtualKey) -> Option<Timestamp> {
    key.spec.expires_at.as_deref()?.parse().ok()
}

/// How long it is until the next one of all keys ends: its status says something else then.
pub(crate) fn until_next_end(observed: &Observed, now: Timestamp) -> Option<Duration> {
    let ends = observed.objects.keys.values().filter_map(end);
    let next = ends.filter(|end| *end > now).min()?;
    Duration::try_from(next.duration_since(now)).ok()
}

#[cfg(test)]
mod tests {
    use penstock_core::key::{self, Hasher};
    use serde_json::json;

    use super::*;
    use crate::values::Values;

    fn observed(spec: serde_json::Value, secret: &[(&str, &str)]) -> Observed {
        let mut observed = Observed {
            namespace: "ns".to_owned(),
            ..Observed::default()
        };
        let mut key: VirtualKey = serde_json::from_value(json!({
            "apiVersion": "penstock.dev/v1alpha1", "kind": "VirtualKey", "metadata": {"name": "alice", "uid": "u"},
            "spec": spec,
        }))
        .unwrap();
        key.metadata.namespace = Some("ns".to_owned());
        observed.objects.keys.insert(Id::new("ns", "alice"), key);
        let values = |pairs: &[(&str, &str)]| -> Values {
            let pairs = pairs.iter();
            pairs
                .map(|(key, value)| ((*key).to_owned(), value.as_bytes().to_vec()))
                .collect()
        };
        if !secret.is_empty() {
            let name = Id::new("ns", "alice-key");
            observed.secrets.insert(name, values(secret));
            let pepper = Id::new("ns", "default-pepper");
            observed.secrets.insert(pepper, values(&[("pepper", "p")]));
        }
        observed
    }

    fn hash(key: &str) -> String {
        key::hexadecimal(&Hasher::new(b"p").hash(key.as_bytes()))
    }

    const FIRST: &str = "sk-penstock-first-of-alice";

    #[test]
    fn a_gateway_whose_keys_are_in_its_store_has_a_pepper() {
        let mut observed = Observed {
            namespace: "ns".to_owned(),
            ..Observed::default()
        };
        let policy = serde_json::from_value(json!({
            "apiVersion": "penstock.dev/v1alpha1", "kind": "RoutingPolicy", "metadata": {"name": "p"},
            "spec": {"gateway": "chat", "rules": []},
        }));
        let policies = &mut observed.objects.policies;
        policies.insert(Id::new("ns", "p"), policy.unwrap());
        let asked: Vec<String> = secrets(&observed).map(|id| id.name).collect();
        assert_eq!(asked, ["chat-pepper", "chat-admin"]);
        assert_eq!(wanted(&observed), []);
        let admin = BTreeMap::from([("token".to_owned(), b"t".to_vec())]);
        observed.secrets.insert(Id::new("ns", "chat-admin"), admin);
        let pepper = Wanted::Pepper {
            gateway: "chat".to_owned(),
        };
        assert_eq!(wanted(&observed), [pepper]);
    }

    #[test]
    fn what_is_missing_is_made_once_and_what_is_there_stays() {
        let nothing = wanted(&observed(json!({"team": "a"}), &[]));
        let key = Wanted::Key {
            owner: "alice".to_owned(),
            uid: "u".to_owned(),
            secret: "alice-key".to_owned(),
            revision: 1,
        };
        let pepper = Wanted::Pepper {
            gateway: "default".to_owned(),
        };
        assert_eq!(nothing, [pepper, key]);
        let made = observed(json!({"team": "a"}), &[("key", FIRST), ("revision", "1")]);
        assert_eq!(wanted(&made), []);
        assert_eq!(
            facts(&made)[&Id::new("ns", "alice")].hashes,
            BTreeMap::from([(hash(FIRST), None)])
        );
    }

    #[test]
    fn a_greater_revision_makes_the_next_key_and_a_key_of_somebody_else_stays() {
        let rotated = json!({"team": "a", "rotation": {"revision": 3, "overlap": "2h"}});
        let before = observed(rotated.clone(), &[("key", FIRST), ("revision", "2")]);
        let next = Wanted::Next {
            uid: "u".to_owned(),
            secret: "alice-key".to_owned(),
            revision: 3,
            overlap: Duration::from_hours(2),
        };
        assert_eq!(wanted(&before), [next]);
        let after = observed(rotated.clone(), &[("key", FIRST), ("revision", "3")]);
        assert_eq!(wanted(&after), []);
        let foreign = observed(rotated, &[("key", FIRST)]);
        assert_eq!(wanted(&foreign), []);
        let unreadable = json!({"team": "a", "rotation": {"revision": 3, "overlap": "soon"}});
        let before = observed(unreadable, &[("key", FIRST), ("revision", "2")]);
        assert_eq!(wanted(&before), [], "no key ends by a slip");
    }

    #[test]
    fn a_pass_comes_when_the_next_key_ends() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let spec = json!({"team": "a", "expiresAt": "1970-01-01T00:01:00Z"});
        let observed = observed(spec, &[]);
        let minute = Some(Duration::from_secs(50));
        assert_eq!(until_next_end(&observed, at(10)), minute);
        assert_eq!(until_next_end(&observed, at(60)), None);
    }
}
