//! VirtualKeys → the callers that a gateway knows.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use penstock_core::config::{Callers, CredentialRef, Key};
use penstock_core::ids::Id;
use penstock_core::key::{Hasher, MAX_BYTES, MIN_FOREIGN_BYTES, hexadecimal};
use penstock_core::names::{
    self, SECRET_KEY, SECRET_PREVIOUS, SECRET_PREVIOUS_UNTIL, SECRET_REVISION,
};

use super::scope::Scope;
use super::{Facts, identity};
use crate::key::VirtualKeySpec;
use crate::object::{Kind, ObjectRef, Objects, of_gateway};
use crate::policy::AnonymousSpec;
use crate::problem::{Problem, Reason};

/// Maps are bounded here too: files are not checked against the schema's maxima.
const MAX_ATTRIBUTES: usize = 16;
const MAX_OVERLAP: Duration = Duration::from_hours(720);

/// What is known of a VirtualKey's Secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFacts {
    /// Hashes of the keys in it, and until when each is good, in Unix seconds.
    pub hashes: BTreeMap<String, Option<u64>>,
    /// Why it has none, or not the one that is wanted.
    pub trouble: Option<String>,
}

type Values = BTreeMap<String, Vec<u8>>;

impl KeyFacts {
    /// What `secret`, by the name `name`, holds for a VirtualKey of a gateway with this pepper.
    pub fn of(spec: &VirtualKeySpec, name: &str, secret: &Values, pepper: &[u8]) -> Self {
        let Some(current) = text(secret, SECRET_KEY) else {
            return Self::trouble(format!(
                "Secret {name} has no '{SECRET_KEY}': add one, or delete the Secret and one is made"
            ));
        };
        if !(MIN_FOREIGN_BYTES..=MAX_BYTES).contains(&current.len()) {
            return Self::trouble(format!(
                "the key in Secret {name} has {} bytes: use {MIN_FOREIGN_BYTES} to {MAX_BYTES}",
                current.len()
            ));
        }
        let hasher = Hasher::new(pepper);
        let hash = |text: &str| hexadecimal(&hasher.hash(text.as_bytes()));
        let mut hashes = BTreeMap::from([(hash(current), None)]);
        let previous = text(secret, SECRET_PREVIOUS);
        let until = text(secret, SECRET_PREVIOUS_UNTIL).and_then(|until| until.parse().ok());
        if let Some((previous, until)) = previous.zip(until) {
            hashes.entry(hash(previous)).or_insert(Some(until));
        }
        let is_stuck = Self::revision(secret).is_none() && spec.revision() > 1;
        Self {
            hashes,
            trouble: is_stuck.then(|| {
                format!(
                    "Secret {name} was not made by Penstock: change the key there, and leave rotation out"
                )
            }),
        }
    }

    /// No key can be used, and why.
    pub fn trouble(message: String) -> Self {
        Self {
            trouble: Some(message),
            ..Self::default()
        }
    }

    /// Which key a Secret holds, if the operator made it.
    pub fn revision(secret: &Values) -> Option<i32> {
        text(secret, SECRET_REVISION)?.parse().ok()
    }
}

/// Files often end in a line feed, which is no part of a key.
fn text<'a>(values: &'a Values, name: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(values.get(name)?).ok()?.trim();
    (!text.is_empty()).then_some(text)
}

/// Who may call `gateway`; `None` where no VirtualKey or IdentityProvider names it, no policy of it refuses strangers,
/// and nobody manages keys in its store. A key that cannot be used leaves the others: then nobody has it.
pub(super) fn compile(
    gateway: &Id,
    objects: &Objects,
    facts: &Facts,
    problems: &mut Vec<Problem>,
) -> Option<Callers> {
    let own = of_gateway(&objects.keys, gateway);
    let mut policies = of_gateway(&objects.policies, gateway);
    let mut is_known = policies
        .any(|(_, policy)| policy.spec.anonymous == Some(AnonymousSpec::Refuse))
        || of_gateway(&objects.identities, gateway).next().is_some();
    let (mut keys, mut owners) = (BTreeMap::new(), BTreeMap::<String, &Id>::new());
    for (id, object) in own {
        is_known = true;
        let Some(key) = compile_key(id, &object.spec, objects, facts, problems) else {
            continue;
        };
        for hash in key.hashes.keys() {
            let first = *owners.entry(hash.clone()).or_insert(id);
            if first != id {
                let message = format!(
                    "the key is VirtualKey {first}'s too, which gateways take its callers for: give it one of its own"
                );
                let object = ObjectRef::new(Kind::VirtualKey, id.clone());
                problems.push(Problem::invalid(object, "spec.secretName", message));
            }
        }
        keys.insert(id.clone(), key);
    }
    let version = |secret: &str, key: &str| {
        let secrets = facts.secrets.as_ref()?;
        let values = secrets.get(&Id::new(&gateway.namespace, secret))?;
        values.get(key).cloned()
    };
    let (pepper, admin) = (
        names::gateway_pepper(&gateway.name),
        names::gateway_admin(&gateway.name),
    );
    let managed = version(&admin, names::ADMIN_KEY);
    (is_known || managed.is_some()).then(|| Callers {
        pepper: CredentialRef {
            id: names::credential_id(&pepper, names::PEPPER_KEY),
            version: version(&pepper, names::PEPPER_KEY).unwrap_or_default(),
        },
        keys,
        admin: managed.map(|version| CredentialRef {
            id: names::credential_id(&admin, names::ADMIN_KEY),
            version,
        }),
        identities: identity::compile(gateway, objects, problems),
    })
}

fn compile_key(
    id: &Id,
    spec: &VirtualKeySpec,
    objects: &Objects,
    facts: &Facts,
    problems: &mut Vec<Problem>,
) -> Option<Key> {
    let mut scope = Scope::new(Kind::VirtualKey, id, problems);
    scope.at_most("spec.attributes", spec.attributes.len(), MAX_ATTRIBUTES);
    if spec.team.is_empty() {
        scope.invalid("spec.team", "say whose key it is");
    }
    let models = scope.names_or_any("spec.models", &spec.models);
    let policies = scope.policies("spec.policies", &spec.policies, &spec.gateway, objects);
    let expires_s = spec.expires_at.as_deref().map(expiry);
    if let Some(Err(message)) = &expires_s {
        scope.invalid("spec.expiresAt", message.clone());
    }
    check_rotation(spec, &mut scope);
    let known = facts.keys.as_ref().and_then(|keys| keys.get(id));
    if let Some(trouble) = known.and_then(|known| known.trouble.as_ref()) {
        scope.refuse("spec.secretName", Reason::SecretNotFound, trouble.clone());
    }
    scope.is_usable().then(|| Key {
        team: spec.team.clone(),
        user: spec.user.clone(),
        attributes: spec.attributes.clone(),
        models,
        policies,
        expires_s: expires_s.and_then(Result::ok),
        suspended: spec.suspended,
        hashes: known.map(|known| known.hashes.clone()).unwrap_or_default(),
    })
}

fn check_rotation(spec: &VirtualKeySpec, scope: &mut Scope<'_>) {
    let Some(rotation) = &spec.rotation else {
        return;
    };
    if !(1..=1_000_000).contains(&rotation.revision) {
        let message = format!("{} is out of range: use 1 to 1000000", rotation.revision);
        scope.invalid("spec.rotation.revision", message);
    }
    let wrong = match rotation.overlap.parse() {
        Ok(overlap) if overlap > MAX_OVERLAP => "is out of range: use 0s to 720h".to_owned(),
        Ok(_) => return,
        Err(err) => err.to_string(),
    };
    scope.invalid("spec.rotation.overlap", wrong);
}

/// Unix seconds; what is before 1970 is over.
fn expiry(text: &str) -> Result<u64, String> {
    let time: Timestamp = text
        .parse()
        .map_err(|_| format!("'{text}' is not a time: write one such as 2027-01-01T00:00:00Z"))?;
    Ok(u64::try_from(time.as_second()).unwrap_or(0))
}
