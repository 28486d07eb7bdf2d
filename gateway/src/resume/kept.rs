//! (IO) `Resumable`: an event stream on its way to a caller who may come back to it. It passes as any stream does, as
//! fast as its caller reads; each event gets an id, and goes to the writer too. When its caller leaves, a task of the
//! worker reads on, until the stream ends or nobody has read it for the time that its rule gives. The same is done
//! for a caller who is back while the old connection, which nobody has closed, takes nothing any more.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::log::{self, renewed_every};
use super::metrics::Kept;
use super::numbering::{FIRST, Numbering};
use super::sequence;
use super::writer::Log;
use crate::process::Worker;
use crate::store::Store;
use crate::stream::{BrokenOff, Stream};

/// A caller who takes nothing for this long holds a stream up.
const STALLED: Duration = Duration::from_secs(5);

/// See the module.
pub(crate) struct Resumable(Arc<Held>);

/// A stream and whoever has it: its caller's connection, or (`None`) a task.
pub(super) struct Held(Mutex<Option<Box<Flow>>>);

/// A stream and what is told of it.
pub(super) struct Flow {
    pub(super) worker: Arc<Worker>,
    pub(super) store: Arc<Store>,
    pub(super) stream: Box<Stream>,
    /// The stream's id.
    pub(super) id: String,
    pub(super) numbering: Numbering,
    pub(super) log: Log,
    pub(super) resumable: Duration,
    /// When its caller was given something; `None` while the caller waits for more.
    pub(super) given: Option<Instant>,
}

impl Held {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Box<Flow>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its caller takes nothing, at `now`.
    pub(super) fn is_stalled(&self, now: Instant) -> bool {
        let flow = self.lock();
        let given = flow.as_ref().and_then(|flow| flow.given);
        given.is_some_and(|given| now.saturating_duration_since(given) >= STALLED)
    }

    /// Lets a task read on. What nobody can come back to ends instead.
    pub(super) fn release(&self) {
        let left = self.lock().take();
        if let Some(flow) = left.filter(|flow| !flow.stream.is_over() && !flow.log.is_lost()) {
            let worker = Arc::clone(&flow.worker);
            worker.streams.spawn(go_on(flow));
        }
    }
}

impl Resumable {
    pub(super) fn new(flow: Flow) -> Self {
        let held = Arc::new(Held(Mutex::new(Some(Box::new(flow)))));
        if let Some(flow) = &*held.lock() {
            flow.log.held_by(Arc::downgrade(&held));
        }
        Self(held)
    }

    /// What goes out next; `None` at the end.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, BrokenOff>>> {
        match &mut *self.0.lock() {
            Some(flow) => flow.poll_next(cx),
            None => Poll::Ready(Some(Err(BrokenOff))),
        }
    }

    /// Whether nothing is left.
    pub(crate) fn is_over(&self) -> bool {
        let flow = self.0.lock();
        flow.as_ref().is_some_and(|flow| flow.stream.is_over())
    }
}

impl Drop for Resumable {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Flow {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BrokenOff>>> {
        self.given = None;
        let next = std::task::ready!(self.stream.poll_next(cx));
        self.given = Some(penstock_shell::clock::now());
        let next = next.map(|bytes| bytes.map(|bytes| self.numbered(bytes)));
        if self.stream.is_over() {
            self.log.end();
        }
        Poll::Ready(next)
    }

    /// What the caller gets of `bytes`.
    fn numbered(&mut self, bytes: Bytes) -> Bytes {
        if self.log.is_lost() {
            self.numbering.stop();
        }
        match self.numbering.feed(&bytes) {
            Ok(numbered) => {
                if let Some((FIRST, event)) = numbered.events.first()
                    && let Some(response) = sequence::response_id(event)
                {
                    self.log.name(response);
                }
                self.log.push(numbered.events);
                numbered.bytes
            }
            Err(_too_large) => {
                self.log.forget(Kept::TooLarge);
                bytes
            }
        }
    }
}

/// Whether somebody came back and reads. Nobody can while the store is away.
async fn is_read(store: &Store, stream: &str) -> bool {
    let mark = store.get(&log::reader(stream)).await;
    mark.is_ok_and(|mark| mark.is_some())
}

/// Reads a stream on whose caller has left.
async fn go_on(mut flow: Box<Flow>) {
    let streams = Arc::clone(&flow.worker.process.streams);
    let _detached = streams.detached();
    flow.stream.detach();
    let mut until = penstock_shell::clock::now() + flow.resumable;
    while !flow.log.is_lost() {
        let now = penstock_shell::clock::now();
        if now >= until {
            // A reader's mark lasts as long as a stream goes on without one.
            if is_read(&flow.store, &flow.id).await {
                until = now + renewed_every(flow.resumable);
            } else {
                flow.stream.abandon();
                until = now + flow.resumable;
            }
        }
        let next = std::future::poll_fn(|cx| flow.poll_next(cx));
        if let Ok(None | Some(Err(_))) = tokio::time::timeout_at(until.into(), next).await {
            return;
        }
    }
}
