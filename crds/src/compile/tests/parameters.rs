//! Limits of parameters.

use penstock_core::config::{Bounds, OnExceed, Parameters};

use super::*;

fn limited(parameters: &str) -> Compiled {
    let rule = format!(
        "{{name: r, match: {{models: [m]}}, backends: [{{name: chat}}], parameters: {parameters}}}"
    );
    let text = backend("chat", POOL) + &policy("p", &rule);
    compile(&objects(&text), &Facts::default())
}

#[test]
fn bounds_are_typed_and_fractions_become_thousandths() {
    let compiled = limited(
        "{maxOutputTokens: {default: 512, max: 4096}, temperature: {min: '0.05', max: '1.2', default: '0.7'}, \
         topP: {max: '1'}, n: {max: 2}, onExceed: Refuse}",
    );
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let bounds = |default, min, max| Bounds { default, min, max };
    assert_eq!(
        only(&compiled).rules[0].parameters,
        Parameters {
            max_output_tokens: bounds(Some(512), None, Some(4096)),
            temperature: bounds(Some(700), Some(50), Some(1200)),
            top_p: bounds(None, None, Some(1000)),
            n: bounds(None, None, Some(2)),
            on_exceed: OnExceed::Refuse,
        }
    );
}

#[test]
fn limits_that_cannot_hold_are_named() {
    for (parameters, path) in [
        ("{}", ""),
        ("{onExceed: Refuse}", ""),
        ("{maxOutputTokens: {}}", ".maxOutputTokens"),
        ("{maxOutputTokens: {max: 0}}", ".maxOutputTokens.max"),
        (
            "{maxOutputTokens: {default: 9, max: 8}}",
            ".maxOutputTokens",
        ),
        ("{temperature: {}}", ".temperature"),
        ("{temperature: {max: '2.001'}}", ".temperature.max"),
        ("{temperature: {max: '.5'}}", ".temperature.max"),
        ("{temperature: {max: '0.0001'}}", ".temperature.max"),
        ("{temperature: {max: '-1'}}", ".temperature.max"),
        ("{temperature: {min: '1', max: '0.9'}}", ".temperature"),
        ("{temperature: {min: '1', default: '0.9'}}", ".temperature"),
        ("{topP: {max: '1.1'}}", ".topP.max"),
        ("{n: {max: 0}}", ".n.max"),
    ] {
        let problem =
            format!("RoutingPolicy/default/p spec.rules[0].parameters{path} InvalidValue");
        assert_eq!(messages(&limited(parameters)), [problem], "{parameters}");
    }
}
