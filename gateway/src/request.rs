//! A request as one endpoint gets it: its target, the headers that cross the gateway, the body with the backend's name
//! of the model. Pure.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Uri};

use crate::job::Job;
use crate::openai::{self, Api, Encoding, Pieces};
use crate::outbound::{self, Own};
use crate::provider::{Route, Translated, bedrock};
use crate::service;
use crate::snapshot::{Candidate, Credential, Endpoint};
use crate::stream_usage::{self, Asking};
use crate::upstream::RequestBody;

/// For `endpoint`, by `route`. `translated` is the body, if it is not the caller's; `asking` is what else changes in
/// it; `since_epoch` is now.
pub(crate) fn request(
    job: &Job<'_>,
    candidate: &Candidate,
    endpoint: &Endpoint,
    route: Route,
    translated: Option<&Translated>,
    asking: Option<&Asking>,
    since_epoch: Duration,
) -> Request<RequestBody> {
    if let Some(passing) = job.passing {
        return service::request(job, passing, candidate, endpoint);
    }
    let model = candidate.model_name(&job.call.model);
    let target = endpoint
        .targets
        .of(route.api(job.api), job.call.stream, model);
    let body = body(job, candidate, translated, asking);
    let mut request = Request::new(RequestBody::Whole(body));
    *request.method_mut() = Method::POST;
    // There is one: else the candidate would not have been chosen.
    *request.uri_mut() = with(target.unwrap_or_default(), job.below);
    *request.headers_mut() = headers(job, candidate, endpoint, route);
    if let (Credential::Signed(signer), Some(translated)) =
        (&candidate.backend.credential, translated)
    {
        let path = request.uri().path().to_owned();
        bedrock::sign(
            signer,
            request.headers_mut(),
            &path,
            &translated.body,
            since_epoch,
        );
    }
    request
}

/// What follows a call's own path at the backend, with what its caller asks for besides; nothing for most.
pub(crate) fn below(api: Api, uri: &Uri) -> Cow<'_, str> {
    let rest = api.below(uri.path());
    match uri.query() {
        Some(query) if !rest.is_empty() => Cow::Owned(format!("{rest}?{query}")),
        _ => Cow::Borrowed(rest),
    }
}

/// A target and what follows it.
fn with(target: Uri, rest: &str) -> Uri {
    if rest.is_empty() {
        return target;
    }
    // It is part of a path that came, so it is one.
    let whole = PathAndQuery::try_from(format!("{target}{rest}"));
    whole.map_or(target, Uri::from)
}

fn headers(job: &Job<'_>, candidate: &Candidate, endpoint: &Endpoint, route: Route) -> HeaderMap {
    let backend = &candidate.backend;
    let credential = match &backend.credential {
        Credential::Header(name, value) => Some((name, value)),
        Credential::None | Credential::Missing | Credential::Signed(_) => None,
    };
    let own = Own {
        host: &endpoint.host,
        credential,
        via: &job.worker.process.via,
        id: &job.id,
    };
    let mut headers = outbound::request(job.headers, &own);
    outbound::speak(&mut headers, backend.protocol, route.is_straight());
    headers
}

fn body(
    job: &Job<'_>,
    candidate: &Candidate,
    translated: Option<&Translated>,
    asking: Option<&Asking>,
) -> Pieces {
    if let Some(asking) = asking {
        let at = job.call.model_at.clone();
        let model = candidate.model.as_ref();
        let model = model.map_or_else(|| job.body.slice(at.clone()), |model| model.json.clone());
        return stream_usage::patched(job.body, at, &model, asking);
    }
    if let Some(translated) = translated.filter(|translated| !translated.names_at.is_empty()) {
        return openai::unpatched(translated.named(candidate.model_name(&job.call.model)));
    }
    let (body, model_at) = match translated {
        Some(translated) => (&translated.body, translated.model_at.clone()),
        None => (job.body, Some(job.call.model_at.clone())),
    };
    match (&candidate.model, model_at) {
        (Some(model), Some(at)) if job.call.encoding == Encoding::Form => {
            let name = Bytes::copy_from_slice(model.name.as_bytes());
            openai::patched(body, at, name)
        }
        (Some(model), Some(at)) => openai::patched(body, at, model.json.clone()),
        (None, _) | (_, None) => openai::unpatched(body.clone()),
    }
}
