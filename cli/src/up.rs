//! (IO) `penstock up`: gateway, scaler and simulated engines in one process, from a folder of objects.
//!
//! The same compile step, gateway and scaler as in a cluster. What a cluster would do is done by one task, the
//! [`fleet`]: it starts and stops engines, and tells the gateway and the scaler which there are. One loop per pool,
//! the [`autoscaler`], asks the scaler over gRPC as KEDA and the HPA do.

mod autoscaler;
mod engine;
mod fleet;
mod folder;
mod keyring;
mod narrator;
mod replica;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use penstock_core::config::{GatewayConfig, NameMatch};
use penstock_core::duration;
use penstock_gateway::UsageTarget;
use penstock_gateway::store::{Spec, Store, Target};
use penstock_shell::listen;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use fleet::Fleet;
use keyring::Keyring;
use narrator::say;

/// Below the current folder.
const USUAL_STORE: &str = ".penstock/store.redb";

/// Runs gateway, scaler and simulated engines from a folder of objects, until Ctrl-C.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of YAML files with LLMBackend, RoutingPolicy, SemanticCache and Secret objects. Changes are followed.
    #[arg(short = 'f', long = "file", value_name = "DIR")]
    folder: PathBuf,
    /// Address for requests.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Address for requests over TLS; used with --tls-dir.
    #[arg(long, default_value = "127.0.0.1:8443")]
    tls_listen: SocketAddr,
    /// Folder with `tls.crt` and `tls.key`, as a TLS Secret is mounted. May be repeated: the caller's server name
    /// chooses, and the first folder answers names that no certificate is for. Changes are followed.
    #[arg(long, value_name = "DIR")]
    tls_dir: Vec<PathBuf>,
    /// Address of the gateway's /metrics, /config and /load.
    #[arg(long, default_value = "127.0.0.1:9090")]
    admin_listen: SocketAddr,
    /// Region that the gateway is in, for the strategy Region.
    #[arg(long)]
    region: Option<String>,
    /// Address of the scaler's gRPC service.
    #[arg(long, default_value = "127.0.0.1:6000")]
    scaler_listen: SocketAddr,
    /// Address of the scaler's /metrics and /decisions.
    #[arg(long, default_value = "127.0.0.1:9091")]
    scaler_admin_listen: SocketAddr,
    /// Where a Service is that a `service` backend names: NAMESPACE/NAME:PORT=ADDRESS:PORT. May be repeated.
    #[arg(long = "service", value_name = "SERVICE=ADDRESS", value_parser = folder::parse_service)]
    services: Vec<folder::ServiceAddress>,
    /// Where background responses, batches and files are kept: file:PATH or redis://HOST:PORT. Default:
    /// file:.penstock/store.redb below the current folder; without it, where that cannot be used.
    #[arg(long, value_name = "STORE")]
    store: Option<Spec>,
    /// Where a line for each request goes that says who took what: file:PATH, s3://BUCKET[/PREFIX] or
    /// otlp+http://HOST:PORT.
    #[arg(long, value_name = "URL")]
    usage_export: Option<UsageTarget>,
    /// Keep each pool at its minimum, whatever the scaler says.
    #[arg(long)]
    no_scaling: bool,
    /// Time between two looks of the autoscaler at the metric (kube-controller-manager's
    /// --horizontal-pod-autoscaler-sync-period).
    #[arg(long, default_value = "15s", value_parser = duration::parse)]
    hpa_sync_period: Duration,
}

/// Runs until the token is cancelled, then drains.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(crate) async fn run(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let started = std::time::Instant::now();
    let mut keyring = Keyring::new();
    let folder = folder::load(&args.folder, &mut keyring)?;
    for problem in &folder.problems {
        say(&format!("problem: {problem}"));
    }
    let data = listen::bind(args.listen, "--listen")?;
    let tls = (!args.tls_dir.is_empty()).then(|| listen::bind(args.tls_listen, "--tls-listen"));
    let admin = listen::bind(args.admin_listen, "--admin-listen")?;
    let grpc = listen::bind(args.scaler_listen, "--scaler-listen")?;
    let scaler_admin = listen::bind(args.scaler_admin_listen, "--scaler-admin-listen")?;
    let (url, scaler) = (data.local_addr()?, grpc.local_addr()?);

    let (publisher, sources) = penstock_gateway::source::channel();
    let fleet = Fleet::new(publisher, &args.services, admin.local_addr()?);
    let world = fleet.world();
    // Data plane and scaler outlive the engines' drain: they stop when the fleet has ended.
    let planes = CancellationToken::new();
    let id = folder.config.gateway.clone();
    let gateway_settings = penstock_gateway::Settings {
        replica: url.to_string(),
        tls: penstock_gateway::TlsSettings {
            folders: args.tls_dir,
            client_ca: None,
        },
        store: store(args.store),
        usage_export: args.usage_export,
        place: penstock_gateway::Place {
            region: args.region.clone(),
            zone: None,
        },
        ..penstock_gateway::Settings::new(id)
    };
    let listeners = penstock_gateway::Listeners {
        http: data,
        https: tls.transpose()?,
        admin,
    };
    let gateway = penstock_gateway::run(gateway_settings, sources, listeners, planes.clone());
    let scaler_run = penstock_scaler::run(
        penstock_scaler::args::Settings::default(),
        world,
        grpc,
        scaler_admin,
        planes.clone(),
    );
    let (load, loaded) = watch::channel(Arc::new(folder));
    let scaling = (!args.no_scaling).then_some(autoscaler::Settings {
        scaler,
        sync_period: args.hpa_sync_period,
    });
    let model = first_model(&load.borrow().config);
    let key = load.borrow().first_key();
    let greeting = async || greet(url, &model, key.as_deref(), started.elapsed());
    let fleet_run = async {
        let result = fleet.run(loaded, scaling, greeting, stop.clone()).await;
        planes.cancel();
        result
    };
    let follow = folder::follow(args.folder.clone(), keyring, load, stop.clone());
    tokio::try_join!(
        async { gateway.await.context("gateway") },
        async { scaler_run.await.context("scaler") },
        async { fleet_run.await.context("engines") },
        async { follow.await.context("follow the folder") },
    )?;
    say("stopped");
    Ok(())
}

/// The store that was asked for, or the usual one if it can be used here.
fn store(asked: Option<Spec>) -> Option<Spec> {
    if asked.is_some() {
        return asked;
    }
    let usual = Spec::new(Target::File(PathBuf::from(USUAL_STORE)));
    // Closed again: the gateway opens it.
    match Store::open(&usual, "") {
        Ok(_) => Some(usual),
        Err(err) => {
            let err = anyhow::Error::from(err);
            say(&format!(
                "problem: background responses, batches and files are off: {err:#}"
            ));
            None
        }
    }
}

/// A model name that the first rule takes, for the example request.
fn first_model(config: &GatewayConfig) -> String {
    let exact = config
        .rules
        .iter()
        .flat_map(|rule| &rule.models)
        .find_map(|model| match model {
            NameMatch::Exact(name) => Some(name.clone()),
            NameMatch::Prefix(_) => None,
        });
    exact.unwrap_or_else(|| "any".to_owned())
}

fn greet(url: SocketAddr, model: &str, key: Option<&str>, took: Duration) {
    say("send a request from another terminal:");
    let body = serde_json::json!({
        "model": model, "stream": true, "max_tokens": 32, "messages": [{"role": "user", "content": "Hello"}],
    });
    let shown = key.map_or_else(String::new, |key| {
        format!(" -H 'authorization: Bearer {key}'")
    });
    say(&format!(
        "  curl -N http://{url}/v1/chat/completions{shown} -H 'content-type: application/json' -d '{body}'"
    ));
    let under_load = key.map_or_else(String::new, |key| format!(" --api-key {key}"));
    say(&format!(
        "or put it under load: penstock load --url http://{url} --model {model} --rate 1:10 --duration 2m{under_load}"
    ));
    say(&format!(
        "up: ready_s={:.1} url=http://{url}",
        took.as_secs_f64()
    ));
}
