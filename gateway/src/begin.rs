//! (IO) One attempt at one endpoint, up to the beginning of its answer. Nothing of an answer goes to the caller before
//! it is certain that this attempt is the one: an event stream is held back until its first event that carries an
//! answer, a JSON answer of usual size until it is whole. So whatever happens earlier can still be repeated elsewhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use serde::de::IgnoredAny;

use crate::attempt::Answer;
use crate::begun::Begun;
use crate::events::{Care, Events, Passed};
use crate::failure::{self, Failure};
use crate::job::Job;
use crate::media_type::{is_event_stream, is_text};
use crate::meter::{self, Cut, fault};
use crate::openai::{self, DONE, EMPTY_LINE, Wire};
use crate::process::Worker;
use crate::provider::foreign::{About, Foreign, Vectors};
use crate::provider::{self, Route, Translator, Way};
use crate::request::request;
use crate::snapshot::{Candidate, Endpoint, Rule};
use crate::stream_usage;
use crate::upstream::{self, BodyError, Conn, ConnectError, Exchange, RequestBody, SendError};
use crate::wish;

/// JSON answers up to this size are read whole before they go out; larger ones pass as they come.
const MAX_WHOLE_BYTES: usize = 256 << 10;
/// An answer that must be translated is read whole, and larger ones are a failure of the backend. The longest answers
/// of today's models have 128 Ki tokens, about 0.6 MB.
const MAX_TRANSLATED_BYTES: usize = 8 << 20;
/// An event stream that says nothing for this long (comments, roles) goes out as it is.
const MAX_HELD_BYTES: usize = 16 << 10;
/// A stream that its rule buffers goes out as it comes once it is larger: 8 MiB hold about 30,000 events.
const MAX_BUFFERED_BYTES: usize = 8 << 20;
/// An error body beyond this is cut off: it is no error of any protocol.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Its status has come already, and is what counts: what it says besides is not waited for.
const ERROR_BODY_WAIT: Duration = Duration::from_secs(2);

/// Connections of one endpoint that one attempt may find closed. Deploys of a backend close all that there are, one
/// after another.
const MAX_AGAIN: usize = 3;

/// Sends the request and reads until the answer has begun.
pub(crate) async fn begin(
    job: &Job<'_>,
    rule: &Rule,
    candidate: &Candidate,
    endpoint: &Arc<Endpoint>,
) -> Result<Answer, Failure> {
    let worker = job.worker;
    // Made before, so it cannot fail here.
    let (route, translated) = job
        .route(candidate.backend.protocol, rule.rest)
        .map_err(|_| Failure::Broken)?;
    let asking = stream_usage::asking(job, candidate, route);
    let last = job.started + rule.total;
    let make = || {
        let asking = asking.as_ref();
        let now = penstock_shell::clock::since_epoch();
        request(job, candidate, endpoint, route, translated, asking, now)
    };
    let model = candidate.model_name(&job.call.model);
    let limits = &endpoint.live.limits;
    let sent_ms = worker.process.ms(penstock_shell::clock::now());
    let mark = limits.send(model, sent_ms, wish::limit_tokens(job.call));
    let (mut head, mut exchange) = send(job, rule, endpoint, last, make).await?;
    let about = About {
        created: penstock_shell::clock::since_epoch().as_secs(),
        id: job.id.to_str().unwrap_or_default(),
        model,
        vectors: translated.map_or_else(Vectors::default, |translated| translated.vectors),
    };
    let reader = Reader {
        job,
        endpoint,
        rule,
        last,
        route,
        about,
        include_usage: translated.is_some_and(|translated| translated.include_usage),
        counts_for_us: asking.is_some(),
    };
    let heard_ms = worker.process.ms(penstock_shell::clock::now());
    endpoint.live.pulse.doubt.heard(heard_ms);
    limits.hear(
        model,
        head.headers(),
        mark,
        heard_ms,
        penstock_shell::clock::since_epoch(),
    );
    if job.passing.is_some() {
        return reader.passed(head, exchange).await;
    }
    if !head.status().is_success() {
        return reader.refusal(head, exchange).await;
    }
    let foreign = route.foreign;
    let chunks = foreign.and_then(|foreign| foreign.chunks(head.headers_mut(), &about));
    if let Some(chunks) = chunks {
        exchange.read_as(chunks);
    }
    if is_event_stream(head.headers()) {
        reader.stream(head, exchange).await
    } else {
        reader.whole(head, exchange).await
    }
}

/// Sends what `make` makes and reads the head of its answer.
async fn send(
    job: &Job<'_>,
    rule: &Rule,
    endpoint: &Arc<Endpoint>,
    last: Instant,
    make: impl Fn() -> Request<RequestBody>,
) -> Result<(Response<()>, Exchange), Failure> {
    let worker = job.worker;
    let mut conn = match pooled(worker, endpoint) {
        Some(conn) => conn,
        None => open(worker, endpoint, rule.connect, last).await?,
    };
    let first_byte = if job.call.stream || job.passing.is_some() {
        rule.first_token
    } else {
        rule.whole
    };
    let mut again = MAX_AGAIN;
    loop {
        let reused = conn.is_reused();
        let deadline = last.min(penstock_shell::clock::now() + first_byte);
        if let Some(passage) = job.passage() {
            passage.set_out();
        }
        let sent = conn.send(make(), endpoint, deadline).await;
        let err = sent.as_ref().err();
        if let Some(fault) = err.and_then(|err| callers_fault(job, *err, last)) {
            return Err(fault);
        }
        match sent {
            Ok(answer) => return Ok(answer),
            Err(SendError::TimedOut) => return Err(late(last, Failure::FirstTokenTimeout)),
            Err(SendError::Handshake(failed)) => return Err(Failure::Handshake(failed)),
            // The peer closed an idle connection just now, or took no more requests on it: that says nothing about the
            // peer.
            Err(SendError::Broken { unsent })
                if again > 0
                    && (unsent && !job.is_begun() || reused && job.may_be_sent_again()) =>
            {
                again -= 1;
                conn = match open(worker, endpoint, rule.connect, last).await {
                    // It read the request, broke off and is not there any more.
                    Err(Failure::Connect) if !unsent => return Err(Failure::Broken),
                    opened => opened?,
                };
            }
            Err(SendError::Broken { unsent: true }) => return Err(Failure::NotTaken),
            Err(SendError::Broken { .. } | SendError::NoAnswer) => return Err(Failure::Broken),
        }
    }
}

/// What a caller did to a request whose body goes on as it comes.
fn callers_fault(job: &Job<'_>, err: SendError, last: Instant) -> Option<Failure> {
    let passage = job.passage()?;
    match err {
        SendError::TimedOut if passage.is_awaited() => Some(late(last, Failure::BodyTimeout)),
        SendError::Broken { .. } | SendError::NoAnswer if passage.is_broken() => {
            Some(Failure::BodyBroken)
        }
        _ => None,
    }
}

/// An idle connection that is still good.
fn pooled(worker: &Worker, endpoint: &Endpoint) -> Option<Conn> {
    let now = penstock_shell::clock::now();
    endpoint.live.pool.take(endpoint, worker.index, now)
}

/// A wait that ended at the limit of the whole request is that limit's, not the endpoint's.
fn late(last: Instant, otherwise: Failure) -> Failure {
    if penstock_shell::clock::now() >= last {
        Failure::Deadline
    } else {
        otherwise
    }
}

async fn open(
    worker: &Worker,
    endpoint: &Arc<Endpoint>,
    limit: Duration,
    last: Instant,
) -> Result<Conn, Failure> {
    let left = last.saturating_duration_since(penstock_shell::clock::now());
    upstream::connect(endpoint, Some(worker.index), &worker.tasks, limit.min(left))
        .await
        .map_err(|err| match err {
            ConnectError::Refused => Failure::Connect,
            ConnectError::Handshake(failed) => Failure::Handshake(failed),
            ConnectError::TimedOut => late(last, Failure::ConnectTimeout),
        })
}

/// Why a stream is none that ended with `cut` before it was an answer, or with what cannot be read.
fn gave_up(cut: Option<Cut>, mut head: Response<()>) -> Failure {
    if cut != Some(Cut::Limit) {
        return Failure::GaveUp;
    }
    *head.status_mut() = status_of(Cut::Limit);
    let bytes = Bytes::new();
    Failure::Status { head, bytes }
}

/// The status that would have said the same.
fn status_of(cut: Cut) -> StatusCode {
    match cut {
        Cut::Limit => StatusCode::TOO_MANY_REQUESTS,
        Cut::Abort | Cut::Error | Cut::Failure => StatusCode::BAD_GATEWAY,
    }
}

/// Reads the beginning of an answer.
struct Reader<'a> {
    job: &'a Job<'a>,
    endpoint: &'a Endpoint,
    rule: &'a Rule,
    /// When the limit of the whole request is reached.
    last: Instant,
    route: Route,
    about: About<'a>,
    include_usage: bool,
    /// The count of tokens was asked for by the gateway.
    counts_for_us: bool,
}

impl Reader<'_> {
    /// Lets through what the caller is to see.
    fn events(&self) -> Events {
        let call = self.job.call;
        // Made chunks always count.
        let is_made = self.route.foreign.is_some() && self.route.way == Way::Straight;
        let care = Care {
            wants_count: !self.counts_for_us && (!is_made || self.include_usage),
            stands_gaps: !call.has_tools && !call.has_schema,
            choices: call.choices,
        };
        Events::new(self.route.api(self.job.api).wire(), care)
    }

    /// Between the chunks or events that the backend sends, or is made to send, and those that the caller wants.
    fn translator(&self) -> Option<Translator> {
        self.route
            .way
            .stream(self.about.created, self.include_usage)
    }

    /// The next frame. The deadline that is in force stays so.
    async fn frame(&self, exchange: &mut Exchange) -> Result<Option<(Bytes, Instant)>, BodyError> {
        let frame = exchange.frame().await?;
        Ok(frame.map(|bytes| (bytes, penstock_shell::clock::now())))
    }

    /// Why a body that was to come did not.
    fn failure(&self, err: BodyError, first: bool) -> Failure {
        match err {
            BodyError::TimedOut if first => late(self.last, Failure::FirstTokenTimeout),
            BodyError::TimedOut => late(self.last, Failure::Stalled),
            BodyError::Broken => Failure::Broken,
        }
    }

    /// From now on the limit between two pieces is in force.
    fn goes_on(&self, exchange: &mut Exchange, now: Instant) {
        exchange.set_deadline(self.last.min(now + self.rule.idle));
    }

    /// From now on all that is left must come within [`ERROR_BODY_WAIT`].
    fn hurries(&self, exchange: &mut Exchange) {
        exchange.set_deadline(
            self.last
                .min(penstock_shell::clock::now() + ERROR_BODY_WAIT),
        );
    }

    /// Gives the connection back.
    fn finish(&self, mut exchange: Exchange) {
        let now = penstock_shell::clock::now();
        exchange.finish(&self.endpoint.live, self.job.worker.index, now);
    }

    /// Holds an event stream back until it carries an answer, or is whole; the limit of the first token counts until
    /// its first token.
    async fn stream(&self, head: Response<()>, mut exchange: Exchange) -> Result<Answer, Failure> {
        let mut events = self.events();
        let mut held = BytesMut::new();
        let mut tokens = 0;
        let mut lease = None;
        loop {
            let begun = events.meter().has_started();
            let frame = self.frame(&mut exchange).await;
            let frame = frame.map_err(|err| self.failure(err, !begun))?;
            let (bytes, now) = match frame {
                Some(frame) => frame,
                None if events.meter().lacks_last_line_only() => {
                    (Bytes::from_static(EMPTY_LINE), penstock_shell::clock::now())
                }
                None if events.lacks_done_only() => {
                    (Bytes::from_static(DONE), penstock_shell::clock::now())
                }
                // Ended before it began, or before it was whole.
                None => return Err(Failure::Broken),
            };
            let passed = events.feed(bytes).map_err(|_| Failure::GaveUp)?;
            let meter = events.meter();
            let has_gap = passed.ends || passed.left_out > 0;
            if passed.lacks_beginning || has_gap && self.rule.buffers {
                let refused = self.refused(&head, &fault::body(meter.last_words()));
                return match refused {
                    Some(refused) => refused,
                    None => Err(gave_up(meter.cut(), head)),
                };
            }
            tokens += passed.tokens;
            let size = held.len() + passed.bytes.len();
            let mut committed = meter.has_started() || meter.is_done() || size > MAX_HELD_BYTES;
            if committed {
                self.goes_on(&mut exchange, now);
            }
            if self.rule.buffers {
                drop(lease.take());
                lease = self.job.worker.process.lease_body(size);
                committed = meter.is_done() || lease.is_none() || size > MAX_BUFFERED_BYTES;
            }
            if committed {
                let bytes = if held.is_empty() {
                    passed.bytes.clone()
                } else {
                    held.extend_from_slice(&passed.bytes);
                    held.freeze()
                };
                let first = Passed {
                    bytes,
                    tokens,
                    ..passed
                };
                return Ok(Answer::Stream {
                    head,
                    begun: Begun {
                        exchange,
                        events: Some(events),
                        json: None,
                        translator: self.translator(),
                        first,
                        rescue: None,
                    },
                });
            }
            held.extend_from_slice(&passed.bytes);
        }
    }

    /// Reads a JSON answer to its end, if it is not too large. Others go out as they come.
    async fn whole(&self, head: Response<()>, mut exchange: Exchange) -> Result<Answer, Failure> {
        let mut all: Option<Bytes> = None;
        let passes = self.route.is_straight();
        let most = self.most_whole(head.headers());
        while !exchange.is_over() {
            let frame = self.frame(&mut exchange).await;
            let frame = frame.map_err(|err| self.failure(err, all.is_none()))?;
            let Some((bytes, now)) = frame else { break };
            self.goes_on(&mut exchange, now);
            let joined = match all.take() {
                None => bytes,
                Some(before) => {
                    let mut joined = BytesMut::from(before);
                    joined.extend_from_slice(&bytes);
                    joined.freeze()
                }
            };
            if joined.len() > most && !exchange.is_over() {
                if !self.may_be_answer(&joined) {
                    return Err(Failure::GaveUp);
                }
                if !passes {
                    return Err(Failure::GaveUp);
                }
                let begun = match self.job.api.wire() {
                    Wire::Media | Wire::Plain => Begun::untouched(exchange, joined),
                    _ => Begun::of_json(exchange, joined),
                };
                return Ok(Answer::Stream { head, begun });
            }
            all = Some(joined);
        }
        let may_be_cut = exchange.ends_with_connection();
        self.finish(exchange);
        let mut bytes = all.unwrap_or_default();
        if let Some(flaw) = self.flaw(&bytes, may_be_cut) {
            return Err(flaw);
        }
        if let Some(foreign) = self.route.foreign {
            let answer = foreign.answer(&bytes, &self.about);
            bytes = answer.ok_or(Failure::GaveUp)?;
        }
        let (mut usage, cut) = meter::of_whole(&bytes);
        if self.route.foreign == Some(Foreign::GeminiEmbeddings) {
            // Zeros stand for a count that did not come.
            usage = usage.filter(|usage| usage.prompt_tokens > 0);
        }
        if let Some(cut) = cut {
            return self.given_up(cut, head, bytes);
        }
        if self.route.way != Way::Straight {
            let answer = self.route.way.answer(&bytes, self.about.created);
            bytes = answer.ok_or(Failure::GaveUp)?;
        }
        Ok(Answer::Whole { head, bytes, usage })
    }

    /// What an error is in the caller's protocol; empty if it cannot be told there.
    fn told(&self, error: Bytes, status: StatusCode) -> Bytes {
        match self.route.way {
            Way::Straight => error,
            _ => provider::error(&error, status, self.job.api.dialect()),
        }
    }

    /// How much of an answer is read before it goes out.
    fn most_whole(&self, headers: &HeaderMap) -> usize {
        let is_media = matches!(self.job.api.wire(), Wire::Media | Wire::Plain);
        if !self.route.is_straight() {
            MAX_TRANSLATED_BYTES
        } else if is_media && !is_text(headers) && !self.rule.buffers {
            // Sounds play while they are made.
            0
        } else {
            MAX_WHOLE_BYTES
        }
    }

    /// What becomes of an answer that is an error, whatever its status says.
    #[expect(clippy::result_large_err, reason = "as all here that are async")]
    fn given_up(&self, cut: Cut, mut head: Response<()>, bytes: Bytes) -> Result<Answer, Failure> {
        if cut == Cut::Abort {
            return Err(Failure::GaveUp);
        }
        if cut == Cut::Error
            && let Some(refused) = self.refused(&head, &bytes)
        {
            return refused;
        }
        if cut != Cut::Error {
            *head.status_mut() = status_of(cut);
        }
        let bytes = self.told(bytes, head.status());
        match cut {
            Cut::Error if bytes.is_empty() => Err(Failure::GaveUp),
            Cut::Error => Ok(Answer::Refused { head, bytes }),
            _ => Err(Failure::Status { head, bytes }),
        }
    }

    /// What becomes of an error with status 200 that is about the request: as if it had come with a status of its own.
    /// `None`: it is not about the request.
    fn refused(&self, head: &Response<()>, error: &Bytes) -> Option<Result<Answer, Failure>> {
        let status = fault::of_request(error)?;
        let class = failure::class_of_refusal(status, error);
        let mut own = Response::new(());
        *own.status_mut() = status;
        *own.headers_mut() = head.headers().clone();
        own.headers_mut().remove(CONTENT_LENGTH);
        own.headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let (head, bytes) = (own, self.told(error.clone(), status));
        Some(match class {
            Some(class) if self.rule.falls_back_on(class) => {
                Err(Failure::Refused { class, head, bytes })
            }
            _ => Ok(Answer::Refused { head, bytes }),
        })
    }

    /// Not so the page of a proxy that stands before the backend, with status 200.
    fn may_be_answer(&self, bytes: &[u8]) -> bool {
        let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
        let wire = self.job.api.wire();
        matches!(wire, Wire::Media | Wire::Plain) || matches!(first, Some(b'{' | b'['))
    }

    /// Why a body that came to its end is no answer.
    fn flaw(&self, bytes: &[u8], may_be_cut: bool) -> Option<Failure> {
        if !self.may_be_answer(bytes) {
            return Some(Failure::GaveUp);
        }
        let is_json = || serde_json::from_slice::<IgnoredAny>(bytes).is_ok();
        let is_cut = may_be_cut && self.job.api.wire() != Wire::Plain && !is_json();
        is_cut.then_some(Failure::Broken)
    }

    /// Reads an answer that is none.
    async fn refusal(&self, mut head: Response<()>, exchange: Exchange) -> Result<Answer, Failure> {
        let bytes = self.error(&mut head, exchange).await?;
        let status = head.status();
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            return Err(Failure::Status { head, bytes });
        }
        match failure::class_of_refusal(status, &bytes) {
            Some(class) if self.rule.falls_back_on(class) => {
                Err(Failure::Refused { class, head, bytes })
            }
            None if failure::is_backends_own(status, self.job.api, self.job.body, &bytes) => {
                Err(Failure::Denied { head, bytes })
            }
            _ => Ok(Answer::Refused { head, bytes }),
        }
    }

    /// An answer that is no model's passes from its head on. One that says that the server failed is read first: the
    /// request may be repeated elsewhere.
    async fn passed(&self, head: Response<()>, mut exchange: Exchange) -> Result<Answer, Failure> {
        let mut first = BytesMut::new();
        if head.status().is_server_error() {
            self.hurries(&mut exchange);
            while !exchange.is_over() && first.len() <= MAX_ERROR_BYTES {
                match self.frame(&mut exchange).await {
                    Ok(Some((bytes, _))) => first.extend_from_slice(&bytes),
                    Ok(None) => break,
                    // The status has come: that is what counts.
                    Err(_) => {
                        let bytes = Bytes::new();
                        return Err(Failure::Status { head, bytes });
                    }
                }
            }
            if first.len() <= MAX_ERROR_BYTES {
                self.finish(exchange);
                let bytes = first.freeze();
                return Err(Failure::Status { head, bytes });
            }
        }
        if exchange.is_over() {
            self.finish(exchange);
            return Ok(Answer::Whole {
                head,
                bytes: first.freeze(),
                usage: None,
            });
        }
        self.goes_on(&mut exchange, penstock_shell::clock::now());
        let begun = Begun::untouched(exchange, first.freeze());
        Ok(Answer::Stream { head, begun })
    }

    /// Reads the body of an error answer, as far as it is of use.
    async fn error(
        &self,
        head: &mut Response<()>,
        mut exchange: Exchange,
    ) -> Result<Bytes, Failure> {
        let mut all = BytesMut::new();
        self.hurries(&mut exchange);
        while !exchange.is_over() {
            match self.frame(&mut exchange).await {
                Ok(Some((bytes, _))) => all.extend_from_slice(&bytes),
                Ok(None) => break,
                // The status has come: that is what counts.
                Err(_) => return Ok(Bytes::new()),
            }
            if all.len() > MAX_ERROR_BYTES {
                return Ok(Bytes::new());
            }
        }
        self.finish(exchange);
        let mut bytes = all.freeze();
        if let Some(foreign) = self.route.foreign {
            bytes = foreign.error(head.headers_mut(), &bytes);
        }
        bytes = openai::nested_error(&bytes).unwrap_or(bytes);
        Ok(self.told(bytes, head.status()))
    }
}
