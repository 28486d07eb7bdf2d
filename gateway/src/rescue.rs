//! (IO) `Rescue`: goes on with a stream that was cut, at another endpoint of the same backend and revision, for rules
//! that want it (decision 0026). Until then it keeps what such an attempt needs: the request, and the text that went
//! out. Where anything is in doubt the stream ends in its error event, as it does without.

mod continuation;
mod delivered;
mod joint;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue};
use penstock_core::config::Protocol;

use crate::attempt::{self, Answer, candidate_of};
use crate::begun::Begun;
use crate::budgets::reservation::Plan;
use crate::choose::{Choice, Pass, Tried, choose};
use crate::decisions::{Made, Purpose};
use crate::failure::Failure;
use crate::fallback::Failed;
use crate::hedge::{self, Answered, Lane};
use crate::job::Job;
use crate::metrics::Rescued;
use crate::openai::{Api, Call, Encoding};
use crate::outcome;
use crate::principal::Who;
use crate::process::{BodyLease, Worker};
use crate::provider::translations::Translations;
use crate::record::Record;
use crate::reject::Broken;
use crate::rescue::delivered::Delivered;
use crate::rescue::joint::{First, Joint};
use crate::snapshot::{Candidate, Rule};
use crate::wish::{self, Only, Unfit};

/// What is kept counts in steps of this size, so that not every word touches the process's counter.
const LEASE_STEP: usize = 64 << 10;

/// The rescue of one stream.
pub(crate) struct Rescue(State);

enum State {
    /// There is nothing to go on with.
    Unfit,
    /// The stream goes on.
    Watching(Box<Watching>),
    /// It was cut; another endpoint is asked.
    UnderWay(BoxFuture<'static, Asked>),
    /// Another endpoint goes on with it.
    Joined(Joint),
}

/// What came does not go on with a text.
pub(crate) struct NoText;

impl Rescue {
    /// Follows a stream that has begun. `None` where the rule wants no rescue.
    pub(crate) fn of(job: &Job<'_>, rule: &Rule, choice: &Choice) -> Option<Box<Self>> {
        if !rule.rescues || !job.call.stream {
            return None;
        }
        let watching = Watching::new(job, rule, candidate_of(rule, choice)?);
        let state = watching.map_or(State::Unfit, |watching| State::Watching(Box::new(watching)));
        Some(Box::new(Self(state)))
    }

    /// Takes whole events and gives what goes out of them.
    pub(crate) fn pass(&mut self, events: Bytes, record: &mut Record) -> Result<Bytes, NoText> {
        match &mut self.0 {
            State::Unfit | State::UnderWay(_) => Ok(events),
            State::Watching(watching) => {
                let passes = watching.delivered.feed(&events);
                if watching.goes_on() {
                    return Ok(events.slice(..passes));
                }
                self.0 = State::Unfit;
                Ok(events)
            }
            State::Joined(joint) => {
                let passed = joint.pass(&events).ok_or(NoText);
                record.earlier = Some(joint.first(record.usage));
                passed
            }
        }
    }

    /// Something of the stream was left out: nobody could go on with it.
    pub(crate) fn has_gap(&mut self) {
        if matches!(self.0, State::Watching(_)) {
            self.0 = State::Unfit;
        }
    }

    /// Whether a stream that broke like this is to be gone on with, or at least counted as one that cannot be.
    pub(crate) fn is_for(&self, broken: Broken) -> bool {
        use Broken::{Aborted, Cut, Failed, Stalled};
        let is_cut = matches!(broken, Cut | Stalled | Aborted | Failed);
        is_cut && matches!(self.0, State::Unfit | State::Watching(_))
    }

    /// Whether the stream can be gone on with: the event by which its backend ended it was kept from the caller.
    pub(crate) fn is_watching(&self) -> bool {
        matches!(self.0, State::Watching(_))
    }

    /// Asks another endpoint, once; `None`: the stream ends here. Dropping it ends what is under way.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        broken: Broken,
        record: &mut Record,
    ) -> Poll<Option<Begun>> {
        if let State::Unfit | State::Watching(_) = &self.0 {
            let State::Watching(watching) = std::mem::replace(&mut self.0, State::Unfit) else {
                record.rescued(Rescued::Unfit);
                return Poll::Ready(None);
            };
            match watching.ask(broken, record) {
                Ok(asked) => self.0 = State::UnderWay(asked),
                Err(why) => {
                    record.rescued(why);
                    return Poll::Ready(None);
                }
            }
        }
        let State::UnderWay(asked) = &mut self.0 else {
            return Poll::Ready(None);
        };
        let asked = ready!(Pin::as_mut(asked).poll(cx));
        self.0 = State::Unfit;
        Poll::Ready(match asked.result {
            Ok((Answer::Stream { begun, .. }, reservation)) if begun.events.is_some() => {
                record.rescued(Rescued::Joined);
                record.settle();
                record.reservation = reservation;
                record.usage = None;
                self.0 = State::Joined(asked.joint);
                Some(begun)
            }
            result => {
                if let Err(failure) = result {
                    let (process, choice) = (&asked.worker.process, &asked.lane.choice);
                    let (model, rule) = (&asked.model, &asked.rule);
                    outcome::note(process, model, rule, choice, &failure, record);
                }
                record.rescued(Rescued::Failed);
                None
            }
        })
    }
}

/// What a further attempt needs of the request.
struct Kept {
    worker: Arc<Worker>,
    id: HeaderValue,
    who: Who,
    started: Instant,
    api: Api,
    headers: HeaderMap,
    region: Option<String>,
    body: Bytes,
    /// Hash of what the rule's strategy keeps together.
    key: Option<u64>,
    /// About how many its prompt has.
    prompt_tokens: u32,
    /// What it counts in, if it does.
    plan: Option<Plan>,
}

impl Kept {
    /// The request with another body.
    fn job<'a>(&'a self, rule: &Rule, body: &'a Bytes, call: &'a Call<'a>) -> Job<'a> {
        Job {
            worker: &self.worker,
            id: self.id.clone(),
            who: self.who.clone(),
            started: self.started,
            api: self.api,
            below: "",
            headers: &self.headers,
            region: self.region.as_deref(),
            body,
            call,
            blocks: wish::blocks(rule, call),
            key: self.key,
            translated: Translations::default(),
            plan: self
                .plan
                .as_ref()
                .map(|plan| plan.with(self.api, call, body)),
            passing: None,
        }
    }
}

/// A stream that goes on and could be gone on with.
struct Watching {
    kept: Kept,
    delivered: Delivered,
    lease: Option<BodyLease>,
    leased: usize,
}

impl Watching {
    fn new(job: &Job<'_>, rule: &Rule, candidate: &Candidate) -> Option<Self> {
        let backend = &candidate.backend;
        let can_go_on = backend.protocol == Protocol::OpenAi
            && backend.profile.capabilities.continue_final_message;
        let is_text = job.passing.is_none()
            && job.call.encoding == Encoding::Json
            && continuation::is_possible(job.api, job.body);
        if !can_go_on || rule.buffers || !job.may_be_sent_again() || !is_text {
            return None;
        }
        let mut watching = Self {
            kept: Kept {
                worker: Arc::clone(job.worker),
                id: job.id.clone(),
                who: job.who.clone(),
                started: job.started,
                api: job.api,
                headers: job.headers.clone(),
                region: job.region.map(str::to_owned),
                body: job.body.clone(),
                key: job.key,
                prompt_tokens: job.prompt_tokens(),
                plan: job.plan.clone(),
            },
            delivered: Delivered::default(),
            lease: None,
            leased: 0,
        };
        watching.has_room().then_some(watching)
    }

    /// Whether it can be gone on with still.
    fn goes_on(&mut self) -> bool {
        !self.delivered.is_over() && self.has_room()
    }

    /// Whether there is room for what is kept.
    fn has_room(&mut self) -> bool {
        let held = self.kept.body.len() + self.delivered.bytes();
        if held > self.leased {
            self.leased = held.next_multiple_of(LEASE_STEP);
            self.lease = None;
            self.lease = self.kept.worker.process.lease_body(self.leased);
        }
        self.lease.is_some()
    }

    /// Chooses another endpoint and moves the request there.
    fn ask(
        self,
        broken: Broken,
        record: &mut Record,
    ) -> Result<BoxFuture<'static, Asked>, Rescued> {
        let Self {
            kept, delivered, ..
        } = self;
        let beginning = delivered.beginning().ok_or(Rescued::Unfit)?;
        let (rule, only) = newest(&kept.worker, record).ok_or(Rescued::NoEndpoint)?;
        let first = First {
            counted: record.usage,
            events: beginning.tokens,
            prompt_tokens: kept.prompt_tokens.into(),
        };
        let (text, tokens) = (&beginning.text, first.tokens());
        let body = continuation::body(kept.api, &kept.body, text, tokens);
        let body = body.ok_or(Rescued::NoTokens)?;
        let held = kept.body.len() + body.len();
        let lease = kept.worker.process.lease_body(held);
        let lease = lease.ok_or(Rescued::NoBudget)?;
        let (lane, model) = {
            let call = Call::parse(&body).map_err(|_| Rescued::Unfit)?;
            let job = kept.job(&rule, &body, &call);
            let lane = enter(&job, &rule, only, broken, record)?;
            (lane, call.model.into_owned())
        };
        record.rule = Some(Arc::clone(&rule));
        let joint = Joint::new(beginning.names, beginning.space, first);
        Ok(Box::pin(async move {
            // Room for both bodies, until an answer has begun.
            let _lease = lease;
            let result = ask(&kept, &rule, &lane, &body).await;
            Asked {
                worker: kept.worker,
                model,
                rule,
                lane,
                joint,
                result,
            }
        }))
    }
}

/// The rule as the newest snapshot has it, and the endpoints that may go on with what one of them began: those of the
/// same backend, model and pod template, if the rule still has them in the same place.
fn newest(worker: &Worker, record: &Record) -> Option<(Arc<Rule>, Only)> {
    let (tier, candidate, _) = record.chosen()?;
    let before = record.candidate()?;
    let revision = record.in_flight.as_ref()?.endpoint().revision.clone();
    let snapshot = worker.process.snapshot.load();
    let rule = snapshot
        .as_ref()?
        .rule_named(&record.rule.as_ref()?.label)?;
    let now = rule.tiers.get(tier)?.candidates.get(candidate)?;
    let is_same = now.backend.id == before.backend.id
        && now.maker == before.maker
        && now.backend.profile.capabilities.continue_final_message;
    let only = Only {
        tier,
        candidate,
        revision,
    };
    is_same.then(|| (Arc::clone(rule), only))
}

/// Takes a place at another endpoint for the request, if there is one and the rule's attempts and budget allow it.
fn enter(
    job: &Job<'_>,
    rule: &Rule,
    only: Only,
    broken: Broken,
    record: &mut Record,
) -> Result<Lane, Rescued> {
    let failed = record.in_flight.as_ref().map(|in_flight| Tried {
        tier: only.tier,
        candidate: only.candidate,
        endpoint: Arc::clone(in_flight.endpoint()),
        reason: broken.label(),
        again: false,
    });
    let mut tried = record.tried.clone();
    tried.extend(failed);
    let tier = rule.tiers.get(only.tier);
    let candidate = tier.and_then(|tier| tier.candidates.get(only.candidate));
    let mut unfit = Unfit {
        failed: candidate.map_or(Failed::NOTHING, Failed::before),
        only: Some(only),
        ..job.unfit(Some(rule), None)
    };
    let wish = job.wish(penstock_shell::clock::now(), &unfit);
    let choice = choose(rule, &tried, wish, &mut rand::rng());
    let is_other = |choice: &Choice| choice.pass != Pass::Again;
    let choice = choice.ok().filter(is_other).ok_or(Rescued::NoEndpoint)?;
    let candidate = candidate_of(rule, &choice).ok_or(Rescued::NoEndpoint)?;
    if let Some(_misfit) = job.misfit(candidate, &choice, rule.rest, &mut unfit) {
        return Err(Rescued::NoEndpoint);
    }
    if record.attempts >= rule.attempts || !rule.retries.take() {
        return Err(Rescued::NoBudget);
    }
    if let Some(decisions) = &mut record.decisions {
        let made = Made {
            purpose: Purpose::Rescue,
            unfit: &unfit,
            tried: &tried,
            found: Ok(&choice),
            changes: &record.changes,
        };
        decisions.note(job, rule, &made);
    }
    record.tried = tried;
    let lane = Lane::new(job, rule, choice);
    attempt::enter(job, record, candidate, &lane);
    record.goes_on_elsewhere();
    Ok(lane)
}

/// How the attempt to go on went.
struct Asked {
    worker: Arc<Worker>,
    model: String,
    rule: Arc<Rule>,
    lane: Lane,
    joint: Joint,
    result: Result<Answered, Failure>,
}

/// Sends the request that goes on, and reads until its answer has begun.
async fn ask(kept: &Kept, rule: &Rule, lane: &Lane, body: &Bytes) -> Result<Answered, Failure> {
    // It was read before.
    let call = Call::parse(body).map_err(|_| Failure::Broken)?;
    let job = kept.job(rule, body, &call);
    let result = hedge::attempt(&job, rule, &lane.choice).await;
    if let Ok((answer, _)) = &result {
        outcome::answered(&job, rule, lane, answer);
    }
    result
}
