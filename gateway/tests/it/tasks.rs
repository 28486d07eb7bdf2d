//! Rules by what a request is about.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use penstock_core::config::{Condition, NameMatch, Task, Tasks};
use serde_json::{Value, json};

use crate::harness::*;

/// A model that knows two directions: code and all else.
fn embed(received: &Received) -> Reply {
    let body: Value = serde_json::from_str(&received.body).unwrap();
    let inputs = body["input"].as_array().unwrap().iter();
    let data = inputs.enumerate().map(|(index, text)| {
        let text = text.as_str().unwrap();
        let embedding = if text.contains("code") {
            [0.9, 0.1]
        } else {
            [0.0, 1.0]
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    });
    Reply::Json(
        200,
        json!({"object": "list", "data": data.collect::<Vec<_>>()}).to_string(),
    )
}

/// What is about code goes to `coder`, all else to `general`; `embedder` answers for the embedding model.
fn plan(coder: &Upstream, general: &Upstream, embedder: &Upstream) -> Plan {
    let mut plan = Plan::new()
        .backend("coder", &[coder.address], 1, 0)
        .backend("general", &[general.address], 1, 0)
        .backend("embedder", &[embedder.address], 1, 0);
    let rule = plan.config.rules.remove(0);
    let with = |name: &str, model: &str, condition: Option<Condition>| {
        let mut rule = rule.clone();
        rule.name = name.to_owned();
        rule.models = vec![NameMatch::Exact(model.to_owned())];
        rule.conditions = condition.into_iter().collect();
        rule.backends.retain(|backend| backend.backend == id(name));
        rule
    };
    let is_code = Condition::Task(id("policy"), "code".to_owned());
    plan.config.rules = vec![
        with("coder", "chat", Some(is_code)),
        with("general", "chat", None),
        with("embedder", "embed", None),
    ];
    let task = |name: &str, examples: &[&str]| Task {
        name: name.to_owned(),
        examples: examples.iter().map(|&text| text.to_owned()).collect(),
    };
    let tasks = Tasks {
        model: "embed".to_owned(),
        min_similarity_thousandths: 500,
        timeout_ms: 1_000,
        tasks: vec![
            task("code", &["write code", "mend my code"]),
            task("talk", &["hello"]),
        ],
    };
    plan.config.tasks.insert(id("policy"), tasks);
    plan
}

fn about(text: &str) -> String {
    json!({"model": "chat", "messages": [{"role": "user", "content": text}]}).to_string()
}

async fn explained(gateway: &Gateway, text: &str) -> Value {
    let mut client = Client::connect(gateway.admin).await;
    client.post_to("/explain", "", &about(text)).await;
    serde_json::from_str(&client.answer().await.body).unwrap()
}

/// Until the examples are embedded.
async fn ready(gateway: &Gateway) {
    let embedded = async {
        while explained(gateway, "hello").await["tasks"][0]["result"] == "not_ready" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), embedded)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_request_goes_to_the_rule_of_its_task() {
    let (coder, general) = (
        Upstream::always(|| json_answer("c")).await,
        Upstream::always(|| json_answer("g")).await,
    );
    let embedder = Upstream::start(|_, received| embed(received)).await;
    let gateway = Gateway::start(&plan(&coder, &general, &embedder)).await;
    ready(&gateway).await;
    for (text, backend) in [
        ("refactor this code, please", "ns/coder"),
        ("how are you?", "ns/general"),
        ("", "ns/general"),
    ] {
        let answer = gateway.post(&about(text)).await;
        assert_eq!(answer.header("x-penstock-backend"), backend, "{text}");
    }
    let told = explained(&gateway, "code").await;
    assert_eq!(told["rule"], "ns/policy/coder");
    let task = &told["tasks"][0];
    assert_eq!(
        (&task["task"], &task["result"]),
        (&json!("code"), &json!("similar"))
    );
    let similarity = task["similarities"]["talk"].as_f64().unwrap();
    assert!((similarity - 0.110).abs() < 0.001, "{similarity}");
    gateway
        .metric_is(
            "penstock_gateway_task_lookups_total{result=\"no_text\"}",
            1.0,
        )
        .await;
}

#[tokio::test]
async fn a_request_whose_task_is_not_found_in_time_belongs_to_none() {
    let (coder, general) = (
        Upstream::always(|| json_answer("c")).await,
        Upstream::always(|| json_answer("g")).await,
    );
    let is_slow = Arc::new(AtomicBool::new(false));
    let slow = Arc::clone(&is_slow);
    let embedder = Upstream::start(move |_, received| {
        if slow.load(Ordering::Relaxed) {
            return Reply::Silent;
        }
        embed(received)
    })
    .await;
    let mut plan = plan(&coder, &general, &embedder);
    plan.config.tasks.get_mut(&id("policy")).unwrap().timeout_ms = 50;
    let gateway = Gateway::start(&plan).await;
    ready(&gateway).await;
    is_slow.store(true, Ordering::Relaxed);
    let answer = gateway.post(&about("code")).await;
    assert_eq!(answer.header("x-penstock-backend"), "ns/general");
    gateway
        .metric_is(
            "penstock_gateway_task_lookups_total{result=\"timed_out\"}",
            1.0,
        )
        .await;
}

#[tokio::test]
async fn without_an_embedding_model_all_go_on_and_a_call_for_embeddings_has_no_task() {
    let (coder, general) = (
        Upstream::always(|| json_answer("c")).await,
        Upstream::always(|| json_answer("g")).await,
    );
    let embedder = Upstream::always(|| Reply::Json(500, shaped_error("broken"))).await;
    let mut plan = plan(&coder, &general, &embedder);
    // The rule for embeddings itself depends on a task: nobody waits for himself.
    let is_code = Condition::Task(id("policy"), "code".to_owned());
    plan.config.rules[2].conditions = vec![is_code];
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&about("code")).await;
    assert_eq!(answer.header("x-penstock-backend"), "ns/general");
    let mut client = gateway.client().await;
    client
        .post_to("/v1/embeddings", "", r#"{"model":"embed","input":"code"}"#)
        .await;
    assert_eq!(client.answer().await.code(), "no_rule");
}
