//! Gemini: its own paths and bodies, streams without a mark of their end.

use super::*;

fn provider(upstream: &Upstream) -> Plan {
    let url = format!("http://{}/v1beta", upstream.address);
    plan(Protocol::Gemini, &url)
}

fn answer(text: &str, finish: Option<&str>) -> Value {
    let mut answer = json!({"responseId": "r1", "modelVersion": "gemini", "candidates": [{"index": 0, "content": {"parts": [{"text": text}]}}],
        "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 2}});
    if let Some(reason) = finish {
        answer["candidates"][0]["finishReason"] = json!(reason);
    }
    answer
}

fn event(text: &str, finish: Option<&str>) -> String {
    format!("data: {}\r\n\r\n", answer(text, finish))
}

#[tokio::test]
async fn a_chat_is_asked_where_the_model_stands_in_the_path() {
    let upstream =
        Upstream::always(|| Reply::Json(200, answer("Hello", Some("STOP")).to_string())).await;
    let mut plan = provider(&upstream);
    plan.config.backends.get_mut(&id("a")).unwrap().model = Some("gemini-3/pro".to_owned());
    let gateway = start(&plan, "g-1\n").await;
    let answered = gateway.post(&chat(false)).await;
    let body: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(answered.status, 200, "{body}");
    assert_eq!(body["choices"][0]["message"]["content"], "Hello");
    assert_eq!(body["usage"]["total_tokens"], 7);
    let received = upstream.requests().remove(0);
    assert_eq!(
        received.line,
        "POST /v1beta/models/gemini-3%2Fpro:generateContent HTTP/1.1"
    );
    assert_eq!(received.headers["x-goog-api-key"], "g-1");
    let sent: Value = serde_json::from_str(&received.body).unwrap();
    let expected =
        json!({"contents": [{"role": "user", "parts": [{"text": "hi"}]}], "generationConfig": {}});
    assert_eq!(sent, expected);
}

#[tokio::test]
async fn a_stream_is_counted_and_the_count_shown_to_those_who_asked() {
    let upstream = Upstream::always(|| {
        Reply::Sse(vec![
            event("Hel", None),
            event("lo", None),
            event("", Some("STOP")),
        ])
    })
    .await;
    let gateway = start(&provider(&upstream), "g-1").await;
    let unasked = gateway.post(&chat(true)).await.body;
    let request = chat(true).replacen('{', r#"{"stream_options":{"include_usage":true},"#, 1);
    let asked = gateway.post(&request).await.body;
    assert_eq!(
        upstream.requests()[0].line,
        "POST /v1beta/models/chat:streamGenerateContent?alt=sse HTTP/1.1"
    );
    for body in [&unasked, &asked] {
        assert!(
            body.contains("\"Hel\"") && body.ends_with("data: [DONE]\n\n"),
            "{body}"
        );
    }
    assert!(!unasked.contains("\"usage\"") && asked.contains("\"total_tokens\":7"));
    let metrics = gateway.metrics().await;
    let series =
        "gen_ai_client_token_usage_sum{gen_ai_operation_name=\"chat\",gen_ai_token_type=\"input\"";
    let counted = |line: &str| line.starts_with(series) && line.ends_with(" 10.0");
    assert!(metrics.lines().any(counted), "{metrics}");
}

#[tokio::test]
async fn a_message_is_answered_by_way_of_a_chat() {
    let upstream =
        Upstream::always(|| Reply::Sse(vec![event("Hello", None), event("", Some("MAX_TOKENS"))]))
            .await;
    let gateway = start(&provider(&upstream), "g-1").await;
    let request = r#"{"model":"chat","max_tokens":5,"stream":true,"messages":[{"role":"user","content":"Hi"}]}"#;
    let answered = post(&gateway, "/v1/messages", request).await;
    for part in [
        "\"text\":\"Hello\"",
        "\"max_tokens\"",
        "\"output_tokens\":2",
        "message_stop",
    ] {
        assert!(answered.body.contains(part), "{}", answered.body);
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_in_an_error_or_elsewhere() {
    let cut = Upstream::always(|| Reply::Sse(vec![event("Hel", None)])).await;
    let gateway = start(&provider(&cut), "g-1").await;
    let answered = gateway.post(&chat(true)).await.body;
    assert!(
        answered.contains("stream_cut") && !answered.contains("[DONE]"),
        "{answered}"
    );

    let broken =
        Upstream::always(|| Reply::Sse(vec![event("", Some("MALFORMED_FUNCTION_CALL"))])).await;
    let other = Upstream::always(hello).await;
    let plan = provider(&broken).backend("b", &[other.address], 1, 1);
    let gateway = start(&plan, "g-1").await;
    let answered = gateway.post(&chat(true)).await.body;
    assert!(answered.contains("\"hel\""), "{answered}");
    assert_eq!((broken.count(), other.count()), (1, 1));
}

#[tokio::test]
async fn refusals_are_told_in_the_callers_words() {
    let quota = json!({"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED",
        "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]}});
    let replies = vec![
        Reply::Json(
            400,
            json!({"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}})
                .to_string(),
        ),
        Reply::Json(429, quota.to_string()),
    ];
    let upstream = Upstream::replies(replies).await;
    let gateway = start(&provider(&upstream), "g-1").await;
    let answered = gateway.post(&chat(false)).await;
    let body: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(
        (answered.status, &body["error"]["message"]),
        (400, &json!("no"))
    );
    let answered = gateway.post(&chat(false)).await;
    assert_eq!(
        (answered.status, answered.header("retry-after")),
        (429, "7")
    );
    // Until then it is left alone.
    let answered = gateway.post(&chat(false)).await;
    assert_eq!(
        (answered.status, answered.code().as_str()),
        (429, "upstream_busy")
    );
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn what_gemini_cannot_carry_makes_it_no_candidate() {
    let gemini =
        Upstream::always(|| Reply::Json(200, answer("no", Some("STOP")).to_string())).await;
    let other = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let plan = provider(&gemini).backend("b", &[other.address], 1, 1);
    let gateway = start(&plan, "g-1").await;
    let request = chat(false).replacen('{', r#"{"logit_bias":{"1":1},"#, 1);
    assert_eq!(gateway.post(&request).await.status, 200);
    let tokens = r#"{"model":"chat","input":[1,2]}"#;
    assert_eq!(post(&gateway, "/v1/embeddings", tokens).await.status, 200);
    assert_eq!((gemini.count(), other.count()), (0, 2));
}

fn vectors(body: &str) -> Reply {
    let asked: Value = serde_json::from_str(body).unwrap();
    let requests = asked["requests"].as_array().unwrap();
    let length = |request: &Value| {
        request["content"]["parts"][0]["text"]
            .as_str()
            .unwrap()
            .len()
    };
    let vectors = requests
        .iter()
        .map(|request| json!({"values": [length(request), 0.5]}));
    let vectors: Vec<Value> = vectors.collect();
    Reply::Json(200, json!({"embeddings": vectors}).to_string())
}

#[tokio::test]
async fn embeddings_are_asked_all_together_by_the_backends_name() {
    let upstream = Upstream::start(|_, received| vectors(&received.body)).await;
    let mut plan = provider(&upstream);
    plan.config.backends.get_mut(&id("a")).unwrap().model = Some("embedding-1".to_owned());
    let gateway = start(&plan, "g-1").await;
    let request = json!({"model": "chat", "input": ["a", "bcd"], "dimensions": 2, "encoding_format": "float"});
    let answered = post(&gateway, "/v1/embeddings", &request.to_string()).await;
    let body: Value = serde_json::from_str(&answered.body).unwrap();
    assert_eq!(answered.status, 200, "{body}");
    let told = [0, 1].map(|index| body["data"][index]["embedding"].clone());
    assert_eq!(told, [json!([1, 0.5]), json!([3, 0.5])]);
    assert_eq!(body["model"], "embedding-1");
    let received = upstream.requests().remove(0);
    assert_eq!(
        received.line,
        "POST /v1beta/models/embedding-1:batchEmbedContents HTTP/1.1"
    );
    let sent: Value = serde_json::from_str(&received.body).unwrap();
    let one = |text: &str| json!({"model": "models/embedding-1", "content": {"parts": [{"text": text}]}, "outputDimensionality": 2});
    assert_eq!(sent, json!({"requests": [one("a"), one("bcd")]}));
}

#[tokio::test]
async fn embeddings_count_no_tokens_but_those_that_google_counts() {
    let uncounted = || json!({"embeddings": [{"values": [1]}]});
    let mut counted = uncounted();
    counted["usageMetadata"] = json!({"promptTokenCount": 4});
    let replies = [uncounted(), counted].map(|answer| Reply::Json(200, answer.to_string()));
    let upstream = Upstream::replies(replies.into()).await;
    let gateway = start(&provider(&upstream), "g-1").await;
    for (told, counts, served) in [(0, 0.0, 1.0), (4, 1.0, 2.0)] {
        let request = r#"{"model":"chat","input":"x"}"#;
        let answered = post(&gateway, "/v1/embeddings", request).await;
        let body: Value = serde_json::from_str(&answered.body).unwrap();
        let expected = json!({"prompt_tokens": told, "total_tokens": told});
        assert_eq!(body["usage"], expected);
        let labels = "rule=\"ns/policy/chat\",backend=\"ns/a\"";
        let requests = format!("penstock_gateway_requests_total{{{labels},outcome=\"ok\"}}");
        gateway.metric_is(&requests, served).await;
        let kind = "gen_ai_operation_name=\"embeddings\",gen_ai_token_type=\"input\"";
        let count = format!("gen_ai_client_token_usage_count{{{kind},{labels}}}");
        gateway.metric_is(&count, counts).await;
    }
}

#[tokio::test]
async fn embeddings_of_several_callers_are_one_call() {
    let upstream = Upstream::start(|_, received| vectors(&received.body)).await;
    let plan = provider(&upstream).rule(|rule| {
        rule.join_embeddings = Some(penstock_core::config::JoinEmbeddings {
            within_ms: 10_000,
            max_inputs: 2,
        });
    });
    let gateway = start(&plan, "g-1").await;
    let call = async |text: &str| {
        let request = json!({"model": "chat", "input": text, "encoding_format": "base64"});
        let answered = post(&gateway, "/v1/embeddings", &request.to_string()).await;
        let body: Value = serde_json::from_str(&answered.body).unwrap();
        body["data"][0]["embedding"].clone()
    };
    let told = tokio::join!(call("a"), call("bcd"));
    // 1 and 0.5, 3 and 0.5, as little-endian bytes.
    assert_eq!(told, (json!("AACAPwAAAD8="), json!("AABAQAAAAD8=")));
    assert_eq!(upstream.count(), 1);
}
