//! What the operator needs to know of KEDA's ScaledObjects and of HorizontalPodAutoscalers. Pure.

use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use serde_json::Value;

use crate::live::Live;

/// An autoscaler of the same namespace that points at a Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HpaFacts {
    /// Its name.
    pub(crate) name: String,
    /// The Deployment that it scales.
    pub(crate) deployment: String,
    /// The ScaledObject that owns it, if one does.
    pub(crate) scaled_object: Option<String>,
    /// Condition `ScalingActive`: (is true, reason, message).
    pub(crate) scaling_active: Option<(bool, String, String)>,
    /// Whether the API server kept `behavior.*.tolerance`: both directions.
    pub(crate) keeps_tolerance: bool,
}

impl HpaFacts {
    /// Reads an HPA; `None` for one that scales something else than a Deployment.
    pub(crate) fn read(hpa: &HorizontalPodAutoscaler) -> Option<Self> {
        let spec = hpa.spec.as_ref()?;
        if spec.scale_target_ref.kind != "Deployment" {
            return None;
        }
        let owners = hpa.metadata.owner_references.iter().flatten();
        let condition = hpa
            .status
            .iter()
            .flat_map(|status| status.conditions.iter().flatten())
            .find(|condition| condition.type_ == "ScalingActive");
        let behavior = spec.behavior.as_ref();
        let kept = |rules: Option<&k8s_openapi::api::autoscaling::v2::HPAScalingRules>| {
            rules.is_some_and(|rules| rules.tolerance.is_some())
        };
        Some(Self {
            name: hpa.metadata.name.clone()?,
            deployment: spec.scale_target_ref.name.clone(),
            scaled_object: owners
                .filter(|owner| owner.kind == "ScaledObject")
                .map(|owner| owner.name.clone())
                .next(),
            scaling_active: condition.map(|condition| {
                (
                    condition.status == "True",
                    condition.reason.clone().unwrap_or_default(),
                    condition.message.clone().unwrap_or_default(),
                )
            }),
            keeps_tolerance: behavior.is_some_and(|behavior| {
                kept(behavior.scale_up.as_ref()) && kept(behavior.scale_down.as_ref())
            }),
        })
    }
}

/// A ScaledObject's condition `Ready`: (is true, reason, message).
pub(crate) fn scaled_object_ready(live: &Live) -> Option<(bool, String, String)> {
    let conditions = live.object.pointer("/status/conditions")?.as_array()?;
    let ready = conditions
        .iter()
        .find(|condition| condition.get("type").and_then(Value::as_str) == Some("Ready"))?;
    let text = |key: &str| {
        ready
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    match text("status").as_str() {
        "True" => Some((true, text("reason"), text("message"))),
        "False" => Some((false, text("reason"), text("message"))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hpa(behavior: Value, target: &str) -> Option<HpaFacts> {
        let hpa = json!({
            "metadata": {"name": "keda-hpa-blue-pool", "ownerReferences": [
                {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "name": "blue-pool", "uid": "1"},
            ]},
            "spec": {
                "maxReplicas": 3, "behavior": behavior,
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": target, "name": "blue-pool"},
            },
            "status": {"conditions": [
                {"type": "ScalingActive", "status": "True", "reason": "ValidMetricFound", "message": "m"},
            ]},
        });
        HpaFacts::read(&serde_json::from_value(hpa).unwrap())
    }

    #[test]
    fn hpa_is_read_with_its_owner_and_condition() {
        let facts = hpa(json!({}), "Deployment").unwrap();
        assert_eq!(facts.scaled_object.as_deref(), Some("blue-pool"));
        assert!(facts.scaling_active.unwrap().0);
    }

    #[test]
    fn tolerance_counts_only_when_both_directions_kept_it() {
        let kept = |behavior| hpa(behavior, "Deployment").unwrap().keeps_tolerance;
        assert!(kept(
            json!({"scaleUp": {"tolerance": "0"}, "scaleDown": {"tolerance": "0"}})
        ));
        assert!(!kept(
            json!({"scaleUp": {"tolerance": "0"}, "scaleDown": {}})
        ));
        assert!(!kept(json!({})));
    }

    #[test]
    fn hpa_of_another_kind_is_left_out() {
        assert_eq!(hpa(json!({}), "StatefulSet"), None);
    }

    #[test]
    fn scaled_object_without_ready_condition_is_undecided() {
        let live = |status: &str| {
            Live::new(serde_json::from_value(json!({
                "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "x"},
                "status": {"conditions": [{"type": "Ready", "status": status, "reason": "r", "message": "m"}]},
            })).unwrap())
        };
        assert_eq!(scaled_object_ready(&live("Unknown")), None);
        assert_eq!(
            scaled_object_ready(&live("False")).map(|ready| ready.0),
            Some(false)
        );
        assert_eq!(
            scaled_object_ready(&live("True")).map(|ready| ready.0),
            Some(true)
        );
    }
}
