//! (IO) One worker: a thread with its own single-threaded runtime, sockets, pools and timers. Connections are handed
//! to it and stay with it, so a request never crosses threads.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::certificates::{self, HTTP_2};
use crate::classifier;
use crate::first_bytes::{FirstBytes, Speaks};
use crate::guard::{self, Caller, Watch, WatchedIo};
use crate::handle::handle;
use crate::jobs;
use crate::linger;
use crate::process::Worker;
use crate::settings::Limits;
use crate::socket::Socket;
use crate::unread::{self, Streams};

/// The longest time between two looks at the connections; shorter limits shorten it.
const LONGEST_TICK: Duration = Duration::from_secs(1);
const SHORTEST_TICK: Duration = Duration::from_millis(10);
/// hyper refuses a head beyond its own bounds without a body; they lie this much above ours, so that callers who are
/// a little over get an error that they can read.
const HEAD_SLACK: usize = 2;
const SMALLEST_HEAD_BYTES: usize = 16 << 10;
/// Requests at one time on one HTTP/2 connection. Clients and proxies that need more open another one.
const H2_STREAMS: u32 = 128;
/// What a caller may send of one body before the gateway has taken it.
const H2_STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// The same of all bodies of one connection.
const H2_CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// What is kept of one answer that its caller does not take.
const H2_SEND_BYTES: usize = 64 << 10;
/// Streams that a caller reset before the gateway came to them; one more ends the connection (CVE-2023-44487).
const H2_PENDING_RESETS: usize = 20;
/// Streams that the gateway had to reset for a caller's mistakes; one more ends the connection (CVE-2025-8671).
const H2_ERROR_RESETS: usize = 256;

/// A client connection on its way to a worker.
pub(crate) struct Arrival {
    pub(crate) stream: std::net::TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) permit: OwnedSemaphorePermit,
    /// `None`: in the clear.
    pub(crate) tls: Option<Arc<ServerConfig>>,
}

/// Signals that all workers follow.
#[derive(Clone)]
pub(crate) struct Signals {
    /// End each connection after the request in progress.
    pub(crate) drain: CancellationToken,
    /// Drop what is left.
    pub(crate) abort: CancellationToken,
}

/// Runs until no more connections can arrive and all have ended, or until told to abort.
pub(crate) async fn run(
    worker: Arc<Worker>,
    mut arrivals: mpsc::UnboundedReceiver<Arrival>,
    signals: Signals,
) {
    let mut connections = JoinSet::new();
    let mut watches: Vec<Arc<Watch>> = Vec::new();
    let limits = &worker.process.settings.limits;
    let shortest = limits
        .header_timeout
        .min(limits.idle_timeout)
        .min(limits.write_timeout);
    let mut ticks = tokio::time::interval((shortest / 4).clamp(SHORTEST_TICK, LONGEST_TICK));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    if worker.index == 0 {
        let run = classifier::run(Arc::clone(&worker), signals.drain.clone());
        connections.spawn(run);
    }
    if worker.index == 0 && worker.process.jobs.has_store() {
        connections.spawn(jobs::runner::run(
            Arc::clone(&worker),
            signals.drain.clone(),
        ));
    }
    let mut open = true;
    let mut draining = false;
    while open || !connections.is_empty() || !worker.streams.is_empty() {
        tokio::select! {
            arrival = arrivals.recv(), if open => match arrival {
                Some(arrival) => {
                    let caller = Caller {
                        address: arrival.peer.ip(),
                        is_tls: arrival.tls.is_some(),
                    };
                    let watch = Arc::new(Watch::new(&worker.clock, caller));
                    if draining {
                        watch.drain();
                    }
                    watches.push(Arc::clone(&watch));
                    connections.spawn(connection(Arc::clone(&worker), watch, arrival));
                }
                None => open = false,
            },
            Some(_ended) = connections.join_next(), if !connections.is_empty() => {}
            () = worker.streams.one_ended(), if !worker.streams.is_empty() => {}
            _ = ticks.tick() => tick(&worker, &mut watches),
            () = signals.drain.cancelled(), if !draining => {
                draining = true;
                for watch in &watches {
                    watch.drain();
                }
            }
            () = signals.abort.cancelled() => break,
        }
    }
    connections.shutdown().await;
    if let Some(snapshot) = &*worker.process.snapshot.load() {
        for live in snapshot.backends().flat_map(|backend| backend.lives()) {
            live.pool.clear(worker.index);
        }
    }
    worker.streams.abort();
    worker.tasks.abort();
}

fn tick(worker: &Worker, watches: &mut Vec<Arc<Watch>>) {
    let now = penstock_shell::clock::now();
    let now_ms = worker.process.ms(now);
    worker.clock.store(now_ms, Ordering::Relaxed);
    // Only this list still knows a watch whose connection has ended.
    watches.retain(|watch| Arc::strong_count(watch) > 1);
    for watch in watches {
        watch.check(now_ms, &worker.process.settings.limits);
    }
    if let Some(snapshot) = &*worker.process.snapshot.load() {
        for live in snapshot.backends().flat_map(|backend| backend.lives()) {
            live.pool.sweep(worker.index, now);
        }
        // One of them does it for all.
        if worker.index == 0 {
            for backend in snapshot.backends() {
                backend.compare(now_ms);
            }
        }
    }
}

/// Counts a connection while it is open.
struct Counted(Arc<Worker>);

impl Counted {
    fn new(worker: &Arc<Worker>) -> Self {
        worker.process.metrics.connections.inc();
        Self(Arc::clone(worker))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
        self.0.process.metrics.connections.dec();
    }
}

async fn connection(worker: Arc<Worker>, watch: Arc<Watch>, arrival: Arrival) {
    let _counted = Counted::new(&worker);
    let _permit = arrival.permit;
    let Ok(stream) = TcpStream::from_std(arrival.stream) else {
        return;
    };
    // Without it the last segment of each answer may wait 40 ms for the caller's delayed acknowledgement.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let (socket, speaks) = match arrival.tls {
        None => {
            let first = pin!(FirstBytes::of(&stream));
            let speaks = guard::run(first, &watch, FirstBytes::end).await;
            let Some(Ok(Some(speaks))) = speaks else {
                return;
            };
            (Socket::Plain(stream), speaks)
        }
        Some(tls) => {
            let accept = pin!(TlsAcceptor::from(tls).accept(stream));
            // Why a caller was not let in is the caller's to know.
            let Some(Ok(stream)) = guard::run(accept, &watch, |_| {}).await else {
                return;
            };
            let session = stream.get_ref().1;
            watch.shows(certificates::names(session.peer_certificates()));
            let speaks = if session.alpn_protocol() == Some(HTTP_2) {
                watch.speaks_http2();
                Speaks::Http2
            } else {
                Speaks::Http1
            };
            (Socket::Tls(Box::new(stream.into())), speaks)
        }
    };
    let io = TokioIo::new(WatchedIo::new(socket, Arc::clone(&watch)));
    let limits = &worker.process.settings.limits;
    let service = {
        let (worker, watch) = (Arc::clone(&worker), Arc::clone(&watch));
        // A connection has room for this future as long as it lives: while a stream goes out nothing of it is needed.
        service_fn(move |request| {
            let answer = handle(Arc::clone(&worker), Arc::clone(&watch), request);
            Box::pin(answer.inspect(|_| unread::begun()))
        })
    };
    // How a client connection ends matters to nobody: the request has its own record.
    match speaks {
        Speaks::Http1 => {
            let mut connection = http1(limits).serve_connection(io, service);
            let poll = http1::Connection::poll_without_shutdown;
            let drain = |c: &mut _| http1::Connection::graceful_shutdown(Pin::new(c));
            let ended = guard::run_by(&mut connection, &watch, poll, drain).await;
            if ended.is_some() {
                let io = connection.into_parts().io.into_inner();
                linger::close(io).await;
            }
        }
        // In a box of its own, so that no connection of HTTP/1.1 has room for it.
        Speaks::Http2 | Speaks::Unclear => {
            let builder = match speaks {
                Speaks::Http2 => either(limits).http2_only(),
                _ => either(limits),
            };
            let mut connection = Box::pin(builder.serve_connection(io, service));
            let connection = connection.as_mut();
            guard::run(connection, &watch, auto::Connection::graceful_shutdown).await;
        }
    }
}

/// hyper's own limit of a head.
fn head_bytes(limits: &Limits) -> usize {
    let bytes = limits.header_bytes.saturating_mul(HEAD_SLACK);
    bytes.max(SMALLEST_HEAD_BYTES)
}

fn head_count(limits: &Limits) -> usize {
    limits.headers.saturating_mul(HEAD_SLACK)
}

/// HTTP/1.1, within the limits.
fn http1(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        // The worker's ticks do this without a timer for each request.
        .header_read_timeout(None)
        .max_headers(head_count(limits))
        .max_buf_size(head_bytes(limits));
    builder
}

/// HTTP/1.1 or HTTP/2, within the limits.
fn either(limits: &Limits) -> auto::Builder<Streams> {
    let mut builder = auto::Builder::new(Streams {
        write_timeout: limits.write_timeout,
    });
    builder
        .http1()
        // The worker's ticks do this without a timer for each request.
        .header_read_timeout(None)
        .max_headers(head_count(limits))
        .max_buf_size(head_bytes(limits));
    builder
        .http2()
        .max_concurrent_streams(H2_STREAMS)
        .max_header_list_size(u32::try_from(head_bytes(limits)).unwrap_or(u32::MAX))
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(H2_SEND_BYTES)
        .max_pending_accept_reset_streams(H2_PENDING_RESETS)
        .max_local_error_reset_streams(H2_ERROR_RESETS);
    builder
}
