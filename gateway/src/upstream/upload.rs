//! (IO) A request over HTTP/2 whose body goes on as it comes from its caller, beside its answer. At most one piece is
//! held here; what the other side has no room for waits with the caller.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};

use super::BodyError;
use crate::openai::{self, Pieces};
use crate::passage::Passage;

/// The body of a request on its way from its caller. Dropping it before its end resets the stream.
pub(super) struct Upload {
    stream: SendStream<Pieces>,
    pub(super) passage: Passage,
    /// Waits for room.
    piece: Bytes,
    is_over: bool,
}

impl Upload {
    pub(super) fn new(stream: SendStream<Pieces>, passage: Passage) -> Self {
        Self {
            stream,
            passage,
            piece: Bytes::new(),
            is_over: false,
        }
    }

    /// Sends what comes and the other side has room for, until the end. That the other side wants no more of it shows
    /// in its answer.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while !self.is_over {
            if !self.piece.is_empty() {
                let Some(Ok(room)) = ready!(self.stream.poll_capacity(cx)) else {
                    self.is_over = true;
                    break;
                };
                let part = self.piece.split_to(room.min(self.piece.len()));
                if !part.is_empty() {
                    let _taken = self.stream.send_data(openai::unpatched(part), false);
                }
                continue;
            }
            match ready!(self.passage.poll_piece(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => {
                        self.stream.reserve_capacity(bytes.len());
                        self.piece = bytes;
                    }
                    Err(frame) => {
                        self.is_over = true;
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let _taken = self.stream.send_trailers(trailers);
                    }
                },
                Some(Err(_)) => {
                    self.is_over = true;
                    self.stream.send_reset(Reason::CANCEL);
                    return Poll::Ready(Err(BodyError::Broken));
                }
                None => {
                    self.is_over = true;
                    let last = openai::unpatched(Bytes::new());
                    let _taken = self.stream.send_data(last, true);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
