//! TokenBudgets → what a gateway's callers may take.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::tz::TimeZone;
use penstock_core::config::{
    Budget, Enforcement, Limit, Per, Period, Protocol, Selects, Unit, Window,
};
use penstock_core::ids::Id;

use super::rule::Known;
use super::scope::{MAX_LIST, Scope};
use crate::budget::{
    CalendarSpec, EnforcementSpec, LimitSpec, PerSpec, SelectorSpec, TokenBudgetSpec, UnitSpec,
    WindowSpec,
};
use crate::object::{Kind, of_gateway};
use crate::problem::{Problem, Reason};

/// Bounded here too: files are not checked against the schema's maxima.
const MAX_LIMITS: usize = 16;
const MAX_NAME: usize = 40;
const MAX_AMOUNT: u64 = 1_000_000_000_000_000;
const MAX_OUTPUT_TOKENS: u32 = 1_048_576;
const MAX_UNPRICED: u64 = 1_000_000_000;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_hours(8784);

/// The budgets of `gateway`. One with a mistake lets nothing through that it selects, if it is hard; else, and where it
/// cannot be told what it selects, it is left out. Its condition says so.
pub(super) fn compile(
    gateway: &Id,
    known: &Known<'_>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<Id, Budget> {
    let compiled = of_gateway(&known.objects.budgets, gateway)
        .filter_map(|(id, object)| Some((id.clone(), one(id, &object.spec, known, problems)?)));
    compiled.collect()
}

fn one(
    id: &Id,
    spec: &TokenBudgetSpec,
    known: &Known<'_>,
    problems: &mut Vec<Problem>,
) -> Option<Budget> {
    let mut scope = Scope::new(Kind::TokenBudget, id, problems);
    let nothing = SelectorSpec::default();
    let selector = spec.selector.as_ref().unwrap_or(&nothing);
    let selects = selects(id, spec, selector, known, &mut scope);
    let selects_some = scope.is_usable();
    let limits = limits(&spec.limits, &mut scope);
    let max_output_tokens = u32::try_from(spec.max_output_tokens)
        .ok()
        .filter(|tokens| (1..=MAX_OUTPUT_TOKENS).contains(tokens));
    if max_output_tokens.is_none() {
        let message = format!(
            "{} is out of range: use 1 to {MAX_OUTPUT_TOKENS}",
            spec.max_output_tokens
        );
        scope.invalid("spec.maxOutputTokens", message);
    }
    let cache_hit_percent = u32::try_from(spec.cache_hit_percent)
        .ok()
        .filter(|percent| *percent <= 100);
    if cache_hit_percent.is_none() {
        let message = format!("{} is out of range: use 0 to 100", spec.cache_hit_percent);
        scope.invalid("spec.cacheHitPercent", message);
    }
    let unpriced = spec.unpriced_micro_usd.map(u64::try_from);
    if unpriced.is_some_and(|usd| usd.is_err() || usd.is_ok_and(|usd| usd > MAX_UNPRICED)) {
        let message = format!("out of range: use 0 to {MAX_UNPRICED}");
        scope.invalid("spec.unpricedMicroUsd", message);
    }
    let enforcement = match spec.enforcement {
        EnforcementSpec::Hard => Enforcement::Hard,
        EnforcementSpec::Soft => Enforcement::Soft,
        EnforcementSpec::Shadow => Enforcement::Shadow,
    };
    if enforcement == Enforcement::Hard && limits.iter().any(|limit| limit.unit.is_of_tokens()) {
        check_bounded(selector, &selects, known, &mut scope);
    }
    let is_broken = !scope.is_usable();
    let is_told = !is_broken || selects_some && enforcement == Enforcement::Hard;
    is_told.then(|| Budget {
        selects,
        per: match spec.per {
            PerSpec::Budget => Per::Budget,
            PerSpec::Team => Per::Team,
            PerSpec::User => Per::User,
            PerSpec::Key => Per::Key,
        },
        limits: if is_broken { Vec::new() } else { limits },
        enforcement,
        max_output_tokens: max_output_tokens.unwrap_or(1),
        unpriced_micro_usd: unpriced.and_then(Result::ok),
        cache_hit_percent: cache_hit_percent.unwrap_or(0),
        is_broken,
    })
}

fn selects(
    id: &Id,
    spec: &TokenBudgetSpec,
    selector: &SelectorSpec,
    known: &Known<'_>,
    scope: &mut Scope<'_>,
) -> Selects {
    let of_namespace = |names: &[String]| -> Vec<Id> {
        let names = names.iter();
        names.map(|name| Id::new(&id.namespace, name)).collect()
    };
    let keys = of_namespace(&selector.keys);
    for (position, key) in keys.iter().enumerate() {
        let found = known.objects.keys.get(key);
        if found.is_none_or(|found| found.spec.gateway != spec.gateway) {
            let message = format!(
                "VirtualKey {key} does not exist or is not of gateway '{}': create it or correct the name",
                spec.gateway
            );
            let path = format!("spec.selector.keys[{position}]");
            scope.refuse(&path, Reason::KeyNotFound, message);
        }
    }
    let backends = of_namespace(&selector.backends);
    for (position, backend) in backends.iter().enumerate() {
        if !known.objects.backends.contains_key(backend) {
            let message =
                format!("LLMBackend {backend} does not exist: create it or correct the name");
            let path = format!("spec.selector.backends[{position}]");
            scope.refuse(&path, Reason::BackendNotFound, message);
        }
    }
    scope.at_most("spec.selector.keys", keys.len(), MAX_LIST);
    scope.at_most("spec.selector.backends", backends.len(), MAX_LIST);
    Selects {
        teams: scope.names("spec.selector.teams", &selector.teams),
        users: scope.names("spec.selector.users", &selector.users),
        models: scope.names("spec.selector.models", &selector.models),
        keys: keys.into_iter().collect(),
        backends: backends.into_iter().collect(),
    }
}

fn limits(specs: &[LimitSpec], scope: &mut Scope<'_>) -> Vec<Limit> {
    if specs.is_empty() || specs.len() > MAX_LIMITS {
        let message = format!("has {} entries: use 1 to {MAX_LIMITS}", specs.len());
        scope.invalid("spec.limits", message);
    }
    let mut names = BTreeSet::new();
    let mut limits = Vec::new();
    for (position, spec) in specs.iter().enumerate() {
        let path = format!("spec.limits[{position}]");
        let is_plain =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if spec.name.is_empty() || spec.name.len() > MAX_NAME || !spec.name.bytes().all(is_plain) {
            let message = format!("use 1 to {MAX_NAME} of a-z, 0-9 and '-'");
            scope.invalid(&format!("{path}.name"), message);
        }
        if !names.insert(&spec.name) {
            let message = format!("'{}' is there already: give each its own name", spec.name);
            scope.invalid(&format!("{path}.name"), message);
        }
        let unit = unit(spec.unit);
        let max = u64::try_from(spec.max)
            .ok()
            .filter(|max| (1..=MAX_AMOUNT).contains(max));
        if max.is_none() {
            let message = format!("{} is out of range: use 1 to {MAX_AMOUNT}", spec.max);
            scope.invalid(&format!("{path}.max"), message);
        }
        let path = format!("{path}.window");
        let window = match (&spec.window, unit) {
            (None, Unit::Concurrency) => None,
            (Some(_), Unit::Concurrency) => {
                scope.invalid(
                    &path,
                    "Concurrency counts what is under way: leave window out",
                );
                None
            }
            (None, _) => {
                let message = "say in which time, such as {rolling: 1h} or {calendar: Month}";
                scope.invalid(&path, message);
                None
            }
            (Some(spec), _) => window(&path, spec, scope),
        };
        limits.push(Limit {
            name: spec.name.clone(),
            unit,
            max: max.unwrap_or(1),
            window,
        });
    }
    limits
}

fn unit(spec: UnitSpec) -> Unit {
    match spec {
        UnitSpec::Requests => Unit::Requests,
        UnitSpec::Tokens => Unit::Tokens,
        UnitSpec::InputTokens => Unit::InputTokens,
        UnitSpec::OutputTokens => Unit::OutputTokens,
        UnitSpec::MicroUsd => Unit::MicroUsd,
        UnitSpec::Concurrency => Unit::Concurrency,
    }
}

fn window(path: &str, spec: &WindowSpec, scope: &mut Scope<'_>) -> Option<Window> {
    match (&spec.rolling, spec.calendar) {
        (Some(rolling), None) => {
            if spec.time_zone.is_some() {
                let message = "it is about calendar: remove it";
                scope.invalid(&format!("{path}.timeZone"), message);
            }
            let path = format!("{path}.rolling");
            match rolling.parse() {
                Ok(length) if (SHORTEST..=LONGEST).contains(&length) => {
                    Some(Window::SlidingMs(u64::try_from(length.as_millis()).ok()?))
                }
                Ok(_) => {
                    let message = format!("{} is out of range: use 1s to 8784h", rolling.0);
                    scope.invalid(&path, message);
                    None
                }
                Err(err) => {
                    scope.invalid(&path, err.to_string());
                    None
                }
            }
        }
        (None, Some(calendar)) => {
            let time_zone = spec.time_zone.clone().unwrap_or_else(|| "UTC".to_owned());
            if TimeZone::get(&time_zone).is_err() {
                let message = format!(
                    "'{time_zone}' is no name of the IANA time zone database: write one such as Europe/Berlin"
                );
                scope.invalid(&format!("{path}.timeZone"), message);
            }
            let period = match calendar {
                CalendarSpec::Day => Period::Day,
                CalendarSpec::Week => Period::Week,
                CalendarSpec::Month => Period::Month,
            };
            Some(Window::Calendar { period, time_zone })
        }
        _ => {
            scope.invalid(path, "write either rolling or calendar");
            None
        }
    }
}

/// What cannot be told how long an answer may be cannot be kept to a hard limit.
fn check_bounded(
    selector: &SelectorSpec,
    selects: &Selects,
    known: &Known<'_>,
    scope: &mut Scope<'_>,
) {
    for (position, name) in selector.backends.iter().enumerate() {
        let mut backends = selects.backends.iter();
        let backend = backends.find(|id| id.name == *name);
        let backend = backend.and_then(|id| known.backends.get(id));
        if backend.is_some_and(|backend| backend.protocol == Protocol::Http) {
            let message = format!(
                "LLMBackend {name} speaks plain HTTP, so its answers cannot be bounded in tokens: count Requests, or make enforcement Soft"
            );
            scope.invalid(&format!("spec.selector.backends[{position}]"), message);
        }
    }
}
