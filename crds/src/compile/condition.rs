//! What a rule's `match` says besides model names → `config::Condition`s.

use std::collections::BTreeSet;

use penstock_core::config::{self, Condition, NameMatch, Need, Tasks};
use penstock_core::ids::Id;

use super::rule::Scope;
use crate::policy::{MatchSpec, NeedSpec, TokenRangeSpec};
use crate::problem::Reason;

/// Lists are bounded here too: files are not checked against the schema's maxima.
const MAX_LIST: usize = 16;

pub(super) fn compile(
    policy: &Id,
    spec: &MatchSpec,
    tasks: Option<&Tasks>,
    scope: &mut Scope<'_>,
) -> Vec<Condition> {
    let mut conditions = Vec::new();
    for (path, length) in [
        (".match.paths", spec.paths.len()),
        (".match.methods", spec.methods.len()),
        (".match.headers", spec.headers.len()),
    ] {
        if length > MAX_LIST {
            let message = format!("has {length} entries: use {MAX_LIST} at most");
            scope.refuse(path, Reason::InvalidValue, message);
        }
    }
    if !spec.paths.is_empty() {
        conditions.push(Condition::Paths(paths(&spec.paths, scope)));
    }
    conditions.extend(methods(&spec.methods, scope));
    for (position, header) in spec.headers.iter().enumerate() {
        let at = format!(".match.headers[{position}]");
        let name = header.name.to_ascii_lowercase();
        if !is_token(&name) {
            let message = format!("'{}' is not the name of a header", header.name);
            scope.refuse(&format!("{at}.name"), Reason::InvalidValue, message);
        }
        match NameMatch::read(&header.value) {
            Some(value) => conditions.push(Condition::Header(name, value)),
            None => refuse_star(&format!("{at}.value"), &header.value, scope),
        }
    }
    let range = tokens(".match.promptTokens", spec.prompt_tokens.as_ref(), scope);
    conditions.extend(range.map(|(min, max)| Condition::PromptTokens { min, max }));
    let range = tokens(".match.contextTokens", spec.context_tokens.as_ref(), scope);
    conditions.extend(range.map(|(min, max)| Condition::ContextTokens { min, max }));
    let needs: BTreeSet<Need> = spec.needs.iter().map(|need| self::need(*need)).collect();
    if !needs.is_empty() {
        conditions.push(Condition::Needs(needs));
    }
    conditions.extend(spec.stream.map(Condition::Stream));
    if let Some(region) = &spec.region {
        match NameMatch::read(region) {
            Some(region) => conditions.push(Condition::Region(region)),
            None => refuse_star(".match.region", region, scope),
        }
    }
    conditions.extend(of_callers(spec, scope));
    if let Some(text) = &spec.text {
        match config::pattern(text) {
            Ok(_) => conditions.push(Condition::Text(text.clone())),
            Err(err) => {
                let message = format!("is not a regular expression: {err}");
                scope.refuse(".match.text", Reason::InvalidValue, message);
            }
        }
    }
    if let Some(name) = &spec.task {
        let mut known = tasks.iter().flat_map(|tasks| &tasks.tasks);
        if !known.any(|task| task.name == *name) {
            let message = format!(
                "there is no task '{name}' that can be used in spec.tasks: write it there or correct the name"
            );
            scope.refuse(".match.task", Reason::InvalidValue, message);
        }
        conditions.push(Condition::Task(policy.clone(), name.clone()));
    }
    conditions
}

/// What the caller's key must say.
fn of_callers(spec: &MatchSpec, scope: &mut Scope<'_>) -> Vec<Condition> {
    if spec.attributes.len() > MAX_LIST {
        let message = format!(
            "has {} entries: use {MAX_LIST} at most",
            spec.attributes.len()
        );
        scope.refuse(".match.attributes", Reason::InvalidValue, message);
    }
    let mut conditions = Vec::new();
    let mut add = |at: String, text: &String, condition: &dyn Fn(NameMatch) -> Condition| {
        match NameMatch::read(text) {
            Some(wanted) => conditions.push(condition(wanted)),
            None => refuse_star(&at, text, scope),
        }
    };
    if let Some(team) = &spec.team {
        add(".match.team".to_owned(), team, &Condition::Team);
    }
    if let Some(user) = &spec.user {
        add(".match.user".to_owned(), user, &Condition::User);
    }
    for (name, value) in &spec.attributes {
        let at = format!(".match.attributes.{name}");
        add(at, value, &|value| {
            Condition::Attribute(name.clone(), value)
        });
    }
    conditions
}

fn methods(methods: &[String], scope: &mut Scope<'_>) -> Option<Condition> {
    for (position, method) in methods.iter().enumerate() {
        if !is_token(method) || method.bytes().any(|byte| byte.is_ascii_lowercase()) {
            let message = format!("'{method}' is not a method: write one such as GET");
            let at = format!(".match.methods[{position}]");
            scope.refuse(&at, Reason::InvalidValue, message);
        }
    }
    (!methods.is_empty()).then(|| Condition::Methods(methods.iter().cloned().collect()))
}

fn paths(paths: &[String], scope: &mut Scope<'_>) -> Vec<NameMatch> {
    let mut matches = Vec::new();
    for (position, path) in paths.iter().enumerate() {
        let at = format!(".match.paths[{position}]");
        match NameMatch::read(path) {
            _ if !path.starts_with('/') => {
                let message = format!("'{path}' is not a path: begin with '/'");
                scope.refuse(&at, Reason::InvalidValue, message);
            }
            Some(path) => matches.push(path),
            None => refuse_star(&at, path, scope),
        }
    }
    matches
}

/// The bounds of a range of tokens.
fn tokens(
    at: &str,
    range: Option<&TokenRangeSpec>,
    scope: &mut Scope<'_>,
) -> Option<(Option<u32>, Option<u32>)> {
    let range = range?;
    let bound = |value: Option<i32>| value.map(u32::try_from).transpose().ok().flatten();
    let (min, max) = (bound(range.min), bound(range.max));
    let is_empty = min.zip(max).is_some_and(|(min, max)| min > max);
    let is_negative = min.is_none() && range.min.is_some() || max.is_none() && range.max.is_some();
    if is_empty || is_negative || (min.is_none() && max.is_none()) {
        let message = "set min, max or both, from 0 and min not above max".to_owned();
        scope.refuse(at, Reason::InvalidValue, message);
        return None;
    }
    Some((min, max))
}

fn need(spec: NeedSpec) -> Need {
    match spec {
        NeedSpec::Vision => Need::Vision,
        NeedSpec::Audio => Need::Audio,
        NeedSpec::Tools => Need::Tools,
        NeedSpec::JsonSchema => Need::JsonSchema,
    }
}

fn refuse_star(at: &str, text: &str, scope: &mut Scope<'_>) {
    let message = format!("'{text}': write a text, or a beginning followed by one '*' at the end");
    scope.refuse(at, Reason::InvalidValue, message);
}

/// RFC 9110, 5.6.2.
pub(super) fn is_token(name: &str) -> bool {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(is_token)
}
