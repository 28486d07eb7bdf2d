//! (IO) `penstock load`: an open-loop client. Requests leave when the schedule says so, whether or not earlier ones
//! were answered, and every latency counts from that moment: a slow server cannot slow the test down and hide it.

mod arrivals;
mod report;
mod request;

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use penstock_core::duration;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use arrivals::{Arrivals, Rate};
use report::Report;
use request::{Plan, SharedPrefixes, Target};

/// Requests at a rate or a ramp, with lengths of your choice; prints latencies, goodput and errors by kind.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to send requests: the base, without /v1.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Model name to ask for.
    #[arg(long)]
    model: String,
    /// Arrivals per second: a number, or FROM:TO to change evenly over the whole duration.
    #[arg(long, default_value = "1", value_parser = arrivals::parse_rate)]
    rate: Rate,
    /// How long requests are started, such as 30s or 5m.
    #[arg(long, default_value = "30s", value_parser = duration::parse)]
    duration: Duration,
    /// Time between arrivals: poisson (exponential, independent) or constant.
    #[arg(long, default_value = "poisson")]
    arrivals: Arrivals,
    /// Prompt length in tokens of about 4 bytes: a number, or FROM:TO to draw evenly.
    #[arg(long, default_value = "256", value_parser = request::parse_range)]
    prompt_tokens: (u32, u32),
    /// Answer length in tokens (max_tokens with ignore_eos): a number, or FROM:TO to draw evenly.
    #[arg(long, default_value = "64", value_parser = request::parse_range)]
    output_tokens: (u32, u32),
    /// Tokens at the beginning of each prompt that it shares with others.
    #[arg(long, default_value_t = 0)]
    shared_prefix_tokens: u32,
    /// How many different such beginnings there are, drawn evenly.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    shared_prefixes: u32,
    /// Requests in flight at most; an arrival above it is not sent and counts as the error `client_limit`.
    #[arg(long, default_value_t = 1024)]
    max_concurrency: usize,
    /// How long one request may take in all.
    #[arg(long, default_value = "10m", value_parser = duration::parse)]
    timeout: Duration,
    /// Target for the time to the first token.
    #[arg(long, default_value = "500ms", value_parser = duration::parse)]
    slo_ttft: Duration,
    /// Target for the mean time per output token after the first.
    #[arg(long, default_value = "50ms", value_parser = duration::parse)]
    slo_tpot: Duration,
    /// Time between progress lines; 0s for none.
    #[arg(long, default_value = "5s", value_parser = duration::parse)]
    progress: Duration,
    /// API key, sent as Authorization: Bearer.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Seed of arrivals, lengths and prompts: the same seed gives the same requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also write the summary as JSON to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

/// Runs the whole test, or until the token is cancelled; the summary covers what was sent until then.
pub(crate) async fn run(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    if args.max_concurrency == 0 {
        bail!("--max-concurrency must be at least 1");
    }
    let mut rng = StdRng::seed_from_u64(args.seed);
    let schedule = arrivals::schedule(args.rate, args.arrivals, args.duration, &mut rng)?;
    let target = Arc::new(Target::new(
        &args.url,
        args.model.clone(),
        args.api_key.clone(),
    )?);
    let plans: Vec<Plan> = schedule
        .into_iter()
        .map(|at| {
            Plan::draw(
                at,
                args.prompt_tokens,
                args.output_tokens,
                SharedPrefixes {
                    tokens: args.shared_prefix_tokens,
                    count: args.shared_prefixes,
                },
                &mut rng,
            )
        })
        .collect();
    let client = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(args.max_concurrency)
        .pool_timer(TokioTimer::new())
        .build(request::connector());

    let report = send_all(&args, plans, target, client, stop).await?;
    let summary = report.summary(args.slo_ttft, args.slo_tpot);
    if let Some(path) = &args.json {
        let text = serde_json::to_vec_pretty(&summary).context("write the summary as JSON")?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    let mut out = std::io::stdout().lock();
    write!(out, "{}", summary.table(args.slo_ttft, args.slo_tpot))?;
    writeln!(out, "{}", summary.last_line())?;
    if summary.nothing_worked() {
        bail!(
            "no request to {} was answered: see the errors above",
            args.url
        );
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
async fn send_all(
    args: &Args,
    plans: Vec<Plan>,
    target: Arc<Target>,
    client: request::HttpClient,
    stop: CancellationToken,
) -> anyhow::Result<Report> {
    let start = Instant::now();
    let mut report = Report::default();
    let mut running = JoinSet::new();
    let mut progress = Progress {
        every: args.progress,
        next: args.progress,
    };
    let mut plans = plans.into_iter().peekable();
    while plans.peek().is_some() || !running.is_empty() {
        let next_at = plans.peek().map(|plan| start + plan.at);
        let next_line = (!args.progress.is_zero()).then(|| start + progress.next);
        tokio::select! {
            () = sleep_until(next_at) => {
                let Some(plan) = plans.next() else { continue };
                report.sent += 1;
                if running.len() >= args.max_concurrency {
                    report.fail("client_limit".into());
                    continue;
                }
                let (client, target, timeout) = (client.clone(), Arc::clone(&target), args.timeout);
                let due = start + plan.at;
                running.spawn(async move { request::send(&client, &target, &plan, due, timeout).await });
            }
            Some(outcome) = running.join_next() => report.add(outcome.context("a request's task")?),
            () = sleep_until(next_line) => progress.print(&mut report, start.elapsed(), running.len())?,
            () = stop.cancelled() => {
                running.shutdown().await;
                break;
            }
        }
    }
    report.elapsed = start.elapsed();
    Ok(report)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Progress {
    every: Duration,
    next: Duration,
}

impl Progress {
    fn print(
        &mut self,
        report: &mut Report,
        elapsed: Duration,
        in_flight: usize,
    ) -> std::io::Result<()> {
        self.next += self.every;
        let line = report.progress_line(elapsed, in_flight);
        writeln!(std::io::stdout().lock(), "{line}")
    }
}
