//! (IO) The writer of one stream: a task that takes events behind the caller's back and writes them to the store, some
//! at a time. It never holds the stream up: what the store does not take in time, or a stream that grows too large, is
//! kept no longer, and its caller cannot come back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::kept::Held;
use super::log::{self, Head, MARK, PARTS, WRITER_KEPT};
use super::metrics::Kept;
use super::{Place, Streams};
use crate::process::Worker;
use crate::store::{Error, Expect, Piece, Store};

/// Bytes of one stream that are kept; as much as of a stream that a rule buffers.
const MAX_LOG_BYTES: usize = 8 << 20;
/// Bytes of all streams that wait for the store: eight streams of the largest size, or a second of 10,000 usual ones.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// Events that are written together, and the time between two writes.
const MAX_TOGETHER: usize = 64;
const BETWEEN: Duration = Duration::from_millis(50);
/// Between two signs of life; three may be lost.
const BEAT: Duration = Duration::from_secs(5);
/// A store may fail for this long.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);

/// Events on their way to the store.
enum Note {
    Events(Vec<Piece>, Room),
    /// It is the response of this id.
    Named(String),
    /// Its caller's connection has it.
    Held(Weak<Held>),
    /// The stream came to its end.
    End,
    /// It is to be kept no longer.
    Forget,
}

/// Bytes that wait for the store; given back when dropped.
struct Room {
    streams: Arc<Streams>,
    bytes: usize,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.streams.waiting.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// What a stream has of its writer. Dropping it without [`Log::end`] leaves the log without an end.
pub(super) struct Log {
    /// Bounded in bytes, by [`MAX_LOG_BYTES`].
    notes: mpsc::UnboundedSender<Note>,
    streams: Arc<Streams>,
    is_lost: Arc<AtomicBool>,
    bytes: usize,
    has_ended: bool,
}

impl Log {
    /// Begins a log, written by a task of `worker`.
    pub(super) fn begin(
        worker: &Worker,
        store: &Arc<Store>,
        place: Place,
        stream: String,
        head: Head,
    ) -> Self {
        let (notes, receiver) = mpsc::unbounded_channel();
        let is_lost = Arc::new(AtomicBool::new(false));
        let streams = Arc::clone(&worker.process.streams);
        let writer = Writer {
            store: Arc::clone(store),
            streams: Arc::clone(&streams),
            stream,
            head,
            response: None,
            held: Weak::new(),
            notes: receiver,
            is_lost: Arc::clone(&is_lost),
            _place: place,
        };
        worker.streams.spawn(writer.run());
        Self {
            notes,
            streams,
            is_lost,
            bytes: 0,
            has_ended: false,
        }
    }

    /// Whether the stream is kept no longer.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Relaxed)
    }

    /// Hands on events, or keeps the stream no longer.
    pub(super) fn push(&mut self, events: Vec<Piece>) {
        if events.is_empty() || self.is_lost() {
            return;
        }
        let bytes: usize = events.iter().map(|(_, event)| event.len()).sum();
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > MAX_LOG_BYTES {
            return self.forget(Kept::TooLarge);
        }
        let before = self.streams.waiting.fetch_add(bytes, Ordering::AcqRel);
        let room = Room {
            streams: Arc::clone(&self.streams),
            bytes,
        };
        if before.saturating_add(bytes) > MAX_WAITING_BYTES {
            return self.forget(Kept::StoreSlow);
        }
        // A writer that has ended says that the stream is lost.
        let _ = self.notes.send(Note::Events(events, room));
    }

    /// The stream is the response of this id, by which its caller may come back too.
    pub(super) fn name(&mut self, response: String) {
        let _ = self.notes.send(Note::Named(response));
    }

    /// A caller's connection has the stream.
    pub(super) fn held_by(&self, held: Weak<Held>) {
        let _ = self.notes.send(Note::Held(held));
    }

    /// Keeps the stream no longer.
    pub(super) fn forget(&mut self, why: Kept) {
        if !self.is_lost.swap(true, Ordering::Relaxed) {
            self.streams.metrics.kept(why);
            // A writer that has ended has nothing to forget.
            let _ = self.notes.send(Note::Forget);
        }
    }

    /// The stream came to its end.
    pub(super) fn end(&mut self) {
        if !std::mem::replace(&mut self.has_ended, true) {
            let _ = self.notes.send(Note::End);
        }
    }
}

struct Writer {
    store: Arc<Store>,
    streams: Arc<Streams>,
    stream: String,
    head: Head,
    /// The response's id, if it is one.
    response: Option<String>,
    held: Weak<Held>,
    notes: mpsc::UnboundedReceiver<Note>,
    is_lost: Arc<AtomicBool>,
    _place: Place,
}

/// How a log ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// The stream was dropped before its end.
    Open,
    Forgotten,
}

impl Writer {
    async fn run(mut self) {
        match self.write().await {
            Ok(End::Whole) => {
                self.streams.store_works();
                self.streams.metrics.kept(Kept::Whole);
            }
            // Whoever reads is told at once.
            Ok(End::Open) => self.remove(&[log::WRITER]).await,
            Ok(End::Forgotten) => self.remove(&PARTS).await,
            Err(err) => {
                if !self.is_lost.swap(true, Ordering::Relaxed) {
                    self.streams.metrics.kept(Kept::StoreFailed);
                }
                self.streams.store_failed(&err);
                self.remove(&PARTS).await;
            }
        }
    }

    /// What cannot be removed has an end of life.
    async fn remove(&self, parts: &[&'static str]) {
        let _ = self.store.remove(&self.stream, parts).await;
    }

    async fn write(&mut self) -> Result<End, Error> {
        let mut beat_at = penstock_shell::clock::now();
        let mut last = 0;
        loop {
            let mut pieces = Vec::new();
            let mut rooms = Vec::new();
            let first = tokio::time::timeout_at(beat_at.into(), self.notes.recv()).await;
            let mut note = match first {
                Ok(None) => return Ok(End::Open),
                Ok(note) => note,
                Err(_elapsed) => None,
            };
            loop {
                match note {
                    Some(Note::Events(events, room)) => {
                        last = events.last().map_or(last, |(number, _)| *number);
                        pieces.extend(events);
                        rooms.push(room);
                    }
                    Some(Note::Named(response)) => {
                        self.response = Some(response);
                        beat_at = penstock_shell::clock::now();
                    }
                    Some(Note::Held(held)) => self.held = held,
                    Some(Note::End) => self.head.last = Some(last),
                    Some(Note::Forget) => return Ok(End::Forgotten),
                    None => break,
                }
                if pieces.len() >= MAX_TOGETHER {
                    break;
                }
                note = self.notes.try_recv().ok();
            }
            let may_wait = (1..MAX_TOGETHER).contains(&pieces.len());
            let is_over = self.head.last.is_some();
            let now = penstock_shell::clock::now();
            if now >= beat_at {
                beat_at = now + BEAT;
                self.beat().await;
                self.take_over(now).await;
                pieces.push(self.head.piece());
            } else if is_over {
                pieces.push(self.head.piece());
            }
            self.persist(pieces).await?;
            if is_over {
                return Ok(End::Whole);
            }
            if may_wait {
                tokio::time::sleep(BETWEEN).await;
            }
        }
    }

    /// A beat that is lost is made up for by the next one.
    async fn beat(&self) {
        let mark = log::writer(&self.stream);
        let _ = self.store.put(&mark, MARK, Expect::Any, WRITER_KEPT).await;
        if let Some(response) = &self.response {
            let key = log::response(response);
            let stream = Bytes::from(self.stream.clone());
            let kept = self.head.resumable() + WRITER_KEPT;
            let _ = self.store.put(&key, stream, Expect::Any, kept).await;
        }
    }

    /// Takes the stream from a caller who is back, if the old connection takes nothing any more.
    async fn take_over(&self, now: Instant) {
        if let Some(held) = self.held.upgrade().filter(|held| held.is_stalled(now))
            && let Ok(Some(_)) = self.store.get(&log::reader(&self.stream)).await
        {
            held.release();
        }
    }

    async fn persist(&self, pieces: Vec<Piece>) -> Result<(), Error> {
        let key = log::events(&self.stream);
        let last = penstock_shell::clock::now() + PATIENCE;
        loop {
            let written = self.store.write(&key, pieces.clone(), self.head.kept());
            match written.await {
                Err(Error::Away | Error::Busy)
                    if penstock_shell::clock::now() < last
                        && !self.is_lost.load(Ordering::Relaxed) => {}
                written => return written,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
