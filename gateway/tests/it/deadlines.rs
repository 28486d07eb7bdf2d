//! Limits of waiting: the first token, between tokens, the whole request.

use std::time::Duration;

use crate::harness::*;

#[tokio::test]
async fn a_role_alone_does_not_stop_the_clock_of_the_first_token() {
    let (steps, reply) = driven();
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(role())).unwrap();
    let slow = Upstream::replies(vec![reply]).await;
    let working = Upstream::always(|| Reply::Sse(vec![role(), word("b"), DONE.to_owned()])).await;
    let plan = Plan::chain(&[slow.address, working.address])
        .rule(|rule| rule.timeouts.first_token_ms = 150);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!((answer.status, working.count()), (200, 1));
    assert_eq!(answer.body, [role(), word("b"), DONE.to_owned()].concat());
    until("the slow connection is closed", || slow.gone() == 1).await;
}

#[tokio::test]
async fn an_answer_that_comes_as_a_whole_may_take_longer_than_a_first_token() {
    let late = || Reply::Late(Duration::from_millis(400), completion("x"));
    let upstream = Upstream::always(late).await;
    for (whole_ms, status) in [(Some(10_000), 200), (None, 504)] {
        let plan = Plan::chain(&[upstream.address]).rule(|rule| {
            rule.timeouts.first_token_ms = 100;
            rule.timeouts.whole_ms = whole_ms;
        });
        let gateway = Gateway::start(&plan).await;
        assert_eq!(gateway.post(&chat(false)).await.status, status);
    }
}

#[tokio::test]
async fn a_request_ends_at_its_limit_whatever_could_still_be_tried() {
    let (upstreams, addresses) = Upstream::several(3, || Reply::Silent).await;
    let plan = Plan::chain(&addresses).rule(|rule| {
        rule.timeouts.first_token_ms = 200;
        rule.timeouts.total_ms = 300;
    });
    let gateway = Gateway::start(&plan).await;
    let started = penstock_shell::clock::now();
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (504, "deadline_exceeded")
    );
    assert!(started.elapsed() >= Duration::from_millis(300));
    let asked: Vec<usize> = upstreams.iter().map(Upstream::count).collect();
    assert_eq!(asked, [1, 1, 0]);
}

#[tokio::test]
async fn a_stream_ends_at_the_limit_in_an_error_event() {
    let (steps, reply) = driven();
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    let upstream = Upstream::replies(vec![reply]).await;
    let plan = Plan::chain(&[upstream.address]).rule(|rule| rule.timeouts.total_ms = 300);
    let gateway = Gateway::start(&plan).await;
    let answer = gateway.post(&chat(true)).await;
    assert!(answer.body.contains("stream_deadline"), "{}", answer.body);
    assert!(!answer.body.contains("[DONE]"));
    until("the connection is closed", || upstream.gone() == 1).await;
}

#[tokio::test]
async fn waiting_for_a_replica_ends_at_the_limit_too() {
    let plan = Plan::chain(&[nobody()]).rule(|rule| rule.timeouts.total_ms = 200);
    let mut empty = plan.clone();
    empty.set_endpoints("a", &[]);
    let gateway = Gateway::start(&empty).await;
    let started = penstock_shell::clock::now();
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "no_endpoint")
    );
    assert!(started.elapsed() < SOON / 4);
}

#[tokio::test]
async fn signs_of_life_alone_do_not_stop_the_clock_between_tokens() {
    let (steps, reply) = driven();
    steps.send(Step::Write(sse_head())).unwrap();
    let upstream = Upstream::replies(vec![reply]).await;
    let plan = Plan::chain(&[upstream.address]).rule(|rule| rule.timeouts.idle_ms = 400);
    let gateway = Gateway::start(&plan).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    // Tokens do, each of them.
    for _ in 0..4 {
        steps.send(Step::Chunk(word("one"))).unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let pings = async {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if steps.send(Step::Chunk(": ping\n\n".to_owned())).is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let answer = tokio::select! {
        answer = client.answer() => answer,
        () = pings => unreachable!("it has no end"),
    };
    assert_eq!(answer.body.matches("\"one\"").count(), 4, "{}", answer.body);
    assert!(answer.body.contains("stream_stalled"), "{}", answer.body);
}

#[tokio::test]
async fn what_an_error_says_besides_its_status_is_not_waited_for() {
    for (status, head) in [
        (
            503,
            "HTTP/1.1 503 x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{",
        ),
        (
            429,
            "HTTP/1.1 429 x\r\nretry-after: 7\r\ntransfer-encoding: chunked\r\n\r\n",
        ),
    ] {
        let (steps, reply) = driven();
        steps.send(Step::Write(head.to_owned())).unwrap();
        let slow = Upstream::replies(vec![reply]).await;
        let working = Upstream::always(|| json_answer("b")).await;
        let gateway = Gateway::start(&Plan::chain(&[slow.address, working.address])).await;
        let answer = tokio::time::timeout(SOON, gateway.post(&chat(false))).await;
        assert_eq!(answer.unwrap().body, completion("b"), "{status}");
    }
}
