//! Comments in streams on which nothing goes out.

use std::time::Duration;

use crate::harness::*;

const COMMENT: &str = ": still here\n\n";
const SLOW: Duration = Duration::from_millis(400);

/// Each tenth of what slow upstreams take.
fn beating(addresses: &[std::net::SocketAddr]) -> Plan {
    Plan::chain(addresses).rule(|rule| rule.heartbeat_ms = Some(40))
}

#[tokio::test]
async fn a_stream_that_is_slow_to_begin_has_comments_first_and_is_whole() {
    let events = vec![role(), word("hi"), "data: [DONE]\n\n".to_owned()];
    let whole = events.concat();
    let upstream = Upstream::always(move || Reply::LateSse(SLOW, events.clone())).await;
    let gateway = Gateway::start(&beating(&[upstream.address])).await;
    let answer = gateway
        .post_with("x-request-id: mine\r\n", &chat(true))
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), "text/event-stream");
    assert_eq!(answer.header("x-accel-buffering"), "no");
    assert_eq!(answer.header("x-request-id"), "mine");
    let rest = answer.body.trim_start_matches(COMMENT);
    assert_eq!(rest, whole);
    assert!(
        answer.body.len() >= rest.len() + 2 * COMMENT.len(),
        "{}",
        answer.body
    );
}

#[tokio::test]
async fn a_gap_between_two_events_has_comments_and_one_inside_an_event_has_none() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&beating(&[upstream.address])).await;
    let mut client = gateway.begun(&steps).await;
    client.expect(COMMENT).await;
    client.expect(COMMENT).await;
    // What does not fit into the gateway's hands passes in parts.
    let large = word(&"x".repeat(70 << 10));
    let (start, rest) = large.split_at(large.len() - 10);
    steps.send(Step::Chunk(start.to_owned())).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    steps.send(Step::Chunk(rest.to_owned())).unwrap();
    let mut text = String::new();
    while !text.ends_with(rest) {
        text.push_str(&client.chunk().await.unwrap().unwrap());
    }
    assert_eq!(text.trim_start_matches(COMMENT), large);
}

#[tokio::test]
async fn a_refusal_after_the_first_comment_is_an_error_event_of_the_callers_protocol() {
    let (first, second) = (driven(), driven());
    let upstream = Upstream::replies(vec![first.1, second.1]).await;
    let plan = beating(&[upstream.address]).rule(|rule| rule.retry.attempts = 1);
    let gateway = Gateway::start(&plan).await;
    let anthropic = r#"{"model":"chat","max_tokens":9,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
    for (steps, path, body, start) in [
        (
            first.0,
            "/v1/chat/completions",
            chat(true),
            "data: {\"error\":{",
        ),
        (
            second.0,
            "/v1/messages",
            anthropic.to_owned(),
            "event: error\ndata: {",
        ),
    ] {
        let mut client = gateway.client().await;
        client.post_to(path, "", &body).await;
        assert_eq!(client.head().await.0, 200, "{path}");
        client.expect(COMMENT).await;
        let error = shaped_error("broken");
        let head = "HTTP/1.1 500 Oh\r\ncontent-type: application/json\r\ncontent-length";
        let answer = format!("{head}: {}\r\n\r\n{error}", error.len());
        steps.send(Step::Write(answer)).unwrap();
        let mut text = String::new();
        while let Some(chunk) = client.chunk().await.unwrap() {
            text.push_str(&chunk);
        }
        let event = text.trim_start_matches(COMMENT);
        assert!(
            event.starts_with(start) && event.ends_with("}\n\n"),
            "{path}: {event}"
        );
        assert!(
            !event.contains("[DONE]") && event.contains("broken"),
            "{path}: {event}"
        );
    }
}

#[tokio::test]
async fn what_is_quick_and_what_is_no_stream_is_as_without() {
    let upstream = Upstream::replies(vec![
        Reply::Json(500, shaped_error("broken")),
        hello(),
        Reply::Late(SLOW, completion("late")),
    ])
    .await;
    let plan = beating(&[upstream.address]).rule(|rule| {
        rule.retry.attempts = 1;
        rule.heartbeat_ms = Some(200);
    });
    let gateway = Gateway::start(&plan).await;
    let refused = gateway.post(&chat(true)).await;
    assert_eq!(refused.status, 500);
    let streamed = gateway.post(&chat(true)).await;
    assert!(!streamed.body.contains(COMMENT) && streamed.header("x-penstock-backend") == "ns/a");
    let whole = gateway.post(&chat(false)).await;
    assert_eq!((whole.status, whole.body), (200, completion("late")));
}

#[tokio::test]
async fn who_leaves_between_comments_ends_the_call() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&beating(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    client.head().await;
    client.expect(COMMENT).await;
    assert_eq!(upstream.gone(), 0);
    drop(client);
    let gone = async {
        while upstream.gone() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone)
        .await
        .unwrap();
}
