//! (IO) `Outgoing`: a request of HTTP/1.1 on its way out. Its answer may begin before its end.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::buf::Chain;
use bytes::{Buf as _, Bytes};
use http::Request;
use hyper::body::Frame;
use tokio::io::AsyncWrite as _;
use tokio_util::io::poll_write_buf;

use super::head;
use crate::openai::{self, Pieces};
use crate::passage::Passage;
use crate::socket::Socket;
use crate::upstream::RequestBody;

const CHUNK_END: Bytes = Bytes::from_static(b"\r\n");

/// A request on its way.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// What goes next: the head or the line above a chunk, and content.
    next: Chain<Bytes, Pieces>,
    rest: Rest,
    /// Some of it was written.
    is_begun: bool,
}

/// What follows.
#[derive(Debug)]
enum Rest {
    Nothing,
    /// As it comes; the head says that it is so much.
    Content(Passage, u64),
    /// As it comes, in chunks.
    Chunks(Passage),
}

/// Why a request does not go on.
#[derive(Debug)]
pub(super) enum Halt {
    /// Its caller broke it off.
    Caller,
    /// The other side takes no more of it.
    Socket,
}

impl From<io::Error> for Halt {
    fn from(_: io::Error) -> Self {
        Self::Socket
    }
}

impl Outgoing {
    pub(super) fn new(request: Request<RequestBody>) -> Self {
        let length = request.body().length();
        let head = Bytes::from(head::write(&request, length));
        let (content, rest) = match request.into_body() {
            RequestBody::Whole(pieces) => (pieces, Rest::Nothing),
            RequestBody::Passage(passage) => {
                let nothing = openai::unpatched(Bytes::new());
                match length {
                    Some(length) => (nothing, Rest::Content(passage, length)),
                    None => (nothing, Rest::Chunks(passage)),
                }
            }
        };
        Self {
            next: head.chain(content),
            rest,
            is_begun: false,
        }
    }

    /// Whether some of it was written.
    pub(super) fn is_begun(&self) -> bool {
        self.is_begun
    }

    /// Writes what `socket` takes and the caller sends, until the end.
    pub(super) fn poll(
        &mut self,
        socket: &mut Socket,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Halt>> {
        loop {
            while self.next.has_remaining() {
                let written = poll_write_buf(Pin::new(&mut *socket), cx, &mut self.next);
                if ready!(written)? == 0 {
                    return Poll::Ready(Err(Halt::Socket));
                }
                self.is_begun = true;
            }
            // TLS keeps what was written until then.
            let flushed = Pin::new(&mut *socket).poll_flush(cx);
            let is_over = match self.poll_next(cx) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    ready!(flushed)?;
                    return Poll::Pending;
                }
            };
            if is_over {
                return flushed.map_err(Halt::from);
            }
        }
    }

    /// Puts the next piece into `next`; whether there is none any more.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Halt>> {
        let (passage, left) = match &mut self.rest {
            Rest::Nothing => return Poll::Ready(Ok(true)),
            Rest::Content(passage, left) => (passage, Some(left)),
            Rest::Chunks(passage) => (passage, None),
        };
        let is_in_chunks = left.is_none();
        let frame = match ready!(passage.poll_piece(cx)) {
            Some(Ok(frame)) => Some(frame),
            Some(Err(_)) => return Poll::Ready(Err(Halt::Caller)),
            None => None,
        };
        if let Some(left) = left {
            let came = frame
                .as_ref()
                .and_then(Frame::data_ref)
                .map_or(0, Bytes::len);
            let rest = left.checked_sub(u64::try_from(came).unwrap_or(u64::MAX));
            // What the other side would take for the next request, or wait for.
            *left = rest.ok_or(Halt::Caller)?;
            if frame.is_none() && *left > 0 {
                return Poll::Ready(Err(Halt::Caller));
            }
        }
        let mut line = Vec::new();
        let mut content = openai::unpatched(Bytes::new());
        match frame.map(Frame::into_data) {
            // An empty chunk would be the last one.
            Some(Ok(bytes)) if is_in_chunks && !bytes.is_empty() => {
                line = format!("{:x}\r\n", bytes.len()).into_bytes();
                content = bytes.chain(CHUNK_END).chain(Bytes::new());
            }
            Some(Ok(bytes)) => content = openai::unpatched(bytes),
            last => {
                self.rest = Rest::Nothing;
                if is_in_chunks {
                    line.extend_from_slice(b"0\r\n");
                    let trailers = last.and_then(Result::err).map(Frame::into_trailers);
                    for (name, value) in trailers.and_then(Result::ok).iter().flatten() {
                        head::write_field(&mut line, name, value);
                    }
                    line.extend_from_slice(b"\r\n");
                }
            }
        }
        self.next = Bytes::from(line).chain(content);
        Poll::Ready(Ok(false))
    }
}
