//! (IO) The two ends of the proxy benchmark: `mock`, an upstream that answers at once, and `client`, one connection
//! that sends the next request when the last one is answered. Both are compiled so that they are never the limit.

use std::convert::Infallible;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use clap::Parser;
use hdrhistogram::Histogram;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A chat answer of about the size that a short one has.
const ANSWER: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"mock","choices":[{"index":0,"message":{"role":"assistant","content":"The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade of an old oak tree."},"finish_reason":"stop"}],"usage":{"prompt_tokens":180,"completion_tokens":26,"total_tokens":206}}"#;

#[derive(Parser)]
enum Command {
    /// Answers every request with the same chat completion.
    Mock {
        /// Address to listen on.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Sends requests one after the other over one connection; prints one line.
    Client {
        /// Address of the proxy, or of the mock itself.
        #[arg(long)]
        connect: SocketAddr,
        /// Requests that are measured.
        #[arg(long)]
        requests: u32,
        /// Requests before that.
        #[arg(long, default_value_t = 500)]
        warm_up: u32,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Mock { listen } => mock(listen).await,
        Command::Client {
            connect,
            requests,
            warm_up,
        } => client(connect, requests, warm_up).await,
    }
}

async fn mock(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await.context("listen")?;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        stream.set_nodelay(true)?;
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            let service = service_fn(|request: Request<Incoming>| async move {
                // A client that goes away ends its own connection.
                let _ = request.into_body().collect().await;
                let answer = Response::builder()
                    .header("content-type", "application/json")
                    .body(Full::new(Bytes::from_static(ANSWER.as_bytes())))
                    .unwrap_or_default();
                Ok::<_, Infallible>(answer)
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
async fn client(connect: SocketAddr, requests: u32, warm_up: u32) -> anyhow::Result<()> {
    let stream = TcpStream::connect(connect).await.context("connect")?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let content = "Tell me about the fox and the dog. ".repeat(20);
    let body = format!(
        r#"{{"model":"mock","messages":[{{"role":"user","content":"{content}"}}],"max_tokens":26}}"#
    );
    let body = Bytes::from(body);
    let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    for number in 0..warm_up + requests {
        let request = Request::post("/v1/chat/completions")
            .header("host", connect.to_string())
            .header("content-type", "application/json")
            .body(Full::new(body.clone()))?;
        let start = Instant::now();
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        ensure!(response.status() == 200, "status {}", response.status());
        let answer = response.into_body().collect().await?.to_bytes();
        ensure!(
            answer.len() == ANSWER.len(),
            "answer of {} bytes",
            answer.len()
        );
        if number >= warm_up {
            latencies.saturating_record(u64::try_from(start.elapsed().as_micros())?);
        }
    }
    let (p50, p99) = (
        latencies.value_at_quantile(0.5),
        latencies.value_at_quantile(0.99),
    );
    writeln!(
        std::io::stdout().lock(),
        "client: requests={requests} p50_us={p50} p99_us={p99}"
    )?;
    Ok(())
}
