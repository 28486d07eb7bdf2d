//! Streams that callers may come back to.

use super::*;

fn compiled(rest: &str) -> Compiled {
    let rule = format!("{{name: r, match: {{models: [m]}}, backends: [{{name: a}}], {rest}}}");
    let text = backend("a", POOL) + &policy("p", &rule);
    compile(&objects(&text), &Facts::default())
}

#[test]
fn a_stream_may_be_kept_for_a_second_to_ten_minutes() {
    for (text, ms) in [("1s", 1_000), ("30s", 30_000), ("10m", 600_000)] {
        let compiled = compiled(&format!("resumable: {text}"));
        assert_eq!(messages(&compiled), [] as [&str; 0]);
        assert_eq!(only(&compiled).rules[0].resumable_ms, Some(ms));
    }
    for text in ["0s", "999ms", "11m", "soon"] {
        let compiled = compiled(&format!("resumable: {text}"));
        let expected = "RoutingPolicy/default/p spec.rules[0].resumable InvalidValue";
        assert_eq!(messages(&compiled), [expected], "{text}");
        assert_eq!(only(&compiled).rules[0].resumable_ms, None);
    }
}

#[test]
fn a_rule_for_plain_http_has_no_such_streams() {
    let rule = "{name: r, match: {paths: ['/mcp']}, backends: [{name: tool}], resumable: 30s}";
    let tool = "{service: {name: tool, port: 80, protocol: HTTP}}";
    let text = backend("tool", tool) + &policy("p", rule);
    let compiled = compile(&objects(&text), &Facts::default());
    let expected = "RoutingPolicy/default/p spec.rules[0].resumable InvalidValue";
    assert_eq!(messages(&compiled), [expected]);
}
