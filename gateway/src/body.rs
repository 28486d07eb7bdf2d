//! (IO) Reading a request body: whole, within its limits of size and time; its beginning; or piece by piece.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, TRAILER};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};

use crate::guard::Watch;
use crate::process::{BodyLease, Process};
use crate::reject::Reject;

/// Room that is made at once for a body of unknown length.
const FIRST_BYTES: usize = 16 << 10;
/// So many times the room is made where that is not enough.
const GROWTH: usize = 8;
/// A body that takes longer is not waited for where it may go on as it comes: it could be a conversation.
const MAX_WAIT: Duration = Duration::from_secs(1);

/// Where a body comes from.
pub(crate) enum Source {
    /// A connection.
    Coming(Incoming),
    /// It is here; `None` once it was taken.
    Here(Option<Bytes>),
}

impl Source {
    /// The next piece; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Reject> {
        let body = match self {
            Self::Here(bytes) => return Ok(bytes.take()),
            Self::Coming(body) => body,
        };
        while let Some(frame) = body.frame().await {
            if let Ok(bytes) = frame.map_err(|_| Reject::BodyBroken)?.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    fn is_over(&self) -> bool {
        match self {
            Self::Coming(body) => body.is_end_stream(),
            Self::Here(bytes) => bytes.is_none(),
        }
    }
}

/// What was read of a body, and the room that it takes.
pub(crate) struct Part {
    first: Option<Bytes>,
    /// Where there are several pieces.
    all: Option<Vec<u8>>,
    lease: BodyLease,
}

impl Part {
    fn new(process: &Arc<Process>) -> Result<Self, Reject> {
        // What has come takes room, not what was announced: callers that announce much and send nothing keep nobody
        // out.
        let lease = process.lease_body(0).ok_or(Reject::Overloaded)?;
        Ok(Self {
            first: None,
            all: None,
            lease,
        })
    }

    fn len(&self) -> usize {
        let all = self.all.as_ref().map(Vec::len);
        all.or(self.first.as_ref().map(Bytes::len)).unwrap_or(0)
    }

    fn add(
        &mut self,
        process: &Arc<Process>,
        length: usize,
        max_bytes: usize,
        bytes: &Bytes,
    ) -> Result<(), Reject> {
        let now = self.len() + bytes.len();
        // The room of before is part of the new one.
        self.lease = process.lease_body(0).ok_or(Reject::Overloaded)?;
        self.lease = process.lease_body(now).ok_or(Reject::Overloaded)?;
        match (&mut self.all, self.first.take()) {
            (Some(all), _) => {
                if all.capacity() < now {
                    // In few steps, since each copies what came so far and leaves its room behind; of the new one the
                    // system gives only what is written to. Never beyond what a body may have.
                    let room = (GROWTH * all.capacity()).min(max_bytes).max(now);
                    all.reserve_exact(room - all.len());
                }
                all.extend_from_slice(bytes);
            }
            (None, None) => self.first = Some(bytes.clone()),
            (None, Some(start)) => {
                let room = length.max(FIRST_BYTES).max(now);
                let mut joined = Vec::with_capacity(room);
                joined.extend_from_slice(&start);
                joined.extend_from_slice(bytes);
                self.all = Some(joined);
            }
        }
        Ok(())
    }

    /// Reads on: the piece with which it has more than `max_bytes`, or `None` at the body's end. Cancel safe.
    async fn fill(
        &mut self,
        process: &Arc<Process>,
        length: Option<usize>,
        max_bytes: usize,
        body: &mut Source,
    ) -> Result<Option<Bytes>, Reject> {
        while let Some(bytes) = body.next().await? {
            if self.len() + bytes.len() > max_bytes {
                return Ok(Some(bytes));
            }
            self.add(process, length.unwrap_or(0), max_bytes, &bytes)?;
            if body.is_over() {
                break;
            }
        }
        Ok(None)
    }

    /// The bytes, and the room that they take.
    pub(crate) fn into_bytes(self) -> (Bytes, BodyLease) {
        let bytes = self.all.map(Bytes::from).or(self.first);
        (bytes.unwrap_or_default(), self.lease)
    }
}

/// The length that the head gives.
fn announced(headers: &HeaderMap) -> Option<usize> {
    let length = headers.get(CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

/// The body and the room that it takes.
pub(crate) async fn read(
    process: &Arc<Process>,
    watch: &Watch,
    headers: &HeaderMap,
    mut body: Source,
) -> Result<(Bytes, BodyLease), Reject> {
    let max_bytes = process.settings.limits.body_bytes;
    let length = announced(headers);
    if length.is_some_and(|length| length > max_bytes) {
        return Err(Reject::BodyTooLarge { max_bytes });
    }
    let mut part = Part::new(process)?;
    let limit = process.settings.limits.body_timeout;
    let beyond = {
        let fill = part.fill(process, length, max_bytes, &mut body);
        within(watch, limit, fill)
            .await
            .ok_or(Reject::BodyTimeout)??
    };
    match beyond {
        None => Ok(part.into_bytes()),
        Some(_) => Err(Reject::BodyTooLarge { max_bytes }),
    }
}

/// The body, if it is here before long and has at most `max_bytes`; else its beginning, and what it comes from.
pub(crate) async fn begin(
    process: &Arc<Process>,
    watch: &Watch,
    headers: &HeaderMap,
    max_bytes: usize,
    mut body: Source,
) -> Result<(Part, Option<Incoming>), Reject> {
    let length = announced(headers);
    let mut part = Part::new(process)?;
    // Trailers are not kept.
    let may_be_kept = length.unwrap_or(0) <= max_bytes && !headers.contains_key(TRAILER);
    let is_whole = may_be_kept && {
        let fill = part.fill(process, length, max_bytes, &mut body);
        match within(watch, MAX_WAIT, fill).await.transpose()? {
            Some(Some(beyond)) => {
                part.add(process, 0, max_bytes, &beyond)?;
                false
            }
            Some(None) => true,
            None => false,
        }
    };
    let rest = match body {
        Source::Coming(body) if !is_whole => Some(body),
        Source::Coming(_) | Source::Here(_) => None,
    };
    Ok((part, rest))
}

/// What comes of `read`; `None` if it takes longer than `limit`.
async fn within<T>(watch: &Watch, limit: Duration, read: impl Future<Output = T>) -> Option<T> {
    let mut read = std::pin::pin!(read);
    // Usually the body came together with the head: then no timer is needed.
    if let Some(result) = read.as_mut().now_or_never() {
        return Some(result);
    }
    watch.reads_body();
    let result = tokio::time::timeout(limit, read).await;
    watch.has_body();
    result.ok()
}
