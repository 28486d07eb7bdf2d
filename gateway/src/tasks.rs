//! What a request is about: the task whose example is the most similar to the user's last message, by the cosine of
//! their embeddings. Pure; `classifier` asks the embedding model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use penstock_core::config;
use penstock_core::ids::Id;
use serde::{Deserialize, Serialize};

use crate::conditions::last_text;

/// Embedding models read 256 to 512 tokens (all-MiniLM-L6-v2, bge-small): in no script is this more than that.
const MAX_TEXT_BYTES: usize = 1024;
/// Longer than those of any model that is in use: bounds what the examples of a policy hold in memory.
const MAX_DIMENSIONS: usize = 8192;
/// Examples are embedded anew so often, in case the model is another one under the same name.
const REFRESH_MS: u64 = 600_000;

/// The tasks of one policy.
#[derive(Debug)]
pub struct TaskSet {
    /// Whose they are.
    pub policy: Id,
    /// As configured.
    pub spec: config::Tasks,
    /// `None` until the model has embedded them.
    examples: ArcSwapOption<Examples>,
    /// When they were embedded last, in the process's ms.
    learned_ms: AtomicU64,
}

/// What is known of a request's task in one policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Told {
    /// `namespace/policy`.
    pub policy: Id,
    /// `None`: it belongs to none.
    pub task: Option<String>,
    /// Of the most similar example of each task.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub similarities: BTreeMap<String, f32>,
    /// How that came.
    pub result: Finding,
}

/// Why a request belongs to a task or to none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// An example is similar enough.
    Similar,
    /// None is.
    Unlike,
    /// There is no text of a user.
    NoText,
    /// The examples are not embedded yet.
    NotReady,
    /// The model took too long.
    TimedOut,
    /// The model gave no embedding.
    Failed,
}

impl Finding {
    /// For metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Similar => "similar",
            Self::Unlike => "unlike",
            Self::NoText => "no_text",
            Self::NotReady => "not_ready",
            Self::TimedOut => "timed_out",
            Self::Failed => "failed",
        }
    }
}

impl TaskSet {
    /// Without embeddings yet.
    pub fn new(policy: Id, spec: config::Tasks) -> Arc<Self> {
        Arc::new(Self {
            policy,
            spec,
            examples: ArcSwapOption::empty(),
            learned_ms: AtomicU64::new(0),
        })
    }

    /// All examples, each with the position of its task.
    pub fn texts(&self) -> Vec<(usize, &str)> {
        let tasks = self.spec.tasks.iter().enumerate();
        let texts = tasks.flat_map(|(index, task)| {
            let examples = task.examples.iter();
            examples.map(move |example| (index, example.as_str()))
        });
        texts.collect()
    }

    /// Whether its examples are to be embedded now.
    pub fn is_due(&self, now_ms: u64) -> bool {
        let learned_ms = self.learned_ms.load(Ordering::Relaxed);
        !self.is_ready() || now_ms >= learned_ms.saturating_add(REFRESH_MS)
    }

    /// Whether they were embedded once.
    pub fn is_ready(&self) -> bool {
        self.examples.load().is_some()
    }

    /// Takes the embeddings of all examples, in the order of [`Self::texts`]. Returns whether they can be used.
    pub fn learn(&self, embeddings: Vec<Vec<f32>>, now_ms: u64) -> bool {
        let tasks = self.texts().into_iter().map(|(task, _)| task);
        let examples = Examples::new(tasks.collect(), embeddings);
        let is_usable = examples.is_some();
        if is_usable {
            self.examples.store(examples.map(Arc::new));
            self.learned_ms.store(now_ms, Ordering::Relaxed);
        }
        is_usable
    }

    /// A request of which nothing is found out.
    pub fn unknown(&self, result: Finding) -> Told {
        Told {
            policy: self.policy.clone(),
            task: None,
            similarities: BTreeMap::new(),
            result,
        }
    }

    /// What a text of this embedding is about.
    pub fn nearest(&self, embedding: Vec<f32>) -> Told {
        let examples = self.examples.load_full();
        let Some(examples) = examples else {
            return self.unknown(Finding::NotReady);
        };
        let Some(best) = unit(embedding).and_then(|text| examples.best(&text)) else {
            return self.unknown(Finding::Failed);
        };
        let named = best.into_iter().filter_map(|(task, similarity)| {
            Some((self.spec.tasks.get(task)?.name.clone(), similarity))
        });
        let similarities: BTreeMap<String, f32> = named.collect();
        // Config holds 1000 at most.
        let least = u16::try_from(self.spec.min_similarity_thousandths).unwrap_or(1000);
        let least = f32::from(least) / 1000.0;
        let similar = similarities
            .iter()
            .filter(|(_, similarity)| **similarity >= least)
            .max_by(|a, b| a.1.total_cmp(b.1));
        let task = similar.map(|(name, _)| name.clone());
        Told {
            policy: self.policy.clone(),
            result: if task.is_some() {
                Finding::Similar
            } else {
                Finding::Unlike
            },
            task,
            similarities,
        }
    }
}

/// What is embedded of a prompt.
pub fn text(prompt: &[u8]) -> String {
    let text = last_text(prompt);
    let text = text.trim();
    text[..text.floor_char_boundary(MAX_TEXT_BYTES)].to_owned()
}

/// Embeddings of examples, of length 1.
#[derive(Debug)]
struct Examples(Vec<(usize, Vec<f32>)>);

impl Examples {
    /// `None` unless there is one for each, all with as many dimensions.
    fn new(tasks: Vec<usize>, embeddings: Vec<Vec<f32>>) -> Option<Self> {
        let dimensions = embeddings.first()?.len();
        let is_whole =
            tasks.len() == embeddings.len() && embeddings.iter().all(|one| one.len() == dimensions);
        if !is_whole || dimensions > MAX_DIMENSIONS {
            return None;
        }
        let units: Option<Vec<Vec<f32>>> = embeddings.into_iter().map(unit).collect();
        Some(Self(tasks.into_iter().zip(units?).collect()))
    }

    /// For each task, the similarity of its best example.
    fn best(&self, text: &[f32]) -> Option<BTreeMap<usize, f32>> {
        let mut best: BTreeMap<usize, f32> = BTreeMap::new();
        for (task, example) in &self.0 {
            if example.len() != text.len() {
                return None;
            }
            let products = example.iter().zip(text).map(|(a, b)| a * b);
            let similarity: f32 = products.sum();
            let known = best.entry(*task).or_insert(similarity);
            *known = known.max(similarity);
        }
        Some(best)
    }
}

/// `None` for what has no direction.
fn unit(mut vector: Vec<f32>) -> Option<Vec<f32>> {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    if !length.is_normal() {
        return None;
    }
    for x in &mut vector {
        *x /= length;
    }
    Some(vector)
}

#[derive(Deserialize)]
struct Embeddings {
    data: Vec<Embedding>,
}

#[derive(Deserialize)]
struct Embedding {
    index: usize,
    embedding: Vec<f32>,
}

/// The embeddings in an answer of `/v1/embeddings`; `None` unless there are `count`.
pub fn embeddings(answer: &[u8], count: usize) -> Option<Vec<Vec<f32>>> {
    let mut data = serde_json::from_slice::<Embeddings>(answer).ok()?.data;
    data.sort_by_key(|one| one.index);
    let is_whole = data.len() == count && data.iter().enumerate().all(|(at, one)| one.index == at);
    is_whole.then(|| data.into_iter().map(|one| one.embedding).collect())
}

#[cfg(test)]
mod tests {
    use penstock_core::config::Task;
    use proptest::prelude::*;

    use super::*;

    fn set(min_similarity_thousandths: u32) -> Arc<TaskSet> {
        let task = |name: &str, examples: &[&str]| Task {
            name: name.to_owned(),
            examples: examples.iter().map(|&example| example.to_owned()).collect(),
        };
        let spec = config::Tasks {
            model: "embed".to_owned(),
            min_similarity_thousandths,
            timeout_ms: 200,
            tasks: vec![
                task("code", &["fix this", "write a test"]),
                task("talk", &["hi"]),
            ],
        };
        TaskSet::new(Id::new("ns", "p"), spec)
    }

    #[test]
    fn the_most_similar_example_decides() {
        let set = set(500);
        assert_eq!(set.nearest(vec![1.0, 0.0]).result, Finding::NotReady);
        assert!(set.learn(vec![vec![2.0, 0.0], vec![0.0, 3.0], vec![-1.0, 0.0]], 0));
        let told = set.nearest(vec![0.1, 0.9]);
        assert_eq!(told.task.as_deref(), Some("code"));
        assert!(told.similarities["code"] > 0.99 && told.similarities["talk"] < 0.0);
        assert_eq!(set.nearest(vec![-5.0, 0.0]).task.as_deref(), Some("talk"));
        let told = set.nearest(vec![0.0, -1.0]);
        assert_eq!((told.task, told.result), (None, Finding::Unlike));
    }

    #[test]
    fn embeddings_that_do_not_fit_are_no_task() {
        let set = set(0);
        assert!(
            !set.learn(vec![vec![1.0, 0.0]], 0),
            "one for three examples"
        );
        assert!(!set.learn(vec![vec![1.0, 0.0], vec![1.0], vec![0.0, 1.0]], 0));
        assert!(!set.learn(vec![vec![0.0]; 3], 0), "no direction");
        assert!(!set.learn(vec![vec![1.0; MAX_DIMENSIONS + 1]; 3], 0));
        assert!(set.learn(vec![vec![1.0, 0.0]; 3], 0));
        for broken in [vec![1.0], vec![0.0, 0.0], vec![f32::NAN, 0.0]] {
            assert_eq!(set.nearest(broken).result, Finding::Failed);
        }
    }

    #[test]
    fn examples_are_embedded_again_after_a_while_and_kept_when_that_fails() {
        let set = set(0);
        assert!(set.is_due(0));
        assert!(set.learn(vec![vec![1.0]; 3], 1));
        assert!(!set.is_due(REFRESH_MS));
        assert!(set.is_due(REFRESH_MS + 1));
        assert!(!set.learn(Vec::new(), REFRESH_MS + 1));
        assert!(set.is_ready() && set.is_due(REFRESH_MS + 2));
    }

    #[test]
    fn answers_are_read_by_index_and_whole() {
        let answer = br#"{"data":[{"index":1,"embedding":[2]},{"index":0,"embedding":[1.5]}]}"#;
        assert_eq!(embeddings(answer, 2).unwrap(), [[1.5], [2.0]]);
        assert_eq!(embeddings(answer, 1), None);
        assert_eq!(
            embeddings(br#"{"data":[{"index":7,"embedding":[2]}]}"#, 1),
            None
        );
        assert_eq!(embeddings(b"<html>", 1), None);
    }

    proptest! {
        #[test]
        fn no_text_is_cut_inside_a_character(text in "\\PC{0,600}") {
            let prompt = serde_json::to_vec(&text).unwrap();
            let cut = super::text(&prompt);
            prop_assert!(cut.len() <= MAX_TEXT_BYTES);
            prop_assert!(text.trim().starts_with(&cut));
        }
    }
}
