//! Health checks: endpoints that fail them come after all others, and come back. So do engines that are frozen.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use penstock_core::config::HealthCheck;

use crate::harness::*;

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

/// Answers nothing at all while it is frozen, as a process that is stopped: connections are made, and that is all.
async fn freezing(is_frozen: &Arc<AtomicBool>) -> Upstream {
    let is_frozen = Arc::clone(is_frozen);
    Upstream::start(move |_, request| {
        if is_frozen.load(Ordering::SeqCst) {
            Reply::Silent
        } else if request.line.starts_with("GET ") {
            Reply::Json(404, String::new())
        } else {
            json_answer("x")
        }
    })
    .await
}

fn asked(upstream: &Upstream, method: &str) -> usize {
    let requests = upstream.requests();
    let of_method = requests
        .iter()
        .filter(|request| request.line.starts_with(method));
    of_method.count()
}

/// How the first endpoint of the first candidate stands.
async fn standing(gateway: &Gateway) -> String {
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &chat(false)).await;
    let told: serde_json::Value = serde_json::from_str(&client.answer().await.body).unwrap();
    let standing = &told["candidates"][0]["endpoints"][0]["standing"];
    standing.as_str().unwrap().to_owned()
}

async fn comes_to_stand(gateway: &Gateway, wanted: &str) {
    within(wanted, async { while standing(gateway).await != wanted {} }).await;
}

#[tokio::test]
async fn a_frozen_engine_is_left_where_nothing_is_streamed_and_used_again_when_it_answers() {
    let is_frozen = Arc::new(AtomicBool::new(true));
    let never = Arc::new(AtomicBool::new(false));
    let frozen = freezing(&is_frozen).await;
    let (second, third) = (freezing(&never).await, freezing(&never).await);
    let addresses = [frozen.address, second.address, third.address];
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.strategy = penstock_core::config::Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    let mut stuck = Vec::new();
    while asked(&frozen, "POST ") == 0 {
        let sent = [&frozen, &second, &third].map(|one| asked(one, "POST "));
        let mut client = gateway.client().await;
        client.post("", &chat(false)).await;
        stuck.push(client);
        until("it is sent", || {
            [&frozen, &second, &third].map(|one| asked(one, "POST ")) != sent
        })
        .await;
    }
    // `doubt` has a test of how long this takes at most.
    comes_to_stand(&gateway, "quiet").await;
    for _ in 0..12 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(asked(&frozen, "POST "), 1, "it gets nothing more");
    // Those who wait there leave, and it is still known for what it is.
    drop(stuck);
    until("the call is given up", || frozen.gone() > 0).await;
    for _ in 0..6 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(asked(&frozen, "POST "), 1);
    is_frozen.store(false, Ordering::SeqCst);
    comes_to_stand(&gateway, "good").await;
    // On a busy machine it may have been slower than its peers just now, and get less for a while.
    within("it is asked again", async {
        while asked(&frozen, "POST ") == 1 {
            assert_eq!(gateway.post(&chat(false)).await.status, 200);
        }
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_takes_its_time_is_no_frozen_one() {
    let slow = Upstream::start(|_, request| match request.line.as_str() {
        "GET /v1/models HTTP/1.1" => Reply::Json(404, String::new()),
        _ => Reply::Silent,
    })
    .await;
    let gateway = Gateway::start(&Plan::new().backend("a", &[slow.address], 1, 0)).await;
    let mut waiting = gateway.client().await;
    waiting.post("", &chat(false)).await;
    until("it was asked whether it is there", || {
        asked(&slow, "GET ") > 1
    })
    .await;
    assert_eq!(standing(&gateway).await, "good");
}
