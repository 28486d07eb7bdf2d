//! (IO) Connections to backends: connecting, pooling, one request and its answer.
//!
//! A connection is driven by the request that uses it and by nobody else: there is no task behind it, so dropping a
//! request closes its connection at once and an idle connection costs no wake-ups. That a peer closed an idle
//! connection is seen when it is taken out or swept.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tower_service::Service as _;

use crate::openai::Pieces;
use crate::provider::foreign;
use crate::snapshot::{Address, Endpoint, EndpointLive};
use crate::socket::Socket;
use crate::trust::{HandshakeError, Secured};

/// uvicorn, and so vLLM, closes idle connections after 5 s; leaving earlier avoids most races.
const MAX_IDLE: Duration = Duration::from_secs(4);
/// Idle connections for each endpoint and worker: bursts beyond it connect anew.
const MAX_IDLE_CONNECTIONS: usize = 128;
/// Read buffer of a connection, and so the largest frame and the largest answer head.
const BUFFER_BYTES: usize = 64 << 10;

/// What goes upstream.
pub(crate) type RequestBody = Full<Pieces>;

type Io = TokioIo<Socket>;

/// Makes connections.
#[derive(Clone)]
pub(crate) struct Connector {
    names: HttpConnector,
}

impl Connector {
    pub(crate) fn new() -> Self {
        let mut names = HttpConnector::new();
        names.set_nodelay(true);
        names.enforce_http(false);
        Self { names }
    }

    async fn tcp(&self, address: &Address) -> Result<TcpStream, ConnectError> {
        match address {
            Address::Socket(address) => {
                let stream = TcpStream::connect(address)
                    .await
                    .map_err(|_| ConnectError::Refused)?;
                stream
                    .set_nodelay(true)
                    .map_err(|_| ConnectError::Refused)?;
                Ok(stream)
            }
            Address::Origin(origin) => {
                let uri: Uri = origin.parse().map_err(|_| ConnectError::Refused)?;
                let opened = self.names.clone().call(uri).await;
                let opened = opened.map_err(|_| ConnectError::Refused)?;
                Ok(opened.into_inner())
            }
        }
    }

    async fn open(&self, endpoint: &Endpoint) -> Result<Io, ConnectError> {
        let tcp = self.tcp(&endpoint.address).await?;
        let Some(secured) = &endpoint.secured else {
            return Ok(TokioIo::new(Socket::Plain(tcp)));
        };
        match secured.connect(tcp).await {
            Ok(socket) => {
                // A backend that does not take the gateway's certificate says so later.
                if endpoint.live.handshake.failed() != Some(HandshakeError::ClientCertificate) {
                    endpoint.live.handshake.note(None);
                }
                Ok(TokioIo::new(socket))
            }
            Err(err) => {
                let failed = HandshakeError::find(&err).unwrap_or(HandshakeError::Handshake);
                note(endpoint, failed, &err);
                Err(ConnectError::Handshake(failed))
            }
        }
    }

    /// A new connection, within `limit`. Cancel safe.
    pub(crate) async fn connect(
        &self,
        endpoint: &Endpoint,
        limit: Duration,
    ) -> Result<Conn, ConnectError> {
        let io = match tokio::time::timeout(limit, self.open(endpoint)).await {
            Ok(opened) => opened?,
            Err(_) => return Err(ConnectError::TimedOut),
        };
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES)
            .handshake(io)
            .await
            .map_err(|_| ConnectError::Refused)?;
        Ok(Conn {
            sender,
            connection: Box::new(connection),
            deadline: Box::pin(tokio::time::sleep(limit)),
            idle_since: penstock_shell::clock::now(),
            reused: false,
            closed: false,
            secured: endpoint.secured.clone(),
        })
    }
}

/// Says why TLS cannot be spoken with an endpoint, once for each reason.
fn note(endpoint: &Endpoint, failed: HandshakeError, err: &(dyn Error + 'static)) {
    if endpoint.live.handshake.note(Some(failed)) {
        tracing::warn!(
            backend.id = %endpoint.live.backend,
            endpoint = %endpoint.address,
            reason = failed.label(),
            error = err,
            "no TLS with this endpoint: {failed}"
        );
    }
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
pub(crate) struct Conn {
    sender: SendRequest<RequestBody>,
    connection: Box<Connection<Io, RequestBody>>,
    /// One timer for all waits on this connection: moving it is cheaper than making another.
    deadline: Pin<Box<Sleep>>,
    idle_since: Instant,
    reused: bool,
    closed: bool,
    /// What its handshake was made with.
    secured: Option<Arc<Secured>>,
}

impl fmt::Debug for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn")
            .field("reused", &self.reused)
            .finish_non_exhaustive()
    }
}

impl Conn {
    /// Whether it carried a request before: then it may have been closed by the peer in the meantime.
    pub(crate) fn is_reused(&self) -> bool {
        self.reused
    }

    /// Whether it was made as a new one to `endpoint` would be.
    fn is_of(&self, endpoint: &Endpoint) -> bool {
        match (&self.secured, &endpoint.secured) {
            (Some(made), Some(wanted)) => Arc::ptr_eq(made, wanted),
            (made, wanted) => made.is_none() && wanted.is_none(),
        }
    }

    fn is_usable(&mut self, now: Instant, cx: &mut Context<'_>) -> bool {
        now.saturating_duration_since(self.idle_since) < MAX_IDLE
            && !self.is_closed(cx)
            && self.sender.is_ready()
    }

    /// Does what the socket allows and says whether the connection has ended.
    fn is_closed(&mut self, cx: &mut Context<'_>) -> bool {
        self.closed = self.closed || Pin::new(&mut *self.connection).poll(cx).is_ready();
        self.closed
    }

    fn set_deadline(&mut self, deadline: Instant) {
        self.deadline.as_mut().reset(deadline.into());
    }

    /// Sends a request to `endpoint` and waits for the head of its answer until `deadline`, which stays in force for
    /// the first frame of the body. Dropping the future closes the connection.
    pub(crate) async fn send(
        mut self,
        request: Request<RequestBody>,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<(Response<()>, Exchange), SendError> {
        self.set_deadline(deadline);
        let mut answer = std::pin::pin!(self.sender.try_send_request(request));
        let answer = std::future::poll_fn(|cx| {
            let closed = self.is_closed(cx);
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(answer.map_err(|err| {
                    // In TLS 1.3 the other side looks at certificates when this one is done.
                    if let Some(failed) = HandshakeError::find(err.error()) {
                        note(endpoint, failed, err.error());
                        return SendError::Handshake(failed);
                    }
                    // hyper hands the request back when not a byte of it was written.
                    let unsent = err.message().is_some();
                    SendError::Broken { unsent }
                }));
            }
            if closed {
                return Poll::Ready(Err(SendError::Broken { unsent: false }));
            }
            self.deadline
                .as_mut()
                .poll(cx)
                .map(|()| Err(SendError::TimedOut))
        })
        .await?;
        endpoint.live.handshake.note(None);
        let (parts, body) = answer.into_parts();
        Ok((
            Response::from_parts(parts, ()),
            Exchange {
                conn: Some(self),
                body,
                foreign: None,
            },
        ))
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

/// An answer whose head has come. Dropping it before its end closes the connection.
pub(crate) struct Exchange {
    conn: Option<Conn>,
    body: Incoming,
    /// Makes chunks of a chat completion of a stream that is none.
    foreign: Option<foreign::Incoming>,
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange")
            .field("conn", &self.conn)
            .finish_non_exhaustive()
    }
}

impl Exchange {
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
        if self.body.is_end_stream() {
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
            let closed = match &mut self.conn {
                Some(conn) => conn.is_closed(cx),
                None => true,
            };
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    // Trailers mean nothing here.
                    let Ok(bytes) = frame.into_data() else {
                        continue;
                    };
                    let bytes = self.read(bytes)?;
                    if bytes.is_empty() {
                        continue;
                    }
                    return Poll::Ready(Ok(Some(bytes)));
                }
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(BodyError::Broken)),
                Poll::Ready(None) => {
                    let last = self.foreign.take().map(foreign::Incoming::end);
                    let last = last.filter(|last| !last.is_empty()).map(Bytes::from);
                    return Poll::Ready(Ok(last));
                }
                Poll::Pending if closed => return Poll::Ready(Err(BodyError::Broken)),
                Poll::Pending => {
                    let Some(conn) = &mut self.conn else {
                        return Poll::Ready(Err(BodyError::Broken));
                    };
                    return conn
                        .deadline
                        .as_mut()
                        .poll(cx)
                        .map(|()| Err(BodyError::TimedOut));
                }
            }
        }
    }

    /// [`Self::poll_frame`] as a future. Cancel safe.
    pub(crate) async fn frame(&mut self) -> Result<Option<Bytes>, BodyError> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Until when the next piece may take.
    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        if let Some(conn) = &mut self.conn {
            conn.set_deadline(deadline);
        }
    }

    /// Whether nothing is left of the body.
    pub(crate) fn is_over(&self) -> bool {
        self.body.is_end_stream() && self.foreign.is_none()
    }

    /// The body was read to its end: gives the connection back, if it can carry another request.
    pub(crate) fn finish(
        &mut self,
        cx: &mut Context<'_>,
        to: &EndpointLive,
        worker: usize,
        now: Instant,
    ) {
        let Some(mut conn) = self.conn.take() else {
            return;
        };
        conn.idle_since = now;
        conn.reused = true;
        if conn.is_usable(now, cx) {
            to.pool.give(worker, conn);
        }
    }
}

/// Idle connections of one endpoint. A worker takes only what it gave: sockets and timers belong to its runtime.
#[derive(Debug)]
pub struct Pool {
    shards: Box<[Mutex<Vec<Conn>>]>,
}

impl Pool {
    /// An empty pool for `workers`.
    pub fn new(workers: usize) -> Self {
        Self {
            shards: (0..workers.max(1)).map(|_| Mutex::default()).collect(),
        }
    }

    /// The connection to `endpoint` that was used last, if it is still good.
    pub(crate) fn take(
        &self,
        endpoint: &Endpoint,
        worker: usize,
        now: Instant,
        cx: &mut Context<'_>,
    ) -> Option<Conn> {
        let shard = self.shards.get(worker)?;
        loop {
            let mut conn = shard.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if conn.is_of(endpoint) && conn.is_usable(now, cx) {
                return Some(conn);
            }
        }
    }

    fn give(&self, worker: usize, conn: Conn) {
        let Some(shard) = self.shards.get(worker) else {
            return;
        };
        let mut idle = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE_CONNECTIONS {
            idle.push(conn);
        }
    }

    /// Closes what is old or was closed by the peer.
    pub fn sweep(&self, worker: usize, now: Instant) {
        let Some(shard) = self.shards.get(worker) else {
            return;
        };
        let mut cx = Context::from_waker(Waker::noop());
        shard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain_mut(|conn| conn.is_usable(now, &mut cx));
    }

    /// Closes everything.
    pub fn clear(&self, worker: usize) {
        if let Some(shard) = self.shards.get(worker) {
            shard.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}
