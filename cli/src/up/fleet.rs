//! (IO) The fleet: all pools' engines, and what the gateway and the scaler are told about them. One task owns it all;
//! everything that happens reaches it as an event.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use penstock_core::endpoints::{Endpoint, Endpoints, ServicePort};
use penstock_core::ids::{BackendId, Id};
use penstock_core::names;
use penstock_crds::backend::{Engine, Pool as PoolSpec, Scaling};
use penstock_crds::tls::{SourceKind, ValueRef};
use penstock_gateway::source::{Credential, Credentials, Publisher};
use penstock_scaler::world::{Gateway, Pod, Target, World};
use penstock_shell::clock;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::autoscaler;
use super::engine;
use super::folder::{Folder, ServiceAddress};
use super::narrator::say;
use super::replica::{self, ReplicaName};

/// Drain of a pool that names none, as in a cluster.
const DEFAULT_DRAIN: Duration = Duration::from_mins(10);
/// Events in the queue at most; senders wait.
const MAX_EVENTS: usize = 256;
/// Replicas of one pool at most: each is an engine in this process.
const MAX_REPLICAS: u32 = 64;

/// Something that happened.
pub(super) enum Event {
    /// A replica answers its health check.
    Ready(ReplicaName),
    /// The autoscaler decided.
    Scale {
        /// Which pool.
        pool: BackendId,
        /// To how many.
        replicas: u32,
        /// For people.
        why: String,
    },
}

/// Channels to the gateway and the scaler.
pub(super) struct Fleet {
    gateway: Publisher,
    world: watch::Sender<Arc<World>>,
    services: BTreeMap<ServicePort, Vec<Endpoint>>,
    gateway_admin: SocketAddr,
    gateway_namespace: String,
    pools: BTreeMap<BackendId, Pool>,
    engines: JoinSet<(ReplicaName, Result<(), penstock_engine::Error>)>,
    autoscalers: JoinSet<()>,
}

struct Pool {
    spec: PoolSpec,
    engine: penstock_engine::Settings,
    desired: u32,
    started: u32,
    replicas: Vec<Replica>,
    autoscaler: CancellationToken,
}

struct Replica {
    name: ReplicaName,
    address: SocketAddr,
    ready: bool,
    terminating: bool,
    created_ms: u64,
    created: Instant,
    stop: CancellationToken,
}

impl Fleet {
    /// An empty fleet that tells `gateway`.
    pub(super) fn new(
        gateway: Publisher,
        services: &[ServiceAddress],
        gateway_admin: SocketAddr,
    ) -> Self {
        let mut fixed: BTreeMap<ServicePort, Vec<Endpoint>> = BTreeMap::new();
        for ServiceAddress { service, address } in services {
            fixed.entry(service.clone()).or_default().push(Endpoint {
                address: *address,
                ready: true,
                zone: None,
                revision: None,
            });
        }
        Self {
            gateway,
            world: watch::Sender::new(Arc::default()),
            services: fixed,
            gateway_admin,
            gateway_namespace: String::new(),
            pools: BTreeMap::new(),
            engines: JoinSet::new(),
            autoscalers: JoinSet::new(),
        }
    }

    /// What the scaler listens to.
    pub(super) fn world(&self) -> watch::Receiver<Arc<World>> {
        self.world.subscribe()
    }

    /// Runs until `stop`, then drains all engines.
    pub(super) async fn run(
        mut self,
        mut loaded: watch::Receiver<Arc<Folder>>,
        scaling: Option<autoscaler::Settings>,
        greeting: impl AsyncFnOnce(),
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let (events, mut inbox) = mpsc::channel(MAX_EVENTS);
        let mut greeting = Some(greeting);
        let first = loaded.borrow_and_update().clone();
        self.apply(&first, scaling.as_ref(), &events).await?;
        loop {
            if greeting.is_some() && self.pools.values().all(Pool::is_up) {
                let greet = greeting.take();
                replica::until_ok(self.gateway_admin, "/readyz").await;
                if let Some(greet) = greet {
                    greet().await;
                }
            }
            tokio::select! {
                Ok(()) = loaded.changed() => {
                    let folder = loaded.borrow_and_update().clone();
                    self.apply(&folder, scaling.as_ref(), &events).await?;
                }
                Some(event) = inbox.recv() => self.handle(event, &events).await?,
                Some(ended) = self.engines.join_next() => {
                    let (name, result) = ended.context("an engine's task")?;
                    self.forget(&name, result);
                    self.fill_all(&events).await?;
                }
                () = stop.cancelled() => break,
            }
            self.publish();
        }
        self.drain().await
    }

    async fn apply(
        &mut self,
        folder: &Folder,
        scaling: Option<&autoscaler::Settings>,
        events: &mpsc::Sender<Event>,
    ) -> anyhow::Result<()> {
        let wanted: BTreeMap<&BackendId, &PoolSpec> = folder
            .manifests
            .objects
            .backends
            .iter()
            .filter(|(id, _)| folder.config.backends.contains_key(*id))
            .filter_map(|(id, backend)| Some((id, backend.spec.pool.as_ref()?)))
            .collect();
        let gone: Vec<BackendId> = self
            .pools
            .keys()
            .filter(|id| !wanted.contains_key(id))
            .cloned()
            .collect();
        for id in gone {
            self.scale(&id, 0, "no longer used");
            if let Some(pool) = self.pools.get_mut(&id) {
                pool.autoscaler.cancel();
            }
        }
        for (id, spec) in wanted {
            match self.pools.get_mut(id) {
                Some(pool) if pool.spec == *spec => {}
                Some(_) => {
                    say(&format!("pool {id}: changed; its engines start anew"));
                    self.scale(id, 0, "changed");
                    self.start_pool(id, spec, scaling, events);
                }
                None => self.start_pool(id, spec, scaling, events),
            }
        }
        self.gateway_namespace
            .clone_from(&folder.config.gateway.namespace);
        self.gateway
            .credentials
            .send_replace(Arc::new(credentials(folder)));
        self.gateway
            .config
            .send_replace(Some(Arc::clone(&folder.config)));
        self.fill_all(events).await?;
        self.publish();
        Ok(())
    }

    fn start_pool(
        &mut self,
        id: &BackendId,
        spec: &PoolSpec,
        scaling: Option<&autoscaler::Settings>,
        events: &mpsc::Sender<Event>,
    ) {
        let engine = match engine::settings(id, spec, drain(spec)) {
            Ok(engine) => engine,
            Err(err) => return say(&format!("pool {id}: not started: spec.pool.args: {err}")),
        };
        if spec.engine == Engine::Vllm {
            say(&format!(
                "pool {id}: a simulated engine stands in for vLLM, without spec.pool.args"
            ));
        }
        let min = spec
            .scaling
            .as_ref()
            .map_or(spec.replicas.unwrap_or(1), |scaling| scaling.min_replicas);
        let desired = u32::try_from(min).unwrap_or(0).min(MAX_REPLICAS);
        let old = self.pools.remove(id);
        let (started, replicas) = old.map_or((0, Vec::new()), |old| {
            old.autoscaler.cancel();
            (old.started, old.replicas)
        });
        let autoscaler = CancellationToken::new();
        if let (Some(settings), Some(scaling)) = (scaling, &spec.scaling) {
            let scaled = autoscaler::Scaled::new(id, scaling);
            let run = autoscaler::run(
                *settings,
                scaled,
                self.world.subscribe(),
                events.clone(),
                autoscaler.clone(),
            );
            self.autoscalers.spawn(run);
        }
        let pool = Pool {
            spec: spec.clone(),
            engine,
            desired,
            started,
            replicas,
            autoscaler,
        };
        self.pools.insert(id.clone(), pool);
    }

    async fn handle(&mut self, event: Event, events: &mpsc::Sender<Event>) -> anyhow::Result<()> {
        match event {
            Event::Ready(name) => {
                for (id, pool) in &mut self.pools {
                    if let Some(replica) = pool
                        .replicas
                        .iter_mut()
                        .find(|replica| replica.name == name)
                    {
                        replica.ready = true;
                        let seconds = replica.created.elapsed().as_secs_f64();
                        say(&format!(
                            "pool {id}: {name} is ready on {} after {seconds:.1} s",
                            replica.address
                        ));
                    }
                }
            }
            Event::Scale {
                pool,
                replicas,
                why,
            } => {
                self.scale(&pool, replicas, &why);
                self.fill_all(events).await?;
            }
        }
        Ok(())
    }

    /// Sets the wanted number; surplus replicas start to drain: those that are not ready first, then the youngest.
    fn scale(&mut self, id: &BackendId, replicas: u32, why: &str) {
        let Some(pool) = self.pools.get_mut(id) else {
            return;
        };
        let replicas = replicas.min(MAX_REPLICAS);
        if pool.desired != replicas {
            say(&format!(
                "pool {id}: {} → {replicas} replicas: {why}",
                pool.desired
            ));
        }
        pool.desired = replicas;
        let drain = drain(&pool.spec);
        let mut staying: Vec<&mut Replica> = pool
            .replicas
            .iter_mut()
            .filter(|replica| !replica.terminating)
            .collect();
        staying.sort_by_key(|replica| (!replica.ready, replica.created));
        let keep = usize::try_from(replicas).unwrap_or(usize::MAX);
        for replica in staying.into_iter().skip(keep) {
            replica.terminating = true;
            say(&format!(
                "pool {id}: {} stops; its streams may take {} s",
                replica.name,
                drain.as_secs()
            ));
            // Like a pod: out of the endpoints first, then the signal; both reach the gateway in this process at once.
            replica.stop.cancel();
        }
    }

    async fn fill_all(&mut self, events: &mpsc::Sender<Event>) -> anyhow::Result<()> {
        for (id, pool) in &mut self.pools {
            let mut living = pool
                .replicas
                .iter()
                .filter(|replica| !replica.terminating)
                .count();
            while living < usize::try_from(pool.desired).unwrap_or(usize::MAX) {
                living += 1;
                let listener = TcpListener::bind("127.0.0.1:0")
                    .await
                    .context("a port for an engine")?;
                let address = listener.local_addr()?;
                pool.started += 1;
                let name = format!("{}-{}", id.name, pool.started);
                say(&format!(
                    "pool {id}: {name} starts ({living} of {})",
                    pool.desired
                ));
                let replica = Replica::new(name.clone(), address);
                let engine =
                    penstock_engine::run(pool.engine.clone(), listener, replica.stop.clone());
                self.engines.spawn(replica::run(
                    name,
                    address,
                    engine,
                    events.clone(),
                    replica.stop.clone(),
                ));
                pool.replicas.push(replica);
            }
        }
        Ok(())
    }

    fn forget(&mut self, name: &str, result: Result<(), penstock_engine::Error>) {
        for (id, pool) in &mut self.pools {
            let before = pool.replicas.len();
            pool.replicas.retain(|replica| replica.name != name);
            if pool.replicas.len() < before {
                match &result {
                    Ok(()) => say(&format!("pool {id}: {name} has stopped")),
                    Err(err) => say(&format!("pool {id}: {name} failed: {err}")),
                }
            }
        }
        self.pools
            .retain(|_, pool| pool.desired > 0 || !pool.replicas.is_empty());
    }

    fn publish(&self) {
        let mut endpoints = Endpoints {
            services: self.services.clone(),
        };
        let mut world = World {
            synced: true,
            ..World::default()
        };
        world.gateways.push(Gateway {
            namespace: self.gateway_namespace.clone(),
            id: self.gateway_admin.to_string(),
            admin: self.gateway_admin,
        });
        for (id, pool) in &self.pools {
            let service = Id::new(&id.namespace, names::pool_object(&id.name));
            let port = ServicePort {
                service,
                port: names::ENGINE_PORT,
            };
            let mut list: Vec<Endpoint> = pool.replicas.iter().map(Replica::endpoint).collect();
            list.sort_by_key(|endpoint| endpoint.address);
            endpoints.services.insert(port, list);
            world.pods.extend(
                pool.replicas
                    .iter()
                    .map(|replica| Arc::new(replica.pod(id))),
            );
            if let Some(scaling) = &pool.spec.scaling {
                world
                    .targets
                    .insert(autoscaler::scaled_object(id), pool.target(id, scaling));
            }
        }
        self.gateway
            .endpoints
            .send_if_modified(|old| replace(old, endpoints));
        self.world.send_replace(Arc::new(world));
    }

    async fn drain(mut self) -> anyhow::Result<()> {
        self.autoscalers.shutdown().await;
        let ids: Vec<BackendId> = self.pools.keys().cloned().collect();
        for id in ids {
            self.scale(&id, 0, "stopping");
        }
        self.publish();
        while let Some(ended) = self.engines.join_next().await {
            let (name, result) = ended.context("an engine's task")?;
            self.forget(&name, result);
        }
        Ok(())
    }
}

fn replace(old: &mut Arc<Endpoints>, new: Endpoints) -> bool {
    let changed = **old != new;
    if changed {
        *old = Arc::new(new);
    }
    changed
}

impl Pool {
    fn is_up(&self) -> bool {
        self.desired == 0 || self.replicas.iter().any(|replica| replica.ready)
    }

    fn target(&self, id: &BackendId, scaling: &Scaling) -> Target {
        let count = self
            .replicas
            .iter()
            .filter(|replica| !replica.terminating)
            .count();
        Target {
            scale_target: format!("Deployment/{}", names::pool_object(&id.name)),
            min: u32::try_from(scaling.min_replicas).unwrap_or(1),
            max: u32::try_from(scaling.max_replicas)
                .unwrap_or(1)
                .min(MAX_REPLICAS),
            spec_replicas: Some(self.desired),
            status_replicas: u32::try_from(count).ok(),
            ..Target::default()
        }
    }
}

impl Replica {
    #[expect(clippy::disallowed_methods, reason = "(IO) file")]
    fn new(name: ReplicaName, address: SocketAddr) -> Self {
        Self {
            name,
            address,
            ready: false,
            terminating: false,
            created_ms: clock::unix_ms(),
            created: Instant::now(),
            stop: CancellationToken::new(),
        }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.address,
            ready: self.ready && !self.terminating,
            zone: None,
            revision: None,
        }
    }

    fn pod(&self, id: &BackendId) -> Pod {
        Pod {
            namespace: id.namespace.clone(),
            name: self.name.clone(),
            labels: BTreeMap::from([(names::BACKEND_LABEL.to_owned(), id.name.clone())]),
            ip: Some(self.address.ip()),
            metrics: Some(self.address),
            ready: self.ready,
            terminating: self.terminating,
            created_ms: self.created_ms,
        }
    }
}

fn drain(spec: &PoolSpec) -> Duration {
    spec.drain
        .as_ref()
        .and_then(|text| text.parse().ok())
        .unwrap_or(DEFAULT_DRAIN)
}

/// Secrets and ConfigMaps of the gateway's namespace. A value that is not text can be nothing that a gateway uses, and
/// is left out.
fn credentials(folder: &Folder) -> Credentials {
    let namespace = &folder.config.gateway.namespace;
    let manifests = &folder.manifests;
    let secrets = manifests.secrets.iter();
    let secrets = secrets.map(|(id, keys)| (SourceKind::Secret, id, keys));
    let config_maps = manifests.config_maps.iter();
    let config_maps = config_maps.map(|(id, keys)| (SourceKind::ConfigMap, id, keys));
    let own = secrets
        .chain(config_maps)
        .filter(|(_, id, _)| id.namespace == *namespace);
    let values = own.flat_map(|(kind, id, keys)| {
        keys.iter().filter_map(move |(key, value)| {
            let name = &id.name;
            let value = String::from_utf8(value.clone()).ok()?;
            Some((ValueRef { kind, name, key }.id(), Credential::new(value)))
        })
    });
    Credentials {
        values: values.collect(),
    }
}
