//! `resumable` of a rule → `config::Rule::resumable_ms`.

use super::rule::{Scope, ms};
use crate::policy::RuleSpec;
use crate::problem::Reason;

/// Shorter, and no caller is back in time.
const MIN_MS: u64 = 1_000;
/// Longer, and engines work for callers who will not come back; that is what background responses are for.
const MAX_MS: u64 = 600_000;

pub(super) fn compile(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<u64> {
    let path = ".resumable";
    let resumable_ms = ms(path, spec.resumable.as_ref()?, scope)?;
    if !(MIN_MS..=MAX_MS).contains(&resumable_ms) {
        let message = "out of range: use 1s to 10m".to_owned();
        scope.refuse(path, Reason::InvalidValue, message);
        return None;
    }
    Some(resumable_ms)
}
