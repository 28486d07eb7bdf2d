//! (IO) Runs the scaler: sources feed one task that holds the fleet; it decides once a second, and at once when demand
//! begins; gRPC and admin read its newest decisions.

use std::sync::Arc;
use std::time::Duration;

use penstock_shell::admin::{self as shell_admin, Readiness};
use penstock_shell::clock;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::admin;
use crate::args::Settings;
use crate::collect::http::{self, HttpClient};
use crate::collect::{self, Event};
use crate::decide::Decision;
use crate::fleet::{Ask, Fleet, Registered, Saved, Scrape, TargetKey};
use crate::metrics::{Metrics, hold_text};
use crate::proto::external_scaler_server::ExternalScalerServer;
use crate::service::{Asked, Board, Service};
use crate::world::World;

/// How often decisions are made.
const TICK: Duration = Duration::from_secs(1);
/// Streams per target: two by each of two KEDA operators, while one takes over from the other.
const STREAMS_PER_TARGET: usize = 4;
/// Largest request: metadata at its limits.
const MAX_REQUEST_BYTES: usize = 512 * 1024;
/// Dead KEDA connections are found within this.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Calls are answered from memory; one that is not has hit a defect.
const CALL_DEADLINE: Duration = Duration::from_secs(2);
/// How long a peer's state may take to read, and how large it may be: 1000 targets of some 16 KiB.
const PEER_DEADLINE: Duration = Duration::from_secs(3);
const MAX_STATE_BYTES: usize = 32 * 1024 * 1024;
/// Peers that are tried.
const MAX_PEERS: usize = 8;

/// Why the scaler stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The gRPC server failed.
    #[error("serve gRPC")]
    Grpc(#[source] tonic::transport::Error),
    /// The admin server failed.
    #[error("serve the admin port")]
    Admin(#[source] std::io::Error),
    /// The HTTP client for Prometheus could not be made.
    #[error("ask Prometheus")]
    Prometheus(#[source] collect::prometheus::QueryError),
    /// A task ended by a defect.
    #[error("a task of the scaler ended")]
    Task(#[source] tokio::task::JoinError),
}

/// Runs until `shutdown`. `world` may start empty; the process is ready once it says `synced`. Not cancel safe: cancel
/// `shutdown` instead, which lets streams end with OK.
#[expect(
    clippy::too_many_lines,
    reason = "parts are made and joined, one after another"
)]
pub async fn run(
    settings: Settings,
    world: watch::Receiver<Arc<World>>,
    grpc: TcpListener,
    admin: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let readiness = Readiness::default();
    let client = http::client();
    let (board_sender, board) = watch::channel(Arc::new(Board::new()));
    let (event_sender, events) = mpsc::channel(collect::QUEUE);
    let (asked_sender, asked) = mpsc::channel(collect::QUEUE);
    let (save_sender, saves) = mpsc::channel(MAX_PEERS);
    let (scrape_sender, scrapes) = watch::channel(Arc::default());
    let (ask_sender, asks) = watch::channel(Arc::default());
    // Everything ends when one thing fails.
    let stop = shutdown.child_token();

    let service = Service {
        board: board.clone(),
        world: world.clone(),
        asked: asked_sender,
        allowed_prometheus: settings.allowed_prometheus.clone(),
        max_targets: settings.limits.targets,
        streams: Arc::new(Semaphore::new(
            settings.limits.targets.saturating_mul(STREAMS_PER_TARGET),
        )),
        metrics: metrics.clone(),
        shutdown: stop.clone(),
    };
    let router = shell_admin::router(readiness.clone(), Arc::new(registry))
        .merge(admin::router(board, save_sender));
    let mut brain = Brain {
        fleet: Fleet::new(settings.limits),
        clock: Clock::start(),
        world: world.clone(),
        readiness,
        board: board_sender,
        scrapes: scrape_sender,
        asks: ask_sender,
        metrics: metrics.clone(),
    };
    if let Some(peers) = &settings.peers {
        let saved = copy_from_peers(&client, peers).await;
        brain.restore(saved, &settings.allowed_prometheus);
    }

    let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
    tasks.spawn(serve_grpc(
        service,
        grpc,
        settings.limits.targets,
        stop.clone(),
    ));
    let admin_stop = stop.clone();
    tasks.spawn(async move {
        shell_admin::serve(admin, router, admin_stop)
            .await
            .map_err(Error::Admin)
    });
    let pods = collect::pods::scrape(
        client.clone(),
        scrapes,
        settings.max_concurrent_scrapes,
        event_sender.clone(),
        metrics.clone(),
        stop.clone(),
    );
    tasks.spawn(finished(pods));
    let gateways = collect::gateways::follow(
        client,
        world,
        settings.max_gateways,
        event_sender.clone(),
        metrics.clone(),
        stop.clone(),
    );
    tasks.spawn(finished(gateways));
    let prometheus = collect::prometheus::ask(asks, event_sender, metrics, stop.clone());
    tasks.spawn(async move { prometheus.await.map_err(Error::Prometheus) });
    tasks.spawn(finished(brain.run(events, asked, saves, stop.clone())));

    let mut outcome = Ok(());
    while let Some(ended) = tasks.join_next().await {
        // The first task that ends takes the others along; only its error is told.
        stop.cancel();
        outcome = outcome.and(ended.map_err(Error::Task).and_then(|result| result));
    }
    outcome
}

async fn finished(task: impl Future<Output = ()>) -> Result<(), Error> {
    task.await;
    Ok(())
}

async fn serve_grpc(
    service: Service,
    listener: TcpListener,
    max_targets: usize,
    stop: CancellationToken,
) -> Result<(), Error> {
    let streams = u32::try_from(max_targets.saturating_mul(STREAMS_PER_TARGET)).unwrap_or(u32::MAX);
    let server = ExternalScalerServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES);
    Server::builder()
        .timeout(CALL_DEADLINE)
        .max_concurrent_streams(streams.max(64))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .add_service(server)
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stop.cancelled_owned(),
        )
        .await
        .map_err(Error::Grpc)
}

/// Unix ms that never go back: the wall clock at the start, and what a monotonic one adds.
struct Clock {
    start: Instant,
    start_ms: u64,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "(IO) file")]
    fn start() -> Self {
        Self {
            start: Instant::now(),
            start_ms: clock::unix_ms(),
        }
    }

    fn now_ms(&self) -> u64 {
        self.start_ms
            .saturating_add(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// The task that holds the fleet.
struct Brain {
    fleet: Fleet,
    clock: Clock,
    world: watch::Receiver<Arc<World>>,
    readiness: Readiness,
    board: watch::Sender<Arc<Board>>,
    scrapes: watch::Sender<Arc<Vec<Scrape>>>,
    asks: watch::Sender<Arc<Vec<Ask>>>,
    metrics: Metrics,
}

impl Brain {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut asked: mpsc::Receiver<Asked>,
        mut saves: mpsc::Receiver<admin::SaveRequest>,
        stop: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut world_open = true;
        self.take_world();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = tick.tick() => self.decide(),
                changed = self.world.changed(), if world_open => match changed {
                    Ok(()) => self.take_world(),
                    // Whoever fed it is gone: the last picture stays.
                    Err(_) => world_open = false,
                },
                Some(event) = events.recv() => self.take(event),
                Some(asked) = asked.recv() => self.register(asked),
                // A peer that gave up does not matter.
                Some(save) = saves.recv() => { let _gone = save.send(self.fleet.save()); }
            }
        }
        self.readiness.set(false);
    }

    fn restore(&mut self, saved: Vec<Saved>, allowed_prometheus: &[String]) {
        let taken = self
            .fleet
            .restore(saved, allowed_prometheus, self.clock.now_ms());
        tracing::info!(targets = taken, "state copied from another replica");
    }

    fn take_world(&mut self) {
        let world = Arc::clone(&self.world.borrow_and_update());
        self.readiness.set(world.synced);
        self.fleet.set_world(world);
        self.publish_work();
    }

    fn take(&mut self, event: Event) {
        let now_ms = self.clock.now_ms();
        match event {
            Event::Sample { scrape, sample } => self.fleet.on_sample(&scrape, now_ms, &sample),
            Event::Load { gateway, report } => {
                if self.fleet.on_load(&gateway, now_ms, &report) {
                    self.decide();
                }
            }
            Event::Answers { key, answers } => self.fleet.on_answers(&key, now_ms, answers),
        }
    }

    fn register(&mut self, asked: Asked) {
        match self
            .fleet
            .register(&asked.key, asked.spec, self.clock.now_ms())
        {
            Registered::New => {
                tracing::info!(scaled_object = %asked.key.object, "target is watched");
                self.decide();
            }
            Registered::Known => {}
            Registered::Full => {
                tracing::warn!(scaled_object = %asked.key.object, "too many targets: this one is not watched (--max-targets)");
            }
        }
    }

    fn decide(&mut self) {
        let decisions = self.fleet.tick(self.clock.now_ms());
        let before = Arc::clone(&self.board.borrow());
        for (key, decision) in &decisions {
            let Some(decision) = decision else {
                continue;
            };
            let last = before.get(key).and_then(Option::as_ref);
            let changed = last.is_none_or(|last| differs(last, decision));
            self.metrics.decided(key, decision, changed);
            if changed {
                log(key, last, decision);
            }
        }
        for key in before.keys().filter(|key| !decisions.contains_key(*key)) {
            // Another trigger of the same ScaledObject writes the same series.
            if !decisions.keys().any(|other| other.object == key.object) {
                self.metrics.forget(key);
            }
        }
        for (key, shares) in self.fleet.drifts(self.clock.now_ms()) {
            if self.metrics.uncounted(&key, shares) {
                tracing::warn!(
                    scaled_object = %key.object,
                    uncounted.input = shares[0],
                    uncounted.output = shares[1],
                    "engines took other tokens than gateways put on accounts: somebody asks them without a gateway, or \
                     sums of usage are wrong"
                );
            }
        }
        self.metrics.set_targets(decisions.len());
        self.board.send_replace(Arc::new(decisions));
        self.publish_work();
    }

    /// Tells the sources what to collect, where that has changed.
    fn publish_work(&self) {
        replace(&self.scrapes, self.fleet.scrapes().cloned().collect());
        replace(&self.asks, self.fleet.asks());
    }
}

fn replace<T: PartialEq>(sender: &watch::Sender<Arc<Vec<T>>>, new: Vec<T>) {
    sender.send_if_modified(|old| {
        let changed = **old != new;
        if changed {
            *old = Arc::new(new);
        }
        changed
    });
}

fn differs(a: &Decision, b: &Decision) -> bool {
    (a.replicas, a.active, a.reasons.hold) != (b.replicas, b.active, b.reasons.hold)
}

/// The answer to "why 7?", once per change.
fn log(key: &TargetKey, last: Option<&Decision>, decision: &Decision) {
    let reasons = &decision.reasons;
    tracing::info!(
        scaled_object = %key.object,
        replicas = decision.replicas,
        replicas.before = last.map(|last| last.replicas),
        metric.value = decision.value,
        active = decision.active,
        bound = reasons.binding.as_str(),
        hold = hold_text(reasons.hold),
        bound.kv_cache = reasons.kv_cache,
        bound.ttft = reasons.ttft,
        bound.memory = reasons.memory,
        ttft.attainment = reasons.attainment,
        pods.ready = reasons.inputs.ready,
        pods.loading = reasons.inputs.loading,
        pods.fresh = reasons.inputs.fresh,
        kv_use = reasons.inputs.kv_use,
        running = reasons.inputs.running,
        waiting = reasons.inputs.waiting,
        demand.requests_per_s = reasons.inputs.demand.requests,
        "decided",
    );
}

/// The state of the first peer that has any. Failing is harmless: the window fills in a minute.
async fn copy_from_peers(client: &HttpClient, peers: &str) -> Vec<Saved> {
    let addresses = match tokio::time::timeout(PEER_DEADLINE, tokio::net::lookup_host(peers)).await
    {
        Ok(Ok(addresses)) => addresses.take(MAX_PEERS).collect::<Vec<_>>(),
        _ => return Vec::new(),
    };
    for address in addresses {
        let page = http::page(
            client,
            &http::url(address, "/state"),
            MAX_STATE_BYTES,
            PEER_DEADLINE,
        )
        .await;
        match page.map(|page| serde_json::from_str::<Vec<Saved>>(&page)) {
            Ok(Ok(saved)) if !saved.is_empty() => return saved,
            Ok(Ok(_)) => {}
            Ok(Err(err)) => tracing::warn!(%address, %err, "a peer's state is in another form"),
            Err(err) => tracing::debug!(%address, %err, "peer not read"),
        }
    }
    Vec::new()
}

/// Kept apart from [`run`] so that the embedded form needs no cluster: watches the cluster and runs.
pub async fn run_in_cluster(
    settings: Settings,
    client: kube::Client,
    grpc: TcpListener,
    admin: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let (sender, world) = watch::channel(Arc::default());
    let stop = shutdown.child_token();
    let bounds = collect::kubernetes::Bounds {
        pods: settings.max_pods,
        objects: settings.limits.targets.saturating_mul(4),
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(collect::kubernetes::watch(
        client,
        sender,
        bounds,
        stop.clone(),
    ));
    let outcome = run(settings, world, grpc, admin, shutdown).await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    outcome
}
