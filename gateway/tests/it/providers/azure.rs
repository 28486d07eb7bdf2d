//! Azure: deployments in the path, `api-key`, a first chunk that tells of filters alone.

use penstock_core::config::FailureClass;

use super::*;

const FILTER: &str = "data: {\"choices\":[],\"created\":0,\"id\":\"\",\"model\":\"\",\"object\":\"\",\"prompt_filter_results\":[{\"prompt_index\":0}]}\n\n";

fn dated(upstream: &Upstream) -> Plan {
    let mut plan = plan(
        Protocol::AzureOpenAi,
        &format!("http://{}", upstream.address),
    );
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    backend.api_version = Some("2024-10-21".to_owned());
    plan
}

#[tokio::test]
async fn the_deployment_stands_in_the_path_and_every_byte_in_the_body() {
    let upstream = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let gateway = start(&dated(&upstream), "sk-1\n").await;
    let request = chat(false).replacen('{', "{ \"new\": 1.50, ", 1);
    let answer = gateway.post(&request).await;
    assert_eq!((answer.status, answer.body), (200, completion("yes")));
    let received = upstream.requests().remove(0);
    assert_eq!(
        received.line,
        "POST /openai/deployments/chat/chat/completions?api-version=2024-10-21 HTTP/1.1"
    );
    assert_eq!(received.body, request);
    assert_eq!(received.headers["api-key"], "sk-1");
    assert!(!received.headers.contains_key("authorization"));
}

#[tokio::test]
async fn the_model_of_the_backend_is_the_deployment() {
    let upstream = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let mut plan = dated(&upstream);
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    backend.model = Some("gpt 4".to_owned());
    backend.api_version = None;
    let gateway = start(&plan, "sk-1").await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let backend = plan.config.backends.get_mut(&id("a")).unwrap();
    backend.api_version = Some("2024-10-21".to_owned());
    gateway.apply(&plan).await;
    post(
        &gateway,
        "/v1/embeddings",
        r#"{"model":"chat","input":"x"}"#,
    )
    .await;
    let lines = upstream
        .requests()
        .into_iter()
        .map(|received| (received.line, received.body.contains("\"gpt 4\"")));
    let expected = [
        "POST /openai/v1/chat/completions HTTP/1.1",
        "POST /openai/deployments/gpt%204/embeddings?api-version=2024-10-21 HTTP/1.1",
    ];
    assert!(lines.eq(expected.map(|line| (line.to_owned(), true))));
}

#[tokio::test]
async fn a_model_that_would_leave_the_path_goes_nowhere() {
    let upstream = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let gateway = start(&dated(&upstream), "sk-1").await;
    for model in ["..", "a/../../x", "/"] {
        let request = json!({"model": model, "messages": []}).to_string();
        let answer = gateway.post(&request).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (400, "invalid_field"),
            "{model}"
        );
    }
    assert_eq!(upstream.count(), 0);
    let request = json!({"model": "a?b#c%2e/d", "messages": []}).to_string();
    assert_eq!(gateway.post(&request).await.status, 200);
    assert_eq!(
        upstream.requests()[0].line,
        "POST /openai/deployments/a%3Fb%23c%252e%2Fd/chat/completions?api-version=2024-10-21 HTTP/1.1"
    );
}

#[tokio::test]
async fn the_chunk_about_filters_passes_and_begins_no_answer() {
    let upstream = Upstream::always(|| {
        Reply::Sse(vec![
            FILTER.to_owned(),
            role(),
            word("Hello"),
            DONE.to_owned(),
        ])
    })
    .await;
    let cut = Upstream::always(|| Reply::Raw(sse_head() + &chunk(FILTER))).await;
    let mut plan = dated(&upstream)
        .url("b", &format!("http://{}", cut.address))
        .speaking("b", Protocol::AzureOpenAi);
    plan.config.rules[0].backends[0].priority = 1;
    let gateway = start(&plan, "sk-1").await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        answer.body,
        [FILTER, &role(), &word("Hello"), DONE].concat()
    );
    assert_eq!((cut.count(), upstream.count()), (1, 1));
    let request = r#"{"model":"chat","max_tokens":5,"stream":true,"messages":[{"role":"user","content":"Hi"}]}"#;
    let answer = post(&gateway, "/v1/messages", request).await;
    assert!(
        answer.body.contains("\"text\":\"Hello\"") && answer.body.contains("message_stop"),
        "{}",
        answer.body
    );
}

#[tokio::test]
async fn a_filtered_prompt_is_a_matter_of_content_policy() {
    let filtered = || {
        let error = json!({"error": {"message": "The response was filtered", "type": null, "param": "prompt",
            "code": "content_filter", "status": 400, "innererror": {"code": "ResponsibleAIPolicyViolation"}}});
        Reply::Json(400, error.to_string())
    };
    let strict = Upstream::always(filtered).await;
    let other = Upstream::always(|| Reply::Json(200, completion("yes"))).await;
    let mut plan = dated(&strict);
    let gateway = start(&plan, "sk-1").await;
    let answer = gateway.post(&chat(false)).await;
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(
        (answer.status, &body["error"]["code"]),
        (400, &json!("content_filter"))
    );
    plan = plan.backend("b", &[other.address], 1, 1).rule(|rule| {
        rule.retry.on.insert(FailureClass::ContentPolicy);
    });
    gateway.apply(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, other.count()), (200, 1));
}

#[tokio::test]
async fn a_busy_deployment_is_left_alone_as_long_as_it_asks() {
    let busy = || Reply::Headers(429, "retry-after: 7\r\n", shaped_error("later"));
    let upstream = Upstream::always(busy).await;
    let gateway = start(&dated(&upstream), "sk-1").await;
    assert_eq!(gateway.post(&chat(false)).await.status, 429);
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, upstream.count()), (429, 1));
    assert_eq!(answer.code(), "upstream_busy");
}
