//! (IO) The paths of one engine, and the gates before them: loading, then the API key, then draining.

use std::future::Future;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use penstock_core::names::{ENGINE_HEADER, REQUEST_ID_HEADER};
use serde_json::json;
use tokio_util::task::TaskTracker;

use super::body::{Body, EventStream};
use crate::driver::{Handle, NotTaken};
use crate::model::{Refusal, Submission};
use crate::openai::answer::{Envelope, Events, whole};
use crate::openai::{Api, MAX_BODY_BYTES, Rejection, Rules, parse, tokenize};
use crate::settings::Settings;

/// How long a client may take to send a request's body.
const BODY_TIMEOUT: Duration = Duration::from_mins(1);

/// Longest `x-request-id` that becomes part of an answer's id.
const MAX_REQUEST_ID: usize = 128;

const JSON: &str = "application/json";

/// One engine's state as its connections see it.
#[derive(Debug)]
pub(super) struct App {
    settings: Settings,
    /// When the server started, in seconds since 1970.
    created: u64,
    /// Set once the model is "loaded".
    engine: OnceLock<Handle>,
    draining: AtomicBool,
    /// Every generation from before its admission until its answer is sent or dropped.
    work: TaskTracker,
}

impl App {
    /// An engine that still loads.
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            created: penstock_shell::clock::since_epoch().as_secs(),
            engine: OnceLock::new(),
            draining: AtomicBool::new(false),
            work: TaskTracker::new(),
        }
    }

    /// The model is loaded.
    pub(super) fn serve(&self, engine: Handle) {
        // Called once.
        let _ = self.engine.set(engine);
    }

    /// Refuses new generations; the returned future ends when none is in flight.
    pub(super) fn drain(&self) -> impl Future<Output = ()> + '_ {
        self.draining.store(true, Ordering::SeqCst);
        self.work.close();
        self.work.wait()
    }

    /// Answers any request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let mut response = self.route(request).await;
        response
            .headers_mut()
            .insert(ENGINE_HEADER, HeaderValue::from_static("simulated"));
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Response<Body> {
        let Some(engine) = self.engine.get() else {
            return rejected(&Rejection::loading());
        };
        let path = request.uri().path();
        if path.starts_with("/v1") && !self.authorized(request.headers().get(header::AUTHORIZATION))
        {
            return text(
                StatusCode::UNAUTHORIZED,
                JSON,
                json!({"error": "Unauthorized"}).to_string(),
            );
        }
        match (request.method(), path) {
            (&Method::POST, "/v1/chat/completions") => {
                self.generate(engine, Api::Chat, request).await
            }
            (&Method::POST, "/v1/completions") => {
                self.generate(engine, Api::Completions, request).await
            }
            (&Method::POST, "/tokenize") => self.tokenize(request.into_body()).await,
            (&Method::GET, "/v1/models") => text(StatusCode::OK, JSON, self.models()),
            (&Method::GET, "/health") | (&Method::GET | &Method::POST, "/ping") => {
                text(StatusCode::OK, "text/plain; charset=utf-8", String::new())
            }
            (&Method::GET, "/version") => text(
                StatusCode::OK,
                JSON,
                json!({"version": "0.32.0+penstock.simulated"}).to_string(),
            ),
            (&Method::GET, "/metrics") => text(
                StatusCode::OK,
                "text/plain; version=0.0.4; charset=utf-8",
                engine.metrics(),
            ),
            (
                _,
                "/v1/chat/completions"
                | "/v1/completions"
                | "/v1/models"
                | "/tokenize"
                | "/health"
                | "/ping"
                | "/version"
                | "/metrics",
            ) => text(
                StatusCode::METHOD_NOT_ALLOWED,
                JSON,
                json!({"detail": "Method Not Allowed"}).to_string(),
            ),
            _ => text(
                StatusCode::NOT_FOUND,
                JSON,
                json!({"detail": "Not Found"}).to_string(),
            ),
        }
    }

    /// Whether the request may use paths under `/v1`. Compares in constant time.
    fn authorized(&self, authorization: Option<&HeaderValue>) -> bool {
        let keys = &self.settings.api_keys;
        let given = authorization.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let equal = |key: &[u8], given: &[u8]| {
            let differences = key
                .iter()
                .zip(given)
                .fold(0, |differences, (a, b)| differences | (a ^ b));
            key.len() == given.len() && std::hint::black_box(differences) == 0
        };
        keys.is_empty()
            || given.is_some_and(|given| keys.iter().any(|key| equal(key.as_bytes(), given)))
    }

    fn models(&self) -> String {
        let Settings {
            served_model_name,
            limits,
            ..
        } = &self.settings;
        json!({"object": "list", "data": [{
            "id": served_model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "vllm",
            "root": served_model_name,
            "parent": null,
            "max_model_len": limits.max_model_len,
        }]})
        .to_string()
    }

    async fn generate(
        &self,
        engine: &Handle,
        api: Api,
        request: Request<Incoming>,
    ) -> Response<Body> {
        // Before the check, so that a drain that begins now waits for this request.
        let working = self.work.token();
        if self.draining.load(Ordering::SeqCst) {
            return rejected(&Rejection::stopping());
        }
        if let Some(status) = self.settings.fault_status {
            return rejected(&Rejection::fault(status));
        }
        let id = answer_id(api, request.headers().get(REQUEST_ID_HEADER));
        let read = read(request.into_body()).await;
        let mut generation = match read.and_then(|body| parse(api, &body, self.rules())) {
            Ok(generation) => generation,
            Err(rejection) => return rejected(&rejection),
        };
        let block_hashes = std::mem::take(&mut generation.submission.block_hashes);
        let submission = Submission {
            block_hashes,
            ..generation.submission.clone()
        };
        let mut ticket = match engine.submit(submission).await {
            Ok(ticket) => ticket,
            Err(not_taken) => return rejected(&refusal(not_taken)),
        };
        let created = penstock_shell::clock::since_epoch().as_secs();
        let envelope = Envelope {
            id,
            created,
            model: self.settings.served_model_name.clone(),
        };
        if generation.stream {
            let events = Events::new(&envelope, generation);
            let stream = EventStream::new(ticket, events, working);
            return response(
                StatusCode::OK,
                "text/event-stream; charset=utf-8",
                Body::stream(stream),
            );
        }
        let tokens = generation.output.tokens();
        let mut progress = ticket.progress();
        let last = progress
            .wait_for(|progress| progress.aborted || progress.generated >= tokens)
            .await;
        let Ok(last) = last.map(|last| *last) else {
            return rejected(&Rejection::stopping());
        };
        ticket.end();
        text(StatusCode::OK, JSON, whole(&envelope, &generation, &last))
    }

    async fn tokenize(&self, body: Incoming) -> Response<Body> {
        let read = read(body).await;
        match read.and_then(|body| tokenize(&body, self.rules())) {
            Ok(answer) => text(StatusCode::OK, JSON, answer),
            Err(rejection) => rejected(&rejection),
        }
    }

    fn rules(&self) -> Rules<'_> {
        let limits = &self.settings.limits;
        Rules {
            served_model: &self.settings.served_model_name,
            max_model_len: limits.max_model_len,
            block_size: limits.block_size,
        }
    }
}

/// Reads a request's body.
async fn read(body: Incoming) -> Result<Bytes, Rejection> {
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Rejection::too_large()),
        Ok(Err(_)) => Err(Rejection::unreadable("the request body ended early")),
        Err(_) => Err(Rejection::unreadable("the request body took too long")),
    }
}

fn refusal(not_taken: NotTaken) -> Rejection {
    match not_taken {
        NotTaken::Refused(Refusal::QueueFull) => Rejection::busy(),
        // Lengths were checked against the same limit.
        NotTaken::Refused(Refusal::Length) => Rejection::unreadable("the request is too long"),
        NotTaken::Stopped => Rejection::stopping(),
    }
}

/// vLLM puts the caller's request id into the answer's; one that JSON would have to escape is not used.
fn answer_id(api: Api, request_id: Option<&HeaderValue>) -> String {
    let prefix = match api {
        Api::Chat => "chatcmpl",
        Api::Completions => "cmpl",
    };
    let plain = |id: &&str| {
        (1..=MAX_REQUEST_ID).contains(&id.len())
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".:_-".contains(&byte))
    };
    match request_id
        .and_then(|value| value.to_str().ok())
        .filter(plain)
    {
        Some(id) => format!("{prefix}-{id}"),
        None => format!("{prefix}-{:032x}", rand::random::<u128>()),
    }
}

fn response(status: StatusCode, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Body> {
    response(status, content_type, Body::whole(Bytes::from(body)))
}

fn rejected(rejection: &Rejection) -> Response<Body> {
    text(rejection.status, JSON, rejection.body())
}
