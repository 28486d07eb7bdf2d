//! (IO) A connection of HTTP/1.1. It is driven by the request that uses it and by nobody else: there is no task behind
//! it, so dropping a request closes its connection at once and an idle connection costs no wake-ups. That a peer closed
//! an idle connection is seen when it is taken out or swept.
//!
//! It keeps no buffers (docs/decisions/0028): what comes is read into the worker's room, and what of it is content is
//! handed on as one piece.

mod answer;
mod decoder;
mod head;
mod outgoing;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::task::coop::unconstrained;
use tokio::time::Sleep;

use self::answer::{Answer, Part};
use self::decoder::Decoder;
use self::head::{Length, Malformed};
use self::outgoing::{Halt, Outgoing};
use super::connect::{Made, note};
use super::{BodyError, MAX_HEAD_BYTES, RequestBody, SendError, passage};
use crate::passage::Passage;
use crate::snapshot::Endpoint;
use crate::socket::Socket;
use crate::trust::HandshakeError;

/// uvicorn, and so vLLM, closes idle connections after 5 s; leaving earlier avoids most races.
const MAX_IDLE: Duration = Duration::from_secs(4);
/// What one look at a socket takes of it, and so the largest piece of an answer.
const READ_BYTES: usize = 32 << 10;

thread_local! {
    /// Where all connections of a worker read, one at a time.
    static ROOM: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// What came at `socket`, as `take` has it.
fn poll_read<T>(
    socket: &mut Socket,
    cx: &mut Context<'_>,
    take: impl FnOnce(&mut [u8]) -> T,
) -> Poll<io::Result<T>> {
    ROOM.with_borrow_mut(|room| {
        let mut read = ReadBuf::new(room);
        std::task::ready!(Pin::new(socket).poll_read(cx, &mut read))?;
        Poll::Ready(Ok(take(read.filled_mut())))
    })
}

/// A connection that is ready for a request.
pub(crate) struct Conn {
    socket: Socket,
    /// One timer for all waits on this connection: moving it is cheaper than making another.
    deadline: Pin<Box<Sleep>>,
    idle_since: Instant,
    reused: bool,
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
    pub(super) fn new(socket: Socket, made: Made, limit: Duration) -> Self {
        Self {
            socket,
            deadline: Box::pin(tokio::time::sleep(limit)),
            idle_since: penstock_shell::clock::now(),
            reused: false,
            made,
        }
    }

    /// Whether it carried a request before: then it may have been closed by the peer in the meantime.
    pub(super) fn is_reused(&self) -> bool {
        self.reused
    }

    pub(super) fn made(&self) -> &Made {
        &self.made
    }

    /// Nothing may come while no request waits for an answer.
    pub(super) fn is_usable(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.idle_since) >= MAX_IDLE {
            return false;
        }
        let read = std::future::poll_fn(|cx| poll_read(&mut self.socket, cx, |_| ()).map(|_| ()));
        // A task that has done much is told that nothing came, whatever came.
        let read = std::pin::pin!(unconstrained(read));
        read.poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
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
        let mut sending = Sending {
            method: request.method().clone(),
            outgoing: Some(Box::new(Outgoing::new(request))),
            is_begun: false,
            is_cut: false,
            is_answered: false,
            came: Vec::new(),
        };
        let answer = std::future::poll_fn(|cx| {
            if let Poll::Ready(answer) = sending.poll(&mut self.socket, cx) {
                return Poll::Ready(answer.map_err(|fault| sending.error(&fault, endpoint)));
            }
            let late = match &passage {
                Some(passage) => passage.poll_late(&mut self.deadline, cx),
                None => self.deadline.as_mut().poll(cx),
            };
            late.map(|()| Err(SendError::TimedOut))
        })
        .await?;
        let body = Body {
            conn: Some(self),
            decoder: answer.decoder,
            first: answer.first,
            is_last: answer.head.is_last || sending.is_cut,
            ends_with_connection: answer.head.length == Length::UntilClose,
            outgoing: sending.outgoing,
            passage,
        };
        Ok((answer.head.response, body))
    }
}

/// Why there is no answer.
#[derive(Debug)]
enum Fault {
    /// The caller broke its request off.
    Caller,
    Socket(io::Error),
    /// The connection was closed, or what came is not HTTP.
    Broken,
}

impl From<Malformed> for Fault {
    fn from(Malformed: Malformed) -> Self {
        Self::Broken
    }
}

/// A request whose answer has not begun.
struct Sending {
    method: Method,
    /// `None` once it is written.
    outgoing: Option<Box<Outgoing>>,
    /// Some of it was written.
    is_begun: bool,
    /// The other side took only a part of it.
    is_cut: bool,
    /// Something came back.
    is_answered: bool,
    /// What came of the head of its answer.
    came: Vec<u8>,
}

impl Sending {
    fn poll(&mut self, socket: &mut Socket, cx: &mut Context<'_>) -> Poll<Result<Answer, Fault>> {
        if let Some(outgoing) = &mut self.outgoing {
            let sent = outgoing.poll(socket, cx);
            self.is_begun = outgoing.is_begun();
            self.is_cut = matches!(sent, Poll::Ready(Err(Halt::Socket)));
            match sent {
                Poll::Ready(Err(Halt::Caller)) => return Poll::Ready(Err(Fault::Caller)),
                // Why the other side takes no more of it is in its answer.
                Poll::Ready(_) => self.outgoing = None,
                Poll::Pending => {}
            }
        }
        loop {
            let (method, came) = (&self.method, &mut self.came);
            let read = poll_read(socket, cx, |bytes| {
                if bytes.is_empty() {
                    return Err(Fault::Broken);
                }
                self.is_answered = true;
                // Usually all of it comes at once.
                if came.is_empty() {
                    let part = Answer::read(bytes, method)?;
                    if let Part::Before(told) = part {
                        came.extend_from_slice(&bytes[told..]);
                    }
                    return Ok(part);
                }
                came.extend_from_slice(bytes);
                let part = Answer::read(came, method)?;
                if let Part::Before(told) = part {
                    came.drain(..told);
                }
                Ok(part)
            });
            match std::task::ready!(read).map_err(Fault::Socket)?? {
                Part::Begun(answer) => return Poll::Ready(Ok(answer)),
                Part::Before(_) if self.came.len() > MAX_HEAD_BYTES => {
                    return Poll::Ready(Err(Fault::Broken));
                }
                Part::Before(_) => {}
            }
        }
    }

    fn error(&self, fault: &Fault, endpoint: &Endpoint) -> SendError {
        // In TLS 1.3 the other side looks at certificates when this one is done.
        if let Fault::Socket(err) = fault
            && let Some(failed) = HandshakeError::find(err)
        {
            note(endpoint, failed, err);
            return SendError::Handshake(failed);
        }
        if self.is_answered {
            return SendError::NoAnswer;
        }
        let unsent = !self.is_begun;
        SendError::Broken { unsent }
    }
}

/// The body of an answer. Dropping it before its end closes the connection.
#[derive(Debug)]
pub(crate) struct Body {
    /// `None` once it was given back.
    conn: Option<Conn>,
    decoder: Decoder,
    /// What was read and not taken.
    first: Bytes,
    /// What is left of the request, which may go on beside its answer.
    outgoing: Option<Box<Outgoing>>,
    /// The connection carries no other request.
    is_last: bool,
    ends_with_connection: bool,
    passage: Option<Passage>,
}

impl Body {
    /// The next piece; `None` at its proper end. Cancel safe.
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, BodyError>> {
        loop {
            if !self.first.is_empty() {
                return Poll::Ready(Ok(Some(std::mem::take(&mut self.first))));
            }
            if self.decoder.is_malformed() {
                return Poll::Ready(Err(BodyError::Broken));
            }
            let Some(conn) = self.conn.as_mut().filter(|_| !self.decoder.is_over()) else {
                return Poll::Ready(Ok(None));
            };
            if let Some(outgoing) = &mut self.outgoing {
                match outgoing.poll(&mut conn.socket, cx) {
                    Poll::Ready(Ok(())) => self.outgoing = None,
                    Poll::Ready(Err(Halt::Socket)) => {
                        self.outgoing = None;
                        self.is_last = true;
                    }
                    Poll::Ready(Err(Halt::Caller)) => return Poll::Ready(Err(BodyError::Broken)),
                    Poll::Pending => {}
                }
            }
            let decoder = &mut self.decoder;
            let read = poll_read(&mut conn.socket, cx, |bytes| {
                if bytes.is_empty() {
                    return decoder.close().map(|()| Bytes::new());
                }
                let content = decoder.decode(bytes)?;
                Ok(Bytes::copy_from_slice(&bytes[..content]))
            });
            match read {
                Poll::Ready(Ok(Ok(bytes))) => self.first = bytes,
                Poll::Ready(_) => return Poll::Ready(Err(BodyError::Broken)),
                Poll::Pending => {
                    let late = match &self.passage {
                        Some(passage) => passage.poll_stalled(&mut conn.deadline, cx),
                        None => conn.deadline.as_mut().poll(cx),
                    };
                    return late.map(|()| Err(BodyError::TimedOut));
                }
            }
        }
    }

    pub(super) fn set_deadline(&mut self, deadline: Instant) {
        if let Some(conn) = &mut self.conn {
            conn.set_deadline(deadline);
        }
    }

    /// Whether nothing is left.
    pub(super) fn is_over(&self) -> bool {
        self.first.is_empty() && self.decoder.is_over() && !self.decoder.has_trailers()
    }

    /// Whether its end is that of the connection, as it would be if it were cut.
    pub(super) fn ends_with_connection(&self) -> bool {
        self.ends_with_connection
    }

    pub(super) fn take_trailers(&mut self) -> Option<Box<HeaderMap>> {
        self.decoder.take_trailers()
    }

    /// The connection, if the body was read to its end and it can carry another request.
    pub(super) fn take_conn(&mut self, now: Instant) -> Option<Conn> {
        let mut conn = self.conn.take()?;
        conn.idle_since = now;
        conn.reused = true;
        let is_over = self.outgoing.is_none() && self.decoder.is_over_alone();
        (is_over && !self.is_last && conn.is_usable(now)).then_some(conn)
    }
}
