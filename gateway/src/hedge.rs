//! (IO) An attempt and, where the rule says so, others beside it: at other backends at once (`fan_out`), or one at
//! another endpoint where the first token is slow to come. Whichever answers first is the answer; dropping the others
//! closes their connections, on which engines stop.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use penstock_core::config::Strategy;

use crate::attempt::{Answer, candidate_of, ticket};
use crate::balance::adaptive::Foreseen;
use crate::begin::begin;
use crate::budgets::reservation::{Reservation, reserve};
use crate::choose::{Choice, Pass, choose};
use crate::decisions::{Made, Purpose};
use crate::failure::Failure;
use crate::fan_out;
use crate::in_flight::{InFlight, Kind};
use crate::job::Job;
use crate::load::Ticket;
use crate::meter::Usage;
use crate::openai::Api;
use crate::record::{self, Record};
use crate::snapshot::{Candidate, Hedge, Rule};
use crate::usage::Taken;
use crate::usage::sums::Sums;
use crate::wish::Unfit;

/// What the line of usage says of an attempt without an answer.
const UNANSWERED: &str = "unanswered";

/// An attempt under way.
pub(crate) struct Lane {
    pub(crate) choice: Choice,
    pub(crate) entered: Instant,
    /// What lay before it, see [`crate::wish::Wish::work_at`].
    pub(crate) work: f32,
    /// What `Adaptive` foresaw, where it is the rule's strategy.
    pub(crate) foreseen: Option<Foreseen>,
    /// Whether its first token tells how the endpoint does compared with its peers.
    pub(crate) is_comparable: bool,
}

impl Lane {
    /// The endpoint is said to know the prompt from then on.
    pub(crate) fn new(job: &Job<'_>, rule: &Rule, choice: Choice) -> Self {
        let entered = penstock_shell::clock::now();
        let nobody = Unfit::default();
        let wish = job.wish(entered, &nobody);
        let work = wish.work_at(&choice.endpoint);
        let is_learned = rule.strategy == Strategy::Adaptive && wish.stream;
        let tier = rule.tiers.get(choice.tier);
        let tier = tier.filter(|_| !job.blocks.is_empty());
        let prefixes = tier.map(|tier| &tier.prefixes);
        let foreseen = is_learned.then(|| {
            let matched = prefixes.map_or_else(Vec::new, |known| known.matched(wish.blocks));
            wish.foreseen_at(&choice.endpoint, &matched)
        });
        // Affinity sends known prompts to one endpoint and new ones to the others, which are then slower and not at
        // fault. `PeakEwma` sends new prompts to all.
        let is_comparable = match rule.strategy {
            Strategy::PeakEwma => prefixes.is_none_or(|known| {
                let mut homes = known.homes(wish.blocks).into_iter();
                homes.all(|(home, _)| home != choice.endpoint.live.id)
            }),
            _ => job.key.is_none() && job.blocks.is_empty(),
        };
        if let Some(prefixes) = prefixes {
            prefixes.learn(&job.blocks, choice.endpoint.live.id);
        }
        Self {
            choice,
            entered,
            work,
            foreseen,
            is_comparable,
        }
    }
}

/// An attempt under way beside the first one.
pub(crate) struct Beside {
    pub(crate) lane: Lane,
    pub(crate) place: Place,
}

/// What an attempt beside the first one holds; the first one's is in the record.
pub(crate) struct Place {
    pub(crate) in_flight: InFlight,
    /// `None` for a hedge, which is no demand.
    pub(crate) ticket: Option<Ticket>,
}

impl Beside {
    pub(crate) fn enter(
        job: &Job<'_>,
        rule: &Rule,
        choice: Choice,
        demand: Option<&Candidate>,
    ) -> Self {
        let lane = Lane::new(job, rule, choice);
        let place = Place {
            in_flight: enter(job, &lane),
            ticket: demand.map(|candidate| ticket(job, candidate, lane.entered)),
        };
        Self { lane, place }
    }
}

/// How an attempt and those beside it ended.
pub(crate) struct Raced {
    /// The one that answered, or that failed last.
    pub(crate) lane: Lane,
    pub(crate) result: Result<Answered, Failure>,
    /// The other ones, and why they failed if they did.
    pub(crate) others: Vec<(Lane, Option<Failure>)>,
    /// The place of the one that answered or failed last, if it was not the first one.
    pub(crate) place: Option<Place>,
}

/// Makes an attempt, and others beside it if the rule says so: at once, or after a time. `unfit` is what the request
/// knows already.
pub(crate) async fn race(
    job: &Job<'_>,
    rule: &Rule,
    lane: Lane,
    record: &mut Record,
    unfit: &Unfit,
) -> Raced {
    let mut first = pin!(attempt(job, rule, &lane.choice));
    let hedge = rule.hedge.as_ref().filter(|_| job.call.stream);
    // What follows a fan-out that failed goes to one at a time.
    let others = match (rule.fan_out, hedge) {
        (Some(_), _) if record.attempts == 1 => fan_out::beside(job, rule, record, &lane, unfit),
        (None, Some(hedge)) => match tokio::time::timeout(hedge.after, first.as_mut()).await {
            Ok(result) => return Raced::alone(lane, result),
            Err(_) => second(job, rule, hedge, record, &lane, unfit)
                .into_iter()
                .collect(),
        },
        _ => Vec::new(),
    };
    if others.is_empty() {
        let result = first.await;
        return Raced::alone(lane, result);
    }
    // Rare, and as large as the first one: not on the stack of every request.
    Box::pin(first_good(job, rule, lane, first, others)).await
}

impl Raced {
    fn alone(lane: Lane, result: Result<Answered, Failure>) -> Self {
        Self {
            lane,
            result,
            others: Vec::new(),
            place: None,
        }
    }
}

/// Waits for the first good answer. What is still under way then is ended.
async fn first_good<'a>(
    job: &'a Job<'_>,
    rule: &'a Rule,
    lane: Lane,
    first: Pin<&mut (impl Future<Output = Result<Answered, Failure>> + Send)>,
    others: Vec<Beside>,
) -> Raced {
    let beside = others.into_iter().map(|one| (one.lane, Some(one.place)));
    let mut lanes: Vec<(Lane, Option<Place>)> = vec![(lane, None)];
    lanes.extend(beside);
    let mut failures: Vec<Option<Failure>> = lanes.iter().map(|_| None).collect();
    let mut running = FuturesUnordered::new();
    running.push(async move { (0, first.await) }.boxed());
    for (index, (lane, _)) in lanes.iter().enumerate().skip(1) {
        let attempt = attempt(job, rule, &lane.choice);
        running.push(async move { (index, attempt.await) }.boxed());
    }
    // What one backend refuses another one may answer; a hedge goes to the same ones.
    let mut refused = None;
    let (index, result) = loop {
        match running.next().await {
            Some(ended @ (_, Ok((Answer::Refused { .. }, _))))
                if rule.fan_out.is_some() && !running.is_empty() =>
            {
                refused = Some(ended);
            }
            Some((index, Err(failure))) if refused.is_some() || !running.is_empty() => {
                lanes[index].1 = None;
                failures[index] = Some(failure);
            }
            Some(ended) => break ended,
            // There is at least the first one.
            None => break refused.unwrap_or((0, Err(Failure::Connect))),
        }
    };
    drop(running);
    let (lane, place) = lanes.swap_remove(index);
    failures.swap_remove(index);
    let others = lanes.into_iter().map(|(lane, _)| lane);
    Raced {
        lane,
        result,
        others: others.zip(failures).collect(),
        place,
    }
}

/// Counts an attempt in at its endpoint.
pub(crate) fn enter(job: &Job<'_>, lane: &Lane) -> InFlight {
    let kind = match job.passing {
        Some(_) => Kind::Passed,
        None if job.call.stream => Kind::Stream,
        None => Kind::Whole,
    };
    InFlight::enter(
        &lane.choice.endpoint,
        kind,
        job.prompt_tokens(),
        lane.entered,
        job.worker.process.ms(lane.entered),
    )
}

/// The beginning of an answer, and what it has of budgets.
pub(crate) type Answered = (Answer, Option<Reservation>);

/// Sends the request, once it has what it may take of its budgets.
pub(crate) fn attempt<'a>(
    job: &'a Job<'_>,
    rule: &'a Rule,
    choice: &Choice,
) -> impl Future<Output = Result<Answered, Failure>> + Send + use<'a> {
    let endpoint = Arc::clone(&choice.endpoint);
    let candidate = candidate_of(rule, choice);
    async move {
        let candidate = candidate.ok_or(Failure::Connect)?;
        let reservation = match &job.plan {
            None => None,
            Some(plan) => {
                let reserved = Box::pin(reserve(job.worker, plan, candidate)).await;
                let mut reservation =
                    reserved.map_err(|reject| Failure::Budget(Box::new(reject)))?;
                reservation.sent();
                Some(reservation)
            }
        };
        let mut sent = Sent {
            job,
            rule,
            candidate,
            is_told: false,
        };
        let begun = begin(job, rule, candidate, &endpoint).await;
        sent.is_told = match &begun {
            Ok(_) => true,
            Err(failure) => !failure.costs(),
        };
        match begun {
            Ok(answer) => Ok((answer, reservation)),
            Err(failure) => {
                if let Some(reservation) = reservation {
                    reservation.failed(&failure);
                }
                Err(failure)
            }
        }
    }
}

/// An attempt that went upstream. If it breaks off without an answer, or is ended because another one answered or the
/// caller left, its prompt was read all the same: it is in the sums of the day then, as an estimate.
struct Sent<'a> {
    job: &'a Job<'a>,
    rule: &'a Rule,
    candidate: &'a Candidate,
    /// It was answered, or cost nothing.
    is_told: bool,
}

impl Drop for Sent<'_> {
    fn drop(&mut self) {
        let job = self.job;
        if self.is_told || job.passing.is_some() || job.api == Api::CountTokens {
            return;
        }
        let usage = Usage {
            prompt_tokens: job.prompt_tokens().into(),
            ..Usage::default()
        };
        let sums = Sums {
            requests: 0,
            estimated: 1,
            ..record::sums(self.candidate, usage)
        };
        job.worker.process.usage.note(&Taken {
            id: job.id.to_str().unwrap_or(""),
            who: job.who.principal(),
            model: &job.call.model,
            api: Some(job.api),
            rule: &self.rule.label,
            candidate: self.candidate,
            status: 0,
            outcome: UNANSWERED,
            sums,
        });
    }
}

/// Another endpoint that would begin at once, if the budget allows it: one with a queue would only be given more of it.
fn second(
    job: &Job<'_>,
    rule: &Rule,
    hedge: &Hedge,
    record: &mut Record,
    first: &Lane,
    unfit: &Unfit,
) -> Option<Beside> {
    if !job.may_be_sent_again() {
        return None;
    }
    let mut taken = record.tried.clone();
    taken.push(first.choice.failed("slow", false));
    let wish = job.wish(penstock_shell::clock::now(), unfit);
    let choice = choose(rule, &taken, wish, &mut rand::rng()).ok()?;
    // Such a one is for what has failed, and nothing has.
    let candidate = candidate_of(rule, &choice).filter(|candidate| !candidate.is_fallback())?;
    let waiting = choice.endpoint.live.waiting_tokens.load(Ordering::Relaxed);
    let is_free = choice.pass == Pass::Fresh && waiting == 0;
    let fits = || {
        let misfit = job.misfit(candidate, &choice, rule.rest, &mut Unfit::default());
        misfit.is_none()
    };
    if !is_free || !fits() || !hedge.budget.take(job.prompt_tokens()) {
        return None;
    }
    if let Some(decisions) = &mut record.decisions {
        let made = Made {
            purpose: Purpose::Hedge,
            unfit,
            tried: &taken,
            found: Ok(&choice),
            changes: &record.changes,
        };
        decisions.note(job, rule, &made);
    }
    Some(Beside::enter(job, rule, choice, None))
}
