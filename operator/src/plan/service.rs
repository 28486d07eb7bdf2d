//! A Service in front of the pods of a gateway or a pool.

use serde_json::{Map, json};

use super::{Child, Draft, selector};

/// Port `http` of the pods under `port`.
pub(super) fn plan(draft: Draft<'_>, port: u16) -> Child {
    let selector = selector(draft.owner);
    draft.finish(
        Map::new(),
        json!({
            "spec": {
                "ports": [{ "name": "http", "port": port, "protocol": "TCP", "targetPort": "http" }],
                "selector": selector,
                "type": "ClusterIP",
            },
        }),
    )
}
