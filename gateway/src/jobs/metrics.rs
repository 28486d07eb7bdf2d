//! What Prometheus sees of jobs. Label values come from closed enums.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::store::Durability;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SettleLabels {
    result: &'static str,
}

/// A background response.
pub(super) const RESPONSE: &str = "response";
/// A batch.
pub(super) const BATCH: &str = "batch";

/// All series of jobs.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    accepted: Family<JobLabels, Counter>,
    ended: Family<EndLabels, Counter>,
    settled: Family<SettleLabels, Counter>,
    /// Calls of jobs in progress.
    pub(super) calls: Gauge,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "penstock_gateway_jobs_accepted",
            "Jobs that were accepted",
            metrics.accepted.clone(),
        );
        registry.register(
            "penstock_gateway_jobs_ended",
            "Jobs that this replica ended, and times that it gave one back",
            metrics.ended.clone(),
        );
        registry.register(
            "penstock_gateway_store_settled",
            "Times that something had to be on the store's disk",
            metrics.settled.clone(),
        );
        registry.register(
            "penstock_gateway_job_calls",
            "Calls of jobs in progress",
            metrics.calls.clone(),
        );
        metrics
    }

    pub(super) fn accepted(&self, kind: &'static str) {
        self.accepted.get_or_create(&JobLabels { kind }).inc();
    }

    pub(super) fn ended(&self, kind: &'static str, result: &'static str) {
        self.ended.get_or_create(&EndLabels { kind, result }).inc();
    }

    /// Returns whether it is the first time that the store is found not to be durable.
    pub(super) fn settled(&self, durability: Durability) -> bool {
        let result = match durability {
            Durability::Durable => "durable",
            Durability::NotDurable => "not_durable",
        };
        let before = self.settled.get_or_create(&SettleLabels { result }).inc();
        durability == Durability::NotDurable && before == 0
    }
}
