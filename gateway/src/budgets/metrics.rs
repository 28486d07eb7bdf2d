//! What budgets did to requests, as metrics.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::{Budgets, Limit};

/// Values of the label `result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Result {
    /// The limit had not enough left.
    Refused,
    /// The same, where requests are only counted.
    Exceeded,
    /// The store did not answer, and nothing may be sent without it.
    Unavailable,
    /// The store did not answer; what was taken is told later.
    Uncounted,
}

impl Result {
    fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Exceeded => "exceeded",
            Self::Unavailable => "unavailable",
            Self::Uncounted => "uncounted",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct Labels {
    budget: String,
    limit: String,
    result: &'static str,
}

#[derive(Debug, Default)]
pub(crate) struct Metrics {
    attempts: Family<Labels, Counter>,
    made: Mutex<BTreeSet<Labels>>,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "penstock_gateway_budget_attempts",
            "Attempts that a budget refused, would have refused, or could not count at once",
            metrics.attempts.clone(),
        );
        metrics
    }

    pub(crate) fn count(&self, limit: &Limit, result: Result) {
        let labels = Labels {
            budget: limit.budget.to_string(),
            limit: limit.name.clone(),
            result: result.label(),
        };
        self.attempts.get_or_create(&labels).inc();
        self.made().insert(labels);
    }

    /// Drops the series of limits that are not there any more.
    pub(crate) fn keep(&self, budgets: &Budgets) {
        let is_known = |labels: &Labels| {
            let mut limits = budgets.limits();
            limits.any(|limit| {
                limit.name == labels.limit && limit.budget.to_string() == labels.budget
            })
        };
        self.made().retain(|labels| {
            let is_known = is_known(labels);
            if !is_known {
                self.attempts.remove(labels);
            }
            is_known
        });
    }

    fn made(&self) -> std::sync::MutexGuard<'_, BTreeSet<Labels>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
