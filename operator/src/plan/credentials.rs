//! The Secret with the credentials, certificates and authorities that a gateway's config refers to, and what it hashes
//! keys with: those values, and no others.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use penstock_core::config::{CredentialRef, GatewayConfig};
use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::tls::{SourceKind, ValueRef};
use serde_json::{Map, json};

use super::{Child, Draft};
use crate::observed::Observed;

/// Values by their ids.
pub(super) fn plan(draft: Draft<'_>, observed: &Observed, config: &GatewayConfig) -> Child {
    let value = |id: &Id, value: ValueRef<'_>| {
        let objects = match value.kind {
            SourceKind::ConfigMap => &observed.config_maps,
            SourceKind::Secret => &observed.secrets,
        };
        let keys = objects.get(&Id::new(&id.namespace, value.name))?;
        Some((value.id(), ByteString(keys.get(value.key)?.clone())))
    };
    let of_callers = |reference: &CredentialRef, secret: String, key: &str| {
        let secret = Id::new(&config.gateway.namespace, secret);
        let value = observed.secrets.get(&secret)?.get(key)?;
        Some((reference.id.clone(), ByteString(value.clone())))
    };
    let gateway = &config.gateway.name;
    let callers = config.callers.as_ref();
    let pepper = callers.and_then(|callers| {
        let secret = names::gateway_pepper(gateway);
        of_callers(&callers.pepper, secret, names::PEPPER_KEY)
    });
    let admin = callers.and_then(|callers| {
        let secret = names::gateway_admin(gateway);
        of_callers(callers.admin.as_ref()?, secret, names::ADMIN_KEY)
    });
    let data: BTreeMap<String, ByteString> = config
        .backends
        .keys()
        .filter_map(|id| Some((id, observed.objects.backends.get(id)?)))
        .flat_map(|(id, backend)| {
            let values = backend.spec.values();
            values.filter_map(move |reference| value(id, reference))
        })
        .chain(pepper)
        .chain(admin)
        .collect();
    draft.finish(Map::new(), json!({ "data": data, "type": "Opaque" }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::ChildKind;
    use crate::plan::plan;
    use crate::plan::tests::{observed, settings};

    fn values(pairs: [(&str, &str); 3]) -> BTreeMap<String, Vec<u8>> {
        let pairs = pairs.into_iter();
        let pairs = pairs.map(|(key, value)| (key.to_owned(), value.as_bytes().to_vec()));
        pairs.collect()
    }

    #[test]
    fn certificates_and_authorities_go_along_and_what_nothing_refers_to_stays() {
        let mut observed = observed();
        let delivery = Id::new(&observed.namespace, "delivery");
        let courier = Id::new(&observed.namespace, "courier");
        let delivery = observed.objects.backends.get_mut(&delivery).unwrap();
        let external = delivery.spec.external.as_mut().unwrap();
        external.credential = None;
        let tls = json!({
            "caCertificateRefs": [{"name": "courier"}], "clientCertificateRef": {"name": "courier"},
        });
        external.tls = Some(serde_json::from_value(tls).unwrap());
        let secret = values([("tls.crt", "c"), ("tls.key", "k"), ("token", "tip")]);
        observed.secrets.insert(courier.clone(), secret);
        let map = values([("ca.crt", "a"), ("tls.crt", "no"), ("other", "no")]);
        observed.config_maps.insert(courier, map);
        let plan = plan(&observed, &settings());
        let mut secrets = plan.children.iter();
        let secret = secrets.find(|child| child.kind == ChildKind::Secret);
        assert_eq!(
            secret.unwrap().object["data"],
            json!({"_courier_ca.crt": "YQ==", "courier_tls.crt": "Yw==", "courier_tls.key": "aw=="})
        );
    }
}
