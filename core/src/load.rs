//! `LoadReport`: what a gateway replica tells the scaler, one JSON line a second on `GET /load`.
//!
//! Counters are cumulative since the process started, so a line that is lost costs nothing; `process_start_ms`
//! changes when they begin anew.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;
use crate::ids::BackendId;

/// At most this many ages are listed per backend; `waiting` still counts all.
pub const MAX_AGES: usize = 1024;

/// One line of `GET /load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Which replica speaks: its pod name, or `host:port` without a cluster.
    pub gateway: String,
    /// When its process started, Unix ms.
    pub process_start_ms: u64,
    /// When this line was made, Unix ms.
    pub at_ms: u64,
    /// Per backend; one that never had a request may be absent.
    pub backends: BTreeMap<BackendId, BackendLoad>,
}

/// One backend's load as one gateway replica sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendLoad {
    /// Requests sent or held for this backend, cumulative.
    pub arrivals: u64,
    /// Estimated prompt tokens of these requests (body bytes / 4), cumulative.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were answered, as they are put on accounts, cumulative.
    #[serde(default)]
    pub counted_input: u64,
    /// Tokens of answers, likewise.
    #[serde(default)]
    pub counted_output: u64,
    /// Requests without their last byte.
    pub in_flight: u64,
    /// Requests without their first token, held ones included.
    pub waiting: u64,
    /// How long the longest-waiting of them have waited, ms, oldest first, at most [`MAX_AGES`].
    pub waiting_ages_ms: Vec<u64>,
    /// Requests that no endpoint could take yet and that the gateway holds.
    pub held: u64,
    /// Time to first token of finished waits, cumulative.
    pub ttft: Histogram,
    /// Time between tokens, cumulative.
    pub itl: Histogram,
}
