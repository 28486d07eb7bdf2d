//! `penstock`: the one binary. Each subcommand is a library's `run`, or a tool for people.

mod admin;
mod check;
mod crds;
mod explain;
mod key;
mod load;
mod prices;
mod process;
mod table;
mod up;
mod usage;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mimalloc::MiMalloc;
use penstock_shell::telemetry::LogFormat;

/// What a burst of streams took goes back to the system soon after it, which glibc's allocator does not see to.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// LLM traffic on Kubernetes: operator, gateway and KEDA scaler; or all of it without a cluster, with `up`.
#[derive(Parser)]
#[command(name = "penstock", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log, in tracing's filter syntax. Default: info, and for up and tools warn.
    #[arg(long, global = true, env = "PENSTOCK_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// How log lines look. Default: json for the cluster's processes, text for up and tools.
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    log_format: Option<Format>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Json,
    Text,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything on this machine, without a cluster, from a folder of objects.
    Up(Box<up::Args>),
    /// Check a folder of objects and print what is wrong and how to mend it.
    Check(check::Args),
    /// Ask a running gateway where a request would go, and why, without sending it.
    Explain(explain::Args),
    /// Send requests at a rate or a ramp and measure what users would feel.
    Load(Box<load::Args>),
    /// Make, change and take back keys of a gateway's callers.
    Key(key::Args),
    /// Sum up what callers took: requests, tokens and money.
    Usage(usage::Args),
    /// List what models cost at providers, as the built-in catalogue says.
    Prices(prices::Args),
    /// Print or write the CustomResourceDefinitions.
    Crds(crds::Args),
    /// Run the operator (in a cluster, or with a kubeconfig).
    Operator(Box<penstock_operator::Args>),
    /// Run a gateway.
    Gateway(Box<penstock_gateway::Args>),
    /// Run KEDA's external scaler.
    Scaler(Box<penstock_scaler::args::Args>),
    /// Run a simulated engine: vLLM's API and metrics, no model.
    Engine(Box<penstock_engine::Args>),
}

impl Command {
    fn is_service(&self) -> bool {
        matches!(
            self,
            Self::Operator(_) | Self::Gateway(_) | Self::Scaler(_) | Self::Engine(_)
        )
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let service = cli.command.is_service();
    let format = match cli.log_format {
        Some(Format::Json) => LogFormat::Json,
        Some(Format::Text) => LogFormat::Text,
        None if service => LogFormat::Json,
        None => LogFormat::Text,
    };
    let filter = cli
        .log
        .unwrap_or_else(|| if service { "info" } else { "warn" }.to_owned());
    penstock_shell::telemetry::init(format, &filter);
    penstock_shell::tls::install();
    process::finish(dispatch(cli.command))
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check(args) => check::run(&args),
        Command::Crds(args) => crds::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Prices(args) => prices::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Explain(args) => process::run(|_stop| explain::run(args)),
        Command::Key(args) => process::run(|_stop| key::run(args)),
        Command::Load(args) => process::run(|stop| load::run(*args, stop)),
        Command::Usage(args) => process::run(|_stop| usage::run(args)),
        Command::Up(args) => process::run(|stop| up::run(*args, stop)),
        Command::Operator(args) => process::run(|stop| process::operator(*args, stop)),
        Command::Gateway(args) => process::run(|stop| process::gateway(*args, stop)),
        Command::Scaler(args) => process::run(|stop| process::scaler(*args, stop)),
        Command::Engine(args) => process::run(|stop| process::engine(*args, stop)),
    }
}
