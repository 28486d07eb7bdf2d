//! Prompts of a policy.

use penstock_core::config::PromptRef;

use super::*;

fn prompted(prompts: &str, of_rule: &str) -> Compiled {
    let rule = format!("{{name: r, match: {{models: [m]}}, backends: [{{name: chat}}]{of_rule}}}");
    let policy = policy("p", &rule);
    let policy = policy.trim_end().strip_suffix('}').unwrap();
    let text = format!(
        "{}{policy}, prompts: [{prompts}]}}\n",
        backend("chat", POOL)
    );
    compile(&objects(&text), &Facts::default())
}

const TWO: &str =
    "{name: house, version: 10, system: Ten}, {name: house, version: 9, system: Nine}";

#[test]
fn a_rule_without_a_version_takes_the_newest() {
    for (of_rule, version) in [
        (", prompt: {name: house}", 10),
        (", prompt: {name: house, version: 9}", 9),
    ] {
        let compiled = prompted(TWO, of_rule);
        assert_eq!(messages(&compiled), [] as [&str; 0]);
        let name = "house".to_owned();
        assert_eq!(
            only(&compiled).rules[0].prompt,
            Some(PromptRef { name, version })
        );
    }
}

#[test]
fn a_changed_text_is_another_version_of_the_object() {
    let hash = |compiled: &Compiled| {
        only(compiled).objects["RoutingPolicy/default/p"]
            .hash
            .clone()
    };
    let before = prompted(TWO, "");
    assert_eq!(only(&before).prompts[&Id::new("default", "p")].len(), 2);
    assert_ne!(hash(&before), hash(&prompted(&TWO.replace("Ten", "X"), "")));
    assert!(only(&prompted("", "")).prompts.is_empty());
}

#[test]
fn prompts_that_cannot_be_used_are_named() {
    let long = "x".repeat(16_385);
    let greet = "{name: p, version: 1, messages: [{role: User, text: hi}]}";
    for (prompts, of_rule, path) in [
        (
            "{name: 'a b', version: 1, system: x}",
            "",
            "prompts[0].name",
        ),
        ("{name: p, version: 0, system: x}", "", "prompts[0].version"),
        ("{name: p, version: 1}", "", "prompts[0]"),
        ("{name: p, version: 1, system: ''}", "", "prompts[0].system"),
        (
            "{name: p, version: 1, system: 'a {{b c}}'}",
            "",
            "prompts[0].system",
        ),
        (
            "{name: p, version: 1, messages: [{role: User, text: '{{'}]}",
            "",
            "prompts[0].messages[0].text",
        ),
        (
            "{name: p, version: 1, system: x}, {name: p, version: 1, system: y}",
            "",
            "prompts[1].version",
        ),
        (
            &format!("{{name: p, version: 1, system: {long}}}"),
            "",
            "prompts[0].system",
        ),
        (greet, ", prompt: {name: p}", "rules[0].prompt"),
        (
            "{name: p, version: 1, system: 'Hi {{x}}'}",
            ", prompt: {name: p}",
            "rules[0].prompt",
        ),
    ] {
        let problem = format!("RoutingPolicy/default/p spec.{path} InvalidValue");
        assert_eq!(
            messages(&prompted(prompts, of_rule)),
            [problem],
            "{prompts}"
        );
    }
}

#[test]
fn a_rule_does_not_lose_a_prompt_that_is_missing() {
    for of_rule in [
        ", prompt: {name: gone}",
        ", prompt: {name: house, version: 8}",
    ] {
        let compiled = prompted(TWO, of_rule);
        assert_eq!(
            messages(&compiled),
            ["RoutingPolicy/default/p spec.rules[0].prompt InvalidValue"]
        );
        assert!(only(&compiled).rules[0].prompt.is_some());
    }
}

#[test]
fn all_texts_of_a_policy_are_bounded_together() {
    let text = "x".repeat(16_000);
    let prompts: Vec<String> = (1..=17)
        .map(|version| format!("{{name: p, version: {version}, system: {text}}}"))
        .collect();
    let compiled = prompted(&prompts.join(", "), "");
    assert_eq!(
        messages(&compiled),
        ["RoutingPolicy/default/p spec.prompts InvalidValue"]
    );
}
