//! Requests for agents and tools whose bodies are too large or too slow to be kept: they pass as they come.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use penstock_core::config::{Condition, NameMatch, Protocol, Repeat};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::harness::*;

/// A chain of HTTP backends behind a rule for `/tools/*`.
fn plan(addresses: &[SocketAddr]) -> Plan {
    let mut plan = Plan::chain(addresses).rule(|rule| {
        rule.models.clear();
        rule.conditions = vec![Condition::Paths(vec![NameMatch::Prefix(
            "/tools/".to_owned(),
        )])];
    });
    for backend in plan.config.backends.values_mut() {
        backend.protocol = Protocol::Http;
    }
    plan
}

fn over_http2(mut plan: Plan) -> Plan {
    for backend in plan.config.backends.values_mut() {
        backend.transport.h2c = true;
    }
    plan
}

/// A backend that gives back what it gets, piece by piece as it comes, trailers included. It speaks both versions.
async fn echo() -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            connections.spawn(async move {
                let service = service_fn(|request: Request<Incoming>| async {
                    let answer = Response::builder()
                        .header("trailer", "x-sum, set-cookie, x-other, x-forwarded-for");
                    Ok::<_, Infallible>(answer.body(request.into_body()).unwrap())
                });
                let _ended = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    (address, tasks)
}

async fn read_until(client: &mut Client, seen: &mut String, text: &str) {
    within(text, async {
        while !seen.contains(text) {
            let mut bytes = Vec::new();
            let read = client.stream.read_buf(&mut bytes).await.unwrap();
            assert!(read > 0, "closed after {seen:?}");
            seen.push_str(std::str::from_utf8(&bytes).unwrap());
        }
    })
    .await;
}

const CONVERSATION: &str =
    "POST /tools/talk HTTP/1.1\r\nhost: gw\r\nte: trailers\r\ntransfer-encoding: chunked\r\n";

#[tokio::test]
async fn a_conversation_goes_both_ways_and_ends_in_trailers() {
    let (address, _echo) = echo().await;
    for plan in [plan(&[address]), over_http2(plan(&[address]))] {
        let gateway = Gateway::start(&plan).await;
        let mut client = gateway.client().await;
        client
            .send(&format!(
                "{CONVERSATION}trailer: x-sum, x-forwarded-for\r\n\r\n"
            ))
            .await;
        let mut seen = String::new();
        for word in ["one", "two"] {
            client.send(&chunk(word)).await;
            read_until(&mut client, &mut seen, &chunk(word)).await;
        }
        // One is no business of trailers, one is not announced.
        client
            .send(
                "0\r\nx-sum: 6\r\nset-cookie: a\r\nx-forwarded-for: 1.2.3.4\r\nx-other: 1\r\n\r\n",
            )
            .await;
        read_until(&mut client, &mut seen, "0\r\nx-sum: 6\r\n\r\n").await;
        assert!(seen.starts_with("HTTP/1.1 200"), "{seen}");
        // The caller's connection is kept.
        client
            .send("POST /tools/x HTTP/1.1\r\nhost: gw\r\ncontent-length: 2\r\n\r\nhi")
            .await;
        read_until(&mut client, &mut seen, "hi").await;
        gateway.metric_is("penstock_gateway_connections", 1.0).await;
    }
}

#[tokio::test]
async fn a_body_that_does_not_end_soon_is_not_waited_for() {
    let (address, _echo) = echo().await;
    let gateway = Gateway::start(&plan(&[address])).await;
    let mut client = gateway.client().await;
    client.send(&format!("{CONVERSATION}\r\n")).await;
    client.send(&chunk("one")).await;
    assert_eq!(client.head().await.0, 200);
    client.expect("one").await;
    client.send(&chunk("two")).await;
    client.expect("two").await;
    client.send("0\r\n\r\n").await;
    assert_eq!(client.chunk().await, Ok(None));
}

#[tokio::test]
async fn callers_of_http_2_talk_and_get_trailers_too() {
    let (address, _echo) = echo().await;
    for plan in [plan(&[address]), over_http2(plan(&[address]))] {
        let gateway = Gateway::start(&plan).await;
        let stream = tokio::net::TcpStream::connect(gateway.address).await;
        let io = TokioIo::new(stream.unwrap());
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), io);
        let (mut sender, connection) = handshake.await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        let (pieces, receiver) = mpsc::unbounded_channel::<Frame<Bytes>>();
        let body = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((Ok::<_, Infallible>(receiver.recv().await?), receiver))
        });
        let request = Request::post("http://gateway/tools/talk")
            .header("te", "trailers")
            .header("trailer", "x-sum")
            .body(StreamBody::new(body.boxed()))
            .unwrap();
        pieces.send(Frame::data(Bytes::from("one"))).unwrap();
        let answer = within("the head", sender.send_request(request)).await;
        let mut answer = answer.unwrap();
        let frame = within("one", answer.body_mut().frame()).await.unwrap();
        assert_eq!(frame.unwrap().into_data().unwrap(), "one");
        pieces.send(Frame::data(Bytes::from("two"))).unwrap();
        let frame = within("two", answer.body_mut().frame()).await.unwrap();
        assert_eq!(frame.unwrap().into_data().unwrap(), "two");
        let mut trailers = http::HeaderMap::new();
        trailers.insert("x-sum", "6".try_into().unwrap());
        trailers.insert("set-cookie", "a".try_into().unwrap());
        pieces.send(Frame::trailers(trailers)).unwrap();
        drop(pieces);
        let frame = within("trailers", answer.body_mut().frame()).await.unwrap();
        let trailers = frame.unwrap().into_trailers().unwrap();
        assert_eq!(trailers.len(), 1);
        assert_eq!(trailers["x-sum"], "6");
        assert!(answer.body_mut().frame().await.is_none());
    }
}

#[tokio::test]
async fn what_is_large_passes_without_being_held() {
    let upstream = HyperUpstream::start(clear(), |_, _| served("x")).await;
    let mut settings = settings();
    settings.limits.body_bytes = 2 << 20;
    settings.limits.total_body_bytes = 2 << 20;
    let large = "x".repeat(24 << 20);
    let announced = format!("content-length: {}\r\n\r\n{large}", large.len());
    let piece = chunk(&large[..1 << 20]).repeat(24);
    let chunked = format!("transfer-encoding: chunked\r\n\r\n{piece}0\r\n\r\n");
    for plan in [
        plan(&[upstream.address]),
        over_http2(plan(&[upstream.address])),
    ] {
        let gateway = Gateway::start_with(&plan, settings.clone()).await;
        // GET: a method whose body is easily forgotten.
        for (method, rest) in [("POST", &announced), ("PUT", &chunked), ("GET", &chunked)] {
            let mut client = gateway.client().await;
            let head = format!("{method} /tools/x HTTP/1.1\r\nhost: gw\r\n");
            client.send(&(head + rest)).await;
            assert_eq!(client.answer().await.status, 200, "{method}");
            let seen = upstream.requests().pop().unwrap();
            assert_eq!(seen.body.len(), large.len(), "{method}");
            let length = seen.headers.get("content-length");
            let is_announced = length.is_some_and(|length| *length == large.len().to_string());
            assert_eq!(is_announced, method == "POST", "{method}");
        }
    }
}

#[tokio::test]
async fn what_a_backend_does_not_take_waits_with_the_caller() {
    for is_http2 in [false, true] {
        let upstream = if is_http2 {
            // Its window is full, and nobody reads.
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let mut tasks = JoinSet::new();
            tasks.spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
                stream.write_all(&settings).await.unwrap();
                std::future::pending::<()>().await;
            });
            (address, tasks)
        } else {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let mut tasks = JoinSet::new();
            tasks.spawn(async move {
                let _open = listener.accept().await.unwrap();
                std::future::pending::<()>().await;
            });
            (address, tasks)
        };
        let plan = plan(&[upstream.0]).rule(|rule| rule.timeouts.idle_ms = 1_000);
        let plan = if is_http2 { over_http2(plan) } else { plan };
        let gateway = Gateway::start(&plan).await;
        let mut client = gateway.client().await;
        let endless = "POST /tools/x HTTP/1.1\r\nhost: gw\r\ncontent-length: 1000000000\r\n\r\n";
        client.send(endless).await;
        let (mut read, mut write) = client.stream.into_split();
        let mut tasks = JoinSet::new();
        let sent = tasks.spawn(async move {
            let piece = vec![b'x'; 64 << 10];
            while write.write_all(&piece).await.is_ok() {}
        });
        let mut answer = Vec::new();
        within("a refusal", async {
            while find(&answer, b"\r\n\r\n").is_none() {
                read.read_buf(&mut answer).await.unwrap();
            }
        })
        .await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 504"), "{answer}");
        sent.abort();
        let failures = "penstock_gateway_attempt_failures_total{backend=\"ns/a\",reason=\"first_token_timeout\"}";
        gateway.metric_is(failures, 1.0).await;
    }
}

#[tokio::test]
async fn a_caller_who_stops_or_breaks_its_body_is_to_blame_itself() {
    let upstream = HyperUpstream::start(clear(), |_, _| served("x")).await;
    for (text, status, code) in [
        (chunk("one"), 408, "body_timeout"),
        (chunk("one") + "no length\r\n", 400, "body_broken"),
    ] {
        let plan = plan(&[upstream.address]).rule(|rule| rule.timeouts.idle_ms = 300);
        for plan in [plan.clone(), over_http2(plan)] {
            let gateway = Gateway::start(&plan).await;
            let mut client = gateway.client().await;
            client
                .send(&format!("{CONVERSATION}trailer: x-sum\r\n\r\n"))
                .await;
            client.send(&text).await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.status, answer.code().as_str()),
                (status, code),
                "{text:?}"
            );
            let ejections = "penstock_gateway_ejections_total";
            assert_eq!(gateway.metric(ejections).await, 0.0);
        }
    }
}

#[tokio::test]
async fn what_is_not_kept_is_sent_once() {
    for h2c in [false, true] {
        let good = HyperUpstream::start(clear(), |_, _| served("x")).await;
        let broken = Upstream::always(|| Reply::Reset).await;
        let mut plan =
            plan(&[broken.address, good.address]).rule(|rule| rule.retry.repeat = Repeat::Always);
        plan.config
            .backends
            .get_mut(&id("b"))
            .unwrap()
            .transport
            .h2c = h2c;
        let large = "x".repeat(2 << 20);
        let length = large.len();
        let request = format!(
            "POST /tools/x HTTP/1.1\r\nhost: gw\r\ncontent-length: {length}\r\n\r\n{large}"
        );
        let gateway = Gateway::start(&plan).await;
        let mut client = gateway.client().await;
        client.send(&request).await;
        assert_eq!(client.answer().await.status, 502);
        assert_eq!(good.requests().len(), 0);
        // Of which nothing was sent goes elsewhere, whole.
        plan.set_endpoints("a", &[nobody()]);
        gateway.apply(&plan).await;
        let mut client = gateway.client().await;
        client.send(&request).await;
        assert_eq!(client.answer().await.status, 200);
        assert_eq!(good.requests()[0].body.len(), length);
    }
}

#[tokio::test]
async fn a_caller_who_asks_first_is_told_when_a_backend_takes_its_body() {
    let upstream = HyperUpstream::start(clear(), |_, _| served("x")).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let large = "x".repeat(2 << 20);
    let headers = format!(
        "host: gw\r\nexpect: 100-continue\r\ncontent-length: {}\r\n",
        large.len()
    );
    let mut client = gateway.client().await;
    client
        .send(&format!("POST /other HTTP/1.1\r\n{headers}\r\n"))
        .await;
    assert_eq!(client.head().await.0, 404, "without being asked for more");
    gateway.apply(&plan(&[nobody()])).await;
    let mut client = gateway.client().await;
    client
        .send(&format!("POST /tools/x HTTP/1.1\r\n{headers}\r\n"))
        .await;
    assert_eq!(client.head().await.0, 503, "no backend takes it");
    gateway.apply(&plan(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client
        .send(&format!("POST /tools/x HTTP/1.1\r\n{headers}\r\n"))
        .await;
    assert_eq!(client.head().await.0, 100);
    client.send(&large).await;
    assert_eq!(client.answer().await.status, 200);
    let seen = upstream.requests().pop().unwrap();
    assert_eq!(seen.body.len(), large.len());
    assert!(!seen.headers.contains_key("expect"));
}

#[tokio::test]
async fn an_answer_may_come_before_the_body_has_ended() {
    let upstream = Upstream::always(|| Reply::Json(413, "no".to_owned())).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client
        .send(&format!("{CONVERSATION}trailer: x-sum\r\n\r\n"))
        .await;
    client.send(&chunk("one")).await;
    // The scripted backend answers a head with a length, here none, at once.
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.body.as_str()), (413, "no"));
}

#[tokio::test]
async fn a_caller_who_goes_while_it_sends_frees_the_backend() {
    let upstream = Upstream::always(|| Reply::Silent).await;
    let gateway = Gateway::start(&plan(&[upstream.address])).await;
    let mut client = gateway.client().await;
    client
        .send(&format!("{CONVERSATION}trailer: x-sum\r\n\r\n"))
        .await;
    until("it is upstream", || upstream.count() == 1).await;
    drop(client);
    until("it is gone", || upstream.gone() == 1).await;
    gateway
        .metric_is("penstock_gateway_in_flight_requests", 0.0)
        .await;
}
