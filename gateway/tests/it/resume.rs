//! Streams that callers may come back to, before both kinds of stores.

use tokio::sync::mpsc::UnboundedSender;

use crate::harness::*;
use crate::jobs::Kept;

mod limits;
mod wires;

const RESUMED: &str = "penstock_gateway_resumed_streams_total";
const END: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\n";

/// A rule whose streams go on for this long.
fn plan(upstream: &Upstream, resumable_ms: u64) -> Plan {
    Plan::chain(&[upstream.address]).rule(|rule| rule.resumable_ms = Some(resumable_ms))
}

/// An upstream that the test drives.
async fn one() -> (UnboundedSender<Step>, Upstream) {
    let (steps, reply) = driven();
    (steps, Upstream::replies(vec![reply]).await)
}

/// What a caller gets of an event.
fn with_id(event: &str, stream: &str, number: usize) -> String {
    let lines = event.strip_suffix('\n').unwrap();
    format!("{lines}id: {stream}:{number}\n\n")
}

/// What a caller gets of events, each with the next number.
fn numbered(events: &[String], stream: &str) -> Vec<String> {
    let numbers = (1..).zip(events);
    numbers
        .map(|(number, event)| with_id(event, stream, number))
        .collect()
}

/// The stream that the last id in a text names.
fn stream_of(text: &str) -> String {
    let id = text
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("id: "));
    let id = id.unwrap_or_else(|| panic!("no id in {text}"));
    id.split_once(':').unwrap().0.to_owned()
}

fn words(count: usize) -> Vec<String> {
    (1..=count)
        .map(|number| word(&number.to_string()))
        .collect()
}

impl Client {
    /// Chunks until there are so many events.
    async fn events(&mut self, count: usize) -> String {
        let mut text = String::new();
        while text.matches("\n\n").count() < count {
            text.push_str(&self.chunk().await.unwrap().unwrap());
        }
        text
    }

    /// Comes back with the id of an event.
    async fn resume(&mut self, method: &str, path: &str, headers: &str, last: &str) {
        self.send(&format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nlast-event-id: {last}\r\n{headers}content-length: 0\r\n\r\n"
        ))
        .await;
    }
}

impl Gateway {
    /// The answer to a caller who comes back to a chat.
    async fn rest(&self, last: &str) -> Answer {
        let mut client = self.client().await;
        client
            .resume("POST", "/v1/chat/completions", "", last)
            .await;
        client.answer().await
    }

    /// A stream of which the caller got all these events before it left; its id.
    async fn left(&self, steps: &UnboundedSender<Step>, events: &[String]) -> String {
        let mut client = self.client().await;
        client.post("", &chat(true)).await;
        steps.send(Step::Write(sse_head())).unwrap();
        for event in events {
            steps.send(Step::Chunk(event.clone())).unwrap();
        }
        assert_eq!(client.head().await.0, 200);
        let seen = client.events(events.len()).await;
        let stream = stream_of(&seen);
        assert_eq!(seen, numbered(events, &stream).concat());
        stream
    }
}

/// A caller is cut off from `first` and comes back to `second`.
async fn comes_back(first: &Gateway, second: &Gateway, steps: &UnboundedSender<Step>) {
    let mut all = words(5);
    all.push(END.to_owned());
    all.push(DONE.to_owned());
    let stream = first.left(steps, &all[..2]).await;
    first
        .metric_is("penstock_gateway_detached_streams", 1.0)
        .await;
    let whole = numbered(&all, &stream);
    steps.send(Step::Chunk(all[2].clone())).unwrap();
    // What is there, and then what comes.
    let mut client = second.client().await;
    let last = format!("{stream}:2");
    client
        .resume("POST", "/v1/chat/completions", "", &last)
        .await;
    let (status, headers) = client.head().await;
    assert_eq!(
        (status, headers["content-type"].as_str()),
        (200, "text/event-stream")
    );
    assert_eq!(headers["x-accel-buffering"], "no");
    client.expect(&whole[2]).await;
    steps.send(Step::Chunk(all[3..5].concat())).unwrap();
    client.expect(&whole[3..5].concat()).await;
    steps.send(Step::Chunk(all[5..].concat())).unwrap();
    steps.send(Step::End).unwrap();
    client.expect(&whole[5..].concat()).await;
    assert_eq!(client.chunk().await, Ok(None));
    // It is kept after its end, for whoever has any of its ids.
    for (last, rest) in [(0, &whole[..]), (4, &whole[4..]), (7, &[])] {
        for gateway in [first, second] {
            let mut client = gateway.client().await;
            let last = format!("{stream}:{last}");
            client
                .resume("GET", "/v1/chat/completions", "", &last)
                .await;
            let answer = client.answer().await;
            assert!(answer.complete);
            assert_eq!((answer.status, answer.body), (200, rest.concat()));
        }
    }
    let route = "rule=\"ns/policy/chat\",backend=\"ns/a\"";
    let detached = format!("penstock_gateway_requests_total{{{route},outcome=\"detached\"}}");
    first.metric_is(&detached, 1.0).await;
    let tokens = format!(
        "gen_ai_client_token_usage_sum{{gen_ai_operation_name=\"chat\",gen_ai_token_type=\"output\",{route}}}"
    );
    first.metric_is(&tokens, 3.0).await;
    first
        .metric_is("penstock_gateway_detached_streams", 0.0)
        .await;
    first
        .metric_is(
            "penstock_gateway_resumable_streams_total{result=\"whole\"}",
            1.0,
        )
        .await;
    first
        .metric_is("penstock_gateway_in_flight_requests", 0.0)
        .await;
}

#[tokio::test]
async fn a_caller_who_was_cut_off_gets_the_rest_once_from_the_same_replica() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 30_000)).await;
    comes_back(&gateway, &gateway, &steps).await;
    assert_eq!((upstream.count(), upstream.gone()), (1, 0));
    gateway
        .metric_is(&format!("{RESUMED}{{result=\"found\"}}"), 7.0)
        .await;
}

#[tokio::test]
async fn a_caller_who_was_cut_off_gets_the_rest_once_from_another_replica() {
    let Some(kept) = Kept::redis() else { return };
    let (steps, upstream) = one().await;
    let plan = plan(&upstream, 30_000);
    let first = kept.gateway(&plan).await;
    let mut settings = kept.settings();
    settings.workers = 3;
    let second = Gateway::start_with(&plan, settings).await;
    comes_back(&first, &second, &steps).await;
    assert_eq!((upstream.count(), upstream.gone()), (1, 0));
}

#[tokio::test]
async fn a_stream_that_nobody_cuts_has_the_same_bytes_and_ids() {
    let events = [role(), word("hel"), word("lo"), DONE.to_owned()];
    let upstream = Upstream::start(|_, request| {
        if request.body.contains("\"stream\":true") {
            hello()
        } else {
            json_answer("x")
        }
    })
    .await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 30_000)).await;
    let answer = gateway.post(&chat(true)).await;
    let stream = stream_of(&answer.body);
    assert_eq!(answer.body, numbered(&events, &stream).concat());
    assert_eq!(gateway.rest(&format!("{stream}:0")).await.body, answer.body);
    let other = gateway.post(&chat(true)).await;
    assert_ne!(stream_of(&other.body), stream);
    // The request may be said again; nobody reads it.
    let mut client = gateway.client().await;
    let last = format!("last-event-id: {stream}:3\r\n");
    client.post(&last, &chat(true)).await;
    assert_eq!(client.answer().await.body, with_id(DONE, &stream, 4));
    assert_eq!(upstream.count(), 2);
    let whole = gateway.post(&chat(false)).await;
    assert_eq!(whole.body, completion("x"));
}

#[tokio::test]
async fn ids_of_no_stream_and_of_others_are_told_apart() {
    let upstream = Upstream::always(hello).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 30_000)).await;
    let alice = "authorization: Bearer a\r\n";
    let answer = gateway.post_with(alice, &chat(true)).await;
    let stream = stream_of(&answer.body);
    let path = "/v1/chat/completions";
    let unknown = "strm_00000000000000000000000000000000";
    for (headers, path, last, status, code) in [
        (alice, path, format!("{unknown}:1"), 404, "stream_not_found"),
        ("", path, format!("{stream}:1"), 404, "stream_not_found"),
        (
            "authorization: Bearer b\r\n",
            path,
            format!("{stream}:1"),
            404,
            "stream_not_found",
        ),
        (
            alice,
            "/v1/completions",
            format!("{stream}:1"),
            404,
            "stream_not_found",
        ),
        (alice, path, format!("{stream}:5"), 400, "invalid_field"),
        (alice, path, stream.clone(), 400, "invalid_field"),
        (alice, path, format!("{stream}:x"), 400, "invalid_field"),
    ] {
        let mut client = gateway.client().await;
        client.resume("POST", path, headers, &last).await;
        let answer = client.answer().await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{last} {headers}"
        );
    }
    // An answer that another server began would be paid for twice.
    let foreign = gateway.post_with("last-event-id: 7\r\n", &chat(true)).await;
    assert_eq!(foreign.status, 400);
    assert!(
        foreign.body.contains("strm_0123456789abcdef"),
        "{foreign:?}"
    );
    let mut client = gateway.client().await;
    client
        .resume("POST", "/v1/messages", "", &format!("{unknown}:1"))
        .await;
    let answer = client.answer().await;
    assert!(answer.body.contains("not_found_error"), "{answer:?}");
    let mut client = gateway.client().await;
    client
        .send(&format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n"))
        .await;
    assert_eq!(client.answer().await.status, 405);
    assert_eq!(upstream.count(), 1);
    gateway
        .metric_is(&format!("{RESUMED}{{result=\"not_found\"}}"), 6.0)
        .await;
}

#[tokio::test]
async fn heartbeats_between_events_with_ids_are_no_events() {
    let (steps, upstream) = one().await;
    let plan = plan(&upstream, 30_000).rule(|rule| rule.heartbeat_ms = Some(40));
    let kept = Kept::file();
    let gateway = kept.gateway(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    // The first ones come before it is known whether there is a stream.
    assert_eq!(client.head().await.0, 200);
    let mut seen = client.chunk().await.unwrap().unwrap();
    assert!(seen.starts_with(": still here\n"), "{seen}");
    let all = words(2);
    steps.send(Step::Write(sse_head())).unwrap();
    for event in &all {
        steps.send(Step::Chunk(event.clone())).unwrap();
        let before = seen.len();
        while !seen[before..].contains("id: ") || !seen.ends_with(": still here\n") {
            seen.push_str(&client.chunk().await.unwrap().unwrap());
        }
    }
    let events = seen.replace(": still here\n", "");
    assert_eq!(events, numbered(&all, &stream_of(&seen)).concat());
}
