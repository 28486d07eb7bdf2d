//! `compile`: objects → one `GatewayConfig` per gateway, and problems. Pure; called by the operator, by
//! `penstock up` and by `penstock check`.

mod backend;
mod budget;
mod condition;
mod contradiction;
mod fallback;
mod fan_out;
mod identity;
mod key;
mod parameters;
mod profile;
mod prompts;
mod reach;
mod rescue;
mod rule;
mod scope;
mod service;
mod tasks;
mod tls;

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::config::{
    self, Backend, Budget, Cache, Callers, FORMAT, GatewayConfig, ObjectVersion, Prompt, Tasks,
};
use penstock_core::ids::Id;
use serde::Serialize;

use crate::object::{Kind, ObjectRef, Objects, of_gateway};
use crate::problem::Problem;

pub use key::KeyFacts;

/// What is known about things that objects refer to but that are not objects of ours. `None`: nobody looked, so
/// references are taken to resolve.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Services by namespace and name.
    pub services: Option<BTreeMap<Id, ServiceFacts>>,
    /// Secret → key → first 16 hexadecimal digits of the value's SHA-256.
    pub secrets: Option<BTreeMap<Id, BTreeMap<String, String>>>,
    /// ConfigMap → key → the same.
    pub config_maps: Option<BTreeMap<Id, BTreeMap<String, String>>>,
    /// What the Secrets of VirtualKeys hold, by the VirtualKey.
    pub keys: Option<BTreeMap<Id, KeyFacts>>,
}

/// A Service as far as routing needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceFacts {
    /// Its pod selector; empty for one without.
    pub selector: BTreeMap<String, String>,
    /// Its port numbers and their names.
    pub ports: BTreeMap<u16, Option<String>>,
}

/// The result of [`compile`].
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// One config for each gateway that a policy names.
    pub gateways: BTreeMap<Id, GatewayConfig>,
    /// Everything wrong, sorted.
    pub problems: Vec<Problem>,
    /// Which gateways carry an object. An object without an entry is not referenced by any gateway.
    pub carried_by: BTreeMap<ObjectRef, BTreeSet<Id>>,
}

/// Upper bound of a cache's time to live.
const MAX_CACHE_TTL_HOURS: u64 = 720;

/// Compiles all gateways that `objects` name. Deterministic; a broken object loses only itself.
pub fn compile(objects: &Objects, facts: &Facts) -> Compiled {
    let mut problems = Vec::new();
    let gateways: BTreeSet<Id> = objects
        .policies
        .iter()
        .map(|(id, policy)| Id::new(&id.namespace, &policy.spec.gateway))
        .collect();
    let backends: BTreeMap<&Id, Backend> = objects
        .backends
        .iter()
        .filter_map(|(id, object)| {
            Some((
                id,
                backend::compile(id, &object.spec, &gateways, facts, &mut problems)?,
            ))
        })
        .collect();
    let caches: BTreeMap<&Id, Cache> = objects
        .caches
        .iter()
        .filter_map(|(id, object)| {
            Some((id, compile_cache(id, &object.spec.exact, &mut problems)?))
        })
        .collect();

    let prompts: BTreeMap<&Id, Vec<Prompt>> = objects
        .policies
        .iter()
        .map(|(id, policy)| {
            (
                id,
                prompts::compile(id, &policy.spec.prompts, &mut problems),
            )
        })
        .collect();

    let tasks: BTreeMap<&Id, Tasks> = objects
        .policies
        .iter()
        .filter_map(|(id, policy)| Some((id, tasks::compile(id, &policy.spec, &mut problems)?)))
        .collect();

    let known = rule::Known {
        objects,
        backends: &backends,
        caches: &caches,
        prompts: &prompts,
        tasks: &tasks,
    };
    // Mistakes are told also where no policy makes a gateway yet.
    for gateway in without_policy(objects, &gateways) {
        key::compile(&gateway, objects, facts, &mut problems);
        budget::compile(&gateway, &known, &mut problems);
    }
    let mut compiled = Compiled::default();
    for gateway in gateways {
        let rules = rule::compile(&gateway, &known, &mut problems);
        let callers = key::compile(&gateway, objects, facts, &mut problems);
        let budgets = budget::compile(&gateway, &known, &mut problems);
        let config = assemble(gateway.clone(), &known, rules, callers, budgets);
        for key in referenced(&config, objects) {
            compiled
                .carried_by
                .entry(key)
                .or_default()
                .insert(gateway.clone());
        }
        compiled.gateways.insert(gateway, config);
    }
    problems.sort();
    problems.dedup();
    compiled.problems = problems;
    compiled
}

/// Gateways that objects name and no policy does.
fn without_policy(objects: &Objects, gateways: &BTreeSet<Id>) -> BTreeSet<Id> {
    let keys = objects.keys.iter().map(|(id, key)| (id, &key.spec.gateway));
    let budgets = objects
        .budgets
        .iter()
        .map(|(id, budget)| (id, &budget.spec.gateway));
    let identities = objects
        .identities
        .iter()
        .map(|(id, provider)| (id, &provider.spec.gateway));
    let named = keys.chain(budgets).chain(identities);
    let named = named.map(|(id, gateway)| Id::new(&id.namespace, gateway));
    named
        .filter(|gateway| !gateways.contains(gateway))
        .collect()
}

fn compile_cache(
    id: &Id,
    exact: &crate::cache::Exact,
    problems: &mut Vec<Problem>,
) -> Option<Cache> {
    let object = ObjectRef::new(Kind::SemanticCache, id.clone());
    let mut refuse = |path: &str, message: String| {
        problems.push(Problem::invalid(object.clone(), path, message));
    };
    let ttl = match exact.ttl.parse() {
        Ok(ttl) if ttl.is_zero() || ttl.as_secs() > MAX_CACHE_TTL_HOURS * 3600 => {
            refuse(
                "spec.exact.ttl",
                format!(
                    "{} is out of range: use 1ms to {MAX_CACHE_TTL_HOURS}h",
                    exact.ttl.0
                ),
            );
            None
        }
        Ok(ttl) => Some(ttl),
        Err(err) => {
            refuse("spec.exact.ttl", err.to_string());
            None
        }
    };
    let mib = u64::try_from(exact.max_size_mib)
        .ok()
        .filter(|mib| (1..=65_536).contains(mib));
    if mib.is_none() {
        refuse(
            "spec.exact.maxSizeMib",
            format!("{} is out of range: use 1 to 65536", exact.max_size_mib),
        );
    }
    Some(Cache {
        ttl_ms: u64::try_from(ttl?.as_millis()).ok()?,
        max_bytes: mib? * 1024 * 1024,
    })
}

/// Puts together what the rules refer to, and nothing else.
fn assemble(
    gateway: Id,
    known: &rule::Known<'_>,
    rules: Vec<config::Rule>,
    callers: Option<Callers>,
    budgets: BTreeMap<Id, Budget>,
) -> GatewayConfig {
    let objects = known.objects;
    let (backends, caches) = used(known, &rules);
    let mut versions = BTreeMap::new();
    let mut note = |kind, id: &Id, generation: Option<i64>, hash: String| {
        let key = ObjectRef::new(kind, id.clone()).to_string();
        versions.insert(
            key,
            ObjectVersion {
                generation: generation.unwrap_or(0),
                hash,
            },
        );
    };
    for (id, backend) in &backends {
        let generation = objects
            .backends
            .get(id)
            .and_then(|object| object.metadata.generation);
        note(Kind::LLMBackend, id, generation, fragment_hash(backend));
    }
    for (id, cache) in &caches {
        let generation = objects
            .caches
            .get(id)
            .and_then(|object| object.metadata.generation);
        note(Kind::SemanticCache, id, generation, fragment_hash(cache));
    }
    for (id, key) in callers.iter().flat_map(|callers| &callers.keys) {
        let object = objects.keys.get(id);
        let generation = object.and_then(|object| object.metadata.generation);
        note(Kind::VirtualKey, id, generation, fragment_hash(key));
    }
    for (id, provider) in callers.iter().flat_map(|callers| &callers.identities) {
        let object = objects.identities.get(id);
        let generation = object.and_then(|object| object.metadata.generation);
        let hash = fragment_hash(provider);
        note(Kind::IdentityProvider, id, generation, hash);
    }
    for (id, budget) in &budgets {
        let object = objects.budgets.get(id);
        let generation = object.and_then(|object| object.metadata.generation);
        note(Kind::TokenBudget, id, generation, fragment_hash(budget));
    }
    let (mut prompts, mut tasks) = (BTreeMap::new(), BTreeMap::new());
    for (id, policy) in of_gateway(&objects.policies, &gateway) {
        let own: Vec<_> = rules.iter().filter(|rule| rule.policy == *id).collect();
        let said = known.prompts.get(id).filter(|said| !said.is_empty());
        let told = known.tasks.get(id);
        let hash = fragment_hash(&(&own, said, told));
        prompts.extend(said.map(|said| (id.clone(), said.clone())));
        tasks.extend(told.map(|told| (id.clone(), told.clone())));
        note(Kind::RoutingPolicy, id, policy.metadata.generation, hash);
    }
    GatewayConfig {
        format: FORMAT,
        gateway,
        objects: versions,
        backends,
        caches,
        prompts,
        tasks,
        callers,
        budgets,
        rules,
    }
}

/// The backends and caches that rules refer to.
fn used(
    known: &rule::Known<'_>,
    rules: &[config::Rule],
) -> (BTreeMap<Id, Backend>, BTreeMap<Id, Cache>) {
    let used_backends: BTreeSet<&Id> = rules
        .iter()
        .flat_map(|rule| &rule.backends)
        .map(|candidate| &candidate.backend)
        .collect();
    let used_caches: BTreeSet<&Id> = rules
        .iter()
        .filter_map(|rule| rule.cache.as_ref())
        .collect();
    let pick = |id: &&Id| {
        known
            .backends
            .get(*id)
            .map(|backend| ((*id).clone(), backend.clone()))
    };
    let backends: BTreeMap<Id, Backend> = used_backends.iter().filter_map(pick).collect();
    let caches: BTreeMap<Id, Cache> = used_caches
        .iter()
        .filter_map(|id| Some(((*id).clone(), known.caches.get(*id)?.clone())))
        .collect();
    (backends, caches)
}

fn referenced(config: &GatewayConfig, objects: &Objects) -> Vec<ObjectRef> {
    let backends = config
        .backends
        .keys()
        .map(|id| ObjectRef::new(Kind::LLMBackend, id.clone()));
    let caches = config
        .caches
        .keys()
        .map(|id| ObjectRef::new(Kind::SemanticCache, id.clone()));
    let policies = of_gateway(&objects.policies, &config.gateway)
        .map(|(id, _)| ObjectRef::new(Kind::RoutingPolicy, id.clone()));
    let keys = config
        .callers
        .iter()
        .flat_map(|callers| callers.keys.keys());
    let keys = keys.map(|id| ObjectRef::new(Kind::VirtualKey, id.clone()));
    let identities = config
        .callers
        .iter()
        .flat_map(|callers| callers.identities.keys());
    let identities = identities.map(|id| ObjectRef::new(Kind::IdentityProvider, id.clone()));
    let budgets = config.budgets.keys();
    let budgets = budgets.map(|id| ObjectRef::new(Kind::TokenBudget, id.clone()));
    let others = backends.chain(caches).chain(policies);
    let callers = keys.chain(identities);
    others.chain(callers).chain(budgets).collect()
}

fn fragment_hash(fragment: &impl Serialize) -> String {
    // Config types hold strings, integers and maps with string keys: writing them as JSON cannot fail.
    config::sha256_hex(&serde_json::to_vec(fragment).unwrap_or_default())
}

#[cfg(test)]
mod tests;
