//! TokenBudgets: what the API server refuses, and what their status says, as gateways say it.

use penstock_crds::budget::LimitStatus;
use serde_json::{Value, json};

use crate::cluster::cluster;
use crate::simulated;
use crate::world::{World, own, policy, until};

fn spec(limits: Value) -> Value {
    json!({"gateway": "counter", "limits": limits})
}

fn daily() -> Value {
    json!([{"name": "daily", "unit": "Requests", "max": 10, "window": {"calendar": "Day"}}])
}

impl World {
    /// What the status says of limits, once it says something else than `before`.
    async fn limits(&self, before: &[LimitStatus]) -> Vec<LimitStatus> {
        until("the limits in the status", async || {
            let budget = self
                .api(crate::OWN, "TokenBudget")
                .get("meals")
                .await
                .unwrap();
            let limits = budget.data.pointer("/status/limits")?.clone();
            let limits: Vec<LimitStatus> = serde_json::from_value(limits).unwrap();
            (limits != before).then_some(limits)
        })
        .await
    }
}

#[tokio::test]
async fn the_api_server_refuses_limits_that_mean_nothing() {
    let Some(world) = World::new(cluster(), "limits").await else {
        return;
    };
    let limit =
        |window: Value| json!([{"name": "a", "unit": "Requests", "max": 1, "window": window}]);
    let refused = [
        (json!([]), "spec.limits"),
        (
            json!([{"name": "a", "unit": "Requests", "max": 1}]),
            "give it a window",
        ),
        (
            json!([{"name": "a", "unit": "Concurrency", "max": 1, "window": {"rolling": "1h"}}]),
            "give it a window",
        ),
        (limit(json!({})), "either rolling or calendar"),
        (
            limit(json!({"rolling": "1h", "calendar": "Day"})),
            "either rolling or calendar",
        ),
        (
            limit(json!({"rolling": "1h", "timeZone": "UTC"})),
            "timeZone is about calendar",
        ),
        (
            json!([{"name": "a", "unit": "Meals", "max": 1, "window": {"rolling": "1h"}}]),
            "unit",
        ),
        (
            json!([{"name": "a", "unit": "Requests", "max": 0, "window": {"rolling": "1h"}}]),
            "max",
        ),
    ];
    for (limits, message) in refused {
        let error = world
            .try_apply(own("TokenBudget", "wrong", spec(limits.clone())))
            .await
            .expect_err(&limits.to_string());
        assert!(error.to_string().contains(message), "{limits}: {error}");
    }
}

#[tokio::test]
async fn how_limits_stand_is_in_the_status_as_gateways_say() {
    let Some(world) = World::new(cluster(), "budgets").await else {
        return;
    };
    world.own("LLMBackend", "soup", simulated()).await;
    world
        .own("RoutingPolicy", "lunch", policy("counter", "soup"))
        .await;
    world.own("TokenBudget", "meals", spec(daily())).await;
    let operator = world.operator("one").await;
    world
        .exists("apps/v1", "Deployment", "counter-gateway")
        .await;
    world.exists("v1", "ConfigMap", "counter-acks").await;
    let (first, second) = (
        world.ready_pod("counter-gateway", "first").await,
        world.ready_pod("counter-gateway", "second").await,
    );
    let stand = |order: u64, spent: u64| {
        json!([{
            "budget": format!("{}/meals", world.namespace), "limit": "daily", "order": [1, order], "spent": spent, "reserved": 1,
            "remaining": 9 - spent, "estimated": 0, "idleBound": 2, "endsMs": 1_767_225_600_000_u64,
        }])
    };
    world
        .ack_with("counter", &first, json!({"limits": stand(3, 4)}))
        .await;
    world
        .ack_with("counter", &second, json!({"limits": stand(5, 6)}))
        .await;
    world
        .condition_is("TokenBudget", "meals", "Programmed", "True", "Programmed")
        .await;
    let mut limits = world.limits(&[]).await;
    if limits[0].spent == 4 {
        limits = world.limits(&limits).await;
    }
    let known = &limits[0];
    assert_eq!(
        (
            known.name.as_str(),
            known.spent,
            known.reserved,
            known.remaining,
            known.idle_bound,
        ),
        ("daily", 6, 1, 3, 2)
    );
    assert_eq!(known.resets_at.as_deref(), Some("2026-01-01T00:00:00Z"));

    // A gateway that may forget says that it does not serve it.
    let rejected = json!({"rejected": [format!("TokenBudget/{}/meals", world.namespace)]});
    world.ack_with("counter", &second, rejected).await;
    let message = world
        .condition_is("TokenBudget", "meals", "Programmed", "False", "NotDurable")
        .await;
    assert!(message.contains("--gateway-store"), "{message}");
    operator.stop().await;
}
