//! What an engine is told: the model it plays, its limits and how it starts and stops.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use http::StatusCode;

use crate::model::{Limits, PROFILES, Profile};

/// Longest request of an engine that is told nothing else, in tokens. vLLM takes the model's own, which for many is
/// 128 Ki: more than the small caches of tests hold.
pub const DEFAULT_MAX_MODEL_LEN: u32 = 8192;

/// Unfinished requests above which an engine refuses more, unless told otherwise. vLLM has no limit by default. This
/// one is four times the sequences that run at once on the largest profile, and some 40 MB of waiting prompts.
pub const DEFAULT_MAX_QUEUED_REQS: u32 = 4096;

/// Tokens per KV block on a GPU, vLLM's default.
pub const DEFAULT_BLOCK_SIZE: u32 = 16;

/// One engine's settings.
#[derive(Clone)]
pub struct Settings {
    /// Where the caller should listen: [`run`](crate::run) takes a bound listener.
    pub listen: SocketAddr,
    /// The only model name that requests may use.
    pub served_model_name: String,
    /// What the engine plays.
    pub profile: &'static Profile,
    /// Its limits. [`limits_of`](Settings::limits_of) gives a profile's own.
    pub limits: Limits,
    /// Whether the number of KV blocks was chosen by hand; only shown in a metric's label.
    pub blocks_overridden: bool,
    /// How long the model "loads". Until then every path answers 503.
    pub startup_delay: Duration,
    /// How long requests may go on after shutdown begins. Zero aborts them at once.
    pub shutdown_timeout: Duration,
    /// Bearer tokens of which paths under `/v1` require one; none required if empty.
    pub api_keys: Vec<String>,
    /// Burn one core while serving, whatever the load.
    pub busy_loop: bool,
    /// How many times as long as the profile's each step takes.
    pub slowdown: u32,
    /// Answer every generation with this error status instead.
    pub fault_status: Option<StatusCode>,
}

// Not derived: keys must never reach a log.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("listen", &self.listen)
            .field("served_model_name", &self.served_model_name)
            .field("profile", &self.profile.name)
            .field("limits", &self.limits)
            .field("blocks_overridden", &self.blocks_overridden)
            .field("startup_delay", &self.startup_delay)
            .field("shutdown_timeout", &self.shutdown_timeout)
            .field("api_keys", &self.api_keys.len())
            .field("busy_loop", &self.busy_loop)
            .field("slowdown", &self.slowdown)
            .field("fault_status", &self.fault_status)
            .finish()
    }
}

impl Settings {
    /// An engine that serves `model` with the first profile and vLLM's defaults, on vLLM's port of any address.
    pub fn new(model: impl Into<String>) -> Self {
        let profile = &PROFILES[0];
        Self {
            listen: SocketAddr::new(
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                penstock_core::names::ENGINE_PORT,
            ),
            served_model_name: model.into(),
            profile,
            limits: Self::limits_of(profile),
            blocks_overridden: false,
            startup_delay: Duration::ZERO,
            shutdown_timeout: Duration::ZERO,
            api_keys: Vec::new(),
            busy_loop: false,
            slowdown: 1,
            fault_status: None,
        }
    }

    /// The limits that an engine of this profile has unless told otherwise.
    pub fn limits_of(profile: &Profile) -> Limits {
        Limits {
            block_size: DEFAULT_BLOCK_SIZE,
            num_gpu_blocks: profile.num_gpu_blocks,
            max_num_seqs: profile.max_num_seqs,
            max_num_batched_tokens: profile.max_num_batched_tokens,
            max_model_len: DEFAULT_MAX_MODEL_LEN,
            max_num_queued_reqs: DEFAULT_MAX_QUEUED_REQS,
            prefix_caching: true,
        }
    }
}
