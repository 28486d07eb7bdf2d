//! Streams that are cut and go on elsewhere.

use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use crate::harness::*;

mod refused;

/// The answer to a request that is to be continued, so that who was asked first does not matter.
type Rest = dyn Fn(&Value) -> Reply + Send + Sync;

/// Two endpoints that both begin an answer as `cut` says, and go on with it as `rest` says.
struct Pair {
    upstreams: [Upstream; 2],
}

impl Pair {
    async fn start(
        cut: impl Fn() -> Reply + Send + Sync + Clone + 'static,
        rest: impl Fn(&Value) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let rest: Arc<Rest> = Arc::new(rest);
        let one = || {
            let (cut, rest) = (cut.clone(), Arc::clone(&rest));
            Upstream::start(move |_, received| {
                let body: Value = serde_json::from_str(&received.body).unwrap();
                if is_continued(&body) {
                    rest(&body)
                } else {
                    cut()
                }
            })
        };
        Self {
            upstreams: [one().await, one().await],
        }
    }

    fn addresses(&self) -> [SocketAddr; 2] {
        [self.upstreams[0].address, self.upstreams[1].address]
    }

    fn plan(&self) -> Plan {
        rescued(&self.addresses())
    }

    /// The requests that go on with an answer, each with the endpoint that got it.
    fn continued(&self) -> Vec<(usize, Value)> {
        let upstreams = self.upstreams.iter().enumerate();
        let all = upstreams.flat_map(|(index, upstream)| {
            let bodies = upstream.requests().into_iter();
            bodies.map(move |received| (index, serde_json::from_str(&received.body).unwrap()))
        });
        all.filter(|(_, body)| is_continued(body)).collect()
    }

    fn counts(&self) -> [usize; 2] {
        [self.upstreams[0].count(), self.upstreams[1].count()]
    }
}

fn is_continued(body: &Value) -> bool {
    body["continue_final_message"] == true
        || body["prompt"]
            .as_str()
            .is_some_and(|prompt| prompt.contains("one"))
}

/// One backend with these endpoints, whose engine goes on with answers, under a rule that asks for it.
fn rescued(addresses: &[SocketAddr]) -> Plan {
    Plan::new()
        .backend("a", addresses, 1, 0)
        .profile("a", |profile| {
            profile.capabilities.continue_final_message = true;
        })
        .rule(|rule| rule.retry.rescue_streams = true)
}

fn event(id: &str, choice: &Value) -> String {
    let object = "chat.completion.chunk";
    let chunk =
        json!({"id": id, "object": object, "created": id.len(), "model": "m", "choices": [choice]});
    format!("data: {chunk}\n\n")
}

fn said(id: &str, text: &str) -> String {
    event(
        id,
        &json!({"index": 0, "delta": {"content": text}, "finish_reason": null}),
    )
}

fn opening(id: &str) -> String {
    event(
        id,
        &json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}),
    )
}

fn ended(id: &str) -> String {
    event(
        id,
        &json!({"index": 0, "delta": {}, "finish_reason": "stop"}),
    )
}

fn count(prompt: u64, completion: u64) -> String {
    let total = prompt + completion;
    let usage =
        json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total});
    format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n")
}

/// `one two ` and the end of the connection.
fn broken() -> Reply {
    let events = begun();
    Reply::Raw(sse_head() + &chunk(&events) + &chunk("data: {\"cho"))
}

fn begun() -> String {
    [
        opening("first"),
        said("first", "one "),
        said("first", "two "),
    ]
    .concat()
}

fn rest() -> Reply {
    let id = "second";
    let events = [
        opening(id),
        said(id, " three"),
        said(id, " four"),
        ended(id),
        count(14, 2),
    ];
    Reply::Sse(events.into_iter().chain([DONE.to_owned()]).collect())
}

/// What the caller gets of both.
fn joined() -> String {
    let id = "first";
    [
        begun(),
        said(id, "three"),
        said(id, " four"),
        ended(id),
        DONE.to_owned(),
    ]
    .concat()
}

fn with(members: &str) -> String {
    chat(true).replacen('{', &format!("{{{members},"), 1)
}

async fn results(gateway: &Gateway, result: &str, count: f64) {
    let series = format!("penstock_gateway_rescues_total{{result=\"{result}\"}}");
    gateway.metric_is(&series, count).await;
}

fn outcome(outcome: &str) -> String {
    format!(
        "penstock_gateway_requests_total{{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"{outcome}\"}}"
    )
}

fn is_broken(body: &str, begun: &str, code: &str) {
    let rest = body.strip_prefix(begun);
    let rest = rest.unwrap_or_else(|| panic!("{body} does not begin with {begun}"));
    assert!(
        rest.starts_with("data: {\"error\"") && rest.contains(code),
        "{rest}"
    );
    assert!(
        !rest.contains("[DONE]") && rest.matches("data:").count() == 1,
        "{rest}"
    );
}

#[tokio::test]
async fn a_cut_stream_goes_on_at_the_other_endpoint_as_one_stream() {
    let pair = Pair::start(broken, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan()).await;
    let answer = gateway.post(&chat(true)).await;
    assert!(answer.complete);
    assert_eq!((answer.status, answer.body), (200, joined()));
    assert_eq!(pair.counts(), [1, 1]);
    let (_, asked) = &pair.continued()[0];
    assert_eq!(
        asked["messages"],
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one two"}])
    );
    assert_eq!(
        [
            &asked["continue_final_message"],
            &asked["add_generation_prompt"]
        ],
        [&json!(true), &json!(false)]
    );
    results(&gateway, "joined", 1.0).await;
    gateway.metric_is(&outcome("ok"), 1.0).await;
    gateway
        .metric_is("penstock_gateway_retries_total", 1.0)
        .await;
    gateway
        .metric_is("penstock_gateway_in_flight_requests", 0.0)
        .await;
    // Both attempts: 12 and 2 tokens, of which the first engine did not tell, and 14 and 2.
    for (kind, sum) in [("input", 26.0), ("output", 4.0)] {
        let labels = format!(
            "gen_ai_operation_name=\"chat\",gen_ai_token_type=\"{kind}\",rule=\"ns/policy/chat\",backend=\"ns/a\""
        );
        gateway
            .metric_is(&format!("gen_ai_client_token_usage_sum{{{labels}}}"), sum)
            .await;
        gateway
            .metric_is(&format!("gen_ai_client_token_usage_count{{{labels}}}"), 2.0)
            .await;
    }
}

#[tokio::test]
async fn a_caller_who_asks_gets_one_count_of_both() {
    let pair = Pair::start(broken, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan()).await;
    let options = "\"stream_options\":{\"include_usage\":true}";
    let answer = gateway.post(&with(options)).await;
    let whole = joined().replace(DONE, &(count(12, 4) + DONE));
    assert_eq!(answer.body, whole);
}

#[tokio::test]
async fn a_text_completion_goes_on_behind_its_prompt() {
    let text = |id: &str, text: &str, reason: Value| {
        event(
            id,
            &json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason}),
        )
    };
    let first = text("first", " one", Value::Null);
    let cut = first.clone();
    let pair = Pair::start(
        move || Reply::Raw(sse_head() + &chunk(&cut)),
        move |_| {
            Reply::Sse(vec![
                text("x", " two", Value::Null),
                text("x", "", json!("stop")),
                DONE.to_owned(),
            ])
        },
    )
    .await;
    let gateway = Gateway::start(&pair.plan()).await;
    let mut client = gateway.client().await;
    let body = r#"{"model":"chat","stream":true,"prompt":"Count:","max_tokens":5}"#;
    client.post_to("/v1/completions", "", body).await;
    let answer = client.answer().await;
    let text = |text: &str, reason: Value| {
        event(
            "first",
            &json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason}),
        )
    };
    let whole = [
        first,
        text(" two", Value::Null),
        text("", json!("stop")),
        DONE.to_owned(),
    ];
    assert_eq!(answer.body, whole.concat());
    let (_, asked) = &pair.continued()[0];
    assert_eq!(
        (&asked["prompt"], &asked["max_tokens"]),
        (&json!("Count: one"), &json!(4))
    );
    assert_eq!(asked.get("continue_final_message"), None);
}

#[tokio::test]
async fn a_stall_and_an_abort_are_cuts_too() {
    let stalled = || {
        let (steps, reply) = driven();
        steps
            .send(Step::Write(sse_head() + &chunk(&begun())))
            .unwrap();
        hold(steps);
        reply
    };
    let pair = Pair::start(stalled, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan().rule(|rule| rule.timeouts.idle_ms = 200)).await;
    assert_eq!(gateway.post(&chat(true)).await.body, joined());
    let gone = || pair.upstreams.iter().map(Upstream::gone).sum::<usize>();
    until("the stalled one is closed", || gone() == 1).await;

    let aborted = || {
        let lost = json!({"index": 0, "delta": {"content": "lost"}, "finish_reason": "abort"});
        Reply::Sse(vec![begun() + &event("first", &lost) + DONE])
    };
    let pair = Pair::start(aborted, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan()).await;
    assert_eq!(gateway.post(&chat(true)).await.body, joined());
}

fn told(error: &Value) -> String {
    format!("data: {}\n\n", json!({ "error": error }))
}

#[tokio::test]
async fn an_error_of_the_engines_own_is_a_cut_too() {
    for error in [
        json!({"message": "EngineDeadError", "type": "InternalServerError", "param": null, "code": 500}),
        json!({"message": "x", "type": "server_error", "code": null}),
    ] {
        let failed = move || Reply::Sse(vec![begun() + &told(&error) + DONE]);
        let pair = Pair::start(failed, |_| rest()).await;
        let gateway = Gateway::start(&pair.plan()).await;
        assert_eq!(gateway.post(&chat(true)).await.body, joined());
        results(&gateway, "joined", 1.0).await;
        gateway.metric_is(&outcome("ok"), 1.0).await;
    }
}

#[tokio::test]
async fn an_error_of_the_engines_own_is_told_where_nobody_goes_on() {
    let error = json!({"message": "x", "type": "InternalServerError", "code": 500});
    let cut = error.clone();
    let failed = move || Reply::Sse(vec![begun() + &told(&cut)]);
    let pair = Pair::start(failed, |_| Reply::Reset).await;
    let gateway = Gateway::start(&pair.plan()).await;
    // It was kept back, and the gateway's own comes in its place.
    let answer = gateway.post(&chat(true)).await;
    is_broken(&answer.body, &begun(), "stream_upstream_error");
    results(&gateway, "failed", 1.0).await;
    // A stream that is more than a text ends in the engine's.
    let answer = gateway.post(&with("\"logprobs\":true")).await;
    assert_eq!(answer.body, begun() + &told(&error));
    gateway.metric_is(&outcome("upstream_error"), 2.0).await;
    assert_eq!(pair.continued().len(), 1);
}

/// Keeps the driver of a reply for ever, so that its connection stays.
fn hold(steps: UnboundedSender<Step>) {
    std::mem::forget(steps);
}

/// A chunked body that breaks off inside a chunk.
fn reset_after(events: &str) -> Reply {
    Reply::Raw(sse_head() + &chunk(events) + "ff\r\ndata: {")
}

#[tokio::test]
async fn a_second_cut_ends_in_the_error_event() {
    let second = opening("second") + &said("second", "three");
    let cut = second.clone();
    let pair = Pair::start(broken, move |_| reset_after(&cut)).await;
    let gateway = Gateway::start(&pair.plan()).await;
    let answer = gateway.post(&chat(true)).await;
    is_broken(
        &answer.body,
        &(begun() + &said("first", "three")),
        "stream_cut",
    );
    assert_eq!(pair.continued().len(), 1);
    gateway.metric_is(&outcome("cut"), 1.0).await;
}

#[tokio::test]
async fn an_engine_that_begins_to_think_does_not_go_on() {
    let thought = json!({"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": null});
    let events = vec![
        opening("second"),
        event("second", &thought),
        DONE.to_owned(),
    ];
    let pair = Pair::start(broken, move |_| Reply::Sse(events.clone())).await;
    let gateway = Gateway::start(&pair.plan()).await;
    let answer = gateway.post(&chat(true)).await;
    is_broken(&answer.body, &begun(), "stream_malformed");
}

#[tokio::test]
async fn a_text_is_kept_only_while_there_is_room_for_it() {
    let long = said("first", &"x".repeat(30 << 10)).repeat(3);
    let cut = long.clone();
    let pair = Pair::start(move || reset_after(&cut), |_| rest()).await;
    for (room, result) in [(0, "unfit"), (1 << 20, "joined")] {
        let mut settings = settings();
        settings.limits.total_body_bytes = room;
        let gateway = Gateway::start_with(&pair.plan(), settings).await;
        let answer = gateway.post(&chat(true)).await;
        if room == 0 {
            is_broken(&answer.body, &long, "stream_cut");
        }
        results(&gateway, result, 1.0).await;
    }
}

#[tokio::test]
async fn an_endpoint_that_fails_to_go_on_leaves_the_error_event() {
    type Made = fn() -> Reply;
    let failures: [(Made, &str); 4] = [
        (|| Reply::Reset, "broken"),
        (|| Reply::Json(500, "{}".to_owned()), "status_5xx"),
        (
            || Reply::Json(400, shaped_error("the template has no such thing")),
            "",
        ),
        (|| Reply::Silent, "first_token_timeout"),
    ];
    for (reply, reason) in failures {
        let pair = Pair::start(broken, move |_| reply()).await;
        let plan = pair.plan().rule(|rule| rule.timeouts.first_token_ms = 300);
        let gateway = Gateway::start(&plan).await;
        is_broken(
            &gateway.post(&chat(true)).await.body,
            &begun(),
            "stream_cut",
        );
        results(&gateway, "failed", 1.0).await;
        if !reason.is_empty() {
            let series = format!(
                "penstock_gateway_attempt_failures_total{{backend=\"ns/a\",reason=\"{reason}\"}}"
            );
            gateway.metric_is(&series, 1.0).await;
        }
        gateway
            .metric_is("penstock_gateway_in_flight_requests", 0.0)
            .await;
    }
}

#[tokio::test]
async fn only_the_tokens_left_are_asked_for() {
    let pair = Pair::start(broken, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan()).await;
    for (bound, most, left) in [("max_tokens", 9, 7), ("max_completion_tokens", 3, 1)] {
        let answer = gateway.post(&with(&format!("\"{bound}\":{most}"))).await;
        assert_eq!(answer.body, joined());
        let (_, asked) = pair
            .continued()
            .into_iter()
            .find(|(_, body)| body[bound] == left)
            .unwrap();
        assert_eq!(asked[bound], left);
    }
    let asked = pair.continued().len();
    let answer = gateway.post(&with("\"max_tokens\":2")).await;
    is_broken(&answer.body, &begun(), "stream_cut");
    results(&gateway, "no_tokens", 1.0).await;
    assert_eq!(pair.continued().len(), asked);
}

#[tokio::test]
async fn a_caller_who_leaves_meanwhile_ends_the_second_attempt() {
    let pair = Pair::start(broken, |_| Reply::Silent).await;
    let gateway = Gateway::start(&pair.plan()).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    assert_eq!(client.head().await.0, 200);
    client.expect(&begun()).await;
    until("another endpoint is asked", || pair.continued().len() == 1).await;
    let (index, _) = pair.continued()[0];
    drop(client);
    until("it is closed", || pair.upstreams[index].gone() == 1).await;
    gateway.metric_is(&outcome("client_gone"), 1.0).await;
    gateway
        .metric_is("penstock_gateway_in_flight_requests", 0.0)
        .await;
}

#[tokio::test]
async fn rescues_come_out_of_the_budget_of_retries() {
    let pair = Pair::start(broken, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan()).await;
    // 10 are saved, and 10 requests earn one.
    for _ in 0..11 {
        assert_eq!(gateway.post(&chat(true)).await.body, joined());
    }
    is_broken(
        &gateway.post(&chat(true)).await.body,
        &begun(),
        "stream_cut",
    );
    results(&gateway, "no_budget", 1.0).await;
}

#[tokio::test]
async fn a_rescued_answer_is_not_stored() {
    let pair = Pair::start(broken, |_| rest()).await;
    let gateway = Gateway::start(&pair.plan().cached(60_000)).await;
    for _ in 0..2 {
        let answer = gateway.post(&chat(true)).await;
        assert_eq!(
            (answer.header("x-penstock-cache"), &answer.body),
            ("miss", &joined())
        );
    }
    assert_eq!(pair.continued().len(), 2);
}

#[tokio::test]
async fn both_attempts_cost_what_they_took() {
    let pair = Pair::start(broken, |_| rest()).await;
    let plan = pair.plan().profile("a", |profile| {
        profile.price = Some(penstock_core::config::Price {
            input: 1_000_000,
            cached_input: 1_000_000,
            output: 10_000_000,
        });
    });
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(true)).await.body, joined());
    // 26 tokens at 1 USD a million and 4 at 10.
    let series = "penstock_gateway_cost_usd_total{rule=\"ns/policy/chat\",backend=\"ns/a\"}";
    let mut cost = 0.0;
    let wait = async {
        while cost == 0.0 {
            cost = gateway.metric(series).await;
        }
    };
    within("the cost is counted", wait).await;
    assert!((cost - 66e-6).abs() < 1e-9, "{cost}");
}
