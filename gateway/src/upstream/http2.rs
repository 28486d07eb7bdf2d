//! (IO) Connections of HTTP/2: several for each endpoint and worker, each with many requests and a task that drives it
//! (docs/decisions/0022).
//!
//! A request takes a place on a connection before it sends, and there are no more places than streams that the other
//! side allows, so no stream waits behind others unseen. Requests that come while a connection is being opened wait for
//! it instead of opening one each. What a caller does not read stays within its stream's window, and all windows of a
//! connection together are its own: nobody who reads waits for somebody who does not.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, Reason, RecvStream};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Request, Response, Uri, Version};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::Sleep;

use super::connect::{self, Made, note};
use super::upload::Upload;
use super::{BodyError, ConnectError, MAX_HEAD_BYTES, RequestBody, SendError, passage};
use crate::openai::Pieces;
use crate::snapshot::Endpoint;
use crate::socket::Socket;
use crate::trust::{HandshakeError, LastHandshake};

/// Requests at one time on one connection, if the other side allows as many.
const MAX_STREAMS: u32 = 100;
/// What a stream may have sent that its caller has not read.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// All streams may stand still, and no more is held.
const CONNECTION_WINDOW_BYTES: u32 = MAX_STREAMS * STREAM_WINDOW_BYTES;
/// h2 counts what frames of less than 256 bytes cost besides their payload, and ends a connection that costs more than
/// this. Streams may all stand still whose pieces have 64 bytes, as the shortest events of models have.
const FRAME_BUDGET_BYTES: usize = (CONNECTION_WINDOW_BYTES / 64) as usize * (256 - 64);
/// nginx and Envoy keep idle ones for longer; GOAWAY tells of those that keep them for less.
const MAX_IDLE: Duration = Duration::from_mins(1);
/// Between two questions whether the other side is there, while it has requests. An answer that has not come by the
/// next one does not come.
const PING_EVERY: Duration = Duration::from_secs(20);

/// No byte of the request left.
const UNSENT: SendError = SendError::Broken { unsent: true };

/// The connections of one endpoint and worker.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<Vec<Arc<Line>>>);

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Line>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place on the first connection that has one. Whether it is a new one, which somebody must drive.
    pub(super) fn reserve(&self, endpoint: &Endpoint) -> (Place, bool) {
        let mut lines = self.lock();
        let now = penstock_shell::clock::now();
        lines.retain(|line| line.takes_requests() && line.made.is_of(endpoint, now));
        let allowed = endpoint.live.http2_streams.load(Ordering::Relaxed);
        let room = lines
            .iter()
            .find(|line| line.taken.load(Ordering::Relaxed) < line.most(allowed));
        if let Some(line) = room {
            return (Place::new(Arc::clone(line)), false);
        }
        let line = Arc::new(Line {
            made: Made::new(endpoint),
            state: watch::Sender::new(State::Opening),
            taken: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
            idle_since: Mutex::new(now),
        });
        lines.push(Arc::clone(&line));
        (Place::new(line), true)
    }

    /// Closes what was not used for a while.
    pub(super) fn sweep(&self, now: Instant) {
        self.lock().retain(|line| {
            let since = *line
                .idle_since
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let is_idle = line.taken.load(Ordering::Relaxed) == 0;
            line.takes_requests() && !(is_idle && now.saturating_duration_since(since) > MAX_IDLE)
        });
    }

    pub(super) fn clear(&self) {
        self.lock().clear();
    }
}

/// One connection. It closes when nobody has it and its streams have ended.
pub(super) struct Line {
    made: Made,
    state: watch::Sender<State>,
    /// Requests that have a place, or wait for it to open.
    taken: AtomicUsize,
    /// Requests that may send.
    used: AtomicUsize,
    idle_since: Mutex<Instant>,
}

enum State {
    Opening,
    Open(SendRequest<Pieces>),
    /// The other side speaks HTTP/1.1; one request may have the socket.
    Http1(Mutex<Option<Socket>>),
    Failed(ConnectError),
    Ended,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("taken", &self.taken)
            .finish_non_exhaustive()
    }
}

impl Line {
    /// Whether it takes new requests, or will.
    fn takes_requests(&self) -> bool {
        match &*self.state.borrow() {
            State::Opening => true,
            State::Open(sender) => {
                // Not after GOAWAY.
                let mut cx = Context::from_waker(Waker::noop());
                !matches!(sender.clone().poll_ready(&mut cx), Poll::Ready(Err(_)))
            }
            State::Http1(_) | State::Failed(_) | State::Ended => false,
        }
    }

    /// How many requests it may have; `allowed` is what the other side allowed last, 0 if that is not known.
    fn most(&self, allowed: usize) -> usize {
        let ours = MAX_STREAMS as usize;
        match &*self.state.borrow() {
            State::Open(sender) => sender.current_max_send_streams().min(ours),
            _ if allowed == 0 => ours,
            _ => allowed.min(ours),
        }
    }
}

/// What became of a place when its connection was opened.
pub(super) enum Opened {
    /// It may send.
    Place(Place),
    /// The other side allows fewer streams than waited for it.
    Full,
    /// The other side speaks HTTP/1.1, over this.
    Http1(Socket),
}

/// A place for one request.
#[derive(Debug)]
pub(crate) struct Place {
    line: Arc<Line>,
    is_used: bool,
}

impl Place {
    fn new(line: Arc<Line>) -> Self {
        line.taken.fetch_add(1, Ordering::Relaxed);
        Self {
            line,
            is_used: false,
        }
    }

    pub(super) fn line(&self) -> Arc<Line> {
        Arc::clone(&self.line)
    }

    /// Waits until the connection is open. Cancel safe.
    pub(super) async fn opened(mut self) -> Result<Opened, ConnectError> {
        let mut states = self.line.state.subscribe();
        let state = states.wait_for(|state| !matches!(state, State::Opening));
        let state = state.await.map_err(|_| ConnectError::Refused)?;
        match &*state {
            State::Open(sender) => {
                let most = sender.current_max_send_streams().min(MAX_STREAMS as usize);
                if self.line.used.fetch_add(1, Ordering::Relaxed) >= most {
                    self.line.used.fetch_sub(1, Ordering::Relaxed);
                    return Ok(Opened::Full);
                }
            }
            State::Http1(socket) => {
                let mut socket = socket.lock().unwrap_or_else(PoisonError::into_inner);
                return Ok(socket.take().map_or(Opened::Full, Opened::Http1));
            }
            State::Failed(err) => return Err(*err),
            State::Opening | State::Ended => return Err(ConnectError::Refused),
        }
        drop(state);
        self.is_used = true;
        Ok(Opened::Place(self))
    }

    /// See [`super::Conn::send`].
    pub(super) async fn send(
        self,
        request: Request<RequestBody>,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<(Response<()>, Body), SendError> {
        let sender = match &*self.line.state.borrow() {
            State::Open(sender) => Some(sender.clone()),
            _ => None,
        };
        // It may have ended since it was chosen.
        let mut sender = sender.ok_or(UNSENT)?;
        let passage = passage(&request);
        let (head, body) = outgoing(request, endpoint).ok_or(UNSENT)?;
        let mut deadline = Box::pin(tokio::time::sleep_until(deadline.into()));
        std::future::poll_fn(|cx| sender.poll_ready(cx))
            .await
            .map_err(|_| UNSENT)?;
        let (answer, mut stream) = sender
            .send_request(head, body.is_none() && passage.is_none())
            .map_err(|_| UNSENT)?;
        if let Some(body) = body {
            // All of it is in memory already; it leaves as the other side takes it.
            stream.send_data(body, true).map_err(|err| broken(&err))?;
        }
        let mut upload = passage.map(|passage| Box::new(Upload::new(stream, passage)));
        let mut answer = std::pin::pin!(answer);
        let answer = std::future::poll_fn(|cx| {
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(answer.map_err(|err| broken(&err)));
            }
            let Some(upload) = &mut upload else {
                let late = deadline.as_mut().poll(cx);
                return late.map(|()| Err(SendError::TimedOut));
            };
            if upload.poll(cx) == Poll::Ready(Err(BodyError::Broken)) {
                return Poll::Ready(Err(SendError::Broken { unsent: false }));
            }
            let late = upload.passage.poll_late(&mut deadline, cx);
            late.map(|()| Err(SendError::TimedOut))
        })
        .await?;
        let (head, stream) = answer.into_parts();
        let body = Body {
            stream,
            upload,
            deadline,
            trailers: None,
            _place: self,
        };
        Ok((Response::from_parts(head, ()), body))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_used {
            self.line.used.fetch_sub(1, Ordering::Relaxed);
        }
        if self.line.taken.fetch_sub(1, Ordering::Relaxed) == 1 {
            let since = self.line.idle_since.lock();
            *since.unwrap_or_else(PoisonError::into_inner) = penstock_shell::clock::now();
        }
    }
}

/// By RFC 9113, 6.8 and 8.7: what GOAWAY leaves out, and what is refused, was not looked at.
fn broken(err: &h2::Error) -> SendError {
    let left_out = err.is_go_away() && err.is_remote();
    let refused = err.is_reset() && err.is_remote() && err.reason() == Some(Reason::REFUSED_STREAM);
    SendError::Broken {
        unsent: left_out || refused,
    }
}

/// A request as HTTP/2 has it: the host in `:authority`, the length said; and its body, if that is here.
fn outgoing(
    request: Request<RequestBody>,
    endpoint: &Endpoint,
) -> Option<(Request<()>, Option<Pieces>)> {
    let (mut head, body) = request.into_parts();
    let length = body.length().filter(|length| *length > 0);
    let body = match body {
        RequestBody::Whole(pieces) => pieces.has_remaining().then_some(pieces),
        RequestBody::Passage(_) => None,
    };
    let mut uri = std::mem::take(&mut head.uri).into_parts();
    uri.scheme = Some(match endpoint.secured {
        Some(_) => Scheme::HTTPS,
        None => Scheme::HTTP,
    });
    let host = head.headers.remove(HOST)?;
    uri.authority = Some(Authority::try_from(host.as_bytes()).ok()?);
    uri.path_and_query = uri.path_and_query.or(Some(PathAndQuery::from_static("/")));
    head.uri = Uri::from_parts(uri).ok()?;
    head.version = Version::HTTP_2;
    if let Some(length) = length {
        head.headers.insert(CONTENT_LENGTH, length.into());
    }
    // What HTTP/1.1 says of a connection.
    head.headers.remove(CONNECTION);
    head.headers.remove(TRANSFER_ENCODING);
    Some((Request::from_parts(head, ()), body))
}

/// The body of an answer. Dropping it before its end resets the stream; the connection stays.
pub(crate) struct Body {
    stream: RecvStream,
    /// The body of the request, which may go on beside this one.
    upload: Option<Box<Upload>>,
    deadline: Pin<Box<Sleep>>,
    trailers: Option<Box<HeaderMap>>,
    _place: Place,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").finish_non_exhaustive()
    }
}

impl Body {
    /// The next piece; `None` at its proper end. Cancel safe.
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, BodyError>> {
        if let Some(upload) = &mut self.upload
            && upload.poll(cx) == Poll::Ready(Err(BodyError::Broken))
        {
            return Poll::Ready(Err(BodyError::Broken));
        }
        match self.stream.poll_data(cx) {
            Poll::Ready(Some(Ok(bytes))) => {
                // Whoever takes a piece has room for it. On a stream that has ended there is nothing to give back.
                let _ = self.stream.flow_control().release_capacity(bytes.len());
                Poll::Ready(Ok(Some(bytes)))
            }
            Poll::Ready(None) => match self.stream.poll_trailers(cx) {
                Poll::Ready(Ok(trailers)) => {
                    self.trailers = trailers.map(Box::new);
                    Poll::Ready(Ok(None))
                }
                Poll::Ready(Err(_)) => Poll::Ready(Err(BodyError::Broken)),
                Poll::Pending => self.poll_stalled(cx),
            },
            Poll::Ready(Some(Err(_))) => Poll::Ready(Err(BodyError::Broken)),
            Poll::Pending => self.poll_stalled(cx),
        }
    }

    fn poll_stalled<T>(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, BodyError>> {
        let late = match &self.upload {
            Some(upload) => upload.passage.poll_stalled(&mut self.deadline, cx),
            None => self.deadline.as_mut().poll(cx),
        };
        late.map(|()| Err(BodyError::TimedOut))
    }

    pub(super) fn take_trailers(&mut self) -> Option<Box<HeaderMap>> {
        self.trailers.take()
    }

    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline.as_mut().reset(deadline.into());
    }

    /// Whether nothing is left.
    pub(super) fn is_over(&self) -> bool {
        self.stream.is_end_stream()
    }
}

/// Opens a connection and drives it until it ends.
pub(super) async fn drive(endpoint: Arc<Endpoint>, line: Arc<Line>, limit: Duration) {
    let opened = tokio::time::timeout(limit, open(&endpoint, &line, limit)).await;
    let connection = match opened.unwrap_or(Err(ConnectError::TimedOut)) {
        Err(err) => {
            line.state.send_replace(State::Failed(err));
            return;
        }
        Ok(Spoken::Http1(socket)) => {
            endpoint.live.speaks_http1.store(true, Ordering::Relaxed);
            let socket = Mutex::new(Some(socket));
            line.state.send_replace(State::Http1(socket));
            return;
        }
        Ok(Spoken::Http2(sender, connection)) => {
            let allowed = sender.current_max_send_streams();
            endpoint
                .live
                .http2_streams
                .store(allowed, Ordering::Relaxed);
            line.state.send_replace(State::Open(sender));
            connection
        }
    };
    // From here on the connection lives as long as somebody else wants it.
    let line = {
        let weak = Arc::downgrade(&line);
        drop(line);
        weak
    };
    let is_busy = || {
        let line = line.upgrade();
        line.is_some_and(|line| line.taken.load(Ordering::Relaxed) > 0)
    };
    run(*connection, is_busy).await;
    if let Some(line) = line.upgrade() {
        line.state.send_replace(State::Ended);
    }
}

/// Drives a connection, and asks now and then, while it is busy, whether the other side is there.
async fn run<T: AsyncRead + AsyncWrite + Unpin>(
    mut connection: Connection<T, Pieces>,
    is_busy: impl Fn() -> bool,
) {
    let Some(mut pings) = connection.ping_pong() else {
        return;
    };
    let first = penstock_shell::clock::now() + PING_EVERY;
    let mut ticks = tokio::time::interval_at(first.into(), PING_EVERY);
    let mut is_asked = false;
    loop {
        tokio::select! {
            // How it ends is told to its streams.
            _ended = &mut connection => return,
            _pong = std::future::poll_fn(|cx| pings.poll_pong(cx)), if is_asked => is_asked = false,
            _ = ticks.tick() => {
                if is_asked {
                    return;
                }
                is_asked = is_busy() && pings.send_ping(Ping::opaque()).is_ok();
            }
        }
    }
}

enum Spoken {
    Http1(Socket),
    Http2(SendRequest<Pieces>, Box<Connection<Heard, Pieces>>),
}

/// Connects, and waits for what the other side allows.
async fn open(endpoint: &Endpoint, line: &Line, limit: Duration) -> Result<Spoken, ConnectError> {
    let socket = connect::socket(endpoint, limit).await?;
    line.made.open(endpoint, &socket);
    if endpoint.secured.is_some() && !socket.speaks_http2() {
        return Ok(Spoken::Http1(socket));
    }
    let failed = Arc::new(LastHandshake::default());
    let heard = Heard {
        socket,
        failed: Arc::clone(&failed),
    };
    let handshake = Builder::new()
        .enable_push(false)
        // The other side's first settings say how many there may be.
        .initial_max_send_streams(0)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .data_frame_budget(FRAME_BUDGET_BYTES)
        .max_header_list_size(u32::try_from(MAX_HEAD_BYTES).unwrap_or(u32::MAX))
        .max_concurrent_reset_streams(MAX_STREAMS as usize)
        .handshake(heard)
        .await;
    let ended = |err: h2::Error| match failed.failed() {
        // In TLS 1.3 the other side looks at certificates when this one is done.
        Some(failed) => {
            note(endpoint, failed, &err);
            ConnectError::Handshake(failed)
        }
        None => ConnectError::Refused,
    };
    let (sender, connection) = handshake.map_err(ended)?;
    let mut connection = Box::new(connection);
    std::future::poll_fn(|cx| match Pin::new(&mut *connection).poll(cx) {
        Poll::Ready(Ok(())) => Poll::Ready(Err(ConnectError::Refused)),
        Poll::Ready(Err(err)) => Poll::Ready(Err(ended(err))),
        Poll::Pending if sender.current_max_send_streams() > 0 => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    })
    .await?;
    Ok(Spoken::Http2(sender, connection))
}

/// A socket of which is known why it failed: h2 keeps no more of an error than its words.
struct Heard {
    socket: Socket,
    failed: Arc<LastHandshake>,
}

impl AsyncRead for Heard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        if let Poll::Ready(Err(err)) = &read {
            self.failed.note(HandshakeError::find(err));
        }
        read
    }
}

impl AsyncWrite for Heard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::task::JoinSet;

    use super::*;

    /// How long a request waits over a connection whose other side `other` is, until it fails or for two minutes.
    #[expect(
        clippy::disallowed_methods,
        reason = "the clock is tokio's, which a test moves"
    )]
    async fn waits(
        other: impl Future<Output = ()> + Send + 'static,
        io: tokio::io::DuplexStream,
    ) -> Duration {
        let mut tasks = JoinSet::new();
        tasks.spawn(other);
        let (mut sender, connection) = Builder::new().handshake::<_, Pieces>(io).await.unwrap();
        tasks.spawn(run(connection, || true));
        let began = tokio::time::Instant::now();
        let (answer, _) = sender.send_request(Request::new(()), true).unwrap();
        let failed = tokio::time::timeout(Duration::from_mins(2), answer).await;
        assert!(failed.is_err() || failed.is_ok_and(|answer| answer.is_err()));
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn who_answers_no_ping_is_given_up_by_the_next_one() {
        let (io, mut peer) = tokio::io::duplex(64 << 10);
        let silent = async move {
            peer.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            let mut all = Vec::new();
            let _ended = peer.read_to_end(&mut all).await;
        };
        let waited = waits(silent, io).await;
        let moment = Duration::from_secs(1);
        assert!(waited + moment > PING_EVERY * 2, "{waited:?}");
        assert!(waited < PING_EVERY * 2 + moment, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_answers_pings_may_take_its_time() {
        let (io, peer) = tokio::io::duplex(64 << 10);
        let slow = async move {
            let mut server = h2::server::handshake(peer).await.unwrap();
            let mut unanswered = Vec::new();
            while let Some(request) = server.accept().await {
                unanswered.push(request);
            }
        };
        assert_eq!(waits(slow, io).await, Duration::from_mins(2));
    }
}
