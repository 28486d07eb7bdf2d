//! HTTP/2 with backends: many requests on few connections, connections that end under them, callers that go or do not
//! read.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, Version};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;

use crate::harness::*;

/// A plan whose only backend speaks HTTP/2 in the clear.
fn plan(address: std::net::SocketAddr) -> Plan {
    let mut plan = Plan::new().backend("a", &[address], 1, 0);
    plan.config
        .backends
        .get_mut(&id("a"))
        .unwrap()
        .transport
        .h2c = true;
    plan
}

/// Answers streams that a test drives, and everything else at once.
async fn driven_server(
    most_streams: u32,
) -> (HyperUpstream, Arc<Mutex<Vec<UnboundedSender<String>>>>) {
    let senders: Arc<Mutex<Vec<UnboundedSender<String>>>> = Arc::default();
    let kept = Arc::clone(&senders);
    let mut speaks = clear();
    speaks.most_streams = most_streams;
    let upstream = HyperUpstream::start(speaks, move |_, request| {
        if !String::from_utf8_lossy(&request.body).contains("\"stream\":true") {
            return served("x");
        }
        let (sender, answer) = streamed();
        kept.lock().unwrap().push(sender);
        answer
    });
    (upstream.await, senders)
}

async fn ok(gateway: &Gateway) {
    let answer = gateway.post(&chat(false)).await;
    assert_eq!((answer.status, answer.body), (200, completion("x")));
}

#[tokio::test]
async fn a_request_arrives_whole_and_its_connection_is_kept() {
    let (upstream, _) = driven_server(128).await;
    let gateway = Gateway::start(&plan(upstream.address)).await;
    for _ in 0..3 {
        ok(&gateway).await;
    }
    let seen = upstream.requests().pop().unwrap();
    assert_eq!(seen.version, Version::HTTP_2);
    let uri = format!("http://{}/v1/chat/completions", upstream.address);
    assert_eq!(seen.uri, uri.as_str());
    assert_eq!(seen.body, chat(false));
    assert_eq!(
        seen.headers["content-length"],
        chat(false).len().to_string()
    );
    assert!(!seen.headers.contains_key("host"));
    assert_eq!(upstream.connections(), 1);
}

#[tokio::test]
async fn many_streams_run_side_by_side_on_few_connections() {
    for (allowed, connections) in [(128, 3..=3), (40, 8..=10)] {
        let (upstream, senders) = driven_server(allowed).await;
        let gateway = Gateway::start(&plan(upstream.address)).await;
        let mut callers = JoinSet::new();
        for _ in 0..300 {
            let address = gateway.address;
            callers.spawn(async move {
                let mut client = Client::connect(address).await;
                client.post("", &chat(true)).await;
                client.answer().await
            });
        }
        until("all are upstream", || senders.lock().unwrap().len() == 300).await;
        let mut on_each = vec![0_u32; upstream.connections()];
        for request in upstream.requests() {
            on_each[request.connection] += 1;
        }
        let used = on_each.iter().filter(|count| **count > 0).count();
        assert!(connections.contains(&used), "{on_each:?}");
        assert!(
            on_each.iter().all(|count| *count <= allowed.min(100)),
            "{on_each:?}"
        );
        for sender in senders.lock().unwrap().drain(..) {
            sender.send(word("x") + DONE).unwrap();
        }
        while let Some(answer) = callers.join_next().await {
            let answer = answer.unwrap();
            assert_eq!((answer.status, answer.complete), (200, true));
            assert_eq!(answer.body, word("x") + DONE);
        }
    }
}

#[tokio::test]
async fn streams_go_on_when_a_backend_says_goodbye_and_new_requests_go_elsewhere() {
    let (upstream, senders) = driven_server(128).await;
    let gateway = Gateway::start(&plan(upstream.address)).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("it is upstream", || senders.lock().unwrap().len() == 1).await;
    let sender = senders.lock().unwrap().pop().unwrap();
    sender.send(word("one")).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&word("one")).await;
    upstream.leave();
    within("another connection", async {
        while upstream.connections() < 2 {
            ok(&gateway).await;
        }
    })
    .await;
    sender.send(word("two") + DONE).unwrap();
    drop(sender);
    client.expect(&(word("two") + DONE)).await;
    assert_eq!(client.chunk().await, Ok(None));
    until("the first one has ended", || upstream.open() == 1).await;
    assert_eq!(gateway.metric("penstock_gateway_retries_total").await, 0.0);
}

/// A frame without flags on the connection as such.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, 0, 0, 0, 0, 0]);
    frame.extend(payload);
    frame
}

/// A backend whose first connections leave out what they are sent: GOAWAY with nothing looked at. What comes after them
/// goes to `next`.
async fn leaving_out(
    first: usize,
    next: std::net::SocketAddr,
) -> (std::net::SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        for number in 0.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            connections.spawn(async move {
                if number >= first {
                    let mut next = tokio::net::TcpStream::connect(next).await.unwrap();
                    let _ended = tokio::io::copy_bidirectional(&mut stream, &mut next).await;
                    return;
                }
                stream.write_all(&frame(4, &[])).await.unwrap();
                let mut all = Vec::new();
                // The preface, settings, window, then the request's head and body.
                while !all.windows(2).any(|pair| pair == b"hi") {
                    stream.read_buf(&mut all).await.unwrap();
                }
                stream.write_all(&frame(7, &[0; 8])).await.unwrap();
                let mut rest = Vec::new();
                let _ended = stream.read_to_end(&mut rest).await;
            });
        }
    });
    (address, tasks)
}

#[tokio::test]
async fn what_goaway_left_out_was_not_sent_and_is_repeated_whatever_it_is() {
    let (upstream, _) = driven_server(128).await;
    for (first, status) in [(2, 200), (9, 503)] {
        let (address, _tasks) = leaving_out(first, upstream.address).await;
        let mut plan = plan(address).rule(|rule| {
            rule.models.clear();
            rule.retry.attempts = 1;
            let paths = vec![penstock_core::config::NameMatch::Prefix("/".to_owned())];
            rule.conditions = vec![penstock_core::config::Condition::Paths(paths)];
        });
        plan = plan.speaking("a", penstock_core::config::Protocol::Http);
        let gateway = Gateway::start(&plan).await;
        // A POST that may not be sent twice.
        let mut client = gateway.client().await;
        let request = "POST /tools/x HTTP/1.1\r\nhost: gw\r\ncontent-length: 2\r\n\r\nhi";
        client.send(request).await;
        assert_eq!(client.answer().await.status, status, "after {first}");
    }
}

/// A backend that refuses its first streams as not looked at. How many it was sent.
async fn refusing(first: usize) -> (std::net::SocketAddr, Arc<AtomicUsize>, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count: Arc<AtomicUsize> = Arc::default();
    let counted = Arc::clone(&count);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let counted = Arc::clone(&counted);
            connections.spawn(async move {
                let mut server = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_, mut respond))) = server.accept().await {
                    if counted.fetch_add(1, Ordering::SeqCst) < first {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                        continue;
                    }
                    let mut body = respond.send_response(Response::new(()), false).unwrap();
                    body.send_data(Bytes::from("here"), true).unwrap();
                }
            });
        }
    });
    (address, count, tasks)
}

#[tokio::test]
async fn what_was_refused_as_not_looked_at_goes_elsewhere_whatever_it_is() {
    // Asked once and three times more, on whichever connection.
    for (first, body, asked) in [(2, "here", 3), (usize::MAX, "elsewhere", 4)] {
        let (address, count, _tasks) = refusing(first).await;
        let other = Upstream::always(|| Reply::Json(200, "elsewhere".to_owned())).await;
        let plan = plan(address).rule(|rule| {
            rule.models.clear();
            let paths = vec![penstock_core::config::NameMatch::Prefix("/".to_owned())];
            rule.conditions = vec![penstock_core::config::Condition::Paths(paths)];
        });
        let plan = plan.backend("b", &[other.address], 1, 1);
        let plan = plan.speaking("a", penstock_core::config::Protocol::Http);
        let plan = plan.speaking("b", penstock_core::config::Protocol::Http);
        let gateway = Gateway::start(&plan).await;
        // A POST that may not be sent twice.
        let mut client = gateway.client().await;
        let request = "POST /tools/x HTTP/1.1\r\nhost: gw\r\ncontent-length: 2\r\n\r\nhi";
        client.send(request).await;
        let answer = client.answer().await;
        assert_eq!((answer.status, answer.body.as_str()), (200, body));
        assert_eq!(count.load(Ordering::SeqCst), asked);
        let failures =
            "penstock_gateway_attempt_failures_total{backend=\"ns/a\",reason=\"not_taken\"}";
        let failed = if body == "here" { 0.0 } else { 1.0 };
        gateway.metric_is(failures, failed).await;
    }
}

#[tokio::test]
async fn a_caller_who_goes_resets_the_stream_and_the_connection_stays() {
    let (upstream, senders) = driven_server(128).await;
    let gateway = Gateway::start(&plan(upstream.address)).await;
    let mut client = gateway.client().await;
    client.post("", &chat(true)).await;
    until("it is upstream", || senders.lock().unwrap().len() == 1).await;
    let sender = senders.lock().unwrap().pop().unwrap();
    sender.send(word("one")).unwrap();
    assert_eq!(client.head().await.0, 200);
    client.expect(&word("one")).await;
    drop(client);
    let reset = tokio::time::timeout(Duration::from_millis(100), sender.closed());
    assert!(reset.await.is_ok(), "the stream is still open");
    ok(&gateway).await;
    assert_eq!((upstream.connections(), upstream.open()), (1, 1));
}

/// What a stream may hold between backend and caller: the backend's window, a caller's window, what is being written,
/// and pieces in hand.
const MOST_HELD_BYTES: usize = (64 << 10) + 65_535 + (64 << 10) + (64 << 10);

#[tokio::test]
async fn callers_who_do_not_read_hold_little_and_keep_nobody_waiting() {
    let (sent, upstream) = endless(4000).await;
    let gateway = Gateway::start(&plan(upstream.address)).await;
    let mut client = H2Client::connect(gateway.address).await;
    let mut unread = Vec::new();
    for _ in 0..40 {
        unread.push(client.begin("/v1/chat/completions", &chat(true)).await);
    }
    let mut before = 0;
    within("all stand still", async {
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
    assert!(before <= unread.len() * MOST_HELD_BYTES, "{before} bytes");
    assert!(
        before >= unread.len() * (64 << 10),
        "{before} bytes: windows are used"
    );
    // All windows of one connection together, and others go on over it.
    ok(&gateway).await;
    assert_eq!(upstream.connections(), 1);
    drop(unread);
    ok(&gateway).await;
}

#[tokio::test]
async fn tls_agrees_on_what_both_speak() {
    let authority = Authority::new();
    for (offered, version) in [
        (&["h2", "http/1.1"][..], Version::HTTP_2),
        (&["http/1.1"], Version::HTTP_11),
        (&[], Version::HTTP_11),
    ] {
        let speaks = over_tls(&authority.sign(&["a.example"]), None, offered);
        let upstream = HyperUpstream::start(speaks, |_, _| served("x")).await;
        let plan = Plan::new().backend("a", &[upstream.address], 1, 0);
        let gateway = Gateway::empty(settings()).await;
        let ca = penstock_gateway::Credential::new(authority.pem.as_str());
        let values = [("ca".to_owned(), ca)].into();
        gateway.set_credentials(penstock_gateway::Credentials { values });
        gateway
            .apply(&plan.tls("a", "a.example", "ca", false))
            .await;
        for _ in 0..3 {
            ok(&gateway).await;
        }
        let seen = upstream.requests();
        assert!(
            seen.iter().all(|request| request.version == version),
            "{offered:?}"
        );
        assert_eq!(upstream.connections(), 1, "{offered:?}");
    }
}

#[tokio::test]
async fn a_backend_that_does_not_speak_it_counts_as_unreachable() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = Gateway::start(&plan(upstream.address)).await;
    let answer = gateway.post(&chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "upstream_unreachable")
    );
}
