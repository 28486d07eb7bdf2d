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
async fn a_form_goes_on_with_every_byte_but_the_model() {
    let busy = Upstream::always(|| Reply::Json(503, "{}".to_owned())).await;
    let upstream = Upstream::always(|| Reply::Json(200, "{\"text\":\"hello\"}".to_owned())).await;
    let plan = Plan::new()
        .backend("a", &[busy.address], 1, 0)
        .backend("b", &[upstream.address], 1, 1)
        .rule(|rule| rule.backends[1].model_override = Some("openai/whisper".into()))
        .cached(60_000);
    let gateway = Gateway::start(&plan).await;
    let form = |model: &str| {
        format!(
            "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n\r\n--B\r\n\
             Content-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--B--\r\n"
        )
    };
    let body = form("chat");
    let mut client = gateway.client().await;
    let head = "content-type: multipart/form-data; boundary=B\r\n";
    client
        .send(&format!(
            "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\n{head}content-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "{\"text\":\"hello\"}")
    );
    assert_eq!(answer.header("x-penstock-cache"), "bypass");
    let received = upstream.requests().remove(0);
    assert_eq!(received.line, "POST /v1/audio/transcriptions HTTP/1.1");
    assert_eq!(
        received.headers["content-type"],
        "multipart/form-data; boundary=B"
    );
    assert_eq!(received.body, form("openai/whisper"));
}

#[tokio::test]
async fn other_paths_of_sound_and_pictures_pass_as_they_are() {
    let upstream =
        Upstream::start(|number, _| Reply::Json(200, format!("{{\"n\":{number}}}"))).await;
    let plan = Plan::new()
        .backend("a", &[upstream.address], 1, 0)
        .rule(|rule| rule.backends[0].model_override = Some("org/real".into()))
        .cached(60_000);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    let body = r#"{"model":"chat","input":"a"}"#;
    let paths = [
        "/v1/audio/isolation",
        "/v1/images/in/painting%20",
        "/v1/audio/isolations",
    ];
    for (number, path) in paths.into_iter().enumerate() {
        for cache in ["miss", "hit"] {
            client.post_to(path, "", body).await;
            let answer = client.answer().await;
            assert_eq!(answer.header("x-penstock-cache"), cache);
            let expected = (200, format!("{{\"n\":{number}}}"));
            assert_eq!((answer.status, answer.body), expected);
        }
        let received = upstream.requests().pop().unwrap();
        assert_eq!(received.line, format!("POST {path} HTTP/1.1"));
        assert_eq!(received.body, body.replace("chat", "org/real"));
    }
    for (path, status, code) in [
        ("/v1/audio/../models", 400, "dot_segments"),
        ("/v1/audio/%2e%2e/models", 400, "dot_segments"),
        ("/v1/audio/", 404, "path_not_found"),
        ("/v1/video/x", 404, "path_not_found"),
    ] {
        client.post_to(path, "", body).await;
        let answer = client.answer().await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{path}"
        );
    }
    client.post_to("/v1/images/x", "", "{}").await;
    assert_eq!(client.answer().await.code(), "missing_model");
    assert_eq!(upstream.count(), paths.len());
}

#[tokio::test]
async fn a_stream_of_other_events_ends_with_its_body() {
    let events = [
        "data: {\"type\":\"transcript.text.delta\"}\n\n",
        "data: {\"type\":\"transcript.text.done\"}\n\n",
    ];
    let upstream = Upstream::always(move || Reply::Sse(events.map(str::to_owned).to_vec())).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = gateway.client().await;
    let body = r#"{"model":"chat","stream":true,"input":"say it"}"#;
    client.post_to("/v1/audio/speech", "", body).await;
    assert_eq!(client.answer().await.body, events.concat());
}

#[tokio::test]
async fn what_is_asked_besides_an_open_path_goes_with_it() {
    let upstream =
        Upstream::start(|number, _| Reply::Json(200, format!("{{\"n\":{number}}}"))).await;
    let plan = Plan::chain(&[upstream.address]).cached(60_000);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    for path in [
        "/v1/audio/isolate?output_format=pcm",
        "/v1/audio/isolate?output_format=wav",
        "/v1/audio/isolate",
        "/v1/chat/completions?api-version=x",
    ] {
        client.post_to(path, "", &chat(false)).await;
        assert_eq!(client.answer().await.status, 200, "{path}");
    }
    let targets = upstream.requests();
    let targets: Vec<&str> = targets.iter().map(|one| one.line.as_str()).collect();
    assert_eq!(
        targets,
        [
            "POST /v1/audio/isolate?output_format=pcm HTTP/1.1",
            "POST /v1/audio/isolate?output_format=wav HTTP/1.1",
            "POST /v1/audio/isolate HTTP/1.1",
            "POST /v1/chat/completions HTTP/1.1",
        ]
    );
}

#[tokio::test]
async fn a_form_is_explained_as_it_is_sent() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = Client::connect(gateway.admin).await;
    let form = "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nchat\r\n--b--\r\n";
    let request = format!(
        "POST /explain?path=/v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\n\
         content-type: multipart/form-data; boundary=b\r\ncontent-length: {}\r\n\r\n{form}",
        form.len()
    );
    client.send(&request).await;
    let answer = client.answer().await;
    assert!(
        answer.body.contains(r#""backend":"ns/a""#),
        "{}",
        answer.body
    );
}

#[tokio::test]
async fn a_sound_plays_while_it_is_made() {
    let (steps, reply) = driven();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: audio/pcm\r\ntransfer-encoding: chunked\r\n\r\n";
    steps.send(Step::Write(head.to_owned())).unwrap();
    steps.send(Step::Chunk("tone".to_owned())).unwrap();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = gateway.client().await;
    let body = r#"{"model":"chat","input":"sing","response_format":"pcm"}"#;
    client.post_to("/v1/audio/speech", "", body).await;
    assert_eq!(client.head().await.0, 200);
    client.expect("tone").await;
    steps.send(Step::Chunk("more".to_owned())).unwrap();
    client.expect("more").await;
    steps.send(Step::End).unwrap();
    assert_eq!(client.chunk().await, Ok(None));
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
