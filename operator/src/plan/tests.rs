//! Snapshots of plans. Names in the fixtures differ from the product's and from each other, so that a
//! label or name in the wrong place shows.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::autoscaler::HpaFacts;
use crate::replicas::{REPLICAS, Step};

mod properties;

const NAMESPACE: &str = "kitchen";

pub(crate) fn settings() -> PlanSettings {
    PlanSettings {
        scaler_address: "scaler.basement:6000".into(),
        self_image: "registry.example/self:1".into(),
        vllm_image: "registry.example/vllm:1".into(),
        gateway_replicas: 3,
        gateway_region: String::new(),
        gateway_region_header: Some("x-region".into()),
        gateway_trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()],
        image_pull_policy: "Never".into(),
        store: None,
        usage_export: None,
    }
}

fn read<K: serde::de::DeserializeOwned>(name: &str, spec: Value) -> (Id, K) {
    let object = json!({
        "apiVersion": "penstock.dev/v1alpha1",
        "kind": std::any::type_name::<K>().rsplit("::").next().unwrap(),
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": format!("uid-{name}"), "generation": 4},
        "spec": spec,
    });
    (
        Id::new(NAMESPACE, name),
        serde_json::from_value(object).unwrap(),
    )
}

fn soup() -> Value {
    json!({"pool": {
        "model": "hf://grandma/soup-7b",
        "accelerator": {"resource": "example.com/oven", "count": 2},
        "resources": {"requests": {"cpu": 4}, "limits": {"memory": "32Gi"}},
        "scaling": {"minReplicas": 2, "maxReplicas": 6, "ttftP90": "750ms", "scaleDownDelay": "90s"},
        "args": ["--max-model-len", "4096"],
        "env": {"HF_HUB_OFFLINE": "1"},
        "drain": "2m",
    }})
}

/// A pool with scaling, a simulated one with a fixed number, a provider with a credential, and a gateway.
pub(crate) fn observed() -> Observed {
    let mut observed = Observed {
        namespace: NAMESPACE.into(),
        keda: true,
        scaler_ready: true,
        ..Observed::default()
    };
    observed.objects.backends.extend([
        read("soup", soup()),
        read("salad", json!({"pool": {"model": "green", "engine": "Simulated", "replicas": 4, "args": ["--seed", "7"]}})),
        read("delivery", json!({"external": {
            "url": "https://food.example/v1", "credential": {"secret": "courier", "key": "token"},
        }})),
    ]);
    observed.objects.policies.extend([
        read("lunch", json!({"gateway": "counter", "rules": [
            {"name": "hot", "match": {"models": ["soup"]}, "backends": [{"name": "soup"}, {"name": "delivery", "priority": 1}]},
        ]})),
        read("dinner", json!({"gateway": "counter", "rules": [
            {"name": "cold", "match": {"models": ["salad"]}, "backends": [{"name": "salad"}]},
        ]})),
    ]);
    let values = BTreeMap::from([
        ("token".to_owned(), b"tip".to_vec()),
        ("unrelated".to_owned(), b"secret sauce".to_vec()),
    ]);
    observed
        .secrets
        .insert(Id::new(NAMESPACE, "courier"), values);
    observed
}

/// The world after `plan` was carried out.
fn after(observed: &Observed, plan: &Plan) -> Observed {
    let mut observed = observed.clone();
    for doomed in &plan.prune {
        observed
            .children
            .remove(&(doomed.kind, doomed.name.clone()));
    }
    for child in &plan.children {
        let key = (child.kind, child.name.clone());
        let mut object = child.object.clone();
        object["metadata"]["uid"] = json!(format!("uid-{}-{}", child.kind.name(), child.name));
        let mut live = Live::new(serde_json::from_value(object).unwrap());
        let before = observed.children.get(&key);
        live.replicas_owners = before
            .map(|live| live.replicas_owners.clone())
            .unwrap_or_default();
        let number = before.and_then(|live| live.replicas());
        let pools = plan
            .replicas
            .values()
            .find(|pool| child.kind == ChildKind::Deployment && pool.deployment == child.name);
        let number = match pools.map(|pool| pool.step) {
            Some(Step::Create(count) | Step::Hold(count) | Step::Adopt(count)) => {
                live.replicas_owners = BTreeSet::from([REPLICAS.to_owned()]);
                Some(count)
            }
            Some(Step::HandOver(count)) => {
                live.replicas_owners = BTreeSet::from([crate::replicas::HANDOVER.to_owned()]);
                Some(count)
            }
            _ => number,
        };
        if let Some(number) = number.filter(|_| pools.is_some()) {
            live.object["spec"]["replicas"] = json!(number);
        }
        observed.children.insert(key, Arc::new(live));
    }
    observed
}

fn child<'a>(plan: &'a Plan, kind: ChildKind, name: &str) -> &'a Value {
    let found = plan
        .children
        .iter()
        .find(|child| child.kind == kind && child.name == name);
    &found
        .unwrap_or_else(|| panic!("no {} {name}", kind.name()))
        .object
}

fn names_of(plan: &Plan) -> Vec<String> {
    plan.children
        .iter()
        .map(|child| format!("{} {}", child.kind.name(), child.name))
        .collect()
}

#[test]
fn children_come_in_the_order_of_writing() {
    let plan = plan(&observed(), &settings());
    assert_eq!(plan.problems, []);
    insta::assert_yaml_snapshot!("order", names_of(&plan));
}

#[test]
fn scaled_vllm_pool() {
    let plan = plan(&observed(), &settings());
    for kind in [
        ChildKind::Deployment,
        ChildKind::Service,
        ChildKind::PodDisruptionBudget,
        ChildKind::ScaledObject,
    ] {
        insta::assert_yaml_snapshot!(
            format!("soup_{}", kind.name()),
            child(&plan, kind, "soup-pool")
        );
    }
    assert_eq!(plan.replicas["soup"].step, Step::Create(2));
}

#[test]
fn simulated_pool_with_a_fixed_number() {
    let plan = plan(&observed(), &settings());
    insta::assert_yaml_snapshot!(
        "salad_Deployment",
        child(&plan, ChildKind::Deployment, "salad-pool")
    );
    assert_eq!(plan.replicas["salad"].step, Step::Create(4));
    assert!(!names_of(&plan).contains(&"ScaledObject salad-pool".to_owned()));
}

#[test]
fn gateway_children() {
    let plan = plan(&observed(), &settings());
    for kind in [
        ChildKind::ServiceAccount,
        ChildKind::Role,
        ChildKind::RoleBinding,
        ChildKind::Service,
        ChildKind::Deployment,
        ChildKind::PodDisruptionBudget,
    ] {
        insta::assert_yaml_snapshot!(
            format!("counter_{}", kind.name()),
            child(&plan, kind, "counter-gateway")
        );
    }
    insta::assert_yaml_snapshot!(
        "counter_acks",
        child(&plan, ChildKind::ConfigMap, "counter-acks")
    );
}

#[test]
fn config_map_holds_the_config_that_its_digest_names() {
    let plan = plan(&observed(), &settings());
    let live = Live::new(
        serde_json::from_value(child(&plan, ChildKind::ConfigMap, "counter-config-f1").clone())
            .unwrap(),
    );
    let config = config_map::unpack(&live).unwrap();
    assert_eq!(config.digest().unwrap(), plan.gateways["counter"].digest);
    assert_eq!(
        live.annotation(names::DIGEST_ANNOTATION),
        Some(plan.gateways["counter"].digest.as_str())
    );
    assert_eq!(config.rules.len(), 2);
}

#[test]
fn credentials_hold_referenced_keys_and_no_others() {
    let plan = plan(&observed(), &settings());
    let secret = child(&plan, ChildKind::Secret, "counter-credentials");
    assert_eq!(secret["data"], json!({"courier_token": "dGlw"}));
}

#[test]
fn pods_pass_pod_security_restricted() {
    let plan = plan(&observed(), &settings());
    for child in plan
        .children
        .iter()
        .filter(|child| child.kind == ChildKind::Deployment)
    {
        let pod = &child.object["spec"]["template"]["spec"];
        assert_eq!(
            pod["securityContext"]["runAsNonRoot"],
            json!(true),
            "{}",
            child.name
        );
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"],
            json!("RuntimeDefault"),
            "{}",
            child.name
        );
        for container in pod["containers"].as_array().unwrap() {
            assert_eq!(
                container["securityContext"]["allowPrivilegeEscalation"],
                json!(false),
                "{}",
                child.name
            );
            assert_eq!(
                container["securityContext"]["capabilities"]["drop"],
                json!(["ALL"]),
                "{}",
                child.name
            );
        }
        for volume in pod["volumes"].as_array().unwrap() {
            assert!(volume.get("emptyDir").is_some(), "{}: {volume}", child.name);
        }
    }
}

#[test]
fn grace_period_covers_pre_stop_drain_and_exit() {
    let plan = plan(&observed(), &settings());
    let pod =
        |name: &str| child(&plan, ChildKind::Deployment, name)["spec"]["template"]["spec"].clone();
    assert_eq!(
        pod("soup-pool")["terminationGracePeriodSeconds"],
        json!(5 + 120 + 30)
    );
    assert_eq!(
        pod("salad-pool")["terminationGracePeriodSeconds"],
        json!(5 + 600 + 30)
    );
    assert_eq!(
        pod("counter-gateway")["terminationGracePeriodSeconds"],
        json!(5 + 600 + 30)
    );
}

#[test]
fn gateways_are_told_of_their_store_and_get_its_password_as_a_file() {
    let pod = |settings: &PlanSettings| {
        let plan = plan(&observed(), settings);
        child(&plan, ChildKind::Deployment, "counter-gateway")["spec"]["template"]["spec"]
            .to_string()
    };
    assert!(!pod(&settings()).contains("store"));
    let url = "rediss://cache.db:6380".to_owned();
    let secret = Some("cache".to_owned());
    let store = Some(crate::args::StoreSettings { url, secret });
    let told = pod(&PlanSettings {
        store,
        ..settings()
    });
    assert!(told.contains(r#""--store","rediss://cache.db:6380""#));
    assert!(told.contains(r#""/var/run/penstock/store/password""#));
    assert!(told.contains(r#""secretName":"cache""#));
}

#[test]
fn gateways_are_told_where_usage_goes_and_get_its_variables() {
    let pod = |usage_export: Option<(String, Option<String>)>| {
        let settings = PlanSettings {
            usage_export,
            ..settings()
        };
        let plan = plan(&observed(), &settings);
        child(&plan, ChildKind::Deployment, "counter-gateway")["spec"]["template"]["spec"]
            .to_string()
    };
    assert!(!pod(None).contains("usage-export"));
    let told = pod(Some(("s3://usage/a".to_owned(), None)));
    assert!(told.contains(r#""--usage-export","s3://usage/a""#) && !told.contains("envFrom"));
    let told = pod(Some(("s3://usage/a".to_owned(), Some("keys".to_owned()))));
    assert!(told.contains(r#""envFrom":[{"secretRef":{"name":"keys"}}]"#));
}

#[test]
fn nothing_of_a_pools_replicas_is_in_what_is_applied() {
    let plan = plan(&observed(), &settings());
    assert_eq!(
        child(&plan, ChildKind::Deployment, "soup-pool")["spec"].get("replicas"),
        None
    );
    assert_eq!(
        child(&plan, ChildKind::Deployment, "salad-pool")["spec"].get("replicas"),
        None
    );
    assert_eq!(
        child(&plan, ChildKind::Deployment, "counter-gateway")["spec"]["replicas"],
        json!(3)
    );
}

#[test]
fn scaled_object_waits_for_keda_and_for_the_scaler_and_yields_to_another_hpa() {
    let decision = |change: fn(&mut Observed)| {
        let mut observed = observed();
        change(&mut observed);
        let plan = plan(&observed, &settings());
        assert!(!names_of(&plan).contains(&"ScaledObject soup-pool".to_owned()));
        plan.pools["soup"].scaler.clone().unwrap()
    };
    assert_eq!(
        decision(|o| o.keda = false),
        scaled_object::Decision::KedaNotInstalled
    );
    assert_eq!(
        decision(|o| o.scaler_ready = false),
        scaled_object::Decision::ScalerUnavailable
    );
    let foreign = |o: &mut Observed| {
        o.autoscalers.push(Arc::new(HpaFacts {
            name: "mine".into(),
            deployment: "soup-pool".into(),
            scaled_object: None,
            scaling_active: None,
            keeps_tolerance: false,
        }));
    };
    assert_eq!(
        decision(foreign),
        scaled_object::Decision::SecondAutoscaler("mine".into())
    );
}

#[test]
fn scaled_object_stays_while_the_scaler_is_away() {
    let first = observed();
    let mut second = after(&first, &plan(&first, &settings()));
    second.scaler_ready = false;
    let plan = plan(&second, &settings());
    assert!(names_of(&plan).contains(&"ScaledObject soup-pool".to_owned()));
    assert_eq!(plan.prune, []);
}

#[test]
fn tolerance_that_the_hpa_kept_is_not_worked_around() {
    let mut observed = observed();
    let metadata = |observed: &Observed| {
        let plan = plan(observed, &settings());
        child(&plan, ChildKind::ScaledObject, "soup-pool")["spec"]["triggers"][0]["metadata"]
            .clone()
    };
    assert_eq!(metadata(&observed)["toleranceEffective"], json!("10"));
    observed.autoscalers.push(Arc::new(HpaFacts {
        name: "keda-hpa-soup-pool".into(),
        deployment: "soup-pool".into(),
        scaled_object: Some("soup-pool".into()),
        scaling_active: None,
        keeps_tolerance: true,
    }));
    assert_eq!(metadata(&observed).get("toleranceEffective"), None);
}

#[test]
fn removing_scaling_adopts_before_the_scaled_object_goes() {
    let first = observed();
    let mut scaled = after(&first, &plan(&first, &settings()));
    let key = (ChildKind::Deployment, "soup-pool".to_owned());
    let mut live = Live::clone(&scaled.children[&key]);
    live.object["spec"]["replicas"] = json!(5);
    live.replicas_owners = BTreeSet::from(["kube-controller-manager".to_owned()]);
    scaled.children.insert(key, Arc::new(live));

    let (id, mut soup): (Id, penstock_crds::LLMBackend) = read("soup", soup());
    soup.spec.pool.as_mut().unwrap().scaling = None;
    scaled.objects.backends.insert(id, soup);
    let adopting = plan(&scaled, &settings());
    assert_eq!(adopting.replicas["soup"].step, Step::Adopt(5));
    assert_eq!(
        adopting.prune,
        [],
        "the ScaledObject goes with the step, not before it"
    );
    assert_eq!(
        adopting.replicas["soup"].then_remove.as_ref().unwrap().name,
        "soup-pool"
    );
}

#[test]
fn deleting_a_policy_keeps_a_shared_gateway_and_deleting_the_last_prunes_it() {
    let first = observed();
    let mut world = after(&first, &plan(&first, &settings()));
    world.objects.policies.remove(&Id::new(NAMESPACE, "lunch"));
    let second = plan(&world, &settings());
    assert_eq!(second.prune, []);
    let owners =
        &child(&second, ChildKind::Deployment, "counter-gateway")["metadata"]["ownerReferences"];
    assert_eq!(owners.as_array().unwrap().len(), 1);
    world.objects.policies.clear();
    let third = plan(&world, &settings());
    let pruned: Vec<String> = third
        .prune
        .iter()
        .map(|d| format!("{} {}", d.kind.name(), d.name))
        .collect();
    insta::assert_yaml_snapshot!("pruned_with_the_last_policy", pruned);
}

#[test]
fn labelled_object_without_our_owner_is_never_pruned() {
    let mut observed = observed();
    let foreign = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "bait", "uid": "u", "labels": {MANAGED_BY_LABEL: MANAGED_BY, "penstock.dev/gateway": "x"}},
    });
    let live = Live::new(serde_json::from_value(foreign).unwrap());
    observed
        .children
        .insert((ChildKind::Secret, "bait".into()), Arc::new(live));
    assert_eq!(plan(&observed, &settings()).prune, []);
}

#[test]
fn broken_pool_keeps_its_children_and_the_others_go_on() {
    let first = observed();
    let mut world = after(&first, &plan(&first, &settings()));
    let mut broken = soup();
    broken["pool"]["scaling"]["minReplicas"] = json!(9);
    world.objects.backends.extend([read("soup", broken)]);
    let plan = plan(&world, &settings());
    assert!(
        plan.problems
            .iter()
            .any(|problem| problem.object.id.name == "soup")
    );
    assert_eq!(plan.prune, []);
    assert!(
        !names_of(&plan).iter().any(|name| name.contains("soup")),
        "{:?}",
        names_of(&plan)
    );
    assert!(names_of(&plan).contains(&"Deployment salad-pool".to_owned()));
}

#[test]
fn unreadable_object_keeps_its_children() {
    let first = observed();
    let mut world = after(&first, &plan(&first, &settings()));
    let id = Id::new(NAMESPACE, "soup");
    world.objects.backends.remove(&id);
    let unreadable = crate::observed::Unreadable {
        message: "no".into(),
        generation: Some(5),
        uid: Some("uid-soup".into()),
        terminating: false,
    };
    world
        .unreadable
        .insert(ObjectRef::new(Kind::LLMBackend, id), unreadable);
    assert_eq!(plan(&world, &settings()).prune, []);
}

#[test]
fn config_that_does_not_fit_leaves_the_previous_one_and_names_the_newest() {
    let first = observed();
    let mut world = after(&first, &plan(&first, &settings()));
    // Random names do not compress: 62 policies of 64 rules with 64 models each.
    let mut state = 1_u64;
    let mut word = || {
        let mut text = String::new();
        for _ in 0..8 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            write!(text, "{:x}", state >> 32).unwrap();
        }
        text
    };
    for number in 0..62 {
        let rules: Vec<Value> = (0..64)
            .map(|rule| {
                let models: Vec<String> = (0..16).map(|_| word()).collect();
                json!({"name": format!("r{rule}"), "match": {"models": models}, "backends": [{"name": "salad"}]})
            })
            .collect();
        world.objects.policies.extend([read(
            &format!("big-{number}"),
            json!({"gateway": "counter", "rules": rules}),
        )]);
    }
    let plan = plan(&world, &settings());
    assert!(plan.gateways["counter"].too_large.unwrap() > config_map::MAX_CONFIG_BYTES);
    assert!(!names_of(&plan).contains(&"ConfigMap counter-config-f1".to_owned()));
    assert_eq!(plan.prune, [], "the previous config stays");
    assert_eq!(plan.too_large.len(), 62);
    assert!(
        plan.too_large
            .iter()
            .all(|object| object.id.name.starts_with("big-"))
    );
}

#[test]
fn edited_template_has_another_hash() {
    let (before, mut world) = (observed(), observed());
    let mut edited = soup();
    edited["pool"]["args"] = json!(["--other"]);
    world.objects.backends.extend([read("soup", edited)]);
    let template = |observed: &Observed| plan(observed, &settings()).pools["soup"].template.clone();
    assert_ne!(template(&before), template(&world));
    let mut scaling = soup();
    scaling["pool"]["scaling"]["maxReplicas"] = json!(7);
    world.objects.backends.extend([read("soup", scaling)]);
    assert_eq!(template(&before), template(&world), "scaling is no rollout");
}
