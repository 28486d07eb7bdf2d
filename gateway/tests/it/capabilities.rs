//! Requests go to backends that have what they need.

use penstock_core::config::{Condition, Need, Strategy};

use crate::harness::*;

const TOOLS: &str = r#"{"model":"chat","tools":[{"type":"function"}],"messages":[]}"#;

fn long(max_tokens: u32) -> String {
    let text = "word ".repeat(400);
    format!(
        r#"{{"model":"chat","max_tokens":{max_tokens},"messages":[{{"role":"user","content":"{text}"}}]}}"#
    )
}

#[tokio::test]
async fn a_backend_that_lacks_what_a_request_needs_is_passed_over_and_explained() {
    let (a, b) = (
        Upstream::always(|| json_answer("a")).await,
        Upstream::always(|| json_answer("b")).await,
    );
    let plan = Plan::chain(&[a.address, b.address]).profile("a", |profile| {
        profile.capabilities.lacks = [Need::Tools].into();
    });
    let gateway = Gateway::start(&plan).await;
    let backend_of = async |body: &str| {
        let answer = gateway.post(body).await;
        assert_eq!(answer.status, 200);
        answer.header("x-penstock-backend").to_owned()
    };
    assert_eq!(backend_of(&chat(false)).await, "ns/a");
    assert_eq!(backend_of(TOOLS).await, "ns/b");
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", TOOLS).await;
    let told: serde_json::Value = serde_json::from_str(&client.answer().await.body).unwrap();
    assert_eq!(told["candidates"][0]["dropped"], "it lacks Tools");
    assert_eq!(told["chosen"]["backend"], "ns/b");
}

#[tokio::test]
async fn who_can_do_more_is_left_to_requests_that_need_it() {
    let able = Upstream::always(|| json_answer("able")).await;
    let short = Upstream::always(|| json_answer("short")).await;
    let plain = Upstream::start(|number, _| match number {
        0..3 => json_answer("plain"),
        _ => Reply::Json(503, shaped_error("busy")),
    })
    .await;
    let plan = Plan::new()
        .backend("able", &[able.address], 9, 0)
        .backend("plain", &[plain.address], 1, 0)
        .backend("short", &[short.address], 1, 0)
        .profile("plain", |profile| {
            profile.capabilities.lacks = [Need::Tools].into();
            profile.capabilities.context_tokens = Some(200);
        })
        .profile("short", |profile| {
            profile.capabilities.context_tokens = Some(2_000);
        })
        .rule(|rule| rule.strategy = Strategy::Capability);
    let gateway = Gateway::start(&plan).await;
    let text = chat(false);
    let (long, longer) = (long(10), long(4_000));
    let expected = [
        (text.as_str(), "ns/plain"),
        (text.as_str(), "ns/plain"),
        (TOOLS, "ns/short"),
        (long.as_str(), "ns/short"),
        (longer.as_str(), "ns/able"),
        (text.as_str(), "ns/plain"),
        // The one that can do the least fails: the next one can do more.
        (text.as_str(), "ns/short"),
    ];
    for (body, backend) in expected {
        let answer = gateway.post(body).await;
        assert_eq!(answer.header("x-penstock-backend"), backend, "{body}");
    }
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &text).await;
    let told: serde_json::Value = serde_json::from_str(&client.answer().await.body).unwrap();
    let figures = |index: usize| &told["candidates"][index]["endpoints"][0]["figures"];
    assert_eq!(figures(0)["lacks"], 0.0, "{told}");
    assert_eq!(figures(1)["contextTokens"], 200.0, "{told}");
}

#[tokio::test]
async fn what_every_backend_lacks_is_refused_by_name() {
    let a = Upstream::always(|| json_answer("a")).await;
    let plan = Plan::chain(&[a.address]).profile("a", |profile| {
        profile.capabilities.lacks = [Need::Tools, Need::Vision].into();
    });
    let gateway = Gateway::start(&plan).await;
    let refused = gateway.post(TOOLS).await;
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (400, "unsupported_by_backend")
    );
    assert!(
        refused.body.contains(r#""param":"tools""#),
        "{}",
        refused.body
    );
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!(a.count(), 1);
}

#[tokio::test]
async fn long_requests_go_to_the_longest_context_there_is() {
    let (a, b) = (
        Upstream::always(|| json_answer("a")).await,
        Upstream::always(|| json_answer("b")).await,
    );
    let plan = Plan::chain(&[a.address, b.address])
        .profile("a", |profile| {
            profile.capabilities.context_tokens = Some(600);
        })
        .profile("b", |profile| {
            profile.capabilities.context_tokens = Some(2_000);
        });
    let gateway = Gateway::start(&plan).await;
    for (body, served) in [
        (long(10), (1, 0)),
        (long(500), (1, 1)),
        // Longer than all are taken to bear: the engine counts exactly.
        (long(9_000), (1, 2)),
    ] {
        assert_eq!(gateway.post(&body).await.status, 200);
        assert_eq!((a.count(), b.count()), served);
    }
}

#[tokio::test]
async fn a_rule_may_take_what_needs_a_long_context() {
    let (a, b) = (
        Upstream::always(|| json_answer("a")).await,
        Upstream::always(|| json_answer("b")).await,
    );
    let mut plan = Plan::chain(&[a.address, b.address]);
    let mut long_ones = plan.config.rules[0].clone();
    long_ones.name = "long".to_owned();
    let min = Some(1_000);
    long_ones.conditions = vec![Condition::ContextTokens { min, max: None }];
    long_ones.backends.remove(0);
    plan.config.rules[0].backends.remove(1);
    plan.config.rules.insert(0, long_ones);
    let gateway = Gateway::start(&plan).await;
    for (body, served) in [(long(10), (1, 0)), (long(900), (1, 1))] {
        assert_eq!(gateway.post(&body).await.status, 200);
        assert_eq!((a.count(), b.count()), served);
    }
}

#[tokio::test]
async fn who_writes_of_an_image_needs_no_eyes() {
    let a = Upstream::always(|| json_answer("a")).await;
    let plan = Plan::chain(&[a.address]).profile("a", |profile| {
        profile.capabilities.lacks = [Need::Vision].into();
    });
    let gateway = Gateway::start(&plan).await;
    let with = |content: &str| chat(false).replace("\"hi\"", content);
    assert_eq!(gateway.post(&with(r#""image""#)).await.status, 200);
    let shown = with(r#"[{"type":"image_url","image_url":{"url":"x"}}]"#);
    assert_eq!(gateway.post(&shown).await.status, 400);
    assert_eq!(a.count(), 1);
}
