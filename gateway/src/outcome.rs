//! What the end of an attempt says: of its endpoint, to balancer, breakers and outlier detection; of its request, where
//! that is to blame.

use penstock_core::config::FailureClass;
use xxhash_rust::xxh3::xxh3_128;

use crate::attempt::{Answer, candidate_of};
use crate::balance::prefix_affinity::Owner;
use crate::choose::Choice;
use crate::failure::Failure;
use crate::hedge::Lane;
use crate::job::Job;
use crate::openai::Api;
use crate::outlier::Wait;
use crate::process::Process;
use crate::record::Record;
use crate::reject::Reject;
use crate::snapshot::{Candidate, Endpoint, Rule};
use crate::suspects::Verdict;
use crate::vitals::Sample;

/// What an answer says of its endpoint and its request.
pub(crate) fn answered(job: &Job<'_>, rule: &Rule, lane: &Lane, answer: &Answer) {
    let outlier = &lane.choice.endpoint.live.outlier;
    match answer {
        Answer::Whole { .. } => outlier.succeeded(),
        Answer::Stream { .. } | Answer::Refused { .. } => outlier.began(),
    }
    observe(job, lane, Some(answer));
    begun(job, rule, &lane.choice, answer);
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

/// Refuses a body that is to blame for the end of backends, or says where alone it is tried once more.
pub(crate) fn tried(job: &Job<'_>, rule: Option<&Rule>) -> Result<Option<Owner>, Reject> {
    let process = &job.worker.process;
    if process.suspects.is_empty() || job.passing.is_some() {
        return Ok(None);
    }
    let now_ms = process.ms(penstock_shell::clock::now());
    match process.suspects.verdict(xxh3_128(job.body), now_ms) {
        Verdict::Free => Ok(None),
        Verdict::Trial(endpoint) => {
            let candidates = rule.into_iter().flat_map(Rule::candidates);
            let mut all = candidates.flat_map(|candidate| &candidate.backend.endpoints);
            // One that is gone can end no more.
            let is_there = all.any(|one| one.live.id == endpoint);
            Ok(is_there.then_some(endpoint))
        }
        Verdict::Blamed(left_ms) => Err(Reject::EndsBackends {
            retry_after_s: u32::try_from(left_ms.div_ceil(1000)).unwrap_or(u32::MAX),
        }),
    }
}

/// A body that has just ended its second backend goes to no third one.
pub(crate) fn refuse_what_ends_backends(
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
        return tried(job, None).map(drop);
    }
    Ok(())
}

/// Tells the balancer how long the endpoint took to begin a stream, per unit of work that it had before it, or to give
/// another answer whole. `None`: it has not answered yet.
pub(crate) fn observe(job: &Job<'_>, lane: &Lane, answer: Option<&Answer>) {
    // How long an engine takes to count says nothing of how long it takes to answer.
    if job.api == Api::CountTokens {
        return;
    }
    let now = penstock_shell::clock::now();
    if matches!(answer, Some(Answer::Refused { .. })) {
        let live = &lane.choice.endpoint.live;
        return live.presume_slow(job.worker.process.ms(now));
    }
    let took_ms = now.saturating_duration_since(lane.entered).as_secs_f32() * 1000.0;
    let sample_ms = if job.call.stream {
        took_ms / lane.work
    } else {
        took_ms
    };
    let live = &lane.choice.endpoint.live;
    let now_ms = job.worker.process.ms(now);
    // Longer than a time that is below what is known anyway says nothing.
    if answer.is_none() && sample_ms < live.latency(job.call.stream).at(now_ms) {
        return;
    }
    live.latency(job.call.stream).observe(sample_ms, now_ms);
    if let Some(foreseen) = &lane.foreseen {
        live.adaptive.begun(foreseen, took_ms, now_ms);
    }
    if !lane.is_comparable {
        return;
    }
    if job.call.stream {
        live.vitals.note(Sample::FirstToken(sample_ms), now_ms);
    } else if let Some(Answer::Whole {
        usage: Some(usage), ..
    }) = answer
        && job.api.generates()
    {
        let tokens = u16::try_from(usage.completion_tokens.max(1));
        let tokens = tokens.map_or(f32::from(u16::MAX), f32::from);
        live.vitals.note(Sample::Whole(took_ms / tokens), now_ms);
    }
}

/// A failure counts against the endpoint, as far as it is the endpoint's. `model` is as the caller calls it.
pub(crate) fn note(
    process: &Process,
    model: &str,
    rule: &Rule,
    choice: &Choice,
    failure: &Failure,
    record: &mut Record,
) {
    let Some(candidate) = candidate_of(rule, choice) else {
        return;
    };
    let now_ms = process.ms(penstock_shell::clock::now());
    let model = candidate.model_name(model);
    if matches!(failure, Failure::FirstTokenTimeout) {
        choice.endpoint.live.patience.left(rule.first_token, now_ms);
        rule.patience.left(rule.first_token, now_ms);
    }
    let mut again = failure.again();
    if failure.is_limit() {
        let wait = failure.retry_after(penstock_shell::clock::since_epoch());
        let limits = &choice.endpoint.live.limits;
        if failure.class() == FailureClass::ServerError {
            limits.fails(model, wait, now_ms);
        } else {
            limits.ask(model, wait, now_ms);
        }
        // Not before that time, which the cooldown sees to.
        again |= wait.is_some();
    }
    if failure.lacks_model() {
        choice.endpoint.live.limits.lacks(model, now_ms);
    }
    if failure.weight() > 0 {
        choice.endpoint.live.presume_slow(now_ms);
        let in_vain = match failure {
            Failure::ConnectTimeout => Some(Wait::Connection),
            Failure::FirstTokenTimeout => Some(Wait::FirstToken),
            _ => None,
        };
        choice.endpoint.live.outlier.waited(in_vain, now_ms);
        failed(
            process,
            candidate,
            &choice.endpoint,
            failure.weight(),
            failure.label(),
        );
    }
    process
        .metrics
        .attempt_failed(candidate.metrics.backend(), failure.label());
    record.tried.push(choice.failed(failure.label(), again));
}

/// An endpoint failed, with a weight of its own: it may be left out for a while.
fn failed(
    process: &Process,
    candidate: &Candidate,
    endpoint: &Endpoint,
    weight: u32,
    reason: &'static str,
) {
    let now_ms = process.ms(penstock_shell::clock::now());
    endpoint.live.vitals.note(Sample::Failed, now_ms);
    let endpoints = &candidate.backend.endpoints;
    let away = endpoints
        .iter()
        .filter(|one| one.live.outlier.is_away(now_ms));
    let away = away.count();
    if endpoint
        .live
        .outlier
        .failed(weight, now_ms, away, endpoints.len())
    {
        process.metrics.ejections.inc();
        tracing::warn!(
            backend.id = %candidate.backend.id,
            endpoint = %endpoint.address,
            reason,
            "endpoint is left out after failures in a row"
        );
    }
}

/// An answer that had begun broke off, and its endpoint is to blame.
pub(crate) fn broke_off(
    process: &Process,
    candidate: &Candidate,
    endpoint: &Endpoint,
    reason: &'static str,
) {
    endpoint.live.outlier.broke_off();
    failed(process, candidate, endpoint, 1, reason);
}
