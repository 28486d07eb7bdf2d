//! What a gateway may do: its ServiceAccount, Role and RoleBinding. The whole of a gateway's rights is here
//! (ARCHITECTURE.md); the operator holds each of them itself, or it could not grant them.

use penstock_core::config::FORMAT;
use penstock_core::names;
use serde_json::{Map, json};

use super::{Child, Draft};

/// The account that the gateway's pods run as.
pub(super) fn service_account(draft: Draft<'_>) -> Child {
    draft.finish(Map::new(), json!({ "automountServiceAccountToken": false }))
}

/// Its own config and credentials to read, its own acks to write, and the endpoints of the namespace.
pub(super) fn role(draft: Draft<'_>, gateway: &str) -> Child {
    let config = names::gateway_config_map(gateway, FORMAT);
    let read = ["get", "list", "watch"];
    draft.finish(
        Map::new(),
        json!({
            "rules": [
                { "apiGroups": [""], "resources": ["configmaps"], "resourceNames": [config], "verbs": read },
                {
                    "apiGroups": [""], "resources": ["secrets"],
                    "resourceNames": [names::gateway_credentials(gateway)], "verbs": read,
                },
                {
                    "apiGroups": [""], "resources": ["configmaps"],
                    "resourceNames": [names::gateway_acks(gateway)], "verbs": ["patch"],
                },
                { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] },
            ],
        }),
    )
}

/// Gives the Role to the account.
pub(super) fn role_binding(draft: Draft<'_>, gateway: &str) -> Child {
    let name = names::gateway_object(gateway);
    let namespace = draft.namespace.to_owned();
    draft.finish(
        Map::new(),
        json!({
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name },
            "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": namespace }],
        }),
    )
}
