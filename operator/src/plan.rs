//! `plan`: what should exist in a namespace, decided from what was observed. Pure, deterministic, and complete:
//! carrying it out leaves nothing to decide. A broken object keeps the children that it has; the others go on.

pub(crate) mod access;
pub(crate) mod config_map;
mod credentials;
pub(crate) mod gateway;
pub(crate) mod pdb;
pub(crate) mod pool;
pub(crate) mod scaled_object;
pub(crate) mod service;

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::config::{FORMAT, GatewayConfig, sha256_hex};
use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::compile::{Compiled, Facts, compile};
use penstock_crds::{Kind, ObjectRef, Problem};
use serde_json::{Map, Value, json};

use crate::args::PlanSettings;
use crate::compare;
use crate::keys;
use crate::live::{ChildKind, Live};
use crate::observed::Observed;
use crate::pod::Owner;
use crate::replicas;

/// Label on everything that the operator makes; its watches select by it.
pub(crate) const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// The label's value.
pub(crate) const MANAGED_BY: &str = "penstock";
/// Seconds between the start of a pod's deletion and SIGTERM, in which routers take it out.
pub(crate) const PRE_STOP_S: u64 = 5;
/// Seconds after the longest drain in which a process ends by itself. vLLM 0.32 on a CPU took 12 (2026-11-21).
pub(crate) const EXIT_S: u64 = 30;
/// How long a stopping process may finish its streams where nothing else is said.
pub(crate) const DEFAULT_DRAIN_S: u64 = 600;

/// One object that should exist.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Child {
    /// What it is.
    pub(crate) kind: ChildKind,
    /// Its name.
    pub(crate) name: String,
    /// Whose it is.
    pub(crate) owner: Owner,
    /// Uids of its owners.
    pub(crate) owner_uids: Vec<String>,
    /// What to apply, stamped.
    pub(crate) object: Value,
}

/// A child that should not exist any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Doomed {
    /// What it is.
    pub(crate) kind: ChildKind,
    /// Its name.
    pub(crate) name: String,
    /// Exactly this one.
    pub(crate) uid: String,
}

/// How the number of a pool's replicas is handled in this pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PoolReplicas {
    /// The Deployment.
    pub(crate) deployment: String,
    /// What to write.
    pub(crate) step: replicas::Step,
    /// The ScaledObject to delete when the step succeeded.
    pub(crate) then_remove: Option<Doomed>,
}

/// A gateway as planned.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GatewayPlan {
    /// Digest of the config that is compiled now.
    pub(crate) digest: String,
    /// The compiled config's objects: `Kind/namespace/name` → hash.
    pub(crate) objects: BTreeMap<String, String>,
    /// The config does not fit its ConfigMap; this many bytes are too many. The previous one stays.
    pub(crate) too_large: Option<usize>,
    /// Which pod template is current.
    pub(crate) template: String,
}

/// A pool as planned.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PoolPlan {
    /// Which pod template is current.
    pub(crate) template: String,
    /// With `scaling`: whether a ScaledObject is planned, and if not, why.
    pub(crate) scaler: Option<scaled_object::Decision>,
}

/// Everything to do in one namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// What should exist, in the order of writing.
    pub(crate) children: Vec<Child>,
    /// How each pool's number of replicas is handled.
    pub(crate) replicas: BTreeMap<String, PoolReplicas>,
    /// What should go.
    pub(crate) prune: Vec<Doomed>,
    /// Gateways by name.
    pub(crate) gateways: BTreeMap<String, GatewayPlan>,
    /// Pools by backend name.
    pub(crate) pools: BTreeMap<String, PoolPlan>,
    /// Everything wrong with the objects.
    pub(crate) problems: Vec<Problem>,
    /// Which gateways carry an object.
    pub(crate) carried_by: BTreeMap<ObjectRef, BTreeSet<Id>>,
    /// Objects whose newest state does not fit the config.
    pub(crate) too_large: BTreeSet<ObjectRef>,
}

/// Decides everything.
pub(crate) fn plan(observed: &Observed, settings: &PlanSettings) -> Plan {
    let compiled = compile(&observed.objects, &facts(observed));
    let mut plan = Plan::default();
    for (id, backend) in &observed.objects.backends {
        let object = ObjectRef::new(Kind::LLMBackend, id.clone());
        if let Some(spec) = &backend.spec.pool
            && !has_fatal_problem(&compiled, &object)
        {
            pool::plan(observed, settings, backend, spec, &mut plan);
        }
    }
    for (id, config) in &compiled.gateways {
        gateway::plan(observed, settings, id, config, &mut plan);
    }
    plan.children
        .sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    plan.prune = prune(observed, &plan, &compiled);
    plan.problems = compiled.problems;
    plan.carried_by = compiled.carried_by;
    plan
}

fn facts(observed: &Observed) -> Facts {
    let versions = |keys: &BTreeMap<String, Vec<u8>>| {
        keys.iter()
            .map(|(key, value)| (key.clone(), sha256_hex(value)[..16].to_owned()))
            .collect()
    };
    let of_all = |objects: &BTreeMap<Id, BTreeMap<String, Vec<u8>>>| {
        let objects = objects.iter();
        objects
            .map(|(id, keys)| (id.clone(), versions(keys)))
            .collect()
    };
    Facts {
        services: Some(observed.services.clone()),
        secrets: Some(of_all(&observed.secrets)),
        config_maps: Some(of_all(&observed.config_maps)),
        keys: Some(keys::facts(observed)),
    }
}

fn has_fatal_problem(compiled: &Compiled, object: &ObjectRef) -> bool {
    compiled
        .problems
        .iter()
        .any(|problem| problem.object == *object && !problem.reason.is_reference())
}

/// Children of ours that are not planned. What belongs to an object that cannot be read or is broken stays.
fn prune(observed: &Observed, plan: &Plan, compiled: &Compiled) -> Vec<Doomed> {
    let planned: BTreeSet<(ChildKind, &str)> = plan
        .children
        .iter()
        .map(|child| (child.kind, child.name.as_str()))
        .collect();
    // While a pool exists, its ScaledObject goes only after its last value has an owner (`PoolReplicas`).
    let decided_by_step: BTreeSet<(ChildKind, &str)> = plan
        .replicas
        .values()
        .map(|pool| (ChildKind::ScaledObject, pool.deployment.as_str()))
        .collect();
    let stays = |live: &Live| {
        live.owners().any(|(kind, name, _)| {
            let kind = match kind {
                "LLMBackend" => Kind::LLMBackend,
                "RoutingPolicy" => Kind::RoutingPolicy,
                _ => return false,
            };
            let object = ObjectRef::new(kind, Id::new(&observed.namespace, name));
            let broken_pool = kind == Kind::LLMBackend
                && observed.objects.backends.contains_key(&object.id)
                && has_fatal_problem(compiled, &object);
            observed.unreadable.contains_key(&object) || broken_pool
        })
    };
    observed
        .children
        .iter()
        .filter(|((kind, name), live)| {
            let key = (*kind, name.as_str());
            // Labels alone would let anybody have an object deleted by the operator: an owner of ours is needed too.
            !planned.contains(&key)
                && !decided_by_step.contains(&key)
                && live.owners().next().is_some()
                && !live.is_terminating()
                && !too_large_config(plan, key)
                && !stays(live)
        })
        .filter_map(|((kind, name), live)| {
            Some(Doomed {
                kind: *kind,
                name: name.clone(),
                uid: live.uid()?.to_owned(),
            })
        })
        .collect()
}

/// The ConfigMap of a gateway whose newest config does not fit keeps the previous one.
fn too_large_config(plan: &Plan, (kind, name): (ChildKind, &str)) -> bool {
    kind == ChildKind::ConfigMap
        && plan.gateways.iter().any(|(gateway, planned)| {
            planned.too_large.is_some() && names::gateway_config_map(gateway, FORMAT) == name
        })
}

/// Puts a planned object together.
struct Draft<'a> {
    kind: ChildKind,
    name: String,
    namespace: &'a str,
    owner: &'a Owner,
    owner_references: &'a [Value],
}

impl Draft<'_> {
    /// `body` holds everything but apiVersion, kind and metadata; `annotations` may be empty.
    fn finish(self, annotations: Map<String, Value>, body: Value) -> Child {
        let mut metadata = json!({
            "name": self.name,
            "namespace": self.namespace,
            "labels": labels(self.owner),
            "ownerReferences": self.owner_references,
        });
        if !annotations.is_empty() {
            metadata["annotations"] = Value::Object(annotations);
        }
        let mut object = Map::new();
        object.insert("apiVersion".to_owned(), json!(self.kind.api_version()));
        object.insert("kind".to_owned(), json!(self.kind.name()));
        object.insert("metadata".to_owned(), metadata);
        if let Value::Object(body) = body {
            object.extend(body);
        }
        let uids = self
            .owner_references
            .iter()
            .filter_map(|reference| reference.get("uid")?.as_str());
        Child {
            kind: self.kind,
            name: self.name,
            owner: self.owner.clone(),
            owner_uids: uids.map(str::to_owned).collect(),
            object: compare::stamped(Value::Object(object)),
        }
    }
}

/// Labels of every child, and of its pods.
fn labels(owner: &Owner) -> Value {
    let (key, name, component) = match owner {
        Owner::Gateway(name) => (names::GATEWAY_LABEL, name, "gateway"),
        Owner::Backend(name) => (names::BACKEND_LABEL, name, "engine"),
    };
    json!({
        key: name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/name": "penstock",
        MANAGED_BY_LABEL: MANAGED_BY,
    })
}

/// Selects the pods of a gateway or pool. Part of a Deployment's immutable selector: never change it.
fn selector(owner: &Owner) -> Value {
    match owner {
        Owner::Gateway(name) => json!({ names::GATEWAY_LABEL: name }),
        Owner::Backend(name) => json!({ names::BACKEND_LABEL: name }),
    }
}

/// A pod template with its own hash in an annotation, so that pods of an older one can be told apart.
fn template(mut labels: Value, more_labels: &[(&str, &str)], spec: Value) -> (Value, String) {
    for (key, value) in more_labels {
        labels[*key] = json!(value);
    }
    let hash = sha256_hex(json!([labels, spec]).to_string().as_bytes())[..16].to_owned();
    let template = json!({
        "metadata": { "annotations": { crate::pod::TEMPLATE_ANNOTATION: hash }, "labels": labels },
        "spec": spec,
    });
    (template, hash)
}

/// What PodSecurity *restricted* asks of a pod.
fn pod_security() -> Value {
    json!({
        "fsGroup": 65532,
        "runAsGroup": 65532,
        "runAsNonRoot": true,
        "runAsUser": 65532,
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// What PodSecurity *restricted* asks of a container.
fn container_security(read_only_root: bool) -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "capabilities": { "drop": ["ALL"] },
        "readOnlyRootFilesystem": read_only_root,
    })
}

fn hashes(config: &GatewayConfig) -> BTreeMap<String, String> {
    config
        .objects
        .iter()
        .map(|(object, version)| (object.clone(), version.hash.clone()))
        .collect()
}

#[cfg(test)]
pub(crate) mod tests;
