//! Streams with which nobody may go on.

use super::*;

#[tokio::test]
async fn what_is_more_than_a_text_ends_in_the_error_event() {
    let pair = Pair::start(broken, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan()).await;
    let members = [
        r#""tools":[{"type":"function","function":{"name":"f"}}]"#,
        r#""response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{}}}"#,
        r#""guided_choice":["a"]"#,
        r#""logprobs":true"#,
        r#""n":2"#,
        r#""stop":["x"]"#,
    ];
    for members in members {
        is_broken(
            &gateway.post(&with(members)).await.body,
            &begun(),
            "stream_cut",
        );
    }
    results(&gateway, "unfit", 6.0).await;
    assert!(pair.continued().is_empty());
}

#[tokio::test]
async fn thoughts_calls_of_tools_and_a_reason_to_end_end_the_chance() {
    for choice in [
        json!({"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": null}),
        json!({"index": 0, "delta": {"tool_calls": [{"index": 0}]}, "finish_reason": null}),
        json!({"index": 0, "delta": {"content": "x"}, "finish_reason": "length"}),
    ] {
        let events = begun() + &event("first", &choice);
        let cut = events.clone();
        // A reset: an end after a reason to end would be a whole answer.
        let pair = Pair::start(move || reset_after(&cut), |_| rest()).await;
        let gateway = Gateway::start(&pair.plan()).await;
        let answer = gateway.post(&chat(true)).await;
        is_broken(&answer.body, &events, "stream_cut");
        assert!(pair.continued().is_empty());
        results(&gateway, "unfit", 1.0).await;
    }
}

#[tokio::test]
async fn an_error_that_is_the_requests_fault_is_passed_on() {
    for error in [
        json!({"message": "too long", "type": "BadRequestError", "param": null, "code": 400}),
        json!({"message": "no", "type": "invalid_request_error", "code": "content_filter"}),
        json!({"message": "what this is, nobody knows"}),
    ] {
        let events = begun() + &told(&error);
        let cut = events.clone();
        let pair = Pair::start(move || Reply::Sse(vec![cut.clone()]), |_| rest()).await;
        let gateway = Gateway::start(&pair.plan()).await;
        assert_eq!(gateway.post(&chat(true)).await.body, events);
        assert!(pair.continued().is_empty());
        gateway.metric_is(&outcome("upstream_error"), 1.0).await;
    }
}

#[tokio::test]
async fn only_pods_of_one_template_go_on_with_each_others_answers() {
    let pair = Pair::start(broken, |_| rest()).await;
    let other = pair.plan().revisions("a", &["a-1", "a-2"]);
    let gateway = Gateway::start(&other).await;
    is_broken(
        &gateway.post(&chat(true)).await.body,
        &begun(),
        "stream_cut",
    );
    results(&gateway, "no_endpoint", 1.0).await;
    assert!(pair.continued().is_empty());
    let same = pair.plan().revisions("a", &["a-1", "a-1"]);
    let gateway = Gateway::start(&same).await;
    assert_eq!(gateway.post(&chat(true)).await.body, joined());
}

#[tokio::test]
async fn another_backend_never_goes_on_with_it() {
    let pair = Pair::start(broken, |_| rest()).await;
    let [first, second] = pair.addresses();
    let able = |profile: &mut penstock_core::config::Profile| {
        profile.capabilities.continue_final_message = true;
    };
    let plan = rescued(&[first])
        .backend("b", &[second], 1, 0)
        .profile("b", able);
    let gateway = Gateway::start(&plan).await;
    is_broken(
        &gateway.post(&chat(true)).await.body,
        &begun(),
        "stream_cut",
    );
    results(&gateway, "no_endpoint", 1.0).await;
}

#[tokio::test]
async fn nobody_goes_on_who_does_not_say_so_or_is_not_asked_to() {
    let pair = Pair::start(broken, |_| rest()).await;
    let unable = pair.plan().profile("a", |profile| {
        profile.capabilities.continue_final_message = false;
    });
    let gateway = Gateway::start(&unable).await;
    is_broken(
        &gateway.post(&chat(true)).await.body,
        &begun(),
        "stream_cut",
    );
    let unasked = pair.plan().rule(|rule| rule.retry.rescue_streams = false);
    let gateway = Gateway::start(&unasked).await;
    is_broken(
        &gateway.post(&chat(true)).await.body,
        &begun(),
        "stream_cut",
    );
    assert!(
        !gateway
            .metrics()
            .await
            .contains("penstock_gateway_rescues_total{")
    );
    let once = pair.plan().rule(|rule| rule.retry.attempts = 1);
    let gateway = Gateway::start(&once).await;
    is_broken(
        &gateway.post(&chat(true)).await.body,
        &begun(),
        "stream_cut",
    );
    results(&gateway, "no_budget", 1.0).await;
    assert!(pair.continued().is_empty());
}
