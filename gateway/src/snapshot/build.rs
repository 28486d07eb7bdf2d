//! From config, endpoints and credentials to what requests use. Live state of what was there before is kept.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderName, HeaderValue, Uri};
use penstock_core::config::{
    self, GatewayConfig, NameMatch, OnUnsupported, Protocol, Streaming, Target,
};
use penstock_core::endpoints::Endpoints;
use penstock_core::ids::{BackendId, Id};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{
    Address, Backend, Candidate, Credential, Endpoint, EndpointLive, ExactRules, Hedge, Join,
    Model, Parts, Rule, Snapshot, Tier, Version, tier,
};
use crate::budgets::Budgets;
use crate::cache::exact::{ExactCache, Maker};
use crate::conditions::Conditions;
use crate::models::Models;
use crate::outbound::{ANTHROPIC_KEY, AZURE_KEY, GOOGLE_KEY};
use crate::outlook::Outlook;
use crate::principal::Principals;
use crate::prompts::Library;
use crate::provider::Rest;
use crate::provider::bedrock::{self, Signer};
use crate::provider::target::Targets;
use crate::source::Credentials;
use crate::tasks::TaskSet;
use crate::wish::HashOn;

impl Snapshot {
    /// Resolves everything. `digest` is the config's.
    pub fn build(
        config: Arc<GatewayConfig>,
        digest: String,
        endpoints: &Endpoints,
        credentials: &Credentials,
        previous: Option<&Self>,
        parts: Parts<'_>,
    ) -> Self {
        let mut rejected = Vec::new();
        let backends: BTreeMap<BackendId, Arc<Backend>> = config
            .backends
            .iter()
            .map(|(id, backend)| {
                let before = previous.and_then(|previous| previous.backends.get(id));
                let built = match build_backend(id, backend, endpoints, credentials, before, parts)
                {
                    Ok(built) => Arc::new(built),
                    Err(fallback) => {
                        rejected.push(format!("LLMBackend/{id}"));
                        before.map_or_else(|| Arc::new(*fallback), Arc::clone)
                    }
                };
                (id.clone(), built)
            })
            .collect();
        let built = Built {
            digest: digest.as_str().into(),
            caches: build_caches(&config, previous),
            libraries: build_libraries(&config),
            tasks: build_tasks(&config, previous),
            backends,
        };
        let old_rules: HashMap<&str, &Arc<Rule>> = previous
            .iter()
            .flat_map(|previous| &previous.rules)
            .map(|rule| (rule.label.as_str(), rule))
            .collect();
        let rules: Vec<Arc<Rule>> = config
            .rules
            .iter()
            .map(|rule| {
                let label = format!("{}/{}", rule.policy, rule.name);
                let before = old_rules.get(label.as_str()).copied();
                if !is_resolved(rule, &config, &built.tasks) {
                    rejected.push(format!("RoutingPolicy/{}", rule.policy));
                    if let Some(before) = before {
                        return Arc::clone(before);
                    }
                }
                let built = build_rule(label, rule, &config, &built, before, parts);
                Arc::new(built)
            })
            .collect();
        rejected.dedup();
        let (exact, prefixes) = build_matches(&config);
        let indexed = config.rules.iter().enumerate();
        let services = indexed.filter(|(_, rule)| rule.models.is_empty());
        let services = services.map(|(index, _)| index).collect();
        let models = Models::new(&config);
        let principals = config.callers.as_ref().map(|callers| {
            Principals::new(callers, credentials, parts.key_sets, parts.stored_keys)
        });
        let budgets = Budgets::new(&config.budgets);
        Self {
            config,
            digest,
            rejected,
            models,
            principals,
            budgets,
            rules,
            exact,
            prefixes,
            services,
            backends: built.backends,
            caches: built.caches,
            tasks: built.tasks,
        }
    }
}

/// What rules refer to.
struct Built {
    /// The config's.
    digest: Arc<str>,
    backends: BTreeMap<BackendId, Arc<Backend>>,
    caches: BTreeMap<Id, (config::Cache, Arc<ExactCache>)>,
    /// By policy.
    libraries: BTreeMap<Id, Arc<Library>>,
    /// The same.
    tasks: BTreeMap<Id, Arc<TaskSet>>,
}

/// A backend, or (as the error) a form of it that no request can use.
fn build_backend(
    id: &BackendId,
    backend: &config::Backend,
    endpoints: &Endpoints,
    credentials: &Credentials,
    previous: Option<&Arc<Backend>>,
    parts: Parts<'_>,
) -> Result<Backend, Box<Backend>> {
    let mut built = without_endpoints(id, backend, credentials, previous, parts);
    let may_connect = secure(backend, &mut built, credentials, previous, parts);
    let patience = Arc::clone(&built.patience);
    let fresh = |address: &Address| {
        let (patience, queue) = (Arc::clone(&patience), Arc::clone(parts.queue));
        Arc::new(EndpointLive::new(
            parts.workers,
            id.clone(),
            address,
            patience,
            queue,
        ))
    };
    let mut live = |address: &Address| {
        let live = previous
            .and_then(|previous| previous.lives.get(address))
            .map_or_else(|| fresh(address), Arc::clone);
        built.lives.insert(address.clone(), Arc::clone(&live));
        live
    };
    let targets = |base: &str| Targets::new(backend.protocol, base, backend.api_version.as_deref());
    let mut ready = Vec::new();
    match &backend.target {
        Target::Endpoints { service_port, .. } => {
            for endpoint in endpoints.services.get(service_port).into_iter().flatten() {
                let address = Address::Socket(endpoint.address);
                let live = live(&address);
                let host = HeaderValue::from_str(&endpoint.address.to_string());
                if let (true, Ok(host), Some(targets)) = (endpoint.ready, host, targets("/v1")) {
                    if !previous.is_some_and(|previous| previous.has(&address)) {
                        live.ready_ms.store(parts.now_ms, Ordering::Relaxed);
                    }
                    ready.push(Arc::new(Endpoint {
                        address,
                        host,
                        targets,
                        zone: endpoint.zone.clone(),
                        revision: endpoint.revision.clone(),
                        secured: built.secured.clone(),
                        speaks_h2c: backend.transport.h2c,
                        live,
                    }));
                }
            }
        }
        Target::Url(url) => match origin(url, targets) {
            Some((origin, host, targets)) => {
                let address = Address::Origin(origin);
                let live = live(&address);
                ready.push(Arc::new(Endpoint {
                    address,
                    host,
                    targets,
                    zone: None,
                    revision: None,
                    secured: built.secured.clone(),
                    speaks_h2c: backend.transport.h2c,
                    live,
                }));
            }
            None => return Err(Box::new(built)),
        },
    }
    if may_connect {
        built.endpoints = ready;
    }
    built.outlook = outlook(&backend.target, &built, previous, parts.now_ms);
    Ok(built)
}

fn outlook(
    target: &Target,
    built: &Backend,
    previous: Option<&Arc<Backend>>,
    now_ms: u64,
) -> Outlook {
    let sleeps = match target {
        Target::Endpoints { may_sleep, .. } => *may_sleep && built.lives.is_empty(),
        Target::Url(_) => false,
    };
    let before = previous.map(|previous| previous.outlook);
    Outlook::new(before, built.endpoints.len(), sleeps, now_ms)
}

fn without_endpoints(
    id: &BackendId,
    backend: &config::Backend,
    credentials: &Credentials,
    previous: Option<&Arc<Backend>>,
    parts: Parts<'_>,
) -> Backend {
    let label = id.to_string();
    Backend {
        id: id.clone(),
        label: HeaderValue::from_str(&label).unwrap_or(HeaderValue::from_static("?")),
        protocol: backend.protocol,
        profile: backend.profile.clone(),
        endpoints: Vec::new(),
        outlook: Outlook::Down,
        credential: credential(backend, credentials),
        caller_credentials: backend.caller_credentials,
        secured: None,
        unsecured: None,
        ledger: parts.ledger.backend(id),
        turn: previous.map_or_else(Arc::default, |previous| Arc::clone(&previous.turn)),
        patience: previous.map_or_else(Arc::default, |previous| Arc::clone(&previous.patience)),
        lives: BTreeMap::new(),
    }
}

/// Makes TLS towards a backend, or keeps the last good form of it. Whether the backend may be connected to: what wants
/// TLS is never spoken to without.
fn secure(
    backend: &config::Backend,
    built: &mut Backend,
    credentials: &Credentials,
    previous: Option<&Arc<Backend>>,
    parts: Parts<'_>,
) -> bool {
    let wanted = backend.transport.tls.as_ref();
    let host = match &backend.target {
        Target::Endpoints { .. } if wanted.is_none() => return true,
        Target::Endpoints { .. } => String::new(),
        Target::Url(url) => match url.parse::<Uri>() {
            Ok(uri) if uri.scheme_str() == Some("https") => {
                let host = uri.host().unwrap_or_default();
                host.trim_matches(['[', ']']).to_owned()
            }
            _ => return true,
        },
    };
    let before = previous.and_then(|previous| previous.secured.as_ref());
    match parts.trust.secure(&host, wanted, credentials, before) {
        Ok(secured) => built.secured = Some(secured),
        Err(err) => {
            built.unsecured = Some(err);
            built.secured = before.cloned();
        }
    }
    built.secured.is_some()
}

/// Scheme and authority, `Host` header and request targets of a base URL.
fn origin(
    url: &str,
    targets: impl Fn(&str) -> Option<Targets>,
) -> Option<(String, HeaderValue, Targets)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri
        .scheme_str()
        .filter(|scheme| matches!(*scheme, "http" | "https"))?;
    let authority = uri
        .authority()
        .filter(|authority| !authority.as_str().contains('@'))?;
    let host = HeaderValue::from_str(authority.as_str()).ok()?;
    let targets = targets(uri.path().trim_end_matches('/'))?;
    Some((format!("{scheme}://{authority}"), host, targets))
}

/// An older version than the config names is used until the new one arrives.
fn credential(backend: &config::Backend, credentials: &Credentials) -> Credential {
    let Some(credential) = &backend.credential else {
        return Credential::None;
    };
    let (name, scheme) = match backend.protocol {
        Protocol::OpenAi | Protocol::Bedrock | Protocol::Http => (AUTHORIZATION, "Bearer "),
        Protocol::Anthropic => (ANTHROPIC_KEY, ""),
        Protocol::AzureOpenAi => (AZURE_KEY, ""),
        Protocol::Gemini => (GOOGLE_KEY, ""),
    };
    let Some(credential) = credentials.values.get(&credential.id) else {
        return Credential::Missing;
    };
    // Secrets made from files often end in a line feed, which no header may hold.
    let secret = credential.value.expose().trim_ascii();
    if let (Protocol::Bedrock, Some(keys)) = (backend.protocol, bedrock::read_keys(secret)) {
        let region = backend.region.clone().unwrap_or_default();
        return Credential::Signed(Box::new(Signer { keys, region }));
    }
    match HeaderValue::from_str(&format!("{scheme}{secret}")) {
        Ok(mut value) => {
            value.set_sensitive(true);
            Credential::Header(name, value)
        }
        Err(_) => Credential::Missing,
    }
}

fn build_caches(
    config: &GatewayConfig,
    previous: Option<&Snapshot>,
) -> BTreeMap<Id, (config::Cache, Arc<ExactCache>)> {
    config
        .caches
        .iter()
        .map(|(id, cache)| {
            let store = previous
                .and_then(|previous| previous.caches.get(id))
                .filter(|(before, _)| before == cache)
                .map_or_else(
                    || Arc::new(ExactCache::new(cache.max_bytes, cache.ttl_ms)),
                    |(_, store)| Arc::clone(store),
                );
            (id.clone(), (cache.clone(), store))
        })
        .collect()
}

/// Prompts that cannot be read are missing; the compiler of configs lets none such through.
fn build_libraries(config: &GatewayConfig) -> BTreeMap<Id, Arc<Library>> {
    let libraries = config.prompts.iter();
    let libraries = libraries
        .filter_map(|(policy, prompts)| Some((policy.clone(), Arc::new(Library::new(prompts)?))));
    libraries.collect()
}

/// What was learned of tasks that are the same is kept.
fn build_tasks(config: &GatewayConfig, previous: Option<&Snapshot>) -> BTreeMap<Id, Arc<TaskSet>> {
    let sets = config.tasks.iter().map(|(policy, spec)| {
        let before = previous.and_then(|previous| previous.tasks.get(policy));
        let kept = before.filter(|before| before.spec == *spec).cloned();
        let set = kept.unwrap_or_else(|| TaskSet::new(policy.clone(), spec.clone()));
        (policy.clone(), set)
    });
    sets.collect()
}

/// Whether the config has all that a rule names. The compiler sees to that; a rule that names more is served in its
/// last good form, or refuses.
fn is_resolved(
    rule: &config::Rule,
    config: &GatewayConfig,
    tasks: &BTreeMap<Id, Arc<TaskSet>>,
) -> bool {
    rule.backends
        .iter()
        .all(|candidate| config.backends.contains_key(&candidate.backend))
        && rule
            .cache
            .as_ref()
            .is_none_or(|cache| config.caches.contains_key(cache))
        && Conditions::new(&rule.conditions, tasks).is_some()
        && rule.prompt.as_ref().is_none_or(|wanted| {
            let of_policy = config.prompts.get(&rule.policy).into_iter().flatten();
            of_policy
                .clone()
                .any(|prompt| prompt.name == wanted.name && prompt.version == wanted.version)
        })
}

fn build_hedge(rule: &config::Rule, previous: Option<&Arc<Rule>>) -> Option<Hedge> {
    let hedge = rule.hedge.as_ref()?;
    let before = previous.and_then(|previous| previous.hedge.as_ref());
    Some(Hedge {
        after: Duration::from_millis(hedge.after_ms),
        extra_percent: hedge.extra_percent,
        budget: before.map_or_else(Arc::default, |hedge| Arc::clone(&hedge.budget)),
    })
}

fn version(rule: &config::Rule, config: &GatewayConfig, built: &Built) -> Version {
    let policy = format!("RoutingPolicy/{}", rule.policy);
    let policy = config.objects.get(&policy);
    Version {
        generation: policy.map_or(0, |policy| policy.generation),
        digest: Arc::clone(&built.digest),
    }
}

fn hash_on(rule: &config::Rule) -> HashOn {
    match &rule.hash_on {
        None => HashOn::Body,
        Some(config::HashOn::Header(header)) => {
            HeaderName::try_from(header).map_or(HashOn::Body, HashOn::Header)
        }
        Some(config::HashOn::Conversation) => HashOn::Conversation,
        Some(config::HashOn::User) => HashOn::User,
        Some(config::HashOn::Team) => HashOn::Team,
    }
}

fn build_rule(
    label: String,
    rule: &config::Rule,
    config: &GatewayConfig,
    built: &Built,
    previous: Option<&Arc<Rule>>,
    parts: Parts<'_>,
) -> Rule {
    let prompts = built.libraries.get(&rule.policy).cloned();
    let prompts = prompts.unwrap_or_default();
    let prompt = rule.prompt.as_ref().map(|prompt| prompts.find(prompt));
    // A prompt may say what a model must not do: without it, nobody answers.
    let is_whole = prompt.is_none_or(|found| found.is_some());
    // Weights are shares of those that come together: who comes after other failures is no equal.
    let mut by_order: BTreeMap<_, Vec<&config::RuleBackend>> = BTreeMap::new();
    for candidate in rule.backends.iter().filter(|_| is_whole) {
        let order = (candidate.priority, &candidate.after);
        by_order.entry(order).or_default().push(candidate);
    }
    let tiers = by_order
        .into_values()
        .enumerate()
        .map(|(index, wanted)| {
            let before = previous.and_then(|previous| previous.tiers.get(index));
            build_tier(&label, &wanted, config, &built.backends, before, parts)
        })
        .filter(|tier| !tier.candidates.is_empty())
        .collect();
    let cache = rule.cache.as_ref().and_then(|id| {
        built
            .caches
            .get(id)
            .map(|(_, store)| (id.to_string(), Arc::clone(store)))
    });
    Rule {
        label,
        policy: rule.policy.clone(),
        anonymous: rule.anonymous,
        version: version(rule, config, built),
        conditions: Conditions::new(&rule.conditions, &built.tasks).unwrap_or_default(),
        tiers,
        strategy: rule.strategy,
        hash_on: hash_on(rule),
        region_penalty_ms: Duration::from_millis(rule.region_penalty_ms.unwrap_or(0)).as_secs_f32()
            * 1000.0,
        slo: rule.slo.clone(),
        attempts: usize::try_from(rule.retry.attempts).unwrap_or(1).max(1),
        retry_on: rule.retry.on.clone(),
        repeat: rule.retry.repeat,
        rescues: rule.retry.rescue_streams,
        retries: previous.map_or_else(Arc::default, |previous| Arc::clone(&previous.retries)),
        hedge: build_hedge(rule, previous),
        fan_out: rule.fan_out,
        lengths: previous.map_or_else(Arc::default, |previous| Arc::clone(&previous.lengths)),
        waiting: previous.map_or_else(Arc::default, |previous| Arc::clone(&previous.waiting)),
        patience: previous.map_or_else(Arc::default, |previous| Arc::clone(&previous.patience)),
        join: rule.join_embeddings.as_ref().map(|join| Join {
            within: Duration::from_millis(join.within_ms),
            max_inputs: usize::try_from(join.max_inputs).unwrap_or(usize::MAX),
        }),
        urgency: rule.urgency,
        connect: Duration::from_millis(rule.timeouts.connect_ms),
        first_token: Duration::from_millis(rule.timeouts.first_token_ms),
        whole: Duration::from_millis(rule.timeouts.whole_ms()),
        idle: Duration::from_millis(rule.timeouts.idle_ms),
        total: Duration::from_millis(rule.timeouts.total_ms),
        heartbeat: rule.heartbeat_ms.map(Duration::from_millis),
        parameters: rule.parameters.clone(),
        prompt: prompt.flatten().map(Arc::clone),
        prompts,
        rest: match rule.on_unsupported {
            OnUnsupported::Refuse => Rest::Refuse,
            OnUnsupported::Drop => Rest::Drop,
        },
        buffers: rule.streaming == Streaming::Buffered,
        resumable: rule.resumable_ms.map(Duration::from_millis),
        cache,
    }
}

fn build_tier(
    rule: &str,
    wanted: &[&config::RuleBackend],
    config: &GatewayConfig,
    backends: &BTreeMap<BackendId, Arc<Backend>>,
    previous: Option<&Tier>,
    parts: Parts<'_>,
) -> Tier {
    let mut candidates = Vec::new();
    let mut weights = Vec::new();
    for item in wanted {
        let (Some(backend), Some(settings)) = (
            backends.get(&item.backend),
            config.backends.get(&item.backend),
        ) else {
            continue;
        };
        let model = item.model_override.as_ref().or(settings.model.as_ref());
        let label = item.backend.to_string();
        let handles = previous
            .and_then(|tier| {
                tier.candidates
                    .iter()
                    .find(|candidate| candidate.metrics.backend() == label)
            })
            .map_or_else(
                || parts.metrics.route(rule, &label),
                |candidate| Arc::clone(&candidate.metrics),
            );
        candidates.push(Candidate {
            backend: Arc::clone(backend),
            model: model.map(|name| Model {
                name: name.as_str().into(),
                json: Bytes::from(json!(name).to_string()),
            }),
            after: item.after.clone(),
            maker: maker(&settings.target, model),
            metrics: handles,
        });
        weights.push(item.weight);
    }
    let same = previous.filter(|tier| {
        tier.weights == weights
            && tier
                .candidates
                .iter()
                .map(|a| &a.backend.id)
                .eq(candidates.iter().map(|b| &b.backend.id))
    });
    let wheel = same.map_or_else(
        || Arc::new(Mutex::new(vec![0; weights.len()])),
        |tier| Arc::clone(&tier.wheel),
    );
    let (slots, cumulative) = tier::slots(&candidates, &weights, parts.place);
    Tier {
        candidates,
        weights,
        wheel,
        slots,
        cumulative,
        prefixes: Arc::clone(parts.prefixes),
    }
}

fn maker(target: &Target, model: Option<&String>) -> Maker {
    let mut hash = Sha256::new();
    hash.update(json!({"target": target, "model": model}).to_string());
    hash.finalize().into()
}

fn build_matches(config: &GatewayConfig) -> (ExactRules, Vec<(String, usize)>) {
    let mut exact = ExactRules::new();
    let mut prefixes = Vec::new();
    for (index, rule) in config.rules.iter().enumerate() {
        for model in &rule.models {
            match model {
                NameMatch::Exact(name) => {
                    let rules: &mut Vec<usize> = exact.entry(name.clone()).or_default();
                    rules.push(index);
                }
                NameMatch::Prefix(prefix) => prefixes.push((prefix.clone(), index)),
            }
        }
    }
    (exact, prefixes)
}
