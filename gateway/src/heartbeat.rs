//! (IO) Heartbeats: comments in an event stream while nothing else goes to its caller, so that no proxy or client in
//! between takes the connection for dead. The first of them needs the head of an answer that is not there yet: what
//! turns out to be a refusal is told in an error event then.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::Response;
use hyper::body::{Body, Frame};
use tokio::time::Sleep;

use crate::media_type::is_event_stream;
use crate::openai::Wire;
use crate::process::Worker;
use crate::reject::{Broken, error_event};
use crate::stopping::Stopping;
use crate::stream::{AnswerBody, BrokenOff};

/// Decoders of event streams pass over lines that begin with a colon (WHATWG HTML, 9.2.6).
const COMMENT: &[u8] = b": still here\n\n";
/// The official Python SDKs take an empty line for an event once an event had an id (decision 0025).
const COMMENT_BESIDE_IDS: &[u8] = b": still here\n";

type Later = BoxFuture<'static, Response<AnswerBody>>;

/// How a stream's heartbeats are.
#[derive(Clone, Copy)]
pub(crate) struct Beats {
    /// Without anything else that goes out.
    pub(crate) every: Duration,
    /// What the stream is made of.
    pub(crate) wire: Wire,
    /// Whether its events have ids.
    pub(crate) has_ids: bool,
}

/// An event stream with heartbeats.
pub(crate) struct Beating {
    state: State,
    beats: Beats,
    worker: Arc<Worker>,
    stopping: Stopping,
    /// When something went out last.
    last: Instant,
    beat: Pin<Box<Sleep>>,
    /// Part of an event went out.
    is_inside: bool,
}

enum State {
    /// There is no answer yet.
    Awaited(Later),
    Open(AnswerBody),
    Over,
}

/// The answer, if it comes before the first heartbeat; else `early` and what it turns out to be.
pub(crate) async fn beating(
    worker: Arc<Worker>,
    early: Response<()>,
    beats: Beats,
    mut answer: Later,
) -> Response<AnswerBody> {
    match tokio::time::timeout(beats.every, &mut answer).await {
        Ok(response) if is_event_stream(response.headers()) => response.map(|body| {
            let beating = Beating::new(worker, State::Open(body), beats);
            AnswerBody::Beating(Box::new(beating))
        }),
        Ok(response) => response,
        Err(_not_yet) => {
            let mut beating = Beating::new(worker, State::Awaited(answer), beats);
            // The first one is due.
            beating.beat = Box::pin(tokio::time::sleep(Duration::ZERO));
            beating.last -= beats.every;
            early.map(|()| AnswerBody::Beating(Box::new(beating)))
        }
    }
}

impl Beating {
    fn new(worker: Arc<Worker>, state: State, beats: Beats) -> Self {
        Self {
            state,
            beats,
            worker,
            stopping: Stopping::default(),
            last: penstock_shell::clock::now(),
            beat: Box::pin(tokio::time::sleep(beats.every)),
            is_inside: false,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        if let State::Awaited(answer) = &mut self.state
            && let Poll::Ready(response) = answer.as_mut().poll(cx)
        {
            if !is_event_stream(response.headers()) {
                self.state = State::Over;
                let event = refusal(response.into_body(), self.beats.wire, cx);
                return Poll::Ready(Some(Ok(Frame::data(event))));
            }
            self.state = State::Open(response.into_body());
        }
        match &mut self.state {
            State::Over => return Poll::Ready(None),
            State::Open(body) => {
                if let Poll::Ready(next) = Pin::new(body).poll_frame(cx) {
                    self.went_out(next.as_ref());
                    return Poll::Ready(next);
                }
            }
            // Answers that have begun see it themselves.
            State::Awaited(_) => {
                if self.stopping.poll(&self.worker, cx).is_ready() {
                    self.state = State::Over;
                    let event = Broken::Stopping.event(self.beats.wire, false);
                    return Poll::Ready(Some(Ok(Frame::data(event.into()))));
                }
            }
        }
        self.poll_beat(cx)
    }

    fn went_out(&mut self, next: Option<&Result<Frame<Bytes>, BrokenOff>>) {
        match next {
            Some(Ok(frame)) => {
                let bytes = frame.data_ref();
                self.last = penstock_shell::clock::now();
                self.is_inside = !bytes.is_some_and(|bytes| ends_event(bytes));
            }
            Some(Err(_)) | None => self.state = State::Over,
        }
    }

    /// A heartbeat, if nothing went out for long enough.
    fn poll_beat(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        loop {
            ready!(self.beat.as_mut().poll(cx));
            let now = penstock_shell::clock::now();
            let is_due = now >= self.last + self.beats.every && !self.is_inside;
            if is_due || self.is_inside {
                self.last = now;
            }
            let next = self.last + self.beats.every;
            self.beat.as_mut().reset(next.into());
            if is_due {
                let comment = if self.beats.has_ids {
                    COMMENT_BESIDE_IDS
                } else {
                    COMMENT
                };
                let comment = Bytes::from_static(comment);
                return Poll::Ready(Some(Ok(Frame::data(comment))));
            }
        }
    }
}

fn ends_event(bytes: &[u8]) -> bool {
    let ends: [&[u8]; 3] = [b"\n\n", b"\r\n\r\n", b"\r\r"];
    ends.iter().any(|end| bytes.ends_with(end))
}

/// The event that stands for an answer which is no stream. Refusals are there as a whole.
fn refusal(mut body: AnswerBody, wire: Wire, cx: &mut Context<'_>) -> Bytes {
    let bytes = match Pin::new(&mut body).poll_frame(cx) {
        Poll::Ready(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
        _ => Bytes::new(),
    };
    error_event(wire, &bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_end_with_an_empty_line() {
        for whole in ["data: a\n\n", "data: a\r\n\r\n", "\r\r"] {
            assert!(ends_event(whole.as_bytes()));
        }
        for part in ["", "data: a\n", "data: a\r\n", "data: a"] {
            assert!(!ends_event(part.as_bytes()), "{part:?}");
        }
    }
}
