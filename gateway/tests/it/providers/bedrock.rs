//! Bedrock: signed requests, refusals in its own words.

use super::*;

const FILE: &str = "[default]\naws_access_key_id = AKID\naws_secret_access_key = secret\naws_session_token = session\n";

fn provider(upstream: &Upstream) -> Plan {
    let url = format!("http://{}", upstream.address);
    let mut plan = plan(Protocol::Bedrock, &url);
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    backend.region = Some("eu-central-1".to_owned());
    backend.model = Some("eu.model-v1:0".to_owned());
    plan
}

fn answer() -> String {
    json!({"output": {"message": {"role": "assistant", "content": [{"text": "Hello"}]}}, "stopReason": "end_turn",
        "usage": {"inputTokens": 5, "outputTokens": 2, "totalTokens": 7}})
    .to_string()
}

#[tokio::test]
async fn a_chat_is_asked_with_a_signature_of_its_own() {
    let upstream = Upstream::always(|| Reply::Json(200, answer())).await;
    let gateway = start(&provider(&upstream), FILE).await;
    let steering =
        "x-amz-security-token: theirs\r\nx-amz-target: theirs\r\nauthorization: Bearer theirs\r\n";
    let answered = gateway.post_with(steering, &chat(false)).await;
    let body: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(answered.status, 200, "{body}");
    assert_eq!(body["choices"][0]["message"]["content"], "Hello");
    assert_eq!(body["usage"]["total_tokens"], 7);
    let received = upstream.requests().remove(0);
    assert_eq!(
        received.line,
        "POST /model/eu.model-v1%3A0/converse HTTP/1.1"
    );
    let signature = &received.headers["authorization"];
    assert!(
        signature.starts_with("AWS4-HMAC-SHA256 Credential=AKID/")
            && signature.contains("/eu-central-1/bedrock/aws4_request"),
        "{signature}"
    );
    assert_eq!(received.headers["x-amz-security-token"], "session");
    assert!(!received.headers.contains_key("x-amz-target"));
    let sent: Value = serde_json::from_str(&received.body).unwrap();
    assert_eq!(sent["messages"][0]["content"], json!([{"text": "hi"}]));
}

#[tokio::test]
async fn an_api_key_goes_as_it_is() {
    let upstream = Upstream::always(|| Reply::Json(200, answer())).await;
    let gateway = start(&provider(&upstream), "bedrock-api-key-1\n").await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let received = upstream.requests().remove(0);
    assert_eq!(
        received.headers["authorization"],
        "Bearer bedrock-api-key-1"
    );
    assert!(!received.headers.contains_key("x-amz-date"));
}

#[tokio::test]
async fn a_busy_model_is_followed_by_another_backend() {
    let busy = || {
        Reply::Headers(
            429,
            "x-amzn-errortype: ThrottlingException\r\n",
            r#"{"message":"slow down"}"#.to_owned(),
        )
    };
    let upstream = Upstream::always(busy).await;
    let other = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let alone = start(&provider(&upstream), FILE).await;
    let answered = alone.post(&chat(false)).await;
    let body: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(
        (answered.status, &body["error"]["message"]),
        (429, &json!("slow down"))
    );
    let plan = provider(&upstream).backend("b", &[other.address], 1, 1);
    let gateway = start(&plan, FILE).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!((upstream.count(), other.count()), (2, 1));
}

#[tokio::test]
async fn a_stream_that_is_no_stream_of_aws_is_broken() {
    let odd = "HTTP/1.1 200 OK\r\ncontent-type: application/vnd.amazon.eventstream\r\ncontent-length: 16\r\n\r\nnot what it says";
    let upstream = Upstream::always(move || Reply::Raw(odd.to_owned())).await;
    let other = Upstream::always(hello).await;
    let plan = provider(&upstream).backend("b", &[other.address], 1, 1);
    let gateway = start(&plan, FILE).await;
    let answered = gateway.post(&chat(true)).await;
    assert!(answered.body.contains("\"hel\""), "{}", answered.body);
    assert_eq!(
        upstream.requests()[0].line,
        "POST /model/eu.model-v1%3A0/converse-stream HTTP/1.1"
    );
}

#[tokio::test]
async fn a_conversation_with_calls_of_tools_goes_on_without_offering_them_again() {
    let upstream = Upstream::always(|| Reply::Json(200, answer())).await;
    let gateway = start(&provider(&upstream), FILE).await;
    let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let body = json!({"model": "chat", "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call("functions.f:0"), call("b")]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
    ]});
    let answered = gateway.post(&body.to_string()).await;
    assert_eq!(answered.status, 200, "{}", answered.body);
    let sent: Value = serde_json::from_str(&upstream.requests().remove(0).body).unwrap();
    let tool = json!({"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}});
    assert_eq!(sent["toolConfig"]["tools"], json!([tool]));
    let used = &sent["messages"][1]["content"][0]["toolUse"]["toolUseId"];
    let answered = &sent["messages"][2]["content"][0]["toolResult"]["toolUseId"];
    assert_eq!((used, answered), (&json!("functions_f_0"), used));
}
