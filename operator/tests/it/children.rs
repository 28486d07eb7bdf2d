//! What is made for objects, healed, and taken away again; what conditions say about it.

use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster::cluster;
use crate::world::{World, assert_same, own, policy, until};
use crate::{OWN, RBAC, simulated};

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
        (
            "LLMBackend",
            json!({"pool": {"model": "m", "resources": {"limits": {"memory": "16GB"}}}}),
            "spec.pool.resources.limits.memory",
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
async fn nothing_is_made_again_in_a_namespace_that_is_being_deleted() {
    let Some(world) = World::new(cluster(), "going").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    let operator = world.operator("one").await;
    world
        .exists("policy/v1", "PodDisruptionBudget", "soup-pool")
        .await;
    let before = world.settled().await.len();

    // Nothing here finalises namespaces, so this one stays as it is: being deleted.
    world.delete_namespace().await;
    world.delete("v1", "Service", "soup-pool").await;
    until("the operator to see it gone", async || {
        (world.writes().len() > before).then_some(())
    })
    .await;
    // One attempt, whose answer tells that the namespace is going. A refusal would be told in the status and tried
    // again.
    let writes = world.settled().await.split_off(before);
    assert_eq!(writes, ["patch services soup-pool"]);
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
