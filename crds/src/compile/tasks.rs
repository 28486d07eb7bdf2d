//! Tasks of a policy → `config::Tasks`.

use std::collections::BTreeSet;
use std::time::Duration;

use penstock_core::config::{Rule, Task, Tasks};
use penstock_core::ids::Id;

use crate::object::{Kind, ObjectRef};
use crate::policy::{RoutingPolicySpec, TaskEmbeddingSpec, TaskSpec};
use crate::problem::Problem;

/// Lists and texts are bounded here too: files are not checked against the schema's maxima.
const MAX_TASKS: usize = 16;
const MAX_EXAMPLES: usize = 32;
/// Embedding models read 256 to 512 tokens (all-MiniLM-L6-v2, bge-small): in no script is this more than that.
const MAX_EXAMPLE_BYTES: usize = 1024;
/// What semantic-router takes with bge-small-en-v1.5 (its FastEmbedEncoder).
const DEFAULT_MIN_SIMILARITY: u32 = 500;
/// An embedder near by answers within tens of ms; the rest is for one that is busy.
const DEFAULT_TIMEOUT_MS: u64 = 200;
const TIMEOUTS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(5);

/// The tasks that can be used; says what is wrong with the others.
pub(super) fn compile(
    id: &Id,
    spec: &RoutingPolicySpec,
    problems: &mut Vec<Problem>,
) -> Option<Tasks> {
    let object = ObjectRef::new(Kind::RoutingPolicy, id.clone());
    let mut refuse = |path: String, message: String| {
        problems.push(Problem::invalid(object.clone(), path, message));
    };
    let Some(embedding) = &spec.task_embedding else {
        if !spec.tasks.is_empty() {
            let message =
                "name the embedding model that tells them apart: taskEmbedding: {model: …}";
            refuse("spec.tasks".to_owned(), message.to_owned());
        }
        return None;
    };
    if spec.tasks.is_empty() || spec.tasks.len() > MAX_TASKS {
        let message = format!(
            "there are {} tasks: write 1 to {MAX_TASKS}",
            spec.tasks.len()
        );
        refuse("spec.tasks".to_owned(), message);
    }
    let mut known = BTreeSet::new();
    let mut tasks = Vec::new();
    for (index, task) in spec.tasks.iter().take(MAX_TASKS).enumerate() {
        let at = format!("spec.tasks[{index}]");
        if known.insert(&task.name) {
            tasks.extend(compile_task(task, &at, &mut refuse));
        } else {
            let message = format!("there are two tasks '{}': name one anew", task.name);
            refuse(format!("{at}.name"), message);
        }
    }
    tasks.sort_by(|a, b| a.name.cmp(&b.name));
    Some(Tasks {
        model: embedding.model.clone(),
        min_similarity_thousandths: min_similarity(embedding, &mut refuse),
        timeout_ms: timeout_ms(embedding, &mut refuse),
        tasks,
    })
}

fn compile_task(
    spec: &TaskSpec,
    at: &str,
    refuse: &mut impl FnMut(String, String),
) -> Option<Task> {
    let count = spec.examples.len();
    if !(1..=MAX_EXAMPLES).contains(&count) {
        let message = format!("there are {count} examples: write 1 to {MAX_EXAMPLES}");
        refuse(format!("{at}.examples"), message);
        return None;
    }
    let mut is_whole = true;
    for (index, example) in spec.examples.iter().enumerate() {
        let length = example.len();
        if example.trim().is_empty() || length > MAX_EXAMPLE_BYTES {
            let message =
                format!("has {length} bytes: write 1 to {MAX_EXAMPLE_BYTES}, not only blanks");
            refuse(format!("{at}.examples[{index}]"), message);
            is_whole = false;
        }
    }
    is_whole.then(|| Task {
        name: spec.name.clone(),
        examples: spec.examples.clone(),
    })
}

fn min_similarity(spec: &TaskEmbeddingSpec, refuse: &mut impl FnMut(String, String)) -> u32 {
    let Some(text) = &spec.min_similarity else {
        return DEFAULT_MIN_SIMILARITY;
    };
    let value = text.thousandths().filter(|value| *value <= 1000);
    value.unwrap_or_else(|| {
        let message = format!(
            "'{}' is out of range: use \"0\" to \"1\", with up to three decimals",
            text.0
        );
        refuse("spec.taskEmbedding.minSimilarity".to_owned(), message);
        DEFAULT_MIN_SIMILARITY
    })
}

fn timeout_ms(spec: &TaskEmbeddingSpec, refuse: &mut impl FnMut(String, String)) -> u64 {
    let Some(text) = &spec.timeout else {
        return DEFAULT_TIMEOUT_MS;
    };
    let wrong = match text.parse() {
        Ok(timeout) if TIMEOUTS.contains(&timeout) => {
            return u64::try_from(timeout.as_millis()).unwrap_or(DEFAULT_TIMEOUT_MS);
        }
        Ok(_) => format!("'{}' is out of range: use 10ms to 5s", text.0),
        Err(err) => err.to_string(),
    };
    refuse("spec.taskEmbedding.timeout".to_owned(), wrong);
    DEFAULT_TIMEOUT_MS
}

/// Says which embedding model no rule of the gateway takes.
pub(super) fn check_models<'a>(
    tasks: impl Iterator<Item = (&'a Id, &'a Tasks)>,
    rules: &[Rule],
    problems: &mut Vec<Problem>,
) {
    for (id, tasks) in tasks {
        let names = rules.iter().flat_map(|rule| &rule.models);
        if !names.clone().any(|name| name.matches(&tasks.model)) {
            let message = format!(
                "no rule of this gateway takes the model '{}': add one with match.models and an embedding backend",
                tasks.model
            );
            let object = ObjectRef::new(Kind::RoutingPolicy, id.clone());
            problems.push(Problem::invalid(
                object,
                "spec.taskEmbedding.model",
                message,
            ));
        }
    }
}
