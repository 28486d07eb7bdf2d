//! Streams that are held until they are whole.

use penstock_core::config::Streaming;

use crate::harness::*;

fn buffered(addresses: &[std::net::SocketAddr]) -> Plan {
    Plan::chain(addresses).rule(|rule| rule.streaming = Streaming::Buffered)
}

#[tokio::test]
async fn a_stream_that_breaks_in_the_middle_is_repeated_elsewhere() {
    for broken in [
        || Reply::Raw(sse_head() + &chunk(&(role() + &word("half")))),
        || Reply::Sse(vec![role(), word("half"), abort(), DONE.to_owned()]),
    ] {
        let failing = Upstream::always(broken).await;
        let whole = [role(), word("all"), DONE.to_owned()];
        let events = whole.clone();
        let working = Upstream::always(move || Reply::Sse(events.to_vec())).await;
        let gateway = Gateway::start(&buffered(&[failing.address, working.address])).await;
        let answer = gateway.post(&chat(true)).await;
        assert_eq!((answer.status, answer.body), (200, whole.concat()));
        let kind = answer.headers["content-type"].as_str();
        assert_eq!(kind, "text/event-stream; charset=utf-8");
        assert_eq!(failing.count(), 1);
    }
}

#[tokio::test]
async fn nothing_goes_out_before_the_end() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&buffered(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    until("the request has arrived", || upstream.count() == 1).await;
    let early = tokio::time::timeout(std::time::Duration::from_millis(100), client.head()).await;
    assert!(early.is_err());
    steps.send(Step::Chunk(DONE.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&(word("one") + DONE)).await;
}

#[tokio::test]
async fn what_is_too_large_to_hold_goes_out_as_it_comes() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&buffered(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    let long = word(&"x".repeat(512 << 10));
    for _ in 0..17 {
        steps.send(Step::Chunk(long.clone())).unwrap();
    }
    assert_eq!(client.head().await.0, 200);
}

#[tokio::test]
async fn an_answer_that_is_whole_without_its_mark_gets_one() {
    let end = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    let events = vec![role(), word("all"), end.to_owned()];
    let whole = events.concat() + DONE;
    let sent = events.clone();
    let upstream = Upstream::always(move || Reply::Sse(sent.clone())).await;
    let plan = Plan::chain(&[upstream.address]);
    for plan in [plan.clone(), buffered(&[upstream.address])] {
        let gateway = Gateway::start(&plan).await;
        let answer = gateway.post(&chat(true)).await;
        assert!(answer.complete);
        assert_eq!(answer.body, whole);
    }
}

#[tokio::test]
async fn what_comes_together_with_the_end_is_not_lost() {
    let end = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = gateway.begun(&steps).await;
    let last = chunk(end) + "0\r\n\r\n";
    steps.send(Step::Write(last)).unwrap();
    client.expect(&(end.to_owned() + DONE)).await;
    assert_eq!(client.chunk().await, Ok(None));
}

const SOUND: &str = "data: {\"type\":\"speech.audio.delta\",\"audio\":\"UklGRg==\"}\n\n";
const SAID: &str = "data: {\"type\":\"speech.audio.done\",\"usage\":{\"input_tokens\":2}}\n\n";
const FAILED: &str = "data: {\"type\":\"error\",\"error\":{\"type\":\"server_error\"}}\n\n";
const SPEAK: &str = r#"{"model":"chat","stream_format":"sse","input":"say it"}"#;

async fn spoken(plan: &Plan) -> Answer {
    let gateway = Gateway::start(plan).await;
    let mut client = gateway.client().await;
    client.post_to("/v1/audio/speech", "", SPEAK).await;
    client.answer().await
}

#[tokio::test]
async fn a_sound_that_breaks_in_the_middle_is_repeated_elsewhere() {
    for broken in [
        || Reply::Raw(sse_head() + &chunk(SOUND)),
        || Reply::Sse(vec![SOUND.to_owned()]),
        || Reply::Sse(vec![SOUND.to_owned(), FAILED.to_owned()]),
    ] {
        let failing = Upstream::always(broken).await;
        let whole = || Reply::Sse(vec![SOUND.to_owned(), SOUND.to_owned(), SAID.to_owned()]);
        let working = Upstream::always(whole).await;
        let answer = spoken(&buffered(&[failing.address, working.address])).await;
        assert_eq!(
            (answer.status, answer.body),
            (200, [SOUND, SOUND, SAID].concat())
        );
        assert_eq!((failing.count(), working.count()), (1, 1));
    }
}

#[tokio::test]
async fn a_sound_whose_end_does_not_come_ends_in_an_error() {
    let upstream = Upstream::always(|| Reply::Sse(vec![SOUND.to_owned()])).await;
    let answer = spoken(&Plan::chain(&[upstream.address])).await;
    assert!(answer.body.starts_with(SOUND), "{}", answer.body);
    assert!(answer.body.contains("stream_cut"), "{}", answer.body);
}
