//! (IO) `Reservation`: what one attempt has of all limits that it counts in. Whatever becomes of the attempt, it is
//! settled exactly once: by what the backend counted, else by what was delivered; when it is dropped at the latest.

use std::sync::Arc;

use penstock_core::config::{Enforcement, Price, Unit};

use super::account::{Account, Denied};
use super::books::Books;
use super::bound::{self, Bound, LEAST_OUTPUT_TOKENS, Unbounded};
use super::metrics;
use super::{Budget, Budgets, Limit, Share, Took};
use crate::failure::Failure;
use crate::ledger::holder::Taken;
use crate::ledger::span::Span;
use crate::lengths::USUAL_TOKENS;
use crate::meter::Usage;
use crate::openai::{Api, Call};
use crate::principal::Principal;
use crate::process::Worker;
use crate::reject::Reject;
use crate::snapshot::{Candidate, Rule};

/// What a request counts in, and how much it may take.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    shares: Arc<[Share]>,
    /// How long an answer is likely to be at most.
    length: u32,
    /// `None` where it is no call of a model: nothing is said in tokens then.
    bound: Option<Bound>,
}

impl Plan {
    /// Of a call of a model by `rule`; `None` where it counts in nothing.
    pub(crate) fn of_call(
        shares: Vec<Share>,
        rule: &Rule,
        api: Api,
        call: &Call<'_>,
        body: &[u8],
    ) -> Option<Self> {
        if shares.is_empty() {
            return None;
        }
        // Hard limits do not ask what is likely.
        let mut budgets = shares.iter().map(|share| share.budget.enforcement);
        let is_asked = budgets.any(|enforcement| enforcement != Enforcement::Hard);
        let known = is_asked.then(|| rule.lengths.likely()).flatten();
        let length = known.unwrap_or(USUAL_TOKENS);
        Some(Self {
            shares: shares.into(),
            length,
            bound: Some(bound::of(api, call, body, length)),
        })
    }

    /// Of anything else.
    pub(crate) fn of_passing(budgets: &Budgets, principal: Option<&Principal>) -> Option<Self> {
        let shares = budgets.of(principal, None);
        (!shares.is_empty()).then(|| Self {
            shares: shares.into(),
            length: USUAL_TOKENS,
            bound: None,
        })
    }

    /// Of the same request with another body.
    pub(crate) fn with(&self, api: Api, call: &Call<'_>, body: &[u8]) -> Self {
        Self {
            shares: Arc::clone(&self.shares),
            length: self.length,
            bound: Some(bound::of(api, call, body, self.length)),
        }
    }

    /// Those in which an attempt at `candidate` counts.
    fn shares_at(&self, candidate: &Candidate) -> impl Iterator<Item = &Share> {
        let backend = &candidate.backend.id;
        let shares = self.shares.iter();
        shares.filter(move |share| share.budget.selects_backend(backend))
    }

    /// What an attempt at `candidate` needs of a limit; `None` if it does not count there.
    fn need(
        &self,
        budget: &Budget,
        limit: &Limit,
        price: Option<Price>,
    ) -> Result<Option<u64>, Reject> {
        let is_of_tokens = limit.unit.is_of_tokens();
        let took = match &self.bound {
            // Agents and tools have no tokens, and cost what is said that such a call costs.
            None if limit.unit == Unit::MicroUsd => {
                return Ok(budget.amount(limit.unit, Took::default(), None));
            }
            None if is_of_tokens => return Ok(None),
            None => Took::default(),
            Some(bound) if !limit.is_hard || !is_of_tokens => bound.likely,
            Some(bound) => bound
                .most
                .map_err(|Unbounded(why)| Reject::BudgetUnbounded {
                    budget: budget_name(limit),
                    why,
                })?,
        };
        match budget.amount(limit.unit, took, price) {
            Some(amount) => Ok(Some(amount)),
            None => Err(Reject::BudgetUnpriced {
                budget: budget_name(limit),
            }),
        }
    }

    /// How long answers may be that take no more than `left` of a limit; `None` where they would be too short, or it
    /// is not their length.
    fn shorter(
        &self,
        budget: &Budget,
        limit: &Limit,
        price: Option<Price>,
        left: u64,
    ) -> Option<u32> {
        let bound = self.bound.as_ref()?;
        let most = bound.most.ok()?;
        let of_output = |output: u64| Took { output, ..most };
        let amount = |output: u64| budget.amount(limit.unit, of_output(output), price);
        let longest = most.output / bound.answers;
        // How long is not too long: the amount rises with it.
        let (mut low, mut high) = (u64::from(LEAST_OUTPUT_TOKENS), longest);
        if !limit.is_hard || low >= high || amount(low * bound.answers)? > left {
            return None;
        }
        while low + 1 < high {
            let middle = low.midpoint(high);
            if amount(middle * bound.answers)? <= left {
                low = middle;
            } else {
                high = middle;
            }
        }
        (amount(longest * bound.answers)? > left).then_some(u32::try_from(low).unwrap_or(u32::MAX))
    }
}

/// What refusals call a limit.
fn budget_name(limit: &Limit) -> String {
    format!("{}/{}", limit.budget.name, limit.name)
}

/// Takes what an attempt at `candidate` needs, in all limits that it counts in. If one has not enough, nothing is
/// taken.
pub(crate) async fn reserve(
    worker: &Worker,
    plan: &Plan,
    candidate: &Candidate,
) -> Result<Reservation, Reject> {
    let price = candidate.backend.profile.price;
    let mut reservation = Reservation {
        books: Arc::clone(&worker.process.books),
        entries: Vec::new(),
        price,
        untold: plan
            .bound
            .map_or_else(Took::default, |bound| bound.most.unwrap_or(bound.likely)),
        is_sent: false,
    };
    for share in plan.shares_at(candidate) {
        share.budget.may_be_used()?;
        for limit in &share.budget.limits {
            let need = match plan.need(&share.budget, limit, price) {
                Ok(Some(need)) => need,
                Ok(None) => continue,
                // It is counted by what is known of it.
                Err(_) if share.budget.enforcement == Enforcement::Shadow => 0,
                Err(reject) => return Err(reject),
            };
            reservation.add(worker, plan, share, limit, need).await?;
        }
    }
    Ok(reservation)
}

/// Counts an answer out of a cache, that `candidate` gave and that took `usage` then, for as much of it as the budgets
/// say.
pub(crate) async fn hit(
    worker: &Worker,
    plan: &Plan,
    candidate: &Candidate,
    usage: Option<Usage>,
) -> Result<(), Reject> {
    let price = candidate.backend.profile.price;
    let took = usage.map_or_else(Took::default, Took::of);
    let share_of = |budget: &Budget, limit: &Limit| {
        let all = budget.amount(limit.unit, took, price)?;
        let percent = u64::from(budget.cache_hit_percent);
        (limit.terms.span != Span::Held).then(|| all.saturating_mul(percent).div_ceil(100))
    };
    let mut reservation = Reservation {
        books: Arc::clone(&worker.process.books),
        entries: Vec::new(),
        price,
        untold: Took::default(),
        is_sent: false,
    };
    for share in plan.shares_at(candidate) {
        share.budget.may_be_used()?;
        for limit in &share.budget.limits {
            let need = share_of(&share.budget, limit).unwrap_or(0);
            reservation.add(worker, plan, share, limit, need).await?;
        }
    }
    reservation.settle(|entry| share_of(&entry.share.budget, &entry.limit).unwrap_or(0));
    Ok(())
}

fn refusal(
    plan: &Plan,
    budget: &Budget,
    limit: &Limit,
    price: Option<Price>,
    denied: Denied,
) -> Reject {
    match denied {
        Denied::Spent { retry_ms, left } => {
            let max = limit.terms.cap;
            // What is more than all of it was not asked for: as much as all may be there.
            let room = if retry_ms.is_none() { max } else { left };
            Reject::BudgetExceeded {
                budget: budget_name(limit),
                unit: limit.unit,
                max,
                left,
                retry_ms,
                fits_tokens: plan.shorter(budget, limit, price, room),
            }
        }
        Denied::Away => Reject::BudgetUnavailable {
            budget: budget_name(limit),
        },
        Denied::NotDurable => Reject::BudgetNotDurable {
            budget: budget_name(limit),
        },
    }
}

/// What an attempt has of one limit.
struct Entry {
    share: Share,
    limit: Arc<Limit>,
    /// `None` where it goes on without.
    taken: Option<(Arc<Account>, Taken)>,
}

impl Entry {
    fn new(share: &Share, limit: &Arc<Limit>, taken: Option<(Arc<Account>, Taken)>) -> Self {
        Self {
            share: share.clone(),
            limit: Arc::clone(limit),
            taken,
        }
    }
}

/// See the module.
pub(crate) struct Reservation {
    books: Arc<Books>,
    entries: Vec<Entry>,
    price: Option<Price>,
    /// What it is taken to have cost if nobody tells: the most that it may, or what is likely where there is no most.
    untold: Took,
    is_sent: bool,
}

impl Reservation {
    /// Takes `need` of one more limit.
    async fn add(
        &mut self,
        worker: &Worker,
        plan: &Plan,
        share: &Share,
        limit: &Arc<Limit>,
        need: u64,
    ) -> Result<(), Reject> {
        let (books, enforcement) = (&self.books, share.budget.enforcement);
        let taken = if need == 0 {
            None
        } else {
            let taken = books.reserve(&worker.tasks, share, limit, need).await;
            let (result, denied) = match (taken, enforcement) {
                (Ok(taken), _) => {
                    self.entries.push(Entry::new(share, limit, Some(taken)));
                    return Ok(());
                }
                (Err(denied @ Denied::Spent { .. }), Enforcement::Hard | Enforcement::Soft) => {
                    (metrics::Result::Refused, Some(denied))
                }
                (Err(denied), Enforcement::Hard) => (metrics::Result::Unavailable, Some(denied)),
                (Err(Denied::Spent { .. }), Enforcement::Shadow) => {
                    (metrics::Result::Exceeded, None)
                }
                (Err(_), Enforcement::Soft | Enforcement::Shadow) => {
                    (metrics::Result::Uncounted, None)
                }
            };
            books.metrics.count(limit, result);
            if let Some(denied) = denied {
                return Err(refusal(plan, &share.budget, limit, self.price, denied));
            }
            None
        };
        self.entries.push(Entry::new(share, limit, taken));
        Ok(())
    }

    /// It goes upstream. What is not told of it from now on costs at least its prompt.
    pub(crate) fn sent(&mut self) {
        self.is_sent = true;
    }

    /// The attempt gave no answer.
    pub(crate) fn failed(mut self, failure: &Failure) {
        self.is_sent = failure.costs();
    }

    /// The backend refused the request, which costs nothing.
    pub(crate) fn refused(mut self) {
        self.is_sent = false;
    }

    /// The attempt's answer is over: `usage` is what the backend counted, `delivered` the tokens that came as far as is
    /// known.
    pub(crate) fn ended(mut self, usage: Option<Usage>, delivered: Option<u64>) {
        let took = match usage {
            Some(usage) => {
                let took = Took::of(usage);
                let output = took.output.max(delivered.unwrap_or(0));
                Took { output, ..took }
            }
            None => Took {
                output: delivered.unwrap_or(self.untold.output),
                ..self.untold
            },
        };
        self.took(took);
    }

    fn took(&mut self, took: Took) {
        let price = self.price;
        self.settle(|entry| {
            let amount = entry.share.budget.amount(entry.limit.unit, took, price);
            amount
                .filter(|_| entry.limit.terms.span != Span::Held)
                .unwrap_or(0)
        });
    }

    fn settle(&mut self, amount: impl Fn(&Entry) -> u64) {
        for entry in std::mem::take(&mut self.entries) {
            let amount = amount(&entry);
            match entry.taken {
                Some((account, taken)) => self.books.settle(&account, taken, amount),
                None if amount > 0 => self.books.charge(&entry.share, &entry.limit, amount),
                None => {}
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.is_sent {
            self.took(Took {
                input: self.untold.input,
                ..Took::default()
            });
        } else {
            self.settle(|_| 0);
        }
    }
}
