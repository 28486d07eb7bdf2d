//! From scripted engines, gateways and Prometheus servers to the number that KEDA gets.

use penstock_core::load::BackendLoad;
use penstock_scaler::args::Settings;

use crate::scripted::{BACKEND, Engine, Scaler, ScriptedGateway, Servers, pod, world};

const VLLM: &str = include_str!("../../../core/tests/fixtures/vllm-0.32.txt");

#[tokio::test]
async fn idle_pool_of_real_vllm_pages_stays_at_its_minimum() {
    let mut servers = Servers::default();
    let engine = Engine::default();
    engine.set_page(VLLM);
    let address = servers.engine(&engine).await;
    let mut scaler = Scaler::start(
        Settings::default(),
        world(1, 1, vec![pod("a", address)], &[]),
    )
    .await;
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["inputs"]["fresh"] == 1
                && decision["reasons"]["kvCache"] == 0
                && decision["replicas"] == 1
        })
        .await;
    assert_eq!(scaler.metric(BACKEND).await.unwrap(), 1.0);
    assert!(
        scaler.active(BACKEND).await.unwrap(),
        "a minimum of 1 is always active"
    );
    scaler.stop().await;
}

#[tokio::test]
async fn filling_kv_cache_scales_up_and_lost_scrapes_hold() {
    let mut servers = Servers::default();
    let engines = [Engine::default(), Engine::default()];
    let mut pods = Vec::new();
    for (name, engine) in ["a", "b"].iter().zip(&engines) {
        engine.set(0.2, 4, 0);
        pods.push(pod(name, servers.engine(engine).await));
    }
    // A hand-written ScaledObject: a selector instead of a backend.
    let foreign = [
        ("selector", "app=vllm"),
        ("kvCacheUtilizationPercent", "50"),
    ];
    let mut scaler = Scaler::start(Settings::default(), world(1, 2, pods, &[])).await;
    scaler.wait_for_metric(&foreign, 2.0).await;
    for engine in &engines {
        engine.set(0.95, 19, 0);
    }
    scaler.wait_for_metric(&foreign, 4.0).await;
    for engine in &engines {
        engine.set_broken();
    }
    scaler
        .wait_for_decision(&foreign, |decision| decision["reasons"]["hold"] == "stale")
        .await;
    assert_eq!(
        scaler.metric(&foreign).await.unwrap(),
        4.0,
        "no data is no reason to shrink"
    );
    scaler.stop().await;
}

#[tokio::test]
async fn requests_waiting_too_long_scale_up_while_kv_is_empty() {
    let mut servers = Servers::default();
    let (engine, gateway) = (Engine::default(), ScriptedGateway::new());
    engine.set(0.04, 8, 4);
    let (pods, admin) = (
        vec![pod("a", servers.engine(&engine).await)],
        servers.gateway(&gateway).await,
    );
    let mut scaler = Scaler::start(Settings::default(), world(1, 1, pods, &[admin])).await;
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["inputs"]["ledger"] == "fresh"
                && decision["reasons"]["inputs"]["fresh"] == 1
        })
        .await;
    assert_eq!(scaler.metric(BACKEND).await.unwrap(), 1.0);
    let ages = vec![900, 800, 700, 600];
    gateway.set(BackendLoad {
        arrivals: 12,
        in_flight: 12,
        waiting: 4,
        waiting_ages_ms: ages,
        ..BackendLoad::default()
    });
    scaler.wait_for_metric(BACKEND, 2.0).await;
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["binding"] == "ttft"
                && decision["reasons"]["inputs"]["ttft"]["overdue"] == 4.0
        })
        .await;
    scaler.stop().await;
}

#[tokio::test]
async fn lost_gateway_is_seen_and_found_again() {
    let mut servers = Servers::default();
    let (engine, gateway) = (Engine::default(), ScriptedGateway::new());
    engine.set(0.0, 0, 0);
    let pods = vec![pod("a", servers.engine(&engine).await)];
    let nobody = Servers::default().text(String::new()).await;
    let mut scaler = Scaler::start(Settings::default(), world(1, 1, pods.clone(), &[nobody])).await;
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["inputs"]["ledger"] == "stale"
        })
        .await;
    let admin = servers.gateway(&gateway).await;
    scaler
        .world
        .send_replace(world(1, 1, pods, &[admin]).into());
    scaler
        .wait_for_decision(BACKEND, |decision| {
            decision["reasons"]["inputs"]["ledger"] == "fresh"
        })
        .await;
    scaler.stop().await;
}

#[tokio::test]
async fn prometheus_server_is_asked_only_if_allowed() {
    let mut servers = Servers::default();
    let answer = r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"2.9"]}]}}"#;
    let server = format!("http://{}", servers.text(answer.to_owned()).await);
    let settings = Settings {
        allowed_prometheus: vec![server.clone()],
        ..Settings::default()
    };
    let mut scaler = Scaler::start(settings, world(1, 1, vec![], &[])).await;
    let metadata = [
        ("prometheus", server.as_str()),
        ("kvCacheQuery", "sum(vllm:kv_cache_usage_perc)"),
    ];
    scaler.wait_for_metric(&metadata, 4.0).await;
    let elsewhere = [("prometheus", "http://127.0.0.1:1"), ("kvCacheQuery", "up")];
    let status = scaler.metric(&elsewhere).await.unwrap_err();
    assert!(
        status.message().contains("--allowed-prometheus"),
        "{}",
        status.message()
    );
    scaler.stop().await;
}
