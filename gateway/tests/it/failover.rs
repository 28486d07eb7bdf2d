//! Failover before the first byte, and none after it.

use std::time::{Duration, Instant};

use crate::harness::*;

async fn two(first: Upstream, plan: impl FnOnce(Plan) -> Plan) -> (Upstream, Upstream, Answer) {
    let second = Upstream::always(hello).await;
    let gateway = Gateway::start(&plan(Plan::chain(&[first.address, second.address]))).await;
    let answer = gateway.post(&chat(true)).await;
    (first, second, answer)
}

fn assert_second_answered(upstreams: &(Upstream, Upstream, Answer)) {
    let (_, second, answer) = upstreams;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(
        answer.body,
        [role(), word("hel"), word("lo"), DONE.to_owned()].concat()
    );
    assert!(answer.complete);
    assert_eq!(answer.header("x-penstock-backend"), "ns/b");
    assert_eq!(second.count(), 1);
}

#[tokio::test]
async fn statuses_that_another_may_do_better_are_repeated_there() {
    for status in [429, 500, 502, 503, 504] {
        let first = Upstream::always(move || Reply::Json(status, shaped_error("busy"))).await;
        let result = two(first, |plan| plan).await;
        assert_second_answered(&result);
        assert_eq!(result.0.count(), 1, "status {status}");
    }
}

#[tokio::test]
async fn a_refused_connection_is_repeated_elsewhere() {
    let second = Upstream::always(hello).await;
    let gateway = Gateway::start(&Plan::chain(&[nobody(), second.address])).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!((answer.status, second.count()), (200, 1));
}

#[tokio::test]
async fn a_connection_that_ends_before_the_first_byte_is_repeated_elsewhere() {
    let json =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"cho";
    let half = word("one");
    let half = &half[..half.len() / 2];
    for (what, sent) in [
        ("nothing", String::new()),
        ("half a head", "HTTP/1.1 200 OK\r\ncontent-ty".to_owned()),
        ("a head", sse_head()),
        ("a comment", sse_head() + &chunk(": wait\n\n")),
        ("the role", sse_head() + &chunk(&role())),
        ("half an event", sse_head() + &chunk(half)),
        (
            "a whole body without an answer",
            sse_head() + &chunk(&role()) + "0\r\n\r\n",
        ),
        ("half a JSON answer", json.to_owned()),
    ] {
        let first = Upstream::always(move || Reply::Raw(sent.clone())).await;
        let result = two(first, |plan| plan).await;
        assert_eq!(result.2.header("x-penstock-backend"), "ns/b", "{what}");
        assert_second_answered(&result);
        assert_eq!(result.0.count(), 1, "{what}");
    }
    assert_second_answered(&two(Upstream::always(|| Reply::Reset).await, |plan| plan).await);
}

/// What is not HTTP, or not within bounds.
fn malformed() -> Vec<(&'static str, String)> {
    let json = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";
    let many = "x-one-more: 1\r\n".repeat(500);
    vec![
        ("another protocol", "SSH-2.0-x\r\n".to_owned()),
        (
            "a status that is none",
            "HTTP/1.1 twohundred OK\r\n\r\n".to_owned(),
        ),
        (
            "a version that is none",
            "HTTP/7.3 200 OK\r\n\r\n".to_owned(),
        ),
        (
            "a header without a name",
            format!("{json}: x\r\ncontent-length: 2\r\n\r\n{{}}"),
        ),
        (
            "a header that ends in nothing",
            format!("{json}x-y\r\ncontent-length: 2\r\n\r\n{{}}"),
        ),
        (
            "two lengths",
            format!("{json}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"),
        ),
        (
            "a negative length",
            format!("{json}content-length: -2\r\n\r\n{{}}"),
        ),
        (
            "a huge header",
            format!("{json}x: {}\r\n\r\n", "x".repeat(1 << 20)),
        ),
        (
            "many headers",
            format!("{json}{many}content-length: 2\r\n\r\n{{}}"),
        ),
        (
            "a chunk size that is none",
            sse_head() + "zz\r\n" + &word("x") + "\r\n0\r\n\r\n",
        ),
        (
            "an overflowing chunk size",
            sse_head() + "fffffffffffffffff\r\n" + &word("x"),
        ),
        ("a chunk without its end", sse_head() + "3\r\n: \n!!"),
    ]
}

#[tokio::test]
async fn what_is_not_http_is_repeated_elsewhere() {
    for (what, sent) in malformed() {
        let first = Upstream::always(move || Reply::Raw(sent.clone())).await;
        let result = two(first, |plan| plan).await;
        assert_eq!(result.2.header("x-penstock-backend"), "ns/b", "{what}");
        assert_second_answered(&result);
    }
}

#[tokio::test]
async fn what_is_not_http_becomes_an_error_that_callers_can_read() {
    for (what, sent) in malformed() {
        let upstream = Upstream::always(move || Reply::Raw(sent.clone())).await;
        let plan = Plan::chain(&[upstream.address]).rule(|rule| rule.retry.attempts = 2);
        let gateway = Gateway::start(&plan).await;
        let answer = gateway.post(&chat(true)).await;
        assert_eq!(
            (answer.status, answer.complete),
            (503, true),
            "{what}: {}",
            answer.body
        );
        assert_eq!(answer.code(), "upstream_unreachable", "{what}");
        assert_eq!(upstream.count(), 2, "{what}");
    }
}

#[tokio::test]
async fn each_backend_gets_the_same_bytes_and_its_own_model() {
    let text = "\\u00e9 \\\"model\\\": \u{e9}\u{1F600} ".repeat(20_000);
    let body = format!(
        "{{\"messages\" :[ {{\"content\":\"{text}\"}}],\n\t\"model\" : \"chat\",\"seed\":1.0 }}"
    );
    assert!(body.len() > 256 << 10);
    let mut upstreams = Vec::new();
    for _ in 0..2 {
        upstreams.push(Upstream::always(|| Reply::Json(503, shaped_error("no"))).await);
    }
    upstreams.push(Upstream::always(hello).await);
    let addresses: Vec<_> = upstreams.iter().map(|upstream| upstream.address).collect();
    let mut plan = Plan::chain(&addresses);
    plan.config.backends.get_mut(&id("b")).unwrap().model = Some("org/real".to_owned());
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&body).await.status, 200);
    let sent: Vec<String> = upstreams
        .iter()
        .map(|upstream| upstream.requests()[0].body.clone())
        .collect();
    assert!(sent[0] == body && sent[2] == body);
    assert!(sent[1] == body.replace("\"chat\"", "\"org/real\""));
}

#[tokio::test]
async fn silence_is_repeated_elsewhere_and_not_on_the_same_endpoint() {
    let short = |plan: Plan| plan.rule(|rule| rule.timeouts.first_token_ms = 100);
    let result = two(Upstream::always(|| Reply::Silent).await, short).await;
    assert_second_answered(&result);
    until("the silent connection is closed", || result.0.gone() == 1).await;

    let silent = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&short(Plan::chain(&[silent.address]))).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (504, "upstream_timeout")
    );
    assert_eq!(silent.count(), 1);
}

#[tokio::test]
async fn who_is_known_to_be_silent_is_not_waited_for_again() {
    let silent = Upstream::always(|| Reply::Silent).await;
    let plan = Plan::chain(&[silent.address]).rule(|rule| rule.timeouts.first_token_ms = 50);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..5 {
        let answer = gateway.post(&chat(false)).await;
        let told = (answer.status, answer.code());
        assert_eq!(told, (504, "upstream_timeout".to_owned()));
    }
    let answer = gateway.post(&chat(false)).await;
    let told = (answer.status, answer.code());
    assert_eq!(told, (503, "upstream_silent".to_owned()));
    let wait: u32 = answer.header("retry-after").parse().unwrap();
    assert!((1..=5).contains(&wait), "{wait}");
    assert!(answer.body.contains("first token"), "{}", answer.body);
    assert_eq!(silent.count(), 5, "nothing was sent");
}

#[tokio::test]
async fn an_engine_that_aborts_before_it_answers_is_passed_over() {
    let stopping = || Reply::Sse(vec![role(), abort(), DONE.to_owned()]);
    assert_second_answered(&two(Upstream::always(stopping).await, |plan| plan).await);
    let failing = || {
        Reply::Sse(vec![
            format!("data: {}\n\n", shaped_error("x")),
            DONE.to_owned(),
        ])
    };
    assert_second_answered(&two(Upstream::always(failing).await, |plan| plan).await);
    let whole = || Reply::Json(200, completion("x").replace("stop", "abort"));
    assert_second_answered(&two(Upstream::always(whole).await, |plan| plan).await);
}

#[tokio::test]
async fn after_the_first_byte_the_caller_gets_an_error_event_and_nothing_is_repeated() {
    let cut = || Reply::Raw(sse_head() + &chunk(&word("one")));
    let (first, second, answer) = two(Upstream::always(cut).await, |plan| plan).await;
    assert_eq!((first.count(), second.count()), (1, 0));
    assert_eq!(answer.status, 200);
    let (before, event) = answer.body.split_at(word("one").len());
    assert_eq!(before, word("one"));
    assert!(
        event.starts_with("data: {\"error\":") && event.contains("stream_cut"),
        "{event}"
    );
    assert!(!answer.body.contains("[DONE]"));
}

#[tokio::test]
async fn what_is_wrong_with_the_request_is_not_repeated() {
    for status in [400, 422] {
        let (first, second, answer) = two(
            Upstream::always(move || Reply::Json(status, shaped_error("why"))).await,
            |plan| plan,
        )
        .await;
        assert_eq!(
            (answer.status, first.count(), second.count()),
            (status, 1, 0)
        );
        assert!(answer.body.contains("why"), "{status}: {}", answer.body);
    }
    let (_, _, answer) = two(
        Upstream::always(|| Reply::Json(422, "{\"detail\":1}".into())).await,
        |plan| plan,
    )
    .await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (422, "upstream_refused")
    );
}

#[tokio::test]
async fn the_last_error_goes_to_the_caller_with_its_retry_after() {
    let busy = || Reply::Headers(429, "retry-after: 7\r\n", shaped_error("later"));
    let upstream = Upstream::always(busy).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (429, shaped_error("later").as_str())
    );
    assert_eq!(answer.header("retry-after"), "7");
    assert_eq!(
        upstream.count(),
        1,
        "429 is not asked again at the same place"
    );

    let bare = Upstream::always(|| Reply::Headers(429, "retry-after: 9\r\n", "busy".into())).await;
    let gateway = Gateway::start(&Plan::chain(&[bare.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (
            answer.status,
            answer.code().as_str(),
            answer.header("retry-after")
        ),
        (429, "upstream_busy", "9")
    );

    let broken = Upstream::always(|| Reply::Json(500, "<html>".into())).await;
    let gateway = Gateway::start(&Plan::chain(&[broken.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (502, "upstream_failed")
    );
    assert_eq!(
        broken.count(),
        3,
        "a lone endpoint is asked again after 5xx, up to the rule's attempts"
    );

    let gateway = Gateway::start(&Plan::chain(&[nobody()])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "upstream_unreachable")
    );
    assert!(!answer.body.contains("127.0.0.1"), "no address in messages");
}

#[tokio::test]
async fn attempts_are_bounded_and_go_to_different_endpoints() {
    let mut upstreams = Vec::new();
    for _ in 0..5 {
        upstreams.push(Upstream::always(|| Reply::Json(503, shaped_error("no"))).await);
    }
    let addresses: Vec<_> = upstreams.iter().map(|upstream| upstream.address).collect();
    let plan = Plan::new()
        .backend("a", &addresses, 1, 0)
        .rule(|rule| rule.retry.attempts = 4);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 503);
    let counts: Vec<_> = upstreams.iter().map(Upstream::count).collect();
    assert_eq!(counts.iter().sum::<usize>(), 4);
    assert_eq!(counts.iter().max(), Some(&1));
}

#[tokio::test]
async fn a_large_body_is_sent_once_but_still_finds_another_way_in() {
    let body = format!("{{\"model\":\"chat\",\"x\":\"{}\"}}", "x".repeat(2 << 20));
    let first = Upstream::always(|| Reply::Json(503, shaped_error("no"))).await;
    let second = Upstream::always(hello).await;
    let gateway = Gateway::start(&Plan::chain(&[first.address, second.address])).await;
    assert_eq!(gateway.post(&body).await.status, 503);
    assert_eq!((first.count(), second.count()), (1, 0));

    let gateway = Gateway::start(&Plan::chain(&[nobody(), second.address])).await;
    assert_eq!(gateway.post(&body).await.status, 200);
    assert_eq!(second.requests()[0].body, body);
}

#[tokio::test]
async fn a_pooled_connection_that_was_closed_is_replaced_without_counting_an_attempt() {
    // The second request on a connection meets a peer that is just closing it.
    let upstream = Upstream::start(|number, received| {
        if number > 0 && received.connection == 0 {
            Reply::Reset
        } else {
            json_answer("ok")
        }
    })
    .await;
    let plan = Plan::chain(&[upstream.address]).rule(|rule| rule.retry.attempts = 1);
    let gateway = Gateway::start(&plan).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    assert_eq!(gateway.post(&chat(false)).await.status, 200);
    let connections: Vec<_> = upstream
        .requests()
        .iter()
        .map(|received| received.connection)
        .collect();
    assert_eq!(connections, [0, 0, 1]);
}

#[tokio::test]
async fn an_endpoint_that_keeps_failing_is_left_out() {
    let bad = Upstream::always(|| Reply::Json(500, "no".into())).await;
    let good = Upstream::always(|| json_answer("ok")).await;
    let plan = Plan::new()
        .backend("a", &[bad.address, good.address], 1, 0)
        .rule(|rule| rule.strategy = penstock_core::config::Strategy::RoundRobin);
    let gateway = Gateway::start(&plan).await;
    for _ in 0..30 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!(
        bad.count(),
        5,
        "five failures in a row, then nothing for a while"
    );
    assert!((gateway.metric("penstock_gateway_ejections_total").await - 1.0).abs() < f64::EPSILON);
}

#[tokio::test]
async fn a_connect_that_hangs_is_given_up_in_time() {
    // A listener with a full backlog: connections are neither accepted nor refused.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket2::SockRef::from(&listener).listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut fill = Vec::new();
    for _ in 0..8 {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&address.into());
        fill.push(socket);
    }
    let second = Upstream::always(hello).await;
    let plan = Plan::chain(&[address, second.address]).rule(|rule| rule.timeouts.connect_ms = 100);
    let gateway = Gateway::start(&plan).await;
    #[expect(clippy::disallowed_methods, reason = "a bound on real time")]
    let start = Instant::now();
    assert_eq!(gateway.post(&chat(true)).await.status, 200);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_backend_that_says_when_to_come_back_is_left_alone_until_then() {
    let limited =
        Upstream::always(|| Reply::Headers(429, "retry-after: 30\r\n", "{}".into())).await;
    let other = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[limited.address, other.address])).await;
    for _ in 0..5 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    assert_eq!((limited.count(), other.count()), (1, 5));

    let gateway = Gateway::start(&Plan::chain(&[limited.address])).await;
    assert_eq!(gateway.post(&chat(false)).await.header("retry-after"), "30");
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (429, "upstream_busy")
    );
    let wait: u32 = answer.header("retry-after").parse().unwrap();
    assert!((25..=30).contains(&wait), "{wait}");
    assert_eq!(limited.count(), 2, "the second request was not sent");
}

#[tokio::test]
async fn when_all_fail_few_requests_are_repeated() {
    let (upstreams, addresses) = Upstream::several(3, || Reply::Json(503, "{}".into())).await;
    let gateway = Gateway::start(&Plan::new().backend("a", &addresses, 1, 0)).await;
    let requests = 300;
    for _ in 0..requests {
        assert_eq!(gateway.post(&chat(false)).await.status, 503);
    }
    let sent: usize = upstreams.iter().map(Upstream::count).sum();
    // One in five, ten to begin with, and what it takes to find out that each of the three fails.
    assert!(sent <= requests * 12 / 10 + 10 + 3 * 5, "{sent}");
    assert!(
        sent > requests * 11 / 10,
        "repeats are not switched off: {sent}"
    );
}

#[tokio::test]
async fn an_error_about_the_request_is_not_repeated_whatever_status_it_comes_with() {
    let told = r#"{"error":{"message":"n must be 1","type":"BadRequestError","code":400}}"#;
    let in_stream = move || Reply::Sse(vec![format!("data: {told}\n\n"), DONE.to_owned()]);
    let in_body = move || Reply::Json(200, told.to_owned());
    for (first, stream) in [
        (Upstream::always(in_stream).await, true),
        (Upstream::always(in_body).await, false),
    ] {
        let second = Upstream::always(hello).await;
        let gateway = Gateway::start(&Plan::chain(&[first.address, second.address])).await;
        for _ in 0..8 {
            let answer = gateway.post(&chat(stream)).await;
            assert_eq!((answer.status, answer.body.as_str()), (400, told));
            assert_eq!(answer.header("content-type"), "application/json");
        }
        assert_eq!(
            (first.count(), second.count()),
            (8, 0),
            "it is not the backend's fault"
        );
    }
}

#[tokio::test]
async fn a_short_retry_after_is_waited_for_when_there_is_nobody_else() {
    let busy = Reply::Headers(429, "retry-after: 1\r\n", shaped_error("later"));
    let upstream = Upstream::replies(vec![busy, hello()]).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let started = penstock_shell::clock::now();
    let answer = gateway.post(&chat(true)).await;
    assert_eq!((answer.status, upstream.count()), (200, 2));
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_stream_that_begins_unreadable_is_repeated_elsewhere() {
    for first in ["data: {\"choices\":[{\"delta\"\n\n", "data: nonsense\n\n"] {
        let events = vec![first.to_owned(), DONE.to_owned()];
        let first = Upstream::always(move || Reply::Sse(events.clone())).await;
        assert_second_answered(&two(first, |plan| plan).await);
    }
}

#[tokio::test]
async fn a_failure_that_is_told_with_status_200_is_repeated_elsewhere() {
    let failure = "{\"error\":{\"message\":\"upstream is down\",\"code\":502}}";
    let first = Upstream::always(move || Reply::Json(200, failure.to_owned())).await;
    let second = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[first.address, second.address]).cached(60_000);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body), (200, completion("x")));
    let failed = "penstock_gateway_attempt_failures_total{backend=\"ns/a\",reason=\"status_5xx\"}";
    gateway.metric_is(failed, 1.0).await;

    // Nobody else is there: its own words, and no status that says that all is well.
    let gateway = Gateway::start(&Plan::chain(&[first.address]).cached(60_000)).await;
    for _ in 0..2 {
        let answer = gateway.post(&chat(false)).await;
        assert_eq!((answer.status, answer.body.as_str()), (502, failure));
        assert_eq!(answer.header("x-penstock-cache"), "miss");
    }
}

#[tokio::test]
async fn a_limit_that_is_told_with_status_200_is_one() {
    let limit = "{\"error\":{\"message\":\"slower\",\"type\":\"rate_limit_error\"}}";
    let first = Upstream::always(move || Reply::Json(200, limit.to_owned())).await;
    let second = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[first.address, second.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body), (200, completion("x")));
    let failed = "penstock_gateway_attempt_failures_total{backend=\"ns/a\",reason=\"status_429\"}";
    gateway.metric_is(failed, 1.0).await;
    let gateway = Gateway::start(&Plan::chain(&[first.address])).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body.as_str()), (429, limit));
}

#[tokio::test]
async fn after_a_retry_after_of_nothing_others_come_first_for_a_moment() {
    let busy = || Reply::Headers(429, "retry-after: 0\r\n", shaped_error("busy"));
    let first = Upstream::always(busy).await;
    let second = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[first.address, second.address])).await;
    for _ in 0..20 {
        assert_eq!(gateway.post(&chat(false)).await.status, 200);
    }
    // Once a second, however slow the machine is.
    assert!(first.count() < 10, "{}", first.count());
}

#[tokio::test]
async fn backends_that_are_not_available_for_a_while_are_no_limit() {
    let said = "retry-after: 30\r\n";
    let upstream = Upstream::always(move || Reply::Headers(503, said, "{}".to_owned())).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    assert_eq!(gateway.post(&chat(false)).await.status, 503);
    let answer = gateway.post(&chat(false)).await;
    let code = answer.code();
    assert_eq!(
        (answer.status, code.as_str()),
        (503, "upstream_unavailable")
    );
    let seconds: u32 = answer.header("retry-after").parse().unwrap();
    assert!((25..=30).contains(&seconds), "{seconds}");
    assert_eq!(upstream.count(), 1);
}
