//! (IO) World → [`Observed`]: one namespace, owned and frozen. Reads the Secrets and
//! ConfigMaps that backends and VirtualKeys refer to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, ResourceExt as _};
use penstock_core::ids::Id;
use penstock_crds::tls::SourceKind;
use penstock_crds::{Kind, ObjectRef, Objects};

use crate::apply::{WriteError, within_deadline};
use crate::keys;
use crate::live::ChildKind;
use crate::observed::{Observed, Unreadable};
use crate::values::{ValueCache, Values};
use crate::world::{Readable, World, lock};

/// Looks at everything in `namespace`.
pub(crate) async fn observe(
    client: &Client,
    world: &World,
    namespace: &str,
) -> Result<Observed, WriteError> {
    let mut observed = Observed {
        namespace: namespace.to_owned(),
        ..Observed::default()
    };
    own(world, namespace, &mut observed);
    observed.services = lock(&world.services)
        .of_namespace(namespace)
        .map(|(id, facts)| (id.clone(), facts.clone()))
        .collect();
    for kind in ChildKind::ALL {
        let index = world.children(kind);
        let children = index
            .of_namespace(namespace)
            .map(|(id, live)| ((kind, id.name.clone()), live.clone()));
        observed.children.extend(children);
    }
    observed.pods = lock(&world.pods)
        .of_namespace(namespace)
        .map(|(_, pod)| pod.clone())
        .collect();
    observed.autoscalers = lock(&world.autoscalers)
        .of_namespace(namespace)
        .map(|(_, hpa)| hpa.clone())
        .collect();
    observed.keda = *lock(&world.keda) == Some(true);
    observed.scaler_ready = world.scaler_is_ready();
    let config_maps = read::<ConfigMap>(client, world, &world.config_maps, &observed).await;
    observed.secrets = read::<Secret>(client, world, &world.secrets, &observed).await?;
    observed.config_maps = config_maps?;
    Ok(observed)
}

/// The objects of our kinds.
fn own(world: &World, namespace: &str, observed: &mut Observed) {
    let Objects {
        backends,
        policies,
        caches,
        keys: virtual_keys,
        budgets,
        identities,
    } = &mut observed.objects;
    let unreadable = &mut observed.unreadable;
    collect(
        lock(&world.backends).of_namespace(namespace),
        Kind::LLMBackend,
        backends,
        unreadable,
    );
    collect(
        lock(&world.policies).of_namespace(namespace),
        Kind::RoutingPolicy,
        policies,
        unreadable,
    );
    collect(
        lock(&world.caches).of_namespace(namespace),
        Kind::SemanticCache,
        caches,
        unreadable,
    );
    collect(
        lock(&world.keys).of_namespace(namespace),
        Kind::VirtualKey,
        virtual_keys,
        unreadable,
    );
    collect(
        lock(&world.budgets).of_namespace(namespace),
        Kind::TokenBudget,
        budgets,
        unreadable,
    );
    collect(
        lock(&world.identities).of_namespace(namespace),
        Kind::IdentityProvider,
        identities,
        unreadable,
    );
}

fn collect<'a, K>(
    items: impl Iterator<Item = (&'a Id, &'a Readable<K>)>,
    kind: Kind,
    into: &mut BTreeMap<Id, K>,
    unreadable: &mut BTreeMap<ObjectRef, Unreadable>,
) where
    K: kube::Resource + Clone + 'a,
{
    for (id, object) in items {
        match object {
            // What is being deleted is gone for routing; its children go with it.
            Ok(object) if object.meta().deletion_timestamp.is_some() => {}
            Ok(object) => {
                into.insert(id.clone(), K::clone(object));
            }
            Err(invalid) if invalid.terminating => {}
            Err(invalid) => {
                unreadable.insert(ObjectRef::new(kind, id.clone()), invalid.clone());
            }
        }
    }
}

/// A Secret or a ConfigMap.
trait Keyed:
    kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>
    + Clone
    + Debug
    + serde::de::DeserializeOwned
{
    const KIND: SourceKind;

    fn values(self) -> Values;
}

impl Keyed for Secret {
    const KIND: SourceKind = SourceKind::Secret;

    fn values(self) -> Values {
        let data = self.data.into_iter().flatten();
        data.map(|(key, value)| (key, value.0)).collect()
    }
}

impl Keyed for ConfigMap {
    const KIND: SourceKind = SourceKind::ConfigMap;

    fn values(self) -> Values {
        let data = self.data.into_iter().flatten();
        data.map(|(key, value)| (key, value.into_bytes())).collect()
    }
}

/// What of one kind objects refer to.
async fn read<K: Keyed>(
    client: &Client,
    world: &World,
    kept: &Mutex<ValueCache>,
    observed: &Observed,
) -> Result<BTreeMap<Id, Values>, WriteError> {
    let backends = observed.objects.backends.iter();
    let mut wanted: BTreeSet<Id> = backends
        .flat_map(|(id, backend)| {
            let values = backend.spec.values().filter(|value| value.kind == K::KIND);
            values.map(|value| Id::new(&id.namespace, value.name))
        })
        .collect();
    if K::KIND == SourceKind::Secret {
        wanted.extend(keys::secrets(observed));
    }
    let missing = lock(kept).want(&observed.namespace, &wanted);
    let mut failure = None;
    for id in missing {
        let objects: Api<K> = Api::namespaced(client.clone(), &id.namespace);
        match within_deadline(objects.get_opt(&id.name)).await {
            Ok(found) => {
                let found = found.map(|object| {
                    let version = object.resource_version().unwrap_or_default();
                    (version, object.values())
                });
                if lock(kept).learn(&id, found) {
                    world.wake([&observed.namespace]);
                }
            }
            // One that may not be read is like none. Any other failure ends the pass: taking a value for missing would
            // take it from the gateways too.
            Err(err) => {
                lock(kept).forget(&id);
                if !err.status().is_some_and(kube::core::Status::is_forbidden) {
                    failure = Some(WriteError::Read {
                        what: format!("{} {id}", K::KIND.name()),
                        err: Arc::new(err),
                    });
                }
            }
        }
    }
    let values = lock(kept).values(&observed.namespace);
    failure.map_or(Ok(values), Err)
}
