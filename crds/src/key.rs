//! `VirtualKey`: a caller, and what it may do.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use penstock_core::names;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::policy::default_gateway;
use crate::text::DurationText;

/// A caller of a gateway. The operator makes a key for it and keeps it in a Secret; gateways know its hash.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "penstock.dev",
    version = "v1alpha1",
    kind = "VirtualKey",
    plural = "virtualkeys",
    shortname = "vkey",
    category = "penstock",
    namespaced,
    status = "VirtualKeyStatus",
    derive = "PartialEq",
    doc = "A caller of a gateway: the operator makes its key, once, and puts it into a Secret. A gateway that knows at least one wants one from every caller, except where a RoutingPolicy takes anonymous ones.",
    printcolumn = r#"{"name":"Team","type":"string","jsonPath":".spec.team"}"#,
    printcolumn = r#"{"name":"Gateway","type":"string","jsonPath":".spec.gateway"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualKeySpec {
    /// The gateway that knows it: the `gateway` of RoutingPolicies. Default `default`.
    #[serde(default = "default_gateway")]
    #[schemars(
        length(min = 1, max = 40),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub gateway: String,
    /// Whose it is. Rules may ask for it (`match.team`).
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = "^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
    )]
    pub team: String,
    /// Whose it is within the team. Rules may ask for it (`match.user`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub user: Option<String>,
    /// What else rules may ask for (`match.attributes`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub attributes: BTreeMap<String, String>,
    /// The models that it may ask for: exact (`chat`), by prefix (`gpt-*`), or any (`*`). Default: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub models: Vec<String>,
    /// The RoutingPolicies of its namespace whose rules it may use. Default: all of its gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253)))]
    pub policies: Vec<String>,
    /// The Secret that the key is put into, as `key`. One that is there already and holds a `key` is used as it is.
    /// Default: the name of this object and `-key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: Option<String>,
    /// When it ends, such as `2027-01-01T00:00:00Z`. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"), length(max = 40))]
    pub expires_at: Option<String>,
    /// `true`: it is refused for the time being. Default `false`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspended: bool,
    /// Changes the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<RotationSpec>,
}

/// When a new key takes the place of the one before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RotationSpec {
    /// A greater number than before makes a new key, in the same Secret; the one before it stays there as `previous`
    /// for the time of `overlap`. The first key is revision 1.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub revision: i32,
    /// How long the key before it may still be used, at most `720h`. `0s`: not at all. Default `24h`.
    #[serde(default = "one_day")]
    pub overlap: DurationText,
}

fn one_day() -> DurationText {
    "24h".into()
}

impl VirtualKeySpec {
    /// The Secret with the key of the VirtualKey `name`.
    pub fn secret(&self, name: &str) -> String {
        let own = self.secret_name.clone();
        own.unwrap_or_else(|| names::key_secret(name))
    }

    /// Which key is wanted.
    pub fn revision(&self) -> i32 {
        self.rotation
            .as_ref()
            .map_or(1, |rotation| rotation.revision)
    }
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualKeyStatus {
    /// `Accepted`, `ResolvedRefs`, `Programmed`, `Ready`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
