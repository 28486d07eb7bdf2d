//! A pool: a Deployment of engines, a Service, a PodDisruptionBudget and, with `scaling`, a ScaledObject; all of them
//! called `<backend>-pool`. `spec.replicas` is not among what is planned here (see `replicas`).

use std::collections::BTreeMap;
use std::time::Duration;

use kube::ResourceExt as _;
use penstock_core::names;
use penstock_crds::LLMBackend;
use penstock_crds::backend::{Engine, Pool};
use penstock_crds::text::{DurationText, QuantityText};
use serde_json::{Map, Value, json};

use super::scaled_object::Decision;
use super::{
    Child, DEFAULT_DRAIN_S, Doomed, Draft, EXIT_S, PRE_STOP_S, Plan, PoolPlan, PoolReplicas,
    container_security, labels, pdb, pod_security, scaled_object, selector, service, template,
};
use crate::args::PlanSettings;
use crate::autoscaler::{HpaFacts, scaled_object_ready};
use crate::live::ChildKind;
use crate::observed::Observed;
use crate::pod::Owner;
use crate::replicas::{self, Seen, Wish};

/// How long a replica may load its model before it is started anew: an hour covers hundreds of gigabytes.
const STARTUP_S: u32 = 3600;
const STARTUP_PERIOD_S: u32 = 1;

/// Adds the pool's children to `plan`. The spec has no problems.
pub(super) fn plan(
    observed: &Observed,
    settings: &PlanSettings,
    backend: &LLMBackend,
    pool: &Pool,
    plan: &mut Plan,
) {
    let (name, uid) = (backend.name_any(), backend.uid().unwrap_or_default());
    let owner = Owner::Backend(name.clone());
    let references = [json!({
        "apiVersion": "penstock.dev/v1alpha1", "controller": true, "kind": "LLMBackend", "name": name, "uid": uid,
    })];
    let child = names::pool_object(&name);
    let draft = |kind| Draft {
        kind,
        name: child.clone(),
        namespace: &observed.namespace,
        owner: &owner,
        owner_references: &references,
    };
    let (deployment, template) = deployment(draft(ChildKind::Deployment), settings, &name, pool);
    plan.children.push(deployment);
    plan.children
        .push(service::plan(draft(ChildKind::Service), names::ENGINE_PORT));
    plan.children
        .push(pdb::plan(draft(ChildKind::PodDisruptionBudget)));

    let hpas = Hpas::find(observed, &child);
    let live_scaled_object = observed.child(ChildKind::ScaledObject, &child);
    let scaler = pool.scaling.as_ref().map(|scaling| {
        let decision = scaled_object::decide(observed, live_scaled_object.is_some(), hpas.foreign);
        if decision == Decision::Planned {
            let delay_s = seconds(Some(&scaling.scale_down_delay), 0);
            let draft = draft(ChildKind::ScaledObject);
            plan.children.push(scaled_object::plan(
                draft, settings, &name, scaling, delay_s, hpas.own,
            ));
        }
        decision
    });

    let seen = Seen {
        live: observed
            .child(ChildKind::Deployment, &child)
            .map(|live| (live.replicas().unwrap_or(1), live.replicas_owners.clone())),
        scaled_object: live_scaled_object
            .map(|live| scaled_object_ready(live).is_some_and(|ready| ready.0)),
        own_hpa: hpas
            .own
            .map(|hpa| hpa.scaling_active.as_ref().is_some_and(|active| active.0)),
        foreign_hpa: hpas.foreign.is_some(),
    };
    let step = replicas::decide(wish(pool), &seen);
    let removable =
        matches!(step, replicas::Step::Adopt(_)) || replicas::may_remove_scaled_object(&seen);
    let then_remove =
        live_scaled_object.filter(|live| pool.scaling.is_none() && !live.is_terminating());
    let then_remove = then_remove.filter(|_| removable).and_then(|live| {
        Some(Doomed {
            kind: ChildKind::ScaledObject,
            name: child.clone(),
            uid: live.uid()?.to_owned(),
        })
    });
    plan.replicas.insert(
        name.clone(),
        PoolReplicas {
            deployment: child,
            step,
            then_remove,
        },
    );
    plan.pools.insert(name, PoolPlan { template, scaler });
}

fn wish(pool: &Pool) -> Wish {
    match &pool.scaling {
        Some(scaling) => Wish::Scaled {
            min: scaling.min_replicas,
            max: scaling.max_replicas,
        },
        None => Wish::Fixed(pool.replicas.unwrap_or(1)),
    }
}

/// Autoscalers that point at a pool's Deployment.
pub(crate) struct Hpas<'a> {
    /// KEDA's.
    pub(crate) own: Option<&'a HpaFacts>,
    /// Any other.
    pub(crate) foreign: Option<&'a HpaFacts>,
}

impl<'a> Hpas<'a> {
    /// Finds them; `name` is the Deployment's and the ScaledObject's.
    pub(crate) fn find(observed: &'a Observed, name: &str) -> Self {
        let mut found = Self {
            own: None,
            foreign: None,
        };
        for hpa in observed
            .autoscalers
            .iter()
            .map(AsRef::as_ref)
            .filter(|hpa: &&HpaFacts| hpa.deployment == name)
        {
            if hpa.scaled_object.as_deref() == Some(name) {
                found.own = Some(hpa);
            } else {
                found.foreign = Some(hpa);
            }
        }
        found
    }
}

fn deployment(
    draft: Draft<'_>,
    settings: &PlanSettings,
    backend: &str,
    pool: &Pool,
) -> (Child, String) {
    let drain_s = seconds(pool.drain.as_ref(), DEFAULT_DRAIN_S);
    let engine = container(settings, backend, pool, drain_s);
    let mut volumes = vec![json!({ "emptyDir": {}, "name": "tmp" })];
    if pool.engine == Engine::Vllm {
        volumes.push(json!({ "emptyDir": {}, "name": "home" }));
        // Tensor-parallel workers talk through shared memory; the runtime's 64 MiB are too little.
        volumes.push(json!({ "emptyDir": { "medium": "Memory" }, "name": "shared-memory" }));
    }
    let mut spec = json!({
        "automountServiceAccountToken": false,
        "containers": [engine],
        // A Service called `vllm` would otherwise set VLLM_PORT, which vLLM takes for its own setting.
        "enableServiceLinks": false,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": PRE_STOP_S + drain_s + EXIT_S,
        "volumes": volumes,
    });
    if let Some(accelerator) = &pool.accelerator {
        spec["tolerations"] = json!([{ "key": accelerator.resource, "operator": "Exists" }]);
    }
    let (template, hash) = template(labels(draft.owner), &[], spec);
    let selector = selector(draft.owner);
    let body = json!({
        "spec": {
            "progressDeadlineSeconds": STARTUP_S,
            "revisionHistoryLimit": 2,
            "selector": { "matchLabels": selector },
            "strategy": { "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 }, "type": "RollingUpdate" },
            "template": template,
        },
    });
    (draft.finish(Map::new(), body), hash)
}

fn container(settings: &PlanSettings, backend: &str, pool: &Pool, drain_s: u64) -> Value {
    let vllm = pool.engine == Engine::Vllm;
    let default_image = if vllm {
        &settings.vllm_image
    } else {
        &settings.self_image
    };
    let mut mounts = vec![json!({ "mountPath": "/tmp", "name": "tmp" })];
    let mut env = BTreeMap::new();
    if vllm {
        mounts.push(json!({ "mountPath": "/home/penstock", "name": "home" }));
        mounts.push(json!({ "mountPath": "/dev/shm", "name": "shared-memory" }));
        // The user has no entry in the image's /etc/passwd: Python asks these instead.
        env.extend(
            [("HOME", "/home/penstock"), ("USER", "penstock")]
                .map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
    }
    env.extend(pool.env.clone());
    let env: Vec<Value> = env
        .iter()
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    let health = |period_s: u32, failures: u32| {
        json!({
            "failureThreshold": failures,
            "httpGet": { "path": "/health", "port": "http" },
            "periodSeconds": period_s,
            "timeoutSeconds": 5,
        })
    };
    let mut container = json!({
        "args": arguments(backend, pool, drain_s),
        "image": pool.image.as_ref().unwrap_or(default_image),
        "imagePullPolicy": settings.image_pull_policy,
        "lifecycle": { "preStop": { "sleep": { "seconds": PRE_STOP_S } } },
        "livenessProbe": health(10, 6),
        "name": "engine",
        "ports": [{ "containerPort": names::ENGINE_PORT, "name": "http", "protocol": "TCP" }],
        "readinessProbe": health(2, 3),
        "resources": resources(pool),
        "securityContext": container_security(!vllm),
        "startupProbe": health(STARTUP_PERIOD_S, STARTUP_S / STARTUP_PERIOD_S),
        "volumeMounts": mounts,
    });
    if !env.is_empty() {
        container["env"] = Value::Array(env);
    }
    container
}

/// The image's entry point is `vllm serve` or `penstock`; both engines take the same flags.
fn arguments(backend: &str, pool: &Pool, drain_s: u64) -> Vec<String> {
    let model = pool.model.strip_prefix("hf://").unwrap_or(&pool.model);
    let mut arguments: Vec<String> = match pool.engine {
        Engine::Vllm => vec![model.to_owned()],
        Engine::Simulated => ["engine", "--model", model].map(str::to_owned).to_vec(),
    };
    let port = names::ENGINE_PORT.to_string();
    let drain = drain_s.to_string();
    arguments.extend(
        [
            "--served-model-name",
            backend,
            "--port",
            &port,
            "--shutdown-timeout",
            &drain,
        ]
        .map(str::to_owned),
    );
    if let (Engine::Vllm, Some(accelerator)) = (pool.engine, &pool.accelerator) {
        arguments.extend([
            "--tensor-parallel-size".to_owned(),
            accelerator.count.to_string(),
        ]);
    }
    arguments.extend(pool.args.iter().cloned());
    arguments
}

fn resources(pool: &Pool) -> Value {
    let given = pool.resources.clone().unwrap_or_default();
    let (requests, mut limits) = (given.requests, given.limits);
    if let Some(accelerator) = &pool.accelerator {
        // Extended resources are limits; the API server sets the equal request.
        let count = QuantityText(accelerator.count.to_string());
        limits.insert(accelerator.resource.clone(), count);
    }
    let mut resources = Map::new();
    for (key, quantities) in [("limits", limits), ("requests", requests)] {
        if !quantities.is_empty() {
            resources.insert(key.to_owned(), json!(quantities));
        }
    }
    Value::Object(resources)
}

/// Whole seconds, rounded up; a text that is no duration never gets here (`compile` refuses it).
fn seconds(text: Option<&DurationText>, default_s: u64) -> u64 {
    let Some(duration) = text.and_then(|text| text.parse().ok()) else {
        return default_s;
    };
    duration.as_secs() + u64::from(duration > Duration::from_secs(duration.as_secs()))
}
