//! Limits of what callers may ask of a model.

use penstock_core::config::{Bounds, OnExceed, Protocol};
use serde_json::{Value, json};

use crate::harness::*;

/// At most 100 tokens and a temperature of 1 in each answer.
fn limited(plan: Plan, on_exceed: OnExceed) -> Plan {
    let most = |max| Bounds {
        max: Some(max),
        ..Bounds::default()
    };
    plan.rule(|rule| {
        rule.parameters.max_output_tokens = most(100);
        rule.parameters.temperature = most(1000);
        rule.parameters.on_exceed = on_exceed;
    })
}

async fn post(gateway: &Gateway, path: &str, body: &str) -> Answer {
    let mut client = gateway.client().await;
    client
        .post_to(path, "x-penstock-explain: 1\r\n", body)
        .await;
    client.answer().await
}

#[tokio::test]
async fn a_value_beyond_its_bound_goes_on_as_the_bound_and_all_other_bytes_as_they_came() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = limited(Plan::chain(&[upstream.address]), OnExceed::Clamp);
    let gateway = Gateway::start(&plan).await;
    let body =
        r#"{ "model":"chat", "x":1.50, "temperature":1.5,"max_tokens":  9000, "messages":[] }"#;
    let answer = post(&gateway, "/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let decision = answer.header("x-penstock-decision");
    assert!(
        decision.ends_with("; set max_tokens, temperature"),
        "{decision}"
    );
    let within = body.replace("1.5,", "1,").replace("9000", "100");
    assert_eq!(upstream.requests()[0].body, within);
    let answer = post(&gateway, "/v1/chat/completions", &within).await;
    assert!(!answer.header("x-penstock-decision").contains("set"));
    assert_eq!(upstream.requests()[1].body, within);
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", body).await;
    let told: Value = serde_json::from_str(&client.answer().await.body).unwrap();
    assert_eq!(told["changes"], json!(["max_tokens", "temperature"]));
}

#[tokio::test]
async fn a_translation_is_made_of_what_the_limits_left() {
    let answer = || {
        json!({"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}).to_string()
    };
    let upstream = Upstream::always(move || Reply::Json(200, answer())).await;
    let plan = Plan::chain(&[upstream.address]).speaking("a", Protocol::Anthropic);
    let gateway = Gateway::start(&limited(plan, OnExceed::Clamp)).await;
    for body in [
        chat(false),
        chat(false).replacen('{', r#"{"max_completion_tokens":5000,"#, 1),
    ] {
        let answer = post(&gateway, "/v1/chat/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    for received in upstream.requests() {
        let sent: Value = serde_json::from_str(&received.body).unwrap();
        assert_eq!(sent["max_tokens"], 100);
    }
}

#[tokio::test]
async fn a_refusal_reaches_no_backend_and_names_parameter_and_bound() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = limited(Plan::chain(&[upstream.address]), OnExceed::Refuse);
    let gateway = Gateway::start(&plan).await;
    for (path, member, bound) in [
        ("/v1/chat/completions", "max_completion_tokens", "100"),
        ("/v1/responses", "max_output_tokens", "100"),
        ("/v1/completions", "temperature", "1"),
    ] {
        let body = format!(r#"{{"model":"chat","{member}":101}}"#);
        let answer = post(&gateway, path, &body).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (400, "parameter_out_of_range")
        );
        let message = format!("'{member}' may be at most {bound} here.");
        assert!(answer.body.contains(&message), "{}", answer.body);
    }
    assert_eq!(upstream.count(), 0);
    let background = r#"{"model":"chat","background":true,"max_output_tokens":101}"#;
    let answer = post(&gateway, "/v1/responses", background).await;
    assert_eq!(answer.code(), "parameter_out_of_range");
}

#[tokio::test]
async fn requests_that_the_limits_make_equal_share_a_stored_answer() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]).cached(60_000);
    let gateway = Gateway::start(&limited(plan, OnExceed::Clamp)).await;
    for (tokens, cache) in [(101, "miss"), (102, "hit"), (99, "miss")] {
        let body = chat(false).replacen('{', &format!(r#"{{"max_tokens":{tokens},"#), 1);
        let answer = post(&gateway, "/v1/chat/completions", &body).await;
        assert_eq!(answer.header("x-penstock-cache"), cache, "{tokens}");
    }
}
