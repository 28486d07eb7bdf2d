//! (IO) Attempts: one endpoint after another until one begins to answer (see `begin`), the rule's limit is reached, or
//! nothing is left to try.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use penstock_core::config::Protocol;
use rand::RngExt as _;

use crate::begin::begin;
use crate::choose::{Choice, Nowhere, Pass, Tried, choose};
use crate::failure::Failure;
use crate::hold;
use crate::load::{BYTES_PER_TOKEN, Ticket};
use crate::meter::Usage;
use crate::openai::{Api, Call};
use crate::pick::Wish;
use crate::process::Worker;
use crate::provider::{Misfit, Rest, Translated, Way};
use crate::record::{InFlight, Record};
use crate::reject::Reject;
use crate::snapshot::{Candidate, Endpoint, Rule};
use crate::stream::Begun;

/// Larger bodies are sent once: keeping them until a first byte comes would hold too much memory.
pub(crate) const MAX_REPLAY_BYTES: usize = 1 << 20;
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
    /// The request in the protocol of backends that do not speak the caller's; made when the first of them is chosen.
    pub(crate) translated: OnceLock<Result<Translated, Misfit>>,
}

impl Job<'_> {
    fn wish<'a>(&'a self, now: Instant, unfit: &'a [Protocol]) -> Wish<'a> {
        Wish {
            now_ms: self.worker.process.ms(now),
            stream: self.call.stream,
            prompt_tokens: self.prompt_tokens(),
            blocks: &self.blocks,
            unfit,
        }
    }

    /// How the request reaches a backend of this protocol, and what it is then, if it is not what it was.
    pub(crate) fn way(
        &self,
        protocol: Protocol,
        rest: Rest,
    ) -> Result<(Way, Option<&Translated>), Misfit> {
        match Way::of(self.api, protocol) {
            None => Err(Misfit::Unsupported("model".to_owned())),
            Some(Way::Straight) => Ok((Way::Straight, None)),
            Some(way) => {
                let translated = self
                    .translated
                    .get_or_init(|| way.request(self.body, rest))
                    .as_ref();
                translated
                    .map(|translated| (way, Some(translated)))
                    .map_err(Clone::clone)
            }
        }
    }

    /// About how many tokens the prompt has.
    fn prompt_tokens(&self) -> u32 {
        u32::try_from(self.call.prompt.len()).unwrap_or(u32::MAX) / BYTES_PER_TOKEN
    }
}

/// The beginning of an answer, or all of it.
#[expect(
    clippy::large_enum_variant,
    reason = "one exists per request, and most are the large one"
)]
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
    let mut misfit: Option<Misfit> = None;
    let mut unfit: Vec<Protocol> = Vec::new();
    loop {
        let Some(rule) = record.rule.clone() else {
            return Err(Reject::NotConfigured);
        };
        let wish = job.wish(penstock_shell::clock::now(), &unfit);
        let found = choose(&rule, &record.tried, wish, &mut rand::rng());
        let choice = match found {
            Ok(choice) if may_go_on(&rule, record, &choice) => choice,
            Err(Nowhere::NoEndpoint) if last.is_none() => {
                let fits = |candidate: &Candidate| wish.fits(candidate);
                record.rule = Some(hold::until_ready(job, &rule, record, fits).await?);
                continue;
            }
            Err(nowhere) if last.is_none() => return Err(nowhere_reject(nowhere, misfit)),
            Ok(_) | Err(_) => return last.map_or(Err(Reject::NoEndpoint), Failure::conclude),
        };
        let Some((tier, candidate)) = rule
            .tiers
            .get(choice.tier)
            .and_then(|tier| Some((tier, tier.candidates.get(choice.candidate)?)))
        else {
            return Err(Reject::NoEndpoint);
        };
        let protocol = candidate.backend.protocol;
        if let Err(why) = job.way(protocol, rule.rest) {
            record.tried.push(tried(&choice, "unsupported", false));
            misfit = Some(why);
            unfit.push(protocol);
            continue;
        }
        if choice.pass == Pass::Again {
            back_off(record.attempts).await;
        }
        if !job.blocks.is_empty() {
            tier.prefixes.learn(&job.blocks, choice.endpoint.live.id);
        }
        let entered = penstock_shell::clock::now();
        let work = job.wish(entered, &[]).work_at(&choice.endpoint);
        enter(job, record, candidate, &choice, entered);
        match begin(job, record, &rule, candidate, &choice.endpoint).await {
            Ok(answer) => {
                choice.endpoint.live.outlier.succeeded();
                if !matches!(answer, Answer::Refused { .. }) {
                    observe(job, &choice.endpoint, entered, work);
                }
                return Ok(answer);
            }
            Err(failure) => {
                note(job, candidate, &choice, &failure, record);
                let is_large = failure.sent() && job.body.len() > MAX_REPLAY_BYTES;
                if is_large || failure.is_final() {
                    return failure.conclude();
                }
                last = Some(failure);
            }
        }
    }
}

/// What the caller is told when not one attempt could be made.
fn nowhere_reject(nowhere: Nowhere, misfit: Option<Misfit>) -> Reject {
    match (nowhere, misfit) {
        (Nowhere::Unfit, Some(Misfit::Invalid(param, expected))) => {
            Reject::InvalidField { param, expected }
        }
        (Nowhere::Unfit, Some(Misfit::Unsupported(param))) => {
            Reject::UnsupportedByBackend { param }
        }
        (Nowhere::NoCredential, _) => Reject::CredentialMissing,
        (Nowhere::Closed(ms), _) => Reject::UpstreamBusy {
            retry_after: Some(HeaderValue::from(ms.div_ceil(1000))),
        },
        _ => Reject::NoEndpoint,
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
    record
        .tried
        .push(tried(choice, failure.label(), failure.again()));
}

fn tried(choice: &Choice, reason: &'static str, again: bool) -> Tried {
    Tried {
        tier: choice.tier,
        candidate: choice.candidate,
        endpoint: Arc::clone(&choice.endpoint),
        reason,
        again,
    }
}
