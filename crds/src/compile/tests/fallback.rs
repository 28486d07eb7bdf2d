//! Backends that come after some failures only.

use penstock_core::config::{FailureClass, usual_failures};

use super::*;

fn ruled(backends: &str, rest: &str) -> Compiled {
    let rule = format!("{{name: r, match: {{models: [m]}}, backends: [{backends}]{rest}}}");
    let text = backend("a", POOL) + &backend("b", POOL) + &policy("p", &rule);
    compile(&objects(&text), &Facts::default())
}

#[test]
fn a_backend_keeps_what_it_comes_after_apart_from_what_the_rule_repeats() {
    let compiled = ruled(
        "{name: a}, {name: b, after: [ContextLength, RateLimit]}",
        "",
    );
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let rule = &only(&compiled).rules[0];
    let after: Vec<_> = rule.backends.iter().map(|one| one.after.clone()).collect();
    let expected = [FailureClass::ContextLength, FailureClass::RateLimit];
    assert_eq!(after, [[].into(), expected.into()]);
    assert_eq!(rule.retry.on, usual_failures());
}

#[test]
fn what_never_comes_true_is_refused() {
    let two = "{name: a}, {name: b, after: [Timeout]}";
    let at = ".backends[1].after";
    for (backends, rest, path) in [
        ("{name: a, after: [Timeout]}", "", ".backends"),
        (two, ", retry: {attempts: 1}", at),
        (
            "{name: a}, {name: b, after: [Timeout]}, {name: b}",
            ", fanOut: {mode: All}",
            at,
        ),
        (two, ", fanOut: {mode: First}", ".fanOut"),
    ] {
        let first = format!("RoutingPolicy/default/p spec.rules[0]{path} InvalidValue");
        assert_eq!(
            messages(&ruled(backends, rest)),
            [first],
            "{backends}{rest}"
        );
    }
    assert_eq!(messages(&ruled(two, "")), [] as [&str; 0]);
}

#[test]
fn http_backends_fail_in_their_own_ways() {
    let http = "{service: {name: s, port: 80, protocol: HTTP}}";
    for (after, expected) in [
        ("RateLimit, ContextLength", 1),
        ("RateLimit, ServerError", 0),
    ] {
        let rule = format!(
            "{{name: r, match: {{paths: [/x]}}, backends: [{{name: a}}, {{name: b, after: [{after}]}}]}}"
        );
        let text = backend("a", http) + &backend("b", http) + &policy("p", &rule);
        let compiled = compile(&objects(&text), &Facts::default());
        assert_eq!(compiled.problems.len(), expected, "{:?}", compiled.problems);
    }
}
