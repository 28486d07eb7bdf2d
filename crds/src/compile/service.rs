//! Rules for backends that speak HTTP: agents and tools. They name no model, so they are selected by path, method and
//! headers, and what is about models cannot be said in them.

use penstock_core::config::{Condition, NameMatch, Protocol, Rule};

use super::rule::{Known, Scope};
use crate::policy::{RuleSpec, StrategySpec};
use crate::problem::Reason;

/// Whether the rule is one for backends that speak HTTP. Says what in it cannot work.
pub(super) fn check(
    spec: &RuleSpec,
    rule: &Rule,
    known: &Known<'_>,
    scope: &mut Scope<'_>,
) -> bool {
    let is_service = spec.matches.models.is_empty() && !spec.matches.paths.is_empty();
    for (position, candidate) in spec.backends.iter().enumerate() {
        let id = penstock_core::ids::Id::new(&rule.policy.namespace, &candidate.name);
        let Some(backend) = known.backends.get(&id) else {
            continue;
        };
        let message = match (backend.protocol == Protocol::Http, is_service) {
            (true, false) => format!(
                "LLMBackend {id} speaks HTTP, and requests to it name no model: leave out match.models and give \
                 match.paths, in a rule of its own"
            ),
            (false, true) => format!(
                "LLMBackend {id} answers for models: give match.models, in a rule without HTTP backends"
            ),
            _ => continue,
        };
        let path = format!(".backends[{position}].name");
        scope.refuse(&path, Reason::InvalidValue, message);
    }
    let unfit = if is_service {
        about_models(spec)
    } else {
        about_services(spec)
    };
    for path in unfit {
        let message = if is_service {
            "is about models, and this rule names none: leave it out"
        } else {
            "is about HTTP backends, and this rule names models: leave it out"
        };
        scope.refuse(path, Reason::InvalidValue, message.to_owned());
    }
    is_service
}

fn about_models(spec: &RuleSpec) -> Vec<&'static str> {
    let matches = &spec.matches;
    let overrides = spec
        .backends
        .iter()
        .any(|backend| backend.model_override.is_some());
    let rescues = spec.retry.as_ref().and_then(|retry| retry.rescue_streams);
    let all = [
        (".match.promptTokens", matches.prompt_tokens.is_some()),
        (".match.contextTokens", matches.context_tokens.is_some()),
        (".match.needs", !matches.needs.is_empty()),
        (".match.stream", matches.stream.is_some()),
        (".match.text", matches.text.is_some()),
        (".match.task", matches.task.is_some()),
        (".backends", overrides),
        (
            ".strategy",
            matches!(
                spec.strategy,
                StrategySpec::PrefixAffinity | StrategySpec::CostLatency | StrategySpec::Adaptive
            ) || spec.strategy == StrategySpec::Hash && spec.hash_on.is_none(),
        ),
        (".slo", spec.slo.is_some()),
        (".retry.rescueStreams", rescues.is_some()),
        (".hedge", spec.hedge.is_some()),
        (".fanOut", spec.fan_out.is_some()),
        (".joinEmbeddings", spec.join_embeddings.is_some()),
        (".parameters", spec.parameters.is_some()),
        (".prompt", spec.prompt.is_some()),
        (".onUnsupported", spec.on_unsupported.is_some()),
        (".streaming", spec.streaming.is_some()),
        (".heartbeat", spec.heartbeat.is_some()),
        (".resumable", spec.resumable.is_some()),
        (".cache", spec.cache.is_some()),
    ];
    set(&all)
}

fn about_services(spec: &RuleSpec) -> Vec<&'static str> {
    let repeat = spec.retry.as_ref().and_then(|retry| retry.repeat);
    set(&[
        (".match.methods", !spec.matches.methods.is_empty()),
        (".retry.repeat", repeat.is_some()),
    ])
}

fn set(fields: &[(&'static str, bool)]) -> Vec<&'static str> {
    let set = fields.iter().filter(|(_, is_set)| *is_set);
    set.map(|(path, _)| *path).collect()
}

/// The paths that can be used, each with its position; the others are said elsewhere.
pub(super) fn paths(paths: &[String]) -> Vec<(NameMatch, usize)> {
    let paths = paths.iter().enumerate();
    paths
        .filter(|(_, path)| path.starts_with('/'))
        .filter_map(|(position, path)| Some((NameMatch::read(path)?, position)))
        .collect()
}

/// A rule whose names are paths, as a gateway reads it.
pub(super) fn by_path(mut rule: Rule) -> Rule {
    let paths = std::mem::take(&mut rule.models);
    rule.conditions.insert(0, Condition::Paths(paths));
    rule
}
