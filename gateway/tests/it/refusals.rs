//! Refusals that another backend may not share, and rules that say what is repeated.

use penstock_core::config::{FailureClass, Hedge, Strategy};

use crate::harness::*;

fn too_long() -> Reply {
    let message =
        "This model's maximum context length is 4096 tokens. However, your prompt has 5000 tokens.";
    Reply::Json(400, shaped_error(message))
}

fn on(plan: Plan, classes: &[FailureClass]) -> Plan {
    plan.rule(|rule| rule.retry.on.extend(classes.iter().copied()))
}

#[tokio::test]
async fn what_is_too_long_for_one_backend_goes_to_the_next_where_the_rule_says_so() {
    let (small, addresses) = Upstream::several(2, too_long).await;
    let large = Upstream::always(|| json_answer("x")).await;
    let plan =
        Plan::new()
            .backend("small", &addresses, 1, 0)
            .backend("large", &[large.address], 1, 1);
    let gateway = Gateway::start(&on(plan.clone(), &[FailureClass::ContextLength])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/large")
    );
    let asked: usize = small.iter().map(Upstream::count).sum();
    assert_eq!(asked, 1, "its other endpoints would say the same");

    let gateway = Gateway::start(&plan).await;
    let refused = gateway.post(&chat(false)).await;
    assert_eq!((refused.status, large.count()), (400, 1));
    assert!(refused.body.contains("maximum context length"));
}

#[tokio::test]
async fn the_last_refusal_is_the_answer_when_all_refuse() {
    let policy = || Reply::Json(400, shaped_error("content_filter triggered"));
    let (upstreams, addresses) = Upstream::several(2, policy).await;
    let plan = on(Plan::chain(&addresses), &[FailureClass::ContentPolicy]);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, upstreams[0].count(), upstreams[1].count()),
        (400, 1, 1)
    );
    assert!(answer.body.contains("content_filter"));
}

#[tokio::test]
async fn what_the_rule_does_not_name_is_not_repeated() {
    let busy = Upstream::always(|| Reply::Json(503, shaped_error("busy"))).await;
    let working = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[busy.address, working.address])
        .rule(|rule| rule.retry.on = [FailureClass::Connection].into());
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 503);
    assert_eq!(working.count(), 0);
}

#[tokio::test]
async fn a_hedge_that_was_refused_tells_of_its_whole_backend() {
    let slow = Upstream::always(|| Reply::Silent).await;
    let (small, addresses) = Upstream::several(2, too_long).await;
    let large = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::new()
        .backend("slow", &[slow.address], 1, 0)
        .backend("small", &addresses, 1, 1)
        .backend("large", &[large.address], 1, 2)
        .rule(|rule| {
            rule.timeouts.first_token_ms = 600;
            rule.retry.attempts = 5;
            rule.hedge = Some(Hedge {
                after_ms: 100,
                extra_percent: 100,
            });
        });
    let gateway = Gateway::start(&on(plan, &[FailureClass::ContextLength])).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(answer.header("x-penstock-backend"), "ns/large");
    let asked: usize = small.iter().map(Upstream::count).sum();
    assert_eq!(asked, 1);
}

#[tokio::test]
async fn a_backend_that_refuses_everything_gets_next_to_nothing() {
    let strategies = [
        Strategy::PeakEwma,
        Strategy::Latency,
        Strategy::Cost,
        Strategy::CostLatency,
        Strategy::Capability,
        Strategy::Region,
        Strategy::PowerOfTwo,
        Strategy::LeastRequests,
        Strategy::RoundRobin,
    ];
    let statuses = [401, 402, 403, 404, 408].map(|status| (status, Strategy::PeakEwma));
    let cases = strategies.map(|strategy| (401, strategy));
    for (status, strategy) in statuses.into_iter().chain(cases) {
        let refusing = Upstream::always(move || Reply::Json(status, shaped_error("no"))).await;
        let working = Upstream::always(|| json_answer("x")).await;
        let plan = Plan::new()
            .backend("refusing", &[refusing.address], 1, 0)
            .backend("working", &[working.address], 1, 0)
            .rule(|rule| rule.strategy = strategy);
        let gateway = Gateway::start(&plan).await;
        for _ in 0..40 {
            assert_eq!(gateway.post(&chat(false)).await.status, 200, "{status}");
        }
        // Five in a row are what every strategy leaves an endpoint out for.
        assert!(refusing.count() <= 5, "{status} {strategy:?}");
    }
}

#[tokio::test]
async fn requests_that_are_wrong_do_not_make_a_backend_look_idle() {
    let refusing = Upstream::always(|| Reply::Json(400, shaped_error("no"))).await;
    let working = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::new()
        .backend("refusing", &[refusing.address], 1, 0)
        .backend("working", &[working.address], 1, 0)
        .rule(|rule| rule.strategy = Strategy::PeakEwma);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..20 {
        gateway.post(&chat(false)).await;
    }
    assert!(refusing.count() <= 2, "{}", refusing.count());
}

#[tokio::test]
async fn where_all_refuse_the_last_refusal_is_the_answer() {
    for (status, expected) in [(401, 502), (402, 402), (403, 502), (404, 404), (408, 408)] {
        let refusal = move || Reply::Json(status, shaped_error("sk-canary"));
        let (upstreams, addresses) = Upstream::several(2, refusal).await;
        let gateway = Gateway::start(&Plan::chain(&addresses)).await;
        let answer = gateway.post(&chat(false)).await;
        assert_eq!(
            (answer.status, upstreams[0].count(), upstreams[1].count()),
            (expected, 1, 1),
            "{status}"
        );
        let is_told = answer.body.contains("sk-canary");
        assert_eq!(is_told, expected != 502, "{status}: {}", answer.body);
    }
}

#[tokio::test]
async fn a_credential_is_not_tried_at_every_endpoint_of_its_backend() {
    let expired = || Reply::Json(401, shaped_error("no"));
    let (upstreams, addresses) = Upstream::several(3, expired).await;
    let other = Upstream::always(|| json_answer("x")).await;
    let plan =
        Plan::new()
            .backend("expired", &addresses, 1, 0)
            .backend("other", &[other.address], 1, 1);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!(upstreams.iter().map(Upstream::count).sum::<usize>(), 1);
}

#[tokio::test]
async fn a_404_about_what_the_caller_names_is_the_callers() {
    let kept = r#"{"model":"chat","input":"hi","previous_response_id":"resp_1"}"#;
    let of_file = r#"{"model":"chat","messages":[{"role":"user","content":[{"type":"file","file":{"file_id":"f"}}]}]}"#;
    for (path, body, message, repeated) in [
        (
            "/v1/responses",
            kept,
            "Response with id 'resp_1' not found.",
            false,
        ),
        (
            "/v1/responses",
            kept,
            "The model `chat` does not exist.",
            true,
        ),
        (
            "/v1/chat/completions",
            of_file,
            "No such File object: f",
            false,
        ),
        (
            "/v1/chat/completions",
            of_file,
            "The model `chat` does not exist.",
            true,
        ),
    ] {
        let first = Upstream::always(move || Reply::Json(404, shaped_error(message))).await;
        let second = Upstream::always(|| json_answer("x")).await;
        let gateway = Gateway::start(&Plan::chain(&[first.address, second.address])).await;
        let mut client = gateway.client().await;
        client.post_to(path, "", body).await;
        let expected = if repeated { 200 } else { 404 };
        assert_eq!(client.answer().await.status, expected, "{message}");
        assert_eq!(second.count(), usize::from(repeated), "{message}");
    }
}

#[tokio::test]
async fn an_error_with_its_members_at_the_top_is_passed_on() {
    let flat = r#"{"object":"error","message":"top_k must be -1","type":"BadRequest","param":null,"code":400}"#;
    let upstream = Upstream::always(move || Reply::Json(400, flat.to_owned())).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(false)).await;
    let told: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(answer.status, 400);
    assert_eq!(told["error"]["message"], "top_k must be -1");

    let mut client = gateway.client().await;
    let body = r#"{"model":"chat","max_tokens":9,"messages":[{"role":"user","content":"hi"}]}"#;
    client.post_to("/v1/messages", "", body).await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("top_k must be -1"), "{}", answer.body);
}

#[tokio::test]
async fn a_403_for_what_the_request_says_is_a_matter_of_policy() {
    let flagged = || Reply::Json(403, shaped_error("requires moderation: input was flagged"));
    let first = Upstream::always(flagged).await;
    let second = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[first.address, second.address]);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, second.count()), (403, 0));
    assert!(answer.body.contains("was flagged"), "{}", answer.body);
    gateway
        .apply(&on(plan, &[FailureClass::ContentPolicy]))
        .await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
}
