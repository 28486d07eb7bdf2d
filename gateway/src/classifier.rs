//! (IO) Which rule takes a request, where that depends on what it is about: asks the embedding model, by the gateway's
//! own rules. A request whose task cannot be found in time belongs to none.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::behalf::Behalf;
use crate::conditions::Asked;
use crate::handle::{NoMatch, match_rule};
use crate::own_call;
use crate::process::Worker;
use crate::reject::Reject;
use crate::snapshot::Rule;
use crate::tasks::{self, Finding, TaskSet, Told};

/// Texts of one call: what text-embeddings-inference takes at most unless told otherwise.
const MAX_INPUTS: usize = 32;
/// Nobody waits for examples; a cold model may take its time.
const EXAMPLES_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at what is to be embedded.
const PAUSE: Duration = Duration::from_secs(1);
/// Questions that wait; more are not asked.
const MAX_QUESTIONS: usize = 16;

/// The rule that takes a request.
pub(crate) async fn rule(worker: &Arc<Worker>, asked: &Asked<'_>) -> Result<Arc<Rule>, Reject> {
    match match_rule(worker.process.snapshot.load().as_deref(), asked) {
        Ok(rule) => return Ok(rule),
        Err(NoMatch::Reject(reject)) => return Err(reject),
        Err(NoMatch::Unclassified(_)) => {}
    }
    // Rare, and as large as a request of its own.
    Box::pin(classified(worker, asked)).await
}

async fn classified(worker: &Arc<Worker>, asked: &Asked<'_>) -> Result<Arc<Rule>, Reject> {
    let look = |asked: &Asked<'_>| match_rule(worker.process.snapshot.load().as_deref(), asked);
    let ask = |set: Arc<TaskSet>| {
        let text = tasks::text(asked.call.prompt);
        async move { classify(worker, &set, text).await }
    };
    let (rule, _told) = match_told(asked, look, ask).await?;
    Ok(rule)
}

/// The rule that `look` finds once it is told what the request is about, and what it was told: `ask` says it of each
/// policy's tasks.
pub(crate) async fn match_told<F>(
    asked: &Asked<'_>,
    look: impl Fn(&Asked<'_>) -> Result<Arc<Rule>, NoMatch>,
    ask: impl Fn(Arc<TaskSet>) -> F,
) -> Result<(Arc<Rule>, Vec<Told>), Reject>
where
    F: Future<Output = Told>,
{
    let mut told = Vec::new();
    loop {
        let asked = Asked {
            tasks: &told,
            ..*asked
        };
        match look(&asked) {
            Ok(rule) => return Ok((rule, told)),
            Err(NoMatch::Reject(reject)) => return Err(reject),
            // Each policy's tasks are asked for once.
            Err(NoMatch::Unclassified(set)) => told.push(ask(set).await),
        }
    }
}

/// What a text is about.
async fn classify(worker: &Arc<Worker>, set: &TaskSet, text: String) -> Told {
    let timeout = Duration::from_millis(set.spec.timeout_ms);
    let told = if text.is_empty() {
        set.unknown(Finding::NoText)
    } else if !set.is_ready() {
        set.unknown(Finding::NotReady)
    } else {
        let texts = [text.as_str()];
        let asked = embed(worker, &set.spec.model, &texts);
        match tokio::time::timeout(timeout, asked).await {
            Err(_late) => set.unknown(Finding::TimedOut),
            Ok(embeddings) => match embeddings.and_then(|mut all| all.pop()) {
                Some(embedding) => set.nearest(embedding),
                None => set.unknown(Finding::Failed),
            },
        }
    };
    let metrics = &worker.process.metrics;
    metrics.task_found(told.result.label());
    told
}

/// Asks the embedding model as a caller would.
async fn embed(worker: &Arc<Worker>, model: &str, texts: &[&str]) -> Option<Vec<Vec<f32>>> {
    let head = own_call::head("/v1/embeddings");
    let body = Bytes::from(json!({"model": model, "input": texts}).to_string());
    let answer = own_call::send(worker, head, body, Behalf::Gateway).await;
    let outcome = own_call::collect(answer).await;
    let is_answer = outcome.status == 200;
    is_answer.then(|| tasks::embeddings(&outcome.body, texts.len()))?
}

/// Somebody outside of the workers who wants to know what a text is about.
struct Question {
    set: Arc<TaskSet>,
    text: String,
    answer: oneshot::Sender<Told>,
}

/// Where such questions are asked.
pub(crate) struct Desk {
    ask: mpsc::Sender<Question>,
    questions: Mutex<mpsc::Receiver<Question>>,
}

impl Default for Desk {
    fn default() -> Self {
        let (ask, questions) = mpsc::channel(MAX_QUESTIONS);
        Self {
            ask,
            questions: Mutex::new(questions),
        }
    }
}

impl Desk {
    /// As a request with this prompt would be told.
    pub(crate) async fn ask(&self, set: &Arc<TaskSet>, prompt: &[u8]) -> Told {
        let (answer, told) = oneshot::channel();
        let question = Question {
            set: Arc::clone(set),
            text: tasks::text(prompt),
            answer,
        };
        if self.ask.try_send(question).is_err() {
            return set.unknown(Finding::Failed);
        }
        told.await.unwrap_or_else(|_| set.unknown(Finding::Failed))
    }
}

/// Answers questions and has examples embedded, until the gateway drains. One worker does it for all.
pub(crate) async fn run(worker: Arc<Worker>, drain: CancellationToken) {
    let both = async { tokio::join!(answer_questions(&worker), learn_all(&worker)) };
    tokio::select! {
        () = drain.cancelled() => {}
        ((), ()) = both => {}
    }
}

async fn answer_questions(worker: &Arc<Worker>) {
    let mut questions = worker.process.desk.questions.lock().await;
    while let Some(question) = questions.recv().await {
        let told = classify(worker, &question.set, question.text).await;
        // Who asked may have left.
        let _left = question.answer.send(told);
    }
}

async fn learn_all(worker: &Arc<Worker>) {
    let mut ticks = tokio::time::interval(PAUSE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        learn(worker).await;
    }
}

/// Has the examples embedded that are due.
async fn learn(worker: &Arc<Worker>) {
    let process = &worker.process;
    let Some(snapshot) = process.snapshot.load_full() else {
        return;
    };
    for set in snapshot.task_sets() {
        let now_ms = process.ms(penstock_shell::clock::now());
        if !set.is_due(now_ms) {
            continue;
        }
        let was_ready = set.is_ready();
        let asked = embed_all(worker, set);
        let embeddings = tokio::time::timeout(EXAMPLES_TIMEOUT, asked).await;
        let embeddings = embeddings.ok().flatten().unwrap_or_default();
        match (set.learn(embeddings, now_ms), was_ready) {
            (true, false) => {
                tracing::info!(policy = %set.policy, "the examples of tasks are embedded");
            }
            (true, true) => {}
            (false, _) => tracing::debug!(
                policy = %set.policy,
                model = set.spec.model,
                "the embedding model gave no embeddings of the examples of tasks"
            ),
        }
    }
}

async fn embed_all(worker: &Arc<Worker>, set: &TaskSet) -> Option<Vec<Vec<f32>>> {
    let texts: Vec<&str> = set.texts().into_iter().map(|(_, text)| text).collect();
    let mut all = Vec::new();
    for chunk in texts.chunks(MAX_INPUTS) {
        all.extend(embed(worker, &set.spec.model, chunk).await?);
    }
    Some(all)
}
