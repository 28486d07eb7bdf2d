//! `retry.rescueStreams` of a rule. Says what in the rule keeps every stream from being rescued.

use penstock_core::config::Protocol;
use penstock_core::ids::Id;

use super::rule::{Known, Scope};
use crate::policy::{FanOutModeSpec, RuleSpec, StreamingSpec};
use crate::problem::Reason;

pub(super) fn compile(
    policy: &Id,
    spec: &RuleSpec,
    known: &Known<'_>,
    scope: &mut Scope<'_>,
) -> bool {
    let Some(retry) = spec.retry.as_ref() else {
        return false;
    };
    if retry.rescue_streams != Some(true) {
        return false;
    }
    let compiled = spec.backends.iter().filter_map(|backend| {
        let id = Id::new(&policy.namespace, &backend.name);
        known.backends.get(&id)
    });
    let mut compiled = compiled.peekable();
    let has_backend = compiled.peek().is_some();
    let is_continued = compiled.any(|backend| {
        backend.protocol == Protocol::OpenAi && backend.profile.capabilities.continue_final_message
    });
    let wants_all = |mode| mode == FanOutModeSpec::All;
    let wrong = [
        (
            has_backend && !is_continued,
            "none of the rule's backends goes on with an answer: set capabilities.continueFinalMessage: true in an \
             LLMBackend that speaks OpenAI's protocol and whose engine can, or leave it out",
        ),
        (
            retry.attempts == 1,
            "is a second attempt: set retry.attempts to 2 or more, or leave it out",
        ),
        (
            spec.streaming == Some(StreamingSpec::Buffered),
            "has no effect beside streaming: Buffered, which repeats whole streams: leave out one of the two",
        ),
        (
            spec.fan_out
                .as_ref()
                .is_some_and(|fan_out| wants_all(fan_out.mode)),
            "has no effect beside fanOut.mode: All, which has no streams: leave it out",
        ),
    ];
    for (_, message) in wrong.iter().filter(|(is_wrong, _)| *is_wrong) {
        let message = (*message).to_owned();
        scope.refuse(".retry.rescueStreams", Reason::InvalidValue, message);
    }
    true
}
