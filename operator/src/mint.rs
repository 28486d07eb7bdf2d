//! (IO) Makes keys, each once: a Secret is created only where there is none, and changed only as it was read. So an
//! operator that was paused and goes on makes no second key, whatever another one did meanwhile.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use penstock_core::ids::Id;
use penstock_core::key::{self, PEPPER_BYTES, RANDOM_BYTES};
use penstock_core::names::{
    self, PEPPER_KEY, SECRET_KEY, SECRET_PREVIOUS, SECRET_PREVIOUS_UNTIL, SECRET_REVISION,
};
use penstock_crds::compile::KeyFacts;
use serde_json::{Value, json};

use crate::apply::{CallError, WriteError, Writer, within_deadline};
use crate::keys::{self, Wanted};
use crate::observed::Observed;
use crate::replicas::OPERATOR;
use crate::status;
use crate::world::lock;

/// What the Secrets are called in logs and errors.
const SECRET: &str = "Secret";

/// What became of the keys that were missing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Minted {
    /// There are new ones: look again.
    pub(crate) any: bool,
    /// Some could not be made: try again.
    pub(crate) failed: bool,
}

impl Writer {
    /// Makes what is missing. A key that cannot be made keeps no other from being made.
    pub(crate) async fn mint(&self, observed: &Observed) -> Result<Minted, WriteError> {
        let mut minted = Minted::default();
        for wanted in &keys::wanted(observed) {
            if !self.leadership.may_write() {
                return Err(WriteError::NotLeader);
            }
            let (name, made) = self.mint_one(&observed.namespace, wanted).await;
            let id = Id::new(&observed.namespace, &name);
            // Whoever made it, it is read anew.
            lock(&self.world.secrets).forget(&id);
            match made {
                Ok(()) => {
                    tracing::info!(secret = %id, "made a key");
                    minted.any = true;
                }
                // Somebody was quicker: then it is there.
                Err(err) if err.status().is_some_and(|status| status.code == 409) => {
                    minted.any = true;
                }
                Err(err) => {
                    tracing::warn!(secret = %id, error = %err, "key not made");
                    minted.failed = true;
                }
            }
        }
        Ok(minted)
    }

    async fn mint_one(&self, namespace: &str, wanted: &Wanted) -> (String, Result<(), CallError>) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), namespace);
        self.metrics.wrote(SECRET, "mint");
        match wanted {
            // Nobody owns it: without it no key in a store is worth anything.
            Wanted::Pepper { gateway } => {
                let name = names::gateway_pepper(gateway);
                let pepper = key::hexadecimal(&rand::random::<[u8; PEPPER_BYTES]>());
                let body = secret(&name, &[], [(PEPPER_KEY, pepper)]);
                (name, create(&secrets, body).await)
            }
            Wanted::Key {
                owner,
                uid,
                secret: name,
                revision,
            } => {
                let owner = json!({
                    "apiVersion": "penstock.dev/v1alpha1", "kind": "VirtualKey", "name": owner, "uid": uid,
                });
                let values = [
                    (SECRET_KEY, new_key()),
                    (SECRET_REVISION, revision.to_string()),
                ];
                let body = secret(name, &[owner], values);
                (name.clone(), create(&secrets, body).await)
            }
            Wanted::Next {
                uid,
                secret: name,
                revision,
                overlap,
            } => {
                let until_s = status::now()
                    .0
                    .as_second()
                    .saturating_add_unsigned(overlap.as_secs());
                let made = next(&secrets, (name, uid), *revision, until_s).await;
                (name.clone(), made)
            }
        }
    }
}

fn new_key() -> String {
    key::text(rand::random::<[u8; RANDOM_BYTES]>())
}

fn secret<const N: usize>(name: &str, owners: &[Value], values: [(&str, String); N]) -> Value {
    let data: BTreeMap<&str, ByteString> = values
        .into_iter()
        .map(|(key, value)| (key, ByteString(value.into_bytes())))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": SECRET,
        "metadata": {
            "name": name,
            "labels": { "app.kubernetes.io/name": "penstock", "app.kubernetes.io/component": "key" },
            "ownerReferences": owners,
        },
        "data": data,
        "type": "Opaque",
    })
}

async fn create(secrets: &Api<Secret>, body: Value) -> Result<(), CallError> {
    let body: Secret =
        serde_json::from_value(body).map_err(|err| CallError::Api(kube::Error::SerdeError(err)))?;
    let parameters = PostParams {
        field_manager: Some(OPERATOR.to_owned()),
        ..PostParams::default()
    };
    within_deadline(secrets.create(&parameters, &body)).await?;
    Ok(())
}

/// Puts a new key in the place of the one that is there, unless that is another VirtualKey's than the one with `uid`.
async fn next(
    secrets: &Api<Secret>,
    (name, uid): (&str, &str),
    revision: i32,
    until_s: i64,
) -> Result<(), CallError> {
    let before = within_deadline(secrets.get(name)).await?;
    let owners = before.metadata.owner_references.as_deref().unwrap_or(&[]);
    if !owners.is_empty() && owners.iter().all(|owner| owner.uid != uid) {
        tracing::warn!(
            secret = name,
            "a VirtualKey wants to rotate the key of another one: give it a Secret of its own (secretName)"
        );
        return Ok(());
    }
    let data = before.data.unwrap_or_default();
    let values = data
        .iter()
        .map(|(key, value)| (key.clone(), value.0.clone()));
    if KeyFacts::revision(&values.collect()).is_none_or(|made| made >= revision) {
        return Ok(());
    }
    let Some(previous) = data.get(SECRET_KEY).cloned() else {
        return Ok(());
    };
    let text = |value: String| ByteString(value.into_bytes());
    // The API server refuses it if the Secret is not the one that was read.
    let body = json!({
        "metadata": { "resourceVersion": before.metadata.resource_version },
        "data": {
            SECRET_KEY: text(new_key()),
            SECRET_REVISION: text(revision.to_string()),
            SECRET_PREVIOUS: previous,
            SECRET_PREVIOUS_UNTIL: text(until_s.to_string()),
        },
    });
    let parameters = PatchParams {
        field_manager: Some(OPERATOR.to_owned()),
        ..PatchParams::default()
    };
    within_deadline(secrets.patch(name, &parameters, &Patch::Merge(body))).await?;
    Ok(())
}
