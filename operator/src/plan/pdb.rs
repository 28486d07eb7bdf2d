//! A PodDisruptionBudget: nodes may be drained, one replica at a time.

use serde_json::{Map, json};

use super::{Child, Draft, selector};

/// One replica at a time, however many there are: a budget of `minAvailable: 1` would block the drain of a node for
/// ever where a pool has one replica. A replica that does not answer may always go.
pub(super) fn plan(draft: Draft<'_>) -> Child {
    let selector = selector(draft.owner);
    draft.finish(
        Map::new(),
        json!({
            "spec": {
                "maxUnavailable": 1,
                "selector": { "matchLabels": selector },
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }),
    )
}
