//! (IO) The request, as a story: recognise it, admit it, read it, match its rule, look into the cache, find an
//! endpoint that answers, pass the answer on. Each step is one call; each refusal is a [`Reject`].

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use hyper::body::Incoming;
use penstock_core::config::Urgency;

use crate::answers::{Close, Done, Store};
use crate::attempt::{self, Answer};
use crate::behalf::{self, Behalf};
use crate::body::{self, Source};
use crate::budgets::reservation::Plan;
use crate::budgets::{bound, call as budgets};
use crate::cache::exact::{self, Entry};
use crate::classifier;
use crate::conditions::Asked;
use crate::guard::Watch;
use crate::heartbeat::{self, Beats};
use crate::job::Job;
use crate::jobs::{self, Owner};
use crate::join;
use crate::models;
use crate::multipart;
use crate::openai::{Api, Call, MAX_MODEL_BYTES, Wanted};
use crate::outbound::{self, REQUEST_ID};
use crate::principal::Who;
use crate::process::{BodyLease, Process, Worker};
use crate::provider::translations::Translations;
use crate::record::Record;
use crate::reject::Reject;
use crate::request;
use crate::reshape::{Reshaped, reshape};
use crate::resume;
use crate::service;
use crate::snapshot::{NoRule, Rule, Snapshot};
use crate::stream::AnswerBody;
use crate::tasks::TaskSet;
use crate::wish;

/// Longer request ids of callers are replaced.
const MAX_REQUEST_ID_BYTES: usize = 128;
/// An answer is made shorter for one limit after the other, so often.
const MAX_SHORTER: usize = 4;
const HIT: &str = "hit";
const MISS: &str = "miss";
const BYPASS: &str = "bypass";

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Call(Api),
    Jobs,
    Models,
    Model,
    /// Anything else: a backend that is no model may have it.
    Other,
}

/// How far a request has come.
#[expect(
    clippy::large_enum_variant,
    reason = "one exists per request, and most are the large one"
)]
enum Step {
    Done(Done),
    /// Its caller is to be told that it is under way.
    Waits(Box<Waiting>),
}

impl From<Done> for Step {
    fn from(done: Done) -> Self {
        Self::Done(done)
    }
}

/// A call whose rule is found, and whose stream has heartbeats.
struct Waiting {
    every: Duration,
    api: Api,
    body: Bytes,
    rule: Arc<Rule>,
    _lease: BodyLease,
}

/// A call whose rule is found.
struct Matched<'a> {
    api: Api,
    body: &'a Bytes,
    call: Call<'a>,
    rule: Arc<Rule>,
    /// Where its caller is.
    region: Option<&'a str>,
}

/// Answers one request. Dropping the future is how a caller leaves.
pub(crate) async fn handle(
    worker: Arc<Worker>,
    watch: Arc<Watch>,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Infallible> {
    let (head, body) = request.into_parts();
    let body = Source::Coming(body);
    Ok(answer(worker, watch, head, body, Behalf::Caller).await)
}

/// Answers one request, a caller's or a job's.
pub(crate) async fn answer(
    worker: Arc<Worker>,
    watch: Arc<Watch>,
    mut head: http::request::Parts,
    body: Source,
    behalf: Behalf,
) -> Response<AnswerBody> {
    // A job keeps its answer itself.
    let may_come_back = matches!(body, Source::Coming(_));
    let id = request_id(&worker, &head.headers);
    let mut record = Box::new(Record::open(
        &worker,
        &watch,
        id.clone(),
        penstock_shell::clock::now(),
    ));
    if !may_come_back {
        // Callers wait, jobs do not.
        record.most_urgent = Urgency::Low;
    }
    let is_doubtful = watch.is_next_doubtful() || is_encoded_twice(&head.headers);
    let who = match &behalf {
        _ if is_doubtful => Err(Reject::AmbiguousLength),
        Behalf::Caller => behalf::identify(&worker.process, &mut head, watch.names()).await,
        behalf => behalf.who(&worker.process).await,
    };
    let step = match who {
        Ok(who) => {
            record.who = who;
            serve(&worker, &watch, &head, body, &mut record).await
        }
        Err(reject) => Err(reject),
    };
    let close = Close {
        // Where the next request begins is in doubt too.
        is_last: is_doubtful || worker.process.is_draining(),
        may_come_back,
        id,
    };
    match step {
        Ok(Step::Waits(waiting)) => {
            let beats = Beats {
                every: waiting.every,
                wire: waiting.api.wire(),
                has_ids: waiting.rule.resumable.is_some(),
            };
            let early = close.early(head.version);
            let own = Arc::clone(&worker);
            let answer = later(worker, watch, head, *waiting, close, record);
            heartbeat::beating(own, early, beats, Box::pin(answer)).await
        }
        Ok(Step::Done(done)) => close.finish(&worker, &head, Ok(done), record),
        Err(reject) => close.finish(&worker, &head, Err(reject), record),
    }
}

/// The rest of what [`answer`] does, after its caller was told that the call is under way.
async fn later(
    worker: Arc<Worker>,
    watch: Arc<Watch>,
    head: http::request::Parts,
    waiting: Waiting,
    close: Close,
    mut record: Box<Record>,
) -> Response<AnswerBody> {
    let done = match read_call(&head.headers, &waiting.body) {
        Ok(call) => {
            let matched = Matched {
                api: waiting.api,
                body: &waiting.body,
                call,
                rule: Arc::clone(&waiting.rule),
                region: worker
                    .process
                    .region_of(watch.caller.address, &head.headers),
            };
            routed(&worker, &head, matched, &mut record).await
        }
        Err(reject) => Err(reject),
    };
    close.finish(&worker, &head, done, record)
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
) -> Result<Step, Reject> {
    let process = &worker.process;
    record.api = Api::of_path(head.uri.path());
    if let Some(api) = record.api
        && let Some(last) = resume::asked(head)?
    {
        check_headers(process, &head.headers, true)?;
        record.admit()?;
        let owner = Owner::of(&record.who, &head.headers);
        let reply = resume::rest(process, watch, head, body, api, last, owner);
        return Ok(Done::Job(Box::pin(reply).await?).into());
    }
    let mut path = recognise(&head.method, head.uri.path())?;
    if path == Path::Other
        && let Some(api) = service::beside(process, watch, head, &record.who)?
    {
        record.api = Some(api);
        path = Path::Call(api);
    }
    check_headers(process, &head.headers, path == Path::Other)?;
    let api = match path {
        Path::Models | Path::Model => {
            return Ok(Done::Models(told(process, head, &record.who)?).into());
        }
        Path::Jobs => {
            record.admit()?;
            let reply = jobs::serve(process, watch, head, body, &record.who);
            let reply = Box::pin(reply).await?;
            return Ok(Done::Job(reply).into());
        }
        Path::Other => {
            let answer = service::serve(worker, watch, head, body, record).await?;
            return Ok(Done::Passed(answer).into());
        }
        Path::Call(api) => api,
    };
    call(worker, watch, head, body, api, record).await
}

/// The models that a caller may ask for, or one of them.
fn told(process: &Process, head: &http::request::Parts, who: &Who) -> Result<Bytes, Reject> {
    let snapshot = process.snapshot.load();
    let snapshot = snapshot.as_ref().ok_or(Reject::NotConfigured)?;
    if !snapshot.takes_strangers() {
        who.is_let_in()?;
    }
    let is_open = |model: &str, rule: usize| {
        let may_ask = who.principal().is_none_or(|of| of.may_ask_for(model));
        may_ask && snapshot.is_open(rule, who)
    };
    let dialect = outbound::speaks(&head.headers);
    let Some(part) = models::of_path(head.uri.path()) else {
        return Ok(snapshot.models.list(dialect, is_open));
    };
    let model = models::decoded(part);
    let one = snapshot.models.one(&model, dialect, is_open);
    one.ok_or(Reject::ModelNotFound { model })
}

/// A call of a model.
async fn call(
    worker: &Arc<Worker>,
    watch: &Arc<Watch>,
    head: &http::request::Parts,
    body: Source,
    api: Api,
    record: &mut Record,
) -> Result<Step, Reject> {
    let process = &worker.process;
    record.admit()?;
    let (body, lease) = body::read(process, watch, &head.headers, body).await?;
    let call = read_call(&head.headers, &body)?;
    record.asks(&call);
    let from = process.region_of(watch.caller.address, &head.headers);
    let asked = Asked {
        method: &head.method,
        path: head.uri.path(),
        headers: &head.headers,
        region: from,
        principal: record.who.principal(),
        call: &call,
        tasks: &[],
    };
    let rule = match classifier::rule(worker, &asked).await {
        // A rule may want to know who asks: a stranger is told that first.
        Err(reject @ Reject::NoRule { .. }) => {
            return Err(record.who.is_let_in().err().unwrap_or(reject));
        }
        found => found?,
    };
    record.rule = Some(Arc::clone(&rule));
    let who = &record.who;
    who.may_call(&rule.policy, rule.anonymous, &call.model)?;
    resume::check(&rule, &head.headers)?;
    if let Some(every) = rule.heartbeat.filter(|_| call.stream) {
        return Ok(Step::Waits(Box::new(Waiting {
            every,
            api,
            body,
            rule,
            _lease: lease,
        })));
    }
    let matched = Matched {
        api,
        body: &body,
        call,
        rule,
        region: from,
    };
    let done = routed(worker, head, matched, record).await?;
    Ok(done.into())
}

/// What follows when the rule is known.
async fn routed(
    worker: &Arc<Worker>,
    head: &http::request::Parts,
    matched: Matched<'_>,
    record: &mut Record,
) -> Result<Done, Reject> {
    let process = &worker.process;
    let Matched {
        api,
        body,
        call,
        rule,
        region,
    } = matched;
    let reshaped = reshape(&rule, api, &call, body)?;
    if call.wanted == Wanted::Later && api == Api::Responses {
        let accepted = jobs::accept(
            process,
            &record.who,
            &head.headers,
            &call.model,
            call.stream,
            body,
        );
        return Ok(Done::Job(Box::pin(accepted).await?));
    }
    let added = reshaped.as_ref().map_or(0, |new| new.body.len());
    let _added = process.lease_body(added).ok_or(Reject::Overloaded)?;
    let (body, call) = match &reshaped {
        Some(Reshaped { body, changes }) => {
            record.changes.clone_from(changes);
            (body, Call::parse(body)?)
        }
        None => (body, call),
    };
    let below = request::below(api, &head.uri);
    let (shares, bounded) = budgets::shares(process, &record.who, api, &call, body)?;
    let (body, call) = match &bounded {
        Some((bounded, changes)) => {
            record.changes.extend_from_slice(changes);
            (bounded, Call::parse(bounded)?)
        }
        None => (body, call),
    };
    let plan = Plan::of_call(shares, &rule, api, &call, body);
    let store = match look_up(process, &rule, &head.uri, &head.headers, body, record) {
        Lookup::Stored(entry) => {
            budgets::count_hit(worker, plan.as_ref(), &rule, &entry).await?;
            return Ok(Done::Stored(entry));
        }
        Lookup::Missing(store) => store,
    };
    let job = Job {
        worker,
        id: record.id.clone(),
        who: record.who.clone(),
        started: record.started,
        api,
        below: &below,
        headers: &head.headers,
        region: process.elsewhere(region),
        body,
        call: &call,
        blocks: wish::blocks(&rule, &call),
        key: wish::key(&rule, &head.headers, &call, record.who.principal()),
        translated: Translations::default(),
        plan,
        passing: None,
    };
    sent(&job, &rule, store, record).await
}

/// Sends a call to endpoints until one answers.
async fn sent(
    job: &Job<'_>,
    rule: &Rule,
    store: Option<Store>,
    record: &mut Record,
) -> Result<Done, Reject> {
    if let Some(answer) = join::answer(job, record, rule).await {
        return Ok(Done::Answer(answer, store));
    }
    let mut answer = attempt::run(job, record).await;
    let (mut store, mut longest) = (store, u32::MAX);
    for _ in 0..MAX_SHORTER {
        let Err(reject) = &answer else { break };
        let most = budgets::fits(reject, record).filter(|most| *most < longest);
        let Some(most) = most else { break };
        // Who asks the same when there is more left may have all of it.
        (store, longest) = (None, most);
        match Box::pin(shorter(job, rule, most, record)).await {
            Ok(None) => break,
            Ok(Some(shorter)) => answer = Ok(shorter),
            Err(reject) => answer = Err(reject),
        }
    }
    Ok(Done::Answer(answer?, store))
}

/// The same for an answer of `most` tokens; `None` if it was no longer before.
async fn shorter(
    job: &Job<'_>,
    rule: &Rule,
    most: u32,
    record: &mut Record,
) -> Result<Option<Answer>, Reject> {
    let Some((body, changes)) = bound::shorten(job.api, job.body, most)? else {
        return Ok(None);
    };
    record.start_over();
    record.changes.extend(changes);
    let call = Call::parse(&body)?;
    let job = job.with(rule, &body, &call);
    Ok(Some(attempt::run(&job, record).await?))
}

pub(crate) fn read_call<'a>(headers: &HeaderMap, body: &'a [u8]) -> Result<Call<'a>, Reject> {
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
        (None, path) if models::of_path(path).is_some() => (Path::Model, Method::GET),
        (None, _) => return Ok(Path::Other),
    };
    match (*method == allowed, path) {
        (true, path) => Ok(path),
        (false, Path::Call(_)) => Err(Reject::MethodNotAllowed { allowed: "POST" }),
        (false, Path::Models | Path::Model | Path::Jobs) => {
            Err(Reject::MethodNotAllowed { allowed: "GET" })
        }
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
    uri: &Uri,
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
    // What else its caller asks for where the path is the backend's own.
    let asks = Api::beside(uri.path()).and(uri.query()).is_some();
    let key = if bypasses || asks {
        None
    } else {
        let team = record.who.principal().map_or("", |of| of.team.as_str());
        exact::key(name, team, uri.path(), headers, body)
    };
    let Some(key) = key else {
        record.set_cache(BYPASS);
        return Lookup::Missing(None);
    };
    let now_ms = process.ms(record.started);
    let is_first_choice = |entry: &Entry| {
        rule.first_tier().is_some_and(|tier| {
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
        for path in ["/v1/models/chat", "/v1/models/org/a"] {
            assert_eq!(recognise(Method::GET, path), Ok(Path::Model));
        }
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
