//! (IO) `AnswerBody`: what goes to the caller, piece by piece as it comes from the backend, with the request's record
//! attached. Event streams pass by whole events (see [`Events`]); a stream that breaks ends in an error event, never in
//! a clean `[DONE]`. Dropping the body closes the connection to the backend.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};

use crate::begun::Begun;
use crate::cache::exact::{Entry, ExactCache, Key, MAX_ENTRY_BYTES};
use crate::events::{Events, Passed};
use crate::heartbeat::Beating;
use crate::json_end::JsonEnd;
use crate::meter::{Cut, Usage};
use crate::openai::{Api, DONE, EMPTY_LINE, Wire};
use crate::outbound;
use crate::principal::Who;
use crate::process::Worker;
use crate::provider::Translator;
use crate::record::{CLIENT_GONE, OK, Record, STOPPING, STORE_FAILED, UPSTREAM_ERROR};
use crate::reject::Broken;
use crate::rescue::{NoText, Rescue};
use crate::resume::Resumable;
use crate::stopping::Stopping;
use crate::unread;
use crate::upstream::{BodyError, Exchange};

/// A body that broke off where no error event can be sent: the connection to the caller is cut.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(crate) struct BrokenOff;

/// A body on its way to the caller.
pub(crate) enum AnswerBody {
    /// All of it is here.
    Whole {
        bytes: Option<Bytes>,
        outcome: &'static str,
        record: Box<Record>,
    },
    /// It is still coming.
    Stream(Box<Stream>),
    /// The same, and its caller may come back to it.
    Resumable(Resumable),
    /// It is read from the store.
    Stored {
        /// `None` after its end.
        pieces: Option<BoxStream<'static, Result<Bytes, BrokenOff>>>,
        /// What it is made of, if it is an event stream.
        wire: Option<Wire>,
        stopping: Stopping,
        record: Box<Record>,
    },
    /// One of the others, with heartbeats.
    Beating(Box<Beating>),
}

impl AnswerBody {
    /// A body that is here as a whole; the request ends with `outcome` once it is taken.
    pub(crate) fn whole(bytes: Bytes, outcome: &'static str, mut record: Box<Record>) -> Self {
        if bytes.is_empty() {
            record.ended(outcome);
            return Self::Whole {
                bytes: None,
                outcome,
                record,
            };
        }
        Self::Whole {
            bytes: Some(bytes),
            outcome,
            record,
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match self {
            Self::Whole {
                bytes,
                outcome,
                record,
            } => {
                let bytes = bytes.take();
                if bytes.is_some() {
                    record.ended(outcome);
                }
                Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            Self::Stored {
                pieces,
                wire,
                stopping,
                record,
            } => {
                let Some(stream) = pieces else {
                    return Poll::Ready(None);
                };
                let Poll::Ready(next) = stream.poll_next_unpin(cx) else {
                    std::task::ready!(stopping.poll(&record.worker, cx));
                    *pieces = None;
                    record.ended(STOPPING);
                    let event = wire.map(|wire| Broken::Stopping.event(wire, false));
                    let event = event.map(|event| Frame::data(Bytes::from(event)));
                    return Poll::Ready(Some(event.ok_or(BrokenOff)));
                };
                if next.as_ref().is_none_or(Result::is_err) {
                    *pieces = None;
                    record.ended(if next.is_none() { OK } else { STORE_FAILED });
                }
                Poll::Ready(next.map(|result| result.map(Frame::data)))
            }
            Self::Beating(beating) => beating.poll_next(cx),
            Self::Stream(stream) => {
                let next = std::task::ready!(stream.poll_next(cx));
                Poll::Ready(if let Some(result) = next {
                    Some(result.map(Frame::data))
                } else {
                    let last = stream.trailers.take();
                    last.map(|last| Ok(Frame::trailers(outbound::trailers(*last))))
                })
            }
            Self::Resumable(stream) => stream
                .poll_next(cx)
                .map(|next| next.map(|result| result.map(Frame::data))),
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        unread::asked();
        let next = std::task::ready!(self.get_mut().poll_next(cx));
        if next.is_some() {
            unread::given();
        }
        Poll::Ready(next)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole { bytes, .. } => bytes.is_none(),
            Self::Stream(stream) => stream.is_over(),
            Self::Resumable(stream) => stream.is_over(),
            Self::Stored { pieces, .. } => pieces.is_none(),
            Self::Beating(beating) => beating.is_over(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole { bytes, .. } => SizeHint::with_exact(
                bytes
                    .as_ref()
                    .map_or(0, |bytes| u64::try_from(bytes.len()).unwrap_or(u64::MAX)),
            ),
            Self::Stream(_) | Self::Resumable(_) | Self::Stored { .. } | Self::Beating(_) => {
                SizeHint::default()
            }
        }
    }
}

/// An answer that is collected for the cache while it passes.
pub(crate) struct Fill {
    pub(crate) key: Key,
    pub(crate) cache: Arc<ExactCache>,
    /// Everything but the body.
    pub(crate) entry: Entry,
    bytes: Vec<u8>,
    too_large: bool,
}

impl Fill {
    pub(crate) fn new(key: Key, cache: Arc<ExactCache>, entry: Entry) -> Self {
        Self {
            key,
            cache,
            entry,
            bytes: Vec::new(),
            too_large: false,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.bytes.len() + bytes.len() > MAX_ENTRY_BYTES {
            self.too_large = true;
            self.bytes = Vec::new();
        } else if !self.too_large {
            self.bytes.extend_from_slice(bytes);
        }
    }

    fn store(self, usage: Option<Usage>, now_ms: u64) {
        if !self.too_large {
            let entry = Entry {
                usage,
                body: Bytes::from(self.bytes),
                ..self.entry
            };
            self.cache.put(self.key, entry, now_ms);
        }
    }
}

/// What follows the bytes that are ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// More from the backend.
    Upstream,
    /// The event that says how the stream broke.
    Event(Broken),
    /// What another endpoint makes of a stream that broke so.
    Rescue(Broken),
    /// Nothing.
    End,
}

/// A body that is still coming.
pub(crate) struct Stream {
    worker: Arc<Worker>,
    exchange: Option<Exchange>,
    /// `None` for a body that is no event stream.
    events: Option<Events>,
    /// Set for JSON that ends with its connection.
    json: Option<Box<JsonEnd>>,
    /// Between a backend and a caller that speak different protocols.
    translator: Option<Translator>,
    /// What the caller's stream is made of.
    wire: Wire,
    ready: Option<Bytes>,
    /// What follows the body, of a backend that is no model.
    trailers: Option<Box<HeaderMap>>,
    next: Next,
    limits: Limits,
    fill: Option<Fill>,
    /// Where its rule wants one.
    rescue: Option<Box<Rescue>>,
    stopping: Stopping,
    /// Something of it could not be read.
    has_gap: bool,
    record: Box<Record>,
}

/// How long a body may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Each further piece.
    pub(crate) idle: Duration,
    /// All of it, until then.
    pub(crate) last: Instant,
}

impl Stream {
    /// Goes on with an answer.
    pub(crate) fn new(
        worker: &Arc<Worker>,
        begun: Begun,
        limits: Limits,
        record: Box<Record>,
    ) -> Self {
        let Begun {
            exchange,
            events,
            json,
            translator,
            first,
            rescue,
        } = begun;
        let mut stream = Self {
            worker: Arc::clone(worker),
            exchange: Some(exchange),
            events,
            json,
            translator,
            wire: record.api.map(Api::wire).unwrap_or_default(),
            ready: None,
            trailers: None,
            next: Next::Upstream,
            limits,
            fill: None,
            rescue,
            stopping: Stopping::default(),
            has_gap: false,
            record,
        };
        stream.take(first, penstock_shell::clock::now());
        stream
    }

    /// Stores the answer if it ends well.
    pub(crate) fn fill(&mut self, mut fill: Fill) {
        if self.has_gap {
            return;
        }
        if let Some(bytes) = &self.ready {
            fill.add(bytes);
        }
        self.fill = Some(fill);
    }

    /// What it is, and how long it may go on without its caller, if it is an event stream of a rule that says so.
    pub(crate) fn resumable(&self) -> Option<(Api, Duration)> {
        let resumable = self.record.rule.as_ref()?.resumable?;
        self.events.as_ref()?;
        Some((self.record.api?, resumable))
    }

    /// Who asked for it.
    pub(crate) fn who(&self) -> &Who {
        &self.record.who
    }

    /// Its caller left, and it goes on.
    pub(crate) fn detach(&mut self) {
        self.record.detach();
    }

    /// Nobody came back for it.
    pub(crate) fn abandon(&mut self) {
        self.break_off(Broken::Abandoned);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.next == Next::End && self.ready.is_none() && self.trailers.is_none()
    }

    /// Takes in what the backend sent.
    fn take(&mut self, passed: Passed, now: Instant) {
        if let Some(events) = &self.events {
            self.record.usage = events.meter().usage().or(self.record.usage);
        }
        if passed.left_out > 0 {
            self.record.left_out(passed.left_out, now);
            self.has_gap = true;
            self.fill = None;
            if let Some(rescue) = &mut self.rescue {
                rescue.has_gap();
            }
        }
        self.record.tokens(passed.tokens, now);
        self.pass(passed.bytes);
        if passed.ends && self.next == Next::Upstream {
            let cut = self.events.as_ref().and_then(|events| events.meter().cut());
            match cut {
                Some(Cut::Failure) if self.is_watched() => self.break_off(Broken::Failed),
                // The backend's own event, or what it was translated to, is the stream's end.
                Some(Cut::Failure) => {
                    self.record.broke_off(UPSTREAM_ERROR);
                    self.end(UPSTREAM_ERROR);
                }
                Some(Cut::Error | Cut::Limit) => self.end(UPSTREAM_ERROR),
                Some(Cut::Abort) => self.break_off(Broken::Aborted),
                None => self.break_off(Broken::Malformed),
            }
        }
    }

    /// Makes `bytes` ready to go out, behind what is ready.
    fn pass(&mut self, mut bytes: Bytes) {
        if let Some(rescue) = &mut self.rescue {
            match rescue.pass(bytes, &mut self.record) {
                Ok(passed) => bytes = passed,
                Err(NoText) => return self.break_off(Broken::Malformed),
            }
        }
        if let Some(translator) = &mut self.translator {
            match translator.feed(&bytes) {
                Ok(translated) => bytes = translated,
                Err(_too_large) => return self.break_off(Broken::Malformed),
            }
        }
        if let Some(fill) = &mut self.fill {
            fill.add(&bytes);
        }
        let bytes = match self.ready.take() {
            Some(before) if bytes.is_empty() => before,
            Some(before) => [before, bytes].concat().into(),
            None => bytes,
        };
        self.ready = Some(bytes).filter(|bytes| !bytes.is_empty());
    }

    fn end(&mut self, outcome: &'static str) {
        self.next = Next::End;
        self.exchange = None;
        self.fill = self.fill.take().filter(|_| outcome == OK);
        self.record.ended(outcome);
    }

    /// Whether another endpoint may go on with it.
    fn is_watched(&self) -> bool {
        let rescue = self.rescue.as_ref();
        rescue.is_some_and(|rescue| rescue.is_watching())
    }

    fn break_off(&mut self, broken: Broken) {
        let rescue = self.rescue.as_ref();
        self.next = if rescue.is_some_and(|rescue| rescue.is_for(broken)) {
            Next::Rescue(broken)
        } else {
            Next::Event(broken)
        };
        self.exchange = None;
        self.fill = None;
        self.record.broken(broken);
    }

    /// Waits for an endpoint that goes on with a stream that broke off.
    fn poll_rescue(&mut self, cx: &mut Context<'_>, broken: Broken) -> Poll<()> {
        let rescue = self.rescue.as_mut();
        let begun = rescue.map(|rescue| rescue.poll(cx, broken, &mut self.record));
        match std::task::ready!(begun.unwrap_or(Poll::Ready(None))) {
            Some(begun) => {
                self.exchange = Some(begun.exchange);
                self.events = begun.events;
                self.next = Next::Upstream;
                self.take(begun.first, penstock_shell::clock::now());
            }
            None => self.next = Next::Event(broken),
        }
        Poll::Ready(())
    }

    /// What goes out next; `None` at the end.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, BrokenOff>>> {
        loop {
            if let Some(bytes) = self.ready.take() {
                return Poll::Ready(Some(Ok(bytes)));
            }
            match self.next {
                Next::End => return Poll::Ready(None),
                Next::Event(broken) => {
                    self.next = Next::End;
                    let Some(events) = &self.events else {
                        return Poll::Ready(Some(Err(BrokenOff)));
                    };
                    // Translators give whole events.
                    let inside = self.translator.is_none() && events.is_part_out();
                    let event = broken.event(self.wire, inside);
                    return Poll::Ready(Some(Ok(Bytes::from(event))));
                }
                Next::Rescue(_) | Next::Upstream if self.worker.process.is_stopping() => {
                    self.rescue = None;
                    self.break_off(Broken::Stopping);
                }
                Next::Rescue(broken) => {
                    if self.poll_rescue(cx, broken).is_pending() {
                        std::task::ready!(self.stopping.poll(&self.worker, cx));
                    }
                }
                Next::Upstream => {
                    if self.poll_upstream(cx).is_pending() {
                        std::task::ready!(self.stopping.poll(&self.worker, cx));
                    }
                }
            }
        }
    }

    /// Takes what comes next from the backend.
    fn poll_upstream(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(exchange) = &mut self.exchange else {
            self.next = Next::End;
            return Poll::Ready(());
        };
        match std::task::ready!(exchange.poll_frame(cx)) {
            Ok(Some(bytes)) => {
                let now = penstock_shell::clock::now();
                let is_over = exchange.is_over();
                let is_progress = self.read(bytes, now);
                if is_progress && let Some(exchange) = &mut self.exchange {
                    exchange.set_deadline(self.limits.last.min(now + self.limits.idle));
                }
                if self.next == Next::Upstream {
                    if is_over {
                        self.finish();
                    } else if now >= self.limits.last {
                        self.break_off(Broken::Deadline);
                    }
                }
            }
            Ok(None) => self.finish(),
            Err(BodyError::Broken) => self.break_off(Broken::Cut),
            Err(BodyError::TimedOut) if penstock_shell::clock::now() >= self.limits.last => {
                self.break_off(Broken::Deadline);
            }
            Err(BodyError::TimedOut) => self.break_off(Broken::Stalled),
        }
        Poll::Ready(())
    }

    /// Takes in what the backend sent. Whether there was more than signs that the connection is there.
    fn read(&mut self, bytes: Bytes, now: Instant) -> bool {
        if let Some(json) = &mut self.json {
            json.feed(&bytes);
        }
        let passed = match &mut self.events {
            Some(events) => match events.feed(bytes) {
                Ok(passed) => passed,
                Err(_too_large) => {
                    self.break_off(Broken::Malformed);
                    return false;
                }
            },
            None => Passed {
                bytes,
                is_progress: true,
                ..Passed::default()
            },
        };
        let is_progress = passed.is_progress;
        self.take(passed, now);
        is_progress
    }

    /// The backend's body came to its end.
    fn finish(&mut self) {
        // An end without `[DONE]` is how a connection that closes to end its body looks when it is cut; an answer that
        // said why it ended is whole all the same.
        if let Some(events) = self
            .events
            .as_mut()
            .filter(|events| events.meter().lacks_last_line_only())
        {
            let last = events.feed(Bytes::from_static(EMPTY_LINE));
            self.pass(last.unwrap_or_default().bytes);
        }
        let events = self.events.as_ref();
        let is_cut = self.json.as_ref().is_some_and(|json| !json.is_whole());
        if events.is_some_and(Events::lacks_done_only) {
            self.pass(Bytes::from_static(DONE));
        } else if is_cut || events.is_some_and(|events| !events.meter().is_done()) {
            return self.break_off(Broken::Cut);
        }
        let now = penstock_shell::clock::now();
        if let (Some(mut exchange), Some(in_flight)) =
            (self.exchange.take(), &self.record.in_flight)
        {
            if self.record.api == Some(Api::Http) {
                self.trailers = exchange.take_trailers();
            }
            exchange.finish(&in_flight.endpoint().live, self.worker.index, now);
        }
        self.record.completed(self.events.is_some(), now);
        if let Some(fill) = self.fill.take() {
            fill.store(self.record.usage, self.worker.process.ms(now));
        }
        self.end(OK);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A broken or ended stream whose last bytes were not taken: the caller left first.
        let is_under_way = matches!(self.next, Next::Upstream | Next::Rescue(_));
        if is_under_way || self.ready.is_some() {
            self.record.ended(CLIENT_GONE);
        }
    }
}
