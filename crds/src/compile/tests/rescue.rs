//! Rescue of cut streams.

use super::*;

const ABLE: &str = "{pool: {model: m}, capabilities: {continueFinalMessage: true}}";
const FOREIGN: &str = "{external: {url: 'https://a', protocol: Anthropic}, capabilities: {continueFinalMessage: true}}";

fn rescued(spec: &str, rest: &str) -> Compiled {
    let rule = format!(
        "{{name: r, match: {{models: [m]}}, backends: [{{name: a}}, {{name: b}}], {rest}}}"
    );
    let text = backend("a", spec) + &backend("b", POOL) + &policy("p", &rule);
    compile(&objects(&text), &Facts::default())
}

#[test]
fn a_rule_asks_for_it_and_a_backend_can_do_it() {
    let compiled = rescued(ABLE, "retry: {rescueStreams: true}");
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let config = only(&compiled);
    assert!(config.rules[0].retry.rescue_streams);
    let able = |name: &str| {
        let backend = &config.backends[&Id::new("default", name)];
        backend.profile.capabilities.continue_final_message
    };
    assert!(able("a") && !able("b"));
    let compiled = rescued(POOL, "retry: {rescueStreams: false}");
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    assert!(!only(&compiled).rules[0].retry.rescue_streams);
}

#[test]
fn what_keeps_every_stream_from_it_is_said() {
    let path = "RoutingPolicy/default/p spec.rules[0].retry.rescueStreams InvalidValue";
    for (spec, rest) in [
        (POOL, "retry: {rescueStreams: true}"),
        (FOREIGN, "retry: {rescueStreams: true}"),
        (ABLE, "retry: {attempts: 1, rescueStreams: true}"),
        (ABLE, "retry: {rescueStreams: true}, streaming: Buffered"),
        (ABLE, "retry: {rescueStreams: true}, fanOut: {mode: All}"),
    ] {
        assert_eq!(messages(&rescued(spec, rest)), [path], "{spec} {rest}");
    }
    let compiled = rescued(POOL, "retry: {rescueStreams: true}");
    let message = &compiled.problems[0].message;
    assert!(
        message.contains("capabilities.continueFinalMessage: true"),
        "{message}"
    );
}

#[test]
fn it_is_about_models() {
    let rule =
        "{name: r, match: {paths: [/x]}, backends: [{name: a}], retry: {rescueStreams: true}}";
    let http = "{service: {name: s, port: 80, protocol: HTTP}, capabilities: {continueFinalMessage: true}}";
    let text = backend("a", http) + &policy("p", rule);
    let found = messages(&compile(&objects(&text), &Facts::default()));
    let path = "RoutingPolicy/default/p spec.rules[0].retry.rescueStreams InvalidValue";
    assert!(found.contains(&path.to_owned()), "{found:?}");
}
