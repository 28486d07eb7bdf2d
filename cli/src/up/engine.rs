//! From a pool's spec to the settings of its simulated engine: the command line that the operator would write, parsed.

use std::time::Duration;

use clap::Parser as _;
use penstock_core::ids::BackendId;
use penstock_crds::backend::{Engine, Pool};

/// Lets clap read the engine's flags outside a command line.
#[derive(clap::Parser)]
#[command(
    no_binary_name = true,
    disable_help_flag = true,
    disable_version_flag = true
)]
struct CommandLine {
    #[command(flatten)]
    args: penstock_engine::Args,
}

/// Settings, or what is wrong with the pool's `args`.
pub(super) fn settings(
    id: &BackendId,
    pool: &Pool,
    drain: Duration,
) -> anyhow::Result<penstock_engine::Settings> {
    let mut words = vec![
        format!("--model={}", pool.model),
        format!("--served-model-name={}", id.name),
        format!("--shutdown-timeout={}", drain.as_secs()),
    ];
    if pool.engine == Engine::Simulated {
        words.extend(pool.args.iter().cloned());
    }
    Ok(CommandLine::try_parse_from(words)?.args.settings()?)
}
