//! `Ack`: what a gateway replica writes into `<gateway>-acks` after it took (or refused) a config.

use serde::{Deserialize, Serialize};

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
}
