//! Callers that speak HTTP/2: many requests on one connection, and what those may not do.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::*;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// HPACK without compression.
fn header(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0];
    for text in [name, value] {
        // Lengths up to 126 fit in a byte, longer ones (RFC 7541, 5.1) follow in groups of seven bits.
        if text.len() < 127 {
            block.push(u8::try_from(text.len()).unwrap());
        } else {
            block.push(127);
            let mut rest = text.len() - 127;
            while rest >= 128 {
                block.push(u8::try_from(rest % 128).unwrap() | 128);
                rest /= 128;
            }
            block.push(u8::try_from(rest).unwrap());
        }
        block.extend(text.as_bytes());
    }
    block
}

fn head(path: &str) -> Vec<u8> {
    [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "x"),
    ]
    .iter()
    .flat_map(|(name, value)| header(name, value))
    .collect()
}

/// A connection whose frames a test writes itself.
async fn raw(gateway: &Gateway) -> TcpStream {
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    stream
}

/// Reads frames until the end; kind and error code of the last ones that say why something ended.
async fn ends(stream: &mut TcpStream) -> Vec<(u8, u32)> {
    let mut said = Vec::new();
    let read = async {
        loop {
            let mut head = [0; 9];
            if stream.read_exact(&mut head).await.is_err() {
                return;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            if stream.read_exact(&mut payload).await.is_err() {
                return;
            }
            let at = match head[3] {
                RST_STREAM => 0,
                GOAWAY => 4,
                _ => continue,
            };
            let code: [u8; 4] = payload[at..at + 4].try_into().unwrap();
            said.push((head[3], u32::from_be_bytes(code)));
        }
    };
    within("the end of the connection", read).await;
    said
}

#[tokio::test]
async fn requests_share_a_connection_and_each_is_its_own() {
    let (steps, reply) = driven();
    let reply = std::sync::Mutex::new(Some(reply));
    let upstream = Upstream::start(move |_, received| {
        if received.body.contains("true") {
            reply.lock().unwrap().take().unwrap()
        } else {
            json_answer("x")
        }
    })
    .await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = H2Client::connect(gateway.address).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    let mut stream = client.begin("/v1/chat/completions", &chat(true)).await;
    assert_eq!(stream.status(), 200);
    assert!(!stream.headers().contains_key("connection"));
    // Others begin and end while it goes on.
    for _ in 0..20 {
        let answer = client.post("/v1/chat/completions", &chat(false)).await;
        assert_eq!(answer, (200, completion("x")));
    }
    let (status, body) = client.post("/v1/nothing", "{}").await;
    assert_eq!(status, 404);
    assert!(body.contains("path_not_found"), "{body}");
    let frame = stream.frame().await.unwrap().unwrap();
    assert_eq!(frame.into_data().unwrap(), word("one"));
    steps.send(Step::Chunk(DONE.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    assert_eq!(text(stream).await, DONE);
    gateway.metric_is("penstock_gateway_connections", 1.0).await;
}

#[tokio::test]
async fn every_path_answers_over_http_2() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = H2Client::connect(gateway.address).await;
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/responses",
        "/v1/messages/count_tokens",
        "/v1/images/generations",
        "/v1/audio/speech",
    ] {
        let status = client.post(path, &chat(false)).await.0;
        // What the upstream speaks has no token counts: that is refused, and over HTTP/2 as well.
        let expected = if path.contains("count") { 400 } else { 200 };
        assert_eq!(status, expected, "{path}");
    }
    let large = format!("{{\"model\":\"chat\",\"x\":\"{}\"}}", "x".repeat(3 << 20));
    let answer = client.post("/v1/chat/completions", &large).await;
    assert_eq!(answer.0, 200);
    assert_eq!(upstream.requests().last().unwrap().body, large);
}

#[tokio::test]
async fn a_caller_that_resets_its_stream_frees_the_backend_and_no_other_stream() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = H2Client::connect(gateway.address).await;
    let mut other = H2Client::connect(gateway.address).await;
    {
        let first = client.begin("/v1/chat/completions", "{\"model\":\"chat\"}");
        let second = other.begin("/v1/chat/completions", "{\"model\":\"chat\"}");
        tokio::pin!(first, second);
        tokio::select! {
            _ = &mut first => unreachable!("the upstream is silent"),
            _ = &mut second => unreachable!("the upstream is silent"),
            () = until("both are upstream", || upstream.count() == 2) => {}
        }
        // Dropping them resets their streams; the connections stay.
    }
    until("both are gone", || upstream.gone() == 2).await;
    gateway.metric_is("penstock_gateway_connections", 2.0).await;
    gateway
        .metric_is("penstock_gateway_in_flight_requests", 0.0)
        .await;
}

/// What may be on its way of a stream that nobody reads: the caller's window (2 MiB, hyper's), buffers of the sockets
/// on both sides, and pieces in hand.
const MOST_UNREAD_BYTES: usize = (2 << 20) + (12 << 20);

#[tokio::test]
async fn a_stream_that_is_not_read_holds_little_and_the_others_on_its_connection_go_on() {
    for h2c in [false, true] {
        let (sent, upstream) = endless(16_000).await;
        let mut plan = Plan::chain(&[upstream.address]);
        plan.config
            .backends
            .get_mut(&id("a"))
            .unwrap()
            .transport
            .h2c = h2c;
        let gateway = Gateway::start(&plan).await;
        let mut client = H2Client::connect(gateway.address).await;
        let mut unread = client.begin("/v1/chat/completions", &chat(true)).await;
        let mut before = 0;
        within("it stands still", async {
            loop {
                tokio::time::sleep(Duration::from_millis(200)).await;
                let now = sent.load(Ordering::SeqCst);
                if now == before {
                    return;
                }
                before = now;
            }
        })
        .await;
        assert!(before <= MOST_UNREAD_BYTES, "{before} bytes");
        for _ in 0..20 {
            let answer = client.post("/v1/chat/completions", &chat(false)).await;
            assert_eq!(answer, (200, completion("x")));
        }
        // Read on, it goes on.
        let mut read = 0;
        while read <= before {
            let frame = within("more", unread.body_mut().frame()).await;
            read += frame.unwrap().unwrap().into_data().unwrap().len();
        }
    }
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_then_ends_the_connection() {
    let (steps, reply) = driven();
    let upstream = Upstream::replies(vec![reply]).await;
    let mut gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut client = H2Client::connect(gateway.address).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    let stream = client.begin("/v1/chat/completions", &chat(true)).await;
    gateway.shutdown.cancel();
    // New requests are turned away by the connection, not by an answer.
    within("no more requests", async {
        while client.request(post_to("/v1/nothing", "{}")).await.is_ok() {}
    })
    .await;
    steps.send(Step::Chunk(DONE.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    assert_eq!(text(stream).await, format!("{}{DONE}", word("one")));
    gateway.ended().await.unwrap();
}

#[tokio::test]
async fn an_idle_connection_is_asked_to_end_and_a_busy_one_is_not() {
    let (steps, reply) = driven();
    let reply = std::sync::Mutex::new(Some(reply));
    let upstream = Upstream::start(move |_, received| {
        if received.body.contains("true") {
            reply.lock().unwrap().take().unwrap()
        } else {
            json_answer("x")
        }
    })
    .await;
    let mut settings = settings();
    settings.limits.header_timeout = Duration::from_millis(150);
    settings.limits.idle_timeout = Duration::from_millis(150);
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut busy = H2Client::connect(gateway.address).await;
    steps.send(Step::Write(sse_head())).unwrap();
    steps.send(Step::Chunk(word("one"))).unwrap();
    let stream = busy.begin("/v1/chat/completions", &chat(true)).await;
    // The busy one outlives several idle ones, each of which lives for longer than the limit.
    for _ in 0..3 {
        let mut idle = H2Client::connect(gateway.address).await;
        assert_eq!(idle.post("/v1/chat/completions", &chat(false)).await.0, 200);
        let ended = within("the idle one ends", idle.connection.join_next()).await;
        assert!(ended.unwrap().unwrap().is_ok(), "ended in order");
    }
    steps.send(Step::Chunk(DONE.to_owned())).unwrap();
    steps.send(Step::End).unwrap();
    assert_eq!(text(stream).await, format!("{}{DONE}", word("one")));
}

#[tokio::test]
async fn streams_of_one_connection_are_bounded() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut stream = raw(&gateway).await;
    let mut block = head("/v1/chat/completions");
    block.extend(header("content-length", "100"));
    for number in 0..200 {
        let frame = frame(HEADERS, END_HEADERS, 2 * number + 1, &block);
        stream.write_all(&frame).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let said = ends(&mut stream).await;
    // REFUSED_STREAM says that a request may be sent again.
    let refused = said.iter().filter(|end| **end == (RST_STREAM, 7)).count();
    assert_eq!(refused, 72, "{said:?}");
}

#[tokio::test]
async fn a_flood_of_resets_ends_the_connection() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let mut stream = raw(&gateway).await;
    let mut flood = Vec::new();
    for number in 0..5000 {
        let id = 2 * number + 1;
        flood.extend(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            id,
            &head("/v1/chat/completions"),
        ));
        flood.extend(frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
    }
    // The gateway may close before it has all.
    let _ = stream.write_all(&flood).await;
    let said = ends(&mut stream).await;
    // ENHANCE_YOUR_CALM; if the rest of the flood came late, the system resets the connection before it is read.
    assert!(said.is_empty() || said.contains(&(GOAWAY, 11)), "{said:?}");
    assert!(upstream.count() < 100, "{}", upstream.count());
    gateway.metric_is("penstock_gateway_connections", 0.0).await;
    assert_eq!(
        gateway.post("{\"model\":\"no\"}").await.status,
        404,
        "it serves others"
    );
}

#[tokio::test]
async fn a_flood_of_continuations_ends_the_connection() {
    let gateway = Gateway::start(&Plan::chain(&[nobody()])).await;
    let mut stream = raw(&gateway).await;
    stream
        .write_all(&frame(HEADERS, 0, 1, &head("/v1/chat/completions")))
        .await
        .unwrap();
    let more = frame(CONTINUATION, 0, 1, &header("x-flood", &"x".repeat(8000)));
    let mut sent = 0;
    // Far more than any head may have.
    while sent < 64 << 20 && stream.write_all(&more).await.is_ok() {
        sent += more.len();
    }
    assert!(sent < 64 << 20, "the gateway took {sent} bytes of one head");
    gateway.metric_is("penstock_gateway_connections", 0.0).await;
}

#[tokio::test]
async fn large_heads_are_refused_with_a_status() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let mut settings = settings();
    settings.limits.header_bytes = 20 << 10;
    let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
    let mut client = H2Client::connect(gateway.address).await;
    // The last one is beyond what is read at all: its stream or its connection is ended.
    for (bytes, status) in [
        (10 << 10, Some(200)),
        (30 << 10, Some(431)),
        (200 << 10, None),
    ] {
        let mut request = post_to("/v1/chat/completions", &chat(false));
        let value = "x".repeat(bytes).try_into().unwrap();
        request.headers_mut().insert("x-large", value);
        let answer = client.request(request).await;
        let answer = answer.ok().map(|answer| answer.status().as_u16());
        assert_eq!(answer, status, "{bytes}");
    }
    assert_eq!(upstream.count(), 1);
}

/// Reads frames until one of this kind on this stream comes; its payload.
async fn wait_for(stream: &mut TcpStream, kind: u8, id: u32) -> Vec<u8> {
    let read = async {
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            stream.read_exact(&mut payload).await.unwrap();
            let on = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            if (head[3], on) == (kind, id) {
                return payload;
            }
        }
    };
    within("a frame", read).await
}

#[tokio::test]
async fn a_stream_that_is_not_read_is_reset_and_its_backend_is_free() {
    // Room for nothing, and for a part of the answer.
    for window in [0, 16_u32] {
        let (steps, reply) = driven();
        let upstream = Upstream::replies(vec![reply]).await;
        let mut settings = settings();
        settings.limits.write_timeout = Duration::from_millis(300);
        let gateway = Gateway::start_with(&Plan::chain(&[upstream.address]), settings).await;
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        let mut begin = PREFACE.to_vec();
        // SETTINGS_INITIAL_WINDOW_SIZE
        let setting = [&[0, 4][..], &window.to_be_bytes()].concat();
        begin.extend(frame(SETTINGS, 0, 0, &setting));
        begin.extend(frame(
            HEADERS,
            END_HEADERS,
            1,
            &head("/v1/chat/completions"),
        ));
        begin.extend(frame(DATA, END_STREAM, 1, chat(true).as_bytes()));
        stream.write_all(&begin).await.unwrap();
        steps.send(Step::Write(sse_head())).unwrap();
        let words = async {
            while steps.send(Step::Chunk(word("one"))).is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            std::future::pending().await
        };
        let code = tokio::select! {
            code = wait_for(&mut stream, RST_STREAM, 1) => code,
            never = words => never,
        };
        assert_eq!(code, 8_u32.to_be_bytes(), "CANCEL");
        until("the call to the backend ends", || upstream.gone() == 1).await;
        gateway
            .metric_is("penstock_gateway_in_flight_requests", 0.0)
            .await;
        // The connection stays.
        let other = frame(HEADERS, END_HEADERS | END_STREAM, 3, &head("/v1/nothing"));
        stream.write_all(&other).await.unwrap();
        wait_for(&mut stream, HEADERS, 3).await;
    }
}
