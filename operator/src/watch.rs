//! (IO) The watches. Each follows one kind in one scope, keeps its index of the world up to date and wakes the
//! namespaces where something changed. An object that cannot be read is kept as such and stalls nothing. A watch that
//! breaks is begun anew; meanwhile its index stays as it was.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Service};
use k8s_openapi::api::discovery::v1::{EndpointConditions, EndpointSlice};
use kube::core::{DeserializeGuard, DynamicObject, NamespaceResourceScope, PartialObjectMeta};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use penstock_core::ids::Id;
use penstock_crds::compile::ServiceFacts;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::autoscaler::HpaFacts;
use crate::index::{Index, Scope};
use crate::live::{ChildKind, Live};
use crate::observed::Unreadable;
use crate::plan::{MANAGED_BY, MANAGED_BY_LABEL};
use crate::pod::PodFacts;
use crate::values::ValueCache;
use crate::world::{Readable, World, lock, put_own};

/// First pause after a broken watch.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause: when the API server is back, watches are back this much later.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How often it is looked whether KEDA has been installed.
const KEDA_PROBE: Duration = Duration::from_secs(5);
/// Objects in one answer to a list.
const PAGE: u32 = 500;

/// Starts every watch.
pub(crate) fn start(
    client: &Client,
    world: &Arc<World>,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) {
    let mut spawn = |task: futures::future::BoxFuture<'static, ()>| {
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = shutdown.cancelled() => {}
            }
        });
    };
    for scope in &world.scopes {
        spawn(Box::pin(all_own(
            client.clone(),
            scope.clone(),
            world.clone(),
        )));
        let (world, client) = (world.clone(), client.clone());
        for kind in ChildKind::ALL
            .into_iter()
            .filter(|kind| *kind != ChildKind::ScaledObject)
        {
            spawn(Box::pin(children(
                client.clone(),
                scope.clone(),
                world.clone(),
                kind,
            )));
        }
        spawn(Box::pin(scaled_objects(
            client.clone(),
            scope.clone(),
            world.clone(),
        )));
        spawn(Box::pin(services(
            client.clone(),
            scope.clone(),
            world.clone(),
        )));
        spawn(Box::pin(pods(client.clone(), scope.clone(), world.clone())));
        spawn(Box::pin(autoscalers(
            client.clone(),
            scope.clone(),
            world.clone(),
        )));
        spawn(Box::pin(all_values(
            client.clone(),
            scope.clone(),
            world.clone(),
        )));
    }
    if let Some(service) = &world.scaler_service {
        spawn(Box::pin(scaler(
            client.clone(),
            service.clone(),
            world.clone(),
        )));
    }
}

fn labelled() -> watcher::Config {
    watcher::Config::default()
        .labels(&format!("{MANAGED_BY_LABEL}={MANAGED_BY}"))
        .page_size(PAGE)
}

fn everything() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

fn api<K>(client: Client, scope: &Scope) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match scope {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
    }
}

fn id(object: &impl ResourceExt) -> Id {
    Id::new(object.namespace().unwrap_or_default(), object.name_any())
}

/// Feeds events to `take` for ever; after an error it waits, longer each time until something works again.
async fn follow<K>(
    what: &str,
    events: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    mut take: impl FnMut(Event<K>),
    mut give_up: impl FnMut(&watcher::Error) -> bool,
) {
    let mut events = std::pin::pin!(events);
    let mut pause = PAUSE_MIN;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                pause = PAUSE_MIN;
                take(event);
            }
            Err(err) => {
                if give_up(&err) {
                    return;
                }
                tracing::warn!(watch = what, error = %err, "watch broken, beginning it anew");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Puts events into an index and wakes the namespaces that they concern.
fn into_index<K: ResourceExt, V: PartialEq>(
    world: &World,
    index: &Mutex<Index<V>>,
    scope: &Scope,
    event: Event<K>,
    convert: impl Fn(&K) -> Option<V>,
) {
    let mut index = lock(index);
    let changed = match event {
        Event::Init => {
            index.begin(scope);
            Vec::new()
        }
        Event::InitApply(object) => {
            if let Some(value) = convert(&object) {
                index.stage(scope, id(&object), value);
            }
            Vec::new()
        }
        Event::InitDone => index.finish(scope).into_iter().collect(),
        Event::Apply(object) => {
            let id = id(&object);
            let changed = match convert(&object) {
                Some(value) => index.put(id.clone(), value),
                None => index.remove(&id),
            };
            if changed {
                vec![id.namespace]
            } else {
                Vec::new()
            }
        }
        Event::Delete(object) => {
            let id = id(&object);
            if index.remove(&id) {
                vec![id.namespace]
            } else {
                Vec::new()
            }
        }
    };
    drop(index);
    world.wake(&changed);
}

/// Follows our own kinds.
async fn all_own(client: Client, scope: Scope, world: Arc<World>) {
    let (c, s, w) = (&client, &scope, &world);
    futures::join!(
        own(c.clone(), s.clone(), w.clone(), |world| &world.backends),
        own(c.clone(), s.clone(), w.clone(), |world| &world.policies),
        own(c.clone(), s.clone(), w.clone(), |world| &world.caches),
        own(c.clone(), s.clone(), w.clone(), |world| &world.keys),
        own(c.clone(), s.clone(), w.clone(), |world| &world.budgets),
        own(c.clone(), s.clone(), w.clone(), |world| &world.identities),
    );
}

/// Follows one of our own kinds.
async fn own<K>(
    client: Client,
    scope: Scope,
    world: Arc<World>,
    index: fn(&World) -> &Mutex<Index<Readable<K>>>,
) where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + DeserializeOwned
        + Clone
        + Debug
        + PartialEq
        + Send
        + 'static,
{
    let events = watcher(api::<DeserializeGuard<K>>(client, &scope), everything());
    let take = |event: Event<DeserializeGuard<K>>| {
        if let Event::Apply(object) = event {
            let id = id(&object);
            if put_own(index(&world), id.clone(), readable(&object)) {
                world.wake([&id.namespace]);
            }
        } else {
            into_index(&world, index(&world), &scope, event, |object| {
                Some(readable(object))
            });
        }
    };
    follow(&K::kind(&()), events, take, |_| false).await;
}

/// The object without `managedFields`, or why it cannot be read.
fn readable<K: Resource<DynamicType = ()> + Clone>(
    DeserializeGuard(object): &DeserializeGuard<K>,
) -> Readable<K> {
    match object {
        Ok(object) => {
            let mut object = object.clone();
            object.meta_mut().managed_fields = None;
            Ok(Arc::new(object))
        }
        Err(invalid) => Err(Unreadable {
            message: invalid.error.clone(),
            generation: invalid.metadata.generation,
            uid: invalid.metadata.uid.clone(),
            terminating: invalid.metadata.deletion_timestamp.is_some(),
        }),
    }
}

fn dynamic(client: Client, scope: &Scope, kind: ChildKind) -> Api<DynamicObject> {
    match scope {
        Some(namespace) => Api::namespaced_with(client, namespace, &kind.resource()),
        None => Api::all_with(client, &kind.resource()),
    }
}

fn take_child(world: &World, kind: ChildKind, scope: &Scope, event: Event<DynamicObject>) {
    let changed: Vec<String> = match event {
        Event::Init => {
            world.children(kind).begin(scope);
            Vec::new()
        }
        Event::InitApply(object) => {
            world
                .children(kind)
                .stage(scope, id(&object), Arc::new(Live::new(object)));
            Vec::new()
        }
        Event::InitDone => world.children(kind).finish(scope).into_iter().collect(),
        Event::Apply(object) => {
            let id = id(&object);
            let namespace = id.namespace.clone();
            if world.put_child(kind, id, Live::new(object)) {
                vec![namespace]
            } else {
                Vec::new()
            }
        }
        Event::Delete(object) => {
            let (id, gone) = (id(&object), Live::new(object));
            let mut index = world.children(kind);
            // A successor of the same name may be known already.
            let same = index
                .get(&id)
                .is_some_and(|known| known.uid() == gone.uid());
            if same && index.remove(&id) {
                vec![id.namespace]
            } else {
                Vec::new()
            }
        }
    };
    world.wake(&changed);
}

async fn children(client: Client, scope: Scope, world: Arc<World>, kind: ChildKind) {
    let events = watcher(dynamic(client, &scope, kind), labelled());
    follow(
        kind.name(),
        events,
        |event| take_child(&world, kind, &scope, event),
        |_| false,
    )
    .await;
}

/// Follows ScaledObjects while KEDA is installed; while it is not, looks from time to time.
async fn scaled_objects(client: Client, scope: Scope, world: Arc<World>) {
    let kind = ChildKind::ScaledObject;
    loop {
        if keda_is_installed(&client).await {
            let events = watcher(dynamic(client.clone(), &scope, kind), labelled());
            let take = |event| {
                let listed = matches!(event, Event::InitDone);
                take_child(&world, kind, &scope, event);
                if listed && world.children(kind).is_complete(&world.scopes) {
                    set_keda(&world, true);
                }
            };
            follow(kind.name(), events, take, is_not_found).await;
        }
        let changed = world.children(kind).clear(&scope);
        world.wake(&changed);
        set_keda(&world, false);
        tokio::time::sleep(KEDA_PROBE).await;
    }
}

fn set_keda(world: &World, installed: bool) {
    let before = lock(&world.keda).replace(installed);
    if before != Some(installed) {
        tracing::info!(keda.installed = installed, "looked for KEDA");
        world.wake_all();
    }
}

/// Asks until the API server answers.
async fn keda_is_installed(client: &Client) -> bool {
    let kind = ChildKind::ScaledObject;
    loop {
        match client.list_api_group_resources(kind.api_version()).await {
            Ok(list) => {
                return list
                    .resources
                    .iter()
                    .any(|resource| resource.kind == kind.name());
            }
            Err(kube::Error::Api(status)) if status.code == 404 => return false,
            Err(err) => {
                tracing::warn!(error = %err, "cannot look for KEDA, asking again");
                tokio::time::sleep(PAUSE_MAX).await;
            }
        }
    }
}

fn is_not_found(err: &watcher::Error) -> bool {
    match err {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}

async fn services(client: Client, scope: Scope, world: Arc<World>) {
    let events = watcher(api::<Service>(client, &scope), everything());
    let take = |event| {
        into_index(&world, &world.services, &scope, event, |service| {
            Some(service_facts(service))
        });
    };
    follow("Service", events, take, |_| false).await;
}

fn service_facts(service: &Service) -> ServiceFacts {
    let spec = service.spec.as_ref();
    let ports = spec
        .and_then(|spec| spec.ports.as_ref())
        .into_iter()
        .flatten();
    ServiceFacts {
        selector: spec
            .and_then(|spec| spec.selector.clone())
            .unwrap_or_default()
            .into_iter()
            .collect(),
        ports: ports
            .filter_map(|port| Some((u16::try_from(port.port).ok()?, port.name.clone())))
            .collect(),
    }
}

async fn pods(client: Client, scope: Scope, world: Arc<World>) {
    let events = watcher(api::<Pod>(client, &scope), labelled());
    let take = |event| {
        into_index(&world, &world.pods, &scope, event, |pod| {
            PodFacts::read(pod).map(Arc::new)
        });
    };
    follow("Pod", events, take, |_| false).await;
}

async fn autoscalers(client: Client, scope: Scope, world: Arc<World>) {
    let events = watcher(api::<HorizontalPodAutoscaler>(client, &scope), everything());
    let take = |event| {
        into_index(&world, &world.autoscalers, &scope, event, |hpa| {
            HpaFacts::read(hpa).map(Arc::new)
        });
    };
    follow("HorizontalPodAutoscaler", events, take, |_| false).await;
}

async fn all_values(client: Client, scope: Scope, world: Arc<World>) {
    let (secrets, config_maps) = (client.clone(), client);
    futures::join!(
        values::<Secret>(secrets, scope.clone(), world.clone(), |world| {
            &world.secrets
        }),
        values::<ConfigMap>(config_maps, scope, world.clone(), |world| {
            &world.config_maps
        }),
    );
}

/// Follows the metadata of all Secrets, or all ConfigMaps, to learn which of the few kept values is out of date.
async fn values<K>(
    client: Client,
    scope: Scope,
    world: Arc<World>,
    kept: fn(&World) -> &Mutex<ValueCache>,
) where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + Send
        + Sync
        + 'static,
{
    let events = watcher(api::<PartialObjectMeta<K>>(client, &scope), everything());
    let take = |event: Event<PartialObjectMeta<K>>| {
        let mut cache = lock(kept(&world));
        let stale: Vec<String> = match event {
            Event::Init => {
                cache.begin(&scope);
                Vec::new()
            }
            Event::InitDone => cache
                .finish(&scope)
                .into_iter()
                .map(|id| id.namespace)
                .collect(),
            Event::InitApply(object) | Event::Apply(object) => {
                let id = id(&object);
                if cache.seen(&scope, &id, &object.resource_version().unwrap_or_default()) {
                    vec![id.namespace]
                } else {
                    Vec::new()
                }
            }
            Event::Delete(object) => {
                let id = id(&object);
                if cache.gone(&id) {
                    vec![id.namespace]
                } else {
                    Vec::new()
                }
            }
        };
        drop(cache);
        world.wake(&stale);
    };
    follow(&K::kind(&()), events, take, |_| false).await;
}

/// Follows the endpoints of the scaler's Service.
async fn scaler(client: Client, service: Id, world: Arc<World>) {
    let scope = Some(service.namespace.clone());
    let config =
        watcher::Config::default().labels(&format!("kubernetes.io/service-name={}", service.name));
    let events = watcher(api::<EndpointSlice>(client, &scope), config);
    let take = |event| {
        let before = world.scaler_is_ready();
        into_index(
            &world,
            &world.scaler,
            &scope,
            event,
            |slice: &EndpointSlice| {
                let ready = |conditions: &EndpointConditions| conditions.ready == Some(true);
                Some(
                    slice
                        .endpoints
                        .iter()
                        .any(|endpoint| endpoint.conditions.as_ref().is_some_and(ready)),
                )
            },
        );
        if world.scaler_is_ready() != before {
            world.wake_all();
        }
    };
    follow("EndpointSlice", events, take, |_| false).await;
}
