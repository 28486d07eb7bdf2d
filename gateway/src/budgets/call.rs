//! Budgets of calls of models: what a call counts in, and what becomes of one for which there is not enough left.

use crate::budgets::Share;
use crate::budgets::bound::{self, Edited};
use crate::budgets::reservation::{self, Plan};
use crate::cache::exact::Entry;
use crate::failure::BUDGET;
use crate::openai::{Api, Call};
use crate::principal::Who;
use crate::process::{Process, Worker};
use crate::record::Record;
use crate::reject::Reject;
use crate::snapshot::Rule;

/// A stored answer may count too.
pub(crate) async fn count_hit(
    worker: &Worker,
    plan: Option<&Plan>,
    rule: &Rule,
    entry: &Entry,
) -> Result<(), Reject> {
    let Some(plan) = plan else { return Ok(()) };
    let mut candidates = rule.candidates();
    let maker = candidates.find(|candidate| candidate.backend.id == entry.backend);
    match maker {
        Some(candidate) => Box::pin(reservation::hit(worker, plan, candidate, entry.usage)).await,
        None => Ok(()),
    }
}

/// What a call counts in, and its body, where a budget needs a bound for the answer that the call does not have.
pub(crate) fn shares(
    process: &Process,
    who: &Who,
    api: Api,
    call: &Call<'_>,
    body: &[u8],
) -> Result<(Vec<Share>, Option<Edited>), Reject> {
    let snapshot = process.snapshot.load();
    let shares = snapshot.as_ref().map_or_else(Vec::new, |snapshot| {
        snapshot.budgets.of(who.principal(), Some(&call.model))
    });
    let bounding = shares.iter().map(|share| &share.budget);
    let bounding = bounding.filter(|budget| budget.bounds_answers());
    let most = bounding.map(|budget| budget.max_output_tokens).min();
    let bounded = match most {
        Some(most) => bound::fill(api, call, body, most)?,
        None => None,
    };
    Ok((shares, bounded))
}

/// How long an answer may be for which there is not enough left, where nothing else speaks against it.
pub(crate) fn fits(reject: &Reject, record: &Record) -> Option<u32> {
    let Reject::BudgetExceeded { fits_tokens, .. } = reject else {
        return None;
    };
    let mut tried = record.tried.iter();
    fits_tokens.filter(|_| tried.all(|tried| tried.reason == BUDGET))
}
