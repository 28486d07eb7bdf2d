//! (IO) An attempt and, where the first token is slow to come and the rule allows it, a second one beside it at
//! another endpoint. Whichever answers first is the answer; dropping the other one closes its connection, on which
//! engines stop.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use penstock_core::config::Strategy;

use crate::attempt::{Answer, candidate_of};
use crate::balance::adaptive::Foreseen;
use crate::begin::begin;
use crate::choose::{Choice, Pass, Tried, choose};
use crate::failure::Failure;
use crate::job::Job;
use crate::record::InFlight;
use crate::snapshot::Rule;
use crate::wish::Unfit;

/// An attempt under way.
pub(crate) struct Lane {
    pub(crate) choice: Choice,
    pub(crate) entered: Instant,
    /// What lay before it, see [`crate::wish::Wish::work_at`].
    pub(crate) work: f32,
    /// What `Adaptive` foresaw, where it is the rule's strategy.
    pub(crate) foreseen: Option<Foreseen>,
}

impl Lane {
    /// To be called before the endpoint is said to know the prompt.
    pub(crate) fn new(job: &Job<'_>, rule: &Rule, choice: Choice) -> Self {
        let entered = penstock_shell::clock::now();
        let nobody = Unfit::default();
        let wish = job.wish(entered, &nobody);
        let work = wish.work_at(&choice.endpoint);
        let is_learned = rule.strategy == Strategy::Adaptive && wish.stream;
        let tier = rule.tiers.get(choice.tier).filter(|_| is_learned);
        let foreseen = tier.map(|tier| {
            let matched = tier.prefixes.matched(wish.blocks);
            wish.foreseen_at(&choice.endpoint, &matched)
        });
        Self {
            choice,
            entered,
            work,
            foreseen,
        }
    }
}

/// How an attempt and its hedge ended.
pub(crate) struct Raced {
    /// The one that answered, or that failed last.
    pub(crate) lane: Lane,
    pub(crate) result: Result<Answer, Failure>,
    /// The other one, and why it failed if it did.
    pub(crate) other: Option<(Lane, Option<Failure>)>,
    /// The hedge's place at its endpoint, if it was the hedge that answered or failed last.
    pub(crate) in_flight: Option<InFlight>,
}

/// Makes an attempt, hedged if the rule says so. `tried` and `unfit` are what the request knows already.
pub(crate) async fn race(
    job: &Job<'_>,
    rule: &Rule,
    lane: Lane,
    tried: &[Tried],
    unfit: &Unfit,
) -> Raced {
    let mut first = pin!(attempt(job, rule, &lane.choice));
    let alone = |lane, result| Raced {
        lane,
        result,
        other: None,
        in_flight: None,
    };
    let Some(hedge) = rule.hedge.as_ref().filter(|_| job.call.stream) else {
        let result = first.await;
        return alone(lane, result);
    };
    if let Ok(result) = tokio::time::timeout(hedge.after, first.as_mut()).await {
        return alone(lane, result);
    }
    let found =
        second(job, rule, tried, &lane, unfit).filter(|_| hedge.budget.take(job.prompt_tokens()));
    let Some(choice) = found else {
        let result = first.await;
        return alone(lane, result);
    };
    let hedged = Lane::new(job, rule, choice);
    let in_flight = InFlight::enter(
        &hedged.choice.endpoint,
        true,
        job.prompt_tokens(),
        hedged.entered,
        job.worker.process.ms(hedged.entered),
    );
    // Rare, and as large as the first one: not on the stack of every request.
    let mut second = Box::pin(attempt(job, rule, &hedged.choice));
    tokio::select! {
        result = &mut first => match result {
            Err(failure) => {
                let result = second.await;
                Raced { lane: hedged, result, other: Some((lane, Some(failure))), in_flight: Some(in_flight) }
            }
            answer => Raced { lane, result: answer, other: Some((hedged, None)), in_flight: None },
        },
        result = &mut second => match result {
            Err(failure) => {
                drop(in_flight);
                let result = first.await;
                Raced { lane, result, other: Some((hedged, Some(failure))), in_flight: None }
            }
            answer => {
                debug_assert!(!Arc::ptr_eq(&lane.choice.endpoint.live, &hedged.choice.endpoint.live));
                Raced { lane: hedged, result: answer, other: Some((lane, None)), in_flight: Some(in_flight) }
            }
        },
    }
}

fn attempt<'a>(
    job: &'a Job<'_>,
    rule: &'a Rule,
    choice: &Choice,
) -> impl Future<Output = Result<Answer, Failure>> + Send + use<'a> {
    let endpoint = Arc::clone(&choice.endpoint);
    let candidate = candidate_of(rule, choice);
    async move {
        match candidate {
            Some(candidate) => begin(job, rule, candidate, &endpoint).await,
            None => Err(Failure::Connect),
        }
    }
}

/// Another endpoint that would begin at once: one with a queue would only be given more of it.
fn second(
    job: &Job<'_>,
    rule: &Rule,
    tried: &[Tried],
    first: &Lane,
    unfit: &Unfit,
) -> Option<Choice> {
    let mut taken = tried.to_vec();
    taken.push(first.choice.failed("slow", false));
    let wish = job.wish(penstock_shell::clock::now(), unfit);
    let choice = choose(rule, &taken, wish, &mut rand::rng()).ok()?;
    let candidate = candidate_of(rule, &choice)?;
    let waiting = choice.endpoint.live.waiting_tokens.load(Ordering::Relaxed);
    let is_free = choice.pass == Pass::Fresh && waiting == 0;
    let fits = || {
        let misfit = job.misfit(candidate, &choice, rule.rest, &mut Unfit::default());
        misfit.is_none()
    };
    (is_free && fits()).then_some(choice)
}
