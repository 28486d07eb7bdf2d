//! The answer to a caller: the head and the body that become of what was done with its request.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version};
use penstock_core::names::{
    ATTEMPTS_HEADER, BACKEND_HEADER, CACHE_HEADER, DECISION_HEADER, ENGINE_HEADER, EXPLAIN_HEADER,
};

use crate::attempt::Answer;
use crate::cache::exact::{Entry, Key};
use crate::failure;
use crate::jobs::{EVENTS, Reply, ReplyBody};
use crate::media_type::is_event_stream;
use crate::openai::{Api, Wire};
use crate::outbound::{self, REQUEST_ID};
use crate::process::Worker;
use crate::record::{OK, REFUSED, Record};
use crate::reject::Reject;
use crate::resume;
use crate::service;
use crate::snapshot::Rule;
use crate::stopping::Stopping;
use crate::stream::{AnswerBody, Fill, Limits, Stream};

const BACKEND: HeaderName = HeaderName::from_static(BACKEND_HEADER);
const CACHE: HeaderName = HeaderName::from_static(CACHE_HEADER);
const EXPLAIN: HeaderName = HeaderName::from_static(EXPLAIN_HEADER);
const ATTEMPTS: HeaderName = HeaderName::from_static(ATTEMPTS_HEADER);
const DECISION: HeaderName = HeaderName::from_static(DECISION_HEADER);
const ENGINE: HeaderName = HeaderName::from_static(ENGINE_HEADER);
/// nginx and those that follow it.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// What became of a request that was not refused.
pub(crate) enum Done {
    /// An answer from a backend, and where to store it.
    Answer(Answer, Option<Store>),
    /// An answer from a backend that is no model.
    Passed(Answer),
    /// A stored answer.
    Stored(Arc<Entry>),
    /// The list of models.
    Models(Bytes),
    /// About a job or a file.
    Job(Reply),
}

/// Where an answer shall be stored.
pub(crate) struct Store {
    pub(crate) rule: Arc<Rule>,
    pub(crate) key: Key,
}

/// What every answer says of its request.
pub(crate) struct Close {
    /// The request's id.
    pub(crate) id: HeaderValue,
    /// Whether the connection ends with it.
    pub(crate) is_last: bool,
    /// Whether its caller may come back to it. Jobs keep their answers themselves.
    pub(crate) may_come_back: bool,
}

impl Close {
    /// The answer, with all that a caller may want to know of it.
    pub(crate) fn finish(
        &self,
        worker: &Arc<Worker>,
        head: &http::request::Parts,
        done: Result<Done, Reject>,
        record: Box<Record>,
    ) -> Response<AnswerBody> {
        let told = head
            .headers
            .contains_key(EXPLAIN)
            .then(|| record.told())
            .flatten();
        let cache = record.cache();
        let backend = record
            .candidate()
            .map(|candidate| candidate.backend.label.clone());
        let mut response = match done {
            Ok(Done::Answer(answer, store)) => answered(worker, answer, store, record),
            Ok(Done::Passed(answer)) => {
                let is_head = head.method == Method::HEAD;
                service::answered(worker, answer, is_head, record)
            }
            Ok(Done::Stored(entry)) => stored(&entry, record),
            Ok(Done::Models(bytes)) => listed(bytes, record),
            Ok(Done::Job(reply)) => replied(reply, record),
            Err(reject) => refused(&reject, record),
        };
        if self.may_come_back {
            response = resume::keep(worker, &head.headers, response);
        }
        let headers = response.headers_mut();
        if let Some(backend) = backend {
            headers.insert(BACKEND, backend);
        }
        if let Some((attempts, decision)) = told {
            headers.insert(ATTEMPTS, attempts);
            headers.insert(DECISION, decision);
        }
        if let Some(cache) = cache {
            headers.insert(CACHE, HeaderValue::from_static(cache));
        }
        self.sign(headers, head.version);
        response
    }

    /// The head of an event stream of which nothing is known yet.
    pub(crate) fn early(&self, version: Version) -> Response<()> {
        let mut head = Response::new(());
        let headers = head.headers_mut();
        let events = HeaderValue::from_static("text/event-stream");
        headers.insert(CONTENT_TYPE, events);
        keep_events_flowing(headers);
        self.sign(headers, version);
        head
    }

    fn sign(&self, headers: &mut HeaderMap, version: Version) {
        headers.insert(REQUEST_ID, self.id.clone());
        if self.is_last && version < Version::HTTP_2 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

fn listed(models: Bytes, mut record: Box<Record>) -> Response<AnswerBody> {
    record.status = 200;
    let mut response = Response::new(AnswerBody::whole(models, OK, record));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

fn replied(reply: Reply, mut record: Box<Record>) -> Response<AnswerBody> {
    record.status = reply.status;
    let body = match reply.body {
        ReplyBody::Whole(bytes) => AnswerBody::whole(bytes, OK, record),
        ReplyBody::Stream(pieces) => AnswerBody::Stored {
            pieces: Some(pieces),
            wire: (reply.content_type == EVENTS)
                .then(|| record.api.map_or(Wire::Responses, Api::wire)),
            stopping: Stopping::default(),
            record,
        },
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::OK);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    keep_events_flowing(headers);
    response
}

fn refused(reject: &Reject, mut record: Box<Record>) -> Response<AnswerBody> {
    let dialect = record.api.map(Api::dialect).unwrap_or_default();
    let (status, headers, bytes) = reject.parts(dialect);
    record.rejected(reject, status.as_u16());
    let label = reject.label();
    let mut response = Response::new(AnswerBody::whole(Bytes::from(bytes), label, record));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn stored(entry: &Entry, mut record: Box<Record>) -> Response<AnswerBody> {
    record.status = 200;
    let mut response = Response::new(AnswerBody::whole(entry.body.clone(), OK, record));
    let headers = response.headers_mut();
    headers.extend(entry.headers.iter().cloned());
    keep_events_flowing(headers);
    if let Ok(backend) = HeaderValue::from_str(&entry.backend.to_string()) {
        headers.insert(BACKEND, backend);
    }
    response
}

fn answered(
    worker: &Arc<Worker>,
    from: Answer,
    store: Option<Store>,
    mut record: Box<Record>,
) -> Response<AnswerBody> {
    match from {
        Answer::Refused { mut head, bytes } => {
            if let Some(reject) = failure::refusal(head.status(), &bytes) {
                return refused(&reject, record);
            }
            if head.status() == StatusCode::SERVICE_UNAVAILABLE {
                // Of all backends, or another one would have been asked.
                let headers = head.headers_mut().entry(RETRY_AFTER);
                headers.or_insert(HeaderValue::from_static("1"));
            }
            record.status = head.status().as_u16();
            passed_on(head, false, AnswerBody::whole(bytes, REFUSED, record))
        }
        Answer::Whole { head, bytes, usage } => {
            record.status = head.status().as_u16();
            record.usage = usage;
            record.completed(false, penstock_shell::clock::now());
            if let Some((store, entry)) = storable(&head, store, &record) {
                let now_ms = worker.process.ms(penstock_shell::clock::now());
                if let Some((_, cache)) = &store.rule.cache {
                    cache.put(
                        store.key,
                        Entry {
                            usage,
                            body: copied(&bytes),
                            ..entry
                        },
                        now_ms,
                    );
                }
            }
            passed_on(head, false, AnswerBody::whole(bytes, OK, record))
        }
        Answer::Stream { head, begun } => {
            record.status = head.status().as_u16();
            let fill = storable(&head, store, &record).and_then(|(store, entry)| {
                let (_, cache) = store.rule.cache.as_ref()?;
                Some(Fill::new(store.key, Arc::clone(cache), entry))
            });
            let (idle, total) = record
                .rule
                .as_ref()
                .map_or((Duration::ZERO, Duration::ZERO), |rule| {
                    (rule.idle, rule.total)
                });
            let last = record.started + total;
            let keeps_length = begun.events.is_none();
            let mut stream = Stream::new(worker, begun, Limits { idle, last }, record);
            if let Some(fill) = fill {
                stream.fill(fill);
            }
            passed_on(head, keeps_length, AnswerBody::Stream(Box::new(stream)))
        }
    }
}

/// A slice keeps the whole read buffer that it came in; a stored answer must cost what it counts.
fn copied(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

/// Whether and as what an answer may be stored: 200, and made by a first choice, since no other is served.
fn storable(head: &Response<()>, store: Option<Store>, record: &Record) -> Option<(Store, Entry)> {
    let store = store?;
    let candidate = record.candidate()?;
    if head.status() != StatusCode::OK || record.tier() != Some(0) {
        return None;
    }
    let headers = [CONTENT_TYPE, ENGINE]
        .into_iter()
        .filter_map(|name| {
            head.headers()
                .get(&name)
                .cloned()
                .map(|value| (name, value))
        })
        .collect();
    let entry = Entry {
        backend: candidate.backend.id.clone(),
        maker: candidate.maker,
        headers,
        usage: None,
        body: Bytes::new(),
    };
    Some((store, entry))
}

/// Proxies between here and the caller shall neither collect events nor compress them.
fn keep_events_flowing(headers: &mut HeaderMap) {
    if is_event_stream(headers) {
        headers.insert(
            CACHE_CONTROL,
            HeaderValue::from_static("no-cache, no-transform"),
        );
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    }
}

fn passed_on(mut head: Response<()>, keeps_length: bool, body: AnswerBody) -> Response<AnswerBody> {
    outbound::answer(head.headers_mut(), keeps_length);
    respond(head, body)
}

/// An answer to the caller with the head that its backend gave it, as far as that may pass.
pub(crate) fn respond(head: Response<()>, body: AnswerBody) -> Response<AnswerBody> {
    let (mut parts, ()) = head.into_parts();
    keep_events_flowing(&mut parts.headers);
    // Extensions belong to the connection that the answer came on.
    parts.extensions.clear();
    parts.version = http::Version::HTTP_11;
    Response::from_parts(parts, body)
}
