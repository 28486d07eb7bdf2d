//! (IO) World → [`Observed`]: one namespace, owned and frozen. Reads the Secrets that backends refer to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, ResourceExt as _};
use penstock_core::ids::Id;
use penstock_crds::{Kind, ObjectRef, Objects};

use crate::apply::{WriteError, within_deadline};
use crate::live::ChildKind;
use crate::observed::{Observed, Unreadable};
use crate::plan::credentials;
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
    let Objects {
        backends,
        policies,
        caches,
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
    read_secrets(client, world, &mut observed).await?;
    Ok(observed)
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

async fn read_secrets(
    client: &Client,
    world: &World,
    observed: &mut Observed,
) -> Result<(), WriteError> {
    let wanted: BTreeSet<Id> = observed
        .objects
        .backends
        .iter()
        .filter_map(|(id, backend)| {
            Some(Id::new(
                &id.namespace,
                &credentials::reference(&backend.spec)?.secret,
            ))
        })
        .collect();
    let missing = lock(&world.secrets).want(&observed.namespace, &wanted);
    let mut failure = None;
    for id in missing {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &id.namespace);
        match within_deadline(secrets.get_opt(&id.name)).await {
            Ok(found) => {
                let found = found.map(|secret| {
                    let version = secret.resource_version().unwrap_or_default();
                    let values = secret
                        .data
                        .into_iter()
                        .flatten()
                        .map(|(key, value)| (key, value.0))
                        .collect();
                    (version, values)
                });
                if lock(&world.secrets).learn(&id, found) {
                    world.wake([&observed.namespace]);
                }
            }
            // A Secret that may not be read is like none. Any other failure ends the pass: taking a value for missing
            // would take it from the gateways too.
            Err(err) => {
                lock(&world.secrets).forget(&id);
                if !err.status().is_some_and(kube::core::Status::is_forbidden) {
                    failure = Some(WriteError::Read {
                        what: format!("Secret {id}"),
                        err: Arc::new(err),
                    });
                }
            }
        }
    }
    observed.secrets = lock(&world.secrets).values(&observed.namespace);
    failure.map_or(Ok(()), Err)
}
