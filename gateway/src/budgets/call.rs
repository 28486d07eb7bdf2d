//! Budgets of calls of models: what a call counts in, and what becomes of one for which there is not enough left.

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
pub(crate) fn plan(
    process: &Process,
    who: &Who,
    api: Api,
    call: &Call<'_>,
    body: &[u8],
) -> Result<(Option<Plan>, Option<Edited>), Reject> {
    let snapshot = process.snapshot.load();
    let budgets = snapshot.as_ref().map(|snapshot| &snapshot.budgets);
    let of = |call: &Call<'_>, body: &[u8]| {
        budgets.and_then(|budgets| Plan::of_call(budgets, who.principal(), api, call, body))
    };
    let plan = of(call, body);
    let most = plan.as_ref().and_then(Plan::max_output_tokens);
    let bounded = match most {
        Some(most) => bound::fill(api, call, body, most)?,
        None => None,
    };
    let plan = match (plan, &bounded) {
        (Some(plan), Some((bounded, _))) => Some(plan.with(api, &Call::parse(bounded)?, bounded)),
        (plan, _) => plan,
    };
    Ok((plan, bounded))
}

/// How long an answer may be for which there is not enough left, where nothing else speaks against it.
pub(crate) fn fits(reject: &Reject, record: &Record) -> Option<u32> {
    let Reject::BudgetExceeded { fits_tokens, .. } = reject else {
        return None;
    };
    let mut tried = record.tried.iter();
    fits_tokens.filter(|_| tried.all(|tried| tried.reason == BUDGET))
}
