//! Requests that end the backends that read them.

use std::time::Duration;

use crate::harness::*;

#[tokio::test]
async fn a_request_that_ends_two_backends_goes_to_no_third() {
    let ends = |_: usize, received: &Received| {
        if received.body.contains("POISON") {
            Reply::Reset
        } else {
            hello()
        }
    };
    let mut upstreams = Vec::new();
    for _ in 0..3 {
        upstreams.push(Upstream::start(ends).await);
    }
    let addresses: Vec<_> = upstreams.iter().map(|upstream| upstream.address).collect();
    let gateway = Gateway::start(&Plan::chain(&addresses)).await;
    let count = || upstreams.iter().map(Upstream::count).sum::<usize>();
    let poison = chat(true).replace("\"hi\"", "\"POISON\"");
    assert!(poison.contains("POISON"), "{poison}");
    for _ in 0..2 {
        let answer = gateway.post(&poison).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (503, "ends_backends")
        );
        let wait: u32 = answer.header("retry-after").parse().unwrap();
        assert!((1..=60).contains(&wait));
        assert_eq!(count(), 2, "neither a third backend nor a second time");
    }
    assert_eq!(gateway.post(&chat(true)).await.status, 200, "others go on");
}

#[tokio::test]
async fn a_body_that_all_callers_send_is_tried_again_once_the_backends_are_well() {
    let at_first = |number: usize, _: &Received| match number {
        0 => Reply::Reset,
        _ => hello(),
    };
    let upstreams = [
        Upstream::start(at_first).await,
        Upstream::start(at_first).await,
    ];
    let addresses = upstreams.each_ref().map(|upstream| upstream.address);
    let gateway = Gateway::start(&Plan::chain(&addresses)).await;
    let answer = gateway.post(&chat(true)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "ends_backends")
    );
    // One caller who tries again would wait for long; many are refused.
    let wait = |answer: &Answer| answer.header("retry-after").parse().unwrap();
    let alone: u64 = wait(&answer);
    assert!((10..=20).contains(&alone), "{alone}");
    let mut refused = answer;
    for _ in 0..12 {
        refused = gateway.post(&chat(true)).await;
        assert_eq!(refused.status, 503);
    }
    let wait: u64 = wait(&refused);
    assert!(wait <= 2, "{wait}");
    tokio::time::sleep(Duration::from_secs(wait)).await;
    for _ in 0..3 {
        assert_eq!(gateway.post(&chat(true)).await.status, 200);
    }
}
