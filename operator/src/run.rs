//! (IO) `run`: starts the watches, takes part in the election, serves the admin port, and has each namespace with news
//! reconciled, several at a time, each at most once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use penstock_core::ids::Id;
use penstock_shell::admin::{self, Readiness};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::{self, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::apply::Writer;
use crate::args::Settings;
use crate::events::Events;
use crate::lease::{self, Leadership};
use crate::metrics::{Metrics, ResultLabel};
use crate::queue::Outcome;
use crate::reconcile::{Context, Memory, reconcile};
use crate::watch;
use crate::world::{World, now};

/// Namespaces in work at once. A pass mostly waits for the API server; more would only queue there.
const MAX_IN_WORK: usize = 8;
/// How often a process that is not ready, or not the leader, looks whether it is now.
const LOOK: Duration = Duration::from_millis(100);
/// How long passes and the Lease's release may take at the end.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// Why the operator ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cluster is configured.
    #[error("find a cluster: set KUBECONFIG, or run inside one")]
    Configure(#[source] kube::config::InferConfigError),
    /// The client cannot be made.
    #[error("make a Kubernetes client")]
    Client(#[source] kube::Error),
    /// The admin port.
    #[error("serve the admin port")]
    Admin(#[source] std::io::Error),
}

/// A client for the cluster that KUBECONFIG names, or that this process runs in.
pub async fn connect() -> Result<Client, Error> {
    penstock_shell::tls::install();
    let config = kube::Config::infer().await.map_err(Error::Configure)?;
    Client::try_from(config).map_err(Error::Client)
}

/// Runs until `shutdown`. `admin` is a bound listener for `/healthz`, `/readyz` and `/metrics`.
pub async fn run(
    settings: Settings,
    client: Client,
    admin: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let readiness = Readiness::default();
    let router = admin::router(readiness.clone(), Arc::new(registry));

    let scaler_service = settings
        .plan
        .scaler_service()
        .map(|(namespace, name)| Id::new(namespace, name));
    let world = Arc::new(World::new(&settings.namespaces, scaler_service));
    let leadership = Leadership::default();
    let identity = settings.identity.clone().unwrap_or_else(|| {
        format!(
            "penstock-{}-{}",
            std::process::id(),
            penstock_shell::clock::unix_ms()
        )
    });
    let lease_namespace = settings
        .lease_namespace
        .clone()
        .unwrap_or_else(|| client.default_namespace().to_owned());

    let mut tasks = JoinSet::new();
    watch::start(&client, &world, &mut tasks, &shutdown);
    let woken = world.clone();
    tasks.spawn(lease::run(
        client.clone(),
        lease_namespace,
        identity.clone(),
        leadership.clone(),
        metrics.clone(),
        // A new leader looks at everything: it cannot know what the last one left undone.
        move || woken.wake_all(),
        shutdown.clone(),
    ));
    let context = Arc::new(Context {
        events: Events::new(client.clone(), &identity, metrics.clone()),
        writer: Writer {
            client,
            leadership: leadership.clone(),
            metrics: metrics.clone(),
            world: world.clone(),
        },
        settings: settings.plan,
    });
    tasks.spawn(work(
        context,
        world,
        leadership,
        metrics,
        readiness,
        shutdown.clone(),
    ));

    let served = admin::serve(admin, router, shutdown.clone())
        .await
        .map_err(Error::Admin);
    shutdown.cancel();
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_WITHIN, all).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    served
}

/// Reconciles what the queue names while this replica leads.
async fn work(
    context: Arc<Context>,
    world: Arc<World>,
    leadership: Leadership,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: CancellationToken,
) {
    while !world.is_complete() {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = shutdown.cancelled() => return,
        }
    }
    // A replica that does not lead is ready too: it takes over from where it stands.
    readiness.set(true);
    tracing::info!("every watch has its first listing");
    world.wake_all();

    let mut memories: BTreeMap<String, Memory> = BTreeMap::new();
    let mut passes: JoinSet<(Memory, Outcome)> = JoinSet::new();
    let mut in_work: HashMap<task::Id, String> = HashMap::new();
    while !shutdown.is_cancelled() {
        if leadership.may_write() {
            while passes.len() < MAX_IN_WORK {
                let Some(namespace) = world.queue().pop(now()) else {
                    break;
                };
                let memory = memories.remove(&namespace).unwrap_or_default();
                let pass = one(context.clone(), metrics.clone(), namespace.clone(), memory);
                in_work.insert(passes.spawn(pass).id(), namespace);
            }
        }
        let pause = pause(&world, &leadership, passes.len());
        tokio::select! {
            Some(ended) = passes.join_next_with_id() => {
                let (id, memory, outcome) = match ended {
                    Ok((id, (memory, outcome))) => (id, memory, outcome),
                    Err(err) => {
                        tracing::error!(error = %err, "a pass panicked");
                        (err.id(), Memory::default(), Outcome::Failed)
                    }
                };
                let namespace = in_work.remove(&id).unwrap_or_default();
                world.queue().finish(&namespace, outcome, now());
                if outcome != Outcome::Done(None) {
                    memories.insert(namespace, memory);
                }
            }
            () = world.bell.notified() => {}
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
    while passes.join_next().await.is_some() {}
}

async fn one(
    context: Arc<Context>,
    metrics: Metrics,
    namespace: String,
    mut memory: Memory,
) -> (Memory, Outcome) {
    let begun = now();
    let outcome = reconcile(&context, &namespace, &mut memory).await;
    metrics
        .reconcile_seconds
        .observe(begun.elapsed().as_secs_f64());
    let result = if outcome == Outcome::Failed {
        "failed"
    } else {
        "done"
    };
    metrics
        .reconciles
        .get_or_create(&ResultLabel { result })
        .inc();
    (memory, outcome)
}

/// How long nothing can happen unless the bell rings or a pass ends.
fn pause(world: &World, leadership: &Leadership, in_work: usize) -> Duration {
    let longest = Duration::from_mins(1);
    if in_work >= MAX_IN_WORK {
        return longest;
    }
    match world.queue().next_due() {
        None => longest,
        Some(_) if !leadership.may_write() => LOOK,
        Some(due) => due.saturating_duration_since(now()).min(longest),
    }
}
