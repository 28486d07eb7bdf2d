//! `Observed`: everything that a pass over one namespace looks at, owned and frozen. Pure data.

use std::collections::BTreeMap;
use std::sync::Arc;

use penstock_core::ids::Id;
use penstock_crds::compile::ServiceFacts;
use penstock_crds::condition::Condition;
use penstock_crds::{ObjectRef, Objects};

use crate::autoscaler::HpaFacts;
use crate::live::{ChildKind, Live};
use crate::pod::{Owner, PodFacts};

/// An object of ours whose spec this build cannot read. Its children are left as they are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unreadable {
    /// What is wrong.
    pub(crate) message: String,
    /// `metadata.generation`.
    pub(crate) generation: Option<i64>,
    /// `metadata.uid`.
    pub(crate) uid: Option<String>,
    /// It is being deleted.
    pub(crate) terminating: bool,
}

/// One namespace at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    /// Which namespace.
    pub(crate) namespace: String,
    /// Objects of our kinds that are not being deleted.
    pub(crate) objects: Objects,
    /// Objects of our kinds that cannot be read.
    pub(crate) unreadable: BTreeMap<ObjectRef, Unreadable>,
    /// All Services.
    pub(crate) services: BTreeMap<Id, ServiceFacts>,
    /// The Secrets that backends and VirtualKeys refer to and that exist.
    pub(crate) secrets: BTreeMap<Id, BTreeMap<String, Vec<u8>>>,
    /// ConfigMaps, likewise.
    pub(crate) config_maps: BTreeMap<Id, BTreeMap<String, Vec<u8>>>,
    /// Objects that carry the operator's label, by kind and name.
    pub(crate) children: BTreeMap<(ChildKind, String), Arc<Live>>,
    /// Pods of gateways and pools.
    pub(crate) pods: Vec<Arc<PodFacts>>,
    /// Autoscalers that point at Deployments.
    pub(crate) autoscalers: Vec<Arc<HpaFacts>>,
    /// KEDA's kinds exist.
    pub(crate) keda: bool,
    /// The scaler has a ready replica.
    pub(crate) scaler_ready: bool,
}

impl Observed {
    /// A child that is known.
    pub(crate) fn child(&self, kind: ChildKind, name: &str) -> Option<&Live> {
        self.children.get(&(kind, name.to_owned())).map(Arc::as_ref)
    }

    /// Pods of one gateway or pool.
    pub(crate) fn pods_of<'a>(&'a self, owner: &'a Owner) -> impl Iterator<Item = &'a PodFacts> {
        self.pods
            .iter()
            .map(Arc::as_ref)
            .filter(move |pod| pod.owner == *owner)
    }

    /// The object's conditions as they are now.
    pub(crate) fn conditions(&self, object: &ObjectRef) -> &[Condition] {
        use penstock_crds::Kind;
        let conditions = match object.kind {
            Kind::LLMBackend => self
                .objects
                .backends
                .get(&object.id)
                .and_then(|o| o.status.as_ref())
                .map(|s| &s.conditions),
            Kind::RoutingPolicy => self
                .objects
                .policies
                .get(&object.id)
                .and_then(|o| o.status.as_ref())
                .map(|s| &s.conditions),
            Kind::SemanticCache => self
                .objects
                .caches
                .get(&object.id)
                .and_then(|o| o.status.as_ref())
                .map(|s| &s.conditions),
            Kind::VirtualKey => self
                .objects
                .keys
                .get(&object.id)
                .and_then(|o| o.status.as_ref())
                .map(|s| &s.conditions),
            Kind::TokenBudget => self
                .objects
                .budgets
                .get(&object.id)
                .and_then(|o| o.status.as_ref())
                .map(|s| &s.conditions),
            Kind::IdentityProvider => self
                .objects
                .identities
                .get(&object.id)
                .and_then(|o| o.status.as_ref())
                .map(|s| &s.conditions),
        };
        conditions.map_or(&[], Vec::as_slice)
    }
}
