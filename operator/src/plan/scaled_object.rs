//! A pool's ScaledObject: KEDA asks Penstock's scaler for the number of replicas.

use penstock_crds::backend::Scaling;
use serde_json::{Map, json};

use super::{Child, Draft};
use crate::args::PlanSettings;
use crate::autoscaler::HpaFacts;
use crate::observed::Observed;

/// Seconds between KEDA's own questions.
const POLLING_S: u32 = 5;
/// Percent that the HPA ignores unless it lets the tolerance be set (`HPAConfigurableTolerance`).
const HPA_TOLERANCE_PERCENT: &str = "10";

/// Whether a ScaledObject is planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Yes.
    Planned,
    /// KEDA's kinds do not exist.
    KedaNotInstalled,
    /// The scaler does not answer yet: a ScaledObject made now would get an HPA with a CPU target (keda#7729).
    ScalerUnavailable,
    /// This HPA, which is not KEDA's, scales the Deployment already.
    SecondAutoscaler(String),
}

/// Decides; one that exists stays while the scaler is away.
pub(super) fn decide(observed: &Observed, exists: bool, foreign: Option<&HpaFacts>) -> Decision {
    if !observed.keda {
        return Decision::KedaNotInstalled;
    }
    if exists {
        return Decision::Planned;
    }
    match foreign {
        Some(hpa) => Decision::SecondAutoscaler(hpa.name.clone()),
        None if !observed.scaler_ready => Decision::ScalerUnavailable,
        None => Decision::Planned,
    }
}

/// `hpa` is KEDA's HPA for this pool, once it is there: whether it kept the tolerance shows in it.
pub(super) fn plan(
    draft: Draft<'_>,
    settings: &PlanSettings,
    backend: &str,
    scaling: &Scaling,
    scale_down_delay_s: u64,
    hpa: Option<&HpaFacts>,
) -> Child {
    let mut metadata = json!({
        "backend": backend,
        "kvCacheUtilizationPercent": scaling.kv_cache_utilization_percent.to_string(),
        "scalerAddress": settings.scaler_address,
        "ttftP90": scaling.ttft_p90.0,
    });
    if !hpa.is_some_and(|hpa| hpa.keeps_tolerance) {
        metadata["toleranceEffective"] = json!(HPA_TOLERANCE_PERCENT);
    }
    let target = draft.name.clone();
    draft.finish(
        Map::new(),
        json!({
            "spec": {
                "advanced": {
                    "horizontalPodAutoscalerConfig": {
                        "behavior": {
                            "scaleDown": { "stabilizationWindowSeconds": scale_down_delay_s, "tolerance": "0" },
                            "scaleUp": { "stabilizationWindowSeconds": 0, "tolerance": "0" },
                        },
                    },
                },
                "maxReplicaCount": scaling.max_replicas,
                "minReplicaCount": scaling.min_replicas,
                "pollingInterval": POLLING_S,
                "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": target },
                "triggers": [{ "metadata": metadata, "metricType": "AverageValue", "type": "external" }],
            },
        }),
    )
}
