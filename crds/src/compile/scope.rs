//! One object, as far as it was looked at: mistakes are collected, and whether it can be used in spite of them.

use std::collections::BTreeSet;

use penstock_core::config::NameMatch;
use penstock_core::ids::Id;

use crate::object::{Kind, ObjectRef, Objects};
use crate::problem::{Problem, Reason};

/// Lists are bounded here too: files are not checked against the schema's maxima.
pub(super) const MAX_LIST: usize = 64;

/// See the module.
pub(super) struct Scope<'a> {
    object: ObjectRef,
    is_usable: bool,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Scope<'a> {
    pub(super) fn new(kind: Kind, id: &Id, problems: &'a mut Vec<Problem>) -> Self {
        Self {
            object: ObjectRef::new(kind, id.clone()),
            is_usable: true,
            problems,
        }
    }

    /// Whether nothing was wrong but references.
    pub(super) fn is_usable(&self) -> bool {
        self.is_usable
    }

    pub(super) fn refuse(&mut self, path: &str, reason: Reason, message: impl Into<String>) {
        self.is_usable &= reason.is_reference();
        self.problems.push(Problem {
            object: self.object.clone(),
            path: path.to_owned(),
            reason,
            message: message.into(),
        });
    }

    pub(super) fn invalid(&mut self, path: &str, message: impl Into<String>) {
        self.refuse(path, Reason::InvalidValue, message);
    }

    /// `length` entries may be `most` at most.
    pub(super) fn at_most(&mut self, path: &str, length: usize, most: usize) {
        if length > most {
            self.invalid(path, format!("has {length} entries: use {most} at most"));
        }
    }

    /// Names, each exact, by prefix or any.
    pub(super) fn names(&mut self, path: &str, names: &[String]) -> Vec<NameMatch> {
        self.at_most(path, names.len(), MAX_LIST);
        let mut matches = Vec::new();
        for (position, name) in names.iter().enumerate() {
            if let Some(name) = NameMatch::read(name) {
                matches.push(name);
            } else {
                let message = format!("'{name}': write one '*' at most, at the end");
                self.invalid(&format!("{path}[{position}]"), message);
            }
        }
        matches
    }

    /// Names, where none means any: so does `*` among others.
    pub(super) fn names_or_any(&mut self, path: &str, names: &[String]) -> Vec<NameMatch> {
        let matches = self.names(path, names);
        if matches.contains(&NameMatch::Prefix(String::new())) {
            Vec::new()
        } else {
            matches
        }
    }

    /// RoutingPolicies of a gateway, in the object's namespace.
    pub(super) fn policies(
        &mut self,
        path: &str,
        names: &[String],
        gateway: &str,
        objects: &Objects,
    ) -> BTreeSet<Id> {
        self.at_most(path, names.len(), MAX_LIST);
        let mut policies = BTreeSet::new();
        for (position, name) in names.iter().enumerate() {
            let policy = Id::new(&self.object.id.namespace, name);
            let found = objects.policies.get(&policy);
            if found.is_none_or(|found| found.spec.gateway != gateway) {
                let message = format!(
                    "RoutingPolicy {policy} does not exist or is not of gateway '{gateway}': create it or correct the name"
                );
                self.refuse(
                    &format!("{path}[{position}]"),
                    Reason::PolicyNotFound,
                    message,
                );
            }
            // Leaving it out could leave none, which would mean any.
            policies.insert(policy);
        }
        policies
    }
}
