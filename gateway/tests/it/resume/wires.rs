//! Every protocol of streams, and callers that speak HTTP/2.

use http_body_util::BodyExt as _;
use penstock_core::config::Protocol;

use super::{numbered, one, plan, stream_of, with_id};
use crate::harness::*;
use crate::jobs::{Kept, completed, delta, started};

#[tokio::test]
async fn streams_of_other_protocols_keep_their_form() {
    let message = [
        "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"model\":\"claude\",\"usage\":{\"input_tokens\":4,\"output_tokens\":1}}}\n\n",
        "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
        "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"Hello\"}}\n\n",
        "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n",
        "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":2}}\n\n",
        "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
    ];
    let responses = started() + &delta("a") + &completed();
    let responses: Vec<&str> = responses.split_inclusive("\n\n").collect();
    for (path, protocol, events) in [
        ("/v1/messages", Protocol::Anthropic, &message[..]),
        ("/v1/responses", Protocol::OpenAi, &responses[..]),
    ] {
        let events: Vec<String> = events.iter().map(|event| (*event).to_owned()).collect();
        let upstream = Upstream::always({
            let events = events.clone();
            move || Reply::Sse(events.clone())
        })
        .await;
        let kept = Kept::file();
        let gateway = kept
            .gateway(&plan(&upstream, 30_000).speaking("a", protocol))
            .await;
        let body = "{\"model\":\"chat\",\"max_tokens\":5,\"stream\":true,\"input\":\"hi\",\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}";
        let mut client = gateway.client().await;
        client.post_to(path, "", body).await;
        let answer = client.answer().await;
        let stream = stream_of(&answer.body);
        let whole = numbered(&events, &stream);
        assert_eq!(answer.body, whole.concat());
        let mut client = gateway.client().await;
        client
            .resume("POST", path, "", &format!("{stream}:3"))
            .await;
        assert_eq!(client.answer().await.body, whole[3..].concat());
    }
}

#[tokio::test]
async fn a_response_is_read_again_by_its_own_id_and_numbers() {
    let Some(kept) = Kept::redis() else { return };
    let (steps, upstream) = one().await;
    let plan = plan(&upstream, 30_000);
    let (first, second) = (kept.gateway(&plan).await, kept.gateway(&plan).await);
    // This backend counts from 5, and one event of it is lost.
    let event = |kind: &str, number: u64, more: &str| {
        format!(
            "event: {kind}\ndata: {{\"type\":\"{kind}\",\"sequence_number\":{number}{more}}}\n\n"
        )
    };
    let response =
        |status: &str| format!(",\"response\":{{\"id\":\"resp_backend\",\"status\":\"{status}\"}}");
    let all = [
        event("response.created", 5, &response("in_progress")),
        event("response.output_text.delta", 6, ",\"delta\":\"a\""),
        event("response.output_text.delta", 8, ",\"delta\":\"b\""),
        event("response.completed", 9, &response("completed")),
    ];
    let alice = "authorization: Bearer a\r\n";
    let mut client = first.client().await;
    let body = "{\"model\":\"chat\",\"stream\":true,\"input\":\"hi\"}";
    client.post_to("/v1/responses", alice, body).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(all[..2].concat())).unwrap();
    assert_eq!(client.head().await.0, 200);
    let seen = client.events(2).await;
    let whole = numbered(&all, &stream_of(&seen));
    drop(client);
    let mut client = second.client().await;
    let path = "/v1/responses/resp_backend?stream=true";
    let resume = format!("GET {path}&starting_after=6 HTTP/1.1\r\nhost: x\r\n{alice}\r\n");
    client.send(&resume).await;
    assert_eq!(client.head().await.0, 200);
    steps.send(Step::Chunk(all[2..].concat())).unwrap();
    steps.send(Step::End).unwrap();
    client.expect(&whole[2..].concat()).await;
    assert_eq!(client.chunk().await, Ok(None));
    let again = second.call("GET", path, alice, "").await;
    assert_eq!(again.body, whole.concat());
    for (path, headers) in [
        (path, ""),
        ("/v1/responses/resp_backend", alice),
        ("/v1/responses/resp_other?stream=true", alice),
    ] {
        let answer = second.call("GET", path, headers, "").await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"));
    }
}

#[tokio::test]
async fn a_caller_on_http_2_comes_back_too() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 30_000)).await;
    let mut caller = H2Client::connect(gateway.address).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("1"))).unwrap();
    let mut answer = caller.begin("/v1/chat/completions", &chat(true)).await;
    let first = answer.frame().await.unwrap().unwrap().into_data().unwrap();
    let stream = stream_of(std::str::from_utf8(&first).unwrap());
    // Dropping it resets its stream; the connection stays.
    drop(answer);
    gateway
        .metric_is("penstock_gateway_detached_streams", 1.0)
        .await;
    steps.send(Step::Chunk(DONE.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    let mut request = post_to("/v1/chat/completions", "");
    let last = format!("{stream}:1").parse().unwrap();
    request.headers_mut().insert("last-event-id", last);
    let answer = caller.request(request).await.unwrap();
    assert_eq!(text(answer).await, with_id(DONE, &stream, 2));
}

/// A connection that nobody has closed and nobody reads, as after a change of networks.
#[tokio::test]
async fn a_caller_is_not_held_up_by_the_connection_that_was_lost() {
    let (steps, upstream) = one().await;
    let kept = Kept::file();
    let gateway = kept.gateway(&plan(&upstream, 30_000)).await;
    let mut lost = H2Client::connect(gateway.address).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("1"))).unwrap();
    let mut answer = lost.begin("/v1/chat/completions", &chat(true)).await;
    let first = answer.frame().await.unwrap().unwrap().into_data().unwrap();
    let stream = stream_of(std::str::from_utf8(&first).unwrap());
    // More than the window of a stream.
    let mut events = vec![word("1")];
    events.extend((0..100).map(|_| word(&"x".repeat(60 << 10))));
    events.push(DONE.to_owned());
    for event in &events[1..] {
        steps.send(Step::Chunk(event.clone())).unwrap();
    }
    steps.send(Step::End).unwrap();
    let mut client = gateway.client().await;
    let last = format!("{stream}:1");
    client
        .resume("POST", "/v1/chat/completions", "", &last)
        .await;
    let rest = client.answer().await;
    assert!(rest.body == numbered(&events, &stream)[1..].concat());
    let old = answer.collect().await;
    assert!(old.is_err(), "a cut is no end");
}
