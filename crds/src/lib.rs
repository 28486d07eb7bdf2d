//! The kinds of group `penstock.dev/v1alpha1`: specs, status, CEL rules; and `compile`, the pure step from objects to
//! the gateways' configuration.
//!
//! Objects come in as people wrote them; after [`compile`] nobody looks at a spec again.

pub mod backend;
pub mod budget;
pub mod cache;
pub mod compile;
pub mod condition;
pub mod definition;
pub mod identity;
pub mod key;
pub mod manifest;
pub mod object;
pub mod policy;
pub mod prices;
pub mod problem;
pub mod profile;
mod shape;
pub mod text;
pub mod tls;
pub mod yaml;

pub use backend::{LLMBackend, LLMBackendSpec};
pub use budget::{TokenBudget, TokenBudgetSpec};
pub use cache::{SemanticCache, SemanticCacheSpec};
pub use compile::{Compiled, Facts, compile};
pub use identity::{IdentityProvider, IdentityProviderSpec};
pub use key::{VirtualKey, VirtualKeySpec};
pub use object::{Kind, ObjectRef, Objects};
pub use policy::{RoutingPolicy, RoutingPolicySpec};
pub use problem::{Problem, Reason};
