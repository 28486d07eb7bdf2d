//! (IO) Work that outlives its connection: files, batches and background responses. Callers leave it in the store and
//! come back for it; the [`runner`] of any replica does it when the backends have room, by the path of a caller's own
//! requests.

mod batch;
mod batches;
mod call;
mod files;
mod input;
mod lines;
mod metrics;
mod responses;
mod room;
mod run_batch;
mod run_response;
pub(crate) mod runner;
mod shape;
mod share;
mod stored;
mod stream;
mod upload;

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use http::Method;
use http::request::Parts;
use tokio::sync::Notify;

use crate::body::Source;
use crate::guard::Watch;
use crate::principal::Who;
use crate::process::Process;
use crate::reject::Reject;
use crate::store::Store;
use crate::stream::BrokenOff;

pub(crate) use metrics::Metrics;
pub(crate) use responses::accept;
pub(crate) use stored::{Owner, new_id};

/// What the process has for jobs.
pub(crate) struct Jobs {
    /// `None` if the gateway was started without one.
    store: Option<Arc<Store>>,
    rooms: room::Rooms,
    /// Wakes the runner of this replica: a job came.
    came: Notify,
    metrics: Metrics,
}

impl Jobs {
    /// Jobs in `store`.
    pub(crate) fn new(store: Option<Arc<Store>>, metrics: Metrics) -> Self {
        Self {
            store,
            rooms: room::Rooms::default(),
            came: Notify::new(),
            metrics,
        }
    }

    /// Whether there is a store.
    pub(crate) fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// Where everything is kept that outlives a connection.
    pub(crate) fn store(&self) -> Result<&Arc<Store>, Reject> {
        self.store.as_ref().ok_or(Reject::NoStore)
    }
}

/// What a caller gets.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) content_type: &'static str,
    pub(crate) body: ReplyBody,
}

/// See [`Reply`].
pub(crate) enum ReplyBody {
    Whole(Bytes),
    Stream(BoxStream<'static, Result<Bytes, BrokenOff>>),
}

const JSON: &str = "application/json";
pub(crate) const EVENTS: &str = "text/event-stream";

impl Reply {
    fn json(status: u16, value: &serde_json::Value) -> Self {
        Self::bytes(status, Bytes::from(value.to_string()))
    }

    /// `bytes` is JSON.
    fn bytes(status: u16, bytes: Bytes) -> Self {
        Self {
            status,
            content_type: JSON,
            body: ReplyBody::Whole(bytes),
        }
    }
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place<'a> {
    Files,
    File(&'a str),
    Content(&'a str),
    Batches,
    Batch(&'a str),
    CancelBatch(&'a str),
    Response(&'a str),
    CancelResponse(&'a str),
}

/// Longer ids are nobody's.
const MAX_ID_BYTES: usize = 64;

impl<'a> Place<'a> {
    fn of_path(path: &'a str) -> Option<Self> {
        let mut parts = path.strip_prefix("/v1/")?.split('/');
        let kind = parts.next()?;
        let (id, action) = (parts.next(), parts.next());
        if parts.next().is_some() {
            return None;
        }
        let is_id = |id: &str| {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(is_plain)
        };
        if id.is_some_and(|id| !is_id(id)) {
            return None;
        }
        match (kind, id, action) {
            ("files", None, None) => Some(Self::Files),
            ("files", Some(id), None) => Some(Self::File(id)),
            ("files", Some(id), Some("content")) => Some(Self::Content(id)),
            ("batches", None, None) => Some(Self::Batches),
            ("batches", Some(id), None) => Some(Self::Batch(id)),
            ("batches", Some(id), Some("cancel")) => Some(Self::CancelBatch(id)),
            // Another path below /v1/responses is a call of its own, with a method of its own.
            ("responses", Some(id), None) if id.starts_with(responses::PREFIX) => {
                Some(Self::Response(id))
            }
            ("responses", Some(id), Some("cancel")) => Some(Self::CancelResponse(id)),
            _ => None,
        }
    }
}

/// Whether a path leads here.
pub(crate) fn has_path(path: &str) -> bool {
    Place::of_path(path).is_some()
}

/// Answers a request whose path leads here.
pub(crate) async fn serve(
    process: &Arc<Process>,
    watch: &Watch,
    head: &Parts,
    body: Source,
    who: &Who,
) -> Result<Reply, Reject> {
    let place = Place::of_path(head.uri.path()).ok_or(Reject::PathNotFound)?;
    // A rule said who may have a response. None says who may have files: where callers are known, those may.
    if !matches!(place, Place::Response(_) | Place::CancelResponse(_)) {
        who.is_let_in()?;
    }
    let owner = Owner::of(who, &head.headers);
    let query = head.uri.query().unwrap_or_default();
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    let store = process.jobs.store()?;
    match (place, &head.method) {
        (Place::Files, method) if *method == get => files::list(store, &owner, query).await,
        (Place::Files, method) if *method == post => {
            Box::pin(upload::upload(process, watch, &owner, &head.headers, body)).await
        }
        (Place::File(id), method) if *method == get => files::get(store, &owner, id).await,
        (Place::File(id), method) if *method == delete => files::delete(store, &owner, id).await,
        (Place::Content(id), method) if *method == get => files::content(store, &owner, id).await,
        (Place::Batches, method) if *method == get => batches::list(store, &owner, query).await,
        (Place::Batches, method) if *method == post => {
            batches::create(process, watch, &owner, &head.headers, body).await
        }
        (Place::Batch(id), method) if *method == get => batches::get(store, &owner, id).await,
        (Place::CancelBatch(id), method) if *method == post => {
            batches::cancel(process, &owner, id).await
        }
        (Place::Response(id), method) if *method == get => {
            responses::get(store, &owner, id, query).await
        }
        (Place::Response(id), method) if *method == delete => {
            responses::delete(store, &owner, id).await
        }
        (Place::CancelResponse(id), method) if *method == post => {
            responses::cancel(process, &owner, id).await
        }
        _ => Err(Reject::MethodNotAllowed {
            allowed: allowed(place),
        }),
    }
}

fn allowed(place: Place<'_>) -> &'static str {
    match place {
        Place::Files | Place::Batches => "GET, POST",
        Place::File(_) | Place::Response(_) => "GET, DELETE",
        Place::Content(_) | Place::Batch(_) => "GET",
        Place::CancelBatch(_) | Place::CancelResponse(_) => "POST",
    }
}

/// The value of a member of a query; what callers send here needs no escapes.
fn queried<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let mut members = query.split('&').filter_map(|member| member.split_once('='));
    members
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

/// A number of a query, up to `most`.
fn limit(query: &str, usual: usize, most: usize) -> Result<usize, Reject> {
    match queried(query, "limit") {
        None => Ok(usual),
        Some(text) => match text.parse() {
            Ok(limit @ 1..) => Ok(most.min(limit)),
            _ => Err(invalid("limit", "a number from 1")),
        },
    }
}

fn invalid(param: &str, expected: &'static str) -> Reject {
    Reject::InvalidField {
        param: param.to_owned(),
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_places() {
        for (path, place) in [
            ("/v1/files", Some(Place::Files)),
            ("/v1/files/file-1", Some(Place::File("file-1"))),
            ("/v1/files/file-1/content", Some(Place::Content("file-1"))),
            ("/v1/batches", Some(Place::Batches)),
            ("/v1/batches/b_1/cancel", Some(Place::CancelBatch("b_1"))),
            ("/v1/responses/resp_1", Some(Place::Response("resp_1"))),
            (
                "/v1/responses/resp_1/cancel",
                Some(Place::CancelResponse("resp_1")),
            ),
            ("/v1/responses", None),
            ("/v1/responses/input_tokens", None),
            ("/v1/files/", None),
            ("/v1/files/a%2f", None),
            ("/v1/files/a/content/b", None),
            ("/v1/files/a/b", None),
            ("/v1/batch", None),
        ] {
            assert_eq!(Place::of_path(path), place, "{path}");
        }
    }

    #[test]
    fn queries_have_limits() {
        assert_eq!(limit("after=a&limit=7", 20, 100), Ok(7));
        assert_eq!(limit("limit=700", 20, 100), Ok(100));
        assert_eq!(limit("", 20, 100), Ok(20));
        assert!(limit("limit=0", 20, 100).is_err());
        assert!(limit("limit=x", 20, 100).is_err());
    }
}
