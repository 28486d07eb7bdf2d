//! (IO) A connection of HTTP/1.1. It is driven by the request that uses it and by nobody else: there is no task behind
//! it, so dropping a request closes its connection at once and an idle connection costs no wake-ups. That a peer closed
//! an idle connection is seen when it is taken out or swept.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::time::Sleep;

use super::bell::Bell;
use super::connect::{Made, note};
use super::{BUFFER_BYTES, BodyError, ConnectError, RequestBody, SendError, passage};
use crate::passage::Passage;
use crate::snapshot::Endpoint;
use crate::socket::Socket;
use crate::trust::HandshakeError;

/// uvicorn, and so vLLM, closes idle connections after 5 s; leaving earlier avoids most races.
const MAX_IDLE: Duration = Duration::from_secs(4);

/// Looks at a connection that has something to do, before its user is asked to come again.
const LOOKS: u32 = 2;

/// hyper keeps room for 32 requests beside each connection, so what lies there is small.
type Small = Box<RequestBody>;

/// A connection that is ready for a request.
pub(crate) struct Conn {
    sender: SendRequest<Small>,
    connection: Box<Connection<TokioIo<Socket>, Small>>,
    bell: Arc<Bell>,
    /// Rings it.
    rings: Waker,
    /// One timer for all waits on this connection: moving it is cheaper than making another.
    deadline: Pin<Box<Sleep>>,
    idle_since: Instant,
    reused: bool,
    closed: bool,
    made: Made,
}

impl fmt::Debug for Conn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conn")
            .field("reused", &self.reused)
            .finish_non_exhaustive()
    }
}

impl Conn {
    /// Over `socket`.
    pub(super) async fn new(
        socket: Socket,
        made: Made,
        limit: Duration,
    ) -> Result<Self, ConnectError> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER_BYTES)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(|_| ConnectError::Refused)?;
        let bell = Arc::new(Bell::new());
        Ok(Self {
            sender,
            connection: Box::new(connection),
            rings: Waker::from(Arc::clone(&bell)),
            bell,
            deadline: Box::pin(tokio::time::sleep(limit)),
            idle_since: penstock_shell::clock::now(),
            reused: false,
            closed: false,
            made,
        })
    }

    /// Whether it carried a request before: then it may have been closed by the peer in the meantime.
    pub(super) fn is_reused(&self) -> bool {
        self.reused
    }

    pub(super) fn made(&self) -> &Made {
        &self.made
    }

    pub(super) fn is_usable(&mut self, now: Instant) -> bool {
        now.saturating_duration_since(self.idle_since) < MAX_IDLE
            && !self.is_closed()
            && self.sender.is_ready()
    }

    /// Does what the socket allows and says whether the connection has ended.
    fn is_closed(&mut self) -> bool {
        if !self.closed && self.bell.answer() {
            let mut cx = Context::from_waker(&self.rings);
            self.closed = Pin::new(&mut *self.connection).poll(&mut cx).is_ready();
        }
        self.closed
    }

    fn set_deadline(&mut self, deadline: Instant) {
        self.deadline.as_mut().reset(deadline.into());
    }

    /// See [`super::Conn::send`].
    pub(super) async fn send(
        mut self,
        request: Request<RequestBody>,
        endpoint: &Endpoint,
        deadline: Instant,
    ) -> Result<(Response<()>, Body), SendError> {
        self.set_deadline(deadline);
        let passage = passage(&request);
        let mut answer = std::pin::pin!(self.sender.try_send_request(request.map(Box::new)));
        let rings = self.rings.clone();
        let answer = std::future::poll_fn(|cx| {
            for _ in 0..LOOKS {
                let closed = self.is_closed();
                let mut rings = Context::from_waker(&rings);
                if let Poll::Ready(answer) = answer.as_mut().poll(&mut rings) {
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
                if !self.bell.has_rung() {
                    break;
                }
            }
            self.bell.wait(cx.waker());
            let late = match &passage {
                Some(passage) => passage.poll_late(&mut self.deadline, cx),
                None => self.deadline.as_mut().poll(cx),
            };
            late.map(|()| Err(SendError::TimedOut))
        })
        .await?;
        let (parts, body) = answer.into_parts();
        let body = Body {
            conn: Some(self),
            body,
            passage,
            trailers: None,
        };
        Ok((Response::from_parts(parts, ()), body))
    }
}

/// The body of an answer. Dropping it before its end closes the connection.
#[derive(Debug)]
pub(crate) struct Body {
    conn: Option<Conn>,
    body: Incoming,
    /// The body of the request, which may go on beside this one.
    passage: Option<Passage>,
    trailers: Option<Box<HeaderMap>>,
}

impl Body {
    /// The next piece; `None` at its proper end. Cancel safe.
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, BodyError>> {
        // It is given back when all of the body was read.
        let Some(conn) = &mut self.conn else {
            return Poll::Ready(Ok(None));
        };
        let mut looks = 0;
        while looks < LOOKS {
            looks += 1;
            let closed = conn.is_closed();
            let mut rings = Context::from_waker(&conn.rings);
            match Pin::new(&mut self.body).poll_frame(&mut rings) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) => return Poll::Ready(Ok(Some(bytes))),
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok().map(Box::new);
                        looks = 0;
                    }
                },
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(BodyError::Broken)),
                Poll::Ready(None) => return Poll::Ready(Ok(None)),
                Poll::Pending if closed => return Poll::Ready(Err(BodyError::Broken)),
                Poll::Pending if !conn.bell.has_rung() => break,
                Poll::Pending => {}
            }
        }
        conn.bell.wait(cx.waker());
        let late = match &self.passage {
            Some(passage) => passage.poll_stalled(&mut conn.deadline, cx),
            None => conn.deadline.as_mut().poll(cx),
        };
        late.map(|()| Err(BodyError::TimedOut))
    }

    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        if let Some(conn) = &mut self.conn {
            conn.set_deadline(deadline);
        }
    }

    /// Whether nothing is left.
    pub(super) fn is_over(&self) -> bool {
        self.body.is_end_stream()
    }

    pub(super) fn take_trailers(&mut self) -> Option<Box<HeaderMap>> {
        self.trailers.take()
    }

    /// The connection, if the body was read to its end and it can carry another request.
    pub(super) fn take_conn(&mut self, now: Instant) -> Option<Conn> {
        let mut conn = self.conn.take()?;
        conn.idle_since = now;
        conn.reused = true;
        conn.is_usable(now).then_some(conn)
    }
}
