//! Objects by identity: what `compile` takes, and how results name what they are about.

use std::collections::BTreeMap;
use std::fmt;

use penstock_core::ids::Id;

use crate::{IdentityProvider, LLMBackend, RoutingPolicy, SemanticCache, TokenBudget, VirtualKey};

/// One of the kinds of this API group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `LLMBackend`
    LLMBackend,
    /// `RoutingPolicy`
    RoutingPolicy,
    /// `SemanticCache`
    SemanticCache,
    /// `VirtualKey`
    VirtualKey,
    /// `TokenBudget`
    TokenBudget,
    /// `IdentityProvider`
    IdentityProvider,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::LLMBackend,
        Self::RoutingPolicy,
        Self::SemanticCache,
        Self::VirtualKey,
        Self::TokenBudget,
        Self::IdentityProvider,
    ];

    /// The kind's name as in YAML.
    pub fn name(self) -> &'static str {
        match self {
            Self::LLMBackend => "LLMBackend",
            Self::RoutingPolicy => "RoutingPolicy",
            Self::SemanticCache => "SemanticCache",
            Self::VirtualKey => "VirtualKey",
            Self::TokenBudget => "TokenBudget",
            Self::IdentityProvider => "IdentityProvider",
        }
    }
}

/// Names one object; written `Kind/namespace/name`, as in `GatewayConfig::objects`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace and name.
    pub id: Id,
}

impl ObjectRef {
    /// Names an object.
    pub fn new(kind: Kind, id: Id) -> Self {
        Self { kind, id }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.name(), self.id)
    }
}

/// All objects that one `compile` looks at. Ordered maps: the order in which objects arrived cannot matter.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// By namespace and name.
    pub backends: BTreeMap<Id, LLMBackend>,
    /// By namespace and name.
    pub policies: BTreeMap<Id, RoutingPolicy>,
    /// By namespace and name.
    pub caches: BTreeMap<Id, SemanticCache>,
    /// By namespace and name.
    pub keys: BTreeMap<Id, VirtualKey>,
    /// By namespace and name.
    pub budgets: BTreeMap<Id, TokenBudget>,
    /// By namespace and name.
    pub identities: BTreeMap<Id, IdentityProvider>,
}

/// An object that names the gateway that it is about.
pub trait OfGateway {
    /// Its `spec.gateway`.
    fn gateway(&self) -> &str;
}

macro_rules! of_gateway {
    ($($kind:ty),*) => {$(
        impl OfGateway for $kind {
            fn gateway(&self) -> &str {
                &self.spec.gateway
            }
        }
    )*};
}

of_gateway!(RoutingPolicy, VirtualKey, TokenBudget, IdentityProvider);

/// Those that are about `gateway`.
pub fn of_gateway<'a, T: OfGateway>(
    objects: &'a BTreeMap<Id, T>,
    gateway: &'a Id,
) -> impl Iterator<Item = (&'a Id, &'a T)> {
    objects.iter().filter(|(id, object)| {
        id.namespace == gateway.namespace && object.gateway() == gateway.name
    })
}
