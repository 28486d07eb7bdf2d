//! (IO) The request, as a story: recognise it, admit it, read it, match its rule, look into the cache, find an
//! endpoint that answers, pass the answer on. Each step is one call; each refusal is a [`Reject`].

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use penstock_core::names::{
    ATTEMPTS_HEADER, BACKEND_HEADER, CACHE_HEADER, DECISION_HEADER, ENGINE_HEADER, EXPLAIN_HEADER,
};

use crate::attempt::{self, Answer};
use crate::begin::is_event_stream;
use crate::body::{self, Source};
use crate::cache::exact::{self, Entry, Key};
use crate::classifier;
use crate::conditions::Asked;
use crate::failure;
use crate::guard::Watch;
use crate::job::Job;
use crate::jobs::{self, Reply, ReplyBody};
use crate::join;
use crate::multipart;
use crate::openai::{Api, Call, Dialect, MAX_MODEL_BYTES, Wanted};
use crate::outbound::{self, REQUEST_ID};
use crate::process::{Process, Worker};
use crate::provider::translations::Translations;
use crate::record::{OK, REFUSED, Record};
use crate::reject::Reject;
use crate::reshape::{Reshaped, reshape};
use crate::service;
use crate::snapshot::{NoRule, Rule, Snapshot};
use crate::stream::{AnswerBody, Fill, Limits, Stream};
use crate::tasks::TaskSet;
use crate::wish;

const BACKEND: HeaderName = HeaderName::from_static(BACKEND_HEADER);
const CACHE: HeaderName = HeaderName::from_static(CACHE_HEADER);
const EXPLAIN: HeaderName = HeaderName::from_static(EXPLAIN_HEADER);
const ATTEMPTS: HeaderName = HeaderName::from_static(ATTEMPTS_HEADER);
const DECISION: HeaderName = HeaderName::from_static(DECISION_HEADER);
const ENGINE: HeaderName = HeaderName::from_static(ENGINE_HEADER);
/// nginx and those that follow it.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// Longer request ids of callers are replaced.
const MAX_REQUEST_ID_BYTES: usize = 128;
const HIT: &str = "hit";
const MISS: &str = "miss";
const BYPASS: &str = "bypass";

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Call(Api),
    Jobs,
    Models,
    /// Anything else: a backend that is no model may have it.
    Other,
}

/// What became of a request that was not refused.
enum Done {
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
struct Store {
    rule: Arc<Rule>,
    key: Key,
}

/// Answers one request. Dropping the future is how a caller leaves.
pub(crate) async fn handle(
    worker: Arc<Worker>,
    watch: Arc<Watch>,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Infallible> {
    let (head, body) = request.into_parts();
    Ok(answer(worker, watch, head, Source::Coming(body)).await)
}

/// Answers one request, a caller's or a job's.
pub(crate) async fn answer(
    worker: Arc<Worker>,
    watch: Arc<Watch>,
    head: http::request::Parts,
    body: Source,
) -> Response<AnswerBody> {
    let id = request_id(&worker, &head.headers);
    let mut record = Box::new(Record::open(
        &worker,
        &watch,
        id.clone(),
        penstock_shell::clock::now(),
    ));
    let is_doubtful = watch.is_next_doubtful() || is_encoded_twice(&head.headers);
    let done = if is_doubtful {
        Err(Reject::AmbiguousLength)
    } else {
        serve(&worker, &watch, &head, body, &mut record).await
    };
    // Where the next request begins is in doubt too.
    let is_last = is_doubtful || worker.process.is_draining();
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
        Ok(Done::Answer(answer, store)) => answered(&worker, answer, store, record),
        Ok(Done::Passed(answer)) => {
            let is_head = head.method == Method::HEAD;
            service::answered(&worker, answer, is_head, record)
        }
        Ok(Done::Stored(entry)) => stored(&entry, record),
        Ok(Done::Models(bytes)) => {
            record.status = 200;
            let mut response = Response::new(AnswerBody::whole(bytes, OK, record));
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Ok(Done::Job(reply)) => replied(reply, record),
        Err(reject) => refused(&reject, record),
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
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
    if is_last && head.version < Version::HTTP_2 {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Whether the body is more than cut into chunks. The parser takes any list of codings that ends in `chunked`.
fn is_encoded_twice(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    codings.next().is_some_and(|coding| !is_chunked(coding)) || codings.next().is_some()
}

/// The caller's id, if it is usable, else a new one.
fn request_id(worker: &Worker, headers: &HeaderMap) -> HeaderValue {
    headers
        .get(REQUEST_ID)
        .filter(|id| !id.is_empty() && id.len() <= MAX_REQUEST_ID_BYTES && id.to_str().is_ok())
        .cloned()
        .unwrap_or_else(|| worker.request_id())
}

async fn serve(
    worker: &Arc<Worker>,
    watch: &Arc<Watch>,
    head: &http::request::Parts,
    body: Source,
    record: &mut Record,
) -> Result<Done, Reject> {
    let process = &worker.process;
    record.api = Api::of_path(head.uri.path());
    let path = recognise(&head.method, head.uri.path())?;
    check_headers(process, &head.headers, path == Path::Other)?;
    let api = match path {
        Path::Models => {
            let snapshot = process.snapshot.load();
            let models = &snapshot.as_ref().ok_or(Reject::NotConfigured)?.models;
            let listed = match outbound::speaks(&head.headers) {
                Dialect::OpenAi => &models.openai,
                Dialect::Anthropic => &models.anthropic,
            };
            return Ok(Done::Models(listed.clone()));
        }
        Path::Jobs => {
            record.admit()?;
            let reply = Box::pin(jobs::serve(process, watch, head, body)).await?;
            return Ok(Done::Job(reply));
        }
        Path::Other => {
            let answer = service::serve(worker, watch, head, body, record).await?;
            return Ok(Done::Passed(answer));
        }
        Path::Call(api) => api,
    };
    call(worker, watch, head, body, api, record).await
}

/// A call of a model.
async fn call(
    worker: &Arc<Worker>,
    watch: &Arc<Watch>,
    head: &http::request::Parts,
    body: Source,
    api: Api,
    record: &mut Record,
) -> Result<Done, Reject> {
    let process = &worker.process;
    record.admit()?;
    let (body, _lease) = body::read(process, watch, &head.headers, body).await?;
    let call = read_call(&head.headers, &body)?;
    record.set_model(&call.model);
    let from = process.region_of(watch.caller.address, &head.headers);
    let asked = Asked {
        method: &head.method,
        path: head.uri.path(),
        headers: &head.headers,
        region: from,
        call: &call,
        tasks: &[],
    };
    let rule = classifier::rule(worker, &asked).await?;
    record.rule = Some(Arc::clone(&rule));
    let reshaped = reshape(&rule, api, &call, &body)?;
    if call.wanted == Wanted::Later && api == Api::Responses {
        let accepted = jobs::accept(process, &head.headers, &call.model, call.stream, &body);
        return Ok(Done::Job(Box::pin(accepted).await?));
    }
    let added = reshaped.as_ref().map_or(0, |new| new.body.len());
    let _lease = process.lease_body(added).ok_or(Reject::Overloaded)?;
    let (body, call) = match &reshaped {
        Some(Reshaped { body, changes }) => {
            record.changes.clone_from(changes);
            (body, Call::parse(body)?)
        }
        None => (&body, call),
    };
    let store = match look_up(process, &rule, api, &head.headers, body, record) {
        Lookup::Stored(entry) => return Ok(Done::Stored(entry)),
        Lookup::Missing(store) => store,
    };
    let blocks = wish::blocks(&rule, &call);
    let job = Job {
        worker,
        id: record.id.clone(),
        started: record.started,
        api,
        headers: &head.headers,
        region: process.elsewhere(from),
        body,
        call: &call,
        blocks,
        key: wish::key(&rule, &head.headers, &call),
        translated: Translations::default(),
        passing: None,
    };
    let answer = match join::answer(&job, record, &rule).await {
        Some(answer) => answer,
        None => attempt::run(&job, record).await?,
    };
    Ok(Done::Answer(answer, store))
}

fn read_call<'a>(headers: &HeaderMap, body: &'a [u8]) -> Result<Call<'a>, Reject> {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    match content_type.and_then(multipart::boundary) {
        Some(boundary) => Call::of_form(body, boundary).ok_or(Reject::MissingModel),
        None => Ok(Call::parse(body)?),
    }
}

fn recognise(method: &Method, path: &str) -> Result<Path, Reject> {
    let (path, allowed) = match (Api::of_path(path), path) {
        (Some(api), _) => (Path::Call(api), Method::POST),
        // Each place there has methods of its own.
        (None, path) if jobs::has_path(path) => return Ok(Path::Jobs),
        (None, "/v1/models") => (Path::Models, Method::GET),
        (None, _) => return Ok(Path::Other),
    };
    match (*method == allowed, path) {
        (true, path) => Ok(path),
        (false, Path::Call(_)) => Err(Reject::MethodNotAllowed { allowed: "POST" }),
        (false, Path::Models | Path::Jobs) => Err(Reject::MethodNotAllowed { allowed: "GET" }),
        (false, Path::Other) => Ok(Path::Other),
    }
}

/// The body of a call must be readable here, so it may not be encoded; others pass as they are.
fn check_headers(
    process: &Process,
    headers: &HeaderMap,
    may_be_encoded: bool,
) -> Result<(), Reject> {
    let limits = &process.settings.limits;
    let bytes: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum();
    if headers.len() > limits.headers || bytes > limits.header_bytes {
        return Err(Reject::HeadersTooLarge);
    }
    if !may_be_encoded
        && headers
            .get(CONTENT_ENCODING)
            .is_some_and(|encoding| encoding != "identity")
    {
        return Err(Reject::EncodedBody);
    }
    if outbound::passed(headers, &process.via_token) {
        return Err(Reject::LoopDetected);
    }
    Ok(())
}

/// Why no rule takes a request, or none yet.
pub(crate) enum NoMatch {
    Reject(Reject),
    /// It depends on which of these tasks the request is about.
    Unclassified(Arc<TaskSet>),
}

impl From<Reject> for NoMatch {
    fn from(reject: Reject) -> Self {
        Self::Reject(reject)
    }
}

/// The rule that takes a request, as far as is known what it is about.
pub(crate) fn match_rule(
    snapshot: Option<&Snapshot>,
    asked: &Asked<'_>,
) -> Result<Arc<Rule>, NoMatch> {
    let snapshot = snapshot.ok_or(Reject::NotConfigured)?;
    let model = &asked.call.model;
    let rule = if model.len() > MAX_MODEL_BYTES {
        Err(NoRule::Model)
    } else {
        snapshot.rule_for(asked)
    };
    let model = || model.to_string();
    rule.cloned().map_err(|none| match none {
        NoRule::Model => Reject::ModelNotFound { model: model() }.into(),
        NoRule::Conditions => Reject::NoRule { model: model() }.into(),
        NoRule::Unclassified(set) => NoMatch::Unclassified(set),
    })
}

enum Lookup {
    Stored(Arc<Entry>),
    Missing(Option<Store>),
}

/// Looks into the rule's cache. A stored answer counts only while its backend, as it was then, is a first choice.
fn look_up(
    process: &Process,
    rule: &Arc<Rule>,
    api: Api,
    headers: &HeaderMap,
    body: &[u8],
    record: &mut Record,
) -> Lookup {
    let Some((name, cache)) = &rule.cache else {
        return Lookup::Missing(None);
    };
    let bypasses = headers
        .get_all(CACHE_CONTROL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| {
            value.split(',').any(|directive| {
                let directive = directive.trim();
                directive.eq_ignore_ascii_case("no-store")
                    || directive.eq_ignore_ascii_case("no-cache")
            })
        });
    let key = if bypasses {
        None
    } else {
        exact::key(name, api.path(), body)
    };
    let Some(key) = key else {
        record.set_cache(BYPASS);
        return Lookup::Missing(None);
    };
    let now_ms = process.ms(record.started);
    let is_first_choice = |entry: &Entry| {
        rule.tiers.first().is_some_and(|tier| {
            tier.candidates.iter().any(|candidate| {
                candidate.backend.id == entry.backend && candidate.maker == entry.maker
            })
        })
    };
    if let Some(entry) = cache.get(&key, now_ms, is_first_choice) {
        record.set_cache(HIT);
        Lookup::Stored(entry)
    } else {
        record.set_cache(MISS);
        Lookup::Missing(Some(Store {
            rule: Arc::clone(rule),
            key,
        }))
    }
}

fn replied(reply: Reply, mut record: Box<Record>) -> Response<AnswerBody> {
    record.status = reply.status;
    let body = match reply.body {
        ReplyBody::Whole(bytes) => AnswerBody::whole(bytes, OK, record),
        ReplyBody::Stream(pieces) => AnswerBody::Stored {
            pieces: Some(pieces),
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
        Answer::Refused { head, bytes } => {
            if let Some(reject) = failure::refusal(head.status(), &bytes) {
                return refused(&reject, record);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_methods_are_recognised() {
        let recognise = |method: Method, path: &str| recognise(&method, path);
        assert_eq!(
            recognise(Method::POST, "/v1/chat/completions"),
            Ok(Path::Call(Api::Chat))
        );
        assert_eq!(
            recognise(Method::POST, "/v1/completions"),
            Ok(Path::Call(Api::Completions))
        );
        assert_eq!(recognise(Method::GET, "/v1/models"), Ok(Path::Models));
        assert_eq!(
            recognise(Method::GET, "/v1/completions"),
            Err(Reject::MethodNotAllowed { allowed: "POST" })
        );
        assert_eq!(
            recognise(Method::POST, "/v1/models"),
            Err(Reject::MethodNotAllowed { allowed: "GET" })
        );
        for path in ["/", "/v1/chat/completions/", "/v1/file", "/metrics"] {
            assert_eq!(recognise(Method::POST, path), Ok(Path::Other), "{path}");
        }
    }
}
