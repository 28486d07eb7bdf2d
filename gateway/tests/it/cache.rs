//! The exact cache.

use std::time::Duration;

use penstock_core::config::NameMatch;

use crate::harness::*;

/// An upstream that counts in its answers.
async fn counting(stream: bool) -> Upstream {
    Upstream::start(move |number, _| {
        if stream {
            Reply::Sse(vec![role(), word(&number.to_string()), DONE.to_owned()])
        } else {
            json_answer(&number.to_string())
        }
    })
    .await
}

#[tokio::test]
async fn an_equal_request_is_answered_from_the_cache() {
    let upstream = counting(false).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address]).cached(60_000)).await;
    let first = gateway.post("{\"model\":\"chat\",\"n\":1}").await;
    assert_eq!(first.header("x-penstock-cache"), "miss");
    let again = gateway.post("{ \"n\":1, \"model\":\"chat\" }").await;
    assert_eq!(
        (again.status, again.header("x-penstock-cache")),
        (200, "hit")
    );
    assert_eq!(
        (&again.body, again.header("content-type")),
        (&first.body, "application/json")
    );
    assert_eq!(again.header("x-penstock-backend"), "ns/a");
    let other = gateway.post("{\"model\":\"chat\",\"n\":2}").await;
    assert_eq!(
        (other.header("x-penstock-cache"), upstream.count()),
        ("miss", 2)
    );
    assert!(
        gateway
            .metrics()
            .await
            .contains("penstock_gateway_cache_lookups_total{result=\"hit\"} 1")
    );
}

#[tokio::test]
async fn a_stream_is_replayed_byte_for_byte() {
    let upstream = counting(true).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address]).cached(60_000)).await;
    let first = gateway.post(&chat(true)).await;
    let again = gateway.post(&chat(true)).await;
    assert_eq!(
        (again.body.as_str(), again.header("x-penstock-cache")),
        (first.body.as_str(), "hit")
    );
    assert_eq!(
        again.header("content-type"),
        "text/event-stream; charset=utf-8"
    );
    assert_eq!(again.header("x-penstock-engine"), "simulated");
    assert_eq!(
        gateway.post(&chat(false)).await.header("x-penstock-cache"),
        "miss",
        "a stream is no whole answer"
    );
}

#[tokio::test]
async fn only_whole_answers_are_stored() {
    let upstream = Upstream::replies(vec![
        Reply::Sse(vec![word("x")]),
        Reply::Sse(vec![word("x"), abort() + DONE]),
        Reply::Json(400, shaped_error("bad")),
        hello(),
    ])
    .await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address]).cached(60_000)).await;
    for _ in 0..4 {
        assert_eq!(
            gateway.post(&chat(true)).await.header("x-penstock-cache"),
            "miss"
        );
    }
    assert_eq!(
        gateway.post(&chat(true)).await.header("x-penstock-cache"),
        "hit"
    );
}

#[tokio::test]
async fn whatever_may_change_the_answer_is_part_of_the_key() {
    let upstream = counting(false).await;
    let plan = Plan::chain(&[upstream.address])
        .cached(60_000)
        .rule(|rule| rule.models.push(NameMatch::Prefix("chat-".to_owned())));
    let gateway = Gateway::start(&plan).await;
    let bodies = [
        r#"{"model":"chat","messages":[{"role":"user","content":"a"}]}"#,
        r#"{"model":"chat-2","messages":[{"role":"user","content":"a"}]}"#,
        r#"{"model":"chat","messages":[{"role":"user","content":"b"}]}"#,
        r#"{"model":"chat","messages":[{"role":"user","content":"a "}]}"#,
        r#"{"model":"chat","messages":[{"role":"system","content":"a"}]}"#,
        r#"{"model":"chat","messages":[{"role":"user","content":"a"}],"temperature":0}"#,
        r#"{"model":"chat","messages":[{"role":"user","content":"a"}],"stream":false}"#,
        r#"{"model":"chat","messages":[{"role":"user","content":"a"},{"role":"user","content":"a"}]}"#,
    ];
    for expected in ["miss", "hit"] {
        for (number, body) in bodies.iter().enumerate() {
            let answer = gateway.post(body).await;
            assert_eq!(answer.header("x-penstock-cache"), expected, "{body}");
            assert_eq!(answer.body, completion(&number.to_string()), "{body}");
        }
    }
    let mut client = gateway.client().await;
    let body = bodies[0];
    client
        .send(&format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    assert_eq!(
        client.answer().await.header("x-penstock-cache"),
        "miss",
        "another path"
    );
    assert_eq!(upstream.count(), bodies.len() + 1);
}

#[tokio::test]
async fn refusals_and_failures_are_not_stored() {
    let upstream = Upstream::replies(vec![
        Reply::Json(404, shaped_error("no")),
        Reply::Json(422, "{}".to_owned()),
        Reply::Json(500, shaped_error("no")),
        Reply::Json(429, shaped_error("no")),
        Reply::Json(201, completion("created")),
        json_answer("x"),
    ])
    .await;
    let plan = Plan::chain(&[upstream.address])
        .cached(60_000)
        .rule(|rule| rule.retry.attempts = 1);
    let gateway = Gateway::start(&plan).await;
    for status in [404, 422, 500, 429, 201, 200] {
        let answer = gateway.post(&chat(false)).await;
        assert_eq!(
            (answer.status, answer.header("x-penstock-cache")),
            (status, "miss")
        );
    }
    assert_eq!(
        gateway.post(&chat(false)).await.header("x-penstock-cache"),
        "hit"
    );
}

#[tokio::test]
async fn a_full_cache_drops_what_was_used_longest_ago() {
    let upstream = Upstream::always(|| json_answer(&"x".repeat(10_000))).await;
    // Room for three answers and not for four.
    let gateway =
        Gateway::start(&Plan::chain(&[upstream.address]).cached_up_to(60_000, 35_000)).await;
    let ask = async |number: u32| {
        let answer = gateway
            .post(&format!("{{\"model\":\"chat\",\"n\":{number}}}"))
            .await;
        answer.header("x-penstock-cache").to_owned()
    };
    for number in 0..3 {
        assert_eq!(ask(number).await, "miss");
    }
    assert_eq!(ask(0).await, "hit");
    assert_eq!(ask(3).await, "miss");
    assert_eq!(ask(1).await, "miss", "pushed out by the fourth");
    assert_eq!(ask(0).await, "hit");
    assert_eq!(ask(3).await, "hit");
}

#[tokio::test]
async fn a_stored_answer_needs_no_backend() {
    let upstream = counting(false).await;
    let mut plan = Plan::chain(&[upstream.address]).cached(60_000);
    let gateway = Gateway::start(&plan).await;
    let first = gateway.post(&chat(false)).await;
    plan.set_endpoints("a", &[]);
    plan.config.rules[0].retry.attempts = 1;
    gateway.apply(&plan).await;
    let again = gateway.post(&chat(false)).await;
    assert_eq!(
        (again.header("x-penstock-cache"), &again.body),
        ("hit", &first.body)
    );
}

#[tokio::test]
async fn answers_expire() {
    let upstream = counting(false).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address]).cached(200)).await;
    gateway.post(&chat(false)).await;
    within("the answer expires", async {
        while gateway.post(&chat(false)).await.body == completion("0") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn a_caller_may_go_past_the_cache() {
    let upstream = counting(false).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address]).cached(60_000)).await;
    for directive in ["no-store", "max-age=0, No-Cache"] {
        let answer = gateway
            .post_with(&format!("cache-control: {directive}\r\n"), &chat(false))
            .await;
        assert_eq!(answer.header("x-penstock-cache"), "bypass");
    }
    assert_eq!(
        gateway.post(&chat(false)).await.header("x-penstock-cache"),
        "miss",
        "nothing was stored"
    );
}

#[tokio::test]
async fn an_answer_of_a_fallback_or_of_a_changed_backend_is_not_served() {
    let second = counting(false).await;
    let gateway = Gateway::start(&Plan::chain(&[nobody(), second.address]).cached(60_000)).await;
    for _ in 0..2 {
        assert_eq!(
            gateway.post(&chat(false)).await.header("x-penstock-cache"),
            "miss"
        );
    }

    let upstream = counting(false).await;
    let plan = Plan::chain(&[upstream.address]).cached(60_000);
    let gateway = Gateway::start(&plan).await;
    gateway.post(&chat(false)).await;
    let mut changed = plan.clone();
    changed.config.backends.get_mut(&id("a")).unwrap().model = Some("other".to_owned());
    gateway.apply(&changed).await;
    assert_eq!(
        gateway.post(&chat(false)).await.header("x-penstock-cache"),
        "miss"
    );
    assert_eq!(
        gateway.post(&chat(false)).await.header("x-penstock-cache"),
        "hit"
    );
}

#[tokio::test]
async fn without_a_cache_nothing_is_said_of_one() {
    let upstream = counting(false).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    gateway.post(&chat(false)).await;
    assert!(
        !gateway
            .post(&chat(false))
            .await
            .headers
            .contains_key("x-penstock-cache")
    );
    assert_eq!(upstream.count(), 2);
}

#[tokio::test]
async fn an_error_with_status_200_is_passed_on_and_not_stored() {
    let errors = [
        "{\"error\":{\"message\":\"no\",\"code\":404}}",
        "{\"error\":\"no\"}",
    ];
    let mut replies: Vec<Reply> = errors
        .iter()
        .map(|error| Reply::Json(200, (*error).to_owned()))
        .collect();
    replies.push(json_answer("x"));
    let upstream = Upstream::replies(replies).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address]).cached(60_000)).await;
    for error in errors {
        let answer = gateway.post(&chat(false)).await;
        assert_eq!(
            (
                answer.status,
                answer.body.as_str(),
                answer.header("x-penstock-cache")
            ),
            (200, error, "miss")
        );
    }
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(answer.header("x-penstock-cache"), "miss");
    assert_eq!(answer.body, completion("x"));
    let series = |outcome| {
        format!(
            "penstock_gateway_requests_total{{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"{outcome}\"}}"
        )
    };
    gateway.metric_is(&series("refused"), 2.0).await;
    gateway.metric_is(&series("ok"), 1.0).await;
}
