//! `fanOut` of a rule → `config::FanOut`. Says what in the rule cannot work beside it.

use std::collections::BTreeSet;

use penstock_core::config::{FanOut, FanOutMode};

use super::rule::{Scope, ms, number};
use crate::policy::{FanOutModeSpec, RuleSpec};
use crate::problem::Reason;

/// Long answers of large models take about as long.
const DEFAULT_WITHIN_MS: u64 = 60_000;

pub(super) fn compile(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<FanOut> {
    let fan_out = spec.fan_out.as_ref()?;
    let wants_all = fan_out.mode == FanOutModeSpec::All;
    let first = spec.backends.iter();
    let first = first.filter(|backend| backend.after.is_empty());
    let names: BTreeSet<&String> = first.map(|backend| &backend.name).collect();
    let wrong = [
        (
            ".fanOut",
            names.len() < 2,
            "needs at least two different backends without `after`: name another one, or leave it out",
        ),
        (
            ".hedge",
            spec.hedge.is_some(),
            "has no effect beside fanOut, which asks several backends at once: leave out one of the two",
        ),
        (
            ".joinEmbeddings",
            spec.join_embeddings.is_some(),
            "does not go with fanOut: leave out one of the two",
        ),
        (
            ".cache",
            wants_all && spec.cache.is_some(),
            "does not store the answers of several backends: leave it out, or use fanOut.mode: First",
        ),
        (
            ".heartbeat",
            wants_all && spec.heartbeat.is_some(),
            "is of event streams, and the answers of several backends are one document: leave out one of the two",
        ),
        (
            ".fanOut.within",
            !wants_all && fan_out.within.is_some(),
            "has no effect with mode: First: use timeouts.firstToken",
        ),
    ];
    for (path, is_wrong, message) in wrong {
        if is_wrong {
            scope.refuse(path, Reason::InvalidValue, message.to_owned());
        }
    }
    let max = number(fan_out.max, 2, 8, ".fanOut.max", scope);
    let within = fan_out.within.as_ref();
    let within_ms = within.and_then(|within| ms(".fanOut.within", within, scope));
    Some(FanOut {
        mode: match fan_out.mode {
            FanOutModeSpec::First => FanOutMode::First,
            FanOutModeSpec::All => FanOutMode::All,
        },
        max: max?,
        within_ms: within_ms.unwrap_or(DEFAULT_WITHIN_MS),
    })
}
