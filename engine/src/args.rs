//! The command line of `penstock engine`. Flags that vLLM has are named as there; strings become [`Settings`] here.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::Parser;
use http::StatusCode;
use penstock_core::duration;

use crate::model::{LimitsError, PROFILES, Profile};
use crate::settings::{
    DEFAULT_BLOCK_SIZE, DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_QUEUED_REQS, Settings,
};

/// Run a simulated vLLM engine: vLLM's API, metrics and shutdown, made-up text, modelled step times.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Model to serve under; nothing is loaded.
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// Name that requests use [default: the value of --model].
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// IP address to listen on.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub host: String,
    /// Port to listen on.
    #[arg(long, value_name = "PORT", default_value_t = penstock_core::names::ENGINE_PORT)]
    pub port: u16,
    /// What the engine plays: its step times and the defaults of the limits below.
    #[arg(long, value_name = "PROFILE", default_value = PROFILES[0].name)]
    pub profile: String,
    /// Sequences that run at once [default: the profile's].
    #[arg(long, value_name = "SEQUENCES")]
    pub max_num_seqs: Option<u32>,
    /// Tokens computed in one step [default: the profile's].
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<u32>,
    /// KV-cache blocks, one of which is never used [default: the profile's].
    #[arg(long, value_name = "BLOCKS")]
    pub num_gpu_blocks_override: Option<u32>,
    /// Tokens per KV-cache block.
    #[arg(long, value_name = "TOKENS", default_value_t = DEFAULT_BLOCK_SIZE)]
    pub block_size: u32,
    /// Longest prompt and answer together, in tokens [default: 8192, or what the KV cache holds if that is less].
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
    /// Unfinished requests, waiting and running, above which more get 503.
    #[arg(long, value_name = "REQUESTS", default_value_t = DEFAULT_MAX_QUEUED_REQS)]
    pub max_num_queued_reqs: u32,
    /// Do not share the KV blocks of equal prefixes.
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// GPUs of the engine. Has no effect: a profile stands for a whole deployment.
    #[arg(long, short = 't', value_name = "GPUS", default_value_t = 1)]
    pub tensor_parallel_size: u32,
    /// Seconds that requests may go on after SIGTERM; 0 aborts them at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub shutdown_timeout: u64,
    /// Bearer token that paths under /v1 require; may be repeated [default: none required].
    #[arg(long, value_name = "KEY", env = "VLLM_API_KEY", hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Time that the model takes to "load", such as 30s, 500ms or 2m. Until then every path answers 503.
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub startup_delay: String,
    /// Burn one core whatever the load: what an autoscaler that looks at CPU takes for demand.
    #[arg(long)]
    pub busy_loop: bool,
    /// Take this many times as long for each step: a gray failure to test balancing with.
    #[arg(long, value_name = "FACTOR", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub fault_slowdown: u32,
    /// Answer every generation with this status, 400 to 599, while health and metrics stay fine: a fault to test
    /// failover with.
    #[arg(long, value_name = "STATUS")]
    pub fault_status: Option<u16>,
}

/// One wrong flag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// `--host` is no IP address.
    #[error("--host {0:?} is not an IP address; names are not resolved")]
    Host(String),
    /// `--model` or `--served-model-name` is empty.
    #[error("the model name is empty: set --model")]
    Model,
    /// `--profile` is unknown.
    #[error("--profile {0:?} is unknown; there are {known}", known = known_profiles())]
    Profile(String),
    /// `--startup-delay` is no duration.
    #[error("--startup-delay {0:?} is not a duration such as 30s, 500ms or 2m")]
    StartupDelay(String),
    /// An `--api-key` is empty.
    #[error("--api-key is empty")]
    ApiKey,
    /// `--fault-status` is no error status.
    #[error("--fault-status {0} is not an error status, 400 to 599")]
    FaultStatus(u16),
    /// The limits do not fit together.
    #[error("{0}")]
    Limits(LimitsError),
}

/// Everything that is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(problems))]
pub struct InvalidArgs {
    /// At least one.
    pub problems: Vec<Problem>,
}

fn lines(problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        let separator = if text.is_empty() { "" } else { "\n" };
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{problem}");
    }
    text
}

fn known_profiles() -> String {
    PROFILES.map(|profile| profile.name).join(", ")
}

impl Args {
    /// Checks everything and reports all that is wrong together.
    pub fn settings(self) -> Result<Settings, InvalidArgs> {
        let mut problems = Vec::new();
        let served_model_name = self.served_model_name.unwrap_or(self.model);
        if served_model_name.is_empty() {
            problems.push(Problem::Model);
        }
        let address = self.host.parse::<IpAddr>();
        if address.is_err() {
            problems.push(Problem::Host(self.host));
        }
        let startup_delay = duration::parse(&self.startup_delay).ok();
        if startup_delay.is_none() {
            problems.push(Problem::StartupDelay(self.startup_delay));
        }
        if self.api_key.iter().any(String::is_empty) {
            problems.push(Problem::ApiKey);
        }
        let mut settings = Settings::new(served_model_name);
        if let Some(code) = self.fault_status {
            match StatusCode::from_u16(code) {
                Ok(status) if status.is_client_error() || status.is_server_error() => {
                    settings.fault_status = Some(status);
                }
                _ => problems.push(Problem::FaultStatus(code)),
            }
        }
        match Profile::named(&self.profile) {
            Some(profile) => settings.profile = profile,
            None => problems.push(Problem::Profile(self.profile)),
        }
        let mut limits = Settings::limits_of(settings.profile);
        limits.block_size = self.block_size;
        limits.num_gpu_blocks = self
            .num_gpu_blocks_override
            .unwrap_or(limits.num_gpu_blocks);
        limits.max_num_seqs = self.max_num_seqs.unwrap_or(limits.max_num_seqs);
        limits.max_num_batched_tokens = self
            .max_num_batched_tokens
            // vLLM, too, raises its default to the sequences, and refuses a value that was given.
            .unwrap_or(limits.max_num_batched_tokens.max(limits.max_num_seqs));
        let kv_tokens = u32::try_from(limits.kv_tokens()).unwrap_or(u32::MAX);
        limits.max_model_len = self
            .max_model_len
            .unwrap_or(DEFAULT_MAX_MODEL_LEN.min(kv_tokens));
        limits.max_num_queued_reqs = self.max_num_queued_reqs;
        limits.prefix_caching = !self.no_enable_prefix_caching;
        if let Err(problem) = limits.check() {
            problems.push(Problem::Limits(problem));
        }
        settings.limits = limits;
        settings.blocks_overridden = self.num_gpu_blocks_override.is_some();
        settings.shutdown_timeout = Duration::from_secs(self.shutdown_timeout);
        settings.api_keys = self.api_key;
        settings.busy_loop = self.busy_loop;
        settings.slowdown = self.fault_slowdown;
        match (address, startup_delay) {
            (Ok(address), Some(startup_delay)) if problems.is_empty() => {
                settings.listen = SocketAddr::new(address, self.port);
                settings.startup_delay = startup_delay;
                Ok(settings)
            }
            _ => Err(InvalidArgs { problems }),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn settings(flags: &[&str]) -> Result<Settings, InvalidArgs> {
        Args::try_parse_from([&["engine"], flags].concat())
            .unwrap()
            .settings()
    }

    #[test]
    fn command_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_are_vllms() {
        let settings = settings(&["--model", "m"]).unwrap();
        assert_eq!(settings.listen.port(), 8000);
        assert_eq!(settings.served_model_name, "m");
        assert_eq!(settings.limits.block_size, 16);
        assert_eq!(settings.limits.max_num_seqs, 1024);
        assert_eq!(settings.shutdown_timeout, Duration::ZERO);
    }

    #[test]
    fn small_cache_shortens_the_longest_request_unless_it_was_given() {
        let small = ["--model", "m", "--num-gpu-blocks-override", "65"];
        assert_eq!(settings(&small).unwrap().limits.max_model_len, 1024);
        let error = settings(&[&small[..], &["--max-model-len", "2048"]].concat()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("raise num-gpu-blocks-override or lower max-model-len"),
            "{error}"
        );
    }

    #[test]
    fn all_problems_are_reported_together() {
        let flags = [
            "--model",
            "",
            "--host",
            "localhost",
            "--profile",
            "abacus",
            "--startup-delay",
            "soon",
        ];
        let more = [
            "--api-key",
            "",
            "--max-num-seqs",
            "0",
            "--fault-status",
            "200",
        ];
        let error = settings(&[&flags[..], &more].concat()).unwrap_err();
        assert_eq!(
            error.problems,
            [
                Problem::Model,
                Problem::Host("localhost".to_owned()),
                Problem::StartupDelay("soon".to_owned()),
                Problem::ApiKey,
                Problem::FaultStatus(200),
                Problem::Profile("abacus".to_owned()),
                Problem::Limits(LimitsError::Zero("max-num-seqs")),
            ]
        );
        assert_eq!(error.to_string().lines().count(), 7);
    }

    #[test]
    fn keys_are_not_shown() {
        let settings = settings(&["--model", "m", "--api-key", "hush"]).unwrap();
        assert_eq!(settings.api_keys, ["hush"]);
        assert!(!format!("{settings:?}").contains("hush"));
    }
}
