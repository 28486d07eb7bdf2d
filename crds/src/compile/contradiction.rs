//! Which rules no request can reach, because what their `match` says never holds together.

use penstock_core::config::NameMatch;
use penstock_core::names::{CALL_PATHS, OPEN_CALL_PATHS, OWN_PATHS};

use super::rule::Scope;
use crate::policy::{MatchSpec, NeedSpec};
use crate::problem::Reason;

/// Calls that carry what a user says.
const OF_USERS: [&str; 5] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
];
/// Those among them that are answered, so that the answer takes a part of the context.
const ANSWERED: &[&str] = OF_USERS.split_at(4).0;

/// Calls whose bodies are forms, of which nothing is read but the model.
const FORMS: [&str; 4] = [
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/edits",
    "/v1/images/variations",
];

/// Says where a rule for models, or one for HTTP backends, asks for what there is not.
pub(super) fn check(spec: &MatchSpec, is_service: bool, scope: &mut Scope<'_>) {
    let paths = spec.paths.iter().enumerate();
    let paths = paths.filter(|(_, path)| path.starts_with('/'));
    let paths: Vec<(usize, NameMatch)> = paths
        .filter_map(|(position, path)| Some((position, NameMatch::read(path)?)))
        .collect();
    for (position, path) in &paths {
        let at = format!(".match.paths[{position}]");
        if is_service && is_taken(path) {
            let message = "the gateway takes these requests itself, as calls of models or about them: a rule without \
                           match.models never gets one";
            refuse(&at, message, scope);
        } else if !is_service && !leads_to_a_call(path) {
            let message = format!(
                "no call of a model has this path: use one of {}, or leave out match.models if it is one of an HTTP \
                 backend",
                CALL_PATHS.join(", ")
            );
            refuse(&at, &message, scope);
        }
    }
    if is_service {
        return;
    }
    if paths.iter().any(|(_, path)| leads_to_a_call(path)) {
        check_paths(spec, &paths, scope);
    }
    let has_media = [NeedSpec::Vision, NeedSpec::Audio];
    if spec.context_tokens.is_some() && has_media.iter().any(|need| spec.needs.contains(need)) {
        let message = "how much of a context pictures and sound take is not known: leave it out, or match.needs";
        refuse(".match.contextTokens", message, scope);
    }
    let least = spec.prompt_tokens.as_ref().and_then(|range| range.min);
    let most = spec.context_tokens.as_ref().and_then(|range| range.max);
    if let Some((least, most)) = least.zip(most).filter(|(least, most)| least > most) {
        let message = format!(
            "no request takes up to {most} tokens of a context and has a prompt of {least} or more: raise max, or lower \
             match.promptTokens.min"
        );
        refuse(".match.contextTokens", &message, scope);
    }
}

/// Says where a rule asks for what the calls to its paths do not have.
fn check_paths(spec: &MatchSpec, paths: &[(usize, NameMatch)], scope: &mut Scope<'_>) {
    let leads_to = |calls: &[&str]| {
        let mut matched = paths
            .iter()
            .flat_map(|(_, path)| calls.iter().map(move |call| path.matches(call)));
        matched.any(|matched| matched)
    };
    let offers_tools = [NeedSpec::Tools, NeedSpec::JsonSchema];
    let shows_media = [NeedSpec::Vision, NeedSpec::Audio];
    let has_prompt = spec.prompt_tokens.as_ref().and_then(|range| range.min);
    let read: Vec<&str> = CALL_PATHS
        .into_iter()
        .filter(|call| !FORMS.contains(call))
        .collect();
    for (field, is_set, calls) in [
        ("task", spec.task.is_some(), &OF_USERS[..]),
        (
            "needs",
            offers_tools.iter().any(|need| spec.needs.contains(need)),
            &OF_USERS[..],
        ),
        (
            "needs",
            shows_media.iter().any(|need| spec.needs.contains(need)),
            &read,
        ),
        ("text", spec.text.is_some(), &read),
        ("promptTokens", has_prompt.is_some_and(|min| min > 0), &read),
        ("contextTokens", spec.context_tokens.is_some(), ANSWERED),
    ] {
        if is_set && !leads_to(calls) {
            let message = format!(
                "no call to match.paths has what this looks at: only those to {} do",
                calls.join(", ")
            );
            refuse(&format!(".match.{field}"), &message, scope);
        }
    }
}

fn refuse(at: &str, message: &str, scope: &mut Scope<'_>) {
    scope.refuse(at, Reason::UnreachableRule, message.to_owned());
}

/// Whether some call of a model has such a path.
fn leads_to_a_call(path: &NameMatch) -> bool {
    let is_open = |open: &&str| match path {
        NameMatch::Exact(path) => path.len() > open.len() && path.starts_with(*open),
        NameMatch::Prefix(prefix) => prefix.starts_with(*open) || open.starts_with(prefix),
    };
    CALL_PATHS.iter().any(|call| path.matches(call)) || OPEN_CALL_PATHS.iter().any(is_open)
}

/// Whether the gateway takes all requests to such a path.
fn is_taken(path: &NameMatch) -> bool {
    match path {
        NameMatch::Exact(path) => {
            CALL_PATHS.contains(&path.as_str()) || OWN_PATHS.contains(&path.as_str())
        }
        NameMatch::Prefix(prefix) => prefix.starts_with("/v1/models/"),
    }
}
