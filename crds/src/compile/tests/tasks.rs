//! Tasks of a policy.

use super::*;

/// Objects with a chat pool, an embedding pool, and rules for both; `spec` is more of the policy's.
fn compiled(task: &str, spec: &str) -> Compiled {
    let policy = format!(
        "---\napiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {{name: p}}\nspec:\n  {spec}\n  rules:\n  \
         - {{name: a, match: {{models: [m], task: {task}}}, backends: [{{name: chat}}]}}\n  \
         - {{name: b, match: {{models: [m]}}, backends: [{{name: chat}}]}}\n  \
         - {{name: c, match: {{models: ['embed-*']}}, backends: [{{name: embed}}]}}\n"
    );
    let objects = objects(&(backend("chat", POOL) + &backend("embed", POOL) + &policy));
    compile(&objects, &Facts::default())
}

fn with(tasks: &str, embedding: &str) -> String {
    format!("tasks: [{tasks}]\n  taskEmbedding: {{{embedding}}}")
}

const CODE: &str = "{name: code, examples: [fix this function]}";

#[test]
fn a_rule_takes_what_is_about_a_task_of_its_policy() {
    let spec = with(
        CODE,
        "model: embed-small, minSimilarity: \"0.42\", timeout: 1s",
    );
    let compiled = compiled("code", &spec);
    assert_eq!(messages(&compiled), [] as [&str; 0]);
    let config = only(&compiled);
    let policy = Id::new("default", "p");
    let condition = config::Condition::Task(policy.clone(), "code".to_owned());
    assert_eq!(config.rules[0].conditions, [condition]);
    let tasks = &config.tasks[&policy];
    assert_eq!(
        (tasks.min_similarity_thousandths, tasks.timeout_ms),
        (420, 1000)
    );
    assert_eq!(tasks.tasks[0].examples, ["fix this function"]);
}

#[test]
fn what_cannot_tell_tasks_apart_says_what_to_change() {
    let good = "model: embed-small";
    for (task, spec, problem) in [
        ("code", format!("tasks: [{CODE}]"), "spec.tasks"),
        ("chat", with(CODE, good), "spec.rules[0].match.task"),
        (
            "code",
            with(CODE, "model: other"),
            "spec.taskEmbedding.model",
        ),
        (
            "code",
            with(CODE, "model: embed-small, minSimilarity: \"1.5\""),
            "spec.taskEmbedding.minSimilarity",
        ),
        (
            "code",
            with(CODE, "model: embed-small, timeout: 6s"),
            "spec.taskEmbedding.timeout",
        ),
        (
            "code",
            with(&format!("{CODE}, {CODE}"), good),
            "spec.tasks[1].name",
        ),
        (
            "code",
            with(&format!("{CODE}, {{name: b, examples: []}}"), good),
            "spec.tasks[1].examples",
        ),
        (
            "code",
            with(&format!("{CODE}, {{name: b, examples: [' ']}}"), good),
            "spec.tasks[1].examples[0]",
        ),
    ] {
        let compiled = compiled(task, &spec);
        let said = messages(&compiled);
        let expected = format!("RoutingPolicy/default/p {problem} InvalidValue");
        assert!(said.contains(&expected), "{problem}: {said:?}");
    }
}

#[test]
fn editing_an_example_is_another_policy() {
    let hash = |example: &str| {
        let tasks = format!("{{name: code, examples: [{example}]}}");
        let compiled = compiled("code", &with(&tasks, "model: embed-small"));
        only(&compiled).objects["RoutingPolicy/default/p"]
            .hash
            .clone()
    };
    assert_ne!(hash("fix this"), hash("mend this"));
}
