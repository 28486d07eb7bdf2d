//! `SemanticCache`: answers that are served again.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::text::DurationText;

/// A cache that rules of RoutingPolicies refer to.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "penstock.dev",
    version = "v1alpha1",
    kind = "SemanticCache",
    plural = "semanticcaches",
    shortname = "scache",
    category = "penstock",
    namespaced,
    status = "SemanticCacheStatus",
    derive = "PartialEq",
    doc = "Answers that are served again for the same request. Rules of RoutingPolicies refer to it.",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct SemanticCacheSpec {
    /// Serves an answer again for a request whose body is equal, member by member (SHA-256 of its canonical JSON).
    pub exact: Exact,
}

/// The exact layer, in the memory of each gateway replica.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Exact {
    /// How long an answer may be served again, at most `720h`. Default `5m`.
    #[serde(default = "five_minutes")]
    pub ttl: DurationText,
    /// Upper bound of stored answers in each gateway replica, in MiB; the least recently used go first. Default 64.
    #[serde(default = "sixty_four")]
    #[schemars(range(min = 1, max = 65_536))]
    pub max_size_mib: i32,
}

fn five_minutes() -> DurationText {
    "5m".into()
}

fn sixty_four() -> i32 {
    64
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SemanticCacheStatus {
    /// `Accepted`, `ResolvedRefs`, `Programmed`, `Ready`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
