//! Several backends at once.

use penstock_core::config::{FanOut, FanOutMode};

use super::*;

fn fanned(backends: &str, rest: &str) -> Compiled {
    let rule = format!("{{name: r, match: {{models: [m]}}, backends: [{backends}], {rest}}}");
    let text = backend("a", POOL) + &backend("b", POOL) + &policy("p", &rule);
    compile(&objects(&text), &Facts::default())
}

const TWO: &str = "{name: a}, {name: b}";

#[test]
fn all_backends_are_asked_and_waited_for_a_minute_by_default() {
    let compiled = fanned(TWO, "fanOut: {mode: All}");
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    assert_eq!(
        only(&compiled).rules[0].fan_out,
        Some(FanOut {
            mode: FanOutMode::All,
            max: 8,
            within_ms: 60_000,
        })
    );
    let compiled = fanned(TWO, "fanOut: {mode: All, max: 2, within: 5s}");
    let fan_out = only(&compiled).rules[0].fan_out.unwrap();
    assert_eq!((fan_out.max, fan_out.within_ms), (2, 5_000));
}

#[test]
fn what_cannot_work_beside_it_is_refused() {
    let embeddings = "joinEmbeddings: {within: 5ms, maxInputs: 8}";
    for (backends, rest, path) in [
        ("{name: a}", "fanOut: {mode: First}", ".fanOut"),
        (
            "{name: a}, {name: a, priority: 1}",
            "fanOut: {mode: First}",
            ".fanOut",
        ),
        (TWO, "fanOut: {mode: First}, hedge: {after: 2s}", ".hedge"),
        (
            TWO,
            &format!("fanOut: {{mode: All}}, {embeddings}"),
            ".joinEmbeddings",
        ),
        (TWO, "fanOut: {mode: All}, heartbeat: 15s", ".heartbeat"),
        (TWO, "fanOut: {mode: First, within: 5s}", ".fanOut.within"),
        (TWO, "fanOut: {mode: All, within: 0s}", ".fanOut.within"),
        (TWO, "fanOut: {mode: First, max: 9}", ".fanOut.max"),
        (TWO, "fanOut: {mode: All}, cache: {name: c}", ".cache"),
    ] {
        let compiled = fanned(backends, rest);
        let first = format!("RoutingPolicy/default/p spec.rules[0]{path} InvalidValue");
        assert!(
            messages(&compiled).contains(&first),
            "{rest}: {:?}",
            messages(&compiled)
        );
    }
}
