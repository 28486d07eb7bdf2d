//! What happens at each limit, and to requests that are wrong.

use std::fmt::Write as _;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;

use crate::harness::*;

async fn raw(gateway: &Gateway, request: &str) -> Answer {
    let mut client = gateway.client().await;
    client.send(request).await;
    client.answer().await
}

#[tokio::test]
async fn wrong_requests_are_refused_in_the_openai_shape() {
    let gateway = Gateway::start(&Plan::chain(&[nobody()])).await;
    let mut shown = String::new();
    for (what, request) in [
        ("path", "GET /v2/nothing HTTP/1.1\r\nhost: x\r\n\r\n".to_owned()),
        ("method", "GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n".to_owned()),
        ("json", "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n{x}".to_owned()),
        ("no model", "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}".to_owned()),
        ("model", "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 16\r\n\r\n{\"model\":\"nope\"}".to_owned()),
        ("encoding", "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}".to_owned()),
        ("loop", "POST /v1/completions HTTP/1.1\r\nhost: x\r\nvia: 1.1 a, 1.1 penstock-ns-gateway\r\ncontent-length: 2\r\n\r\n{}".to_owned()),
    ] {
        let answer = raw(&gateway, &request).await;
        let headers = format!("{} {}", answer.header("content-type"), answer.header("allow"));
        writeln!(shown, "{what}: {} {}\n{}", answer.status, headers.trim(), answer.body).unwrap();
        assert_eq!(answer.header("x-request-id").len(), 32);
    }
    insta::assert_snapshot!(shown);
}

#[tokio::test]
async fn bodies_beyond_the_limit_are_refused_announced_or_not() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.limits.body_bytes = 1000;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let exact = |size: usize| format!("{{\"model\":\"chat\",\"x\":\"{}\"}}", "x".repeat(size - 23));
    assert_eq!(exact(1000).len(), 1000);
    assert_eq!(gateway.post(&exact(1000)).await.status, 200);
    let answer = gateway.post(&exact(1001)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (413, "body_too_large")
    );
    let body = exact(1001);
    let chunked = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{}{}0\r\n\r\n",
        chunk(&body[..500]),
        chunk(&body[500..])
    );
    assert_eq!(raw(&gateway, &chunked).await.status, 413);
    let body = exact(900);
    let chunked = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{}{}0\r\n\r\n",
        chunk(&body[..500]),
        chunk(&body[500..])
    );
    assert_eq!(raw(&gateway, &chunked).await.status, 200);
    assert_eq!(upstream.requests().last().unwrap().body, body);
}

#[tokio::test]
async fn a_caller_that_sends_far_too_much_can_read_why_it_was_refused() {
    let mut settings = settings();
    settings.limits.body_bytes = 1000;
    let gateway = Gateway::start_with(&Plan::chain(&[nobody()]), settings).await;
    for headers in [
        "content-length: 50000000\r\n",
        "transfer-encoding: chunked\r\n",
    ] {
        let mut client = gateway.client().await;
        client
            .send(&format!(
                "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{headers}\r\n"
            ))
            .await;
        let piece = chunk(&" ".repeat(60 << 10));
        let (mut sent, mut open) = (0, true);
        while sent < 50_000_000 && open {
            sent += piece.len();
            open = within("a write", client.stream.write_all(piece.as_bytes()))
                .await
                .is_ok();
        }
        assert!(open, "reset while it was sending");
        let answer = client.answer().await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (413, "body_too_large")
        );
    }
}

#[tokio::test]
async fn all_bodies_together_are_bounded() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let mut settings = settings();
    settings.limits.total_body_bytes = 150 << 10;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let body = format!("{{\"model\":\"chat\",\"x\":\"{}\"}}", "x".repeat(192 << 10));
    let mut first = gateway.client().await;
    first.post("", &body).await;
    until("the first is upstream", || upstream.count() == 1).await;
    let answer = gateway.post(&body).await;
    assert_eq!(
        (
            answer.status,
            answer.code().as_str(),
            answer.header("retry-after")
        ),
        (503, "overloaded", "1")
    );
    drop(first);
    until("the first is gone", || upstream.gone() == 1).await;
    let mut third = gateway.client().await;
    third.post("", &body).await;
    until("there is room again", || upstream.count() == 2).await;
}

#[tokio::test]
async fn caller_that_announces_a_large_body_and_is_silent_keeps_nobody_out() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.limits.total_body_bytes = 150 << 10;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut silent = gateway.client().await;
    silent
        .send("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9000000\r\n\r\n")
        .await;
    assert_eq!(silent.head().await.0, 100, "its body is awaited");
    let body = format!("{{\"model\":\"chat\",\"x\":\"{}\"}}", "x".repeat(192 << 10));
    assert_eq!(gateway.post(&body).await.status, 200);
}

#[tokio::test]
async fn headers_beyond_the_limits_are_refused() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.limits.header_bytes = 2000;
    settings.limits.headers = 20;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let large = format!("x-large: {}\r\n", "x".repeat(3000));
    let answer = gateway.post_with(&large, &chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (431, "headers_too_large")
    );
    let many = "x-one-more: 1\r\n".repeat(25);
    assert_eq!(gateway.post_with(&many, &chat(false)).await.status, 431);
    let huge = format!("x-large: {}\r\n", "x".repeat(100_000));
    assert_eq!(gateway.post_with(&huge, &chat(false)).await.status, 431);
    assert_eq!(upstream.count(), 0);
    assert_eq!(
        gateway
            .post_with("x-small: 1\r\n", &chat(false))
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn requests_at_one_time_are_bounded() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let mut settings = settings();
    settings.limits.requests = 2;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = gateway.client().await;
        client.post("", &chat(true)).await;
        clients.push(client);
    }
    until("two are upstream", || upstream.count() == 2).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (
            answer.status,
            answer.code().as_str(),
            answer.header("retry-after")
        ),
        (503, "overloaded", "1")
    );
    drop(clients);
    until("both are gone", || upstream.gone() == 2).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("there is room again", || upstream.count() == 3).await;
}

#[tokio::test]
async fn connections_at_one_time_are_bounded() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.limits.connections = 1;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut first = gateway.client().await;
    first.post("", &chat(false)).await;
    assert_eq!(first.answer().await.status, 200);
    let mut second = gateway.client().await;
    second.post("", &chat(false)).await;
    first.post("", &chat(false)).await;
    assert_eq!(first.answer().await.status, 200);
    assert_eq!(upstream.count(), 2, "the second waits in the backlog");
    drop(first);
    assert_eq!(second.answer().await.status, 200);
}

#[tokio::test]
async fn a_head_that_does_not_come_closes_the_connection() {
    let mut settings = settings();
    settings.limits.header_timeout = Duration::from_millis(200);
    let gateway = Gateway::start_with(&Plan::chain(&[nobody()]), settings).await;
    let mut silent = gateway.client().await;
    let mut slow = gateway.client().await;
    slow.send("POST /v1/chat").await;
    assert!(silent.closed().await && slow.closed().await);
}

#[tokio::test]
async fn an_idle_connection_outlives_the_header_timeout_but_not_its_own() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.limits.header_timeout = Duration::from_millis(100);
    settings.limits.idle_timeout = Duration::from_secs(2);
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut client = gateway.client().await;
    client.post("", &chat(false)).await;
    assert_eq!(client.answer().await.status, 200);
    let quiet = tokio::time::timeout(Duration::from_millis(300), client.closed()).await;
    assert!(quiet.is_err(), "closed after the header timeout");
    assert!(client.closed().await);
}

#[tokio::test]
async fn a_body_that_does_not_come_is_refused_in_time() {
    let mut settings = settings();
    settings.limits.body_timeout = Duration::from_millis(100);
    let gateway = Gateway::start_with(&Plan::chain(&[nobody()]), settings).await;
    let answer = raw(
        &gateway,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{",
    )
    .await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (408, "body_timeout")
    );
}

#[tokio::test]
async fn a_caller_that_does_not_read_is_cut_and_the_backend_is_freed() {
    let upstream = Upstream::always(|| {
        let (steps, reply) = driven();
        steps.send(Step::Write(sse_head())).unwrap();
        for _ in 0..400 {
            steps
                .send(Step::Chunk(word(&"x".repeat(60 << 10))))
                .unwrap();
        }
        // The driver stays, or the script would end here.
        std::mem::forget(steps);
        reply
    })
    .await;
    let mut settings = settings();
    settings.limits.write_timeout = Duration::from_millis(300);
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    let series = "penstock_gateway_requests_total{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"client_gone\"}";
    gateway.metric_is(series, 1.0).await;
    drop(client);
}

#[tokio::test]
async fn a_backend_that_leads_back_into_the_gateway_is_refused() {
    let good = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::empty(settings()).await;
    gateway.apply(&Plan::chain(&[gateway.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (508, "loop_detected")
    );
    let loops = "penstock_gateway_requests_total{rule=\"\",backend=\"\",outcome=\"loop_detected\"}";
    let attempts = gateway.metric(loops).await;
    assert!((1.0..=3.0).contains(&attempts), "{attempts}");

    // One other gateway in between.
    let between = Gateway::empty({
        let mut settings = settings();
        settings.gateway = id("between");
        settings
    })
    .await;
    between.apply(&Plan::chain(&[gateway.address])).await;
    gateway
        .apply(&Plan::chain(&[between.address]).rule(|rule| rule.retry.attempts = 1))
        .await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (508, "loop_detected")
    );

    gateway
        .apply(&Plan::chain(&[between.address, good.address]))
        .await;
    assert_eq!(gateway.post(&chat(false)).await.body, completion("x"));
}

#[tokio::test]
async fn a_model_name_is_shown_back_shortened_and_as_text() {
    let gateway = Gateway::start(&Plan::chain(&[nobody()])).await;
    for model in ["<b>\\\"\u{1F600}".to_owned(), "x".repeat(100_000)] {
        let answer = gateway.post(&format!("{{\"model\":\"{model}\"}}")).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (404, "model_not_found")
        );
        assert!(answer.body.len() < 1000);
    }
}
