//! Refusals that another backend may not share, and rules that say what is repeated.

use penstock_core::config::{FailureClass, Hedge};

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
