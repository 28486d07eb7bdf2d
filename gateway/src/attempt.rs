//! (IO) Attempts: one endpoint after another until one begins to answer. Nothing of an answer goes to the caller
//! before it is certain that this attempt is the one: an event stream is held back until its first event that carries
//! an answer, a JSON answer of usual size until it is whole. So whatever happens earlier can still be repeated
//! elsewhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use rand::RngExt as _;

use crate::choose::{Choice, Nowhere, Pass, Tried, choose};
use crate::failure::Failure;
use crate::hold;
use crate::load::{BYTES_PER_TOKEN, Ticket};
use crate::meter::{self, Cut, Meter, Usage};
use crate::openai::{self, Api, Call, Pieces};
use crate::outbound;
use crate::pick::Wish;
use crate::process::Worker;
use crate::record::{InFlight, Record};
use crate::reject::Reject;
use crate::snapshot::{Authorization, Candidate, Endpoint, Rule};
use crate::stream::Begun;
use crate::upstream::{BodyError, Conn, ConnectError, Exchange, SendError};

/// Larger bodies are sent once: keeping them until a first byte comes would hold too much memory.
pub(crate) const MAX_REPLAY_BYTES: usize = 1 << 20;
/// JSON answers up to this size are read whole before they go out; larger ones pass as they come.
const MAX_WHOLE_BYTES: usize = 256 << 10;
/// An event stream that says nothing for this long (comments, roles) goes out as it is.
const MAX_HELD_BYTES: usize = 16 << 10;
/// An error body beyond this is cut off: it is no OpenAI error.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Before the same endpoint is asked again, times the number of attempts so far, and jittered by half.
const BACKOFF: Duration = Duration::from_millis(50);

/// What a request asks of its attempts.
pub(crate) struct Job<'a> {
    pub(crate) worker: &'a Arc<Worker>,
    pub(crate) api: Api,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a Bytes,
    pub(crate) call: &'a Call<'a>,
    /// Hashes of the prompt's leading blocks, if the rule's strategy asks for them.
    pub(crate) blocks: Vec<u64>,
}

impl Job<'_> {
    /// The endpoint for the next attempt.
    fn choose(&self, rule: &Rule, tried: &[Tried], now: Instant) -> Result<Choice, Nowhere> {
        choose(rule, tried, self.wish(now), &mut rand::rng())
    }

    fn wish(&self, now: Instant) -> Wish<'_> {
        Wish {
            now_ms: self.worker.process.ms(now),
            stream: self.call.stream,
            prompt_tokens: self.prompt_tokens(),
            blocks: &self.blocks,
        }
    }

    /// About how many tokens the prompt has.
    fn prompt_tokens(&self) -> u32 {
        u32::try_from(self.call.prompt.len()).unwrap_or(u32::MAX) / BYTES_PER_TOKEN
    }
}

/// The beginning of an answer, or all of it.
pub(crate) enum Answer {
    /// A 2xx answer that is here as a whole.
    Whole {
        head: Response<()>,
        bytes: Bytes,
        usage: Option<Usage>,
    },
    /// A 2xx answer that goes on.
    Stream { head: Response<()>, begun: Begun },
    /// The backend's own refusal, to be passed on.
    Refused { head: Response<()>, bytes: Bytes },
}

/// Tries endpoints until one answers. `record.rule` is set.
pub(crate) async fn run(job: &Job<'_>, record: &mut Record) -> Result<Answer, Reject> {
    let mut last: Option<Failure> = None;
    loop {
        let Some(rule) = record.rule.clone() else {
            return Err(Reject::NotConfigured);
        };
        let now = penstock_shell::clock::now();
        let choice = match job.choose(&rule, &record.tried, now) {
            Ok(choice) if may_go_on(&rule, record, &choice) => choice,
            Err(Nowhere::NoEndpoint) if last.is_none() => {
                record.rule = Some(hold::until_ready(job, &rule, record).await?);
                continue;
            }
            Err(Nowhere::NoCredential) if last.is_none() => return Err(Reject::CredentialMissing),
            Err(Nowhere::Closed(ms)) if last.is_none() => {
                let seconds = HeaderValue::from(ms.div_ceil(1000));
                let retry_after = Some(seconds);
                return Err(Reject::UpstreamBusy { retry_after });
            }
            _ => return last.map_or(Err(Reject::NoEndpoint), Failure::conclude),
        };
        if choice.pass == Pass::Again {
            back_off(record.attempts).await;
        }
        let Some((tier, candidate)) = rule
            .tiers
            .get(choice.tier)
            .and_then(|tier| Some((tier, tier.candidates.get(choice.candidate)?)))
        else {
            return Err(Reject::NoEndpoint);
        };
        if !job.blocks.is_empty() {
            tier.prefixes.learn(&job.blocks, choice.endpoint.live.id);
        }
        let entered = penstock_shell::clock::now();
        let work = job.wish(entered).work_at(&choice.endpoint);
        enter(job, record, candidate, &choice, entered);
        match once(job, record, candidate, &choice.endpoint).await {
            Ok(answer) => {
                choice.endpoint.live.outlier.succeeded();
                if !matches!(answer, Answer::Refused { .. }) {
                    observe(job, &choice.endpoint, entered, work);
                }
                return Ok(answer);
            }
            Err(failure) => {
                note(job, candidate, &choice, &failure, record);
                if failure.sent() && job.body.len() > MAX_REPLAY_BYTES {
                    return failure.conclude();
                }
                last = Some(failure);
            }
        }
    }
}

/// The first attempt is always made, further ones up to the rule's limit; at endpoints that fail, while its budget
/// lasts.
fn may_go_on(rule: &Rule, record: &Record, choice: &Choice) -> bool {
    if record.attempts == 0 {
        rule.retries.earn();
        return true;
    }
    let works = choice.pass == Pass::Fresh && !choice.endpoint.live.outlier.is_failing();
    record.attempts < rule.attempts && (works || rule.retries.take())
}

async fn back_off(attempts: usize) {
    let jitter = rand::rng().random_range(0.5..1.5);
    let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
    tokio::time::sleep(BACKOFF.saturating_mul(attempts).mul_f64(jitter)).await;
}

/// Tells the balancer how long the endpoint took to begin a stream, per unit of work that it had before it, or to give
/// another answer whole.
fn observe(job: &Job<'_>, endpoint: &Endpoint, since: Instant, work: f32) {
    let now = penstock_shell::clock::now();
    let took_ms = now.saturating_duration_since(since).as_secs_f32() * 1000.0;
    let sample_ms = if job.call.stream {
        took_ms / work
    } else {
        took_ms
    };
    let latency = endpoint.live.latency(job.call.stream);
    latency.observe(sample_ms, job.worker.process.ms(now));
}

/// Moves the request to its next endpoint in the ledger and the record.
fn enter(job: &Job<'_>, record: &mut Record, candidate: &Candidate, choice: &Choice, now: Instant) {
    record.attempts += 1;
    record.choose(choice.tier, choice.candidate, choice.pass);
    record.in_flight = None;
    record.in_flight = Some(InFlight::enter(
        &choice.endpoint,
        job.call.stream,
        job.prompt_tokens(),
        job.worker.process.ms(now),
    ));
    let ledger = &candidate.backend.ledger;
    match &mut record.ticket {
        Some(ticket) if ticket.is_of(ledger) => ticket.release(),
        _ => {
            record.ticket = None;
            record.ticket = Some(Ticket::enter(
                ledger,
                job.worker.index,
                job.body.len(),
                job.call.stream,
                now,
            ));
        }
    }
}

fn note(
    job: &Job<'_>,
    candidate: &Candidate,
    choice: &Choice,
    failure: &Failure,
    record: &mut Record,
) {
    let process = &job.worker.process;
    let now_ms = process.ms(penstock_shell::clock::now());
    let endpoints = &candidate.backend.endpoints;
    if failure.is_limit() {
        let wait = failure.retry_after(penstock_shell::clock::since_epoch());
        choice.endpoint.live.cooldown.ask(wait, now_ms);
    }
    if failure.weight() > 0 {
        let away = endpoints
            .iter()
            .filter(|endpoint| endpoint.live.outlier.is_away(now_ms))
            .count();
        if choice
            .endpoint
            .live
            .outlier
            .failed(failure.weight(), now_ms, away, endpoints.len())
        {
            process.metrics.ejections.inc();
            tracing::warn!(
                backend.id = %candidate.backend.id,
                endpoint = %choice.endpoint.address,
                reason = failure.label(),
                "endpoint is left out after failures in a row"
            );
        }
    }
    process
        .metrics
        .attempt_failed(candidate.metrics.backend(), failure.label());
    record.tried.push(Tried {
        tier: choice.tier,
        candidate: choice.candidate,
        endpoint: Arc::clone(&choice.endpoint),
        reason: failure.label(),
        again: failure.again(),
    });
}

fn request(
    job: &Job<'_>,
    record: &Record,
    candidate: &Candidate,
    endpoint: &Endpoint,
) -> Request<Full<Pieces>> {
    let authorization = match &candidate.backend.authorization {
        Authorization::Value(value) => Some(value),
        Authorization::None | Authorization::Missing => None,
    };
    let body = match &candidate.model {
        Some(model) => openai::patched(job.body, job.call.model_at.clone(), model.clone()),
        None => openai::unpatched(job.body.clone()),
    };
    let via = &job.worker.process.via;
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = endpoint.uris[job.api.index()].clone();
    *request.headers_mut() =
        outbound::request(job.headers, &endpoint.host, authorization, via, &record.id);
    request
}

/// One attempt at one endpoint.
async fn once(
    job: &Job<'_>,
    record: &mut Record,
    candidate: &Candidate,
    endpoint: &Arc<Endpoint>,
) -> Result<Answer, Failure> {
    let (connect, first_byte, idle) = match &record.rule {
        Some(rule) => (rule.connect, rule.first_byte, rule.idle),
        None => return Err(Failure::Connect),
    };
    let worker = job.worker;
    let pooled = std::future::poll_fn(|cx| {
        std::task::Poll::Ready(endpoint.live.pool.take(
            worker.index,
            penstock_shell::clock::now(),
            cx,
        ))
    })
    .await;
    let mut conn = match pooled {
        Some(conn) => conn,
        None => open(worker, endpoint, connect).await?,
    };
    let (head, exchange) = loop {
        let reused = conn.is_reused();
        let deadline = penstock_shell::clock::now() + first_byte;
        match conn
            .send(request(job, record, candidate, endpoint), deadline)
            .await
        {
            Ok(answer) => break answer,
            Err(SendError::TimedOut) => return Err(Failure::FirstByteTimeout),
            // The peer closed an idle connection just now: that says nothing about the peer.
            Err(SendError::Broken { unsent })
                if reused && (unsent || job.body.len() <= MAX_REPLAY_BYTES) =>
            {
                conn = open(worker, endpoint, connect).await?;
            }
            Err(SendError::Broken { .. }) => return Err(Failure::Broken),
        }
    };
    let reader = Reader {
        worker,
        endpoint,
        idle,
    };
    let status = head.status();
    if status.is_success() {
        if is_event_stream(head.headers()) {
            reader.stream(head, exchange, record).await
        } else {
            reader.whole(head, exchange).await
        }
    } else {
        let bytes = reader.error(exchange).await?;
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            return Err(Failure::Status { head, bytes });
        }
        Ok(Answer::Refused { head, bytes })
    }
}

async fn open(worker: &Worker, endpoint: &Endpoint, limit: Duration) -> Result<Conn, Failure> {
    worker
        .process
        .connector
        .connect(&endpoint.address, limit)
        .await
        .map_err(|err| match err {
            ConnectError::Refused => Failure::Connect,
            ConnectError::TimedOut => Failure::ConnectTimeout,
        })
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}

/// Reads the beginning of an answer.
struct Reader<'a> {
    worker: &'a Worker,
    endpoint: &'a Endpoint,
    idle: Duration,
}

impl Reader<'_> {
    /// The next frame. Until one has come, the first-byte deadline is in force.
    async fn frame(
        &self,
        exchange: &mut Exchange,
        first: bool,
    ) -> Result<Option<(Bytes, Instant)>, Failure> {
        match exchange.frame().await {
            Ok(Some(bytes)) => {
                let now = penstock_shell::clock::now();
                exchange.set_deadline(now + self.idle);
                Ok(Some((bytes, now)))
            }
            Ok(None) => Ok(None),
            Err(BodyError::TimedOut) if first => Err(Failure::FirstByteTimeout),
            Err(BodyError::TimedOut | BodyError::Broken) => Err(Failure::Broken),
        }
    }

    /// Gives the connection back.
    async fn finish(&self, mut exchange: Exchange) {
        std::future::poll_fn(|cx| {
            let now = penstock_shell::clock::now();
            exchange.finish(cx, &self.endpoint.live, self.worker.index, now);
            std::task::Poll::Ready(())
        })
        .await;
    }

    /// Holds an event stream back until it carries an answer.
    async fn stream(
        &self,
        head: Response<()>,
        mut exchange: Exchange,
        record: &mut Record,
    ) -> Result<Answer, Failure> {
        let mut meter = Meter::default();
        let mut held: Option<BytesMut> = None;
        let mut first = true;
        loop {
            let Some((bytes, now)) = self.frame(&mut exchange, first).await? else {
                // Ended before it began.
                return Err(Failure::Broken);
            };
            first = false;
            let seen = meter.feed(&bytes).map_err(|_| Failure::Broken)?;
            if meter.cut().is_some() && !meter.has_started() {
                return Err(Failure::GaveUp);
            }
            let before = held.as_ref().map_or(0, BytesMut::len);
            let committed =
                meter.has_started() || meter.is_done() || before + bytes.len() > MAX_HELD_BYTES;
            record.tokens(seen.tokens, now);
            if committed {
                record.usage = meter.usage();
                let cut_at = seen.cut_at.map(|at| before + at);
                let first = match held {
                    None => bytes,
                    Some(mut held) => {
                        held.extend_from_slice(&bytes);
                        held.freeze()
                    }
                };
                return Ok(Answer::Stream {
                    head,
                    begun: Begun {
                        exchange,
                        meter: Some(meter),
                        first,
                        cut_at,
                    },
                });
            }
            held.get_or_insert_default().extend_from_slice(&bytes);
        }
    }

    /// Reads a JSON answer to its end, if it is not too large.
    async fn whole(&self, head: Response<()>, mut exchange: Exchange) -> Result<Answer, Failure> {
        let mut all: Option<Bytes> = None;
        while !exchange.is_over() {
            let Some((bytes, _)) = self.frame(&mut exchange, all.is_none()).await? else {
                break;
            };
            let joined = match all.take() {
                None => bytes,
                Some(before) => {
                    let mut joined = BytesMut::from(before);
                    joined.extend_from_slice(&bytes);
                    joined.freeze()
                }
            };
            if joined.len() > MAX_WHOLE_BYTES && !exchange.is_over() {
                let begun = Begun {
                    exchange,
                    meter: None,
                    first: joined,
                    cut_at: None,
                };
                return Ok(Answer::Stream { head, begun });
            }
            all = Some(joined);
        }
        self.finish(exchange).await;
        let bytes = all.unwrap_or_default();
        match meter::of_whole(&bytes) {
            (_, Some(Cut::Abort)) => Err(Failure::GaveUp),
            (usage, _) => Ok(Answer::Whole { head, bytes, usage }),
        }
    }

    /// Reads the body of an error answer, as far as it is of use.
    async fn error(&self, mut exchange: Exchange) -> Result<Bytes, Failure> {
        let mut all = BytesMut::new();
        while !exchange.is_over() {
            match self.frame(&mut exchange, all.is_empty()).await {
                Ok(Some((bytes, _))) => all.extend_from_slice(&bytes),
                Ok(None) => break,
                // The status has come: that is what counts.
                Err(_) => return Ok(Bytes::new()),
            }
            if all.len() > MAX_ERROR_BYTES {
                return Ok(Bytes::new());
            }
        }
        self.finish(exchange).await;
        Ok(all.freeze())
    }
}

/// What a refusal of the backend becomes: passed on if it has the OpenAI shape, else in the gateway's words. What a
/// provider says about the gateway's own credential is never passed on.
pub(crate) fn refusal(status: StatusCode, bytes: &[u8]) -> Option<Reject> {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Some(Reject::UpstreamAuth),
        _ if openai::is_error(bytes) => None,
        status if status.is_client_error() => Some(Reject::UpstreamRefused {
            status: status.as_u16(),
        }),
        status => Some(Reject::UpstreamFailed {
            status: status.as_u16(),
        }),
    }
}

/// Leaves of an answer's headers what the caller may see. The length stays only where the bytes are sure to match.
pub(crate) fn clean(headers: &mut HeaderMap, keeps_length: bool) {
    outbound::answer(headers);
    if !keeps_length {
        headers.remove(CONTENT_LENGTH);
    }
}
