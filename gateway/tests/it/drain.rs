//! Stopping: nobody new, everybody inside finishes, nothing waits for ever.

use std::time::Duration;

use tokio::net::TcpStream;

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

#[tokio::test]
async fn a_stream_that_does_not_finish_in_time_is_cut() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let mut settings = settings();
    settings.drain = Duration::from_millis(100);
    let mut gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut client = gateway.begun(&steps).await;
    gateway.shutdown.cancel();
    gateway.ended().await.unwrap();
    assert_eq!(client.chunk().await, Err(()), "a cut is no end");
    until("upstream is closed", || upstream.gone() == 1).await;
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
