//! One request to several backends at once.

use std::time::Duration;

use penstock_core::config::{FanOut, FanOutMode, Streaming};
use serde_json::{Value, json};

use crate::harness::*;

fn fanned(upstreams: &[&Upstream], mode: FanOutMode, max: u32) -> Plan {
    let addresses: Vec<_> = upstreams.iter().map(|upstream| upstream.address).collect();
    Plan::chain(&addresses).rule(|rule| {
        rule.fan_out = Some(FanOut {
            mode,
            max,
            within_ms: 400,
        });
    })
}

fn words(text: &str) -> Reply {
    Reply::Sse(vec![role(), word(text), DONE.to_owned()])
}

fn busy() -> Reply {
    Reply::Json(503, shaped_error("busy"))
}

async fn explained(gateway: &Gateway, body: &str) -> Answer {
    gateway.post_with("x-penstock-explain: 1\r\n", body).await
}

/// Requests in flight at all endpoints.
async fn in_flight(gateway: &Gateway) -> u64 {
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &chat(true)).await;
    let told: Value = serde_json::from_str(&client.answer().await.body).unwrap();
    let candidates = told["candidates"].as_array().unwrap();
    let endpoints = candidates
        .iter()
        .map(|candidate| &candidate["endpoints"][0]);
    endpoints.map(|one| one["inFlight"].as_u64().unwrap()).sum()
}

#[tokio::test]
async fn the_first_to_answer_is_the_answer_and_the_others_are_ended() {
    let silent = Upstream::always(|| Reply::Silent).await;
    let (whole, stream) = (json_answer as fn(&str) -> Reply, words as fn(&str) -> Reply);
    let quick = Upstream::start(move |_, received| {
        let is_stream = received.body.contains("\"stream\":true");
        (if is_stream { stream } else { whole })("b")
    })
    .await;
    let gateway = Gateway::start(&fanned(&[&silent, &quick], FanOutMode::First, 8)).await;
    for (number, is_stream) in [true, false].into_iter().enumerate() {
        let answer = explained(&gateway, &chat(is_stream)).await;
        assert_eq!(
            (answer.status, answer.header("x-penstock-backend")),
            (200, "ns/b")
        );
        assert_eq!(answer.header("x-penstock-attempts"), "2");
        let decision = answer.header("x-penstock-decision");
        assert!(decision.ends_with("; First of 2"), "{decision}");
        assert_eq!(answer.body.ends_with(DONE), is_stream);
        until("the loser is gone", || silent.gone() == number + 1).await;
    }
    assert_eq!((silent.count(), quick.count()), (2, 2));
    assert_eq!(in_flight(&gateway).await, 0);
}

#[tokio::test]
async fn one_that_fails_does_not_win() {
    let fails = Upstream::always(busy).await;
    let late = Duration::from_millis(100);
    let works = Upstream::always(move || Reply::Late(late, completion("b"))).await;
    let gateway = Gateway::start(&fanned(&[&fails, &works], FanOutMode::First, 8)).await;
    let answer = explained(&gateway, &chat(false)).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/b")
    );
    let decision = answer.header("x-penstock-decision");
    assert!(
        decision.contains("after ns/a status_5xx; First of 2"),
        "{decision}"
    );
}

#[tokio::test]
async fn one_that_refuses_wins_only_where_none_answers() {
    let refuses = Upstream::always(|| Reply::Json(400, shaped_error("no"))).await;
    let late = Duration::from_millis(100);
    let works = Upstream::always(move || Reply::Late(late, completion("b"))).await;
    let gateway = Gateway::start(&fanned(&[&refuses, &works], FanOutMode::First, 8)).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/b")
    );
    for other in [refuses, Upstream::always(busy).await] {
        let refuses = Upstream::always(|| Reply::Json(400, shaped_error("no"))).await;
        let gateway = Gateway::start(&fanned(&[&other, &refuses], FanOutMode::First, 8)).await;
        let answer = gateway.post(&chat(false)).await;
        assert_eq!((answer.status, answer.body), (400, shaped_error("no")));
        assert_eq!(refuses.count(), 1);
    }
}

#[tokio::test]
async fn no_more_are_asked_than_may_and_what_follows_goes_to_one() {
    let (a, b) = (Upstream::always(busy).await, Upstream::always(busy).await);
    let third = Upstream::always(|| json_answer("c")).await;
    let gateway = Gateway::start(&fanned(&[&a, &b, &third], FanOutMode::First, 2)).await;
    let answer = explained(&gateway, &chat(false)).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/c")
    );
    assert_eq!(answer.header("x-penstock-attempts"), "3");
    assert_eq!((a.count(), b.count(), third.count()), (1, 1, 1));
}

#[tokio::test]
async fn attempts_end_where_the_rule_says() {
    let (a, b, c) = (
        Upstream::always(busy).await,
        Upstream::always(busy).await,
        Upstream::always(busy).await,
    );
    let plan = fanned(&[&a, &b, &c], FanOutMode::First, 2).rule(|rule| rule.retry.attempts = 2);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 503);
    assert_eq!((a.count(), b.count(), c.count()), (1, 1, 0));
}

#[tokio::test]
async fn all_answers_come_in_one_document_and_each_is_counted() {
    let usage = r#""usage":{"prompt_tokens":1000,"completion_tokens":100}"#;
    let body = format!(r#"{{"choices":[{{"message":{{"content":"x"}}}}], {usage}}}"#);
    let good = {
        let body = body.clone();
        move || Reply::Json(200, body.clone())
    };
    let (a, b) = (
        Upstream::always(good.clone()).await,
        Upstream::always(good).await,
    );
    let refuses = Upstream::always(|| Reply::Json(400, shaped_error("no"))).await;
    let (silent, unreachable) = (Upstream::always(|| Reply::Silent).await, nobody());
    let plan =
        fanned(&[&a, &b, &refuses, &silent], FanOutMode::All, 8).backend("e", &[unreachable], 1, 5);
    let gateway = Gateway::start(&plan).await;
    let answer = explained(&gateway, &chat(false)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("x-penstock-attempts"), "5");
    assert!(answer.body.contains(&body), "not a byte of a body changes");
    let told: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(told["object"], "list");
    let parts = told["data"].as_array().unwrap();
    let part = |part: &Value| json!([part["backend"], part["status"], part["error"]["code"]]);
    let parts: Vec<Value> = parts.iter().map(part).collect();
    let refused: Value = serde_json::from_str(&shaped_error("no")).unwrap();
    assert_eq!(
        parts,
        [
            json!(["ns/a", 200, null]),
            json!(["ns/b", 200, null]),
            json!(["ns/c", 400, refused["error"]["code"]]),
            json!(["ns/d", 504, "upstream_timeout"]),
            json!(["ns/e", 503, "upstream_unreachable"]),
        ]
    );
    until("the late one is ended", || silent.gone() == 1).await;
    for backend in ["ns/a", "ns/b"] {
        let labels = format!("{{rule=\"ns/policy/chat\",backend=\"{backend}\",outcome=\"ok\"}}");
        let series = format!("penstock_gateway_requests_total{labels}");
        gateway.metric_is(&series, 1.0).await;
    }
    let metrics = gateway.metrics().await;
    let tokens = metrics.lines().filter(|line| {
        line.starts_with("gen_ai_client_token_usage_sum") && line.ends_with(" 1000.0")
    });
    assert_eq!(tokens.count(), 2, "{metrics}");
}

#[tokio::test]
async fn a_document_is_no_stream() {
    let upstreams = [
        Upstream::always(|| json_answer("a")).await,
        Upstream::always(|| json_answer("b")).await,
    ];
    let [a, b] = &upstreams;
    let plan = fanned(&[a, b], FanOutMode::All, 8);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (answer.status, answer.code()),
        (400, "invalid_field".to_owned())
    );
    assert_eq!(a.count() + b.count(), 0);
    gateway
        .apply(&plan.rule(|rule| rule.streaming = Streaming::Buffered))
        .await;
    let body = chat(true).replace("\"stream\":true", "\"stream\": true,\"stream_options\":{}");
    let answer = gateway.post(&body).await;
    let told: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        (answer.status, told["data"].as_array().unwrap().len()),
        (200, 2)
    );
    let sent = chat(true).replace(
        "\"stream\":true",
        "\"stream\": false,\"stream_options\":null",
    );
    assert_eq!(a.requests()[0].body, sent);
}

#[tokio::test]
async fn where_none_answers_well_the_caller_is_told_as_ever() {
    let (a, b) = (
        Upstream::always(busy).await,
        Upstream::always(|| Reply::Silent).await,
    );
    let gateway = Gateway::start(&fanned(&[&a, &b], FanOutMode::All, 8)).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body), (503, shaped_error("busy")));
    assert_eq!((a.count(), b.count()), (1, 1), "nothing is repeated");
}

#[tokio::test]
async fn an_answer_that_is_too_large_is_an_error_in_its_place() {
    let large = completion(&"x".repeat(1 << 20));
    let large = Upstream::always(move || Reply::Json(200, large.clone())).await;
    let long = completion(&"y".repeat(600_000));
    let sent = long.clone();
    let long = Upstream::always(move || Reply::Json(200, sent.clone())).await;
    let gateway = Gateway::start(&fanned(&[&large, &long], FanOutMode::All, 8)).await;
    let answer = gateway.post(&chat(false)).await;
    let told: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(told["data"][0]["error"]["code"], "too_large");
    let content = &told["data"][1]["body"]["choices"][0]["message"]["content"];
    assert_eq!(content.as_str().unwrap().len(), 600_000);
    assert_eq!(answer.header("x-penstock-backend"), "ns/b");
}
