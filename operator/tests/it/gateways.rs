//! Credentials, rights and acks of gateways; the lease of operators.

use std::time::Duration;

use kube::api::PostParams;
use serde_json::json;

use crate::cluster::cluster;
use crate::simulated;
use crate::world::{World, dynamic, policy, until};

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
