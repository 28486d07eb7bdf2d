//! (IO) Joining small calls that come within a few milliseconds of each other: the first of them waits for the others,
//! makes one call for all, and gives each its part of the answer. When that call fails, each is made alone, so that
//! everybody gets their own error. A batch belongs to one worker: nothing is shared between threads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{HeaderMap, Response};
use tokio::sync::{Notify, oneshot};
use xxhash_rust::xxh3::Xxh3Default;

use crate::attempt::{self, Answer};
use crate::choose::Pass;
use crate::embeddings::{self, Part, Share};
use crate::job::Job;
use crate::meter::Usage;
use crate::openai::{Api, Call};
use crate::outbound;
use crate::provider::translations::Translations;
use crate::record::Record;
use crate::snapshot::{Join, Rule};

/// A joined call is no larger than what may be repeated.
const MAX_BYTES: u64 = 1 << 20;

/// What one of several callers gets.
struct Given {
    head: Response<()>,
    share: Share,
    rule: Arc<Rule>,
    chosen: (usize, usize, Pass),
}

struct Member {
    part: Part,
    give: oneshot::Sender<Given>,
}

struct Batch {
    members: Mutex<Vec<Member>>,
    full: Notify,
}

/// A batch that takes further calls, and what it has already.
struct Filling {
    batch: Arc<Batch>,
    inputs: usize,
    bytes: u64,
}

/// The rule, and what the calls of a batch have in common: their bodies but for `input`, and their headers.
type Key = (String, u128, u128);

/// The batches of one worker that take further calls.
#[derive(Default)]
pub(crate) struct Batches(Mutex<HashMap<Key, Filling>>);

impl Batches {
    fn filling(&self) -> MutexGuard<'_, HashMap<Key, Filling>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The batch of its first call. Those who are left in it when that is dropped go on alone.
struct Lead<'a> {
    batches: &'a Batches,
    key: Key,
    batch: Arc<Batch>,
}

impl Lead<'_> {
    /// Nobody else gets in.
    fn close(&self) -> Vec<Member> {
        let mut filling = self.batches.filling();
        let own = filling.get(&self.key);
        if own.is_some_and(|open| Arc::ptr_eq(&open.batch, &self.batch)) {
            filling.remove(&self.key);
        }
        let members = self.batch.members.lock();
        std::mem::take(&mut *members.unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        drop(self.close());
    }
}

/// Answers the request together with others, if its rule says so and there are any. `None`: it is to be made alone.
pub(crate) async fn answer(job: &Job<'_>, record: &mut Record, rule: &Rule) -> Option<Answer> {
    let join = rule.join.as_ref()?;
    // What each takes must be known where budgets count.
    if job.api != Api::Embeddings || job.plan.is_some() {
        return None;
    }
    let part = Part::of(job.body).filter(|part| part.bytes() <= MAX_BYTES)?;
    let key = (rule.label.clone(), part.key, of_headers(job.headers));
    match enter(&job.worker.batches, key, part, join) {
        Place::First(first, part) => {
            let _timeout = tokio::time::timeout(join.within, first.batch.full.notified()).await;
            let answer = lead(job, record, part, first.close()).await;
            if answer.is_none() {
                // What the batch tried is not what the call alone may try.
                record.start_over();
            }
            answer
        }
        Place::Other(given) => {
            let Given {
                head,
                share,
                rule,
                chosen,
            } = given.await.ok()?;
            record.rule = Some(rule);
            record.choose(chosen.0, chosen.1, chosen.2);
            record.attempts = 1;
            Some(whole(head, share))
        }
    }
}

/// Equal for calls whose headers would go upstream alike, whatever their order.
fn of_headers(headers: &HeaderMap) -> u128 {
    let mut passed: Vec<_> = outbound::of_any_caller(headers).collect();
    // Stable: the values of one name keep their order.
    passed.sort_by_key(|(name, _)| name.as_str());
    let mut hash = Xxh3Default::new();
    for (name, value) in passed {
        hash.update(name.as_str().as_bytes());
        hash.update(&[0]);
        hash.update(value.as_bytes());
        hash.update(&[0]);
    }
    hash.digest128()
}

enum Place<'a> {
    First(Lead<'a>, Part),
    Other(oneshot::Receiver<Given>),
}

fn enter<'a>(batches: &'a Batches, key: Key, part: Part, join: &Join) -> Place<'a> {
    let mut filling = batches.filling();
    let fits = |open: &&mut Filling| {
        open.inputs + part.inputs() <= join.max_inputs && open.bytes + part.bytes() <= MAX_BYTES
    };
    if let Some(open) = filling.get_mut(&key).filter(fits) {
        let (give, given) = oneshot::channel();
        open.inputs += part.inputs();
        open.bytes += part.bytes();
        let members = open.batch.members.lock();
        let mut members = members.unwrap_or_else(PoisonError::into_inner);
        members.push(Member { part, give });
        if open.inputs >= join.max_inputs {
            open.batch.full.notify_one();
        }
        return Place::Other(given);
    }
    let batch = Arc::new(Batch {
        members: Mutex::default(),
        full: Notify::new(),
    });
    let open = Filling {
        batch: Arc::clone(&batch),
        inputs: part.inputs(),
        bytes: part.bytes(),
    };
    // One without room for this call takes no further ones, and need not wait for them.
    if let Some(before) = filling.insert(key.clone(), open) {
        before.batch.full.notify_one();
    }
    let lead = Lead {
        batches,
        key,
        batch,
    };
    Place::First(lead, part)
}

/// Makes the call for all of a batch, and gives each member its part.
async fn lead(
    job: &Job<'_>,
    record: &mut Record,
    own: Part,
    members: Vec<Member>,
) -> Option<Answer> {
    // Those who have left need no answer.
    let members: Vec<Member> = members
        .into_iter()
        .filter(|member| !member.give.is_closed())
        .collect();
    if members.is_empty() {
        return None;
    }
    let others = members.iter().map(|member| &member.part);
    let parts: Vec<&Part> = std::iter::once(&own).chain(others).collect();
    let body = embeddings::joined(&parts)?;
    let call = Call::parse(&body).ok()?;
    let headers = outbound::for_several(job.headers);
    let joined = Job {
        worker: job.worker,
        id: job.id.clone(),
        who: job.who.clone(),
        started: job.started,
        api: job.api,
        below: "",
        headers: &headers,
        region: job.region,
        body: &body,
        call: &call,
        blocks: Vec::new(),
        key: job.key,
        translated: Translations::default(),
        plan: None,
        passing: None,
    };
    // As large as the attempts of a request of its own, and rare.
    let answer = Box::pin(attempt::run(&joined, record)).await;
    let Ok(Answer::Whole { head, bytes, .. }) = answer else {
        return None;
    };
    let shares = embeddings::split(&bytes, &parts)?;
    let (rule, chosen) = (record.rule.clone()?, record.chosen()?);
    let mut shares = shares.into_iter();
    let first = shares.next()?;
    for (member, share) in members.into_iter().zip(shares) {
        let given = Given {
            head: copy(&head),
            share,
            rule: Arc::clone(&rule),
            chosen,
        };
        // Whoever has left in the meantime misses nothing.
        let _left = member.give.send(given);
    }
    Some(whole(head, first))
}

fn copy(head: &Response<()>) -> Response<()> {
    let mut copy = Response::new(());
    *copy.status_mut() = head.status();
    *copy.headers_mut() = head.headers().clone();
    copy
}

fn whole(head: Response<()>, share: Share) -> Answer {
    let usage = share.prompt_tokens.map(|prompt_tokens| Usage {
        prompt_tokens,
        completion_tokens: 0,
        cached_tokens: 0,
    });
    Answer::Whole {
        head,
        bytes: share.body,
        usage,
    }
}
