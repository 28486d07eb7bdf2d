//! The Secret with the credentials that a gateway's config refers to: those keys, and no others.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use penstock_core::config::GatewayConfig;
use penstock_crds::backend::SecretKey;
use penstock_crds::{LLMBackend, LLMBackendSpec};
use serde_json::{Map, json};

use super::{Child, Draft};
use crate::observed::Observed;
use penstock_core::ids::Id;

/// The Secret key that a backend sends, if any.
pub(crate) fn reference(spec: &LLMBackendSpec) -> Option<&SecretKey> {
    let service = spec
        .service
        .as_ref()
        .and_then(|service| service.credential.as_ref());
    service.or_else(|| spec.external.as_ref()?.credential.as_ref())
}

/// Values by credential id.
pub(super) fn plan(draft: Draft<'_>, observed: &Observed, config: &GatewayConfig) -> Child {
    let value = |id: &Id, backend: &LLMBackend| {
        let key = reference(&backend.spec)?;
        observed
            .secrets
            .get(&Id::new(&id.namespace, &key.secret))?
            .get(&key.key)
    };
    let data: BTreeMap<&str, ByteString> = config
        .backends
        .iter()
        .filter_map(|(id, backend)| {
            let credential = backend.credential.as_ref()?;
            let value = value(id, observed.objects.backends.get(id)?)?;
            Some((credential.id.as_str(), ByteString(value.clone())))
        })
        .collect();
    draft.finish(Map::new(), json!({ "data": data, "type": "Opaque" }))
}
