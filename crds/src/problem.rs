//! `Problem`: bad input as data. The operator turns it into a condition, the command line into a printed line.

use crate::object::ObjectRef;

/// One thing that is wrong with one object. The rest of the objects still compile.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Which object must change.
    pub object: ObjectRef,
    /// Where in it, such as `spec.rules[0].backends[1].name`.
    pub path: String,
    /// What kind of mistake.
    pub reason: Reason,
    /// What is wrong and what to change.
    pub message: String,
}

impl Problem {
    /// A value at `path` that cannot be used.
    pub(crate) fn invalid(object: ObjectRef, path: impl Into<String>, message: String) -> Self {
        Self {
            object,
            path: path.into(),
            reason: Reason::InvalidValue,
            message,
        }
    }
}

/// Why an object, or a part of it, is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A value that the schema or the meaning of the field does not allow.
    InvalidValue,
    /// A rule that no request can reach, because an earlier one takes them all.
    UnreachableRule,
    /// A reference to a backend that does not exist.
    BackendNotFound,
    /// A reference to a backend that has problems of its own.
    BackendNotAccepted,
    /// A reference to a cache that does not exist.
    CacheNotFound,
    /// A reference to a VirtualKey that does not exist, or is of another gateway.
    KeyNotFound,
    /// A reference to a RoutingPolicy that does not exist, or is of another gateway.
    PolicyNotFound,
    /// A reference to a Service, or a port of it, that does not exist.
    ServiceNotFound,
    /// A reference to a Secret, or a key of it, that does not exist.
    SecretNotFound,
    /// A reference to a ConfigMap, or a key of it, that does not exist.
    ConfigMapNotFound,
    /// A backend that leads back into a Penstock gateway.
    RoutingLoop,
}

impl Reason {
    /// The reason as a condition spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidValue => "InvalidValue",
            Self::UnreachableRule => "UnreachableRule",
            Self::BackendNotFound => "BackendNotFound",
            Self::BackendNotAccepted => "BackendNotAccepted",
            Self::CacheNotFound => "CacheNotFound",
            Self::KeyNotFound => "KeyNotFound",
            Self::PolicyNotFound => "PolicyNotFound",
            Self::ServiceNotFound => "ServiceNotFound",
            Self::SecretNotFound => "SecretNotFound",
            Self::ConfigMapNotFound => "ConfigMapNotFound",
            Self::RoutingLoop => "RoutingLoop",
        }
    }

    /// Whether the reference is what is wrong (condition `ResolvedRefs`) and not the object (condition `Accepted`).
    pub fn is_reference(self) -> bool {
        match self {
            Self::BackendNotFound
            | Self::BackendNotAccepted
            | Self::CacheNotFound
            | Self::KeyNotFound
            | Self::PolicyNotFound
            | Self::ServiceNotFound
            | Self::SecretNotFound
            | Self::ConfigMapNotFound => true,
            Self::InvalidValue | Self::UnreachableRule | Self::RoutingLoop => false,
        }
    }
}
