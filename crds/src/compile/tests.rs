use penstock_core::config::{NameMatch, Need, Strategy, Target};
use proptest::prelude::*;

use super::*;
use crate::manifest::{self, File};

mod budgets;
mod contradiction;
mod fallback;
mod fan_out;
mod health;
mod identities;
mod keys;
mod parameters;
mod profile;
mod prompts;
mod region;
mod rescue;
mod resumable;
mod services;
mod tasks;

fn objects(text: &str) -> Objects {
    let (manifests, problems) = manifest::read(&[File {
        path: "test.yaml".into(),
        text: text.into(),
    }]);
    assert_eq!(problems, []);
    manifests.objects
}

fn backend(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

fn policy(name: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {{name: {name}}}\n\
         spec: {{rules: [{rules}]}}\n"
    )
}

fn rule(name: &str, models: &str, backend: &str) -> String {
    format!("{{name: {name}, match: {{models: [{models}]}}, backends: [{{name: {backend}}}]}}")
}

fn messages(compiled: &Compiled) -> Vec<String> {
    compiled
        .problems
        .iter()
        .map(|p| format!("{} {} {}", p.object, p.path, p.reason.name()))
        .collect()
}

fn only(compiled: &Compiled) -> &GatewayConfig {
    &compiled.gateways[&Id::new("default", "default")]
}

const POOL: &str = "{pool: {model: m}}";

#[test]
fn pool_and_rule_become_a_route_to_the_pools_service() {
    let text = backend("chat", POOL) + &policy("p", &rule("r", "chat", "chat"));
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let config = only(&compiled);
    assert_eq!(config.rules[0].models, [NameMatch::Exact("chat".into())]);
    assert_eq!(config.rules[0].strategy, Strategy::PeakEwma);
    let target = &config.backends[&Id::new("default", "chat")].target;
    assert!(
        matches!(target, Target::Endpoints { service_port, .. } if service_port.to_string() == "default/chat-pool:8000")
    );
    assert_eq!(config.objects.len(), 2);
}

#[test]
fn backend_needs_exactly_one_form() {
    for spec in ["{}", "{pool: {model: m}, external: {url: 'https://a/v1'}}"] {
        let compiled = compile(&objects(&backend("chat", spec)), &Facts::default());
        assert_eq!(
            messages(&compiled),
            ["LLMBackend/default/chat spec InvalidValue"]
        );
    }
}

#[test]
fn missing_backend_leaves_the_rule_without_candidates_rather_than_without_effect() {
    let text = backend("any", POOL)
        + &policy(
            "p",
            &format!("{}, {}", rule("a", "chat", "gone"), rule("b", "'*'", "any")),
        );
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/p spec.rules[0].backends[0].name BackendNotFound"]
    );
    assert_eq!(only(&compiled).rules[0].backends, []);
    assert_eq!(only(&compiled).rules.len(), 2);
}

#[test]
fn exact_names_come_before_longer_prefixes_before_any() {
    let rules = [
        rule("any", "'*'", "chat"),
        rule("short", "'g*'", "chat"),
        rule("mixed", "'gpt-*', exact", "chat"),
    ];
    let text = backend("chat", POOL) + &policy("p", &rules.join(", "));
    let compiled = compile(&objects(&text), &Facts::default());
    let order: Vec<_> = only(&compiled)
        .rules
        .iter()
        .map(|rule| format!("{}:{:?}", rule.name, rule.models))
        .collect();
    assert_eq!(
        order,
        [
            r#"mixed:[Exact("exact")]"#,
            r#"mixed:[Prefix("gpt-")]"#,
            r#"short:[Prefix("g")]"#,
            r#"any:[Prefix("")]"#
        ]
    );
}

#[test]
fn name_that_an_earlier_rule_takes_is_unreachable() {
    let text = backend("chat", POOL)
        + &policy("b", &rule("r", "chat", "chat"))
        + &policy("a", &rule("r", "chat", "chat"));
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/b spec.rules[0].match.models[0] UnreachableRule"]
    );
    assert_eq!(only(&compiled).rules.len(), 1);
}

#[test]
fn gateways_own_service_is_refused_by_name_by_selector_and_by_url() {
    let rules = policy("p", &rule("r", "chat", "chat"));
    for spec in [
        "{service: {name: default-gateway, port: 80}}",
        "{external: {url: 'http://default-gateway.default.svc.cluster.local/v1'}}",
        "{external: {url: 'http://default-gateway:80/v1'}}",
    ] {
        let compiled = compile(
            &objects(&(backend("chat", spec) + &rules)),
            &Facts::default(),
        );
        assert!(
            messages(&compiled)[0].ends_with("RoutingLoop"),
            "{spec}: {:?}",
            compiled.problems
        );
        assert_eq!(only(&compiled).backends.len(), 0);
    }
    let selector = BTreeMap::from([("penstock.dev/gateway".to_owned(), "default".to_owned())]);
    let alias = ServiceFacts {
        selector,
        ports: BTreeMap::from([(80, None)]),
    };
    let facts = Facts {
        services: Some(BTreeMap::from([(Id::new("default", "alias"), alias)])),
        ..Facts::default()
    };
    let compiled = compile(
        &objects(&(backend("chat", "{service: {name: alias, port: 80}}") + &rules)),
        &facts,
    );
    assert!(messages(&compiled)[0].ends_with("RoutingLoop"));
}

#[test]
fn service_port_is_checked_and_its_name_taken_when_services_are_known() {
    let service = ServiceFacts {
        selector: BTreeMap::new(),
        ports: BTreeMap::from([(8000, Some("api".to_owned()))]),
    };
    let facts = Facts {
        services: Some(BTreeMap::from([(Id::new("default", "engine"), service)])),
        ..Facts::default()
    };
    let rules = policy("p", &rule("r", "chat", "chat"));
    let text = backend("chat", "{service: {name: engine, port: 8000}}") + &rules;
    let compiled = compile(&objects(&text), &facts);
    assert_eq!(compiled.problems, []);
    let target = &only(&compiled).backends[&Id::new("default", "chat")].target;
    assert!(matches!(target, Target::Endpoints { port_name: Some(name), .. } if name == "api"));
    let text = backend("chat", "{service: {name: engine, port: 81}}") + &rules;
    assert_eq!(
        messages(&compile(&objects(&text), &facts)),
        ["LLMBackend/default/chat spec.service.port ServiceNotFound"]
    );
}

#[test]
fn resources_are_quantities() {
    let text = backend(
        "chat",
        "{pool: {model: m, resources: {requests: {cpu: 4}, limits: {memory: 16GB}}}}",
    );
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(
        messages(&compiled),
        ["LLMBackend/default/chat spec.pool.resources.limits.memory InvalidValue"]
    );
}

#[test]
fn credential_carries_the_version_and_never_the_value() {
    let spec = "{external: {url: 'https://a/v1', credential: {secret: keys, key: token}}}";
    let text = backend("chat", spec) + &policy("p", &rule("r", "chat", "chat"));
    let keys = BTreeMap::from([("token".to_owned(), "0123456789abcdef".to_owned())]);
    let facts = Facts {
        secrets: Some(BTreeMap::from([(Id::new("default", "keys"), keys)])),
        ..Facts::default()
    };
    let compiled = compile(&objects(&text), &facts);
    let credential = only(&compiled).backends[&Id::new("default", "chat")]
        .credential
        .clone()
        .unwrap();
    assert_eq!(
        (credential.id.as_str(), credential.version.as_str()),
        ("keys_token", "0123456789abcdef")
    );
    let none = Facts {
        secrets: Some(BTreeMap::new()),
        ..Facts::default()
    };
    assert_eq!(
        messages(&compile(&objects(&text), &none)),
        ["LLMBackend/default/chat spec.external.credential SecretNotFound"]
    );
}

#[test]
fn values_out_of_range_name_the_range() {
    let text = backend(
        "chat",
        "{pool: {model: m, drain: 48h, scaling: {minReplicas: 4, maxReplicas: 2, kvCacheUtilizationPercent: 150, ttftP90: 0s}}}",
    );
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(
        messages(&compiled),
        [
            "LLMBackend/default/chat spec.pool.drain InvalidValue",
            "LLMBackend/default/chat spec.pool.scaling InvalidValue",
            "LLMBackend/default/chat spec.pool.scaling.kvCacheUtilizationPercent InvalidValue",
            "LLMBackend/default/chat spec.pool.scaling.ttftP90 InvalidValue",
        ]
    );
    assert!(compiled.problems[2].message.contains("1 to 100"));
}

#[test]
fn an_api_version_is_azures_alone_and_a_region_bedrocks() {
    let messages_of = |external: &str| {
        let text = backend(
            "chat",
            &format!("{{external: {{url: 'https://a', {external}}}}}"),
        );
        let compiled = compile(&objects(&text), &Facts::default());
        compiled
            .problems
            .iter()
            .map(|problem| problem.path.clone())
            .collect::<Vec<_>>()
    };
    let none: [&str; 0] = [];
    assert_eq!(
        messages_of("protocol: AzureOpenAI, apiVersion: '2024-10-21'"),
        none
    );
    assert_eq!(messages_of("protocol: AzureOpenAI"), none);
    for external in [
        "apiVersion: '2024-10-21'",
        "protocol: AzureOpenAI, apiVersion: 'a&b'",
    ] {
        assert_eq!(messages_of(external), ["spec.external.apiVersion"]);
    }
    assert_eq!(messages_of("protocol: Bedrock, region: eu-central-1"), none);
    for external in [
        "protocol: Bedrock",
        "protocol: Bedrock, region: 'a/b'",
        "region: eu-central-1",
    ] {
        assert_eq!(messages_of(external), ["spec.external.region"]);
    }
}

#[test]
fn editing_one_object_changes_no_other_hash() {
    let before = backend("a", POOL)
        + &backend("b", POOL)
        + &policy("p", &rule("r", "x", "a"))
        + &policy("q", &rule("r", "y", "b"));
    let after = before.replace("models: [y]", "models: [z]");
    let hashes = |text: &str| {
        only(&compile(&objects(text), &Facts::default()))
            .objects
            .clone()
    };
    let (before, after) = (hashes(&before), hashes(&after));
    let changed: Vec<_> = before
        .iter()
        .filter(|(key, version)| after[*key] != **version)
        .map(|(key, _)| key)
        .collect();
    assert_eq!(changed, ["RoutingPolicy/default/q"]);
}

#[test]
fn star_inside_a_name_is_refused() {
    let text = backend("chat", POOL) + &policy("p", &rule("r", "'a*b', ok", "chat"));
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/p spec.rules[0].match.models[0] InvalidValue"]
    );
}

proptest! {
    #[test]
    fn order_of_documents_does_not_matter(seed in prop::collection::vec(any::<u16>(), 8)) {
        let mut documents = [backend("a", POOL), backend("b", "{external: {url: 'https://b/v1'}}"), backend("c", "{service: {name: s, port: 1}}"),
            policy("p", &rule("r", "x, 'y*'", "a")), policy("q", &rule("r", "z, x", "b")), policy("s", &rule("r", "'*'", "gone"))];
        let one = compile(&objects(&documents.concat()), &Facts::default());
        for (i, random) in seed.iter().enumerate() {
            let length = documents.len();
            documents.swap(i % length, usize::from(*random) % length);
        }
        let other = compile(&objects(&documents.concat()), &Facts::default());
        prop_assert_eq!(one.problems, other.problems);
        for (gateway, config) in &one.gateways {
            prop_assert_eq!(config.digest().unwrap(), other.gateways[gateway].digest().unwrap());
        }
    }
}

fn matching(name: &str, matches: &str) -> String {
    format!("{{name: {name}, match: {{models: [chat], {matches}}}, backends: [{{name: chat}}]}}")
}

fn compile_rules(rules: &[String]) -> Compiled {
    let text = backend("chat", POOL) + &policy("p", &rules.join(", "));
    compile(&objects(&text), &Facts::default())
}

#[test]
fn rules_with_more_conditions_come_first_and_those_of_others_are_no_obstacle() {
    let compiled = compile_rules(&[
        rule("plain", "chat", "chat"),
        matching("tools", "needs: [Tools]"),
        matching("long-tools", "needs: [Tools], promptTokens: {min: 1000}"),
    ]);
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let rules = &only(&compiled).rules;
    let names: Vec<&str> = rules.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["long-tools", "tools", "plain"]);
}

#[test]
fn a_rule_behind_those_that_take_all_of_it_is_unreachable() {
    for (earlier, later) in [
        ("paths: ['/v1/chat/*']", "paths: ['/v1/chat/*']"),
        ("paths: ['/v1/chat/*']", "paths: ['/v1/chat/completions']"),
        (
            "paths: ['/v1/*']",
            "paths: ['/v1/chat/*', '/v1/embeddings']",
        ),
        ("promptTokens: {min: 100}", "promptTokens: {min: 500}"),
        ("promptTokens: {max: 9}", "promptTokens: {min: 3, max: 9}"),
        ("region: '*'", "region: 'eu-*'"),
        ("region: 'eu-*'", "region: eu-west-1"),
        (
            "headers: [{name: X-Team, value: '*'}]",
            "headers: [{name: x-team, value: red}]",
        ),
        ("contextTokens: {min: 9}", "contextTokens: {min: 10}"),
        ("needs: [Vision]", "needs: [Tools, Vision]"),
        ("text: '.*'", "text: sql"),
        ("stream: true", "stream: true"),
    ] {
        let compiled = compile_rules(&[matching("a", earlier), matching("b", later)]);
        assert_eq!(
            messages(&compiled),
            ["RoutingPolicy/default/p spec.rules[1].match.models[0] UnreachableRule"],
            "{earlier}, then {later}"
        );
    }
    // A rule about models takes nothing but calls of models.
    for (paths, unreachable) in [("'/v1/*'", 1), ("'/v1/chat/*'", 0)] {
        let all = matching("a", &format!("paths: [{paths}]"));
        let compiled = compile_rules(&[all, rule("b", "chat", "chat")]);
        assert_eq!(messages(&compiled).len(), unreachable, "{paths}");
    }
    let compiled = compile_rules(&[
        matching("a", "stream: true"),
        matching("b", "stream: false"),
        rule("c", "chat", "chat"),
    ]);
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/p spec.rules[2].match.models[0] UnreachableRule"]
    );
}

#[test]
fn rules_for_lengths_of_prompts_may_take_all_of_them_together() {
    let short = matching("short", "promptTokens: {max: 99}");
    let streams = matching("streams", "promptTokens: {min: 100}, stream: true");
    let others = matching("others", "promptTokens: {min: 100}, stream: false");
    let last = rule("last", "chat", "chat");
    let all = [short.clone(), streams.clone(), others.clone(), last.clone()];
    assert_eq!(
        messages(&compile_rules(&all)),
        ["RoutingPolicy/default/p spec.rules[3].match.models[0] UnreachableRule"]
    );
    let longer = matching("others", "promptTokens: {min: 101}, stream: false");
    for rest in [
        [short.clone(), streams.clone(), last.clone()],
        [short.clone(), longer, last.clone()],
        [streams, others, last],
    ] {
        assert_eq!(messages(&compile_rules(&rest)), [] as [&str; 0]);
    }
}

#[test]
fn rules_for_lengths_of_contexts_take_all_that_have_one() {
    let short = matching("short", "contextTokens: {max: 99}");
    let long = matching("long", "contextTokens: {min: 100}");
    let some = matching("some", "contextTokens: {min: 50, max: 150}");
    let unreached = compile_rules(&[short.clone(), long.clone(), some.clone()]);
    assert_eq!(
        messages(&unreached),
        ["RoutingPolicy/default/p spec.rules[2].match.models[0] UnreachableRule"]
    );
    // Of what has none nobody knows how long it is.
    let any = rule("any", "chat", "chat");
    let longer = matching("long", "contextTokens: {min: 101}");
    for rest in [[short.clone(), long, any], [short, longer, some]] {
        assert_eq!(messages(&compile_rules(&rest)), [] as [&str; 0]);
    }
}

#[test]
fn rules_for_paths_may_take_all_of_them_together() {
    let chat = matching("chat", "paths: ['/v1/chat/completions']");
    let others = matching("others", "paths: ['/v1/embeddings', '/v1/rerank']");
    let both = matching("both", "paths: ['/v1/chat/completions', '/v1/embeddings']");
    assert_eq!(
        messages(&compile_rules(&[
            chat.clone(),
            others.clone(),
            both.clone()
        ])),
        ["RoutingPolicy/default/p spec.rules[2].match.models[0] UnreachableRule"]
    );
    let streams = matching("chat", "paths: ['/v1/chat/completions'], stream: true");
    for rest in [
        [chat, both.clone()],
        [others, both.clone()],
        [streams, both],
    ] {
        assert_eq!(messages(&compile_rules(&rest)), [] as [&str; 0]);
    }
}

#[test]
fn a_rule_behind_those_that_leave_something_is_reached() {
    for (earlier, later) in [
        ("paths: ['/v1/chat/completions']", "paths: ['/v1/chat/*']"),
        (
            "paths: ['/v1/chat/*']",
            "paths: ['/v1/chat/completions', '/v1/embeddings']",
        ),
        ("promptTokens: {min: 500}", "promptTokens: {min: 100}"),
        ("promptTokens: {min: 5, max: 9}", "promptTokens: {min: 5}"),
        ("region: eu-west-1", "region: 'eu-*'"),
        (
            "headers: [{name: x-team, value: '*'}]",
            "headers: [{name: x-unit, value: red}]",
        ),
        ("needs: [Tools, Vision]", "needs: [Vision]"),
        ("text: sql", "text: '.*'"),
        ("text: '.*'", "region: eu"),
        ("stream: true", "stream: false"),
        ("stream: true", "needs: [Tools]"),
    ] {
        let compiled = compile_rules(&[matching("a", earlier), matching("b", later)]);
        assert_eq!(
            messages(&compiled),
            [] as [&str; 0],
            "{earlier}, then {later}"
        );
    }
}

#[test]
fn a_condition_that_cannot_hold_or_be_read_is_named() {
    for (matches, path) in [
        ("text: '('", "text"),
        ("text: '(a{1000}){1000}'", "text"),
        ("promptTokens: {min: 9, max: 8}", "promptTokens"),
        ("promptTokens: {}", "promptTokens"),
        ("contextTokens: {min: 9, max: 8}", "contextTokens"),
        ("promptTokens: {min: -1}", "promptTokens"),
        ("paths: [v1]", "paths[0]"),
        ("paths: ['/v1/*/x']", "paths[0]"),
        ("headers: [{name: 'x y', value: a}]", "headers[0].name"),
        ("headers: [{name: x, value: 'a*b'}]", "headers[0].value"),
    ] {
        let compiled = compile_rules(&[matching("a", matches)]);
        let expected = format!("RoutingPolicy/default/p spec.rules[0].match.{path} InvalidValue");
        assert_eq!(messages(&compiled), [expected], "{matches}");
    }
}

#[test]
fn heartbeats_are_neither_noise_nor_too_late() {
    for (every, expected) in [("15s", Some(15_000)), ("500ms", None), ("6m", None)] {
        let rule = format!(
            "{{name: r, match: {{models: [m]}}, backends: [{{name: chat}}], heartbeat: {every}}}"
        );
        let compiled = compile_rules(&[rule]);
        let path = "RoutingPolicy/default/p spec.rules[0].heartbeat InvalidValue";
        match expected {
            Some(ms) => assert_eq!(only(&compiled).rules[0].heartbeat_ms, Some(ms)),
            None => assert_eq!(messages(&compiled), [path]),
        }
    }
}

#[test]
fn round_robin_is_weighted_by_either_name() {
    for name in ["RoundRobin", "Weighted"] {
        let rule =
            rule("r", "chat", "chat").replace("name: r", &format!("name: r, strategy: {name}"));
        let text = backend("chat", POOL) + &policy("p", &rule);
        let compiled = compile(&objects(&text), &Facts::default());
        assert_eq!(messages(&compiled), [] as [&str; 0], "{rule}");
        assert_eq!(only(&compiled).rules[0].strategy, Strategy::RoundRobin);
    }
}

#[test]
fn what_belongs_to_a_strategy_is_refused_elsewhere() {
    for (fields, wrong) in [
        ("strategy: CostLatency, slo: {ttft: 800ms}", None),
        ("strategy: CostLatency", Some(".slo")),
        ("strategy: CostLatency, slo: {ttft: 0s}", Some(".slo.ttft")),
        ("slo: {ttft: 800ms}", Some(".slo")),
        ("strategy: Adaptive", None),
        ("strategy: Adaptive, slo: {ttft: 800ms, tpot: 40ms}", None),
        (
            "strategy: Adaptive, slo: {ttft: 800ms, tpot: 0s}",
            Some(".slo.tpot"),
        ),
        (
            "strategy: CostLatency, slo: {ttft: 800ms, tpot: 40ms}",
            Some(".slo.tpot"),
        ),
        ("strategy: Region", None),
        ("strategy: Region, regionPenalty: 50ms", None),
        ("regionPenalty: 50ms", Some(".regionPenalty")),
        ("strategy: Sticky, hashOn: {header: x-session-id}", None),
        ("strategy: Hash, hashOn: {of: User}", None),
        ("strategy: Hash, hashOn: {}", Some(".hashOn")),
        (
            "strategy: Hash, hashOn: {of: Team, header: x}",
            Some(".hashOn"),
        ),
        ("hashOn: {header: x-session-id}", Some(".hashOn")),
    ] {
        let rule =
            format!("{{name: r, match: {{models: [chat]}}, backends: [{{name: chat}}], {fields}}}");
        let compiled = compile(
            &objects(&(backend("chat", POOL) + &policy("p", &rule))),
            &Facts::default(),
        );
        let path = wrong.map(|path| format!("spec.rules[0]{path}"));
        assert_eq!(
            compiled
                .problems
                .first()
                .map(|problem| problem.path.clone()),
            path
        );
    }
}

const TOOL: &str = "{service: {name: tool, port: 80, protocol: HTTP}}";
