//! `retry.on` of a rule and `after` of its backends → classes of failures. Says which `after` never comes true.

use std::collections::BTreeSet;

use penstock_core::config::{FailureClass, usual_failures};

use super::rule::Scope;
use crate::policy::{FailureClassSpec, FanOutModeSpec, RuleBackendSpec, RuleSpec};
use crate::problem::Reason;

/// What of the rule is followed by another attempt.
pub(super) fn retry_on(spec: &RuleSpec) -> BTreeSet<FailureClass> {
    let classes = spec.retry.as_ref().and_then(|retry| retry.on.as_ref());
    classes.map_or_else(usual_failures, |classes| set(classes))
}

/// What a backend comes after.
pub(super) fn after(spec: &RuleBackendSpec) -> BTreeSet<FailureClass> {
    set(&spec.after)
}

fn set(classes: &[FailureClassSpec]) -> BTreeSet<FailureClass> {
    let class = |spec: &FailureClassSpec| match spec {
        FailureClassSpec::Connection => FailureClass::Connection,
        FailureClassSpec::Timeout => FailureClass::Timeout,
        FailureClassSpec::RateLimit => FailureClass::RateLimit,
        FailureClassSpec::ServerError => FailureClass::ServerError,
        FailureClassSpec::ContextLength => FailureClass::ContextLength,
        FailureClassSpec::ContentPolicy => FailureClass::ContentPolicy,
    };
    classes.iter().map(class).collect()
}

/// Says where nobody would be asked first, and where nobody would be asked after.
pub(super) fn check(spec: &RuleSpec, scope: &mut Scope<'_>) {
    let is_first = |backend: &RuleBackendSpec| backend.after.is_empty();
    if !spec.backends.is_empty() && !spec.backends.iter().any(is_first) {
        let message = "each of them waits for a failure of another one, so that nobody is asked first: leave out \
                       `after` where a request is to begin";
        scope.refuse(".backends", Reason::InvalidValue, message.to_owned());
        return;
    }
    let is_for_services = spec.matches.models.is_empty() && !spec.matches.paths.is_empty();
    let fan_out = spec.fan_out.as_ref().map(|fan_out| fan_out.mode);
    for (position, backend) in spec.backends.iter().enumerate() {
        let after = after(backend);
        let message = if after.is_empty() {
            continue;
        } else if spec.retry.as_ref().is_some_and(|retry| retry.attempts == 1) {
            "is a second attempt: set retry.attempts to 2 or more, or leave it out"
        } else if fan_out == Some(FanOutModeSpec::All) {
            "has no effect beside fanOut.mode: All, which asks all at once: leave it out"
        } else if is_for_services && after.is_disjoint(&of_services()) {
            "never happens to HTTP backends, whose refusals pass as they are: use Connection, Timeout or ServerError"
        } else {
            continue;
        };
        let path = format!(".backends[{position}].after");
        scope.refuse(&path, Reason::InvalidValue, message.to_owned());
    }
}

/// How HTTP backends fail.
fn of_services() -> BTreeSet<FailureClass> {
    use FailureClass::{Connection, ServerError, Timeout};
    BTreeSet::from([Connection, Timeout, ServerError])
}
