//! [`Inputs`]: everything that a decision reads about a target's load. `window` makes it, `decide` reads it. Pure data.

use serde::{Deserialize, Serialize};

/// Whether the gateways' ledger can be relied on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Ledger {
    /// No gateway reports for this target.
    #[default]
    Absent,
    /// Every gateway reported within [`FRESH_MS`].
    Fresh,
    /// Some gateway did not.
    Stale,
}

/// Where the TTFT evidence comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TtftSource {
    /// Gateways' ledgers: exact, and they see queueing before the engine.
    Gateway,
    /// Pods' histograms.
    Pods,
    /// A Prometheus query.
    Prometheus,
}

/// TTFT evidence of the window, since the supply last grew.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ttft {
    /// Where it comes from.
    pub source: TtftSource,
    /// First tokens in time.
    pub within: f64,
    /// First tokens too late.
    pub missed: f64,
    /// Requests that wait for longer than the limit already.
    pub overdue: f64,
}

/// Work per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Requests.
    pub requests: f64,
    /// Prompt tokens, as the engines count them; 0 if unknown.
    pub prompt_tokens: f64,
}

/// Everything that a decision reads about load, up to one tick.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inputs {
    /// Pods that take requests.
    pub ready: u32,
    /// Pods that will, soon.
    pub loading: u32,
    /// Pods whose load is counted: ready ones, and ones that were ready before.
    pub counted: u32,
    /// How many of those were heard within the freshness limit.
    pub fresh: u32,
    /// Sum of KV use, 1 = one full pod; none if no engine tells.
    pub kv_use: Option<f64>,
    /// Requests running in engines.
    pub running: f64,
    /// Requests waiting in engines, and held by gateways.
    pub waiting: f64,
    /// Requests that gateways hold because no endpoint can take them.
    pub held: f64,
    /// Requests in gateways without their last byte.
    pub in_flight: f64,
    /// Most requests that were in the system at once in the window; none if unknown.
    pub peak_concurrency: Option<f64>,
    /// TTFT evidence; none without any.
    pub ttft: Option<Ttft>,
    /// Work done lately.
    pub served: Rates,
    /// Work asked for lately.
    pub demand: Rates,
    /// State of the gateways' ledger.
    pub ledger: Ledger,
    /// Whether a full window was observed.
    pub full: bool,
    /// Whether anything was asked for or done in the window.
    pub busy: bool,
    /// How long the supply has been as large as now, ms, the settling time taken off.
    pub supply_age_ms: u64,
}
