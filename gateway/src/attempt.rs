//! (IO) Attempts: one endpoint after another until one begins to answer (see `begin`), the rule's limit is reached, or
//! nothing is left to try.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use penstock_core::config::Protocol;
use penstock_core::ids::BackendId;
use rand::RngExt as _;
use xxhash_rust::xxh3::xxh3_128;

use crate::capability::Needed;
use crate::choose::{Choice, Nowhere, Pass, choose};
use crate::conditions::Asked;
use crate::explain::{self, Explanation};
use crate::failure::Failure;
use crate::hedge::{Lane, Raced, race};
use crate::hold;
use crate::load::Ticket;
use crate::meter::Usage;
use crate::metrics::Hedged;
use crate::openai::{Api, Call};
use crate::overload;
use crate::process::{Process, Worker};
use crate::provider::translations::Translations;
use crate::provider::{Misfit, Rest, Route, Translated};
use crate::record::{InFlight, Record};
use crate::reject::Reject;
use crate::service::{self, Passing};
use crate::snapshot::{Candidate, Rule, Snapshot};
use crate::stream::Begun;
use crate::vitals::Sample;
use crate::wish::{self, Unfit, Wish};

/// Larger bodies are sent once: keeping them until a first byte comes would hold too much memory.
pub(crate) const MAX_REPLAY_BYTES: usize = 1 << 20;
/// Before the same endpoint is asked again, times the number of attempts so far, and jittered by half.
const BACKOFF: Duration = Duration::from_millis(50);

/// What a request asks of its attempts.
pub(crate) struct Job<'a> {
    pub(crate) worker: &'a Arc<Worker>,
    /// The request's id.
    pub(crate) id: HeaderValue,
    /// When its head was read.
    pub(crate) started: Instant,
    pub(crate) api: Api,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a Bytes,
    pub(crate) call: &'a Call<'a>,
    /// Hashes of the prompt's leading blocks, if the rule's strategy asks for them.
    pub(crate) blocks: Vec<u64>,
    /// Hash of what the rule's strategy keeps together.
    pub(crate) key: Option<u64>,
    /// The request in the protocols of backends that do not speak the caller's.
    pub(crate) translated: Translations,
    /// Set where it is no call of a model.
    pub(crate) passing: Option<&'a Passing<'a>>,
}

impl Job<'_> {
    pub(crate) fn wish<'a>(&'a self, now: Instant, unfit: &'a Unfit) -> Wish<'a> {
        Wish {
            now_ms: self.worker.process.ms(now),
            stream: self.call.stream,
            prompt_tokens: self.prompt_tokens(),
            answer_tokens: wish::answer_tokens(self.call),
            blocks: &self.blocks,
            key: self.key,
            unfit,
        }
    }

    /// How the request reaches a backend of this protocol, and what it is then, if it is not what it was.
    pub(crate) fn route(
        &self,
        protocol: Protocol,
        rest: Rest,
    ) -> Result<(Route, Option<&Translated>), Misfit> {
        let Some(route) = Route::of(self.api, protocol) else {
            return Err(Misfit::Unsupported(self.api.path().to_owned()));
        };
        if route.is_straight() {
            return Ok((route, None));
        }
        let translated = self
            .translated
            .of(protocol, || route.request(self.body, rest));
        translated
            .as_ref()
            .map(|translated| (route, Some(translated)))
            .map_err(Clone::clone)
    }

    /// Who cannot carry the request, as far as its rule's backends say.
    fn unfit(&self, rule: Option<&Rule>) -> Unfit {
        Unfit {
            needed: rule.map_or(Needed::NOTHING, |rule| {
                Needed::of(rule, self.api, self.call)
            }),
            ..Unfit::default()
        }
    }

    /// Why the chosen candidate cannot carry the request, and who else cannot for the same reason.
    pub(crate) fn misfit(
        &self,
        candidate: &Candidate,
        choice: &Choice,
        rest: Rest,
        unfit: &mut Unfit,
    ) -> Option<Misfit> {
        let backend = &candidate.backend;
        if let Err(why) = self.route(backend.protocol, rest) {
            unfit.protocols.push(backend.protocol);
            return Some(why);
        }
        let model = candidate.model_name(&self.call.model);
        if choice.endpoint.targets.take(model) {
            return None;
        }
        unfit.backends.push(backend.id.clone());
        let expected =
            "a name without empty parts, '.' and '..', because the backend has it in its path";
        Some(Misfit::Invalid("model".to_owned(), expected))
    }

    /// Whether it may go upstream once more though it, or part of it, was there.
    pub(crate) fn may_be_sent_again(&self) -> bool {
        let is_repeatable = self.passing.is_none_or(|passing| passing.is_repeatable);
        is_repeatable && self.body.len() <= MAX_REPLAY_BYTES
    }

    pub(crate) fn prompt_tokens(&self) -> u32 {
        self.call.prompt_tokens()
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

/// Where a request would go now, without sending it.
pub(crate) fn explain(
    process: &Process,
    snapshot: &Snapshot,
    rule: &Rule,
    api: Api,
    asked: &Asked<'_>,
    body: &[u8],
) -> Explanation {
    let call = asked.call;
    let protocols: BTreeSet<Protocol> = rule
        .candidates()
        .map(|candidate| candidate.backend.protocol)
        .collect();
    let misfits: Vec<(Protocol, Misfit)> = protocols
        .into_iter()
        .filter_map(|protocol| Some((protocol, misfit(api, protocol, body, rule.rest)?)))
        .collect();
    let unfit = Unfit {
        protocols: misfits.iter().map(|(protocol, _)| *protocol).collect(),
        backends: Vec::new(),
        needed: Needed::of(rule, api, call),
    };
    let blocks = wish::blocks(rule, call);
    let wish = Wish {
        now_ms: process.ms(penstock_shell::clock::now()),
        stream: call.stream,
        prompt_tokens: call.prompt_tokens(),
        answer_tokens: wish::answer_tokens(call),
        blocks: &blocks,
        key: wish::key(rule, asked.headers, call),
        unfit: &unfit,
    };
    let choice = choose(rule, &[], wish, &mut rand::rng()).ok();
    explain::explain(snapshot, rule, wish, &misfits, choice.as_ref())
}

/// Why a backend of this protocol cannot carry the request.
fn misfit(api: Api, protocol: Protocol, body: &[u8], rest: Rest) -> Option<Misfit> {
    match Route::of(api, protocol) {
        None => Some(Misfit::Unsupported(api.path().to_owned())),
        Some(route) if route.is_straight() => None,
        Some(route) => route.request(body, rest).err(),
    }
}

/// One in so many requests is told in the decision log.
fn log_decision(job: &Job<'_>, rule: &Rule, unfit: &Unfit, choice: &Choice) {
    let process = &job.worker.process;
    let share = process.settings.decision_log_share;
    if share <= 0.0 || rand::rng().random::<f64>() >= share {
        return;
    }
    if let Some(snapshot) = process.snapshot.load().as_deref() {
        let wish = job.wish(penstock_shell::clock::now(), unfit);
        let told = explain::explain(snapshot, rule, wish, &[], Some(choice));
        let id = job.id.to_str().unwrap_or("");
        // One text: a log's field holds no structure.
        let told = serde_json::to_string(&told).unwrap_or_default();
        tracing::info!(target: "decision", { request.id = id, decision = told }, "decision");
    }
}

/// What comes next for a request.
enum Next {
    Attempt(Choice),
    /// Something has changed for the better.
    LookAgain,
    Nothing(Nowhere),
}

/// Chooses the next endpoint, and waits where that helps: for an endpoint, for room, for the end of a `Retry-After`.
async fn next(
    job: &Job<'_>,
    rule: &Arc<Rule>,
    record: &mut Record,
    unfit: &Unfit,
    is_first: bool,
) -> Result<Next, Reject> {
    let wish = job.wish(penstock_shell::clock::now(), unfit);
    let mut found = if is_first && !job.worker.process.queue.is_empty() {
        Err(Nowhere::Full)
    } else {
        choose(rule, &record.tried, wish, &mut rand::rng())
    };
    if is_first && matches!(found, Err(Nowhere::Full)) {
        found = overload::in_turn(job, rule, record, unfit).await;
    }
    Ok(match found {
        Ok(choice) if may_go_on(rule, record, &choice, job.prompt_tokens()) => {
            Next::Attempt(choice)
        }
        Ok(_) => Next::Nothing(Nowhere::Spent),
        Err(Nowhere::NoEndpoint) if is_first => {
            let fits = |candidate: &Candidate| wish.fits(candidate);
            record.rule = Some(hold::until_ready(job, rule, record, fits).await?);
            Next::LookAgain
        }
        Err(Nowhere::Closed(ms)) if hold::until_open(job, rule, record, ms).await => {
            Next::LookAgain
        }
        Err(nowhere) => Next::Nothing(nowhere),
    })
}

/// Tries endpoints until one answers. `record.rule` is set.
pub(crate) async fn run(job: &Job<'_>, record: &mut Record) -> Result<Answer, Reject> {
    let mut last: Option<Failure> = None;
    let mut misfit: Option<Misfit> = None;
    let mut unfit = job.unfit(record.rule.as_deref());
    blamed(job)?;
    loop {
        let Some(rule) = record.rule.clone() else {
            return Err(Reject::NotConfigured);
        };
        let choice = match next(job, &rule, record, &unfit, last.is_none()).await? {
            Next::Attempt(choice) => choice,
            Next::LookAgain => {
                if last.is_none() {
                    unfit = job.unfit(record.rule.as_deref());
                }
                continue;
            }
            Next::Nothing(nowhere) => {
                let misfit = misfit.or(unfit.needed.misfit(&rule));
                return last.map_or_else(
                    || Err(nowhere_reject(nowhere, misfit)),
                    |last| service::conclude(job, last),
                );
            }
        };
        let Some((tier, candidate)) = rule
            .tiers
            .get(choice.tier)
            .and_then(|tier| Some((tier, tier.candidates.get(choice.candidate)?)))
        else {
            return Err(Reject::NoEndpoint);
        };
        if let Some(why) = job.misfit(candidate, &choice, rule.rest, &mut unfit) {
            record.tried.push(choice.failed("unsupported", false));
            misfit = Some(why);
            continue;
        }
        if choice.pass == Pass::Again {
            back_off(record.attempts).await;
        }
        if !job.blocks.is_empty() {
            tier.prefixes.learn(&job.blocks, choice.endpoint.live.id);
        }
        if record.attempts == 0 {
            log_decision(job, &rule, &unfit, &choice);
        }
        let lane = Lane::new(job, choice);
        enter(job, record, candidate, &lane);
        let raced = race(job, &rule, lane, &record.tried, &unfit).await;
        unfit.backends.extend(refusers(&rule, &raced));
        let (lane, result) = settle(job, record, &rule, raced);
        match result {
            Ok(answer) => {
                lane.choice.endpoint.live.outlier.succeeded();
                observe(job, &lane, Some(&answer));
                begun(job, &rule, &lane.choice, &answer);
                return Ok(answer);
            }
            Err(failure) => {
                note(job, &rule, &lane.choice, &failure, record);
                refuse_what_ends_backends(job, &lane.choice, &failure)?;
                if !may_be_repeated(job, &rule, &failure) {
                    return service::conclude(job, failure);
                }
                last = Some(failure);
            }
        }
    }
}

fn may_be_repeated(job: &Job<'_>, rule: &Rule, failure: &Failure) -> bool {
    let is_bound = failure.sent() && !job.may_be_sent_again();
    !is_bound && !failure.is_final() && rule.retry_on.contains(&failure.class())
}

/// Takes in how a race went: the request is now where its winner is.
fn settle(
    job: &Job<'_>,
    record: &mut Record,
    rule: &Rule,
    raced: Raced,
) -> (Lane, Result<Answer, Failure>) {
    let Raced {
        lane,
        result,
        other,
        in_flight,
    } = raced;
    let Some((other, failure)) = other else {
        return (lane, result);
    };
    record.attempts += 1;
    let hedge = match (&in_flight, &result, &failure) {
        (Some(_), Ok(_), _) => Hedged::Won,
        (None, _, None) => Hedged::Lost,
        _ => Hedged::Failed,
    };
    record.hedge = Some(hedge);
    job.worker.process.metrics.hedged(hedge);
    match failure {
        Some(failure) => note(job, rule, &other.choice, &failure, record),
        // It has taken that long at least.
        None if in_flight.is_some() => observe(job, &other, None),
        None => {}
    }
    if in_flight.is_some() {
        record.in_flight = in_flight;
        let choice = &lane.choice;
        record.choose(choice.tier, choice.candidate, choice.pass);
        if let Some(candidate) = candidate_of(rule, choice) {
            move_ticket(job, record, candidate, lane.entered);
        }
    }
    (lane, result)
}

/// The backends that refused the request, the hedge's included.
fn refusers(rule: &Rule, raced: &Raced) -> impl Iterator<Item = BackendId> {
    let first = raced.result.as_ref().err().map(|why| (&raced.lane, why));
    let other = raced.other.as_ref();
    let other = other.and_then(|(lane, why)| Some((lane, why.as_ref()?)));
    let failed = first.into_iter().chain(other);
    let refused = failed.filter(|(_, why)| matches!(why, Failure::Refused { .. }));
    refused.filter_map(|(lane, _)| Some(candidate_of(rule, &lane.choice)?.backend.id.clone()))
}

pub(crate) fn candidate_of<'a>(rule: &'a Rule, choice: &Choice) -> Option<&'a Candidate> {
    rule.tiers
        .get(choice.tier)?
        .candidates
        .get(choice.candidate)
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
        (Nowhere::Full, _) => Reject::Saturated,
        (Nowhere::Closed(ms), _) => Reject::UpstreamBusy {
            retry_after: Some(HeaderValue::from(ms.div_ceil(1000))),
        },
        _ => Reject::NoEndpoint,
    }
}

/// The first attempt is always made, further ones up to the rule's limit; at endpoints that fail, while its budget
/// lasts.
fn may_go_on(rule: &Rule, record: &Record, choice: &Choice, prompt_tokens: u32) -> bool {
    if record.attempts == 0 {
        rule.retries.earn();
        if let Some(hedge) = &rule.hedge {
            hedge.budget.earn(prompt_tokens, hedge.extra_percent);
        }
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

/// An answer counts as what the endpoint can do, and as a caller who waited long enough.
fn begun(job: &Job<'_>, rule: &Rule, choice: &Choice, answer: &Answer) {
    if !matches!(answer, Answer::Refused { .. }) {
        let live = &choice.endpoint.live;
        live.pace
            .begun(job.worker.process.ms(penstock_shell::clock::now()));
        live.patience.answered();
        rule.patience.answered();
        let suspects = &job.worker.process.suspects;
        if !suspects.is_empty() {
            suspects.answered(xxh3_128(job.body));
        }
    }
}

/// Refuses a body that is to blame for the end of backends.
fn blamed(job: &Job<'_>) -> Result<(), Reject> {
    let process = &job.worker.process;
    if process.suspects.is_empty() || job.passing.is_some() {
        return Ok(());
    }
    let now_ms = process.ms(penstock_shell::clock::now());
    match process.suspects.blamed_ms(xxh3_128(job.body), now_ms) {
        None => Ok(()),
        Some(left_ms) => Err(Reject::EndsBackends {
            retry_after_s: u32::try_from(left_ms.div_ceil(1000)).unwrap_or(u32::MAX),
        }),
    }
}

/// A body that has just ended its second backend goes to no third one.
fn refuse_what_ends_backends(
    job: &Job<'_>,
    choice: &Choice,
    failure: &Failure,
) -> Result<(), Reject> {
    // Bodies of agents and tools are often empty or alike: they say nothing of what the request is.
    if job.passing.is_some() || !matches!(failure, Failure::Broken) {
        return Ok(());
    }
    let process = &job.worker.process;
    let now_ms = process.ms(penstock_shell::clock::now());
    let body = xxh3_128(job.body);
    let endpoint = choice.endpoint.live.id;
    if process.suspects.broke(body, endpoint, now_ms) {
        tracing::warn!(
            request.id = job.id.to_str().unwrap_or(""),
            "two backends broke off when they read this request: it is not sent again for a while"
        );
        return blamed(job);
    }
    Ok(())
}

/// Tells the balancer how long the endpoint took to begin a stream, per unit of work that it had before it, or to give
/// another answer whole. `None`: it has not answered yet.
fn observe(job: &Job<'_>, lane: &Lane, answer: Option<&Answer>) {
    if matches!(answer, Some(Answer::Refused { .. })) {
        return;
    }
    let now = penstock_shell::clock::now();
    let took_ms = now.saturating_duration_since(lane.entered).as_secs_f32() * 1000.0;
    let sample_ms = if job.call.stream {
        took_ms / lane.work
    } else {
        took_ms
    };
    let live = &lane.choice.endpoint.live;
    let now_ms = job.worker.process.ms(now);
    live.latency(job.call.stream).observe(sample_ms, now_ms);
    // Affinity sends known prompts to one endpoint and new ones to the others, which are then slower and not at fault.
    if job.key.is_some() || !job.blocks.is_empty() {
        return;
    }
    if job.call.stream {
        live.vitals.note(Sample::FirstToken(sample_ms), now_ms);
    } else if let Some(Answer::Whole {
        usage: Some(usage), ..
    }) = answer
    {
        let tokens = u16::try_from(usage.completion_tokens.max(1));
        let tokens = tokens.map_or(f32::from(u16::MAX), f32::from);
        live.vitals.note(Sample::Whole(took_ms / tokens), now_ms);
    }
}

/// Moves the request to its next endpoint in the ledger and the record.
fn enter(job: &Job<'_>, record: &mut Record, candidate: &Candidate, lane: &Lane) {
    let choice = &lane.choice;
    record.attempts += 1;
    record.choose(choice.tier, choice.candidate, choice.pass);
    record.in_flight = None;
    record.in_flight = Some(InFlight::enter(
        &choice.endpoint,
        job.call.stream,
        job.prompt_tokens(),
        lane.entered,
        job.worker.process.ms(lane.entered),
    ));
    move_ticket(job, record, candidate, lane.entered);
}

fn move_ticket(job: &Job<'_>, record: &mut Record, candidate: &Candidate, now: Instant) {
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

fn note(job: &Job<'_>, rule: &Rule, choice: &Choice, failure: &Failure, record: &mut Record) {
    let Some(candidate) = candidate_of(rule, choice) else {
        return;
    };
    let process = &job.worker.process;
    let now_ms = process.ms(penstock_shell::clock::now());
    let endpoints = &candidate.backend.endpoints;
    if matches!(failure, Failure::FirstTokenTimeout) {
        choice.endpoint.live.patience.left(rule.first_token, now_ms);
        rule.patience.left(rule.first_token, now_ms);
    }
    let mut again = failure.again();
    if failure.is_limit() {
        let wait = failure.retry_after(penstock_shell::clock::since_epoch());
        choice.endpoint.live.cooldown.ask(wait, now_ms);
        // Not before that time, which the cooldown sees to.
        again |= wait.is_some();
    }
    if failure.weight() > 0 {
        choice.endpoint.live.vitals.note(Sample::Failed, now_ms);
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
    record.tried.push(choice.failed(failure.label(), again));
}
