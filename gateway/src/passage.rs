//! (IO) `Passage`: the body of a request for an agent or a tool that is too large or too slow to be kept. It goes from
//! its caller to a backend as it comes; what a backend does not take waits with the caller.
//!
//! Each attempt gets a handle. What one has taken of it no other gets: the request goes elsewhere only while nothing
//! was taken.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use hyper::body::{Body as _, Frame, Incoming};
use tokio::time::Sleep;

use crate::guard::Watch;
use crate::outbound;

/// The caller broke off, or what it sent is not HTTP.
#[derive(Debug, thiserror::Error)]
#[error("the body of the request broke off")]
pub(crate) struct BodyBroke;

/// How long a body and what follows it may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Each further piece of the body.
    pub(crate) idle: Duration,
    /// From the end of the body to the beginning of its answer.
    pub(crate) answer: Duration,
    /// All of it, until then.
    pub(crate) last: Instant,
}

/// How far a body has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nobody has room for more of it yet.
    Coming,
    /// Its caller is what everybody waits for.
    Awaited,
    Over,
    Broken,
}

#[derive(Debug)]
struct State {
    /// What was read before it was known that there is too much.
    first: Bytes,
    rest: Incoming,
    /// Trailers that may follow.
    announced: Vec<HeaderName>,
    phase: Phase,
    /// Something of it went to a backend.
    is_begun: bool,
    /// When the last piece was taken.
    moved: Instant,
    limits: Limits,
    watch: Arc<Watch>,
}

/// A body on its way. All clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Passage(Arc<Mutex<State>>);

impl Passage {
    /// Of the caller that `watch` is about and that sent `head`: `first`, then what comes from `rest`.
    pub(crate) fn new(
        head: &HeaderMap,
        first: Bytes,
        rest: Incoming,
        limits: Limits,
        watch: &Arc<Watch>,
    ) -> Self {
        watch.reads_body();
        let state = State {
            first,
            rest,
            announced: outbound::announced(head),
            phase: Phase::Coming,
            is_begun: false,
            moved: penstock_shell::clock::now(),
            limits,
            watch: Arc::clone(watch),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something of it went to a backend.
    pub(crate) fn is_begun(&self) -> bool {
        self.lock().is_begun
    }

    /// Whether its caller broke it off.
    pub(crate) fn is_broken(&self) -> bool {
        self.lock().phase == Phase::Broken
    }

    /// Whether its caller is what everybody waits for.
    pub(crate) fn is_awaited(&self) -> bool {
        self.lock().phase == Phase::Awaited
    }

    /// An attempt begins: what it may take counts from now on.
    pub(crate) fn set_out(&self) {
        let mut state = self.lock();
        state.moved = penstock_shell::clock::now();
        if state.phase == Phase::Awaited {
            state.phase = Phase::Coming;
        }
    }

    /// Whether the answer has not begun in time.
    pub(crate) fn poll_late(&self, timer: &mut Pin<Box<Sleep>>, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = self.lock().answer_deadline().into();
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(cx)
    }

    /// Whether neither the body nor its answer, which has begun, went on in time.
    pub(crate) fn poll_stalled(
        &self,
        timer: &mut Pin<Box<Sleep>>,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        ready!(timer.as_mut().poll(cx));
        let deadline = self.lock().piece_deadline().map(tokio::time::Instant::from);
        match deadline.filter(|deadline| *deadline > timer.deadline()) {
            None => Poll::Ready(()),
            Some(deadline) => {
                timer.as_mut().reset(deadline);
                timer.as_mut().poll(cx)
            }
        }
    }

    /// Of so many bytes, if its caller said that.
    pub(crate) fn length(&self) -> Option<u64> {
        let state = self.lock();
        let first = u64::try_from(state.first.len()).ok()?;
        state.rest.size_hint().exact()?.checked_add(first)
    }

    /// The next piece, or its trailers; `None` at the end. Cancel safe.
    pub(crate) fn poll_piece(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyBroke>>> {
        let mut state = self.lock();
        if !state.first.is_empty() {
            let first = std::mem::take(&mut state.first);
            state.took(Phase::Coming);
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let next = match Pin::new(&mut state.rest).poll_frame(cx) {
            Poll::Ready(next) => next,
            Poll::Pending => {
                if state.phase == Phase::Coming {
                    state.phase = Phase::Awaited;
                }
                return Poll::Pending;
            }
        };
        let phase = match &next {
            Some(Ok(frame)) if frame.is_data() && !state.rest.is_end_stream() => Phase::Coming,
            Some(Err(_)) => Phase::Broken,
            Some(Ok(_)) | None => Phase::Over,
        };
        state.took(phase);
        let announced = &state.announced;
        Poll::Ready(next.map(|result| match result.map(Frame::into_trailers) {
            Ok(Ok(trailers)) => {
                let mut trailers = outbound::trailers(trailers);
                let others: Vec<HeaderName> = trailers
                    .keys()
                    .filter(|name| !announced.contains(name))
                    .cloned()
                    .collect();
                for name in others {
                    trailers.remove(name);
                }
                Ok(Frame::trailers(trailers))
            }
            Ok(Err(data)) => Ok(data),
            Err(_) => Err(BodyBroke),
        }))
    }
}

impl State {
    /// Until when its next piece may take; `None` after the last one.
    fn piece_deadline(&self) -> Option<Instant> {
        let deadline = self.limits.last.min(self.moved + self.limits.idle);
        (self.phase != Phase::Over).then_some(deadline)
    }

    /// Until when the beginning of its answer may take, as far as is known yet.
    fn answer_deadline(&self) -> Instant {
        let after = self.limits.last.min(self.moved + self.limits.answer);
        self.piece_deadline().unwrap_or(after)
    }

    fn took(&mut self, phase: Phase) {
        self.moved = penstock_shell::clock::now();
        if phase == Phase::Over && self.phase != Phase::Over {
            self.watch.has_body();
        }
        self.phase = phase;
        self.is_begun = true;
    }
}
