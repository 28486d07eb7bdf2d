//! (IO) One attempt at one endpoint, up to the beginning of its answer. Nothing of an answer goes to the caller before
//! it is certain that this attempt is the one: an event stream is held back until its first event that carries an
//! answer, a JSON answer of usual size until it is whole. So whatever happens earlier can still be repeated elsewhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::Full;

use crate::attempt::{Answer, Job, MAX_REPLAY_BYTES};
use crate::failure::{self, Failure};
use crate::meter::{self, Cut, Meter};
use crate::openai::{self, DONE, Encoding, Pieces};
use crate::outbound;
use crate::process::Worker;
use crate::provider::{self, Translated, Way};
use crate::snapshot::{Candidate, Credential, Endpoint, Rule};
use crate::stream::Begun;
use crate::upstream::{BodyError, Conn, ConnectError, Exchange, SendError};

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

/// Sends the request and reads until the answer has begun.
pub(crate) async fn begin(
    job: &Job<'_>,
    rule: &Rule,
    candidate: &Candidate,
    endpoint: &Arc<Endpoint>,
) -> Result<Answer, Failure> {
    let worker = job.worker;
    // Made before, so it cannot fail here.
    let (way, translated) = job
        .way(candidate.backend.protocol, rule.rest)
        .unwrap_or((Way::Straight, None));
    let last = job.started + rule.total;
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
        None => open(worker, endpoint, rule.connect, last).await?,
    };
    let (head, exchange) = loop {
        let reused = conn.is_reused();
        let deadline = last.min(penstock_shell::clock::now() + rule.first_token);
        let request = request(job, candidate, endpoint, way, translated);
        match conn.send(request, deadline).await {
            Ok(answer) => break answer,
            Err(SendError::TimedOut) => return Err(late(last, Failure::FirstTokenTimeout)),
            // The peer closed an idle connection just now: that says nothing about the peer.
            Err(SendError::Broken { unsent })
                if reused && (unsent || job.body.len() <= MAX_REPLAY_BYTES) =>
            {
                conn = match open(worker, endpoint, rule.connect, last).await {
                    // It read the request, broke off and is not there any more.
                    Err(Failure::Connect) if !unsent => return Err(Failure::Broken),
                    opened => opened?,
                };
            }
            Err(SendError::Broken { .. }) => return Err(Failure::Broken),
        }
    };
    let reader = Reader {
        job,
        endpoint,
        idle: rule.idle,
        last,
        buffers: rule.buffers,
        way,
        include_usage: translated.is_some_and(|translated| translated.include_usage),
    };
    let status = head.status();
    if status.is_success() {
        if is_event_stream(head.headers()) {
            reader.stream(head, exchange).await
        } else {
            reader.whole(head, exchange).await
        }
    } else {
        let bytes = reader.error(status, exchange).await?;
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            return Err(Failure::Status { head, bytes });
        }
        match failure::class_of_refusal(status, &bytes) {
            Some(class) if rule.retry_on.contains(&class) => {
                Err(Failure::Refused { class, head, bytes })
            }
            _ => Ok(Answer::Refused { head, bytes }),
        }
    }
}

/// A wait that ended at the limit of the whole request is that limit's, not the endpoint's.
fn late(last: Instant, otherwise: Failure) -> Failure {
    if penstock_shell::clock::now() >= last {
        Failure::Deadline
    } else {
        otherwise
    }
}

fn request(
    job: &Job<'_>,
    candidate: &Candidate,
    endpoint: &Endpoint,
    way: Way,
    translated: Option<&Translated>,
) -> Request<Full<Pieces>> {
    let credential = match &candidate.backend.credential {
        Credential::Header(name, value) => Some((name, value)),
        Credential::None | Credential::Missing => None,
    };
    let (body, model_at) = match translated {
        Some(translated) => (&translated.body, &translated.model_at),
        None => (job.body, &job.call.model_at),
    };
    let pieces = match &candidate.model {
        Some(model) if job.call.encoding == Encoding::Form => {
            let name = Bytes::copy_from_slice(model.name.as_bytes());
            openai::patched(body, model_at.clone(), name)
        }
        Some(model) => openai::patched(body, model_at.clone(), model.json.clone()),
        None => openai::unpatched(body.clone()),
    };
    let via = &job.worker.process.via;
    let mut headers = outbound::request(job.headers, &endpoint.host, credential, via, &job.id);
    let is_callers = way == Way::Straight;
    outbound::speak(&mut headers, candidate.backend.protocol, is_callers);
    let mut request = Request::new(Full::new(pieces));
    *request.method_mut() = Method::POST;
    let model = candidate.model_name(&job.call.model);
    // There is one: else the candidate would not have been chosen.
    *request.uri_mut() = endpoint
        .targets
        .of(way.api(job.api), model)
        .unwrap_or_default();
    *request.headers_mut() = headers;
    request
}

async fn open(
    worker: &Worker,
    endpoint: &Endpoint,
    limit: Duration,
    last: Instant,
) -> Result<Conn, Failure> {
    let left = last.saturating_duration_since(penstock_shell::clock::now());
    worker
        .process
        .connector
        .connect(&endpoint.address, limit.min(left))
        .await
        .map_err(|err| match err {
            ConnectError::Refused => Failure::Connect,
            ConnectError::TimedOut => late(last, Failure::ConnectTimeout),
        })
}

pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}

/// Reads the beginning of an answer.
struct Reader<'a> {
    job: &'a Job<'a>,
    endpoint: &'a Endpoint,
    idle: Duration,
    /// When the limit of the whole request is reached.
    last: Instant,
    /// Whether streams are held until they are whole.
    buffers: bool,
    way: Way,
    include_usage: bool,
}

impl Reader<'_> {
    /// The next frame. The deadline that is in force stays so.
    async fn frame(&self, exchange: &mut Exchange) -> Result<Option<(Bytes, Instant)>, BodyError> {
        let frame = exchange.frame().await?;
        Ok(frame.map(|bytes| (bytes, penstock_shell::clock::now())))
    }

    /// Why a body that was to come did not.
    fn failure(&self, err: BodyError, first: bool) -> Failure {
        match err {
            BodyError::TimedOut if first => late(self.last, Failure::FirstTokenTimeout),
            BodyError::TimedOut => late(self.last, Failure::Broken),
            BodyError::Broken => Failure::Broken,
        }
    }

    /// From now on the limit between two pieces is in force.
    fn goes_on(&self, exchange: &mut Exchange, now: Instant) {
        exchange.set_deadline(self.last.min(now + self.idle));
    }

    /// Gives the connection back.
    async fn finish(&self, mut exchange: Exchange) {
        std::future::poll_fn(|cx| {
            let now = penstock_shell::clock::now();
            exchange.finish(cx, &self.endpoint.live, self.job.worker.index, now);
            std::task::Poll::Ready(())
        })
        .await;
    }

    /// Holds an event stream back until it carries an answer, or is whole; the limit of the first token counts until
    /// its first token.
    async fn stream(&self, head: Response<()>, mut exchange: Exchange) -> Result<Answer, Failure> {
        let mut tokens = 0;
        let mut meter = Meter::new(self.way.api(self.job.api).wire());
        let mut held: Option<BytesMut> = None;
        let mut lease = None;
        loop {
            let begun = meter.has_started();
            let frame = self.frame(&mut exchange).await;
            let frame = frame.map_err(|err| self.failure(err, !begun))?;
            let (bytes, now) = match frame {
                Some(frame) => frame,
                None if meter.lacks_done_only() => {
                    (Bytes::from_static(DONE), penstock_shell::clock::now())
                }
                // Ended before it began, or before it was whole.
                None => return Err(Failure::Broken),
            };
            let seen = meter.feed(&bytes).map_err(|_| Failure::Broken)?;
            if meter.cut().is_some() && (self.buffers || !meter.has_started()) {
                return Err(Failure::GaveUp);
            }
            let before = held.as_ref().map_or(0, BytesMut::len);
            let size = before + bytes.len();
            let mut committed = meter.has_started() || meter.is_done() || size > MAX_HELD_BYTES;
            if committed {
                self.goes_on(&mut exchange, now);
            }
            if self.buffers {
                drop(lease.take());
                lease = self.job.worker.process.lease_body(size);
                committed = meter.is_done() || lease.is_none() || size > MAX_BUFFERED_BYTES;
            }
            tokens += seen.tokens;
            if committed {
                let cut_at = seen.cut_at.map(|at| before + at);
                let first = match held {
                    None => bytes,
                    Some(mut held) => {
                        held.extend_from_slice(&bytes);
                        held.freeze()
                    }
                };
                let created = penstock_shell::clock::since_epoch().as_secs();
                return Ok(Answer::Stream {
                    head,
                    begun: Begun {
                        exchange,
                        meter: Some(meter),
                        translator: self.way.stream(created, self.include_usage),
                        first,
                        cut_at,
                        tokens,
                    },
                });
            }
            held.get_or_insert_default().extend_from_slice(&bytes);
        }
    }

    /// Reads a JSON answer to its end, if it is not too large.
    async fn whole(&self, head: Response<()>, mut exchange: Exchange) -> Result<Answer, Failure> {
        let mut all: Option<Bytes> = None;
        let passes = self.way == Way::Straight;
        let most = if passes {
            MAX_WHOLE_BYTES
        } else {
            MAX_TRANSLATED_BYTES
        };
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
                if !passes {
                    return Err(Failure::Broken);
                }
                let begun = Begun {
                    exchange,
                    meter: None,
                    translator: None,
                    first: joined,
                    cut_at: None,
                    tokens: 0,
                };
                return Ok(Answer::Stream { head, begun });
            }
            all = Some(joined);
        }
        self.finish(exchange).await;
        let bytes = all.unwrap_or_default();
        let (usage, cut) = meter::of_whole(&bytes);
        if cut == Some(Cut::Abort) {
            return Err(Failure::GaveUp);
        }
        let bytes = if passes {
            bytes
        } else {
            let created = penstock_shell::clock::since_epoch().as_secs();
            let answer = self.way.answer(&bytes, created);
            answer.ok_or(Failure::Broken)?
        };
        Ok(Answer::Whole { head, bytes, usage })
    }

    /// Reads the body of an error answer, as far as it is of use.
    async fn error(&self, status: StatusCode, mut exchange: Exchange) -> Result<Bytes, Failure> {
        let mut all = BytesMut::new();
        while !exchange.is_over() {
            match self.frame(&mut exchange).await {
                Ok(Some((bytes, now))) => {
                    self.goes_on(&mut exchange, now);
                    all.extend_from_slice(&bytes);
                }
                Ok(None) => break,
                // The status has come: that is what counts.
                Err(_) => return Ok(Bytes::new()),
            }
            if all.len() > MAX_ERROR_BYTES {
                return Ok(Bytes::new());
            }
        }
        self.finish(exchange).await;
        Ok(match self.way {
            Way::Straight => all.freeze(),
            _ => provider::error(&all, status, self.job.api.dialect()),
        })
    }
}
