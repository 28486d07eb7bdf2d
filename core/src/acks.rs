//! `Ack`: what a gateway replica writes into `<gateway>-acks` after it took (or refused) a config.

use serde::{Deserialize, Serialize};

use crate::ids::Id;

/// One replica's entry, JSON under the key of its pod UID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ack {
    /// Digest of the config that this replica serves.
    pub digest: String,
    /// When its process started, Unix seconds; an ack older than the container's start is ignored.
    pub process_start: u64,
    /// Objects (`kind/namespace/name`) whose newest fragment this replica refused and serves in its last good form.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<String>,
    /// How limits stand that this replica has asked for: a minute old at most, while they change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<LimitStand>,
}

/// How one limit of a TokenBudget stands, as one replica knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitStand {
    /// The TokenBudget.
    pub budget: Id,
    /// The limit's name in it.
    pub limit: String,
    /// Who has it alone; empty: all share it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub of: String,
    /// Rises with each change: of two replicas the one with the greater one knows more.
    pub order: (u64, u64),
    /// In the window.
    pub spent: u64,
    /// For requests under way, and what gateways hold for the next ones.
    pub reserved: u64,
    /// What is left.
    pub remaining: u64,
    /// What of `spent` gateways had that died; ever.
    #[serde(default)]
    pub estimated: u64,
    /// The most of `reserved` that gateways hold for requests to come.
    #[serde(default)]
    pub idle_bound: u64,
    /// When its window ends, or the first part of a sliding one, in Unix ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_ms: Option<u64>,
}
