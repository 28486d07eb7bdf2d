//! Prompts that a policy keeps.

use penstock_core::config::{Prompt, PromptMessage, PromptRef, Protocol, Role};
use serde_json::{Value, json};

use crate::harness::*;

/// Two versions of `house`, which the rule adds, and `greet` for callers.
fn prompted(plan: Plan, version: u32) -> Plan {
    let house = |version, text: &str| Prompt {
        name: "house".to_owned(),
        version,
        system: Some(text.to_owned()),
        messages: Vec::new(),
    };
    let greet = Prompt {
        name: "greet".to_owned(),
        version: 3,
        system: None,
        messages: vec![PromptMessage {
            role: Role::User,
            text: "Greet {{who}}.".to_owned(),
        }],
    };
    let mut plan = plan.rule(|rule| {
        rule.prompt = Some(PromptRef {
            name: "house".to_owned(),
            version,
        });
    });
    let prompts = vec![greet, house(1, "One."), house(2, "Two.")];
    plan.config.prompts.insert(id("policy"), prompts);
    plan
}

async fn post(gateway: &Gateway, path: &str, body: &str) -> Answer {
    let mut client = gateway.client().await;
    client
        .post_to(path, "x-penstock-explain: 1\r\n", body)
        .await;
    client.answer().await
}

fn sent(upstream: &Upstream, index: usize) -> Value {
    serde_json::from_str(&upstream.requests()[index].body).unwrap()
}

#[tokio::test]
async fn a_prompt_is_rolled_forward_and_back_and_stored_answers_stay_with_their_version() {
    let upstream = Upstream::start(|number, _| json_answer(&format!("answer {number}"))).await;
    let plan = Plan::chain(&[upstream.address]).cached(60_000);
    let gateway = Gateway::start(&prompted(plan.clone(), 1)).await;
    for (version, cache, answer_number) in
        [(1, "miss", 0), (1, "hit", 0), (2, "miss", 1), (1, "hit", 0)]
    {
        gateway.apply(&prompted(plan.clone(), version)).await;
        let answer = post(&gateway, "/v1/chat/completions", &chat(false)).await;
        assert_eq!(answer.header("x-penstock-cache"), cache, "{version}");
        assert!(answer.body.contains(&format!("answer {answer_number}")));
    }
    let system = |index| sent(&upstream, index)["messages"][0].clone();
    assert_eq!(system(0), json!({"role": "system", "content": "One."}));
    assert_eq!(system(1), json!({"role": "system", "content": "Two."}));
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn which_version_was_used_is_told_to_those_who_ask() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&prompted(Plan::chain(&[upstream.address]), 2)).await;
    let body =
        r#"{"model":"chat","prompt":{"id":"greet","version":"3","variables":{"who":"\"Ada\"]"}}}"#;
    let answer = post(&gateway, "/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let decision = answer.header("x-penstock-decision");
    assert!(
        decision.ends_with("; set prompt house@2, prompt greet@3"),
        "{decision}"
    );
    assert_eq!(
        sent(&upstream, 0),
        json!({"model": "chat", "messages": [{"role": "system", "content": "Two."},
            {"role": "user", "content": "Greet \"Ada\"]."}]})
    );
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", body).await;
    let told: Value = serde_json::from_str(&client.answer().await.body).unwrap();
    assert_eq!(told["changes"], json!(["prompt house@2", "prompt greet@3"]));
    let unknown = body.replace("greet", "other");
    let answer = post(&gateway, "/v1/responses", &unknown).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (400, "invalid_prompt")
    );
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn a_prompt_reaches_backends_of_every_protocol() {
    let message = || {
        json!({"type": "message", "role": "assistant", "content": [{"type": "text", "text": "x"}],
            "stop_reason": "end_turn", "usage": {"input_tokens": 1, "output_tokens": 1}})
        .to_string()
    };
    let upstream = Upstream::always(move || Reply::Json(200, message())).await;
    let plan = Plan::chain(&[upstream.address]).speaking("a", Protocol::Anthropic);
    let gateway = Gateway::start(&prompted(plan, 1)).await;
    let mine = r#"{"model":"chat","max_tokens":5,"system":"Mine.","messages":[{"role":"user","content":"hi"}]}"#;
    assert_eq!(post(&gateway, "/v1/messages", mine).await.status, 200);
    let answer = post(&gateway, "/v1/chat/completions", &chat(false)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(sent(&upstream, 0)["system"], "One.\n\nMine.");
    assert!(sent(&upstream, 1)["system"].to_string().contains("One."));
}

#[tokio::test]
async fn a_rule_whose_prompt_is_missing_keeps_its_last_one_and_never_answers_without() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]);
    let gateway = Gateway::start(&prompted(plan.clone(), 1)).await;
    gateway.apply(&prompted(plan.clone(), 7)).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!(sent(&upstream, 0)["messages"][0]["content"], "One.");
    let fresh = Gateway::start(&prompted(plan, 7)).await;
    let answer = fresh.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "no_endpoint")
    );
    assert_eq!(upstream.count(), 1);
}
