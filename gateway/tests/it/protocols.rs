//! Callers and backends that speak different protocols.

use std::collections::BTreeMap;

use penstock_core::config::{OnUnsupported, Protocol};
use penstock_gateway::{Credential, Credentials};
use serde_json::{Value, json};

use crate::harness::*;

const STARTED: &str = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"model\":\"claude\",\"usage\":{\"input_tokens\":4,\"output_tokens\":1}}}\n\nevent: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
const SAID: &str = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hello\"}}\n\n";
const STOPPED: &str = "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\nevent: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":2}}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

fn message_request(stream: bool) -> String {
    json!({"model": "chat", "max_tokens": 5, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]})
        .to_string()
}

fn message() -> String {
    json!({"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "Hello"}], "usage": {"input_tokens": 4, "output_tokens": 2}})
    .to_string()
}

/// One backend that speaks Anthropic's protocol.
fn anthropic(upstream: &Upstream) -> Plan {
    Plan::new()
        .backend("a", &[upstream.address], 1, 0)
        .speaking("a", Protocol::Anthropic)
}

async fn post(gateway: &Gateway, path: &str, headers: &str, body: &str) -> Answer {
    let mut client = gateway.client().await;
    client.post_to(path, headers, body).await;
    client.answer().await
}

#[tokio::test]
async fn a_chat_is_answered_by_a_backend_that_speaks_messages() {
    let upstream = Upstream::always(|| Reply::Json(200, message())).await;
    let gateway = Gateway::start(&anthropic(&upstream)).await;
    let answer = gateway.post(&chat(false)).await;
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(answer.status, 200, "{body}");
    assert_eq!(body["choices"][0]["message"]["content"], "Hello");
    assert_eq!(body["usage"]["total_tokens"], 6);
    let received = upstream.requests().remove(0);
    assert_eq!(received.line, "POST /v1/messages HTTP/1.1");
    assert_eq!(received.headers["anthropic-version"], "2023-06-01");
    let sent: Value = serde_json::from_str(&received.body).unwrap();
    assert_eq!(
        (&sent["model"], &sent["max_tokens"]),
        (&json!("chat"), &json!(4096))
    );
}

#[tokio::test]
async fn a_chats_stream_is_made_of_a_messages_events_as_they_come() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&anthropic(&upstream)).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(STARTED.to_owned())).unwrap();
    steps.send(Step::Chunk(SAID.to_owned())).unwrap();
    let (status, headers) = client.head().await;
    assert_eq!((status, headers["x-accel-buffering"].as_str()), (200, "no"));
    assert!(headers["cache-control"].contains("no-transform"));
    let first = client.chunk().await.unwrap().unwrap();
    assert!(first.contains("\"content\":\"Hello\""), "{first}");
    steps.send(Step::Chunk(STOPPED.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    let mut rest = String::new();
    while let Some(chunk) = client.chunk().await.unwrap() {
        rest.push_str(&chunk);
    }
    assert!(
        rest.contains("\"finish_reason\":\"stop\"") && rest.ends_with("data: [DONE]\n\n"),
        "{rest}"
    );
}

#[tokio::test]
async fn a_message_is_answered_by_a_backend_that_speaks_chats() {
    let upstream =
        Upstream::always(|| Reply::Sse(vec![role(), word("Hello"), DONE.to_owned()])).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let headers = "x-api-key: theirs\r\nanthropic-version: 2023-06-01\r\nanthropic-beta: x\r\n";
    let answer = post(&gateway, "/v1/messages", headers, &message_request(true)).await;
    let names: Vec<&str> = answer
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    assert_eq!(
        names,
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ],
        "{}",
        answer.body
    );
    let received = upstream.requests().remove(0);
    assert_eq!(received.line, "POST /v1/chat/completions HTTP/1.1");
    assert!(
        !received
            .headers
            .keys()
            .any(|name| name.starts_with("anthropic"))
    );
    assert!(!received.headers.contains_key("x-api-key"));
    assert!(
        received.body.contains("\"include_usage\":true"),
        "{}",
        received.body
    );
}

#[tokio::test]
async fn a_message_passes_byte_for_byte_to_a_backend_that_speaks_it() {
    let upstream = Upstream::always(|| Reply::Json(200, message())).await;
    let gateway = Gateway::start(&anthropic(&upstream)).await;
    let request = message_request(false).replacen('{', "{ \"new\": 1.50, ", 1);
    let beta = "anthropic-beta: files\r\n";
    let answer = post(&gateway, "/v1/messages", beta, &request).await;
    assert_eq!((answer.status, answer.body), (200, message()));
    let count = r#"{"model":"chat","messages":[]}"#;
    post(&gateway, "/v1/messages/count_tokens", "", count).await;
    let received = upstream.requests();
    assert_eq!(
        (
            &received[0].body,
            received[0].headers["anthropic-beta"].as_str()
        ),
        (&request, "files")
    );
    assert_eq!(received[1].line, "POST /v1/messages/count_tokens HTTP/1.1");
}

#[tokio::test]
async fn tokens_are_counted_by_engines_that_are_said_to_count_them() {
    let counted = json!({"count": 7, "max_model_len": 64, "tokens": [1, 2, 3, 4, 5, 6, 7]});
    let counting = Upstream::always(move || Reply::Json(200, counted.to_string())).await;
    let other = Upstream::always(|| Reply::Json(200, completion("no"))).await;
    let plan = Plan::chain(&[other.address, counting.address])
        .profile("b", |profile| profile.capabilities.tokenize = true);
    let gateway = Gateway::start(&plan).await;
    let path = "/v1/messages/count_tokens";
    let request = json!({"model": "chat", "system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]});
    let answer = post(&gateway, path, "", &request.to_string()).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/b")
    );
    assert_eq!(answer.body, r#"{"input_tokens":7}"#);
    let received = counting.requests().remove(0);
    assert_eq!(received.line, "POST /tokenize HTTP/1.1");
    let sent: Value = serde_json::from_str(&received.body).unwrap();
    let conversation =
        json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]);
    let expected =
        json!({"model": "chat", "messages": conversation, "add_generation_prompt": true});
    assert_eq!(sent, expected);

    let mut admin = Client::connect(gateway.admin).await;
    let explain = "/explain?path=/v1/messages/count_tokens";
    admin.post_to(explain, "", &request.to_string()).await;
    let told: Value = serde_json::from_str(&admin.answer().await.body).unwrap();
    let dropped = told["candidates"][0]["dropped"].as_str().unwrap();
    assert!(dropped.contains("capabilities.tokenize"), "{dropped}");

    let gateway = Gateway::start(&Plan::chain(&[other.address])).await;
    let refused = post(&gateway, path, "", &request.to_string()).await;
    assert_eq!(
        (refused.status, refused.header("x-penstock-reason")),
        (400, "unsupported_by_backend")
    );
    assert_eq!((other.count(), counting.count()), (0, 1));
}

#[tokio::test]
async fn a_cut_message_ends_in_an_error_event_and_never_in_a_stop() {
    let cut = || Reply::Raw(sse_head() + &chunk(&(STARTED.to_owned() + SAID)));
    let upstream = Upstream::always(cut).await;
    let gateway = Gateway::start(&anthropic(&upstream)).await;
    let answer = post(&gateway, "/v1/messages", "", &message_request(true)).await;
    let (before, event) = answer.body.split_at(STARTED.len() + SAID.len());
    assert_eq!(before, STARTED.to_owned() + SAID);
    assert!(
        event.starts_with("event: error\ndata: {\"error\":{"),
        "{event}"
    );
    let answer = gateway.post(&chat(true)).await;
    assert!(answer.body.contains("stream_cut") && !answer.body.contains("[DONE]"));
}

#[tokio::test]
async fn a_message_that_began_with_an_error_is_repeated_elsewhere() {
    let overloaded = || {
        let error = "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"x\"}}\n\n";
        Reply::Sse(vec![STARTED.to_owned(), error.to_owned()])
    };
    let failing = Upstream::always(overloaded).await;
    let working = Upstream::always(|| {
        Reply::Sse(vec![
            STARTED.to_owned(),
            SAID.to_owned(),
            STOPPED.to_owned(),
        ])
    })
    .await;
    let plan = Plan::chain(&[failing.address, working.address])
        .speaking("a", Protocol::Anthropic)
        .speaking("b", Protocol::Anthropic);
    let gateway = Gateway::start(&plan).await;
    let answer = post(&gateway, "/v1/messages", "", &message_request(true)).await;
    assert_eq!((failing.count(), working.count()), (1, 1));
    assert_eq!(answer.body, [STARTED, SAID, STOPPED].concat());
}

/// An error event of a message.
fn error_of(kind: &str) -> String {
    let error = json!({"type": "error", "error": {"type": kind, "message": "busy"}});
    format!("event: error\ndata: {error}\n\n")
}

const CREATED: &str =
    "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{}}\n\n";
const WROTE: &str = "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}\n\n";
const COMPLETED: &str = "event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":3,\"output_tokens\":1}}}\n\n";
const RESPONSE: &str = r#"{"model":"chat","stream":true,"input":"Hi"}"#;

/// The two ways in which OpenAI says that a response failed.
fn failures(code: &str) -> [String; 2] {
    let failed = json!({"type": "response.failed", "response": {"status": "failed", "error": {"code": code, "message": "x"}}});
    let error = json!({"type": "error", "code": code, "message": "x", "param": null});
    [failed, error].map(|event| format!("event: {}\ndata: {event}\n\n", event["type"]))
}

#[tokio::test]
async fn a_stream_that_begins_with_a_limit_is_repeated_elsewhere_or_a_429() {
    let limited = |events: &[&str]| {
        let events: Vec<String> = events.iter().map(|event| (*event).to_owned()).collect();
        Upstream::always(move || Reply::Sse(events.clone()))
    };
    let event = error_of("rate_limit_error");
    let over = limited(&[STARTED, &event]).await;
    let working = limited(&[STARTED, SAID, STOPPED]).await;
    let plan = Plan::chain(&[over.address, working.address])
        .speaking("a", Protocol::Anthropic)
        .speaking("b", Protocol::Anthropic);
    let gateway = Gateway::start(&plan).await;
    let answer = post(&gateway, "/v1/messages", "", &message_request(true)).await;
    assert_eq!(answer.body, [STARTED, SAID, STOPPED].concat());
    let limit = "penstock_gateway_attempt_failures_total{backend=\"ns/a\",reason=\"status_429\"}";
    gateway.metric_is(limit, 1.0).await;

    let gateway = Gateway::start(&anthropic(&over)).await;
    let answer = post(&gateway, "/v1/messages", "", &message_request(true)).await;
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        (answer.status, body["error"]["type"].as_str()),
        (429, Some("rate_limit_error"))
    );
    let [failed, flat] = failures("rate_limit_exceeded");
    for event in [failed, flat] {
        let over = limited(&[CREATED, &event]).await;
        let gateway = Gateway::start(&Plan::chain(&[over.address])).await;
        let answer = post(&gateway, "/v1/responses", "", RESPONSE).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (429, "upstream_busy")
        );
    }
}

#[tokio::test]
async fn an_error_inside_a_stream_is_its_end_in_each_protocol() {
    let outcome = "penstock_gateway_requests_total{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"upstream_error\"}";
    let event = error_of("overloaded_error");
    let events = [STARTED, SAID, &event, STOPPED].concat();
    let failing = Upstream::always(move || Reply::Sse(vec![events.clone()])).await;
    let gateway = Gateway::start(&anthropic(&failing)).await;
    let answer = post(&gateway, "/v1/messages", "", &message_request(true)).await;
    assert_eq!(answer.body, [STARTED, SAID, &event].concat());
    let answer = gateway.post(&chat(true)).await;
    let last = answer.body.trim_end().lines().last().unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["type"], "overloaded_error");
    assert!(answer.body.contains("Hello") && !answer.body.contains("finish_reason\":\"stop"));
    gateway.metric_is(outcome, 2.0).await;

    for event in failures("server_error") {
        let events = [CREATED, WROTE, &event, COMPLETED].concat();
        let failing = Upstream::always(move || Reply::Sse(vec![events.clone()])).await;
        let gateway = Gateway::start(&Plan::chain(&[failing.address])).await;
        let answer = post(&gateway, "/v1/responses", "", RESPONSE).await;
        assert_eq!(answer.body, [CREATED, WROTE, &event].concat());
        gateway.metric_is(outcome, 1.0).await;
    }
}

#[tokio::test]
async fn what_a_protocol_cannot_carry_goes_to_a_backend_that_can() {
    let messages = Upstream::always(|| Reply::Json(200, message())).await;
    let chats = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let plan = Plan::chain(&[messages.address, chats.address]).speaking("a", Protocol::Anthropic);
    let gateway = Gateway::start(&plan).await;
    let request = format!("{{\"seed\":7,{}", chat(false).strip_prefix('{').unwrap());
    let answer = gateway.post(&request).await;
    assert_eq!(
        (answer.status, answer.header("x-penstock-backend")),
        (200, "ns/b")
    );
    assert_eq!((messages.count(), chats.count()), (0, 1));
    let answer = post(
        &gateway,
        "/v1/embeddings",
        "",
        r#"{"model":"chat","input":"x"}"#,
    )
    .await;
    assert_eq!((answer.status, chats.count()), (200, 2));
}

#[tokio::test]
async fn what_no_backend_can_carry_is_refused_by_name_or_dropped_by_the_rule() {
    let upstream = Upstream::always(|| Reply::Json(200, message())).await;
    let request = format!("{{\"seed\":7,{}", chat(false).strip_prefix('{').unwrap());
    let gateway = Gateway::start(&anthropic(&upstream)).await;
    let answer = gateway.post(&request).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (400, "unsupported_by_backend")
    );
    assert!(answer.body.contains("'seed'"), "{}", answer.body);
    assert_eq!(answer.header("x-penstock-reason"), "unsupported_by_backend");
    let broken = gateway.post(r#"{"model":"chat","messages":"Hi"}"#).await;
    assert_eq!(
        (broken.status, broken.code().as_str()),
        (400, "invalid_field")
    );
    assert_eq!(upstream.count(), 0);

    let plan = anthropic(&upstream).rule(|rule| rule.on_unsupported = OnUnsupported::Drop);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&request).await.status, 200);
    assert!(!upstream.requests()[0].body.contains("seed"));
}

#[tokio::test]
async fn callers_are_refused_in_their_own_protocol() {
    let busy = || Reply::Headers(429, "retry-after: 7\r\n", shaped_error("later"));
    let upstream = Upstream::always(busy).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = post(&gateway, "/v1/messages", "", &message_request(false)).await;
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(answer.status, 429);
    assert_eq!(
        body["error"],
        json!({"type": "rate_limit_error", "message": "later"})
    );
    let answer = post(&gateway, "/v1/messages", "", r#"{"model":"none"}"#).await;
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        (answer.status, body["error"]["type"].as_str()),
        (404, Some("not_found_error"))
    );
}

#[tokio::test]
async fn the_credential_goes_where_the_protocol_has_it() {
    let upstream = Upstream::always(|| Reply::Json(200, message())).await;
    let plan = anthropic(&upstream).credential("a", "key");
    let gateway = Gateway::start(&plan).await;
    let value = Credential::new("sk-1\n".to_owned());
    gateway.set_credentials(Credentials {
        values: BTreeMap::from([("key".to_owned(), value)]),
    });
    within("the credential is in use", async {
        while gateway.post(&chat(false)).await.status != 200 {}
    })
    .await;
    let received = upstream.requests().remove(0);
    assert_eq!(received.headers["x-api-key"], "sk-1");
    assert!(!received.headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_response_is_whole_only_with_its_last_event() {
    let events = [CREATED, WROTE, COMPLETED];
    let whole = Upstream::always(move || Reply::Sse(events.map(str::to_owned).to_vec())).await;
    let gateway = Gateway::start(&Plan::chain(&[whole.address])).await;
    let answer = post(&gateway, "/v1/responses", "", RESPONSE).await;
    assert_eq!(answer.body, events.concat());

    let cut = Upstream::always(|| Reply::Sse(vec![CREATED.to_owned(), WROTE.to_owned()])).await;
    let gateway = Gateway::start(&Plan::chain(&[cut.address])).await;
    let answer = post(&gateway, "/v1/responses", "", RESPONSE).await;
    let event = answer
        .body
        .strip_prefix(&(CREATED.to_owned() + WROTE))
        .unwrap();
    assert!(event.starts_with("event: error\ndata: "), "{event}");
}
