use penstock_core::config::{Budget, Enforcement, NameMatch, Per, Period, Unit, Window};

use super::*;

fn budget(spec: &str) -> String {
    format!(
        "---\napiVersion: penstock.dev/v1alpha1\nkind: TokenBudget\nmetadata: {{name: b}}\nspec: {spec}\n"
    )
}

fn base() -> String {
    let key = "---\napiVersion: penstock.dev/v1alpha1\nkind: VirtualKey\nmetadata: {name: alice}\nspec: {team: a}\n";
    backend("chat", POOL) + &policy("p", &rule("r", "chat", "chat")) + key
}

fn compiled(spec: &str) -> Compiled {
    compile(&objects(&(base() + &budget(spec))), &Facts::default())
}

/// Paths and messages of all problems.
fn told(compiled: &Compiled) -> String {
    let problems = compiled.problems.iter();
    let told = problems.map(|problem| format!("{}: {}", problem.path, problem.message));
    told.collect::<Vec<_>>().join("; ")
}

fn of(compiled: &Compiled) -> &Budget {
    &only(compiled).budgets[&Id::new("default", "b")]
}

#[test]
fn a_budget_says_what_counts_for_whom_and_how_much() {
    let compiled = compiled(
        "{selector: {teams: [search, 'ads-*'], keys: [alice], models: ['*'], backends: [chat]}, per: Team, \
         limits: [{name: hourly, unit: Tokens, max: 1000, window: {rolling: 1h}}, \
         {name: monthly, unit: MicroUsd, max: 5000000, window: {calendar: Month, timeZone: Europe/Berlin}}, \
         {name: at-once, unit: Concurrency, max: 4}], \
         enforcement: Soft, maxOutputTokens: 100, unpricedMicroUsd: 7, cacheHitPercent: 10}",
    );
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let budget = of(&compiled);
    assert_eq!(
        budget.selects.teams,
        [
            NameMatch::Exact("search".into()),
            NameMatch::Prefix("ads-".into())
        ]
    );
    assert!(budget.selects.keys.contains(&Id::new("default", "alice")));
    assert_eq!(budget.selects.backends.len(), 1);
    assert_eq!(
        (budget.per, budget.enforcement),
        (Per::Team, Enforcement::Soft)
    );
    let limits: Vec<_> = budget
        .limits
        .iter()
        .map(|limit| {
            (
                limit.name.as_str(),
                limit.unit,
                limit.max,
                limit.window.clone(),
            )
        })
        .collect();
    let month = Window::Calendar {
        period: Period::Month,
        time_zone: "Europe/Berlin".to_owned(),
    };
    assert_eq!(
        limits,
        [
            (
                "hourly",
                Unit::Tokens,
                1_000,
                Some(Window::SlidingMs(3_600_000))
            ),
            ("monthly", Unit::MicroUsd, 5_000_000, Some(month)),
            ("at-once", Unit::Concurrency, 4, None),
        ]
    );
    assert_eq!(
        (
            budget.max_output_tokens,
            budget.unpriced_micro_usd,
            budget.cache_hit_percent
        ),
        (100, Some(7), 10)
    );
    assert!(
        only(&compiled)
            .objects
            .contains_key("TokenBudget/default/b")
    );
    let object = ObjectRef::new(Kind::TokenBudget, Id::new("default", "b"));
    assert_eq!(compiled.carried_by[&object].len(), 1);
}

#[test]
fn the_smallest_budget_is_hard_and_everybodys() {
    let compiled =
        compiled("{limits: [{name: day, unit: Requests, max: 9, window: {calendar: Day}}]}");
    let budget = of(&compiled);
    assert_eq!(
        (budget.per, budget.enforcement),
        (Per::Budget, Enforcement::Hard)
    );
    assert_eq!(budget.max_output_tokens, 4096);
    let utc = |window: &Window| matches!(window, Window::Calendar { time_zone, .. } if time_zone == "UTC");
    assert!(budget.limits[0].window.as_ref().is_some_and(utc));
}

#[test]
fn mistakes_are_told_and_nothing_goes_past_a_hard_budget_that_has_one() {
    let limit = |limit: &str| format!("{{limits: [{limit}]}}");
    let cases = [
        ("{limits: []}".to_owned(), "spec.limits: has 0 entries"),
        (
            limit("{name: a, unit: Requests, max: 0, window: {rolling: 1h}}"),
            "spec.limits[0].max: 0 is out of range",
        ),
        (
            limit("{name: a, unit: Requests, max: 1}"),
            "spec.limits[0].window: say in which time",
        ),
        (
            limit("{name: a, unit: Concurrency, max: 1, window: {rolling: 1h}}"),
            "spec.limits[0].window: Concurrency counts",
        ),
        (
            limit("{name: a, unit: Requests, max: 1, window: {}}"),
            "spec.limits[0].window: write either",
        ),
        (
            limit("{name: a, unit: Requests, max: 1, window: {rolling: 1h, calendar: Day}}"),
            "write either",
        ),
        (
            limit("{name: a, unit: Requests, max: 1, window: {rolling: 1ms}}"),
            "rolling: 1ms is out of range",
        ),
        (
            limit("{name: a, unit: Requests, max: 1, window: {rolling: 1h, timeZone: UTC}}"),
            "timeZone: it is about",
        ),
        (
            limit(
                "{name: a, unit: Requests, max: 1, window: {calendar: Day, timeZone: Mars/Base}}",
            ),
            "'Mars/Base' is no name",
        ),
        (
            limit("{name: A, unit: Requests, max: 1, window: {rolling: 1h}}"),
            "spec.limits[0].name: use 1 to 40",
        ),
        (
            limit(
                "{name: a, unit: Requests, max: 1, window: {rolling: 1h}}, {name: a, unit: Tokens, max: 1, window: {rolling: 1h}}",
            ),
            "'a' is there already",
        ),
    ];
    for (spec, expected) in cases {
        let hard = compiled(&spec);
        let told = told(&hard);
        assert!(told.contains(expected), "{spec}: {told}");
        let budget = of(&hard);
        assert!(budget.is_broken && budget.limits.is_empty(), "{spec}");
        let compiled = compiled(&spec.replacen('{', "{enforcement: Soft, ", 1));
        assert!(only(&compiled).budgets.is_empty(), "{spec}");
        assert_eq!(only(&compiled).rules.len(), 1);
    }
}

#[test]
fn a_budget_that_does_not_say_whom_it_selects_is_left_out() {
    let compiled = compiled(
        "{selector: {teams: ['*x']}, limits: [{name: a, unit: Requests, max: 1, window: {rolling: 1h}}]}",
    );
    let told = told(&compiled);
    assert!(told.contains("spec.selector.teams[0]: '*x'"), "{told}");
    assert!(only(&compiled).budgets.is_empty());
}

#[test]
fn references_that_are_missing_are_told_and_the_rest_counts() {
    let compiled = compiled(
        "{selector: {keys: [alice, bob], backends: [none]}, limits: [{name: a, unit: Requests, max: 1, window: {rolling: 1h}}]}",
    );
    let told = told(&compiled);
    assert!(
        told.contains("VirtualKey default/bob does not exist"),
        "{told}"
    );
    assert!(
        told.contains("LLMBackend default/none does not exist"),
        "{told}"
    );
    // Leaving them out could leave none, which would mean any.
    assert_eq!(of(&compiled).selects.keys.len(), 2);
}

#[test]
fn plain_http_has_no_tokens_to_be_hard_about() {
    let tool = "{service: {name: tool, port: 80, protocol: HTTP}}";
    let limits = |unit: &str, more: &str| {
        let spec = format!(
            "{{selector: {{backends: [tool]}}, limits: [{{name: a, unit: {unit}, max: 1, window: {{rolling: 1h}}}}]{more}}}"
        );
        let compiled = compile(
            &objects(&(base() + &backend("tool", tool) + &budget(&spec))),
            &Facts::default(),
        );
        told(&compiled)
    };
    assert!(limits("Tokens", "").contains("cannot be bounded in tokens"));
    assert_eq!(limits("Requests", ""), "");
    assert_eq!(limits("Tokens", ", enforcement: Soft"), "");
}
