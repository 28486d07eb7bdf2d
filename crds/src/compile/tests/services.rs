//! Rules for HTTP backends.

use super::*;

fn tool_rule(name: &str, matches: &str, rest: &str) -> String {
    format!("{{name: {name}, match: {{{matches}}}, backends: [{{name: tool}}]{rest}}}")
}

#[test]
fn rules_for_http_backends_are_selected_by_their_paths_longer_ones_first() {
    let rules = [
        tool_rule("any", "paths: ['/*']", ""),
        tool_rule("tools", "paths: ['/tools/*', /exact], methods: [GET]", ""),
        tool_rule("keyed", "paths: ['/tools/*']", ", retry: {repeat: Keyed}"),
    ];
    let text = backend("tool", TOOL) + &policy("p", &rules.join(", "));
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let rules = &only(&compiled).rules;
    assert!(rules.iter().all(|rule| rule.models.is_empty()));
    let paths = |rule: &config::Rule| match &rule.conditions[0] {
        config::Condition::Paths(paths) => paths.clone(),
        other => panic!("{other:?}"),
    };
    let order: Vec<_> = rules
        .iter()
        .map(|rule| (rule.name.as_str(), paths(rule)))
        .collect();
    let prefix = |text: &str| NameMatch::Prefix(text.to_owned());
    assert_eq!(
        order,
        [
            ("tools", vec![NameMatch::Exact("/exact".to_owned())]),
            ("tools", vec![prefix("/tools/")]),
            ("keyed", vec![prefix("/tools/")]),
            ("any", vec![prefix("/")]),
        ]
    );
    assert_eq!(rules[2].retry.repeat, config::Repeat::Keyed);
}

#[test]
fn models_and_http_backends_do_not_share_a_rule() {
    let both = backend("tool", TOOL) + &backend("chat", POOL);
    for (rule, problems) in [
        (
            rule("r", "chat", "tool"),
            &["spec.rules[0].backends[0].name InvalidValue"][..],
        ),
        (
            "{name: r, match: {paths: [/x]}, backends: [{name: tool}, {name: chat}]}".to_owned(),
            &["spec.rules[0].backends[1].name InvalidValue"],
        ),
        (
            "{name: r, match: {}, backends: [{name: tool}]}".to_owned(),
            &[
                "spec.rules[0].backends[0].name InvalidValue",
                "spec.rules[0].match.models InvalidValue",
            ],
        ),
        (
            tool_rule("r", "paths: [/x], stream: true", ", strategy: PrefixAffinity, cache: {name: c}"),
            &[
                "spec.rules[0].cache InvalidValue",
                "spec.rules[0].cache.name CacheNotFound",
                "spec.rules[0].match.stream InvalidValue",
                "spec.rules[0].strategy InvalidValue",
            ],
        ),
        (
            "{name: r, match: {models: [m], methods: [GET]}, backends: [{name: chat}], retry: {repeat: Always}}".to_owned(),
            &[
                "spec.rules[0].match.methods InvalidValue",
                "spec.rules[0].retry.repeat InvalidValue",
            ],
        ),
        (
            tool_rule("r", "paths: [x], methods: [get]", ""),
            &[
                "spec.rules[0].match.methods[0] InvalidValue",
                "spec.rules[0].match.paths[0] InvalidValue",
            ],
        ),
    ] {
        let compiled = compile(&objects(&(both.clone() + &policy("p", &rule))), &Facts::default());
        let expected: Vec<String> = problems
            .iter()
            .map(|problem| format!("RoutingPolicy/default/p {problem}"))
            .collect();
        assert_eq!(messages(&compiled), expected, "{rule}");
    }
}

#[test]
fn a_path_that_an_earlier_rule_takes_is_named() {
    let rules = [
        tool_rule("a", "paths: [/x, /y]", ""),
        tool_rule("b", "paths: [/z, /y]", ""),
    ];
    let text = backend("tool", TOOL) + &policy("p", &rules.join(", "));
    let compiled = compile(&objects(&text), &Facts::default());
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/p spec.rules[1].match.paths[1] UnreachableRule"]
    );
}

#[test]
fn what_an_http_backend_has_no_use_for_is_refused() {
    for (spec, path) in [
        (
            "{service: {name: s, port: 80, protocol: HTTP, model: m}}",
            "spec.service.model",
        ),
        (
            "{service: {name: s, port: 80, callerCredentials: Pass}}",
            "spec.service.callerCredentials",
        ),
        (
            "{service: {name: s, port: 80, protocol: HTTP, callerCredentials: Pass, credential: {secret: s, key: k}}}",
            "spec.service.callerCredentials",
        ),
    ] {
        let compiled = compile(&objects(&backend("tool", spec)), &Facts::default());
        assert_eq!(
            messages(&compiled),
            [format!("LLMBackend/default/tool {path} InvalidValue")]
        );
    }
}
