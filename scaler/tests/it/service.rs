//! What KEDA sees: values, refusals, streams.

use std::time::Duration;

use penstock_core::load::BackendLoad;
use penstock_scaler::args::Settings;
use penstock_scaler::fleet::Limits;
use penstock_scaler::proto::GetMetricsRequest;
use penstock_scaler::world::World;
use tonic::Code;

use crate::scripted::{
    BACKEND, DEADLINE, Engine, Scaler, ScriptedGateway, Servers, pod, reference, world,
};

#[tokio::test]
async fn metric_spec_is_one_metric_with_target_one_and_never_changes() {
    let mut scaler = Scaler::start(Settings::default(), World::default()).await;
    let specs = scaler
        .client
        .get_metric_spec(reference(BACKEND))
        .await
        .unwrap()
        .into_inner()
        .metric_specs;
    assert_eq!(specs.len(), 1);
    assert_eq!(
        (
            specs[0].metric_name.as_str(),
            specs[0].target_size,
            specs[0].target_size_float
        ),
        ("desired-replicas", 1, 1.0)
    );
    let mut stream = scaler
        .client
        .stream_metric_spec(reference(BACKEND))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        stream.message().await.unwrap().unwrap().metric_specs,
        specs,
        "sent at once on opening"
    );
    scaler.shutdown.cancel();
    assert_eq!(stream.message().await.unwrap(), None, "ends with OK");
    scaler.stop().await;
}

#[tokio::test]
async fn unknown_key_is_invalid_argument_on_every_call_and_names_the_closest() {
    let mut scaler = Scaler::start(Settings::default(), world(1, 1, vec![], &[])).await;
    let bad = reference(&[("backend", "chat"), ("kvCacheUtilisationPercent", "75")]);
    let request = GetMetricsRequest {
        scaled_object_ref: Some(bad.clone()),
        metric_name: "desired-replicas".into(),
    };
    let statuses = [
        scaler
            .client
            .get_metric_spec(bad.clone())
            .await
            .unwrap_err(),
        scaler.client.get_metrics(request).await.unwrap_err(),
        scaler.client.is_active(bad.clone()).await.unwrap_err(),
        scaler
            .client
            .stream_is_active(bad.clone())
            .await
            .unwrap_err(),
        scaler.client.stream_metric_spec(bad).await.unwrap_err(),
    ];
    for status in statuses {
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(
            status
                .message()
                .contains("did you mean 'kvCacheUtilizationPercent'"),
            "{}",
            status.message()
        );
    }
    scaler.stop().await;
}

#[tokio::test]
async fn malformed_references_and_other_metrics_are_invalid_arguments() {
    let mut scaler = Scaler::start(Settings::default(), world(1, 1, vec![], &[])).await;
    let missing = GetMetricsRequest {
        scaled_object_ref: None,
        metric_name: "desired-replicas".into(),
    };
    assert_eq!(
        scaler.client.get_metrics(missing).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let other = GetMetricsRequest {
        scaled_object_ref: Some(reference(BACKEND)),
        metric_name: "cpu".into(),
    };
    assert_eq!(
        scaler.client.get_metrics(other).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let mut nameless = reference(BACKEND);
    nameless.name = String::new();
    assert_eq!(
        scaler.client.is_active(nameless).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    scaler.stop().await;
}

#[tokio::test]
async fn unknown_target_is_unavailable_and_the_process_not_ready_until_the_world_is_known() {
    let mut scaler = Scaler::start(Settings::default(), World::default()).await;
    assert_eq!(
        scaler.metric(BACKEND).await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(
        scaler.active(BACKEND).await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(scaler.admin_page("/readyz").await.0, 503);
    scaler.world.send_replace(world(1, 3, vec![], &[]).into());
    assert_eq!(
        scaler.metric(BACKEND).await.unwrap(),
        3.0,
        "holds what is ordered"
    );
    assert!(scaler.active(BACKEND).await.unwrap());
    let ready = async {
        while scaler.admin_page("/readyz").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, ready).await.unwrap();
    scaler.stop().await;
}

#[tokio::test]
async fn more_targets_than_allowed_are_resource_exhausted() {
    let settings = Settings {
        limits: Limits {
            targets: 1,
            pods_per_target: 8,
        },
        ..Settings::default()
    };
    let mut scaler = Scaler::start(settings, world(1, 1, vec![], &[])).await;
    scaler
        .wait_for_decision(BACKEND, |decision| decision["replicas"] == 1)
        .await;
    let other = [("backend", "chat"), ("ttftP90", "1s")];
    assert_eq!(
        scaler.metric(&other).await.unwrap_err().code(),
        Code::ResourceExhausted
    );
    assert_eq!(
        scaler.metric(BACKEND).await.unwrap(),
        1.0,
        "the first one is still served"
    );
    // Four streams per target.
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(
            scaler
                .client
                .stream_is_active(reference(BACKEND))
                .await
                .unwrap(),
        );
    }
    assert_eq!(
        scaler
            .client
            .stream_is_active(reference(BACKEND))
            .await
            .unwrap_err()
            .code(),
        Code::ResourceExhausted
    );
    drop(open);
    scaler.stop().await;
}

#[tokio::test]
async fn first_held_request_is_pushed_at_once_and_the_stream_ends_with_ok() {
    let mut servers = Servers::default();
    let gateway = ScriptedGateway::new();
    let address = servers.gateway(&gateway).await;
    let mut scaler = Scaler::start(Settings::default(), world(0, 0, vec![], &[address])).await;
    let mut stream = scaler
        .client
        .stream_is_active(reference(BACKEND))
        .await
        .unwrap()
        .into_inner();
    assert!(
        !stream.message().await.unwrap().unwrap().result,
        "nothing is asked for"
    );
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["inputs"]["ledger"] == "fresh"
        })
        .await;
    gateway.set(BackendLoad {
        arrivals: 1,
        in_flight: 1,
        waiting: 1,
        held: 1,
        waiting_ages_ms: vec![0],
        ..BackendLoad::default()
    });
    let pushed = tokio::time::timeout(DEADLINE, stream.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(pushed.result);
    assert_eq!(
        scaler.metric(BACKEND).await.unwrap(),
        1.0,
        "never 0, whatever the order"
    );
    scaler.shutdown.cancel();
    assert_eq!(
        stream.message().await.unwrap(),
        None,
        "OK, so that KEDA reconnects without back-off"
    );
    scaler.stop().await;
}

#[tokio::test]
async fn decisions_and_metrics_tell_why() {
    let mut servers = Servers::default();
    let engine = Engine::default();
    engine.set(0.9, 9, 9);
    let address = servers.engine(&engine).await;
    let mut scaler = Scaler::start(
        Settings::default(),
        world(1, 1, vec![pod("a", address)], &[]),
    )
    .await;
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["binding"] == "kvCache"
        })
        .await;
    let (status, page) = scaler.admin_page("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "penstock_scaler_desired_replicas{namespace=\"team\",scaled_object=\"chat\"} 3",
        "penstock_scaler_target_held{namespace=\"team\",scaled_object=\"chat\"} 1",
        "penstock_scaler_decision_changes_total{bound=\"kvCache\"} 1",
        "penstock_scaler_targets 1",
        "penstock_scaler_grpc_calls_total{rpc=\"GetMetrics\",code=\"OK\"}",
    ] {
        assert!(page.contains(line), "{line} in {page}");
    }
    scaler.stop().await;
}
