//! Calls other than chat: each goes to its own path and is passed through unchanged.

use serde_json::json;

use crate::harness::*;

/// A call's path, a request with a field that nobody knows, and an answer to it.
fn calls() -> [(&'static str, &'static str, String, String); 3] {
    let usage = json!({"prompt_tokens": 7, "total_tokens": 7});
    [
        (
            "/v1/embeddings",
            "embeddings",
            json!({"input": ["a", "b"], "encoding_format": "base64", "x-new": [1.50]}).to_string(),
            json!({"object": "list", "data": [{"index": 0, "embedding": "AACAPw=="}], "usage": usage}).to_string(),
        ),
        (
            "/v1/rerank",
            "rerank",
            json!({"query": "q", "documents": ["a", "b"], "top_n": 1}).to_string(),
            json!({"results": [{"index": 1, "relevance_score": 0.9}], "usage": usage}).to_string(),
        ),
        (
            "/v1/score",
            "score",
            json!({"text_1": "a", "text_2": ["b", "c"]}).to_string(),
            json!({"data": [{"index": 0, "score": 0.25}], "usage": usage}).to_string(),
        ),
    ]
}

#[tokio::test]
async fn each_call_goes_to_its_path_with_every_byte_but_the_model() {
    for (path, operation, request, answer) in calls() {
        let busy = Upstream::always(|| Reply::Json(503, "{}".to_owned())).await;
        let reply = answer.clone();
        let upstream = Upstream::always(move || Reply::Json(200, reply.clone())).await;
        let plan = Plan::new()
            .backend("a", &[busy.address], 1, 0)
            .backend("b", &[upstream.address], 1, 1)
            .rule(|rule| rule.backends[1].model_override = Some("org/real".into()));
        let gateway = Gateway::start(&plan).await;
        let rest = request.strip_prefix('{').unwrap();
        let mut client = gateway.client().await;
        client
            .post_to(path, "", &format!("{{\"model\":\"chat\",{rest}"))
            .await;
        let answered = client.answer().await;

        assert_eq!((answered.status, answered.body), (200, answer), "{path}");
        let received = upstream.requests().remove(0);
        assert_eq!(received.line, format!("POST {path} HTTP/1.1"));
        assert_eq!(received.body, format!("{{\"model\":\"org/real\",{rest}"));
        assert_eq!(busy.count(), 1, "failed over from the first one");
        let series = format!(
            "gen_ai_client_token_usage_sum{{gen_ai_operation_name=\"{operation}\",gen_ai_token_type=\"input\""
        );
        let metrics = gateway.metrics().await;
        let counted = metrics
            .lines()
            .any(|line| line.starts_with(&series) && line.ends_with(" 7.0"));
        assert!(counted, "no {series} in {metrics}");
    }
}

#[tokio::test]
async fn calls_have_their_own_places_in_the_cache() {
    let upstream =
        Upstream::start(|number, _| Reply::Json(200, format!("{{\"n\":{number}}}"))).await;
    let plan = Plan::new()
        .backend("a", &[upstream.address], 1, 0)
        .cached(60_000);
    let gateway = Gateway::start(&plan).await;
    let mut bodies = Vec::new();
    for path in ["/v1/embeddings", "/v1/score", "/v1/embeddings"] {
        let mut client = gateway.client().await;
        client
            .post_to(path, "", r#"{"model":"chat","input":"a"}"#)
            .await;
        bodies.push(client.answer().await.body);
    }
    assert_eq!(bodies, [r#"{"n":0}"#, r#"{"n":1}"#, r#"{"n":0}"#]);
}
