//! From EndpointSlices to [`Endpoints`]. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{EndpointPort, EndpointSlice};
use penstock_core::config::{GatewayConfig, Target};
use penstock_core::endpoints::{Endpoint, Endpoints, ServicePort};
use penstock_core::ids::Id;

/// The label that says whose slice it is.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// The endpoints of every Service that `configs` name, from all `slices` there are. A Service without any slice has
/// none.
pub fn endpoints<'a>(
    configs: impl IntoIterator<Item = &'a GatewayConfig>,
    slices: &BTreeMap<String, EndpointSlice>,
) -> Endpoints {
    let mut by_service: BTreeMap<Id, Vec<&EndpointSlice>> = BTreeMap::new();
    for slice in slices.values() {
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        let service = slice
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(SERVICE_LABEL));
        if let Some(service) = service {
            by_service
                .entry(Id::new(namespace, service))
                .or_default()
                .push(slice);
        }
    }
    let mut services: BTreeMap<ServicePort, Vec<Endpoint>> = BTreeMap::new();
    for backend in configs
        .into_iter()
        .flat_map(|config| config.backends.values())
    {
        if let Target::Endpoints {
            service_port,
            port_name,
            ..
        } = &backend.target
        {
            services.entry(service_port.clone()).or_insert_with(|| {
                by_service
                    .get(&service_port.service)
                    .map(|slices| of_service(slices, port_name.as_deref()))
                    .unwrap_or_default()
            });
        }
    }
    Endpoints { services }
}

fn of_service(slices: &[&EndpointSlice], port_name: Option<&str>) -> Vec<Endpoint> {
    // A dual-stack Service lists each pod twice; one address is enough, and it must be the same family each time.
    let family = ["IPv4", "IPv6"]
        .into_iter()
        .find(|family| slices.iter().any(|slice| slice.address_type == *family));
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices
        .iter()
        .filter(|slice| Some(slice.address_type.as_str()) == family)
    {
        let Some(port) = port_of(slice.ports.as_deref().unwrap_or_default(), port_name) else {
            continue;
        };
        for endpoint in &slice.endpoints {
            let conditions = endpoint.conditions.as_ref();
            let is_ready = conditions
                .and_then(|conditions| conditions.ready)
                .unwrap_or(true)
                && !conditions
                    .and_then(|conditions| conditions.terminating)
                    .unwrap_or(false);
            // Only the first address may be used (EndpointSlice API).
            let address = endpoint
                .addresses
                .first()
                .and_then(|address| address.parse::<IpAddr>().ok());
            if let Some(address) = address {
                let address = SocketAddr::new(address, port);
                // While a pod moves between slices it is in two; it is ready if one of them says so.
                let before = found.get(&address).is_some_and(|before| before.ready);
                let found_here = Endpoint {
                    address,
                    ready: is_ready || before,
                    zone: endpoint.zone.clone(),
                    revision: endpoint.target_ref.as_ref().and_then(revision),
                };
                found.insert(address, found_here);
            }
        }
    }
    found.into_values().collect()
}

/// Letters and digits of which Kubernetes makes names and hashes (`k8s.io/apimachinery/pkg/util/rand`).
const SAFE: &str = "bcdfghjklmnpqrstvwxz2456789";
/// Of the part that is different for each pod.
const SUFFIX_BYTES: usize = 5;
const MAX_HASH_BYTES: usize = 10;
/// Longer names are cut off before their suffix, perhaps in their hash.
const MAX_NAME_BYTES: usize = 63;

/// The template of a pod. A Deployment's pods are named `<deployment>-<hash of the template>-<suffix>`; other names
/// say nothing of a template, so each is one of its own.
fn revision(target: &ObjectReference) -> Option<String> {
    let name = target.name.as_deref()?;
    if target.kind.as_deref() != Some("Pod") {
        return None;
    }
    let is_safe = |part: &str| part.chars().all(|letter| SAFE.contains(letter));
    let template = name.rsplit_once('-').and_then(|(template, suffix)| {
        let (_, hash) = template.rsplit_once('-')?;
        let is_hash = (1..=MAX_HASH_BYTES).contains(&hash.len()) && is_safe(hash);
        let is_suffix = suffix.len() == SUFFIX_BYTES && is_safe(suffix);
        (is_hash && is_suffix && name.len() < MAX_NAME_BYTES).then_some(template)
    });
    Some(template.unwrap_or(name).to_owned())
}

/// The port of that name; without a name the only port, or the unnamed one.
fn port_of(ports: &[EndpointPort], name: Option<&str>) -> Option<u16> {
    let name_of = |port: &EndpointPort| port.name.clone().unwrap_or_default();
    let port = match (name, ports) {
        (None, [only]) => Some(only),
        (name, ports) => ports
            .iter()
            .find(|port| name_of(port) == name.unwrap_or_default()),
    }?;
    u16::try_from(port.port?).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::snapshot::tests::{config, rule};

    fn slice(name: &str, service: &str, rest: serde_json::Value) -> (String, EndpointSlice) {
        let mut value = json!({
            "metadata": {"name": name, "namespace": "ns", "labels": {SERVICE_LABEL: service}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8000}],
            "endpoints": [],
        });
        for (key, part) in rest.as_object().unwrap() {
            value[key] = part.clone();
        }
        (name.to_owned(), serde_json::from_value(value).unwrap())
    }

    fn text(slices: Vec<(String, EndpointSlice)>) -> String {
        let config = config(&["a"], vec![rule("r", &[], &[("a", 1, 0)])]);
        serde_json::to_string(&endpoints([&config], &slices.into_iter().collect())).unwrap()
    }

    #[test]
    fn ready_and_leaving_pods_are_told_apart() {
        let found = text(vec![
            slice(
                "a-1",
                "a",
                json!({"endpoints": [
                    {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
                    {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
                    {"addresses": ["10.0.0.3"], "conditions": {"ready": true, "terminating": true}},
                    {"addresses": ["10.0.0.4"], "zone": "eu-1a"},
                ]}),
            ),
            slice(
                "b-1",
                "b",
                json!({"endpoints": [{"addresses": ["10.0.0.9"]}]}),
            ),
        ]);
        assert_eq!(
            found,
            r#"{"ns/a:8000":[{"address":"10.0.0.1:8000","ready":true},{"address":"10.0.0.2:8000","ready":false},{"address":"10.0.0.3:8000","ready":false},{"address":"10.0.0.4:8000","ready":true,"zone":"eu-1a"}]}"#
        );
    }

    #[test]
    fn slices_of_one_family_are_joined() {
        let found = text(vec![
            slice(
                "a-1",
                "a",
                json!({"endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": false}}]}),
            ),
            slice(
                "a-2",
                "a",
                json!({"endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}]}),
            ),
            slice(
                "a-3",
                "a",
                json!({"addressType": "IPv6", "endpoints": [{"addresses": ["fd00::1"]}]}),
            ),
        ]);
        assert_eq!(
            found,
            r#"{"ns/a:8000":[{"address":"10.0.0.1:8000","ready":true},{"address":"10.0.0.2:8000","ready":true}]}"#
        );
    }

    #[test]
    fn pods_of_one_template_are_told_from_others() {
        let of = |kind: &str, name: &str| {
            let (kind, name) = (Some(kind.to_owned()), Some(name.to_owned()));
            revision(&ObjectReference {
                kind,
                name,
                ..ObjectReference::default()
            })
        };
        assert_eq!(
            of("Pod", "chat-pool-6d4cf56db6-x2k9p").as_deref(),
            Some("chat-pool-6d4cf56db6")
        );
        let long = format!("{}-6d4cf56db-x2k9p", "x".repeat(47));
        assert_eq!(long.len(), MAX_NAME_BYTES);
        for own in ["chat-0", "chat-pool-1", "chat-x2k9p", "chat", &long] {
            assert_eq!(of("Pod", own).as_deref(), Some(own));
        }
        assert_eq!(of("Node", "chat-pool-6d4cf56db6-x2k9p"), None);
        let found = text(vec![slice(
            "a-1",
            "a",
            json!({"endpoints": [
                {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "a-54b-zzzzz"}},
                {"addresses": ["10.0.0.2"]},
            ]}),
        )]);
        assert_eq!(
            found,
            r#"{"ns/a:8000":[{"address":"10.0.0.1:8000","ready":true,"revision":"a-54b"},{"address":"10.0.0.2:8000","ready":true}]}"#
        );
    }

    #[test]
    fn a_service_without_slices_has_no_endpoints() {
        assert_eq!(text(Vec::new()), r#"{"ns/a:8000":[]}"#);
    }

    #[test]
    fn ports_are_found_by_name_or_alone() {
        let port = |name: &str, port: i32| EndpointPort {
            name: Some(name.to_owned()),
            port: Some(port),
            ..EndpointPort::default()
        };
        let two = [port("http", 1), port("metrics", 2)];
        assert_eq!(port_of(&two, Some("metrics")), Some(2));
        assert_eq!(port_of(&two, Some("grpc")), None);
        assert_eq!(port_of(&two, None), None);
        assert_eq!(port_of(&two[..1], None), Some(1));
        assert_eq!(port_of(&[port("", 3), port("x", 4)], None), Some(3));
    }
}
