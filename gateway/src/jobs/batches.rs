//! (IO) `/v1/batches`: accepted, told, cancelled.

use std::sync::Arc;

use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::batch::{Batch, Progress, Status, Times};
use super::call::Headers;
use super::files::{self, KEPT, MAX_KEPT};
use super::lines::{self, model_of};
use super::metrics::BATCH;
use super::share;
use super::stored::{
    Owner, Record as _, change, load_for, new_id, not_found, now_s, page, record_bytes, save,
};
use super::{Reply, invalid, limit, queried};
use crate::body::{self, Source};
use crate::guard::Watch;
use crate::process::Process;
use crate::reject::Reject;
use crate::store::{Expect, Store};

/// The class of batches for a model is this and its name.
pub(super) const CLASS: &str = "batch:";
/// The owner's list of batches.
const LIST: &str = "batches";
const PAGE: usize = 20;
const MAX_PAGE: usize = 100;
/// OpenAI's limits of metadata.
const MAX_METADATA: usize = 16;
const MAX_METADATA_NAME: usize = 64;
const MAX_METADATA_VALUE: usize = 512;
const MIN_KEPT_S: u64 = 3_600;

#[derive(Deserialize)]
struct Asked {
    input_file_id: Option<String>,
    endpoint: Option<String>,
    completion_window: Option<String>,
    metadata: Option<Value>,
    output_expires_after: Option<Expiry>,
}

#[derive(Deserialize)]
struct Expiry {
    seconds: u64,
}

/// Accepts a batch: when this returns, it is in the store. Its lines are checked later.
pub(super) async fn create(
    process: &Arc<Process>,
    watch: &Watch,
    owner: &Owner,
    headers: &HeaderMap,
    body: Source,
) -> Result<Reply, Reject> {
    let store = process.jobs.store()?;
    let (body, _lease) = body::read(process, watch, headers, body).await?;
    let asked: Asked = serde_json::from_slice(&body).map_err(|err| Reject::InvalidJson {
        line: err.line(),
        column: err.column(),
    })?;
    let endpoint = asked.endpoint.unwrap_or_default();
    if lines::endpoint(&endpoint).is_none() {
        return Err(invalid(
            "endpoint",
            "the path of a call with JSON on both sides, such as /v1/chat/completions",
        ));
    }
    if asked.completion_window.as_deref() != Some("24h") {
        return Err(invalid("completion_window", "'24h'"));
    }
    if asked
        .metadata
        .as_ref()
        .is_some_and(|metadata| !is_metadata(metadata))
    {
        let expected = "up to 16 names of up to 64 characters with texts of up to 512";
        return Err(invalid("metadata", expected));
    }
    let kept_s = asked
        .output_expires_after
        .map_or(KEPT.as_secs(), |expiry| expiry.seconds);
    if !(MIN_KEPT_S..=MAX_KEPT.as_secs()).contains(&kept_s) {
        let expected = "a number from 3600 to 2592000";
        return Err(invalid("output_expires_after.seconds", expected));
    }
    let input = asked.input_file_id.unwrap_or_default();
    let input = files::find(store, owner, &input).await?;
    let first = store.pieces(&input.content(), 0, 1).await?;
    let first = first
        .first()
        .map(|(_, piece)| &piece[..])
        .unwrap_or_default();
    let line = first
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let model = model_of(line).unwrap_or_default();
    let batch = Batch {
        id: new_id("batch_"),
        owner: owner.clone(),
        class: format!("{CLASS}{model}"),
        endpoint,
        input: input.id,
        output: new_id("file-"),
        error: new_id("file-"),
        files_kept_s: kept_s,
        created_at: now_s(),
        status: Status::Validating,
        times: Times::default(),
        errors: Vec::new(),
        total: 0,
        progress: Progress::default(),
        metadata: asked.metadata,
        headers: Headers::of(headers),
    };
    keep(process, store, &batch).await?;
    Ok(Reply::json(202, &batch.shown()))
}

/// Writes a new batch down and puts it into the queue.
async fn keep(process: &Process, store: &Store, batch: &Batch) -> Result<(), Reject> {
    let share = share::Bytes::until(&batch.owner, batch.created_at + MAX_KEPT.as_secs());
    let bytes = record_bytes(batch);
    share.claim(process, store, bytes).await?;
    save(store, batch, Expect::Any).await?;
    let at_ms = batch.created_at * 1_000;
    let list = batch.owner.list(LIST);
    store.enlist(&list, &batch.id, at_ms, MAX_KEPT).await?;
    let entered = batch.queued().enter(process, BATCH).await;
    if entered.is_err() {
        // What cannot be removed has an end of life.
        let _ = store.unlist(&list, &batch.id).await;
        let _ = store.remove(&batch.id, &[Batch::PART]).await;
        let _ = share.give_back(store, bytes).await;
    }
    entered
}

fn is_metadata(value: &Value) -> bool {
    let is_one = |members: &Map<String, Value>| {
        members.len() <= MAX_METADATA
            && members.iter().all(|(name, value)| {
                let value = value.as_str();
                name.chars().count() <= MAX_METADATA_NAME
                    && value.is_some_and(|value| value.chars().count() <= MAX_METADATA_VALUE)
            })
    };
    value.is_null() || value.as_object().is_some_and(is_one)
}

pub(super) async fn get(store: &Store, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let (_, batch) = load_for::<Batch>(store, owner, id).await?;
    Ok(Reply::json(200, &batch.shown()))
}

pub(super) async fn list(store: &Store, owner: &Owner, query: &str) -> Result<Reply, Reject> {
    let most = limit(query, PAGE, MAX_PAGE)?;
    let after = queried(query, "after");
    let shown = |batch: &Batch| Some(batch.shown());
    let page = page(store, &owner.list(LIST), after, true, most, shown).await?;
    Ok(Reply::json(200, &page))
}

/// Whoever runs the batch ends it, with what is done by then.
pub(super) async fn cancel(process: &Process, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let store = process.jobs.store()?;
    let (_, batch) = load_for::<Batch>(store, owner, id).await?;
    if batch.status.is_over() {
        return Err(Reject::Conflict {
            message: "The batch is over and cannot be cancelled.",
        });
    }
    let batch = change(store, id, |batch: &mut Batch| {
        let changes = !batch.status.is_over() && batch.status != Status::Cancelling;
        if changes {
            batch.status = Status::Cancelling;
            batch.times.cancelling = Some(now_s());
        }
        changes
    });
    let batch = batch.await?.ok_or_else(|| not_found::<Batch>(id))?;
    store.settle().await?;
    process.jobs.came.notify_one();
    Ok(Reply::json(200, &batch.shown()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_is_bounded() {
        assert!(is_metadata(&json!(null)) && is_metadata(&json!({"a": "b"})));
        assert!(!is_metadata(&json!({"a": 1})) && !is_metadata(&json!("a")));
        assert!(!is_metadata(&json!({"a": "x".repeat(513)})));
        let many: Map<_, _> = (0..17).map(|n| (n.to_string(), json!(""))).collect();
        assert!(!is_metadata(&Value::Object(many)));
    }
}
