//! The scaler's own metrics. Label values come from enums, except a target's name, which [`crate::fleet::Limits`] caps
//! and which goes when the target is forgotten.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::decide::{Bound, Decision, Hold};
use crate::drift;
use crate::fleet::TargetKey;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TargetLabels {
    namespace: String,
    scaled_object: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UncountedLabels {
    namespace: String,
    scaled_object: String,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    bound: BoundLabel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    rpc: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct BoundLabel(Bound);

impl EncodeLabelValue for BoundLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(self.0.as_str())
    }
}

/// Handles to all of them; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    targets: Gauge,
    replicas: Family<TargetLabels, Gauge>,
    attainment: Family<TargetLabels, Gauge<f64, AtomicU64>>,
    held: Family<TargetLabels, Gauge>,
    uncounted: Family<UncountedLabels, Gauge<f64, AtomicU64>>,
    changes: Family<ChangeLabels, Counter>,
    scrapes: Counter,
    scrape_errors: Family<ReasonLabels, Counter>,
    load_lines: Counter,
    load_errors: Family<ReasonLabels, Counter>,
    query_errors: Family<ReasonLabels, Counter>,
    calls: Family<CallLabels, Counter>,
}

impl Metrics {
    /// Makes and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix("penstock_scaler");
        registry.register(
            "targets",
            "Targets that KEDA asks about",
            metrics.targets.clone(),
        );
        registry.register(
            "desired_replicas",
            "Replicas last decided",
            metrics.replicas.clone(),
        );
        registry.register(
            "ttft_attainment_ratio",
            "Share of first tokens in time, of the last minute",
            metrics.attainment.clone(),
        );
        registry.register(
            "target_held",
            "1 while data is missing or young, so that the target is not scaled in",
            metrics.held.clone(),
        );
        registry.register(
            "uncounted_tokens_ratio",
            "Share of the tokens that engines took and gateways put on no account, of the last ten minutes; negative: on two",
            metrics.uncounted.clone(),
        );
        registry.register(
            "decision_changes",
            "Changed decisions by the bound that made them",
            metrics.changes.clone(),
        );
        registry.register("scrapes", "Pods scraped", metrics.scrapes.clone());
        registry.register(
            "scrape_errors",
            "Scrapes that failed",
            metrics.scrape_errors.clone(),
        );
        registry.register(
            "load_lines",
            "Load reports read",
            metrics.load_lines.clone(),
        );
        registry.register(
            "load_errors",
            "Ends of gateways' load streams",
            metrics.load_errors.clone(),
        );
        registry.register(
            "prometheus_errors",
            "Prometheus queries that failed",
            metrics.query_errors.clone(),
        );
        registry.register("grpc_calls", "Calls by KEDA", metrics.calls.clone());
        metrics
    }

    /// A pod was read.
    pub fn scraped(&self) {
        self.scrapes.inc();
    }

    /// A pod was not read.
    pub fn scrape_failed(&self, reason: &'static str) {
        self.scrape_errors
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }

    /// A gateway sent a line.
    pub fn load_line(&self) {
        self.load_lines.inc();
    }

    /// A gateway's stream ended.
    pub fn load_failed(&self, reason: &'static str) {
        self.load_errors
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }

    /// A Prometheus query failed.
    pub fn query_failed(&self, reason: &'static str) {
        self.query_errors
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }

    /// A call was answered.
    pub fn called(&self, rpc: &'static str, code: &'static str) {
        self.calls.get_or_create(&CallLabels { rpc, code }).inc();
    }

    /// How many targets there are.
    pub fn set_targets(&self, targets: usize) {
        self.targets.set(i64::try_from(targets).unwrap_or(i64::MAX));
    }

    /// A target's newest decision.
    pub fn decided(&self, key: &TargetKey, decision: &Decision, changed: bool) {
        let labels = labels(key);
        self.replicas
            .get_or_create(&labels)
            .set(i64::from(decision.replicas));
        self.held
            .get_or_create(&labels)
            .set(i64::from(decision.reasons.hold.is_some()));
        match decision.reasons.attainment {
            Some(share) => {
                self.attainment.get_or_create(&labels).set(share);
            }
            None => {
                self.attainment.remove(&labels);
            }
        }
        if changed {
            self.changes
                .get_or_create(&ChangeLabels {
                    bound: BoundLabel(decision.reasons.binding),
                })
                .inc();
        }
    }

    /// What engines took of prompts and of answers and gateways did not count. Returns whether that is much more, or
    /// much less, than it was.
    pub fn uncounted(&self, key: &TargetKey, shares: [Option<f64>; 2]) -> bool {
        let mut is_news = false;
        for (kind, share) in KINDS.into_iter().zip(shares) {
            let labels = uncounted_labels(key, kind);
            match share {
                Some(share) => {
                    let gauge = self.uncounted.get_or_create(&labels);
                    let was_much = gauge.get().abs() > drift::ALARM;
                    is_news |= share.abs() > drift::ALARM && !was_much;
                    gauge.set(share);
                }
                None => {
                    self.uncounted.remove(&labels);
                }
            }
        }
        is_news
    }

    /// A target is not watched any more.
    pub fn forget(&self, key: &TargetKey) {
        for kind in KINDS {
            self.uncounted.remove(&uncounted_labels(key, kind));
        }
        let labels = labels(key);
        self.replicas.remove(&labels);
        self.held.remove(&labels);
        self.attainment.remove(&labels);
    }
}

/// Tokens of prompts, and of answers.
const KINDS: [&str; 2] = ["input", "output"];

fn uncounted_labels(key: &TargetKey, kind: &'static str) -> UncountedLabels {
    UncountedLabels {
        namespace: key.object.namespace.clone(),
        scaled_object: key.object.name.clone(),
        kind,
    }
}

fn labels(key: &TargetKey) -> TargetLabels {
    TargetLabels {
        namespace: key.object.namespace.clone(),
        scaled_object: key.object.name.clone(),
    }
}

/// For logs.
pub fn hold_text(hold: Option<Hold>) -> &'static str {
    hold.map_or("none", Hold::as_str)
}
