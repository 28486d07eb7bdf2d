//! (IO) `World`: what the watches have seen, shared between them and the workers. Locks are held for moments only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use penstock_core::ids::Id;
use penstock_crds::compile::ServiceFacts;
use penstock_crds::{
    IdentityProvider, LLMBackend, RoutingPolicy, SemanticCache, TokenBudget, VirtualKey,
};
use tokio::sync::Notify;

use crate::autoscaler::HpaFacts;
use crate::index::{Index, Scope};
use crate::live::{ChildKind, Live, version};
use crate::observed::Unreadable;
use crate::pod::PodFacts;
use crate::queue::Queue;
use crate::values::ValueCache;

/// An object of ours, or why it cannot be read.
pub(crate) type Readable<K> = Result<Arc<K>, Unreadable>;

/// Everything that is known.
#[derive(Debug)]
pub(crate) struct World {
    /// What each watch covers.
    pub(crate) scopes: Vec<Scope>,
    /// Namespace and name of the scaler's Service, if it is one of this cluster.
    pub(crate) scaler_service: Option<Id>,
    pub(crate) backends: Mutex<Index<Readable<LLMBackend>>>,
    pub(crate) policies: Mutex<Index<Readable<RoutingPolicy>>>,
    pub(crate) caches: Mutex<Index<Readable<SemanticCache>>>,
    pub(crate) keys: Mutex<Index<Readable<VirtualKey>>>,
    pub(crate) budgets: Mutex<Index<Readable<TokenBudget>>>,
    pub(crate) identities: Mutex<Index<Readable<IdentityProvider>>>,
    pub(crate) services: Mutex<Index<ServiceFacts>>,
    pub(crate) pods: Mutex<Index<Arc<PodFacts>>>,
    pub(crate) autoscalers: Mutex<Index<Arc<HpaFacts>>>,
    /// EndpointSlices of the scaler: whether they hold a ready endpoint.
    pub(crate) scaler: Mutex<Index<bool>>,
    pub(crate) secrets: Mutex<ValueCache>,
    pub(crate) config_maps: Mutex<ValueCache>,
    /// When the limits of which budget were written, by uid.
    pub(crate) limits_told: Mutex<BTreeMap<String, Instant>>,
    /// Uid and generation of unreadable objects whose conditions were written.
    pub(crate) unreadable_reported: Mutex<BTreeSet<(String, Option<i64>)>>,
    /// Whether KEDA is installed; `None` until somebody looked.
    pub(crate) keda: Mutex<Option<bool>>,
    children: BTreeMap<ChildKind, Mutex<Index<Arc<Live>>>>,
    queue: Mutex<Queue>,
    /// Rings when the queue changes.
    pub(crate) bell: Notify,
}

/// Locks; a thread that panicked while it held the lock has left nothing half done that a later event does not mend.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Nothing known yet.
    pub(crate) fn new(namespaces: &[String], scaler_service: Option<Id>) -> Self {
        let scopes = if namespaces.is_empty() {
            vec![None]
        } else {
            namespaces
                .iter()
                .collect::<BTreeSet<_>>()
                .into_iter()
                .cloned()
                .map(Some)
                .collect()
        };
        Self {
            scopes,
            scaler_service,
            backends: Mutex::default(),
            policies: Mutex::default(),
            caches: Mutex::default(),
            keys: Mutex::default(),
            budgets: Mutex::default(),
            identities: Mutex::default(),
            services: Mutex::default(),
            pods: Mutex::default(),
            autoscalers: Mutex::default(),
            scaler: Mutex::default(),
            secrets: Mutex::default(),
            config_maps: Mutex::default(),
            limits_told: Mutex::default(),
            unreadable_reported: Mutex::default(),
            keda: Mutex::default(),
            children: ChildKind::ALL
                .into_iter()
                .map(|kind| (kind, Mutex::default()))
                .collect(),
            queue: Mutex::default(),
            bell: Notify::new(),
        }
    }

    /// The index of one kind of child.
    pub(crate) fn children(&self, kind: ChildKind) -> MutexGuard<'_, Index<Arc<Live>>> {
        // Every kind has an index: `new` makes one for each of `ChildKind::ALL`.
        static NONE: std::sync::LazyLock<Mutex<Index<Arc<Live>>>> =
            std::sync::LazyLock::new(Mutex::default);
        lock(self.children.get(&kind).unwrap_or(&NONE))
    }

    /// Takes a newer state of a child; an older one, from a watch that lags behind an answer, is ignored.
    pub(crate) fn put_child(&self, kind: ChildKind, id: Id, live: Live) -> bool {
        self.children(kind)
            .put_unless_older(id, Arc::new(live), |new, known| new.is_older_than(known))
    }

    /// Whether every watch has listed its kind once, so that what is absent here is absent there.
    pub(crate) fn is_complete(&self) -> bool {
        let scopes = &self.scopes;
        let scaler = match &self.scaler_service {
            Some(service) => lock(&self.scaler).is_complete(&[Some(service.namespace.clone())]),
            None => true,
        };
        scaler
            && lock(&self.backends).is_complete(scopes)
            && lock(&self.policies).is_complete(scopes)
            && lock(&self.caches).is_complete(scopes)
            && lock(&self.keys).is_complete(scopes)
            && lock(&self.budgets).is_complete(scopes)
            && lock(&self.identities).is_complete(scopes)
            && lock(&self.services).is_complete(scopes)
            && lock(&self.pods).is_complete(scopes)
            && lock(&self.autoscalers).is_complete(scopes)
            && match *lock(&self.keda) {
                None => false,
                Some(installed) => ChildKind::ALL
                    .into_iter()
                    .filter(|kind| installed || *kind != ChildKind::ScaledObject)
                    .all(|kind| self.children(kind).is_complete(scopes)),
            }
    }

    /// Whether the scaler has a ready endpoint; an address outside the cluster is taken to answer.
    pub(crate) fn scaler_is_ready(&self) -> bool {
        let Some(service) = &self.scaler_service else {
            return true;
        };
        lock(&self.scaler)
            .of_namespace(&service.namespace)
            .any(|(_, ready)| *ready)
    }

    /// Namespaces with objects of ours or children of theirs.
    pub(crate) fn namespaces(&self) -> BTreeSet<String> {
        let mut all = lock(&self.backends).namespaces();
        all.extend(lock(&self.policies).namespaces());
        all.extend(lock(&self.caches).namespaces());
        all.extend(lock(&self.keys).namespaces());
        all.extend(lock(&self.budgets).namespaces());
        all.extend(lock(&self.identities).namespaces());
        for kind in ChildKind::ALL {
            all.extend(self.children(kind).namespaces());
        }
        all
    }

    /// Has `namespaces` looked at.
    pub(crate) fn wake<'a>(&self, namespaces: impl IntoIterator<Item = &'a String>) {
        let now = now();
        let mut queue = lock(&self.queue);
        for namespace in namespaces {
            queue.wake(namespace, now);
        }
        drop(queue);
        self.bell.notify_one();
    }

    /// Has every namespace that concerns us looked at.
    pub(crate) fn wake_all(&self) {
        self.wake(&self.namespaces());
    }

    /// The queue.
    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

/// Takes a newer state of an object of ours; an older one is ignored.
pub(crate) fn put_own<K>(index: &Mutex<Index<Readable<K>>>, id: Id, object: Readable<K>) -> bool
where
    K: kube::Resource + PartialEq,
{
    lock(index).put_unless_older(id, object, |new, known| match (new, known) {
        (Ok(new), Ok(known)) => {
            let of = |object: &K| version(object.meta().resource_version.as_deref());
            new.meta().uid == known.meta().uid && of(new) < of(known)
        }
        _ => false,
    })
}

/// The monotonic clock.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
