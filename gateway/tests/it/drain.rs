//! Stopping: nobody new, everybody inside finishes, nothing waits for ever.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedSender;

use crate::harness::*;

#[tokio::test]
async fn streams_finish_while_nobody_new_is_let_in() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let mut gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut idle = gateway.client().await;
    let mut client = gateway.begun(&steps).await;

    gateway.shutdown.cancel();
    assert!(idle.closed().await, "idle connections end at once");
    let address = gateway.address;
    within("connections are refused", async {
        while TcpStream::connect(address).await.is_ok() {}
    })
    .await;
    assert_eq!(gateway.admin_get("/readyz").await.status, 503);
    assert_eq!(gateway.admin_get("/healthz").await.status, 200);

    steps.send(Step::Chunk(word("two"))).unwrap();
    client.expect(&word("two")).await;
    finish(&mut client, &steps).await;
    assert!(client.closed().await, "the connection ends with its answer");
    gateway.ended().await.unwrap();
}

#[tokio::test]
async fn during_the_delay_requests_are_answered_and_told_to_go() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.drain_delay = Duration::from_secs(3);
    let mut gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    gateway.shutdown.cancel();
    within("readiness is off", async {
        while gateway.admin_get("/readyz").await.status != 503 {}
    })
    .await;
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.header("connection")), (200, "close"));
    assert!(client.closed().await);
    gateway.ended().await.unwrap();
    assert!(TcpStream::connect(gateway.address).await.is_err());
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_cut() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let mut settings = settings();
    settings.drain = Duration::from_millis(100);
    let mut gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("the request is upstream", || upstream.count() == 1).await;
    gateway.shutdown.cancel();
    gateway.ended().await.unwrap();
    assert!(client.closed().await);
    until("upstream is closed", || upstream.gone() == 1).await;
}

/// A path, a call to it, how its stream begins at the backend, and whether an event tells in its protocol that the
/// gateway stops.
type Wired = (&'static str, String, String, fn(&Value) -> bool);

fn wires() -> [Wired; 3] {
    let message = json!({"model": "chat", "max_tokens": 5, "stream": true, "messages": [{"role": "user", "content": "Hi"}]});
    let response = json!({"model": "chat", "stream": true, "input": "Hi"});
    let delta = json!({"type": "response.output_text.delta", "delta": "one"});
    [
        ("/v1/chat/completions", chat(true), word("one"), |event| {
            event["error"]["code"] == "stream_stopping"
        }),
        ("/v1/messages", message.to_string(), word("one"), |event| {
            event["type"] == "error" && event["error"]["type"] == "api_error"
        }),
        (
            "/v1/responses",
            response.to_string(),
            format!("event: response.output_text.delta\ndata: {delta}\n\n"),
            |event| event["type"] == "error" && event["code"] == "stream_stopping",
        ),
    ]
}

fn last_event(body: &str) -> Value {
    let mut data = body.lines().filter_map(|line| line.strip_prefix("data: "));
    serde_json::from_str(data.next_back().unwrap()).unwrap()
}

/// A gateway that gives streams little time, and a backend whose stream has begun with `first` and stays open.
async fn with_open_stream(first: String) -> (Upstream, Gateway, UnboundedSender<Step>) {
    let (steps, reply) = driven();
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(first)).unwrap();
    let upstream = Upstream::replies(vec![reply]).await;
    let mut settings = settings();
    settings.drain = Duration::from_millis(100);
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    (upstream, gateway, steps)
}

#[tokio::test]
async fn a_stream_that_does_not_finish_in_time_ends_in_an_error_event() {
    for (path, body, first, says_so) in wires() {
        let (upstream, mut gateway, _steps) = with_open_stream(first).await;
        let mut client = gateway.client().await;
        client.post_to(path, "", &body).await;
        until("the request is upstream", || upstream.count() == 1).await;
        let (status, headers) = client.head().await;
        assert_eq!(
            (status, headers["transfer-encoding"].as_str()),
            (200, "chunked")
        );
        gateway.shutdown.cancel();
        let mut got = String::new();
        while let Some(chunk) = client.chunk().await.unwrap() {
            got.push_str(&chunk);
        }
        assert!(got.contains("one") && says_so(&last_event(&got)), "{got}");
        assert!(!got.contains("[DONE]"));
        gateway.ended().await.unwrap();
        until("upstream is closed", || upstream.gone() == 1).await;
    }
}

#[tokio::test]
async fn a_stream_over_http_2_that_does_not_finish_in_time_ends_in_an_error_event() {
    for (path, body, first, says_so) in wires() {
        let (upstream, mut gateway, _steps) = with_open_stream(first).await;
        let mut client = H2Client::connect(gateway.address).await;
        let answer = client.begin(path, &body).await;
        assert_eq!(answer.status(), 200);
        gateway.shutdown.cancel();
        let got = text(answer).await;
        assert!(got.contains("one") && says_so(&last_event(&got)), "{got}");
        gateway.ended().await.unwrap();
        until("upstream is closed", || upstream.gone() == 1).await;
    }
}

#[tokio::test]
async fn a_stream_with_heartbeats_only_ends_in_an_error_event_too() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let mut settings = settings();
    settings.drain = Duration::from_millis(100);
    let plan = Plan::chain(&[upstream.address]).rule(|rule| rule.heartbeat_ms = Some(1_000));
    let mut gateway = Gateway::start_with(&plan, settings).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    assert_eq!(client.head().await.0, 200);
    gateway.shutdown.cancel();
    let mut got = String::new();
    while let Some(chunk) = client.chunk().await.unwrap() {
        got.push_str(&chunk);
    }
    assert_eq!(last_event(&got)["error"]["code"], "stream_stopping");
    gateway.ended().await.unwrap();
}

#[tokio::test]
async fn what_a_drain_cuts_is_counted_as_such() {
    let (_upstream, gateway, _steps) = with_open_stream(word("one")).await;
    // Nobody can tell this one, so that the gateway stays for the last second.
    let mut other = gateway.client().await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    assert_eq!(client.head().await.0, 200);
    other
        .send("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        .await;
    gateway
        .metric_is("penstock_gateway_in_flight_requests", 2.0)
        .await;
    gateway.shutdown.cancel();
    let series = "penstock_gateway_requests_total{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"stopping\"}";
    gateway.metric_is(series, 1.0).await;
}

#[tokio::test]
async fn a_gateway_without_requests_stops_at_once() {
    let mut settings = settings();
    settings.drain = Duration::from_mins(10);
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    assert_eq!(client.answer().await.status, 200);
    gateway.shutdown.cancel();
    gateway.ended().await.unwrap();
    assert!(client.closed().await);
}

#[tokio::test]
async fn half_a_head_holds_a_drain_up_for_the_header_timeout_only() {
    let mut settings = settings();
    settings.drain = Duration::from_mins(10);
    settings.limits.header_timeout = Duration::from_millis(500);
    let mut gateway = Gateway::start_with(&Plan::chain(&[nobody()]), settings).await;
    let mut client = gateway.client().await;
    client.send("POST /v1/chat").await;
    gateway.shutdown.cancel();
    gateway.ended().await.unwrap();
    assert!(client.closed().await);
}

#[tokio::test]
async fn a_held_request_is_answered_during_a_drain() {
    let upstream = Upstream::always(|| json_answer("late")).await;
    let mut plan = Plan::chain(&[nobody()]);
    plan.set_endpoints("a", &[]);
    let mut gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    gateway
        .metric_is("penstock_gateway_held_requests", 1.0)
        .await;
    gateway.shutdown.cancel();
    plan.set_endpoints("a", &[upstream.address]);
    gateway.apply(&plan).await;
    assert_eq!(client.answer().await.body, completion("late"));
    gateway.ended().await.unwrap();
}
