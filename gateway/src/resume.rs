//! (IO) Streams that callers may come back to, for rules with `resumable`. Each event has an id; the events are kept in
//! the store while they pass, and a caller who lost the connection gets the rest from any replica, with the id of the
//! last event in `Last-Event-ID`. A stream never waits for the store: one that cannot be kept passes as any other.

mod id;
mod kept;
mod log;
mod metrics;
mod numbering;
mod rest;
mod sequence;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, Response};
use prometheus_client::registry::Registry;

use crate::body::{self, Source};
use crate::guard::Watch;
use crate::jobs::{EVENTS, Owner, Reply, ReplyBody, new_id};
use crate::openai::Api;
use crate::process::{Process, Worker};
use crate::reject::Reject;
use crate::snapshot::{Rule, Snapshot};
use crate::store::{Error, Store};
use crate::stream::{AnswerBody, Stream};

use id::{EventId, Told};
use kept::Flow;
pub(crate) use kept::Resumable;
use log::Head;
use metrics::{Kept, Metrics};
use numbering::Numbering;
use writer::Log;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Streams of a process that are kept at one time. Each has a task, and the store up to 20 writes a second of it.
const MAX_STREAMS: usize = 4_096;
const FORM: &str = "the id of an event, such as strm_0123456789abcdef0123456789abcdef:7";

/// What the process knows of such streams.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// Those that are kept now.
    kept: AtomicUsize,
    /// Bytes that wait for the store.
    waiting: AtomicUsize,
    /// The store failed the last stream that ended.
    is_away: AtomicBool,
    metrics: Metrics,
}

/// A stream among those that are kept; given back when dropped.
struct Place(Arc<Streams>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.kept.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts a stream that goes on without its caller.
struct Detached<'a>(&'a Streams);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        self.0.metrics.detached.dec();
    }
}

impl Streams {
    /// Registers its metrics.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        Self {
            metrics: Metrics::register(registry),
            ..Self::default()
        }
    }

    /// A place for one more stream, if fewer than `most` have one.
    fn place(self: &Arc<Self>, most: usize) -> Option<Place> {
        let before = self.kept.fetch_add(1, Ordering::AcqRel);
        let place = Place(Arc::clone(self));
        (before < most).then_some(place)
    }

    fn detached(&self) -> Detached<'_> {
        self.metrics.detached.inc();
        Detached(self)
    }

    /// Says so once, until the store works again.
    fn store_failed(&self, err: &Error) {
        if self.is_away.swap(true, Ordering::Relaxed) {
            tracing::debug!(error = %err, "a stream is not kept");
        } else {
            tracing::warn!(error = %err, "streams are not kept while the store fails");
        }
    }

    fn store_works(&self) {
        self.is_away.store(false, Ordering::Relaxed);
    }
}

/// The event after which a caller wants the rest of a stream; `None` for other requests. What is no id of this
/// gateway's may be meant for a backend: see [`check`].
pub(crate) fn asked(head: &Parts) -> Result<Option<EventId>, Reject> {
    let Some(value) = head.headers.get(LAST_EVENT_ID) else {
        return Ok(None);
    };
    if ![Method::POST, Method::GET].contains(&head.method) {
        return Ok(None);
    }
    match id::read(value.as_bytes()) {
        Told::Ours(id) => Ok(Some(id)),
        Told::Malformed => Err(malformed()),
        Told::Foreign => Ok(None),
    }
}

/// Refuses a call whose caller means to come back to a stream, but not by an id that its rule gave. It would be
/// answered anew, and paid for twice.
pub(crate) fn check(rule: &Rule, headers: &HeaderMap) -> Result<(), Reject> {
    if rule.resumable.is_some() && headers.contains_key(LAST_EVENT_ID) {
        return Err(malformed());
    }
    Ok(())
}

fn malformed() -> Reject {
    Reject::InvalidField {
        param: LAST_EVENT_ID.to_string(),
        expected: FORM,
    }
}

/// The events after `last`.
pub(crate) async fn rest(
    process: &Arc<Process>,
    watch: &Watch,
    head: &Parts,
    body: Source,
    api: Api,
    last: EventId,
    owner: Owner,
) -> Result<Reply, Reject> {
    let store = process.jobs.store()?;
    // It may say the request again and means nothing, but some clients read no answer before they have sent it.
    drop(body::read(process, watch, &head.headers, body).await?);
    let found = rest::find(store, &owner, api, &last).await;
    process.streams.metrics.resumed(found.is_ok());
    found?;
    Ok(Reply {
        status: 200,
        content_type: EVENTS,
        body: ReplyBody::Stream(rest::events(Arc::clone(store), api.wire(), last, None)),
    })
}

/// The events of a response after the one with the number `seen`, if they are kept here; the response is no job.
pub(crate) async fn of_response(
    store: &Arc<Store>,
    asker: &Owner,
    response: &str,
    seen: Option<u64>,
) -> Result<Option<Reply>, Reject> {
    let Some(stream) = rest::find_response(store, response).await? else {
        return Ok(None);
    };
    let first = EventId { stream, number: 0 };
    let api = Api::Responses;
    match rest::find(store, asker, api, &first).await {
        Err(Reject::StreamNotFound) => return Ok(None),
        found => found?,
    };
    let events = rest::events(Arc::clone(store), api.wire(), first, seen);
    Ok(Some(Reply {
        status: 200,
        content_type: EVENTS,
        body: ReplyBody::Stream(events),
    }))
}

/// Lets a caller come back to the answer, if it is a stream of a rule that says so.
pub(crate) fn keep(
    worker: &Arc<Worker>,
    headers: &HeaderMap,
    response: Response<AnswerBody>,
) -> Response<AnswerBody> {
    let AnswerBody::Stream(stream) = response.body() else {
        return response;
    };
    let Some((api, resumable)) = stream.resumable() else {
        return response;
    };
    response.map(|body| match body {
        AnswerBody::Stream(stream) => begin(worker, headers, stream, api, resumable),
        body => body,
    })
}

fn begin(
    worker: &Arc<Worker>,
    headers: &HeaderMap,
    stream: Box<Stream>,
    api: Api,
    resumable: Duration,
) -> AnswerBody {
    let process = &worker.process;
    let (store, place) = match room(process) {
        Ok(room) => room,
        Err(why) => {
            process.streams.metrics.kept(why);
            return AnswerBody::Stream(stream);
        }
    };
    let id = new_id(id::PREFIX);
    let head = Head::new(Owner::of(stream.who(), headers), api, resumable);
    AnswerBody::Resumable(Resumable::new(Flow {
        log: Log::begin(worker, store, place, id.clone(), head),
        numbering: Numbering::new(id.clone()),
        worker: Arc::clone(worker),
        store: Arc::clone(store),
        stream,
        id,
        resumable,
        given: None,
    }))
}

fn room(process: &Process) -> Result<(&Arc<Store>, Place), Kept> {
    let store = process.jobs.store().map_err(|_| Kept::NoStore)?;
    let place = process.streams.place(MAX_STREAMS).ok_or(Kept::TooMany)?;
    Ok((store, place))
}

/// Says of which rules streams cannot be kept, because there is no store; once for each config.
pub(crate) fn tell_unkept(process: &Process, next: &Snapshot, previous: Option<&Snapshot>) {
    let is_known = previous.is_some_and(|previous| previous.digest == next.digest);
    if process.jobs.has_store() || is_known {
        return;
    }
    let rules = next.config.rules.iter();
    for rule in rules.filter(|rule| rule.resumable_ms.is_some()) {
        tracing::warn!(
            rule = %format_args!("{}/{}", rule.policy, rule.name),
            "the rule says `resumable`, but this gateway has no store (--store): its streams end with their callers"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_the_limit_there_is_no_place_until_one_is_given_back() {
        let streams = Arc::new(Streams::default());
        let first = streams.place(2).unwrap();
        let _second = streams.place(2).unwrap();
        assert!(streams.place(2).is_none());
        drop(first);
        assert!(streams.place(2).is_some());
    }

    #[test]
    fn only_what_is_meant_for_this_gateway_is_read_as_its_id() {
        let asked = |method: Method, value: Option<&str>| {
            let mut request = http::Request::new(());
            *request.method_mut() = method;
            if let Some(value) = value {
                let headers = request.headers_mut();
                headers.insert(LAST_EVENT_ID, value.parse().unwrap());
            }
            asked(&request.into_parts().0)
        };
        let ours = "strm_0123456789abcdef0123456789abcdef:3";
        assert_eq!(asked(Method::POST, None), Ok(None));
        assert_eq!(asked(Method::POST, Some("7")), Ok(None));
        assert_eq!(asked(Method::POST, Some("strm_7")), Err(malformed()));
        for method in [Method::POST, Method::GET] {
            let id = asked(method, Some(ours)).unwrap().unwrap();
            assert_eq!(id.number, 3);
        }
        assert_eq!(asked(Method::DELETE, Some(ours)), Ok(None));
    }
}
