//! Small calls for embeddings, made together.

use penstock_core::config::{JoinEmbeddings, Rule};
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
    gateway_with(upstream, |_| {}).await
}

async fn gateway_with(upstream: &Upstream, change: impl FnOnce(&mut Rule)) -> Gateway {
    let join = JoinEmbeddings {
        // Long enough for a busy machine: a full batch does not wait.
        within_ms: 5_000,
        max_inputs: 3,
    };
    let plan = Plan::chain(&[upstream.address]);
    let plan = plan.rule(|rule| rule.join_embeddings = Some(join));
    let plan = plan.rule(change);
    let mut settings = settings();
    // A batch belongs to one worker.
    settings.workers = 1;
    Gateway::start_with(&plan, settings).await
}

async fn ask(gateway: &Gateway, texts: &[&str]) -> Vec<Answer> {
    let calls: Vec<(&str, &str)> = texts.iter().map(|text| (*text, "")).collect();
    ask_with(gateway, &calls).await
}

/// Each with headers of its own.
async fn ask_with(gateway: &Gateway, calls: &[(&str, &str)]) -> Vec<Answer> {
    let calls = calls.iter().map(|(text, headers)| async move {
        let mut client = gateway.client().await;
        let body = json!({"model": "chat", "input": text}).to_string();
        client.post_to("/v1/embeddings", headers, &body).await;
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

#[tokio::test]
async fn a_leader_has_all_its_attempts_after_the_joined_call_failed() {
    // The batch fails in each of the ways that count attempts; the leader alone is well.
    for status in [400, 500] {
        let upstream = Upstream::start(move |number, received| {
            if received.body.contains('[') {
                return Reply::Json(status, shaped_error("not together"));
            }
            embed(number, received)
        })
        .await;
        for attempts in [1, 3] {
            let gateway = gateway_with(&upstream, |rule| rule.retry.attempts = attempts).await;
            let answers = ask(&gateway, &["one", "two", "six"]).await;
            for (answer, text) in answers.iter().zip(["one", "two", "six"]) {
                assert_eq!(answer.status, 200, "{status} {attempts}: {}", answer.body);
                assert!(answer.body.contains(text), "{}", answer.body);
            }
        }
    }
}

#[tokio::test]
async fn calls_whose_headers_differ_upstream_are_not_joined() {
    let upstream = Upstream::start(embed).await;
    let gateway = gateway_with(&upstream, |rule| {
        rule.join_embeddings = Some(JoinEmbeddings {
            within_ms: 200,
            max_inputs: 8,
        });
    })
    .await;
    let calls = [("one", "x-org: a\r\n"), ("two", "x-org: b\r\n")];
    for answer in ask_with(&gateway, &calls).await {
        assert_eq!(answer.status, 200);
    }
    let mut sent: Vec<(bool, String)> = upstream
        .requests()
        .iter()
        .map(|received| {
            let org = received.headers["x-org"].clone();
            (received.body.contains("one"), org)
        })
        .collect();
    sent.sort();
    assert_eq!(sent, [(false, "b".to_owned()), (true, "a".to_owned())]);
}

#[tokio::test]
async fn a_joined_call_is_part_of_no_callers_trace() {
    let upstream = Upstream::start(embed).await;
    let gateway = gateway(&upstream).await;
    let calls = [
        (
            "one",
            "traceparent: 00-1-1-00\r\nauthorization: Bearer a\r\n",
        ),
        ("two", "traceparent: 00-2-2-00\r\ntracestate: a=b\r\n"),
        ("six", ""),
    ];
    for answer in ask_with(&gateway, &calls).await {
        assert_eq!(answer.status, 200);
    }
    let requests = upstream.requests();
    assert_eq!(requests.len(), 1, "they are joined all the same");
    let headers = &requests[0].headers;
    assert!(!headers.contains_key("traceparent") && !headers.contains_key("tracestate"));
}
