//! (IO) `Account`: what this gateway has of one limit. Requests take of it without asking anybody while there is
//! enough; else they wait for the store, all of them for one question.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use penstock_core::acks::LimitStand;
use tokio::sync::oneshot;

use super::Limit;
use crate::ledger::holder::{Answered, Holder, Taken};
use crate::ledger::record::{Ask, MAX_NEEDS, Record, Stand, Told, all_idle};
use crate::ledger::span::Span;
use crate::store::{Durability, Error, Expect, Key, Store};

/// Requests that wait for one account; further ones are told that the store is too busy.
const MAX_WAITING: usize = 1024;
/// Writes of one record in a row that others were before in.
const MAX_RACES: usize = 32;
/// An answer that takes longer does not tell when the store's clock was read.
const EXACT_MS: u64 = 1_000;
/// Requests that are likely to come where one did.
const LIKELY_REQUESTS: u64 = 8;
/// A gateway that nobody has asked for so long gives back what lies idle.
const REST_MS: u64 = 30_000;
/// After which it is forgotten.
const FORGOTTEN_MS: u64 = 600_000;

/// Why a request gets nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// The limit has not so much left.
    Spent {
        /// When it may, in ms; `None`: not by waiting.
        retry_ms: Option<u64>,
        /// What it has.
        left: u64,
    },
    /// The store did not answer, or not in time.
    Away,
    /// The store may forget what it was told, and the limit must not be exceeded.
    NotDurable,
}

/// See the module.
pub(crate) struct Account {
    /// Whose it is.
    pub(crate) of: String,
    key: Key,
    state: Mutex<State>,
}

struct State {
    /// As the last request found it.
    limit: Arc<Limit>,
    holder: Holder,
    waiting: VecDeque<Waiter>,
    is_asking: bool,
    used_ms: u64,
    /// What requests needed since the last question, and the most that one of them did.
    taken: u64,
    largest: u64,
}

struct Waiter {
    need: u64,
    /// Whether the question under way is for it.
    is_asked: bool,
    told: oneshot::Sender<Result<Taken, Denied>>,
}

/// What a question needs.
pub(super) struct Asking<'a> {
    pub(super) store: &'a Store,
    /// This gateway's name among holders.
    pub(super) holder: &'a str,
}

/// How a request fares that asks an account.
pub(super) enum Reserved {
    /// It has what it needs.
    Taken(Taken),
    /// It waits; the account is to be asked for if nobody does.
    Waits {
        told: oneshot::Receiver<Result<Taken, Denied>>,
        must_ask: bool,
    },
    Denied(Denied),
}

/// How an account stands, for who wants to know.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(crate) limit: Arc<Limit>,
    pub(crate) of: String,
    pub(crate) stand: Stand,
}

impl Standing {
    /// How much of it is gone, in thousandths.
    pub(crate) fn used_permille(&self) -> u64 {
        let used = u128::from(self.stand.spent) + u128::from(self.stand.leased);
        let permille = used * 1_000 / u128::from(self.limit.terms.cap.max(1));
        u64::try_from(permille).unwrap_or(u64::MAX)
    }

    /// For who collects it.
    pub(crate) fn report(&self) -> LimitStand {
        let Limit {
            budget,
            name,
            terms,
            ..
        } = &*self.limit;
        let stand = self.stand;
        LimitStand {
            budget: budget.clone(),
            limit: name.clone(),
            of: self.of.clone(),
            order: (stand.lineage, stand.epoch),
            spent: stand.spent,
            reserved: stand.leased,
            remaining: left(terms.cap, stand),
            estimated: stand.orphaned,
            idle_bound: all_idle(terms.cap),
            ends_ms: stand.resets_ms,
        }
    }
}

impl Account {
    pub(super) fn new(limit: &Arc<Limit>, of: &str, now_ms: u64) -> Self {
        Self {
            of: of.to_owned(),
            key: limit.key(of),
            state: Mutex::new(State {
                limit: Arc::clone(limit),
                holder: Holder::default(),
                waiting: VecDeque::new(),
                is_asking: false,
                used_ms: now_ms,
                taken: 0,
                largest: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `need`, or waits for it. `may_ask` says whether the store is worth asking, if it must be.
    pub(super) fn reserve(
        &self,
        limit: &Arc<Limit>,
        need: u64,
        now_ms: u64,
        may_ask: impl FnOnce() -> bool,
    ) -> Reserved {
        let mut state = self.state();
        state.used_ms = now_ms;
        if !Arc::ptr_eq(&state.limit, limit) {
            state.limit = Arc::clone(limit);
        }
        state.taken = state.taken.saturating_add(need);
        state.largest = state.largest.max(need);
        if let Some(taken) = state.holder.take(need, now_ms) {
            return Reserved::Taken(taken);
        }
        let cap = limit.terms.cap;
        if need > cap {
            let left = left(cap, state.holder.stand());
            return Reserved::Denied(Denied::Spent {
                retry_ms: None,
                left,
            });
        }
        if state.waiting.len() >= MAX_WAITING || !may_ask() {
            return Reserved::Denied(Denied::Away);
        }
        let (told, answer) = oneshot::channel();
        state.waiting.push_back(Waiter {
            need,
            is_asked: false,
            told,
        });
        Reserved::Waits {
            told: answer,
            must_ask: !std::mem::replace(&mut state.is_asking, true),
        }
    }

    /// A request took `actual` in the end. Returns whether others may wait for what came back.
    pub(super) fn settle(&self, taken: Taken, actual: u64) -> bool {
        let mut state = self.state();
        state.holder.settle(taken, actual);
        // A place that is free again is nobody's until the record knows.
        state.limit.terms.span == Span::Held
    }

    /// A request took `actual`, and nothing was reserved for it.
    pub(super) fn charge(&self, actual: u64) {
        self.state().holder.charge(actual);
    }

    /// Whether the store should be told something, or asked to renew a lease; then the caller does so.
    pub(super) fn is_due(&self, now_ms: u64) -> bool {
        let mut state = self.state();
        let quiet_ms = now_ms.saturating_sub(state.used_ms);
        if quiet_ms >= REST_MS {
            state.holder.rest();
        }
        let is_due = !state.is_asking && state.holder.has_news(now_ms);
        state.is_asking |= is_due;
        is_due
    }

    /// Nobody is to come any more, and nobody asks.
    pub(super) fn rest(&self) {
        let mut state = self.state();
        state.is_asking = false;
        // Or more would be leased for who asks next.
        (state.taken, state.largest) = (0, 0);
        state.holder.rest();
    }

    /// Whether it can be forgotten.
    pub(super) fn is_over(&self, now_ms: u64) -> bool {
        let state = self.state();
        let quiet_ms = now_ms.saturating_sub(state.used_ms);
        quiet_ms >= FORGOTTEN_MS
            && !state.is_asking
            && !state.holder.has_lease()
            && !state.holder.has_news(now_ms)
    }

    pub(super) fn standing(&self) -> Standing {
        let state = self.state();
        Standing {
            limit: Arc::clone(&state.limit),
            of: self.of.clone(),
            stand: state.holder.stand(),
        }
    }

    /// Asks the store until nobody waits. Returns whether it answered.
    pub(super) async fn ask(&self, asking: &Asking<'_>, now: impl Fn() -> u64) -> bool {
        loop {
            let result = self.ask_once(asking, &now).await;
            let mut state = self.state();
            match result {
                Ok((told, read, durability)) => {
                    let answered = state.holder.told(&told, read);
                    let is_kept = durability == Durability::Durable || !state.limit.is_hard;
                    state.tell(answered, is_kept, now());
                    if !is_kept {
                        // Nor does the next one get what the store may forget.
                        state.holder.rest();
                    }
                    if state.waiting.is_empty() {
                        state.is_asking = false;
                        return true;
                    }
                }
                Err(err) => {
                    tracing::warn!(
                        budget = %state.limit.budget,
                        limit = %state.limit.name,
                        error = %err,
                        "the store did not say what a budget has left"
                    );
                    for waiter in state.waiting.drain(..) {
                        // Whoever has left needs no answer.
                        let _gone = waiter.told.send(Err(Denied::Away));
                    }
                    state.is_asking = false;
                    return false;
                }
            }
        }
    }

    /// One question, with its answer on the disk.
    async fn ask_once(
        &self,
        asking: &Asking<'_>,
        now: &impl Fn() -> u64,
    ) -> Result<(Told, Option<(u64, u64)>, Durability), Error> {
        let (limit, ask) = {
            let mut state = self.state();
            let ask = state.question(now());
            (Arc::clone(&state.limit), ask)
        };
        for _ in 0..MAX_RACES {
            let before_ms = now();
            let (found, store_ms) = asking.store.get_at(&self.key).await?;
            let read_ms = now();
            let is_exact = read_ms.saturating_sub(before_ms) <= EXACT_MS;
            let version = found.as_ref().map_or(0, |found| found.version);
            let mut record = found.map_or_else(Record::default, |found| read(&found.value));
            let seen = self.state().holder.seen(read_ms);
            let told = record.ask(&limit.terms, asking.holder, &ask, store_ms, seen);
            // Integers, and maps with text keys, always have a JSON form.
            let value = serde_json::to_vec(&record).unwrap_or_default();
            let expect = Expect::Version(version);
            let put = asking
                .store
                .put(&self.key, value.into(), expect, limit.kept)
                .await?;
            if put.is_some() {
                let durability = asking.store.settle().await?;
                let read = is_exact.then_some((read_ms, store_ms));
                return Ok((told, read, durability));
            }
        }
        Err(Error::Busy)
    }
}

/// A record that cannot be read is as one that is not there: what gateways remember counts.
fn read(value: &[u8]) -> Record {
    serde_json::from_slice(value).unwrap_or_else(|err| {
        tracing::error!(error = %err, "a budget's record cannot be read: what gateways remember of it counts");
        Record::default()
    })
}

fn left(cap: u64, stand: Stand) -> u64 {
    cap.saturating_sub(stand.spent.saturating_add(stand.leased))
}

impl State {
    /// The question to ask now, for those who wait first.
    fn question(&mut self, now_ms: u64) -> Ask {
        let is_new = !self.holder.is_asking();
        let mut needs = Vec::new();
        for waiter in self.waiting.iter_mut().take(MAX_NEEDS) {
            waiter.is_asked = is_new;
            needs.push(waiter.need);
        }
        // As much as until the next question, twice; but a lease that is large for nothing keeps others from theirs.
        let few = self.largest.saturating_mul(LIKELY_REQUESTS);
        let want = self.taken.saturating_mul(2).max(few);
        if is_new {
            (self.taken, self.largest) = (0, 0);
        }
        self.holder.ask(&needs, want, now_ms).clone()
    }

    /// Tells those who wait, in their order, what they get.
    fn tell(&mut self, answered: Answered, is_kept: bool, now_ms: u64) {
        let left = left(self.limit.terms.cap, self.holder.stand());
        let mut is_first = true;
        for waiter in std::mem::take(&mut self.waiting) {
            if !is_kept {
                let _gone = waiter.told.send(Err(Denied::NotDurable));
                continue;
            }
            if let Some(taken) = self.holder.take(waiter.need, now_ms) {
                if let Err(Ok(taken)) = waiter.told.send(Ok(taken)) {
                    self.holder.settle(taken, 0);
                }
                continue;
            }
            // The first one that was asked for in vain; and those for whom there is not enough either.
            let is_refused = std::mem::replace(&mut is_first, false) && waiter.is_asked;
            if is_refused || waiter.need > left {
                let retry_ms = answered.retry_ms;
                let _gone = waiter.told.send(Err(Denied::Spent { retry_ms, left }));
                continue;
            }
            self.waiting.push_back(waiter);
        }
    }
}
