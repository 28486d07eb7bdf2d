//! What Prometheus sees of streams that callers may come back to. Label values come from closed enums.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// What became of a stream of a rule with `resumable`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// It was kept to its end.
    Whole,
    /// The gateway has no store.
    NoStore,
    /// As many are kept as may.
    TooMany,
    /// It is larger than what is kept of one.
    TooLarge,
    /// The store takes events slower than they come.
    StoreSlow,
    /// The store failed.
    StoreFailed,
}

impl Kept {
    fn label(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::NoStore => "no_store",
            Self::TooMany => "too_many",
            Self::TooLarge => "too_large",
            Self::StoreSlow => "store_slow",
            Self::StoreFailed => "store_failed",
        }
    }
}

/// All series.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    kept: Family<ResultLabels, Counter>,
    resumed: Family<ResultLabels, Counter>,
    /// Streams that go on without their callers.
    pub(super) detached: Gauge,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "penstock_gateway_resumable_streams",
            "Streams of rules with `resumable`, by whether they were kept",
            metrics.kept.clone(),
        );
        registry.register(
            "penstock_gateway_resumed_streams",
            "Callers who came back to a stream, by whether it was there",
            metrics.resumed.clone(),
        );
        registry.register(
            "penstock_gateway_detached_streams",
            "Streams that go on without their callers",
            metrics.detached.clone(),
        );
        metrics
    }

    pub(super) fn kept(&self, kept: Kept) {
        let result = kept.label();
        self.kept.get_or_create(&ResultLabels { result }).inc();
    }

    pub(super) fn resumed(&self, found: bool) {
        let result = if found { "found" } else { "not_found" };
        self.resumed.get_or_create(&ResultLabels { result }).inc();
    }
}
