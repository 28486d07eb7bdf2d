//! The caller's region.

use super::*;

fn rules(first: &str, second: &str) -> Compiled {
    let rule = |name: &str, region: &str| {
        format!(
            "{{name: {name}, match: {{models: [m], region: {region}}}, backends: [{{name: chat}}]}}"
        )
    };
    let rules = format!("{}, {}", rule("a", first), rule("b", second));
    compile(
        &objects(&(backend("chat", POOL) + &policy("p", &rules))),
        &Facts::default(),
    )
}

#[test]
fn regions_are_exact_or_begin_so_and_a_second_rule_for_one_is_never_reached() {
    let compiled = rules("eu-west-1", "'us-*'");
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let region = |index: usize| only(&compiled).rules[index].conditions.clone();
    let exact = NameMatch::Exact("eu-west-1".to_owned());
    assert_eq!(region(0), [config::Condition::Region(exact)]);
    let prefix = NameMatch::Prefix("us-".to_owned());
    assert_eq!(region(1), [config::Condition::Region(prefix)]);
    assert_eq!(
        messages(&rules("eu-west-1", "eu-west-1")),
        ["RoutingPolicy/default/p spec.rules[1].match.models[0] UnreachableRule"]
    );
    assert_eq!(
        messages(&rules("eu-west-1", "'*-1'")),
        ["RoutingPolicy/default/p spec.rules[1].match.region InvalidValue"]
    );
}
