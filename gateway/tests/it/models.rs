//! One provider, several models: what is said of one model does not count for another.

use penstock_core::config::{FailureClass, FanOut, FanOutMode, RuleBackend};

use crate::harness::*;

const LEFT_NONE: &str = "x-ratelimit-limit-requests: 100\r\nx-ratelimit-remaining-requests: 0\r\nx-ratelimit-reset-requests: 30m\r\n";

/// Model `a` of one backend, then model `b` of it.
fn a_then_b(upstream: &Upstream) -> Plan {
    Plan::new()
        .backend("provider", &[upstream.address], 1, 0)
        .rule(|rule| {
            let of = |model: &str, priority| RuleBackend {
                backend: id("provider"),
                weight: 1,
                priority,
                model_override: Some(model.to_owned()),
                after: [].into(),
            };
            rule.backends = vec![of("a", 0), of("b", 1)];
        })
}

fn model(received: &Received) -> String {
    let body: serde_json::Value = serde_json::from_str(&received.body).unwrap();
    body["model"].as_str().unwrap().to_owned()
}

/// Answers requests for model `a` by `of_a`, and all others well.
async fn provider(of_a: impl Fn() -> Reply + Send + Sync + 'static) -> Upstream {
    Upstream::start(move |_, received| match model(received).as_str() {
        "a" => of_a(),
        _ => json_answer("x"),
    })
    .await
}

fn models(upstream: &Upstream) -> String {
    upstream.requests().iter().map(model).collect()
}

#[tokio::test]
async fn a_model_over_its_limit_gives_way_to_the_next_of_its_backend() {
    let busy = || Reply::Headers(429, "retry-after: 30\r\n", shaped_error("slow"));
    let upstream = provider(busy).await;
    let gateway = Gateway::start(&a_then_b(&upstream)).await;
    for _ in 0..3 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(models(&upstream), "abbb", "and is left alone until then");
}

#[tokio::test]
async fn a_model_that_is_not_there_gives_way_to_the_next_of_its_backend() {
    let upstream = provider(|| Reply::Json(404, shaped_error("no such model"))).await;
    let gateway = Gateway::start(&a_then_b(&upstream)).await;
    for _ in 0..3 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(models(&upstream), "abbb");
}

#[tokio::test]
async fn what_is_too_long_goes_to_the_larger_model_of_the_same_backend() {
    let too_long = || Reply::Json(400, shaped_error("maximum context length is 4096 tokens"));
    let upstream = provider(too_long).await;
    let plan = a_then_b(&upstream);
    let plan = plan.rule(|rule| rule.retry.on.extend([FailureClass::ContextLength]));
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!(models(&upstream), "ab");
}

#[tokio::test]
async fn what_is_left_of_one_model_does_not_move_another() {
    let upstream = provider(|| Reply::Headers(200, LEFT_NONE, completion("x"))).await;
    let other = Upstream::always(|| json_answer("x")).await;
    let plan = a_then_b(&upstream).backend("other", &[other.address], 1, 2);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..4 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(models(&upstream), "abbb");
    assert_eq!(other.count(), 0);
}

#[tokio::test]
async fn a_burst_sends_no_more_than_is_left() {
    let left_five = "x-ratelimit-limit-requests: 50\r\nx-ratelimit-remaining-requests: 5\r\nx-ratelimit-reset-requests: 30m\r\n";
    // The first answer tells what is left; no other one ends before the burst is under way.
    let upstream = Upstream::start(move |number, _| match number {
        0 => Reply::Headers(200, left_five, completion("x")),
        _ => Reply::Silent,
    })
    .await;
    let other = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address, other.address])).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let mut clients = Vec::new();
    for _ in 0..50 {
        let mut client = gateway.client().await;
        client.post("", &chat(false)).await;
        clients.push(client);
    }
    until("all are upstream", || {
        upstream.count() + other.count() == 51
    })
    .await;
    let sent = upstream.count() - 1;
    // Fewer go there with each, and none beyond the fifth.
    assert!((1..=5).contains(&sent), "{sent}");
}

#[tokio::test]
async fn an_endpoint_that_fails_fails_for_all_its_models() {
    let upstream = Upstream::always(|| Reply::Json(500, shaped_error("down"))).await;
    let other = Upstream::always(|| json_answer("x")).await;
    let plan = a_then_b(&upstream).backend("other", &[other.address], 1, 2);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..6 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    // Five in a row leave it out, whichever model they were for.
    assert_eq!(models(&upstream), "ababa");
}

#[tokio::test]
async fn models_of_one_backend_are_asked_at_once() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = a_then_b(&upstream).rule(|rule| {
        rule.fan_out = Some(FanOut {
            mode: FanOutMode::All,
            max: 8,
            within_ms: 20_000,
        });
    });
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let mut asked: Vec<String> = upstream.requests().iter().map(model).collect();
    asked.sort();
    assert_eq!(asked, ["a", "b"]);
}
