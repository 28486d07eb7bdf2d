//! Metrics of the operator, for Prometheus. Label values come from enums.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Everything that is counted. Clones share their numbers.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Passes over a namespace, by result.
    pub(crate) reconciles: Family<ResultLabel, Counter>,
    /// How long a pass took, seconds.
    pub(crate) reconcile_seconds: Histogram,
    /// Requests that write, by kind and operation.
    pub(crate) writes: Family<WriteLabels, Counter>,
    /// Events that were not written because there were too many.
    pub(crate) events_dropped: Counter,
    /// 1 while this replica writes.
    pub(crate) leader: Gauge,
}

/// How a pass ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ResultLabel {
    /// `done` or `failed`.
    pub(crate) result: &'static str,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct WriteLabels {
    /// The object's kind.
    pub(crate) kind: &'static str,
    /// `apply`, `delete`, `status`, `acks` or `event`.
    pub(crate) operation: &'static str,
}

impl Metrics {
    /// Registers everything.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            reconciles: Family::default(),
            // 1 ms to 16 s: a pass without writes takes milliseconds, one write some tens of them.
            reconcile_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            writes: Family::default(),
            events_dropped: Counter::default(),
            leader: Gauge::default(),
        };
        let operator = registry.sub_registry_with_prefix("penstock_operator");
        operator.register(
            "reconciles",
            "Passes over a namespace",
            metrics.reconciles.clone(),
        );
        operator.register_with_unit(
            "reconcile",
            "How long a pass over a namespace took",
            Unit::Seconds,
            metrics.reconcile_seconds.clone(),
        );
        operator.register(
            "writes",
            "Requests to the API server that write",
            metrics.writes.clone(),
        );
        operator.register(
            "events_dropped",
            "Events not written because there were too many",
            metrics.events_dropped.clone(),
        );
        operator.register(
            "leader",
            "1 while this replica writes",
            metrics.leader.clone(),
        );
        metrics
    }

    /// Counts one write.
    pub(crate) fn wrote(&self, kind: &'static str, operation: &'static str) {
        self.writes
            .get_or_create(&WriteLabels { kind, operation })
            .inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_as_documented() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.wrote("Deployment", "apply");
        metrics
            .reconciles
            .get_or_create(&ResultLabel { result: "done" })
            .inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "penstock_operator_writes_total{kind=\"Deployment\",operation=\"apply\"} 1",
            "penstock_operator_reconciles_total{result=\"done\"} 1",
            "penstock_operator_leader 0",
            "penstock_operator_reconcile_seconds_count 0",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
