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
