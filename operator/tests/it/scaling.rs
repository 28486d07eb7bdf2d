//! Who owns a pool's number of replicas, and when that changes.

use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster::cluster;
use crate::world::{World, dynamic, established, until};

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
    until("the number to have one owner", async || {
        (world.replicas_owners("soup-pool").await == ["penstock-replicas"]).then_some(())
    })
    .await;

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

    // Scaling removed: the value is adopted before the ScaledObject goes, and the spec's own
    // number comes after the HPA.
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
        "the number was right from the first write on: {:#?}",
        deployment.metadata.managed_fields
    );
    assert_eq!(deployment.spec.unwrap().replicas, Some(0));
    operator.stop().await;
}
