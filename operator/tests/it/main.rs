//! The operator against a real API server, with exactly the rights that the chart gives. Tests look at the world, not at
//! calls: objects, conditions, owners of fields, and the audit log.
#![cfg(test)]

mod cluster;
mod world;

use std::time::Duration;

use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::cluster::cluster;
use crate::world::{World, assert_same, dynamic, established, own, policy, until};

const OWN: &str = "penstock.dev/v1alpha1";
const RBAC: &str = "rbac.authorization.k8s.io/v1";

fn simulated() -> Value {
    json!({"pool": {"model": "tiny", "engine": "Simulated"}})
}

#[tokio::test]
async fn api_server_refuses_what_no_object_may_say() {
    let Some(world) = World::new(cluster(), "refuse").await else {
        return;
    };
    let scaling = |scaling: Value| json!({"pool": {"model": "m", "scaling": scaling}});
    let service = json!({"name": "s", "port": 80});
    let refused = [
        (
            "LLMBackend",
            json!({}),
            "exactly one of pool, service and external",
        ),
        (
            "LLMBackend",
            json!({"pool": {"model": "m"}, "service": service}),
            "exactly one of",
        ),
        (
            "LLMBackend",
            scaling(json!({"minReplicas": 3, "maxReplicas": 2})),
            "must not be above maxReplicas",
        ),
        (
            "LLMBackend",
            scaling(json!({"maxReplicas": 2, "ttftP90": "0s"})),
            "ttftP90 must be above 0s",
        ),
        (
            "LLMBackend",
            scaling(json!({"maxReplicas": 2, "ttftP90": "soon"})),
            "spec.pool.scaling.ttftP90",
        ),
        (
            "LLMBackend",
            scaling(json!({"maxReplicas": 2, "kvCacheUtilizationPercent": 101})),
            "kvCacheUtilizationPercent",
        ),
        (
            "LLMBackend",
            json!({"pool": {"model": "m", "replicas": 2, "scaling": {"maxReplicas": 2}}}),
            "replicas or scaling, not both",
        ),
        ("RoutingPolicy", json!({"rules": []}), "spec.rules"),
        (
            "RoutingPolicy",
            json!({"rules": [{"name": "r", "match": {"models": ["m"]}, "backends": []}]}),
            "spec.rules[0].backends",
        ),
        (
            "SemanticCache",
            json!({"exact": {"maxSizeMib": 0}}),
            "maxSizeMib",
        ),
    ];
    for (kind, spec, message) in refused {
        let error = world
            .try_apply(own(kind, "wrong", spec.clone()))
            .await
            .expect_err(&spec.to_string());
        assert!(error.to_string().contains(message), "{spec}: {error}");
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn objects_become_children_and_status_and_then_nothing_is_written() {
    let Some(world) = World::new(cluster(), "walk").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("SemanticCache", "fridge", json!({"exact": {}}))
        .await;
    let mut rules = policy("counter", "soup");
    rules["rules"][0]["cache"] = json!({"name": "fridge"});
    world.own("RoutingPolicy", "lunch", rules).await;
    let operator = world.operator("one").await;

    for (api_version, kind, name) in [
        ("apps/v1", "Deployment", "soup-pool"),
        ("v1", "Service", "soup-pool"),
        ("policy/v1", "PodDisruptionBudget", "soup-pool"),
        ("v1", "ServiceAccount", "counter-gateway"),
        (RBAC, "Role", "counter-gateway"),
        (RBAC, "RoleBinding", "counter-gateway"),
        ("v1", "ConfigMap", "counter-config-f1"),
        ("v1", "ConfigMap", "counter-acks"),
        ("v1", "Secret", "counter-credentials"),
        ("v1", "Service", "counter-gateway"),
        ("apps/v1", "Deployment", "counter-gateway"),
        ("policy/v1", "PodDisruptionBudget", "counter-gateway"),
    ] {
        world.exists(api_version, kind, name).await;
    }
    world
        .condition_is("LLMBackend", "soup", "Ready", "False", "Starting")
        .await;
    world
        .condition_is(
            "RoutingPolicy",
            "lunch",
            "Programmed",
            "False",
            "GatewayNotReady",
        )
        .await;

    world.ready_pod("soup-pool", "engine").await;
    let uid = world.ready_pod("counter-gateway", "gateway").await;
    world
        .condition_is("LLMBackend", "soup", "Programmed", "False", "Pending")
        .await;
    world.ack("counter", &uid).await;
    for (kind, name) in [
        ("LLMBackend", "soup"),
        ("RoutingPolicy", "lunch"),
        ("SemanticCache", "fridge"),
    ] {
        world
            .condition_is(kind, name, "Programmed", "True", "Programmed")
            .await;
        world
            .condition_is(kind, name, "Ready", "True", "Ready")
            .await;
    }

    let written = world.settled().await;
    let versions = world.versions().await;
    // Other people's news wake the operator, and a new operator looks at everything.
    let label = json!({"metadata": {"labels": {"team": "blue"}}});
    let services = world.api("v1", "Service");
    services
        .patch("soup-pool", &PatchParams::default(), &Patch::Merge(&label))
        .await
        .unwrap();
    operator.stop().await;
    let operator = world.operator("two").await;
    until("the second operator to lead", async || {
        let lease = world
            .api("coordination.k8s.io/v1", "Lease")
            .get("penstock-operator")
            .await
            .unwrap();
        (lease.data["spec"]["holderIdentity"] == "two").then_some(())
    })
    .await;
    assert_same(&written, &world.settled().await);
    let others = |versions: Vec<String>| -> Vec<String> {
        versions
            .into_iter()
            .filter(|version| !version.starts_with("Service soup-pool "))
            .collect()
    };
    assert_same(&others(versions), &others(world.versions().await));
    let service = services.get("soup-pool").await.unwrap();
    assert_eq!(service.labels()["team"], "blue", "a foreign label stays");
    operator.stop().await;
}

#[tokio::test]
async fn hand_edits_are_healed_and_lost_children_come_back() {
    let Some(world) = World::new(cluster(), "heal").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    let operator = world.operator("one").await;
    world
        .exists("policy/v1", "PodDisruptionBudget", "soup-pool")
        .await;
    world.settled().await;

    let deployments = world.api("apps/v1", "Deployment");
    let edit = json!([{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": ["--broken"]}]);
    let edit: kube::api::Patch<()> = Patch::Json(serde_json::from_value(edit).unwrap());
    deployments
        .patch("soup-pool", &PatchParams::default(), &edit)
        .await
        .unwrap();
    until("the arguments to be healed", async || {
        let args = deployments.get("soup-pool").await.unwrap().data["spec"]["template"]["spec"]["containers"][0]["args"]
            .clone();
        (args[0] == "engine").then_some(())
    })
    .await;

    let scale = json!({"spec": {"replicas": 7}});
    deployments
        .patch("soup-pool", &PatchParams::default(), &Patch::Merge(&scale))
        .await
        .unwrap();
    until("the fixed number to be healed", async || {
        (deployments.get("soup-pool").await.unwrap().data["spec"]["replicas"] == 1).then_some(())
    })
    .await;

    let stripped = json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": null}}});
    let services = world.api("v1", "Service");
    services
        .patch(
            "soup-pool",
            &PatchParams::default(),
            &Patch::Merge(&stripped),
        )
        .await
        .unwrap();
    until("the label to be healed", async || {
        let service = services.get("soup-pool").await.unwrap();
        (service
            .labels()
            .get("app.kubernetes.io/managed-by")
            .is_some_and(|value| value == "penstock"))
        .then_some(())
    })
    .await;

    world.delete("v1", "Service", "soup-pool").await;
    world.exists("v1", "Service", "soup-pool").await;
    operator.stop().await;
}

#[tokio::test]
async fn what_objects_no_longer_ask_for_goes() {
    let Some(world) = World::new(cluster(), "prune").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    world
        .own("RoutingPolicy", "dinner", policy("counter", "soup"))
        .await;
    let operator = world.operator("one").await;
    world
        .exists("policy/v1", "PodDisruptionBudget", "counter-gateway")
        .await;

    world.delete(OWN, "RoutingPolicy", "lunch").await;
    until("the gateway to have one owner", async || {
        let deployment = world
            .api("apps/v1", "Deployment")
            .get("counter-gateway")
            .await
            .unwrap();
        (deployment.owner_references().len() == 1).then_some(())
    })
    .await;
    world.delete(OWN, "RoutingPolicy", "dinner").await;
    world.gone("apps/v1", "Deployment", "counter-gateway").await;
    world.gone("v1", "Secret", "counter-credentials").await;
    world.gone(RBAC, "Role", "counter-gateway").await;
    world.gone("v1", "ConfigMap", "counter-acks").await;

    // A pool that becomes a Service of somebody else's.
    world.delete(OWN, "LLMBackend", "soup").await;
    world
        .own(
            "LLMBackend",
            "soup",
            json!({"service": {"name": "elsewhere", "port": 80}}),
        )
        .await;
    world.gone("apps/v1", "Deployment", "soup-pool").await;
    world.gone("v1", "Service", "soup-pool").await;
    let message = world
        .condition_is(
            "LLMBackend",
            "soup",
            "ResolvedRefs",
            "False",
            "ServiceNotFound",
        )
        .await;
    assert!(message.contains("elsewhere"), "{message}");
    operator.stop().await;
}

#[tokio::test]
async fn foreign_object_of_the_same_name_is_left_alone_and_named() {
    let Some(world) = World::new(cluster(), "taken").await else {
        return;
    };
    let foreign = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "soup-pool"},
        "spec": {"ports": [{"port": 1}], "selector": {"app": "mine"}},
    });
    world.apply(foreign).await;
    world.own("LLMBackend", "soup", simulated()).await;
    world.own("LLMBackend", "salad", simulated()).await;
    let operator = world.operator("one").await;
    let message = world
        .condition_is("LLMBackend", "soup", "Accepted", "False", "NameTaken")
        .await;
    assert!(message.contains("Service soup-pool"), "{message}");
    world.exists("v1", "Service", "salad-pool").await;
    let service = world.api("v1", "Service").get("soup-pool").await.unwrap();
    assert_eq!(service.data["spec"]["selector"], json!({"app": "mine"}));

    world.delete("v1", "Service", "soup-pool").await;
    world
        .condition_is("LLMBackend", "soup", "Accepted", "True", "Accepted")
        .await;
    let service = world.exists("v1", "Service", "soup-pool").await;
    assert_eq!(
        service.data["spec"]["selector"],
        json!({"penstock.dev/backend": "soup"})
    );
    operator.stop().await;
}

#[tokio::test]
async fn bad_rule_shows_in_a_condition_and_the_rest_goes_on() {
    let Some(world) = World::new(cluster(), "badrule").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "good", policy("counter", "soup"))
        .await;
    world
        .own("RoutingPolicy", "bad", policy("counter", "nowhere"))
        .await;
    let operator = world.operator("one").await;
    let message = world
        .condition_is(
            "RoutingPolicy",
            "bad",
            "ResolvedRefs",
            "False",
            "BackendNotFound",
        )
        .await;
    assert!(
        message.contains("spec.rules[0].backends[0]") && message.contains("nowhere"),
        "{message}"
    );
    world
        .condition_is("RoutingPolicy", "bad", "Ready", "False", "BackendNotFound")
        .await;
    let uid = world.ready_pod("counter-gateway", "gateway").await;
    world.ready_pod("soup-pool", "engine").await;
    world.exists("v1", "ConfigMap", "counter-acks").await;
    world.ack("counter", &uid).await;
    world
        .condition_is("RoutingPolicy", "good", "Ready", "True", "Ready")
        .await;
    assert_eq!(
        world
            .condition("RoutingPolicy", "bad", "Ready")
            .await
            .unwrap()
            .0,
        "False"
    );
    operator.stop().await;
}

#[tokio::test]
async fn edit_of_one_object_is_programmed_alone_and_costs_few_status_writes() {
    let Some(world) = World::new(cluster(), "edit").await else {
        return;
    };
    for name in ["soup", "salad", "bread"] {
        world
            .own(
                "LLMBackend",
                name,
                json!({"external": {"url": format!("https://{name}.example/v1")}}),
            )
            .await;
        world
            .own("RoutingPolicy", name, policy("counter", name))
            .await;
    }
    let operator = world.operator("one").await;
    world
        .exists("apps/v1", "Deployment", "counter-gateway")
        .await;
    until("all six objects in the config", async || {
        let config = world
            .api("v1", "ConfigMap")
            .get_opt("counter-config-f1")
            .await
            .unwrap()?;
        (!config.annotations().is_empty()).then_some(())
    })
    .await;
    world.settled().await;
    let uid = world.ready_pod("counter-gateway", "gateway").await;
    world.ack("counter", &uid).await;
    for name in ["soup", "salad", "bread"] {
        world
            .condition_is("LLMBackend", name, "Ready", "True", "Ready")
            .await;
        world
            .condition_is("RoutingPolicy", name, "Ready", "True", "Ready")
            .await;
    }
    let before = world.settled().await.len();
    world
        .own(
            "LLMBackend",
            "soup",
            json!({"external": {"url": "https://new.example/v1"}}),
        )
        .await;
    world
        .condition_is("LLMBackend", "soup", "Programmed", "False", "Pending")
        .await;
    world.ack("counter", &uid).await;
    world
        .condition_is("LLMBackend", "soup", "Ready", "True", "Ready")
        .await;
    let writes = world.settled().await.split_off(before);
    let statuses: Vec<_> = writes
        .iter()
        .filter(|write| write.ends_with("status"))
        .collect();
    assert!(statuses.len() <= 3, "{writes:#?}");
    assert!(
        statuses
            .iter()
            .all(|write| write.contains("llmbackends soup")),
        "{writes:#?}"
    );
    operator.stop().await;
}

#[tokio::test]
async fn referenced_keys_are_copied_follow_the_secret_and_never_show() {
    let Some(world) = World::new(cluster(), "secret").await else {
        return;
    };
    let external = json!({"external": {
        "url": "https://food.example/v1", "credential": {"secret": "courier", "key": "token"},
    }});
    world.own("LLMBackend", "delivery", external).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "delivery"))
        .await;
    let operator = world.operator("one").await;
    let message = world
        .condition_is(
            "LLMBackend",
            "delivery",
            "ResolvedRefs",
            "False",
            "SecretNotFound",
        )
        .await;
    assert!(message.contains("courier"), "{message}");

    let secret = |token: &str| {
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "courier"},
            "stringData": {"token": token, "other": "do-not-copy"},
        })
    };
    let copied = async |value: &str| {
        until("the copied key", async || {
            let copy = world
                .api("v1", "Secret")
                .get_opt("counter-credentials")
                .await
                .unwrap()?;
            let data = copy.data.get("data")?.as_object()?.clone();
            assert!(data.len() <= 1, "{:?}", data.keys());
            (data.get("courier_token")? == value).then_some(())
        })
        .await;
    };
    world.apply(secret("tip-one")).await;
    world
        .condition_is(
            "LLMBackend",
            "delivery",
            "ResolvedRefs",
            "True",
            "ResolvedRefs",
        )
        .await;
    copied("dGlwLW9uZQ==").await;
    let first = world.digest("counter").await;
    world.apply(secret("tip-two")).await;
    copied("dGlwLXR3bw==").await;
    until("the config to name the new version", async || {
        (world.digest("counter").await != first).then_some(())
    })
    .await;
    operator.stop().await;
}

#[tokio::test]
async fn gateway_account_may_do_its_work_and_nothing_else() {
    let Some(world) = World::new(cluster(), "rights").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    let operator = world.operator("one").await;
    world
        .exists("apps/v1", "Deployment", "counter-gateway")
        .await;
    let allowed = async |verb: &str, resource: &str, name: Option<&str>| {
        let (group, resource) = resource.split_once('/').unwrap_or(("", resource));
        let review = json!({"spec": {
            "user": format!("system:serviceaccount:{}:counter-gateway", world.namespace),
            "resourceAttributes": {
                "namespace": world.namespace, "verb": verb, "group": group, "resource": resource, "name": name,
            },
        }});
        let reviews = dynamic(
            &world.admin,
            None,
            "authorization.k8s.io/v1",
            "SubjectAccessReview",
        );
        let mut review: kube::core::DynamicObject = serde_json::from_value(
            json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {}, "spec": review["spec"]}),
        )
        .unwrap();
        review.metadata.name = None;
        let answer = reviews
            .create(&PostParams::default(), &review)
            .await
            .unwrap();
        answer.data["status"]["allowed"] == true
    };
    for verb in ["get", "list", "watch"] {
        assert!(
            allowed(verb, "configmaps", Some("counter-config-f1")).await,
            "{verb}"
        );
        assert!(
            allowed(verb, "secrets", Some("counter-credentials")).await,
            "{verb}"
        );
    }
    assert!(allowed("patch", "configmaps", Some("counter-acks")).await);
    assert!(allowed("watch", "discovery.k8s.io/endpointslices", None).await);
    for (verb, resource, name) in [
        ("get", "secrets", Some("other")),
        ("list", "secrets", None),
        ("patch", "configmaps", Some("counter-config-f1")),
        ("update", "configmaps", Some("counter-acks")),
        ("delete", "configmaps", Some("counter-acks")),
        ("list", "pods", None),
        ("get", "penstock.dev/llmbackends", Some("soup")),
    ] {
        assert!(
            !allowed(verb, resource, name).await,
            "{verb} {resource} {name:?}"
        );
    }
    operator.stop().await;
}

#[tokio::test]
async fn acks_of_gone_replicas_are_removed_and_others_stay() {
    let Some(world) = World::new(cluster(), "acks").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    let operator = world.operator("one").await;
    world
        .exists("apps/v1", "Deployment", "counter-gateway")
        .await;
    world.exists("v1", "ConfigMap", "counter-acks").await;
    let (stays, goes) = (
        world.ready_pod("counter-gateway", "stays").await,
        world.ready_pod("counter-gateway", "goes").await,
    );
    world.ack("counter", &stays).await;
    world.ack("counter", &goes).await;
    world
        .condition_is("RoutingPolicy", "lunch", "Programmed", "True", "Programmed")
        .await;
    let now = kube::api::DeleteParams {
        grace_period_seconds: Some(0),
        ..kube::api::DeleteParams::default()
    };
    world.api("v1", "Pod").delete("goes", &now).await.unwrap();
    until("the ack of the gone replica to go", async || {
        let acks = world
            .api("v1", "ConfigMap")
            .get("counter-acks")
            .await
            .unwrap();
        let data = acks.data["data"].as_object().cloned().unwrap_or_default();
        assert!(data.contains_key(&stays));
        (!data.contains_key(&goes)).then_some(())
    })
    .await;
    operator.stop().await;
}

#[tokio::test]
async fn one_of_two_operators_writes_and_the_other_takes_over_at_once() {
    let Some(world) = World::new(cluster(), "lease").await else {
        return;
    };
    let holder = async |name: &str| {
        until(&format!("{name} to lead"), async || {
            let lease = world
                .api("coordination.k8s.io/v1", "Lease")
                .get_opt("penstock-operator")
                .await
                .unwrap()?;
            (lease.data["spec"]["holderIdentity"] == name).then_some(())
        })
        .await;
    };
    let first = world.operator("first").await;
    holder("first").await;
    let second = world.operator("second").await;
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .exists("policy/v1", "PodDisruptionBudget", "soup-pool")
        .await;
    world.settled().await;
    first.stop().await;
    // Released, not expired: far sooner than the 15 s of the Lease.
    tokio::time::timeout(Duration::from_secs(10), holder("second"))
        .await
        .unwrap();
    world.own("LLMBackend", "salad", simulated()).await;
    world.exists("v1", "Service", "salad-pool").await;
    let creations = world
        .writes()
        .iter()
        .filter(|write| *write == "patch services soup-pool")
        .count();
    assert_eq!(creations, 1, "{:#?}", world.writes());
    second.stop().await;
}

/// What the operator and its tests need of KEDA's kind.
fn scaled_object_crd() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "scaledobjects.keda.sh"},
        "spec": {
            "group": "keda.sh", "scope": "Namespaced",
            "names": {"kind": "ScaledObject", "listKind": "ScaledObjectList", "plural": "scaledobjects", "singular": "scaledobject"},
            "versions": [{
                "name": "v1alpha1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    })
}

fn hpa(scaled_object_uid: &str) -> Value {
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "keda-hpa-soup-pool", "ownerReferences": [
            {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "name": "soup-pool", "uid": scaled_object_uid},
        ]},
        "spec": {
            "minReplicas": 2, "maxReplicas": 6,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "soup-pool"},
            "metrics": [{"type": "External", "external": {
                "metric": {"name": "s0-desired-replicas"}, "target": {"type": "AverageValue", "averageValue": "1"},
            }}],
        },
    })
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn replicas_change_hands_without_changing_and_come_back() {
    let Some(world) = World::new(cluster(), "scale").await else {
        return;
    };
    let pool = |args: &str, scaling: Value| {
        let mut pool =
            json!({"pool": {"model": "tiny", "engine": "Simulated", "args": ["--profile", args]}});
        if !scaling.is_null() {
            pool["pool"]["scaling"] = scaling;
        }
        pool
    };
    let scaling = json!({"minReplicas": 2, "maxReplicas": 6});
    world
        .own("LLMBackend", "soup", pool("a", scaling.clone()))
        .await;
    let operator = world.operator("one").await;
    world
        .condition_is(
            "LLMBackend",
            "soup",
            "ScalingActive",
            "False",
            "KEDANotInstalled",
        )
        .await;
    assert_eq!(
        world.deployment("soup-pool").await.spec.unwrap().replicas,
        Some(2)
    );
    assert_eq!(
        world.replicas_owners("soup-pool").await,
        ["penstock-replicas"]
    );

    // KEDA appears; the scaler is not up yet.
    let crds = dynamic(
        &world.admin,
        None,
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
    );
    let apply = PatchParams::apply("person").force();
    crds.patch(
        "scaledobjects.keda.sh",
        &apply,
        &Patch::Apply(&scaled_object_crd()),
    )
    .await
    .unwrap();
    established(&crds, "scaledobjects.keda.sh").await;
    world
        .condition_is(
            "LLMBackend",
            "soup",
            "ScalingActive",
            "False",
            "ScalerUnavailable",
        )
        .await;
    world
        .apply(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "scaler-1", "labels": {"kubernetes.io/service-name": "scaler"}},
            "endpoints": [{"addresses": ["10.1.2.3"], "conditions": {"ready": true}}],
            "ports": [{"name": "grpc", "port": 6000}],
        }))
        .await;
    let scaled_object = world
        .exists("keda.sh/v1alpha1", "ScaledObject", "soup-pool")
        .await;
    world
        .condition_is("LLMBackend", "soup", "ScalingActive", "False", "Pending")
        .await;
    assert_eq!(
        world.replicas_owners("soup-pool").await,
        ["penstock-replicas"]
    );

    // KEDA makes its HPA, and the HPA works.
    world.apply(hpa(&scaled_object.uid().unwrap())).await;
    let hpas = world.api("autoscaling/v2", "HorizontalPodAutoscaler");
    let active = json!({"status": {"currentReplicas": 2, "desiredReplicas": 2, "conditions": [
        {"type": "ScalingActive", "status": "True", "reason": "ValidMetricFound", "message": "m"},
    ]}});
    hpas.patch_status(
        "keda-hpa-soup-pool",
        &PatchParams::default(),
        &Patch::Merge(&active),
    )
    .await
    .unwrap();
    until("replicas to be handed over", async || {
        (world.replicas_owners("soup-pool").await == ["penstock-handover"]).then_some(())
    })
    .await;
    world
        .condition_is(
            "LLMBackend",
            "soup",
            "ScalingActive",
            "True",
            "ScalingActive",
        )
        .await;
    assert_eq!(
        world.deployment("soup-pool").await.spec.unwrap().replicas,
        Some(2)
    );

    // The HPA scales; an edit of the template keeps its number.
    let deployments = world.api("apps/v1", "Deployment");
    deployments
        .patch_scale(
            "soup-pool",
            &PatchParams::default(),
            &Patch::Merge(&json!({"spec": {"replicas": 5}})),
        )
        .await
        .unwrap();
    world.own("LLMBackend", "soup", pool("b", scaling)).await;
    until("the new template", async || {
        let template = world.deployment("soup-pool").await.spec.unwrap().template;
        template.spec.unwrap().containers[0]
            .args
            .as_ref()
            .unwrap()
            .contains(&"b".to_owned())
            .then_some(())
    })
    .await;
    world.settled().await;
    assert_eq!(
        world.deployment("soup-pool").await.spec.unwrap().replicas,
        Some(5)
    );

    // Scaling removed: the value is adopted before the ScaledObject goes, and the spec's own number comes after the HPA.
    world
        .own("LLMBackend", "soup", pool("b", Value::Null))
        .await;
    world
        .gone("keda.sh/v1alpha1", "ScaledObject", "soup-pool")
        .await;
    let deployment = world.deployment("soup-pool").await;
    assert_eq!(deployment.spec.unwrap().replicas, Some(5));
    assert!(
        world
            .replicas_owners("soup-pool")
            .await
            .contains(&"penstock-replicas".to_owned())
    );
    world
        .delete(
            "autoscaling/v2",
            "HorizontalPodAutoscaler",
            "keda-hpa-soup-pool",
        )
        .await;
    until("the fixed number", async || {
        (world.deployment("soup-pool").await.spec.unwrap().replicas == Some(1)).then_some(())
    })
    .await;
    assert!(
        world
            .condition("LLMBackend", "soup", "ScalingActive")
            .await
            .is_none()
    );
    world.settled().await;
    let all = hpas.list(&ListParams::default()).await.unwrap();
    assert!(all.items.is_empty());
    operator.stop().await;
}

#[tokio::test]
async fn pool_of_no_replicas_never_has_one() {
    let Some(world) = World::new(cluster(), "zero").await else {
        return;
    };
    world
        .own(
            "LLMBackend",
            "soup",
            json!({"pool": {"model": "tiny", "engine": "Simulated", "replicas": 0}}),
        )
        .await;
    let operator = world.operator("one").await;
    world
        .condition_is("LLMBackend", "soup", "Ready", "True", "ScaledToZero")
        .await;
    let deployment = world.deployment("soup-pool").await;
    assert_eq!(
        deployment.metadata.generation,
        Some(1),
        "the number was right from the first write on"
    );
    assert_eq!(deployment.spec.unwrap().replicas, Some(0));
    operator.stop().await;
}
