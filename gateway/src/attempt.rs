//! (IO) Attempts: one endpoint after another until one begins to answer (see `begin`), the rule's limit is reached, or
//! nothing is left to try.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Response};
use rand::RngExt as _;

use crate::begun::Begun;
use crate::choose::{Choice, Nowhere, Pass, UNSUPPORTED, choose};
use crate::decisions::{Decisions, Made, Purpose};
use crate::failure::Failure;
use crate::fallback;
use crate::fan_out;
use crate::hedge::{self, Lane, Raced, race};
use crate::hold;
use crate::job::Job;
use crate::load::Ticket;
use crate::meter::Usage;
use crate::metrics::Hedged;
use crate::outcome;
use crate::overload;
use crate::provider::Misfit;
use crate::record::Record;
use crate::reject::Reject;
use crate::rescue::Rescue;
use crate::service;
use crate::silence;
use crate::snapshot::{Candidate, Rule};
use crate::wish::{BackendModel, Unfit};

/// Before the same endpoint is asked again, times the number of attempts so far, and jittered by half.
const BACKOFF: Duration = Duration::from_millis(50);

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
    /// The backend's own refusal, to be passed on, whatever its status.
    Refused { head: Response<()>, bytes: Bytes },
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
    unfit: &mut Unfit,
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
    if is_first {
        let wish = job.wish(penstock_shell::clock::now(), unfit);
        let other = fallback::in_place(&found, rule, &record.tried, wish, &mut rand::rng());
        if let Some((choice, failed)) = other {
            unfit.failed = failed;
            found = Ok(choice);
        }
        let wish = job.wish(penstock_shell::clock::now(), unfit);
        found = silence::heeded(found, rule, wish);
    }
    Ok(match found {
        Ok(choice) if may_go_on(rule, record, &choice, job.prompt_tokens()) => {
            Next::Attempt(choice)
        }
        Ok(_) => Next::Nothing(Nowhere::Spent),
        Err(Nowhere::NoEndpoint) if is_first => {
            let wish = job.wish(penstock_shell::clock::now(), unfit);
            let fits = |candidate: &Candidate| wish.fits(candidate);
            record.rule = Some(hold::until_ready(job, rule, record, fits).await?);
            Next::LookAgain
        }
        Err(Nowhere::Closed(ms) | Nowhere::Unavailable(ms))
            if hold::until_open(job, rule, record, ms).await =>
        {
            Next::LookAgain
        }
        Err(nowhere) => Next::Nothing(nowhere),
    })
}

/// Tries endpoints until one answers. `record.rule` is set.
pub(crate) async fn run(job: &Job<'_>, record: &mut Record) -> Result<Answer, Reject> {
    let mut last: Option<Failure> = None;
    let mut misfit: Option<Misfit> = None;
    let trial = outcome::tried(job, record.rule.as_deref())?;
    let mut unfit = job.unfit(record.rule.as_deref(), trial);
    record.decisions = Decisions::sampled(&job.worker.process);
    loop {
        let Some(rule) = record.rule.clone() else {
            return Err(Reject::NotConfigured);
        };
        let next = next(job, &rule, record, &mut unfit, last.is_none()).await;
        let choice = match next.inspect_err(|_| {
            decided(job, &rule, record, &unfit, Err(Nowhere::NoEndpoint));
        })? {
            Next::Attempt(choice) => choice,
            Next::LookAgain => {
                if last.is_none() {
                    unfit = job.unfit(record.rule.as_deref(), trial);
                }
                continue;
            }
            Next::Nothing(nowhere) => {
                decided(job, &rule, record, &unfit, Err(nowhere));
                let misfit = misfit.or(unfit.needed.misfit(&rule));
                return match last {
                    None => Err(nowhere_reject(nowhere, misfit)),
                    // Of all that could be asked: as if none had been there.
                    Some(Failure::Broken) => Err(Reject::Unreachable),
                    Some(last) => service::conclude(job, last),
                };
            }
        };
        let Some(candidate) = candidate_of(&rule, &choice) else {
            return Err(Reject::NoEndpoint);
        };
        if let Some(why) = job.misfit(candidate, &choice, rule.rest, &mut unfit) {
            record.tried.push(choice.failed(UNSUPPORTED, false));
            misfit = Some(why);
            continue;
        }
        if choice.pass == Pass::Again {
            back_off(record.attempts).await;
        }
        decided(job, &rule, record, &unfit, Ok(&choice));
        let lane = Lane::new(job, &rule, choice);
        enter(job, record, candidate, &lane);
        if rule.wants_all() {
            return Box::pin(fan_out::all(job, record, &rule, lane, &unfit)).await;
        }
        let raced = race(job, &rule, lane, record, &unfit).await;
        learn(&mut unfit, &rule, &raced);
        let (lane, result) = settle(job, record, &rule, raced);
        match result {
            Ok(mut answer) => {
                outcome::answered(job, &rule, &lane, &answer);
                if let Answer::Stream { begun, .. } = &mut answer {
                    begun.rescue = Rescue::of(job, &rule, &lane.choice);
                }
                return Ok(answer);
            }
            Err(failure) => {
                note(job, &rule, &lane, &failure, record);
                outcome::refuse_what_ends_backends(job, &lane.choice, &failure)?;
                if !may_be_repeated(job, &rule, &failure) {
                    return service::conclude(job, failure);
                }
                last = Some(failure);
            }
        }
    }
}

/// Whom the request does not fit either, after what became of a race.
fn learn(unfit: &mut Unfit, rule: &Rule, raced: &Raced) {
    unfit.models.extend(refusers(rule, raced));
    for failure in failures(raced) {
        unfit.failed.add(failure.class(), rule);
    }
}

/// Tells the decision log where the next attempt goes.
fn decided(
    job: &Job<'_>,
    rule: &Rule,
    record: &mut Record,
    unfit: &Unfit,
    found: Result<&Choice, Nowhere>,
) {
    let Some(decisions) = &mut record.decisions else {
        return;
    };
    let made = Made {
        purpose: if record.attempts == 0 {
            Purpose::First
        } else {
            Purpose::Retry
        },
        unfit,
        tried: &record.tried,
        found,
        changes: &record.changes,
    };
    decisions.note(job, rule, &made);
}

fn may_be_repeated(job: &Job<'_>, rule: &Rule, failure: &Failure) -> bool {
    let was_sent = failure.sent() || job.is_begun();
    let is_bound = was_sent && !job.may_be_sent_again();
    !is_bound && !failure.is_final() && rule.falls_back_on(failure.class())
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
        others,
        place,
    } = raced;
    record.attempts += others.len();
    match (rule.fan_out, &others[..]) {
        (Some(fan_out), [_, ..]) => record.fan_out = Some((fan_out.mode, others.len() + 1)),
        (None, [(_, failure)]) => {
            let hedge = match (&place, &result, failure) {
                (Some(_), Ok(_), _) => Hedged::Won,
                (None, _, None) => Hedged::Lost,
                _ => Hedged::Failed,
            };
            record.hedge = Some(hedge);
            job.worker.process.metrics.hedged(hedge);
        }
        _ => {}
    }
    for (other, failure) in &others {
        match failure {
            Some(failure) => {
                note(job, rule, other, failure, record);
            }
            // It has taken that long at least.
            None if place.is_some() => outcome::observe(job, other, None),
            None => {}
        }
    }
    if let Some(place) = place {
        let choice = &lane.choice;
        record.choose(choice.tier, choice.candidate, choice.pass);
        record.in_flight = Some(place.in_flight);
        record.foreseen = lane.foreseen;
        if place.ticket.is_some() {
            record.ticket = place.ticket;
        } else if let Some(candidate) = candidate_of(rule, choice) {
            move_ticket(job, record, candidate, lane.entered);
        }
    }
    let result = result.map(|(answer, reservation)| {
        record.reservation = reservation;
        answer
    });
    (lane, result)
}

pub(crate) fn note(
    job: &Job<'_>,
    rule: &Rule,
    lane: &Lane,
    failure: &Failure,
    record: &mut Record,
) {
    let (process, model) = (&job.worker.process, &job.call.model);
    outcome::note(process, model, rule, &lane.choice, failure, record);
}

/// The models of backends that refused the request, those that were asked beside the first one included.
fn refusers(rule: &Rule, raced: &Raced) -> impl Iterator<Item = BackendModel> {
    let first = raced.result.as_ref().err().map(|why| (&raced.lane, why));
    let others = raced.others.iter();
    let others = others.filter_map(|(lane, why)| Some((lane, why.as_ref()?)));
    let failed = first.into_iter().chain(others);
    let refused = failed.filter(|(_, why)| why.is_of_all_endpoints());
    refused.filter_map(|(lane, _)| candidate_of(rule, &lane.choice).map(BackendModel::of))
}

/// Why the attempts failed that did.
fn failures(raced: &Raced) -> impl Iterator<Item = &Failure> {
    let others = raced.others.iter().filter_map(|(_, why)| why.as_ref());
    raced.result.as_ref().err().into_iter().chain(others)
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
        (Nowhere::Silent(silence), _) => Reject::UpstreamSilent {
            waited: silence.waited,
            retry_after_s: u32::try_from(silence.back_ms.div_ceil(1000)).unwrap_or(u32::MAX),
        },
        (Nowhere::Closed(ms), _) => Reject::UpstreamBusy {
            retry_after: Some(HeaderValue::from(ms.div_ceil(1000))),
        },
        (Nowhere::Unavailable(ms), _) => Reject::UpstreamUnavailable {
            retry_after_s: u32::try_from(ms.div_ceil(1000)).unwrap_or(u32::MAX),
        },
        _ => Reject::NoEndpoint,
    }
}

/// The first attempt is always made, further ones up to the rule's limit; at endpoints that fail, while its budget
/// lasts.
fn may_go_on(rule: &Rule, record: &Record, choice: &Choice, prompt_tokens: u32) -> bool {
    if record.attempts == 0 {
        // Those who could not carry it were none.
        if record.tried.is_empty() {
            rule.retries.earn();
            if let Some(hedge) = &rule.hedge {
                hedge.budget.earn(prompt_tokens, hedge.extra_percent);
            }
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

/// Moves the request to its next endpoint in the ledger and the record.
pub(crate) fn enter(job: &Job<'_>, record: &mut Record, candidate: &Candidate, lane: &Lane) {
    let choice = &lane.choice;
    record.attempts += 1;
    record.choose(choice.tier, choice.candidate, choice.pass);
    record.foreseen = lane.foreseen;
    record.in_flight = None;
    record.in_flight = Some(hedge::enter(job, lane));
    move_ticket(job, record, candidate, lane.entered);
}

fn move_ticket(job: &Job<'_>, record: &mut Record, candidate: &Candidate, now: Instant) {
    let ledger = &candidate.backend.ledger;
    match &mut record.ticket {
        Some(ticket) if ticket.is_of(ledger) => ticket.release(),
        _ => {
            record.ticket = None;
            record.ticket = Some(ticket(job, candidate, now));
        }
    }
}

/// Counts the request in at a backend.
pub(crate) fn ticket(job: &Job<'_>, candidate: &Candidate, now: Instant) -> Ticket {
    Ticket::enter(
        &candidate.backend.ledger,
        job.worker.index,
        job.body.len(),
        job.call.stream,
        now,
    )
}
