//! How the limits of a TokenBudget stand, from what its gateway's replicas wrote into their acks. Pure.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use penstock_core::acks::{Ack, LimitStand};
use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::budget::{LimitStatus, TokenBudgetSpec};
use penstock_crds::{Kind, ObjectRef, TokenBudget};

use crate::acks;
use crate::live::ChildKind;
use crate::observed::Observed;

/// Entries of one status, as its schema says.
const MAX_LIMITS: usize = 32;

/// What the status of an object says of its limits, where it is not what the gateways say.
pub(crate) fn limits_of(observed: &Observed, object: &ObjectRef) -> Option<Vec<LimitStatus>> {
    let budget = budget(observed, object)?;
    let acks = names::gateway_acks(&budget.spec.gateway);
    let acks = acks::read(observed.child(ChildKind::ConfigMap, &acks));
    let wanted = limits(&object.id, &budget.spec, acks.values());
    let is_known = budget
        .status
        .as_ref()
        .is_some_and(|status| status.limits == wanted);
    // Replicas that have just started know nothing yet.
    (!is_known && !wanted.is_empty()).then_some(wanted)
}

/// What the status of an object says of its limits.
pub(crate) fn told(observed: &Observed, object: &ObjectRef) -> Option<Vec<LimitStatus>> {
    let status = budget(observed, object)?.status.as_ref()?;
    Some(status.limits.clone())
}

fn budget<'a>(observed: &'a Observed, object: &ObjectRef) -> Option<&'a TokenBudget> {
    let is_budget = object.kind == Kind::TokenBudget;
    observed
        .objects
        .budgets
        .get(&object.id)
        .filter(|_| is_budget)
}

/// The limits of `budget`, in the order of its spec; of each those who have used most, if they have it alone.
pub(crate) fn limits<'a>(
    budget: &Id,
    spec: &TokenBudgetSpec,
    acks: impl Iterator<Item = &'a Ack>,
) -> Vec<LimitStatus> {
    let mut newest: BTreeMap<(&str, &str), &LimitStand> = BTreeMap::new();
    for stand in acks.flat_map(|ack| &ack.limits) {
        if stand.budget != *budget {
            continue;
        }
        let known = newest.entry((&stand.limit, &stand.of)).or_insert(stand);
        if known.order < stand.order {
            *known = stand;
        }
    }
    let mut limits = Vec::new();
    for limit in &spec.limits {
        let of_limit = newest.values().filter(|stand| stand.limit == limit.name);
        let mut of_limit: Vec<&&LimitStand> = of_limit.collect();
        of_limit.sort_by_key(|stand| stand.remaining);
        limits.extend(of_limit.into_iter().map(|stand| status(stand)));
    }
    limits.truncate(MAX_LIMITS);
    limits
}

fn status(stand: &LimitStand) -> LimitStatus {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let time = |ms: u64| Timestamp::from_millisecond(i64::try_from(ms).ok()?).ok();
    LimitStatus {
        name: stand.limit.clone(),
        of: stand.of.clone(),
        spent: number(stand.spent),
        reserved: number(stand.reserved),
        remaining: number(stand.remaining),
        estimated: number(stand.estimated),
        idle_bound: number(stand.idle_bound),
        resets_at: stand.ends_ms.and_then(time).map(|time| time.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stand(limit: &str, of: &str, order: u64, remaining: u64) -> LimitStand {
        LimitStand {
            budget: Id::new("ns", "b"),
            limit: limit.to_owned(),
            of: of.to_owned(),
            order: (1, order),
            spent: 10 - remaining,
            reserved: 0,
            remaining,
            estimated: 0,
            idle_bound: 2,
            ends_ms: Some(1_767_225_600_000),
        }
    }

    fn ack(limits: Vec<LimitStand>) -> Ack {
        Ack {
            digest: "d".to_owned(),
            process_start: 7,
            rejected: Vec::new(),
            limits,
        }
    }

    #[test]
    fn the_replica_that_knows_most_counts() {
        let spec: TokenBudgetSpec = serde_json::from_value(json!({
            "per": "Team",
            "limits": [
                {"name": "month", "unit": "Requests", "max": 10, "window": {"calendar": "Month"}},
                {"name": "day", "unit": "Requests", "max": 10, "window": {"calendar": "Day"}},
            ],
        }))
        .unwrap();
        let mut foreign = stand("day", "x", 9, 1);
        foreign.budget = Id::new("ns", "other");
        let acks = [
            ack(vec![
                stand("day", "a", 3, 5),
                stand("month", "a", 8, 9),
                foreign,
            ]),
            ack(vec![
                stand("day", "a", 4, 4),
                stand("day", "b", 1, 2),
                stand("gone", "a", 1, 1),
            ]),
        ];
        let limits = limits(&Id::new("ns", "b"), &spec, acks.iter());
        let told: Vec<_> = limits
            .iter()
            .map(|limit| (limit.name.as_str(), limit.of.as_str(), limit.remaining))
            .collect();
        assert_eq!(told, [("month", "a", 9), ("day", "b", 2), ("day", "a", 4)]);
        assert_eq!(limits[0].resets_at.as_deref(), Some("2026-01-01T00:00:00Z"));
    }
}
