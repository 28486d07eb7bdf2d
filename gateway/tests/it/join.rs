//! Small calls for embeddings, made together.

use penstock_core::config::JoinEmbeddings;
use serde_json::{Value, json};

use crate::harness::*;

/// What an engine answers: each input's own text as its embedding, so that mix-ups show.
fn embed(_: usize, received: &Received) -> Reply {
    let body: Value = serde_json::from_str(&received.body).unwrap();
    let inputs = match &body["input"] {
        Value::Array(inputs) => inputs.clone(),
        one => vec![one.clone()],
    };
    if inputs.contains(&json!("too long")) {
        return Reply::Json(400, shaped_error("too long"));
    }
    let data: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, text)| json!({"object": "embedding", "index": index, "embedding": text}))
        .collect();
    let tokens = inputs.len() * 10;
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Reply::Json(
        200,
        json!({"object": "list", "data": data, "usage": usage}).to_string(),
    )
}

async fn gateway(upstream: &Upstream) -> Gateway {
    let join = JoinEmbeddings {
        // Long enough for a busy machine: a full batch does not wait.
        within_ms: 5_000,
        max_inputs: 3,
    };
    let plan = Plan::chain(&[upstream.address]);
    let plan = plan.rule(|rule| rule.join_embeddings = Some(join));
    let mut settings = settings();
    // A batch belongs to one worker.
    settings.workers = 1;
    Gateway::start_with(&plan, settings).await
}

async fn ask(gateway: &Gateway, texts: &[&str]) -> Vec<Answer> {
    let calls = texts.iter().map(|text| async move {
        let mut client = gateway.client().await;
        let body = json!({"model": "chat", "input": text}).to_string();
        client.post_to("/v1/embeddings", "", &body).await;
        client.answer().await
    });
    futures::future::join_all(calls).await
}

#[tokio::test]
async fn calls_that_come_together_are_one_call_and_each_gets_its_own() {
    let upstream = Upstream::start(embed).await;
    let gateway = gateway(&upstream).await;
    let texts = ["one", "two", "six"];
    let answers = ask(&gateway, &texts).await;
    assert_eq!(upstream.count(), 1);
    for (answer, text) in answers.iter().zip(texts) {
        assert_eq!(
            (answer.status, answer.complete),
            (200, true),
            "{}",
            answer.body
        );
        assert_eq!(answer.header("x-penstock-backend"), "ns/a");
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(
            body["data"],
            json!([{"object": "embedding", "index": 0, "embedding": text}])
        );
        assert_eq!(body["usage"]["prompt_tokens"], 10);
    }
}

#[tokio::test]
async fn when_the_joined_call_fails_each_gets_its_own_answer_or_error() {
    let upstream = Upstream::start(embed).await;
    let gateway = gateway(&upstream).await;
    let answers = ask(&gateway, &["one", "too long", "six"]).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 400, 200]);
    assert!(answers[0].body.contains("\"one\"") && answers[2].body.contains("\"six\""));
    assert_eq!(upstream.count(), 4, "one for all, then each alone");
}
