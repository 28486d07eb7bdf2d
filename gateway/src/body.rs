//! (IO) Reading a request body: whole, within its limits of size and time; or piece by piece.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};

use crate::guard::Watch;
use crate::process::{BodyLease, Process};
use crate::reject::Reject;

/// Room that is made at once for a body of unknown length.
const FIRST_BYTES: usize = 16 << 10;

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

/// The body and the room that it takes.
pub(crate) async fn read(
    process: &Arc<Process>,
    watch: &Watch,
    headers: &HeaderMap,
    body: Source,
) -> Result<(Bytes, BodyLease), Reject> {
    let max_bytes = process.settings.limits.body_bytes;
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > max_bytes) {
        return Err(Reject::BodyTooLarge { max_bytes });
    }
    let mut collect = std::pin::pin!(collect(process, length, max_bytes, body));
    // Usually the body came together with the head: then no timer is needed.
    if let Some(result) = collect.as_mut().now_or_never() {
        return result;
    }
    watch.reads_body();
    let result = tokio::time::timeout(process.settings.limits.body_timeout, collect).await;
    watch.has_body();
    result.unwrap_or(Err(Reject::BodyTimeout))
}

async fn collect(
    process: &Arc<Process>,
    length: Option<usize>,
    max_bytes: usize,
    mut body: Source,
) -> Result<(Bytes, BodyLease), Reject> {
    // What has come takes room, not what was announced: callers that announce much and send nothing keep nobody out.
    let mut lease = process.lease_body(0).ok_or(Reject::Overloaded)?;
    let mut first: Option<Bytes> = None;
    let mut all: Option<BytesMut> = None;
    while let Some(bytes) = body.next().await? {
        let before = all
            .as_ref()
            .map(BytesMut::len)
            .or(first.as_ref().map(Bytes::len))
            .unwrap_or(0);
        let now = before + bytes.len();
        if now > max_bytes {
            return Err(Reject::BodyTooLarge { max_bytes });
        }
        drop(lease);
        lease = process.lease_body(now).ok_or(Reject::Overloaded)?;
        match (&mut all, first.take()) {
            (Some(all), _) => all.extend_from_slice(&bytes),
            (None, None) => first = Some(bytes),
            (None, Some(start)) => {
                let mut joined =
                    BytesMut::with_capacity(length.unwrap_or(0).max(FIRST_BYTES).max(now));
                joined.extend_from_slice(&start);
                joined.extend_from_slice(&bytes);
                all = Some(joined);
            }
        }
        if body.is_over() {
            break;
        }
    }
    let bytes = all.map(BytesMut::freeze).or(first).unwrap_or_default();
    Ok((bytes, lease))
}
