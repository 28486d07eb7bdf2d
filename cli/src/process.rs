//! (IO) From a subcommand to a running process: runtime, signals, listeners, exit code.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use penstock_scaler::collect::kubernetes::{self, Bounds};
use penstock_shell::{listen, shutdown};
use tokio_util::sync::CancellationToken;

/// Runs `body` on a multi-threaded runtime until it ends. SIGTERM and SIGINT cancel its token; a second one ends the
/// process without waiting for it.
pub(crate) fn run<F, Fut>(body: F) -> anyhow::Result<ExitCode>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let stop = CancellationToken::new();
    let ended = runtime.block_on(async {
        tokio::select! {
            result = body(stop.clone()) => Ok(result.map(|()| ExitCode::SUCCESS)),
            code = shutdown::on_signals(stop.clone()) => Err(ExitCode::from(code)),
        }
    });
    ended.unwrap_or_else(|killed| {
        // A blocking call that is under way would hold up the end.
        runtime.shutdown_background();
        Ok(killed)
    })
}

/// Prints an error with its causes, one line, and turns the result into an exit code.
pub(crate) fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(err) => {
            // Nothing is left to do about a standard error that cannot be written to.
            let _ = writeln!(std::io::stderr().lock(), "penstock: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// `penstock engine`.
pub(crate) async fn engine(
    args: penstock_engine::Args,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let listener = listen::bind(settings.listen, "--host and --port")?;
    Ok(penstock_engine::run(settings, listener, stop).await?)
}

/// `penstock operator`.
pub(crate) async fn operator(
    args: penstock_operator::Args,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let admin = listen::bind(settings.admin_listen, "--admin-listen")?;
    let client = penstock_operator::connect().await?;
    Ok(penstock_operator::run(settings, client, admin, stop).await?)
}

/// `penstock gateway`: until the data plane has drained, the cluster is watched.
pub(crate) async fn gateway(
    args: penstock_gateway::Args,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let args = args.settings()?;
    let tls = args
        .tls_listen
        .map(|address| listen::bind(address, "--tls-listen"));
    let listeners = penstock_gateway::Listeners {
        http: listen::bind(args.listen, "--listen")?,
        https: tls.transpose()?,
        admin: listen::bind(args.admin_listen, "--admin-listen")?,
    };
    let client = penstock_operator::connect().await?;
    let (publisher, sources) = penstock_gateway::source::channel();
    let watching = CancellationToken::new();
    let watch =
        penstock_gateway::source::cluster::run(client, args.cluster, publisher, watching.clone());
    let serve = async {
        let result = penstock_gateway::run(args.settings, sources, listeners, stop).await;
        watching.cancel();
        result
    };
    let (result, ()) = tokio::join!(serve, watch);
    Ok(result?)
}

/// `penstock scaler`.
pub(crate) async fn scaler(
    args: penstock_scaler::args::Args,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (listen, admin_listen) = (args.listen, args.admin_listen);
    let settings = args.settings()?;
    let grpc = listen::bind(listen, "--listen")?;
    let admin = listen::bind(admin_listen, "--admin-listen")?;
    let client = penstock_operator::connect().await?;
    let (sender, world) = tokio::sync::watch::channel(Arc::default());
    let bounds = Bounds {
        pods: settings.max_pods,
        objects: settings.limits.targets,
    };
    let watch = kubernetes::watch(client, sender, bounds, stop.clone());
    let (result, ()) = tokio::join!(
        penstock_scaler::run(settings, world, grpc, admin, stop),
        watch
    );
    Ok(result?)
}
