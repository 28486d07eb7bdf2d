//! (IO) Response bodies: whole, or a stream of events that follows a request's progress.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::Stream as _;
use http_body_util::Full;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio_stream::wrappers::WatchStream;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::driver::Ticket;
use crate::openai::answer::{Events, Progress};

/// The engine ended without ending the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine ended in the middle of an answer")]
pub(super) struct Cut;

/// Any response's body.
#[derive(Debug)]
pub(super) enum Body {
    /// All of it at once.
    Whole(Full<Bytes>),
    /// Event by event.
    Stream(Box<EventStream>),
}

impl Body {
    /// A body that is known.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self::Whole(Full::new(bytes))
    }

    /// A body that comes into being.
    pub(super) fn stream(stream: EventStream) -> Self {
        Self::Stream(Box::new(stream))
    }
}

/// A streamed answer. Dropping it before its end aborts the request.
#[derive(Debug)]
pub(super) struct EventStream {
    ticket: Ticket,
    updates: WatchStream<Progress>,
    events: Events,
    _working: TaskTrackerToken,
}

impl EventStream {
    /// The answer to the request behind `ticket`. `working` is let go at its end.
    pub(super) fn new(ticket: Ticket, events: Events, working: TaskTrackerToken) -> Self {
        let updates = WatchStream::new(ticket.progress());
        Self {
            ticket,
            updates,
            events,
            _working: working,
        }
    }

    fn poll_events(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        while !self.events.is_finished() {
            let Some(progress) = ready!(Pin::new(&mut self.updates).poll_next(context)) else {
                return Poll::Ready(Some(Err(Cut)));
            };
            let mut out = Vec::new();
            self.events.write(&progress, &mut out);
            if self.events.is_finished() {
                self.ticket.end();
            }
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(Bytes::from(out))));
            }
        }
        Poll::Ready(None)
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(body) => {
                let frame = ready!(Pin::new(body).poll_frame(context));
                Poll::Ready(frame.map(|frame| frame.map_err(|never: Infallible| match never {})))
            }
            Self::Stream(stream) => stream
                .poll_events(context)
                .map(|bytes| bytes.map(|bytes| bytes.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Stream(stream) => stream.events.is_finished(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Stream(_) => SizeHint::default(),
        }
    }
}
