//! Streams: piece by piece, byte for byte, and what happens when either side goes.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;

use crate::harness::*;
use crate::report::{listen, report_where};

/// A gateway before an upstream that the test drives.
async fn one(
    plan: impl FnOnce(Plan) -> Plan,
) -> (tokio::sync::mpsc::UnboundedSender<Step>, Upstream, Gateway) {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&plan(Plan::chain(&[upstream.address]))).await;
    (steps, upstream, gateway)
}

#[tokio::test]
async fn each_piece_arrives_before_the_next_is_sent() {
    let (steps, _upstream, gateway) = one(|plan| plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    let (status, headers) = client.head().await;
    assert_eq!(status, 200);
    assert_eq!(headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(headers["x-penstock-engine"], "simulated");
    assert!(!headers.contains_key("set-cookie"));
    client.expect(&word("one")).await;
    for number in 0..100 {
        let text = word(&format!("\u{e9}{number}"));
        steps.send(Step::Chunk(text.clone())).unwrap();
        client.expect(&text).await;
    }
    finish(&mut client, &steps).await;
}

#[tokio::test]
async fn an_event_passes_when_it_is_whole_however_it_comes() {
    let (steps, _upstream, gateway) = one(|plan| plan).await;
    let mut client = gateway.begun(&steps).await;
    let text = word("two");
    let (start, rest) = text.split_at(20);
    // Two chunks.
    steps.send(Step::Chunk(start.to_owned())).unwrap();
    steps.send(Step::Chunk(rest.to_owned())).unwrap();
    client.expect(&text).await;
    // A chunk in two segments.
    let framed = chunk(&text);
    let (start, rest) = framed.split_at(framed.len() - 20);
    steps.send(Step::Write(start.to_owned())).unwrap();
    steps.send(Step::Write(rest.to_owned())).unwrap();
    client.expect(&text).await;
    // Many events in one segment.
    let many: String = (0..50).map(|number| word(&number.to_string())).collect();
    steps.send(Step::Chunk(many.clone())).unwrap();
    client.expect(&many).await;
    finish(&mut client, &steps).await;
}

#[tokio::test]
async fn the_first_event_goes_out_when_it_is_whole() {
    let (steps, upstream, gateway) = one(|plan| plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    let text = role() + &word("one");
    let (start, rest) = text.split_at(text.len() - 5);
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(start.to_owned())).unwrap();
    until("upstream has the request", || upstream.count() == 1).await;
    let early = tokio::time::timeout(Duration::from_millis(100), client.head()).await;
    assert!(
        early.is_err(),
        "an answer that may still be repeated elsewhere"
    );
    steps.send(Step::Chunk(rest.to_owned())).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&text).await;
    finish(&mut client, &steps).await;
}

#[tokio::test]
async fn a_request_that_comes_in_pieces_is_read_whole() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let body = chat(false);
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-custom: a b\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let end = request.len() - body.len();
    for cuts in [
        vec![3],
        vec![end - 30],
        vec![end - 2],
        vec![end],
        vec![end + 7],
        vec![30, end - 1, end + 1, end + 20],
    ] {
        let mut client = gateway.client().await;
        let mut sent = 0;
        for cut in cuts.into_iter().chain([request.len()]) {
            client.send(&request[sent..cut]).await;
            sent = cut;
            // The worker has seen the piece once it has answered somebody else.
            let mut other = gateway.client().await;
            other
                .send("GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
                .await;
            assert_eq!(other.answer().await.status, 200);
        }
        assert_eq!(client.answer().await.body, completion("x"));
        let received = upstream.requests().pop().unwrap();
        assert_eq!(
            (
                received.body.as_str(),
                received.headers["x-custom"].as_str()
            ),
            (body.as_str(), "a b")
        );
    }
}

#[tokio::test]
async fn bytes_pass_unchanged_and_only_the_model_is_replaced() {
    let events = vec![
        ": note\r\n\r\ndata:{\"choices\":[{}],  \"x\":1}\r\n\r\n".to_owned(),
        word("é\u{1F600}"),
        DONE.to_owned(),
    ];
    let expected = events.concat();
    let upstream = Upstream::always(move || Reply::Sse(events.clone())).await;
    let plan = Plan::chain(&[upstream.address])
        .rule(|rule| rule.backends[0].model_override = Some("org/\"real\"".into()));
    let gateway = Gateway::start(&plan).await;
    let body = "{ \"messages\":[{\"content\":\"\\u00e9 \\\"model\\\"\"}],\n \"model\" : \"chat\" , \"seed\":1.0 }";
    let answer = gateway.post(body).await;
    assert_eq!(answer.body, expected);
    let received = &upstream.requests()[0];
    assert_eq!(
        received.body,
        body.replace("\"chat\"", "\"org/\\\"real\\\"\"")
    );
    assert_eq!(received.line, "POST /v1/chat/completions HTTP/1.1");
    assert_eq!(
        received.headers["content-length"],
        received.body.len().to_string()
    );
}

#[tokio::test]
async fn headers_are_cleaned_both_ways() {
    let upstream =
        Upstream::always(|| Reply::Headers(200, "set-cookie: a\r\nx-kept: 1\r\n", completion("x")))
            .await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let headers = "authorization: Bearer caller\r\ncookie: a=b\r\nx-request-id: mine\r\naccept-encoding: gzip\r\nx-custom: 1\r\n";
    let answer = gateway.post_with(headers, &chat(false)).await;
    let sent = &upstream.requests()[0].headers;
    for name in ["authorization", "cookie", "accept-encoding", "connection"] {
        assert!(!sent.contains_key(name), "{name}");
    }
    assert_eq!(
        (sent["x-request-id"].as_str(), sent["x-custom"].as_str()),
        ("mine", "1")
    );
    assert_eq!(sent["via"], "1.1 penstock-ns-gateway");
    assert_eq!(sent["host"], upstream.address.to_string());
    assert_eq!(
        (answer.header("x-request-id"), answer.header("x-kept")),
        ("mine", "1")
    );
    assert_eq!(answer.header("set-cookie"), "");
    let made = gateway.post(&chat(false)).await;
    assert_eq!(made.header("x-request-id").len(), 32);
    assert_eq!(
        upstream.requests()[1].headers["x-request-id"],
        made.header("x-request-id")
    );
}

#[tokio::test]
async fn a_caller_that_leaves_closes_the_connection_upstream_and_counts_no_more() {
    let (steps, begun) = driven();
    let replies = vec![
        Reply::Silent,
        Reply::Headers(503, "", shaped_error("no")),
        begun,
    ];
    let upstream = Upstream::replies(replies).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut lines = listen(&gateway).await;
    let in_flight = "penstock_gateway_in_flight_requests";
    let gone = "penstock_gateway_requests_total{rule=\"ns/policy/chat\",backend=\"ns/a\",outcome=\"client_gone\"}";

    // Before a head of an answer.
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("upstream has the request", || upstream.count() == 1).await;
    gateway.metric_is(in_flight, 1.0).await;
    drop(client);
    until("upstream is closed", || upstream.gone() == 1).await;
    report_where(&mut lines, "nothing in flight", |load| {
        (load.in_flight, load.waiting) == (0, 0)
    })
    .await;
    gateway.metric_is(gone, 1.0).await;

    // Inside a stream that a second attempt began.
    let client = gateway.begun(&steps).await;
    report_where(&mut lines, "in flight", |load| load.in_flight == 1).await;
    drop(client);
    until("upstream is closed", || upstream.gone() == 2).await;
    let report = report_where(&mut lines, "nothing in flight", |load| load.in_flight == 0).await;
    let load = &report.backends[&id("a")];
    assert_eq!((load.arrivals, load.waiting, load.ttft.count()), (2, 0, 1));
    gateway.metric_is(gone, 2.0).await;
    gateway.metric_is(in_flight, 0.0).await;
}

#[tokio::test]
async fn a_caller_that_leaves_while_it_is_held_frees_its_place() {
    let mut plan = Plan::chain(&[nobody()]);
    plan.set_endpoints("a", &[]);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    gateway
        .metric_is("penstock_gateway_held_requests", 1.0)
        .await;
    drop(client);
    gateway
        .metric_is("penstock_gateway_held_requests", 0.0)
        .await;
    let mut lines = listen(&gateway).await;
    report_where(&mut lines, "nothing held", |load| {
        (load.in_flight, load.held) == (0, 0)
    })
    .await;
}

#[tokio::test]
async fn an_abort_inside_a_stream_ends_in_an_error_event_instead_of_done() {
    let upstream = Upstream::always(|| Reply::Sse(vec![word("one"), abort() + DONE])).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(true)).await;
    assert!(
        answer
            .body
            .starts_with(&(word("one") + &abort() + "data: {\"error\"")),
        "{}",
        answer.body
    );
    assert!(answer.body.contains("stream_aborted") && !answer.body.contains("[DONE]"));
}

#[tokio::test]
async fn an_end_without_done_is_a_cut() {
    let upstream = Upstream::always(|| Reply::Sse(vec![word("one")])).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(true)).await;
    assert!(answer.body.contains("stream_cut"), "{}", answer.body);
}

#[tokio::test]
async fn an_end_before_all_choices_have_begun_is_a_cut() {
    let end = "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    let upstream = Upstream::always(move || Reply::Sse(vec![word("one"), end.to_owned()])).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(true)).await;
    assert!(answer.body.contains("[DONE]"), "{}", answer.body);
    let two = chat(true).replacen('{', "{\"n\":2,", 1);
    let answer = gateway.post(&two).await;
    assert!(answer.body.contains("stream_cut"), "{}", answer.body);
}

#[tokio::test]
async fn an_end_without_its_empty_line_is_none() {
    for end in ["data: [DONE]\n", "data: [DONE]"] {
        let events = move || Reply::Sse(vec![word("one"), end.to_owned()]);
        let upstream = Upstream::always(events).await;
        let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
        let answer = gateway.post(&chat(true)).await;
        let rest = answer.body.strip_prefix(&word("one")).unwrap();
        assert_eq!(rest.trim_end(), "data: [DONE]");
        assert!(rest.ends_with("\n\n"), "{rest:?}");
    }
}

#[tokio::test]
async fn a_cut_inside_an_event_leaves_no_part_of_it() {
    let upstream =
        Upstream::always(|| Reply::Raw(sse_head() + &chunk(&(word("one") + "data: {\"cho")))).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(true)).await;
    let rest = answer.body.strip_prefix(&word("one")).unwrap();
    assert!(rest.starts_with("data: {\"error\""), "{rest}");
}

#[tokio::test]
async fn a_cut_inside_a_large_event_closes_that_event_first() {
    let large = format!("data: {{\"cho{}", "x".repeat(100_000));
    let sent = large.clone();
    let upstream =
        Upstream::always(move || Reply::Raw(sse_head() + &chunk(&(word("one") + &sent)))).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(true)).await;
    let rest = answer.body.strip_prefix(&(word("one") + &large)).unwrap();
    assert!(rest.starts_with("\n\ndata: {\"error\""), "{rest}");
}

#[tokio::test]
async fn a_stream_that_stalls_ends_in_an_error_event() {
    let (steps, upstream, gateway) =
        one(|plan| plan.rule(|rule| rule.timeouts.idle_ms = 100)).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    let answer = client.answer().await;
    assert!(answer.body.contains("stream_stalled"), "{}", answer.body);
    until("upstream is closed", || upstream.gone() == 1).await;
}

#[tokio::test]
async fn an_endless_event_ends_in_an_error_event() {
    let (steps, _upstream, gateway) = one(|plan| plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    for _ in 0..20 {
        steps.send(Step::Chunk("x".repeat(64 << 10))).unwrap();
    }
    let answer = client.answer().await;
    assert!(answer.body.ends_with("}\n\n") && answer.body.contains("stream_malformed"));
    assert!(answer.body.len() < 3 << 20);
}

#[tokio::test]
async fn a_large_json_answer_passes_as_it_comes_and_its_cut_is_seen() {
    let text = "x".repeat(1 << 20);
    let body = completion(&text);
    let upstream = Upstream::replies(vec![
        Reply::Json(200, body.clone()),
        Reply::Raw(format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{}",
            body.len(),
            &body[..body.len() / 2]
        )),
    ])
    .await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert!(answer.complete && answer.body == body);
    let answer = gateway.post(&chat(false)).await;
    assert!(!answer.complete);
}

#[tokio::test]
async fn connections_upstream_are_used_again() {
    let upstream = Upstream::start(|number, _| {
        if number % 2 == 0 {
            hello()
        } else {
            json_answer("x")
        }
    })
    .await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = gateway.client().await;
    for number in 0..6 {
        client.post("", &chat(number % 2 == 0)).await;
        assert!(client.answer().await.complete);
    }
    assert!(
        upstream
            .requests()
            .iter()
            .all(|received| received.connection == 0),
        "{:?}",
        upstream.requests()
    );
}

#[tokio::test]
async fn a_caller_that_sends_in_two_segments_is_answered_without_delay() {
    let upstream = Upstream::always(hello).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    // Nagle's algorithm on, as in clients that do not think of it.
    let mut client = gateway.client().await;
    client.stream.set_nodelay(false).unwrap();
    let body = chat(true);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut times = Vec::new();
    for _ in 0..25 {
        #[expect(clippy::disallowed_methods, reason = "this test is about real time")]
        let start = Instant::now();
        client.stream.write_all(head.as_bytes()).await.unwrap();
        client.stream.write_all(body.as_bytes()).await.unwrap();
        let (status, _) = client.head().await;
        assert_eq!(status, 200);
        while client.chunk().await.unwrap().is_some() {}
        times.push(start.elapsed());
    }
    times.sort();
    // A delayed acknowledgement costs 40 ms each time but the first; a busy machine costs that only now and then.
    assert!(times[3] < Duration::from_millis(35), "{times:?}");
}

#[tokio::test]
async fn streams_are_counted_and_the_count_goes_to_who_asked() {
    let count =
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n";
    let events = vec![role(), word("one"), count.to_owned(), DONE.to_owned()];
    let upstream = Upstream::always(move || Reply::Sse(events.clone())).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let options = r#","stream_options":{"include_usage":true}"#;
    let (plain, asking) = (
        chat(true),
        chat(true).replacen("\"chat\"", &format!("\"chat\"{options}"), 1),
    );
    assert_eq!(
        gateway.post(&plain).await.body,
        role() + &word("one") + DONE
    );
    assert_eq!(
        gateway.post(&asking).await.body,
        role() + &word("one") + count + DONE
    );
    let requests = upstream.requests();
    assert_eq!([&requests[0].body, &requests[1].body], [&asking, &asking]);
}

#[tokio::test]
async fn a_backend_that_refuses_to_count_is_not_asked() {
    let events = vec![role(), word("one"), DONE.to_owned()];
    let upstream = Upstream::always(move || Reply::Sse(events.clone())).await;
    let plan = Plan::chain(&[upstream.address]).profile("a", |profile| {
        profile.capabilities.lacks_stream_usage = true;
    });
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(answer.body, role() + &word("one") + DONE);
    assert_eq!(upstream.requests()[0].body, chat(true));
}

#[tokio::test]
async fn a_page_is_no_answer() {
    let bad = Upstream::always(|| Reply::Json(200, "<html>hello</html>".to_owned())).await;
    let good = Upstream::always(|| Reply::Json(200, "{\"choices\":[]}".to_owned())).await;
    let gateway = Gateway::start(&Plan::chain(&[bad.address, good.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "{\"choices\":[]}")
    );
    let alone = Gateway::start(&Plan::chain(&[bad.address])).await;
    assert_eq!(alone.post(&chat(false)).await.status, 502);
}

/// An event that breaks off inside its JSON.
fn damaged() -> String {
    "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}\n\n".to_owned()
}

#[tokio::test]
async fn an_event_that_cannot_be_read_is_left_out_of_a_text() {
    let events = vec![role(), word("one"), damaged(), word("two"), DONE.to_owned()];
    let upstream = Upstream::always(move || Reply::Sse(events.clone())).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(answer.status, 200);
    let rest = answer.body.strip_prefix(&(role() + &word("one"))).unwrap();
    let (notice, rest) = rest.split_once("\n\n").unwrap();
    assert!(
        notice.starts_with(": ") && notice.contains("left out"),
        "{notice}"
    );
    assert_eq!(rest, word("two") + DONE);
    let metrics = gateway.metrics().await;
    assert!(metrics.contains("penstock_gateway_events_left_out_total 1\n"));
}

#[tokio::test]
async fn an_event_that_cannot_be_read_ends_in_an_error_what_a_program_reads() {
    let events = vec![role(), word("one"), damaged(), word("two"), DONE.to_owned()];
    let upstream = Upstream::always(move || Reply::Sse(events.clone())).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let call = chat(true).replace(
        "\"messages\"",
        "\"tools\":[{\"type\":\"function\"}],\"messages\"",
    );
    let answer = gateway.post(&call).await;
    assert_eq!(answer.status, 200);
    let rest = answer.body.strip_prefix(&(role() + &word("one"))).unwrap();
    assert!(
        rest.contains("\"stream_malformed\"") && !rest.contains("two"),
        "{rest}"
    );
    assert!(!rest.contains("[DONE]"));
}

#[tokio::test]
async fn a_stream_that_begins_with_what_cannot_be_read_is_repeated_elsewhere() {
    let events = vec![role(), damaged(), word("two"), DONE.to_owned()];
    let bad = Upstream::always(move || Reply::Sse(events.clone())).await;
    let good = Upstream::always(|| Reply::Sse(vec![role(), word("good"), DONE.to_owned()])).await;
    let gateway = Gateway::start(&Plan::chain(&[bad.address, good.address])).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(answer.body, role() + &word("good") + DONE);
    assert_eq!(bad.requests().len(), 1);
}

#[tokio::test]
async fn a_large_answer_that_ends_with_its_connection_is_whole_or_breaks_off() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n";
    let whole = completion(&"x".repeat(600 << 10));
    for (sent, is_whole) in [(whole.len(), true), (whole.len() - 1, false)] {
        let text = format!("{head}{}", &whole[..sent]);
        let upstream = Upstream::always(move || Reply::Raw(text.clone())).await;
        let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
        let answer = gateway.post(&chat(false)).await;
        assert_eq!((answer.status, answer.complete), (200, is_whole));
    }
}
