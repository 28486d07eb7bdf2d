//! Health checks: endpoints that fail them come after all others, and come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use penstock_core::config::HealthCheck;

use crate::harness::{Gateway, Plan, Reply, SOON, Upstream, chat, until};

/// Answers calls always, and checks while it is well.
async fn upstream(name: &'static str, is_well: &Arc<AtomicBool>) -> Upstream {
    let is_well = Arc::clone(is_well);
    Upstream::start(move |_, request| {
        let status = if is_well.load(Ordering::SeqCst) {
            200
        } else {
            503
        };
        match request.line.as_str() {
            "GET /healthz?deep=1 HTTP/1.1" => Reply::Json(status, String::new()),
            _ => Reply::Json(200, format!("{{\"name\":\"{name}\"}}")),
        }
    })
    .await
}

fn checked(plan: Plan) -> Plan {
    let check = HealthCheck {
        path: "/healthz?deep=1".to_owned(),
        interval_ms: 100,
        timeout_ms: 100,
        unhealthy_threshold: 2,
        healthy_threshold: 1,
    };
    plan.profile("a", |profile| profile.health_check = Some(check))
}

async fn answers(gateway: &Gateway, name: &str) -> bool {
    gateway.post(&chat(false)).await.body.contains(name)
}

async fn comes_to_answer(gateway: &Gateway, name: &str) {
    let answered = tokio::time::timeout(SOON, async { while !answers(gateway, name).await {} });
    assert!(answered.await.is_ok(), "{name} does not answer");
}

#[tokio::test]
async fn an_endpoint_that_fails_its_check_comes_after_all_others_until_it_passes() {
    let is_well = Arc::new(AtomicBool::new(true));
    let always = Arc::new(AtomicBool::new(true));
    let first = upstream("first", &is_well).await;
    let second = upstream("second", &always).await;
    let plan = checked(Plan::chain(&[first.address, second.address]));
    let gateway = Gateway::start(&plan).await;
    assert!(answers(&gateway, "first").await);
    is_well.store(false, Ordering::SeqCst);
    comes_to_answer(&gateway, "second").await;
    is_well.store(true, Ordering::SeqCst);
    comes_to_answer(&gateway, "first").await;
}

#[tokio::test]
async fn where_all_fail_their_checks_they_are_used_all_the_same() {
    let is_well = Arc::new(AtomicBool::new(false));
    let only = upstream("only", &is_well).await;
    let gateway = Gateway::start(&checked(Plan::chain(&[only.address]))).await;
    let checks = || {
        let requests = only.requests();
        let checks = requests
            .iter()
            .filter(|request| request.line.starts_with("GET"));
        checks.count()
    };
    until("it was checked often enough", || checks() > 3).await;
    assert!(answers(&gateway, "only").await);
}
