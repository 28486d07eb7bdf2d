//! A gateway: a Deployment, a Service, a PodDisruptionBudget, what it may do, what it reads and where it answers.
//! All policies that name it own its children together; the last one's deletion lets them go.

use std::collections::BTreeMap;

use penstock_core::config::{FORMAT, GatewayConfig};
use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::{Kind, ObjectRef};
use serde_json::{Map, Value, json};

use super::{
    Child, DEFAULT_DRAIN_S, Draft, EXIT_S, GatewayPlan, PRE_STOP_S, Plan, access, config_map,
    container_security, credentials, hashes, labels, pdb, pod_security, selector, service,
    template,
};
use crate::args::PlanSettings;
use crate::live::ChildKind;
use crate::observed::Observed;
use crate::pod::Owner;

/// Port of a gateway's Service.
const SERVICE_PORT: u16 = 80;
/// Where a gateway keeps its last good config and last seen endpoints.
const STATE_PATH: &str = "/var/lib/penstock/state";
/// Where it keeps credentials: in memory only.
const SECRETS_PATH: &str = "/var/lib/penstock/secrets";
/// Where the password of its store is, if it has one.
const STORE_PATH: &str = "/var/run/penstock/store";
/// Memory of a gateway without its caches: request bodies (512 MiB at most by default), connections, config.
const BASE_MEMORY_MIB: u64 = 1024;

/// Adds the gateway's children to `plan`.
pub(super) fn plan(
    observed: &Observed,
    settings: &PlanSettings,
    id: &Id,
    config: &GatewayConfig,
    plan: &mut Plan,
) {
    let gateway = &id.name;
    let owner = Owner::Gateway(gateway.clone());
    let references = owner_references(observed, gateway);
    let draft = |kind, name: String| Draft {
        kind,
        name,
        namespace: &observed.namespace,
        owner: &owner,
        owner_references: &references,
    };
    let main = || names::gateway_object(gateway);
    // Neither can fail: configs hold strings and integers. If one does, the previous config stays.
    let digest = config.digest().unwrap_or_default();
    let packed = config_map::pack(config).unwrap_or_default();
    let size = packed.len();
    let too_large = (size > config_map::MAX_CONFIG_BYTES || size == 0).then_some(size);
    let name = names::gateway_config_map(gateway, FORMAT);
    if too_large.is_some() {
        plan.too_large.extend(newest(observed, &name, config));
    } else {
        plan.children.push(config_map::config(
            draft(ChildKind::ConfigMap, name),
            packed,
            &digest,
        ));
    }
    let (deployment, template) = deployment(
        draft(ChildKind::Deployment, main()),
        settings,
        gateway,
        config,
    );
    plan.children.extend([
        access::service_account(draft(ChildKind::ServiceAccount, main())),
        access::role(draft(ChildKind::Role, main()), gateway),
        access::role_binding(draft(ChildKind::RoleBinding, main()), gateway),
        config_map::acks(draft(ChildKind::ConfigMap, names::gateway_acks(gateway))),
        credentials::plan(
            draft(ChildKind::Secret, names::gateway_credentials(gateway)),
            observed,
            config,
        ),
        service::plan(draft(ChildKind::Service, main()), SERVICE_PORT),
        pdb::plan(draft(ChildKind::PodDisruptionBudget, main())),
        deployment,
    ]);
    let planned = GatewayPlan {
        digest,
        objects: hashes(config),
        too_large,
        template,
    };
    plan.gateways.insert(gateway.clone(), planned);
}

/// A reference to each policy that names the gateway, in order of name. None is the controller: none alone decides.
fn owner_references(observed: &Observed, gateway: &str) -> Vec<Value> {
    let policies = observed
        .objects
        .policies
        .iter()
        .filter(|(_, policy)| policy.spec.gateway == gateway);
    policies
        .map(|(id, policy)| {
            json!({
                "apiVersion": "penstock.dev/v1alpha1", "kind": "RoutingPolicy", "name": id.name,
                "uid": policy.metadata.uid.as_deref().unwrap_or_default(),
            })
        })
        .collect()
}

/// Objects of `config` that the published one does not have in this state: those that made it too large.
fn newest(observed: &Observed, config_map: &str, config: &GatewayConfig) -> Vec<ObjectRef> {
    let live = observed.child(ChildKind::ConfigMap, config_map);
    let published = live.and_then(|live| config_map::unpack(live).ok());
    let published: BTreeMap<String, String> = published.as_ref().map(hashes).unwrap_or_default();
    config
        .objects
        .iter()
        .filter(|(key, version)| published.get(*key) != Some(&version.hash))
        .filter_map(|(key, _)| parse(key))
        .collect()
}

fn parse(key: &str) -> Option<ObjectRef> {
    let (kind, id) = key.split_once('/')?;
    let kind = Kind::ALL.into_iter().find(|k| k.name() == kind)?;
    Some(ObjectRef::new(kind, id.parse().ok()?))
}

fn deployment(
    draft: Draft<'_>,
    settings: &PlanSettings,
    gateway: &str,
    config: &GatewayConfig,
) -> (Child, String) {
    let selector = selector(draft.owner);
    let mut volumes = vec![
        json!({ "emptyDir": { "sizeLimit": "64Mi" }, "name": "state" }),
        json!({ "emptyDir": { "medium": "Memory", "sizeLimit": "4Mi" }, "name": "secrets" }),
    ];
    if let Some(secret) = store_secret(settings) {
        volumes.push(json!({ "name": "store", "secret": { "secretName": secret } }));
    }
    let spec = json!({
        "automountServiceAccountToken": true,
        "containers": [container(settings, gateway, config)],
        "enableServiceLinks": false,
        "securityContext": pod_security(),
        "serviceAccountName": draft.name,
        "terminationGracePeriodSeconds": PRE_STOP_S + DEFAULT_DRAIN_S + EXIT_S,
        "topologySpreadConstraints": [{
            "labelSelector": { "matchLabels": selector },
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
        }],
        "volumes": volumes,
    });
    let formats = FORMAT.to_string();
    let (template, hash) = template(
        labels(draft.owner),
        &[(names::CONFIG_FORMATS_LABEL, &formats)],
        spec,
    );
    let body = json!({
        "spec": {
            "replicas": settings.gateway_replicas,
            "revisionHistoryLimit": 2,
            "selector": { "matchLabels": selector },
            "strategy": { "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 }, "type": "RollingUpdate" },
            "template": template,
        },
    });
    (draft.finish(Map::new(), body), hash)
}

/// The Secret with the password of the gateways' store.
fn store_secret(settings: &PlanSettings) -> Option<&str> {
    settings.store.as_ref()?.secret.as_deref()
}

fn container(settings: &PlanSettings, gateway: &str, config: &GatewayConfig) -> Value {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let probe = |path: &str, period_s: u32, failures: u32| {
        json!({
            "failureThreshold": failures,
            "httpGet": { "path": path, "port": "admin" },
            "periodSeconds": period_s,
            "timeoutSeconds": 5,
        })
    };
    // Kubernetes copies these labels of the node to its pods from 1.35 on; before, the variables are empty.
    let label = |name: &str, label: &str| field(name, &format!("metadata.labels['{label}']"));
    let region = match settings.gateway_region.as_str() {
        "" => label("PENSTOCK_REGION", "topology.kubernetes.io/region"),
        region => json!({ "name": "PENSTOCK_REGION", "value": region }),
    };
    let port =
        |name: &str, port: u16| json!({ "containerPort": port, "name": name, "protocol": "TCP" });
    let mut mounts = vec![
        json!({ "mountPath": SECRETS_PATH, "name": "secrets" }),
        json!({ "mountPath": STATE_PATH, "name": "state" }),
    ];
    if store_secret(settings).is_some() {
        mounts.push(json!({ "mountPath": STORE_PATH, "name": "store", "readOnly": true }));
    }
    let mut container = json!({
        "args": arguments(settings, gateway),
        "env": [
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("POD_UID", "metadata.uid"),
            region,
            label("PENSTOCK_ZONE", "topology.kubernetes.io/zone"),
        ],
        "image": settings.self_image,
        "imagePullPolicy": settings.image_pull_policy,
        "lifecycle": { "preStop": { "sleep": { "seconds": PRE_STOP_S } } },
        "livenessProbe": probe("/healthz", 10, 6),
        "name": "gateway",
        "ports": [port("http", names::GATEWAY_PORT), port("admin", names::ADMIN_PORT)],
        "readinessProbe": probe("/readyz", 2, 3),
        "resources": {
            "limits": { "memory": memory(config) },
            "requests": { "cpu": "100m", "memory": "64Mi" },
        },
        "securityContext": container_security(true),
        "volumeMounts": mounts,
    });
    if let Some((_, Some(secret))) = &settings.usage_export {
        container["envFrom"] = json!([{ "secretRef": { "name": secret } }]);
    }
    container
}

fn arguments(settings: &PlanSettings, gateway: &str) -> Vec<String> {
    let drain = format!("{DEFAULT_DRAIN_S}s");
    let mut arguments = ["gateway", "--gateway", gateway, "--drain-timeout", &drain]
        .map(str::to_owned)
        .to_vec();
    if let Some(header) = &settings.gateway_region_header {
        arguments.extend(["--region-header".to_owned(), header.clone()]);
    }
    for proxies in &settings.gateway_trusted_proxies {
        arguments.extend(["--trusted-proxies".to_owned(), proxies.to_string()]);
    }
    if let Some(store) = &settings.store {
        arguments.extend(["--store".to_owned(), store.url.clone()]);
    }
    if store_secret(settings).is_some() {
        arguments.extend([
            "--store-password-file".to_owned(),
            format!("{STORE_PATH}/password"),
        ]);
    }
    if let Some((url, _)) = &settings.usage_export {
        arguments.extend(["--usage-export".to_owned(), url.clone()]);
    }
    arguments
}

/// Room for what the gateway needs by itself and for its caches when they are full.
fn memory(config: &GatewayConfig) -> String {
    let caches_mib: u64 = config
        .caches
        .values()
        .map(|cache| cache.max_bytes.div_ceil(1024 * 1024))
        .sum();
    format!("{}Mi", BASE_MEMORY_MIB + caches_mib)
}
