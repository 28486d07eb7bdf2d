//! Which rule takes a request.

use penstock_core::config::{Condition, HashOn, Need, Strategy};

use crate::harness::*;

/// A rule for requests with tools before the plain one: `b` answers those, `a` the others.
fn with_tools(a: &Upstream, b: &Upstream, needs_only: bool) -> Plan {
    let mut plan = Plan::chain(&[a.address, b.address]);
    let mut tools = plan.config.rules[0].clone();
    tools.name = "tools".to_owned();
    tools.conditions = vec![Condition::Needs([Need::Tools].into())];
    tools.backends.remove(0);
    plan.config.rules[0].backends.remove(1);
    plan.config.rules.insert(0, tools);
    if needs_only {
        plan.config.rules.remove(1);
    }
    plan
}

const TOOLS: &str = r#"{"model":"chat","tools":[{"type":"function"}],"messages":[]}"#;

#[tokio::test]
async fn the_first_rule_whose_conditions_hold_takes_the_request() {
    let (a, b) = (
        Upstream::always(|| json_answer("a")).await,
        Upstream::always(|| json_answer("b")).await,
    );
    let gateway = Gateway::start(&with_tools(&a, &b, false)).await;
    assert_eq!(
        gateway.post(TOOLS).await.header("x-penstock-backend"),
        "ns/b"
    );
    let plain = gateway.post(&chat(false)).await;
    assert_eq!(plain.header("x-penstock-backend"), "ns/a");
}

#[tokio::test]
async fn a_model_whose_rules_all_decline_is_not_an_unknown_model() {
    let (a, b) = (
        Upstream::always(|| json_answer("a")).await,
        Upstream::always(|| json_answer("b")).await,
    );
    let gateway = Gateway::start(&with_tools(&a, &b, true)).await;
    assert_eq!(gateway.post(TOOLS).await.status, 200);
    let declined = gateway.post(&chat(false)).await;
    assert_eq!(
        (declined.status, declined.code().as_str()),
        (404, "no_rule")
    );
    let unknown = gateway.post(r#"{"model":"other"}"#).await;
    assert_eq!(unknown.code(), "model_not_found");
}

#[tokio::test]
async fn sessions_stay_together() {
    let (upstreams, addresses) = Upstream::several(3, || json_answer("x")).await;
    let plan = Plan::new().backend("a", &addresses, 1, 0).rule(|rule| {
        rule.strategy = Strategy::Hash;
        rule.hash_on = Some(HashOn::Header("x-session-id".to_owned()));
    });
    let gateway = Gateway::start(&plan).await;
    for session in 0..12 {
        let before: Vec<usize> = upstreams.iter().map(Upstream::count).collect();
        for _ in 0..3 {
            let header = format!("x-session-id: s{session}\r\n");
            assert_eq!(gateway.post_with(&header, &chat(false)).await.status, 200);
        }
        let after = upstreams.iter().map(Upstream::count);
        let served = after.zip(before).filter(|(after, before)| after > before);
        assert_eq!(served.count(), 1, "session {session}");
    }
    let used = upstreams.iter().filter(|upstream| upstream.count() > 0);
    assert!(used.count() > 1, "sessions are spread");
}
