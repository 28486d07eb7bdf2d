//! Rules of all policies of one gateway → `config::Rule`s in match order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use penstock_core::config::{
    Backend, Cache, Condition, HashOn, Hedge, JoinEmbeddings, NameMatch, OnUnsupported, Prompt,
    Repeat, Retry, Rule, RuleBackend, Slo, Strategy, Streaming, Tasks, Timeouts, Urgency,
};
use penstock_core::ids::Id;

use super::{
    condition, contradiction, fallback, fan_out, parameters, prompts, reach, rescue, service, tasks,
};
use crate::object::{Kind, ObjectRef, Objects, of_gateway};
use crate::policy::{
    AnonymousSpec, HashOfSpec, OnUnsupportedSpec, RepeatSpec, RuleBackendSpec, RuleSpec,
    StrategySpec, StreamingSpec, UrgencySpec,
};
use crate::problem::{Problem, Reason};
use crate::text::DurationText;

/// Attempts in all when the rule says nothing: one failure of a node and one of its neighbour are survived.
const DEFAULT_ATTEMPTS: u32 = 3;
const DEFAULT_CONNECT: Duration = Duration::from_secs(2);
/// Longer than the longest prefill that still makes sense; a queue that long is a scaling fault, not a routing one.
const DEFAULT_FIRST_TOKEN: Duration = Duration::from_mins(5);
/// An engine under preemption may pause for tens of seconds between tokens.
const DEFAULT_IDLE: Duration = Duration::from_mins(2);
/// Longer than any answer of today's models takes; a request that waits in all loops at once ends here.
const DEFAULT_TOTAL: Duration = Duration::from_hours(1);
/// A round trip across an ocean.
const DEFAULT_REGION_PENALTY_MS: u64 = 100;
const MAX_TIMEOUT: Duration = Duration::from_hours(24);
/// Longer, and callers notice the wait more than the gain.
const MAX_JOIN_MS: u64 = 100;

/// Proxies wait 30 s to some minutes; more often than each second is noise.
const HEARTBEAT_MS: std::ops::RangeInclusive<u64> = 1_000..=300_000;

/// Shorter, and no caller is back in time; longer, and engines work for callers who will not come back: that is what
/// background responses are for.
const RESUMABLE_MS: std::ops::RangeInclusive<u64> = 1_000..=600_000;

/// What the rules may refer to.
pub(super) struct Known<'a> {
    /// As written.
    pub objects: &'a Objects,
    /// The backends that compiled.
    pub backends: &'a BTreeMap<&'a Id, Backend>,
    /// The caches that compiled.
    pub caches: &'a BTreeMap<&'a Id, Cache>,
    /// Those that compiled, by policy.
    pub prompts: &'a BTreeMap<&'a Id, Vec<Prompt>>,
    /// The same.
    pub tasks: &'a BTreeMap<&'a Id, Tasks>,
}

/// Exact names first, then longer prefixes, then more conditions, then policy, then the order written.
type Order = (u8, Reverse<usize>, Reverse<usize>, Id, usize);

pub(super) fn compile(gateway: &Id, known: &Known<'_>, problems: &mut Vec<Problem>) -> Vec<Rule> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut services: Vec<Entry> = Vec::new();
    for (id, policy) in of_gateway(&known.objects.policies, gateway) {
        check_rule_list(id, &policy.spec.rules, problems);
        for (index, spec) in policy.spec.rules.iter().enumerate() {
            let mut scope = Scope {
                object: ObjectRef::new(Kind::RoutingPolicy, id.clone()),
                index,
                problems,
            };
            let mut rule = compile_rule(id, spec, known, &mut scope);
            rule.anonymous = policy.spec.anonymous == Some(AnonymousSpec::Allow);
            let is_service = service::check(spec, &rule, known, &mut scope);
            contradiction::check(&spec.matches, is_service, &mut scope);
            let (classes, entries) = if is_service {
                rule.conditions
                    .retain(|condition| !matches!(condition, Condition::Paths(_)));
                let paths = service::paths(&spec.matches.paths);
                (by_class(paths), &mut services)
            } else {
                (
                    by_class(models(&spec.matches.models, &mut scope)),
                    &mut entries,
                )
            };
            for (class, models) in classes {
                let (models, positions) = models.into_iter().unzip();
                let conditions = Reverse(rule.conditions.len());
                let order = (class.0, Reverse(class.1), conditions, id.clone(), index);
                entries.push((
                    order,
                    Rule {
                        models,
                        ..rule.clone()
                    },
                    positions,
                ));
            }
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    services.sort_by(|a, b| a.0.cmp(&b.0));
    let mut rules = reach::drop_unreachable(entries, "models", problems);
    let services = reach::drop_unreachable(services, "paths", problems);
    let told = of_gateway(&known.objects.policies, gateway)
        .filter_map(|(id, _)| Some((id, known.tasks.get(id)?)));
    tasks::check_models(told, &rules, problems);
    rules.extend(services.into_iter().map(service::by_path));
    rules
}

/// A rule, which for the time being has its paths for models if it is for HTTP backends; and their positions.
pub(super) type Entry = (Order, Rule, Vec<usize>);

pub(super) struct Scope<'a> {
    object: ObjectRef,
    index: usize,
    problems: &'a mut Vec<Problem>,
}

impl Scope<'_> {
    pub(super) fn refuse(&mut self, path: &str, reason: Reason, message: String) {
        let path = format!("spec.rules[{}]{path}", self.index);
        self.problems.push(Problem {
            object: self.object.clone(),
            path,
            reason,
            message,
        });
    }
}

fn check_rule_list(id: &Id, rules: &[RuleSpec], problems: &mut Vec<Problem>) {
    let object = ObjectRef::new(Kind::RoutingPolicy, id.clone());
    let mut refuse = |path: String, message: String| {
        problems.push(Problem::invalid(object.clone(), path, message));
    };
    if rules.is_empty() {
        refuse(
            "spec.rules".to_owned(),
            "write at least one rule with match.models and backends".to_owned(),
        );
    }
    let mut names = BTreeSet::new();
    for (index, rule) in rules.iter().enumerate() {
        if !names.insert(&rule.name) {
            let message = format!(
                "the name '{}' is used twice: rules of a policy need different names",
                rule.name
            );
            refuse(format!("spec.rules[{index}].name"), message);
        }
    }
}

fn urgency(spec: Option<UrgencySpec>) -> Urgency {
    match spec {
        Some(UrgencySpec::Low) => Urgency::Low,
        None | Some(UrgencySpec::Normal) => Urgency::Normal,
        Some(UrgencySpec::High) => Urgency::High,
    }
}

fn compile_candidate(
    policy: &Id,
    spec: &RuleBackendSpec,
    path: &str,
    known: &Known<'_>,
    scope: &mut Scope<'_>,
) -> Option<RuleBackend> {
    let id = Id::new(&policy.namespace, &spec.name);
    if !known.objects.backends.contains_key(&id) {
        let message = format!("LLMBackend {id} does not exist: create it or correct the name");
        scope.refuse(&format!("{path}.name"), Reason::BackendNotFound, message);
        return None;
    }
    if !known.backends.contains_key(&id) {
        let message = format!("LLMBackend {id} is not accepted: mend what its own problems say");
        scope.refuse(&format!("{path}.name"), Reason::BackendNotAccepted, message);
        return None;
    }
    let weight = number(spec.weight, 1, 1000, &format!("{path}.weight"), scope);
    let priority = number(spec.priority, 0, 15, &format!("{path}.priority"), scope);
    Some(RuleBackend {
        backend: id,
        weight: weight?,
        priority: priority?,
        model_override: spec.model_override.clone(),
        after: fallback::after(spec),
    })
}

fn compile_rule(policy: &Id, spec: &RuleSpec, known: &Known<'_>, scope: &mut Scope<'_>) -> Rule {
    if spec.backends.is_empty() {
        let message = "name at least one LLMBackend".to_owned();
        scope.refuse(".backends", Reason::InvalidValue, message);
    }
    fallback::check(spec, scope);
    let backends = spec.backends.iter().enumerate();
    let backends = backends
        .filter_map(|(position, spec)| {
            let path = format!(".backends[{position}]");
            compile_candidate(policy, spec, &path, known, scope)
        })
        .collect();
    let own_prompts = known.prompts.get(policy).map_or(&[][..], Vec::as_slice);
    let attempts = spec.retry.as_ref().map_or(Some(DEFAULT_ATTEMPTS), |retry| {
        number(retry.attempts, 1, 10, ".retry.attempts", scope)
    });
    Rule {
        policy: policy.clone(),
        name: spec.name.clone(),
        models: Vec::new(),
        conditions: condition::compile(policy, &spec.matches, known.tasks.get(policy), scope),
        // Its policy says so.
        anonymous: false,
        backends,
        strategy: strategy(spec.strategy),
        hash_on: compile_hash_on(spec, scope),
        region_penalty_ms: compile_region_penalty(spec, scope),
        slo: compile_slo(spec, scope),
        retry: Retry {
            attempts: attempts.unwrap_or(DEFAULT_ATTEMPTS),
            on: fallback::retry_on(spec),
            repeat: repeat(spec),
            rescue_streams: rescue::compile(policy, spec, known, scope),
        },
        hedge: compile_hedge(spec, scope),
        fan_out: fan_out::compile(spec, scope),
        resumable_ms: compile_resumable(spec, scope),
        join_embeddings: compile_join(spec, scope),
        timeouts: compile_timeouts(spec, scope),
        heartbeat_ms: compile_heartbeat(spec, scope),
        parameters: parameters::compile(spec.parameters.as_ref(), scope),
        prompt: prompts::of_rule(spec.prompt.as_ref(), own_prompts, scope),
        on_unsupported: match spec.on_unsupported {
            Some(OnUnsupportedSpec::Drop) => OnUnsupported::Drop,
            Some(OnUnsupportedSpec::Refuse) | None => OnUnsupported::Refuse,
        },
        urgency: urgency(spec.urgency),
        streaming: match spec.streaming {
            Some(StreamingSpec::Buffered) => Streaming::Buffered,
            Some(StreamingSpec::Passed) | None => Streaming::Passed,
        },
        cache: compile_cache_ref(policy, spec, known, scope),
    }
}

fn repeat(spec: &RuleSpec) -> Repeat {
    match spec.retry.as_ref().and_then(|retry| retry.repeat) {
        Some(RepeatSpec::Always) => Repeat::Always,
        Some(RepeatSpec::Keyed) => Repeat::Keyed,
        Some(RepeatSpec::Safe) | None => Repeat::Safe,
    }
}

fn strategy(spec: StrategySpec) -> Strategy {
    match spec {
        StrategySpec::Hash => Strategy::Hash,
        StrategySpec::LeastRequests => Strategy::LeastRequests,
        StrategySpec::PeakEwma => Strategy::PeakEwma,
        StrategySpec::PowerOfTwo => Strategy::PowerOfTwo,
        StrategySpec::PrefixAffinity => Strategy::PrefixAffinity,
        StrategySpec::RoundRobin | StrategySpec::Weighted => Strategy::RoundRobin,
        StrategySpec::Latency => Strategy::Latency,
        StrategySpec::Cost => Strategy::Cost,
        StrategySpec::Capability => Strategy::Capability,
        StrategySpec::CostLatency => Strategy::CostLatency,
        StrategySpec::KvAware => Strategy::KvAware,
        StrategySpec::Region => Strategy::Region,
        StrategySpec::Sticky => Strategy::Sticky,
        StrategySpec::Adaptive => Strategy::Adaptive,
    }
}

pub(super) fn number(
    value: i32,
    least: u32,
    most: u32,
    path: &str,
    scope: &mut Scope<'_>,
) -> Option<u32> {
    let number = u32::try_from(value)
        .ok()
        .filter(|value| (least..=most).contains(value));
    if number.is_none() {
        scope.refuse(
            path,
            Reason::InvalidValue,
            format!("{value} is out of range: use {least} to {most}"),
        );
    }
    number
}

fn compile_hash_on(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<HashOn> {
    let hash_on = spec.hash_on.as_ref()?;
    if !matches!(spec.strategy, StrategySpec::Hash | StrategySpec::Sticky) {
        let message = "has no effect without strategy: Hash or Sticky".to_owned();
        scope.refuse(".hashOn", Reason::InvalidValue, message);
    }
    match (&hash_on.header, hash_on.of) {
        (Some(header), None) => {
            let header = header.to_ascii_lowercase();
            if !condition::is_token(&header) {
                let message = format!("'{header}' is not the name of a header");
                scope.refuse(".hashOn.header", Reason::InvalidValue, message);
            }
            Some(HashOn::Header(header))
        }
        (None, Some(of)) => Some(match of {
            HashOfSpec::Conversation => HashOn::Conversation,
            HashOfSpec::User => HashOn::User,
            HashOfSpec::Team => HashOn::Team,
        }),
        _ => {
            let message = "write either header or of".to_owned();
            scope.refuse(".hashOn", Reason::InvalidValue, message);
            None
        }
    }
}

fn compile_slo(spec: &RuleSpec, scope: &mut Scope<'_>) -> Slo {
    let is_needed = spec.strategy == StrategySpec::CostLatency;
    let is_adaptive = spec.strategy == StrategySpec::Adaptive;
    let Some(slo) = &spec.slo else {
        if is_needed {
            let message = "CostLatency needs a target: set slo.ttft".to_owned();
            scope.refuse(".slo", Reason::InvalidValue, message);
        }
        return Slo::default();
    };
    if !is_needed && !is_adaptive {
        let message = "has no effect without strategy: CostLatency or Adaptive".to_owned();
        scope.refuse(".slo", Reason::InvalidValue, message);
    }
    if slo.tpot.is_some() && !is_adaptive {
        let message = "has no effect without strategy: Adaptive".to_owned();
        scope.refuse(".slo.tpot", Reason::InvalidValue, message);
    }
    let tpot = slo.tpot.as_ref();
    Slo {
        ttft_ms: ms(".slo.ttft", &slo.ttft, scope),
        tpot_ms: tpot.and_then(|tpot| ms(".slo.tpot", tpot, scope)),
    }
}

fn compile_region_penalty(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<u64> {
    let is_used = spec.strategy == StrategySpec::Region;
    let Some(penalty) = &spec.region_penalty else {
        return is_used.then_some(DEFAULT_REGION_PENALTY_MS);
    };
    if !is_used {
        let message = "has no effect without strategy: Region".to_owned();
        scope.refuse(".regionPenalty", Reason::InvalidValue, message);
    }
    ms(".regionPenalty", penalty, scope)
}

fn compile_hedge(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<Hedge> {
    let hedge = spec.hedge.as_ref()?;
    let extra_percent = number(
        hedge.max_extra_percent,
        1,
        100,
        ".hedge.maxExtraPercent",
        scope,
    );
    let after_ms = ms(".hedge.after", &hedge.after, scope);
    Some(Hedge {
        after_ms: after_ms?,
        extra_percent: extra_percent?,
    })
}

fn compile_join(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<JoinEmbeddings> {
    let join = spec.join_embeddings.as_ref()?;
    let path = ".joinEmbeddings.within";
    let within_ms = ms(path, &join.within, scope);
    if within_ms.is_some_and(|ms| ms > MAX_JOIN_MS) {
        let message = "out of range: use 1ms to 100ms".to_owned();
        scope.refuse(path, Reason::InvalidValue, message);
    }
    let max_inputs = number(join.max_inputs, 2, 2048, ".joinEmbeddings.maxInputs", scope);
    Some(JoinEmbeddings {
        within_ms: within_ms?.min(MAX_JOIN_MS),
        max_inputs: max_inputs?,
    })
}

/// A time to wait, in ms.
pub(super) fn ms(path: &str, text: &DurationText, scope: &mut Scope<'_>) -> Option<u64> {
    match text.parse() {
        Ok(value) if value.is_zero() || value > MAX_TIMEOUT => {
            let message = "out of range: use 1ms to 24h".to_owned();
            scope.refuse(path, Reason::InvalidValue, message);
            None
        }
        Ok(value) => u64::try_from(value.as_millis()).ok(),
        Err(err) => {
            scope.refuse(path, Reason::InvalidValue, err.to_string());
            None
        }
    }
}

fn compile_heartbeat(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<u64> {
    let every = ms(".heartbeat", spec.heartbeat.as_ref()?, scope)?;
    if HEARTBEAT_MS.contains(&every) {
        return Some(every);
    }
    let message = "out of range: use 1s to 5m".to_owned();
    scope.refuse(".heartbeat", Reason::InvalidValue, message);
    None
}

fn compile_resumable(spec: &RuleSpec, scope: &mut Scope<'_>) -> Option<u64> {
    let resumable_ms = ms(".resumable", spec.resumable.as_ref()?, scope)?;
    if RESUMABLE_MS.contains(&resumable_ms) {
        return Some(resumable_ms);
    }
    let message = "out of range: use 1s to 10m".to_owned();
    scope.refuse(".resumable", Reason::InvalidValue, message);
    None
}

fn compile_timeouts(spec: &RuleSpec, scope: &mut Scope<'_>) -> Timeouts {
    let timeouts = spec.timeouts.clone().unwrap_or_default();
    let mut or = |path: &str, text: Option<DurationText>, default: Duration| {
        let default = u64::try_from(default.as_millis()).unwrap_or(u64::MAX);
        text.and_then(|text| ms(path, &text, scope))
            .unwrap_or(default)
    };
    let total_ms = or(".timeouts.total", timeouts.total, DEFAULT_TOTAL);
    Timeouts {
        connect_ms: or(".timeouts.connect", timeouts.connect, DEFAULT_CONNECT),
        // A model that reasons may compute for longer than any prompt takes to be read.
        whole_ms: timeouts.first_token.is_none().then_some(total_ms),
        first_token_ms: or(
            ".timeouts.firstToken",
            timeouts.first_token,
            DEFAULT_FIRST_TOKEN,
        ),
        idle_ms: or(".timeouts.idle", timeouts.idle, DEFAULT_IDLE),
        total_ms,
    }
}

fn compile_cache_ref(
    policy: &Id,
    spec: &RuleSpec,
    known: &Known<'_>,
    scope: &mut Scope<'_>,
) -> Option<Id> {
    let id = Id::new(&policy.namespace, &spec.cache.as_ref()?.name);
    if known.caches.contains_key(&id) {
        return Some(id);
    }
    let message = if known.objects.caches.contains_key(&id) {
        format!("SemanticCache {id} is not accepted: mend what its own problems say")
    } else {
        format!("SemanticCache {id} does not exist: create it or correct the name")
    };
    scope.refuse(".cache.name", Reason::CacheNotFound, message);
    None
}

/// 0 exact, 1 prefix (with its length), 2 any.
type Class = (u8, usize);

/// A rule's model names, each with its position in the list.
fn models(models: &[String], scope: &mut Scope<'_>) -> Vec<(NameMatch, usize)> {
    if models.is_empty() {
        let message =
            "name at least one model, '*' for any, or the paths of HTTP backends".to_owned();
        scope.refuse(".match.models", Reason::InvalidValue, message);
    }
    let mut found = Vec::new();
    for (position, text) in models.iter().enumerate() {
        match NameMatch::read(text) {
            Some(model) => found.push((model, position)),
            None => refuse_star(text, position, scope),
        }
    }
    found
}

/// Groups names by how specific they are.
fn by_class(names: Vec<(NameMatch, usize)>) -> BTreeMap<Class, Vec<(NameMatch, usize)>> {
    let mut classes: BTreeMap<Class, Vec<_>> = BTreeMap::new();
    for (model, position) in names {
        let class = match &model {
            NameMatch::Exact(_) => (0, 0),
            NameMatch::Prefix(prefix) if prefix.is_empty() => (2, 0),
            NameMatch::Prefix(prefix) => (1, prefix.len()),
        };
        classes.entry(class).or_default().push((model, position));
    }
    classes
}

fn refuse_star(text: &str, position: usize, scope: &mut Scope<'_>) {
    let message = format!(
        "'{text}' is not a model name: write a name, or a beginning followed by one '*' at the end"
    );
    scope.refuse(
        &format!(".match.models[{position}]"),
        Reason::InvalidValue,
        message,
    );
}
