//! Observed + plan + what came of applying it → [`Findings`] about each object. Pure.

use std::collections::BTreeMap;

use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::{Kind, ObjectRef};
use serde_json::Value;

use crate::apply::Applied;
use crate::autoscaler::scaled_object_ready;
use crate::conditions::{Findings, Scaling, Workload};
use crate::keys;
use crate::live::{ChildKind, Live};
use crate::observed::Observed;
use crate::plan::pool::Hpas;
use crate::plan::scaled_object::Decision;
use crate::plan::{GatewayPlan, Plan};
use crate::pod::{Owner, PodFacts, Trouble};
use crate::programmed::{Fleet, Programmed};

/// One object and what was found out about it.
pub(crate) struct Found<'a> {
    /// Which object.
    pub(crate) object: ObjectRef,
    /// Its `metadata.uid`.
    pub(crate) uid: String,
    /// The generation that was looked at.
    pub(crate) generation: Option<i64>,
    /// What was found.
    pub(crate) findings: Findings<'a>,
}

/// Findings about every object of the namespace. `fleets` by gateway name.
pub(crate) fn collect<'a>(
    observed: &Observed,
    plan: &'a Plan,
    applied: &Applied,
    fleets: &BTreeMap<String, Fleet>,
) -> Vec<Found<'a>> {
    let readable = objects(observed).map(|(object, uid, generation)| {
        let findings = find(&object, observed, plan, applied, fleets);
        Found {
            object,
            uid,
            generation,
            findings,
        }
    });
    let unreadable = observed
        .unreadable
        .iter()
        .map(|(object, unreadable)| Found {
            object: object.clone(),
            uid: unreadable.uid.clone().unwrap_or_default(),
            generation: unreadable.generation,
            findings: Findings {
                unreadable: Some(unreadable.message.clone()),
                ..Findings::new()
            },
        });
    readable.chain(unreadable).collect()
}

fn objects(observed: &Observed) -> impl Iterator<Item = (ObjectRef, String, Option<i64>)> {
    let objects = &observed.objects;
    let backends = objects
        .backends
        .iter()
        .map(|(id, o)| (Kind::LLMBackend, id, &o.metadata));
    let policies = objects
        .policies
        .iter()
        .map(|(id, o)| (Kind::RoutingPolicy, id, &o.metadata));
    let caches = objects
        .caches
        .iter()
        .map(|(id, o)| (Kind::SemanticCache, id, &o.metadata));
    let keys = objects
        .keys
        .iter()
        .map(|(id, o)| (Kind::VirtualKey, id, &o.metadata));
    let budgets = objects
        .budgets
        .iter()
        .map(|(id, o)| (Kind::TokenBudget, id, &o.metadata));
    let identities = objects
        .identities
        .iter()
        .map(|(id, o)| (Kind::IdentityProvider, id, &o.metadata));
    backends
        .chain(policies)
        .chain(caches)
        .chain(keys)
        .chain(budgets)
        .chain(identities)
        .map(|(kind, id, metadata)| {
            (
                ObjectRef::new(kind, id.clone()),
                metadata.uid.clone().unwrap_or_default(),
                metadata.generation,
            )
        })
}

fn find<'a>(
    object: &ObjectRef,
    observed: &Observed,
    plan: &'a Plan,
    applied: &Applied,
    fleets: &BTreeMap<String, Fleet>,
) -> Findings<'a> {
    let mut findings = Findings::new();
    findings.problems = plan
        .problems
        .iter()
        .filter(|problem| problem.object == *object)
        .collect();
    findings.too_large = plan.too_large.contains(object);
    findings.programmed = programmed(object, plan, fleets);

    let owner = match object.kind {
        Kind::LLMBackend => Some(Owner::Backend(object.id.name.clone())),
        Kind::RoutingPolicy => observed
            .objects
            .policies
            .get(&object.id)
            .map(|policy| Owner::Gateway(policy.spec.gateway.clone())),
        Kind::SemanticCache | Kind::VirtualKey | Kind::TokenBudget | Kind::IdentityProvider => None,
    };
    if let Some(owner) = &owner {
        findings.name_taken = applied
            .taken
            .iter()
            .find(|(taken, _)| taken == owner)
            .map(|(_, why)| why.clone());
        // A ScaledObject that is refused does not keep the pool from answering: it shows in ScalingActive.
        let refused = applied
            .refused
            .iter()
            .find(|(o, kind, _)| o == owner && *kind != ChildKind::ScaledObject);
        findings.refused = refused
            .map(|(_, kind, why)| format!("the API server refused the {}: {why}", kind.name()));
    }
    if object.kind == Kind::LLMBackend
        && let Some(pool) = plan.pools.get(&object.id.name)
    {
        let owner = Owner::Backend(object.id.name.clone());
        let name = names::pool_object(&object.id.name);
        let deployment = observed.child(ChildKind::Deployment, &name);
        findings.workload = workload(deployment, observed.pods_of(&owner), &pool.template);
        findings.scaling = pool
            .scaler
            .as_ref()
            .map(|decision| scaling(decision, observed, &name, refused_scaler(applied, &owner)));
    }
    findings.gateway_trouble = gateway_trouble(object, observed, plan);
    findings.is_budget = object.kind == Kind::TokenBudget;
    if object.kind == Kind::VirtualKey
        && let Some(key) = observed.objects.keys.get(&object.id)
    {
        findings.is_suspended = key.spec.suspended;
        findings.ends = keys::end(key);
    }
    findings
}

/// The object's state in each gateway that carries it.
fn programmed(
    object: &ObjectRef,
    plan: &Plan,
    fleets: &BTreeMap<String, Fleet>,
) -> Vec<(String, Programmed)> {
    let key = object.to_string();
    let gateways = plan.carried_by.get(object).into_iter().flatten();
    let state = |gateway: &Id| {
        let hash = plan
            .gateways
            .get(&gateway.name)
            .and_then(|planned| planned.objects.get(&key));
        match (fleets.get(&gateway.name), hash) {
            (Some(fleet), Some(hash)) => fleet.state(&key, hash),
            _ => Programmed::Pending,
        }
    };
    gateways
        .map(|gateway| (gateway.name.clone(), state(gateway)))
        .collect()
}

/// Why the first gateway that carries the object and has no ready replica has none.
fn gateway_trouble(object: &ObjectRef, observed: &Observed, plan: &Plan) -> Option<Trouble> {
    let gateways = plan.carried_by.get(object).into_iter().flatten();
    gateways
        .filter_map(|gateway| Some((gateway, plan.gateways.get(&gateway.name)?)))
        .find_map(|(gateway, planned): (&Id, &GatewayPlan)| {
            let owner = Owner::Gateway(gateway.name.clone());
            let deployment =
                observed.child(ChildKind::Deployment, &names::gateway_object(&gateway.name));
            match workload(deployment, observed.pods_of(&owner), &planned.template) {
                Workload::Trouble(trouble) => Some(trouble),
                _ => None,
            }
        })
}

/// Whether the pods of a Deployment answer. Only those of the current template count: replicas of an older one may
/// answer perfectly while the new ones crash.
fn workload<'a>(
    deployment: Option<&Live>,
    pods: impl Iterator<Item = &'a PodFacts>,
    template: &str,
) -> Workload {
    let Some(deployment) = deployment else {
        return Workload::Starting;
    };
    let (current, older): (Vec<_>, Vec<_>) = pods
        .filter(|pod| !pod.leaving)
        .partition(|pod| pod.template.as_deref() == Some(template));
    if current.iter().any(|pod| pod.is_ready()) {
        return Workload::Answers;
    }
    if deployment.replicas() == Some(0) {
        return Workload::Zero;
    }
    let trouble = current
        .iter()
        .filter_map(|pod| Some((&pod.name, pod.trouble.as_ref()?)))
        .min_by_key(|(name, _)| *name);
    if let Some((_, trouble)) = trouble {
        return Workload::Trouble(trouble.clone());
    }
    if let Some(trouble) = replica_failure(deployment) {
        return Workload::Trouble(trouble);
    }
    if older.iter().any(|pod| pod.is_ready()) {
        Workload::RollingOut
    } else {
        Workload::Starting
    }
}

/// The Deployment cannot make pods at all: a quota, PodSecurity, a webhook.
fn replica_failure(deployment: &Live) -> Option<Trouble> {
    let conditions = deployment
        .object
        .pointer("/status/conditions")?
        .as_array()?;
    let text = |condition: &Value, key: &str| {
        condition
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let failure = conditions.iter().find(|condition| {
        text(condition, "type") == "ReplicaFailure" && text(condition, "status") == "True"
    })?;
    Some(Trouble {
        reason: text(failure, "reason"),
        message: text(failure, "message"),
    })
}

fn refused_scaler<'a>(applied: &'a Applied, owner: &Owner) -> Option<&'a str> {
    let refused = applied
        .refused
        .iter()
        .find(|(o, kind, _)| o == owner && *kind == ChildKind::ScaledObject);
    refused.map(|(_, _, why)| why.as_str())
}

/// Whether KEDA and the HPA scale the pool, and if not, why and what to do.
#[expect(clippy::too_many_lines, reason = "a table of cases, most urgent first")]
fn scaling(decision: &Decision, observed: &Observed, name: &str, refused: Option<&str>) -> Scaling {
    let state = |active, reason: &str, message: String| Scaling {
        active,
        reason: reason.to_owned(),
        message,
    };
    let held = "until then the number of replicas is held";
    match decision {
        Decision::KedaNotInstalled => {
            return state(
                false,
                "KEDANotInstalled",
                format!("install KEDA (https://keda.sh); {held}"),
            );
        }
        Decision::ScalerUnavailable => {
            return state(
                false,
                "ScalerUnavailable",
                format!("Penstock's scaler has no ready replica; {held}"),
            );
        }
        Decision::SecondAutoscaler(hpa) => return conflict(hpa),
        Decision::Planned => {}
    }
    if let Some(why) = refused {
        return state(
            false,
            "AutoscalerConflict",
            format!("the ScaledObject was refused: {why}"),
        );
    }
    let hpas = Hpas::find(observed, name);
    if let Some(foreign) = hpas.foreign {
        return conflict(&foreign.name);
    }
    let scaled_object = observed
        .child(ChildKind::ScaledObject, name)
        .and_then(scaled_object_ready);
    let at_zero = observed
        .child(ChildKind::Deployment, name)
        .and_then(Live::replicas)
        == Some(0);
    match (
        scaled_object,
        hpas.own.and_then(|hpa| hpa.scaling_active.as_ref()),
    ) {
        (Some((false, reason, message)), _) => state(
            false,
            "ScaledObjectNotReady",
            format!("KEDA says {reason}: {message}"),
        ),
        (Some((true, ..)), _) if at_zero => state(
            true,
            "ScaledToZero",
            "KEDA waits for a request to start the first replica".to_owned(),
        ),
        (_, Some((true, ..))) => state(
            true,
            "ScalingActive",
            "KEDA and its HPA choose the number of replicas".to_owned(),
        ),
        (_, Some((false, reason, _))) => state(
            false,
            "HPANotActive",
            format!("the HPA says {reason}: see kubectl describe hpa"),
        ),
        _ => state(
            false,
            "Pending",
            "KEDA has not set the HPA to work yet".to_owned(),
        ),
    }
}

fn conflict(hpa: &str) -> Scaling {
    let message = format!(
        "HorizontalPodAutoscaler {hpa} scales this pool already: delete it, or remove spec.pool.scaling"
    );
    Scaling {
        active: false,
        reason: "AutoscalerConflict".to_owned(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(replicas: i32, conditions: Value) -> Live {
        let object = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "blue-pool"},
            "spec": {"replicas": replicas}, "status": {"conditions": conditions},
        });
        Live::new(serde_json::from_value(object).unwrap())
    }

    fn pod(name: &str, template: &str, ready: bool, trouble: Option<&str>) -> PodFacts {
        PodFacts {
            owner: Owner::Backend("blue".into()),
            uid: name.into(),
            name: name.into(),
            template: Some(template.into()),
            ready_since: ready.then_some(1),
            leaving: false,
            started: None,
            trouble: trouble.map(|reason| Trouble {
                reason: reason.into(),
                message: "m".into(),
            }),
        }
    }

    fn of(replicas: i32, pods: &[PodFacts]) -> Workload {
        workload(Some(&deployment(replicas, json!([]))), pods.iter(), "new")
    }

    #[test]
    fn one_ready_replica_of_the_current_template_is_enough() {
        assert_eq!(
            of(
                2,
                &[
                    pod("a", "new", true, None),
                    pod("b", "new", false, Some("OOMKilled"))
                ]
            ),
            Workload::Answers
        );
    }

    #[test]
    fn old_replicas_never_count_as_the_new_generation() {
        assert_eq!(of(1, &[pod("a", "old", true, None)]), Workload::RollingOut);
        let Workload::Trouble(trouble) = of(
            1,
            &[
                pod("a", "old", true, None),
                pod("b", "new", false, Some("ImagePullBackOff")),
            ],
        ) else {
            panic!("the new replica's trouble must show");
        };
        assert_eq!(trouble.reason, "ImagePullBackOff");
    }

    #[test]
    fn no_replicas_by_choice_is_zero_and_none_yet_is_starting() {
        assert_eq!(of(0, &[]), Workload::Zero);
        assert_eq!(of(1, &[]), Workload::Starting);
        assert_eq!(
            workload(None, std::iter::empty(), "new"),
            Workload::Starting
        );
    }

    #[test]
    fn deployment_that_may_not_make_pods_says_why() {
        let failure = json!([{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "quota"}]);
        let found = workload(Some(&deployment(1, failure)), std::iter::empty(), "new");
        assert_eq!(
            found,
            Workload::Trouble(Trouble {
                reason: "FailedCreate".into(),
                message: "quota".into()
            })
        );
    }

    fn scaled_object(status: &str) -> Observed {
        let object = json!({
            "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "blue-pool"},
            "status": {"conditions": [{"type": "Ready", "status": status, "reason": "R", "message": "M"}]},
        });
        let live = Live::new(serde_json::from_value(object).unwrap());
        let mut observed = Observed::default();
        observed
            .children
            .insert((ChildKind::ScaledObject, "blue-pool".into()), live.into());
        observed
    }

    fn hpa(active: bool, scaled_object: Option<&str>) -> crate::autoscaler::HpaFacts {
        crate::autoscaler::HpaFacts {
            name: "hpa".into(),
            deployment: "blue-pool".into(),
            scaled_object: scaled_object.map(str::to_owned),
            scaling_active: Some((active, "Why".into(), "changes with each sync".into())),
            keeps_tolerance: false,
        }
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn scaling_table() {
        let reason = |decision: &Decision, observed: &Observed, refused| {
            let scaling = scaling(decision, observed, "blue-pool", refused);
            (scaling.active, scaling.reason)
        };
        let with = |mut observed: Observed, hpa| {
            observed.autoscalers.push(std::sync::Arc::new(hpa));
            observed
        };
        let planned = Decision::Planned;
        let own = Some("blue-pool");
        let table = [
            (
                Decision::KedaNotInstalled,
                Observed::default(),
                None,
                (false, "KEDANotInstalled"),
            ),
            (
                Decision::ScalerUnavailable,
                Observed::default(),
                None,
                (false, "ScalerUnavailable"),
            ),
            (
                Decision::SecondAutoscaler("x".into()),
                Observed::default(),
                None,
                (false, "AutoscalerConflict"),
            ),
            (
                planned.clone(),
                Observed::default(),
                Some("denied"),
                (false, "AutoscalerConflict"),
            ),
            (
                planned.clone(),
                with(Observed::default(), hpa(true, None)),
                None,
                (false, "AutoscalerConflict"),
            ),
            (
                planned.clone(),
                Observed::default(),
                None,
                (false, "Pending"),
            ),
            (
                planned.clone(),
                scaled_object("False"),
                None,
                (false, "ScaledObjectNotReady"),
            ),
            (
                planned.clone(),
                with(scaled_object("True"), hpa(false, own)),
                None,
                (false, "HPANotActive"),
            ),
            (
                planned.clone(),
                with(scaled_object("True"), hpa(true, own)),
                None,
                (true, "ScalingActive"),
            ),
        ];
        for (decision, observed, refused, (active, expected)) in table {
            assert_eq!(
                reason(&decision, &observed, refused),
                (active, expected.to_owned()),
                "{decision:?}"
            );
        }
        let mut zero = with(scaled_object("True"), hpa(false, own));
        let key = (ChildKind::Deployment, "blue-pool".to_owned());
        zero.children.insert(key, deployment(0, json!([])).into());
        assert_eq!(
            reason(&planned, &zero, None),
            (true, "ScaledToZero".to_owned())
        );
    }
}
