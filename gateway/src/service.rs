//! (IO) Requests to backends that speak plain HTTP: agents and tools. They are matched by path, method and headers,
//! chosen, repeated and counted like calls of models, and pass as they are: method, path and query to the byte, the
//! body as it came, the answer from its head on.

use std::sync::Arc;
use std::time::Duration;

use http::header::{TRAILER, UPGRADE};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, Method, Request, Response, Uri};
use penstock_core::config::{CallerCredentials, Repeat};

use crate::answers;
use crate::attempt::{self, Answer};
use crate::body::{self, Source};
use crate::budgets::reservation::Plan;
use crate::conditions::Asked;
use crate::failure::Failure;
use crate::guard::Watch;
use crate::job::{Job, MAX_REPLAY_BYTES};
use crate::openai::{self, Api, Call};
use crate::outbound::{self, Forwarded, Own};
use crate::passage::{self, Passage};
use crate::principal::Who;
use crate::process::{Process, Worker};
use crate::provider::translations::Translations;
use crate::record::{OK, REFUSED, Record};
use crate::reject::Reject;
use crate::snapshot::{Candidate, Credential, Endpoint, Rule};
use crate::stream::{AnswerBody, Limits, Stream};
use crate::upstream::RequestBody;
use crate::wish;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What of a request passes besides headers and body.
pub(crate) struct Passing<'a> {
    method: &'a Method,
    target: &'a PathAndQuery,
    forwarded: Forwarded,
    /// Its body, if that is not kept.
    pub(crate) passage: Option<Passage>,
    /// Whether it may be sent again once it, or part of it, went upstream.
    pub(crate) is_repeatable: bool,
}

/// Finds an endpoint that answers a request which is no call of a model.
pub(crate) async fn serve(
    worker: &Arc<Worker>,
    watch: &Arc<Watch>,
    head: &Parts,
    body: Source,
    record: &mut Record,
) -> Result<Answer, Reject> {
    let process = &worker.process;
    let path = head.uri.path();
    let target = head.uri.path_and_query().ok_or(Reject::PathNotFound)?;
    let region = process.region_of(watch.caller.address, &head.headers);
    let rule = rule(process, head, region, &record.who)?.ok_or(Reject::PathNotFound)?;
    record.api = Some(Api::Http);
    record.who.may_use(&rule.policy, rule.anonymous)?;
    if has_dot_segments(path) {
        return Err(Reject::DotSegments);
    }
    if target.as_str().len() > process.settings.limits.header_bytes {
        return Err(Reject::HeadersTooLarge);
    }
    if head.method == Method::CONNECT || wants_websocket(&head.headers) {
        return Err(Reject::UpgradeUnsupported);
    }
    record.admit()?;
    let most = MAX_REPLAY_BYTES.min(process.settings.limits.body_bytes);
    let (first, rest) = body::begin(process, watch, &head.headers, most, body).await?;
    let (body, _lease) = first.into_bytes();
    let limits = passage::Limits {
        idle: rule.idle,
        answer: rule.first_token,
        last: record.started + rule.total,
    };
    record.rule = Some(Arc::clone(&rule));
    let passing = Passing {
        method: &head.method,
        target,
        forwarded: Forwarded::new(&watch.caller, head),
        passage: rest.map(|rest| Passage::new(&head.headers, body.clone(), rest, limits, watch)),
        is_repeatable: is_repeatable(rule.repeat, &head.method, &head.headers),
    };
    let job = Job {
        worker,
        id: record.id.clone(),
        who: record.who.clone(),
        started: record.started,
        api: Api::Http,
        below: "",
        headers: &head.headers,
        region: process.elsewhere(region),
        body: &body,
        call: &Call::NONE,
        blocks: Vec::new(),
        key: wish::key(&rule, &head.headers, &Call::NONE, record.who.principal()),
        translated: Translations::default(),
        plan: plan(process, &record.who),
        passing: Some(&passing),
    };
    attempt::run(&job, record).await
}

/// What a request counts in that is no call of a model.
fn plan(process: &Process, who: &Who) -> Option<Plan> {
    let snapshot = process.snapshot.load();
    Plan::of_passing(&snapshot.as_ref()?.budgets, who.principal())
}

/// The rule that takes a request which is no call of a model.
fn rule(
    process: &Process,
    head: &Parts,
    region: Option<&str>,
    who: &Who,
) -> Result<Option<Arc<Rule>>, Reject> {
    let asked = Asked {
        method: &head.method,
        path: head.uri.path(),
        headers: &head.headers,
        region,
        principal: who.principal(),
        call: &Call::NONE,
        tasks: &[],
    };
    match process.snapshot.load().as_deref() {
        None => Err(Reject::NotConfigured),
        Some(snapshot) => Ok(snapshot.service_for(&asked).cloned()),
    }
}

/// The call of a model that a request is whose path is none of the known ones, and that no rule for HTTP backends
/// takes; `None` if it is no call either.
pub(crate) fn beside(
    process: &Process,
    watch: &Watch,
    head: &Parts,
    who: &Who,
) -> Result<Option<Api>, Reject> {
    let path = head.uri.path();
    let call = Api::beside(path).filter(|_| head.method == Method::POST);
    let Some((api, _)) = call else {
        return Ok(None);
    };
    let region = process.region_of(watch.caller.address, &head.headers);
    if rule(process, head, region, who)?.is_some() {
        return Ok(None);
    }
    if has_dot_segments(path) {
        return Err(Reject::DotSegments);
    }
    Ok(Some(api))
}

/// Whether carrying a request out twice does no harm, as far as its rule says.
fn is_repeatable(repeat: Repeat, method: &Method, headers: &HeaderMap) -> bool {
    let is_safe = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE].contains(method);
    match repeat {
        Repeat::Safe => is_safe,
        Repeat::Keyed => is_safe || headers.contains_key(IDEMPOTENCY_KEY),
        Repeat::Always => true,
    }
}

/// Whether a backend may take the path for another one than the rule was matched by. Backends differ in what they
/// decode first, so every spelling counts.
fn has_dot_segments(path: &str) -> bool {
    if !path.contains('.') && !path.contains('%') {
        return false;
    }
    let plain = path
        .to_ascii_lowercase()
        .replace("%2e", ".")
        .replace("%2f", "/")
        .replace("%5c", "/")
        .replace('\\', "/");
    plain
        .split('/')
        .filter_map(|segment| segment.split(';').next())
        .any(|segment| matches!(segment, "." | ".."))
}

/// Other upgrades are offers, which may be left unanswered (RFC 9110, 7.8); without this one its caller has no use
/// for an answer.
fn wants_websocket(headers: &HeaderMap) -> bool {
    headers
        .get_all(UPGRADE)
        .iter()
        .any(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// What goes upstream.
pub(crate) fn request(
    job: &Job<'_>,
    passing: &Passing<'_>,
    candidate: &Candidate,
    endpoint: &Endpoint,
) -> Request<RequestBody> {
    let own = Own {
        host: &endpoint.host,
        credential: match &candidate.backend.credential {
            Credential::Header(name, value) => Some((name, value)),
            Credential::None | Credential::Missing | Credential::Signed(_) => None,
        },
        via: &job.worker.process.via,
        id: &job.id,
    };
    let keeps_credentials = candidate.backend.caller_credentials == CallerCredentials::Passed;
    let body = match &passing.passage {
        None => RequestBody::Whole(openai::unpatched(job.body.clone())),
        Some(passage) => RequestBody::Passage(passage.clone()),
    };
    let has_length = body.length().is_some();
    let mut request = Request::new(body);
    *request.method_mut() = passing.method.clone();
    *request.uri_mut() = Uri::from(passing.target.clone());
    let mut headers =
        outbound::to_service(job.headers, &own, keeps_credentials, &passing.forwarded);
    if has_length {
        // Nothing follows what is kept.
        headers.remove(TRAILER);
    }
    *request.headers_mut() = headers;
    request
}

/// What the caller is told when this was the last attempt. What no model said passes as it is.
pub(crate) fn conclude(job: &Job<'_>, last: Failure) -> Result<Answer, Reject> {
    match last {
        Failure::Status { head, bytes } if job.passing.is_some() => {
            Ok(Answer::Refused { head, bytes })
        }
        failure => failure.conclude(),
    }
}

/// The answer to the caller.
pub(crate) fn answered(
    worker: &Arc<Worker>,
    answer: Answer,
    is_head: bool,
    mut record: Box<Record>,
) -> Response<AnswerBody> {
    let keeps_cookies = record
        .candidate()
        .is_some_and(|candidate| candidate.backend.caller_credentials == CallerCredentials::Passed);
    let (mut head, body) = match answer {
        Answer::Refused { head, bytes } => {
            record.status = head.status().as_u16();
            (head, AnswerBody::whole(bytes, REFUSED, record))
        }
        Answer::Whole { head, bytes, .. } => {
            record.status = head.status().as_u16();
            record.completed(false, penstock_shell::clock::now());
            (head, AnswerBody::whole(bytes, OK, record))
        }
        Answer::Stream { head, begun } => {
            record.status = head.status().as_u16();
            let limits = record.rule.as_ref().map(|rule| (rule.idle, rule.total));
            let (idle, total) = limits.unwrap_or((Duration::ZERO, Duration::ZERO));
            let last = record.started + total;
            let stream = Stream::new(worker, begun, Limits { idle, last }, record);
            (head, AnswerBody::Stream(Box::new(stream)))
        }
    };
    let is_streamed = matches!(body, AnswerBody::Stream(_));
    outbound::answer_of_service(head.headers_mut(), is_streamed || is_head, keeps_cookies);
    answers::respond(head, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_may_be_resolved_otherwise_are_seen() {
        for path in [
            "/a/../b",
            "/a/..",
            "/./a",
            "/a/%2e%2E/b",
            "/a/.%2e",
            "/a/..%2fb",
            "/a%5c..%5Cb",
            "/a/..\\b",
            "/a/..;x=y/b",
        ] {
            assert!(has_dot_segments(path), "{path}");
        }
        for path in [
            "/",
            "/a.b/c..d",
            "/.well-known/x",
            "/a/...",
            "/a%20b",
            "/v1.0/x",
        ] {
            assert!(!has_dot_segments(path), "{path}");
        }
    }

    #[test]
    fn what_may_be_repeated_is_what_the_rule_says() {
        let mut keyed = HeaderMap::new();
        keyed.insert(IDEMPOTENCY_KEY, "1".try_into().unwrap());
        let plain = HeaderMap::new();
        for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
            assert!(!is_repeatable(Repeat::Safe, &method, &keyed));
            assert!(!is_repeatable(Repeat::Keyed, &method, &plain));
            assert!(is_repeatable(Repeat::Keyed, &method, &keyed));
            assert!(is_repeatable(Repeat::Always, &method, &plain));
        }
        for method in [Method::GET, Method::HEAD, Method::OPTIONS] {
            assert!(is_repeatable(Repeat::Safe, &method, &plain));
        }
    }
}
