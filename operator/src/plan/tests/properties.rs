//! What holds of every plan.

use proptest::prelude::*;

use super::*;

fn any_pool() -> impl Strategy<Value = Value> {
    let scaling = prop::option::of(
        (1..4, 0..4).prop_map(|(min, more)| json!({"minReplicas": min, "maxReplicas": min + more})),
    );
    (scaling, prop::option::of(0..5), any::<bool>(), prop::collection::btree_map("[A-Z]{1,4}", "[a-z]{0,4}", 0..3)).prop_map(
        |(scaling, replicas, simulated, env)| {
            let mut pool = json!({"model": "m", "engine": if simulated { "Simulated" } else { "vLLM" }, "env": env});
            match (scaling, replicas) {
                (Some(scaling), _) => pool["scaling"] = scaling,
                (None, Some(replicas)) => pool["replicas"] = json!(replicas),
                (None, None) => {}
            }
            json!({"pool": pool})
        },
    )
}

fn any_observed() -> impl Strategy<Value = Observed> {
    let pools = prop::collection::btree_map("[a-c]", any_pool(), 0..3);
    let policies = prop::collection::btree_map("p[a-c]", ("g[ab]", "[a-d]"), 0..3);
    (pools, policies, any::<bool>(), any::<bool>()).prop_map(|(pools, policies, keda, scaler_ready)| {
        let mut observed = Observed { namespace: NAMESPACE.into(), keda, scaler_ready, ..Observed::default() };
        observed.objects.backends.extend(pools.into_iter().map(|(name, spec)| read(&name, spec)));
        observed.objects.policies.extend(policies.into_iter().map(|(name, (gateway, backend))| {
            let rule = json!({"name": "r", "match": {"models": ["*"]}, "backends": [{"name": backend}]});
            read(&name, json!({"gateway": gateway, "rules": [rule]}))
        }));
        observed
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn plan_is_deterministic_and_planning_again_changes_nothing(observed in any_observed()) {
        let first = plan(&observed, &settings());
        prop_assert_eq!(&first.children, &plan(&observed, &settings()).children);
        let mut world = observed;
        for _ in 0..2 {
            world = after(&world, &plan(&world, &settings()));
        }
        let again = plan(&world, &settings());
        prop_assert_eq!(&again.children, &first.children);
        prop_assert_eq!(&again.prune, &[]);
        for (name, pool) in &again.replicas {
            prop_assert_eq!(pool.step, Step::Leave, "{}", name);
        }
        for child in &again.children {
            let live = world.child(child.kind, &child.name);
            let verdict = compare::decide(&child.object, live.map(|live| &live.object), None, crate::world::now());
            prop_assert_eq!(verdict, compare::Verdict::Keep, "{} {}", child.kind.name(), &child.name);
        }
    }

    #[test]
    fn emptying_a_namespace_prunes_everything(observed in any_observed()) {
        let mut world = after(&observed, &plan(&observed, &settings()));
        world.objects = penstock_crds::Objects::default();
        let last = plan(&world, &settings());
        prop_assert_eq!(last.prune.len(), world.children.len());
        prop_assert!(last.children.is_empty());
    }
}
