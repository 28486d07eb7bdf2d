//! When streams go on without their callers, for how long, and what becomes of them where they cannot be kept.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::{numbered, one, plan, stream_of, with_id, words};
use crate::harness::*;
use crate::jobs::{Kept, delta, started};

impl Gateway {
    /// [`Gateway::begun`] where events get ids.
    async fn begun_with_ids(&self, steps: &UnboundedSender<Step>) -> Client {
        let mut client = self.client().await;
        client.post("", &chat(true)).await;
        steps.send(Step::Write(sse_head())).unwrap();
        steps.send(Step::Chunk(word("one"))).unwrap();
        assert_eq!(client.head().await.0, 200);
        let first = client.events(1).await;
        assert_eq!(first, with_id(&word("one"), &stream_of(&first), 1));
        client
    }
}

#[tokio::test]
async fn a_stream_for_which_nobody_comes_back_ends_in_time() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 1_000)).await;
    let left = penstock_shell::clock::now();
    let stream = gateway.left(&steps, &words(2)).await;
    until("the call is aborted", || upstream.gone() == 1).await;
    let took = left.elapsed();
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let route = "rule=\"ns/policy/chat\",backend=\"ns/a\"";
    let abandoned = format!("penstock_gateway_requests_total{{{route},outcome=\"abandoned\"}}");
    gateway.metric_is(&abandoned, 1.0).await;
    let rest = gateway.rest(&format!("{stream}:2")).await;
    assert!(rest.body.starts_with("data: {\"error\":"), "{rest:?}");
    assert!(
        rest.body.contains("\"code\":\"stream_abandoned\""),
        "{rest:?}"
    );
    assert!(
        rest.body.ends_with(&format!("\nid: {stream}:3\n\n")),
        "{rest:?}"
    );
    // Each reading keeps it for another second.
    let mut last = 0;
    let expires = async {
        while last != 404 {
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            last = gateway.rest(&format!("{stream}:2")).await.status;
        }
    };
    within("it is forgotten", expires).await;
}

#[tokio::test]
async fn a_stream_that_is_read_goes_on_and_ends_after_its_last_reader() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 1_000)).await;
    let stream = gateway.left(&steps, &words(1)).await;
    let mut client = gateway.client().await;
    let last = format!("{stream}:1");
    client
        .resume("POST", "/v1/chat/completions", "", &last)
        .await;
    assert_eq!(client.head().await.0, 200);
    // Three times as long as it would go on alone.
    for number in 2..8 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let text = word(&number.to_string());
        steps.send(Step::Chunk(text.clone())).unwrap();
        client.expect(&with_id(&text, &stream, number)).await;
    }
    assert_eq!(upstream.gone(), 0);
    drop(client);
    until("the call is aborted", || upstream.gone() == 1).await;
}

#[tokio::test]
async fn while_the_store_is_away_streams_pass_and_end_with_their_callers() {
    let Some(Kept::Redis(mut server)) = Kept::redis() else {
        return;
    };
    let (steps, upstream) = one().await;
    let mut settings = settings();
    settings.store = Some(server.url().parse().unwrap());
    let gateway = Gateway::start_with(&plan(&upstream, 600_000), settings).await;
    server.kill();
    let mut client = gateway.begun_with_ids(&steps).await;
    gateway
        .metric_is(
            "penstock_gateway_resumable_streams_total{result=\"store_failed\"}",
            1.0,
        )
        .await;
    // The first event after that takes its id back from the caller.
    steps.send(Step::Chunk(words(2).concat())).unwrap();
    let lines = word("1").replace("\n\n", "\nid:\n\n");
    client.expect(&(lines + &word("2"))).await;
    let started = penstock_shell::clock::now();
    drop(client);
    until("the call is aborted", || upstream.gone() == 1).await;
    assert!(started.elapsed() < Duration::from_secs(5));
    let answer = gateway
        .rest("strm_00000000000000000000000000000000:1")
        .await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "store_unavailable")
    );
}

#[tokio::test]
async fn a_stream_that_is_too_large_to_be_kept_passes_whole_and_says_so() {
    let large = word(&"x".repeat(512 << 10));
    let mut events = vec![large; 20];
    events.push(DONE.to_owned());
    let expected = events.concat();
    let upstream = Upstream::always(move || Reply::Sse(events.clone())).await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 30_000)).await;
    let answer = gateway.post(&chat(true)).await;
    let stream = stream_of(&answer.body);
    assert!(answer.body.ends_with(DONE));
    assert_eq!(answer.body.matches("\nid:\n").count(), 1);
    let ids: Vec<&str> = answer
        .body
        .lines()
        .filter(|line| line.starts_with("id:"))
        .collect();
    let mut plain = answer.body.clone();
    for id in &ids {
        plain = plain.replacen(&format!("{id}\n"), "", 1);
    }
    assert!(plain == expected, "other bytes than the backend's");
    assert_eq!(ids.last(), Some(&"id:"));
    gateway
        .metric_is(
            "penstock_gateway_resumable_streams_total{result=\"too_large\"}",
            1.0,
        )
        .await;
    // What was kept of it is removed beside the stream.
    let rest = format!("{stream}:1");
    within("it is forgotten", async {
        while gateway.rest(&rest).await.status != 404 {}
    })
    .await;
}

#[tokio::test]
async fn other_rules_streams_have_no_ids_and_end_with_their_callers() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&Plan::chain(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client.post("last-event-id: 7\r\n", &chat(true)).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&word("one")).await;
    drop(client);
    until("the call is aborted", || upstream.gone() == 1).await;
    let route = "rule=\"ns/policy/chat\",backend=\"ns/a\"";
    let gone = format!("penstock_gateway_requests_total{{{route},outcome=\"client_gone\"}}");
    gateway.metric_is(&gone, 1.0).await;
}

#[tokio::test]
async fn without_a_store_streams_end_with_their_callers() {
    let (steps, upstream) = one().await;
    let gateway = Gateway::start(&plan(&upstream, 600_000)).await;
    let client = gateway.begun(&steps).await;
    drop(client);
    until("the call is aborted", || upstream.gone() == 1).await;
    gateway
        .metric_is(
            "penstock_gateway_resumable_streams_total{result=\"no_store\"}",
            1.0,
        )
        .await;
    let answer = gateway
        .rest("strm_00000000000000000000000000000000:1")
        .await;
    assert_eq!((answer.status, answer.code().as_str()), (501, "no_store"));
}

#[tokio::test]
async fn a_stopping_gateway_waits_for_streams_whose_callers_left() {
    let Some(kept) = Kept::redis() else { return };
    let (steps, upstream) = one().await;
    let plan = plan(&upstream, 30_000);
    let mut first = kept.gateway(&plan).await;
    let second = kept.gateway(&plan).await;
    let mut all = words(3);
    all.push(DONE.to_owned());
    let stream = first.left(&steps, &all[..1]).await;
    first
        .metric_is("penstock_gateway_detached_streams", 1.0)
        .await;
    first.shutdown.cancel();
    let early = tokio::time::timeout(Duration::from_millis(300), first.ended()).await;
    assert!(early.is_err(), "the answer is not whole");
    steps.send(Step::Chunk(all[1..].concat())).unwrap();
    steps.send(Step::End).unwrap();
    first.ended().await.unwrap();
    let rest = second.rest(&format!("{stream}:1")).await;
    assert_eq!(rest.body, numbered(&all, &stream)[1..].concat());
}

#[tokio::test]
async fn readers_are_told_when_the_replica_that_wrote_is_gone() {
    let Some(kept) = Kept::redis() else { return };
    let (steps, upstream) = one().await;
    let plan = plan(&upstream, 600_000);
    let first = kept.gateway(&plan).await;
    let second = kept.gateway(&plan).await;
    let stream = first.left(&steps, &words(1)).await;
    let mut client = second.client().await;
    let last = format!("{stream}:0");
    client
        .resume("POST", "/v1/chat/completions", "", &last)
        .await;
    assert_eq!(client.head().await.0, 200);
    client.expect(&with_id(&word("1"), &stream, 1)).await;
    // As a process that is killed.
    drop(first);
    let mut told = String::new();
    let wait = async {
        while !told.contains("\"code\":\"stream_cut\"") {
            told.push_str(&client.chunk().await.unwrap().unwrap());
        }
    };
    assert!(tokio::time::timeout(SOON * 2, wait).await.is_ok(), "{told}");
    assert_eq!(client.chunk().await, Ok(None));
}

#[tokio::test]
async fn a_job_keeps_its_stream_itself_and_ends_it() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 600_000)).await;
    let mut client = gateway.client().await;
    let body = "{\"model\":\"chat\",\"input\":\"hi\",\"background\":true,\"stream\":true}";
    client.post_to("/v1/responses", "", body).await;
    assert_eq!(client.head().await.0, 202);
    let opening = client.chunk().await.unwrap().unwrap();
    let (_, id) = opening.split_once("\"id\":\"").unwrap();
    let (id, _) = id.split_once('"').unwrap();
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(started() + &delta("a"))).unwrap();
    let seen = client.events(2).await;
    assert!(!seen.contains("strm_"), "{seen}");
    let cancel = format!("/v1/responses/{id}/cancel");
    assert_eq!(gateway.call("POST", &cancel, "", "").await.status, 200);
    until("the call is aborted", || upstream.gone() == 1).await;
}
