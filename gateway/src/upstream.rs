//! (IO) Connections to backends: connecting, pooling, one request and its answer.
//!
//! One of HTTP/1.1 is driven by the request that uses it and by nobody else ([`http1`]); one of HTTP/2 has many
//! requests and a task of its own on their worker ([`http2`]). Which one it is, is said by the backend's object, or
//! agreed on with the other side by ALPN.

mod connect;
mod http1;
mod http2;
mod upload;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use http::header::{CONNECTION, HOST};
use http::{HeaderMap, HeaderValue, Request, Response, Uri};
use tokio::task::JoinSet;

use self::connect::Made;
use crate::openai::{self, Pieces};
use crate::passage::Passage;
use crate::provider::foreign;
use crate::snapshot::{Endpoint, EndpointLive};
use crate::socket::Socket;
use crate::trust::HandshakeError;

/// Idle connections of HTTP/1.1 for each endpoint and worker: bursts beyond it connect anew.
const MAX_IDLE_CONNECTIONS: usize = 128;
/// The largest head of an answer.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// The body of a request.
#[derive(Debug)]
pub(crate) enum RequestBody {
    /// It is here.
    Whole(Pieces),
    /// It comes from its caller.
    Passage(Passage),
}

impl RequestBody {
    /// Of so many bytes, if that is known.
    pub(crate) fn length(&self) -> Option<u64> {
        match self {
            Self::Whole(pieces) => u64::try_from(pieces.remaining()).ok(),
            Self::Passage(passage) => passage.length(),
        }
    }
}

/// The body of a request that comes from its caller.
fn passage(request: &Request<RequestBody>) -> Option<Passage> {
    match request.body() {
        RequestBody::Whole(_) => None,
        RequestBody::Passage(passage) => Some(passage.clone()),
    }
}

/// Tasks of a worker that no connection of a caller has. They end with it.
#[derive(Debug, Default)]
pub(crate) struct Tasks(Mutex<JoinSet<()>>);

impl Tasks {
    fn lock(&self) -> std::sync::MutexGuard<'_, JoinSet<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Must be called on the worker's thread.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Ends all of them.
    pub(crate) fn abort(&self) {
        self.lock().abort_all();
    }

    /// Whether none is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Waits for the end of one of them. Cancel safe.
    pub(crate) async fn one_ended(&self) {
        std::future::poll_fn(|cx| self.lock().poll_join_next(cx).map(|_ended| ())).await;
    }
}

/// A connection for one request, within `limit`: a new one, or a place on one of HTTP/2 that the worker has or
/// opens. Without a worker it is used by nobody else. Cancel safe.
pub(crate) async fn connect(
    endpoint: &Arc<Endpoint>,
    worker: Option<usize>,
    tasks: &Tasks,
    limit: Duration,
) -> Result<Conn, ConnectError> {
    let alone = http2::Lines::default();
    let lines = worker.and_then(|worker| endpoint.live.pool.lines(worker));
    let lines = lines.unwrap_or(&alone);
    let opened = async {
        while endpoint.may_speak_http2() {
            let (place, is_new) = lines.reserve(endpoint);
            if is_new {
                let line = place.line();
                tasks.spawn(http2::drive(Arc::clone(endpoint), line, limit));
            }
            match place.opened().await? {
                http2::Opened::Place(place) => return Ok(Conn::Many(place)),
                http2::Opened::Full => {}
                http2::Opened::Http1(socket) => return Ok(one(endpoint, socket, limit)),
            }
        }
        let socket = connect::socket(endpoint, limit).await?;
        if socket.speaks_http2() {
            // It did not when it was asked last. This one is lost, the next request gets another.
            endpoint.live.speaks_http1.store(false, Ordering::Relaxed);
            return Err(ConnectError::Refused);
        }
        Ok(one(endpoint, socket, limit))
    };
    match tokio::time::timeout(limit, opened).await {
        Ok(opened) => opened,
        Err(_) => Err(ConnectError::TimedOut),
    }
}

/// Asks an endpoint for something of the gateway's own, over a connection that nobody else uses. `None` without an
/// answer within `limit`. Cancel safe.
pub(crate) async fn get(
    endpoint: &Arc<Endpoint>,
    uri: Uri,
    tasks: &Tasks,
    limit: Duration,
) -> Option<(Response<()>, Exchange)> {
    let deadline = penstock_shell::clock::now() + limit;
    let conn = connect(endpoint, None, tasks, limit).await.ok()?;
    let body = openai::unpatched(Bytes::new());
    let mut request = Request::new(RequestBody::Whole(body));
    *request.uri_mut() = uri;
    request.headers_mut().insert(HOST, endpoint.host.clone());
    if !endpoint.may_speak_http2() {
        let close = HeaderValue::from_static("close");
        request.headers_mut().insert(CONNECTION, close);
    }
    conn.send(request, endpoint, deadline).await.ok()
}

fn one(endpoint: &Endpoint, socket: Socket, limit: Duration) -> Conn {
    let made = Made::new(endpoint);
    made.open(endpoint, &socket);
    Conn::One(http1::Conn::new(socket, made, limit))
}

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectError {
    /// Refused, unreachable, unknown host.
    Refused,
    /// Not within the limit.
    TimedOut,
    /// TLS could not be agreed on.
    Handshake(HandshakeError),
}

/// A connection that is ready for a request.
#[derive(Debug)]
pub(crate) enum Conn {
    /// One request at a time.
    One(http1::Conn),
    /// A place for one request among others.
    Many(http2::Place),
}

impl Conn {
    /// Whether the peer may have closed it while nobody looked.
    pub(crate) fn is_reused(&self) -> bool {
        match self {
            Self::One(conn) => conn.is_reused(),
            Self::Many(_) => false,
        }
    }

    /// Sends a request to `endpoint` and waits for the head of its answer until `deadline`, which stays in force for
    /// the first frame of the body. Dropping the future closes the connection, or resets the stream.
    pub(crate) async fn send(
        self,
        request: Request<RequestBody>,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<(Response<()>, Exchange), SendError> {
        let (head, body) = match self {
            Self::One(conn) => {
                let (head, body) = conn.send(request, endpoint, deadline).await?;
                (head, Body::One(body))
            }
            Self::Many(place) => {
                let (head, body) = place.send(request, endpoint, deadline).await?;
                (head, Body::Many(Box::new(body)))
            }
        };
        endpoint.live.handshake.note(None);
        let foreign = None;
        Ok((head, Exchange { body, foreign }))
    }
}

/// Why there is no head of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendError {
    /// The connection ended, or what came is not HTTP.
    Broken {
        /// No byte of the request was written.
        unsent: bool,
    },
    /// Something came that is no answer, or not all of its head.
    NoAnswer,
    /// Not until the deadline.
    TimedOut,
    /// The other side broke off the handshake when it saw this one's certificate, or none: it read no request.
    Handshake(HandshakeError),
}

/// Why a body does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// The connection ended early, or what came is not HTTP.
    Broken,
    /// Nothing came until the deadline.
    TimedOut,
}

/// An answer whose head has come. Dropping it before its end closes the connection, or resets the stream.
#[derive(Debug)]
pub(crate) struct Exchange {
    body: Body,
    /// Makes chunks of a chat completion of a stream that is none.
    foreign: Option<foreign::Incoming>,
}

#[derive(Debug)]
enum Body {
    One(http1::Body),
    Many(Box<http2::Body>),
}

impl Body {
    fn is_over(&self) -> bool {
        match self {
            Self::One(body) => body.is_over(),
            Self::Many(body) => body.is_over(),
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyError>> {
        match self {
            Self::One(body) => body.poll_data(cx),
            Self::Many(body) => body.poll_data(cx),
        }
    }
}

impl Exchange {
    /// Whether the body ends when its connection does, as it would if it were cut.
    pub(crate) fn ends_with_connection(&self) -> bool {
        match &self.body {
            Body::One(body) => body.ends_with_connection(),
            Body::Many(_) => false,
        }
    }

    /// From now on pieces are what `foreign` makes of them.
    pub(crate) fn read_as(&mut self, foreign: foreign::Incoming) {
        self.foreign = Some(foreign);
    }

    /// What a piece of the body is to its reader; empty if that cannot be told yet.
    fn read(&mut self, bytes: Bytes) -> Result<Bytes, BodyError> {
        let Some(foreign) = &mut self.foreign else {
            return Ok(bytes);
        };
        let mut read = foreign.feed(&bytes).map_err(|_| BodyError::Broken)?;
        if self.body.is_over() {
            read.extend(
                self.foreign
                    .take()
                    .map(foreign::Incoming::end)
                    .into_iter()
                    .flatten(),
            );
        }
        Ok(Bytes::from(read))
    }

    /// The next piece of the body; `None` at its proper end. Cancel safe.
    pub(crate) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, BodyError>> {
        loop {
            let Some(bytes) = std::task::ready!(self.body.poll_data(cx))? else {
                let last = self.foreign.take().map(foreign::Incoming::end);
                let last = last.filter(|last| !last.is_empty()).map(Bytes::from);
                return Poll::Ready(Ok(last));
            };
            let bytes = self.read(bytes)?;
            if !bytes.is_empty() {
                return Poll::Ready(Ok(Some(bytes)));
            }
        }
    }

    /// [`Self::poll_frame`] as a future. Cancel safe.
    pub(crate) async fn frame(&mut self) -> Result<Option<Bytes>, BodyError> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Until when the next piece may take.
    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        match &mut self.body {
            Body::One(body) => body.set_deadline(deadline),
            Body::Many(body) => body.set_deadline(deadline),
        }
    }

    /// Whether nothing is left of the body.
    pub(crate) fn is_over(&self) -> bool {
        self.body.is_over() && self.foreign.is_none()
    }

    /// What came after the body.
    pub(crate) fn take_trailers(&mut self) -> Option<Box<HeaderMap>> {
        match &mut self.body {
            Body::One(body) => body.take_trailers(),
            Body::Many(body) => body.take_trailers(),
        }
    }

    /// The body was read to its end: gives the connection back, if it can carry another request.
    pub(crate) fn finish(&mut self, to: &EndpointLive, worker: usize, now: Instant) {
        if let Body::One(body) = &mut self.body
            && let Some(conn) = body.take_conn(now)
        {
            to.pool.give(worker, conn);
        }
    }
}

/// Connections of one endpoint. A worker takes only what it gave: sockets and timers belong to its runtime.
#[derive(Debug)]
pub struct Pool {
    shards: Box<[Shard]>,
}

#[derive(Debug, Default)]
struct Shard {
    /// Those of HTTP/1.1 that carry no request.
    idle: Mutex<Vec<http1::Conn>>,
    /// Those of HTTP/2.
    lines: http2::Lines,
}

impl Shard {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<http1::Conn>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// An empty pool for `workers`.
    pub fn new(workers: usize) -> Self {
        Self {
            shards: (0..workers.max(1)).map(|_| Shard::default()).collect(),
        }
    }

    fn lines(&self, worker: usize) -> Option<&http2::Lines> {
        Some(&self.shards.get(worker)?.lines)
    }

    /// The connection of HTTP/1.1 to `endpoint` that was used last, if it is still good.
    pub(crate) fn take(&self, endpoint: &Endpoint, worker: usize, now: Instant) -> Option<Conn> {
        let shard = self.shards.get(worker)?;
        loop {
            let mut conn = shard.idle().pop()?;
            if conn.made().is_of(endpoint, now) && conn.is_usable(now) {
                return Some(Conn::One(conn));
            }
        }
    }

    fn give(&self, worker: usize, conn: http1::Conn) {
        let Some(shard) = self.shards.get(worker) else {
            return;
        };
        let mut idle = shard.idle();
        if idle.len() < MAX_IDLE_CONNECTIONS {
            idle.push(conn);
        }
    }

    /// Closes what is old or was closed by the peer.
    pub fn sweep(&self, worker: usize, now: Instant) {
        let Some(shard) = self.shards.get(worker) else {
            return;
        };
        shard.idle().retain_mut(|conn| conn.is_usable(now));
        shard.lines.sweep(now);
    }

    /// Closes everything.
    pub fn clear(&self, worker: usize) {
        if let Some(shard) = self.shards.get(worker) {
            shard.idle().clear();
            shard.lines.clear();
        }
    }
}
