//! Objects by identity: what `compile` takes, and how results name what they are about.

use std::collections::BTreeMap;
use std::fmt;

use penstock_core::ids::Id;

use crate::{LLMBackend, RoutingPolicy, SemanticCache, TokenBudget, VirtualKey};

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
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::LLMBackend,
        Self::RoutingPolicy,
        Self::SemanticCache,
        Self::VirtualKey,
        Self::TokenBudget,
    ];

    /// The kind's name as in YAML.
    pub fn name(self) -> &'static str {
        match self {
            Self::LLMBackend => "LLMBackend",
            Self::RoutingPolicy => "RoutingPolicy",
            Self::SemanticCache => "SemanticCache",
            Self::VirtualKey => "VirtualKey",
            Self::TokenBudget => "TokenBudget",
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
}
