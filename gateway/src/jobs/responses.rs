//! (IO) Background responses: accepted, told, cancelled, deleted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::call::Headers;
use super::metrics::RESPONSE;
use super::shape::{self, Status};
use super::share::{self, Queued};
use super::stored::{
    Owner, Record, change, load_for, new_id, not_found, now_s, record_bytes, save,
};
use super::{EVENTS, Reply, ReplyBody, invalid, queried, stream};
use crate::principal::Who;
use crate::process::Process;
use crate::reject::Reject;
use crate::resume;
use crate::store::{Expect, Key, Store};

/// What ids begin with.
pub(super) const PREFIX: &str = "resp_";
/// The class of jobs for a model is this and its name.
pub(super) const CLASS: &str = "response:";
/// A response that has not begun by then never will.
pub(super) const WINDOW: Duration = Duration::from_hours(24);
/// How long a response is kept, from its last change.
const KEPT: Duration = Duration::from_hours(48);
const REQUEST: &str = "request";
const ANSWER: &str = "answer";
const EVENT_LOG: &str = "events";
/// Everything of a response.
const PARTS: [&str; 4] = [Response::PART, REQUEST, ANSWER, EVENT_LOG];

/// What is known of a background response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Response {
    pub(super) id: String,
    pub(super) owner: Owner,
    pub(super) class: String,
    pub(super) created_at: u64,
    pub(super) status: Status,
    pub(super) streams: bool,
    /// Which attempt wrote the events.
    pub(super) attempt: u32,
    /// Numbers below are told before the first attempt.
    pub(super) opened: u64,
    pub(super) headers: Headers,
    pub(super) error: Option<Value>,
    /// Bytes that count for the owner.
    #[serde(default)]
    pub(super) held: u64,
}

impl Record for Response {
    const PART: &'static str = "response";
    const WHAT: &'static str = "response";
    const KEPT: Duration = KEPT;

    fn id(&self) -> &str {
        &self.id
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }
}

impl Response {
    /// Its place in the queue.
    pub(super) fn queued(&self) -> Queued {
        Queued::new(&self.owner, &self.class, &self.id, self.created_at)
    }

    /// What it holds of its owner's share, until nothing of it can be left.
    pub(super) fn share(&self) -> share::Bytes {
        let longest = WINDOW + KEPT;
        share::Bytes::until(&self.owner, self.created_at + longest.as_secs())
    }

    pub(super) fn events(&self) -> Key {
        Key::new(&self.id, EVENT_LOG)
    }

    /// The request as it goes to the backend.
    pub(super) async fn request(&self, store: &Store) -> Result<Bytes, crate::store::Error> {
        let found = store.get(&Key::new(&self.id, REQUEST)).await?;
        Ok(found.map(|found| found.value).unwrap_or_default())
    }

    /// Keeps the answer; it counts once the record says so. Returns how many bytes it has.
    pub(super) async fn answer(
        &self,
        store: &Store,
        answer: &Value,
    ) -> Result<u64, crate::store::Error> {
        let bytes = Bytes::from(answer.to_string());
        let len = share::count(bytes.len());
        self.share().add(store, len).await?;
        let key = Key::new(&self.id, ANSWER);
        store.put(&key, bytes, Expect::Any, KEPT).await?;
        Ok(len)
    }

    /// Writes events down. Returns how many bytes they have.
    pub(super) async fn write(
        &self,
        store: &Store,
        pieces: Vec<(u64, Bytes)>,
    ) -> Result<u64, crate::store::Error> {
        let len = share::count(pieces.iter().map(|(_, piece)| piece.len()).sum());
        self.share().add(store, len).await?;
        store.write(&self.events(), pieces, KEPT).await?;
        Ok(len)
    }

    /// As the API shows it.
    pub(super) async fn shown(&self, store: &Store) -> Result<Bytes, Reject> {
        let answer = store.get(&Key::new(&self.id, ANSWER)).await?;
        match answer {
            Some(answer) if matches!(self.status, Status::Completed | Status::Incomplete) => {
                Ok(answer.value)
            }
            _ => Ok(Bytes::from(self.pending(store).await?.to_string())),
        }
    }

    pub(super) async fn pending(&self, store: &Store) -> Result<Value, Reject> {
        let request = self.request(store).await?;
        let error = self.error.as_ref();
        Ok(shape::pending(
            &self.id,
            self.created_at,
            self.status,
            error,
            &request,
        ))
    }
}

/// Accepts a background response: when this returns, the job is in the store.
pub(crate) async fn accept(
    process: &Arc<Process>,
    who: &Who,
    headers: &HeaderMap,
    model: &str,
    streams: bool,
    body: &Bytes,
) -> Result<Reply, Reject> {
    let store = process.jobs.store()?;
    let mut response = Response {
        id: new_id(PREFIX),
        owner: Owner::of(who, headers),
        class: format!("{CLASS}{model}"),
        created_at: now_s(),
        status: Status::Queued,
        streams,
        attempt: 0,
        opened: 0,
        headers: Headers::of(headers),
        error: None,
        held: 0,
    };
    let request = shape::request(body);
    let own = share::count(request.len()) + record_bytes(&response);
    response.share().claim(process, store, own).await?;
    response.held = own;
    let key = Key::new(&response.id, REQUEST);
    let shown = shape::pending(
        &response.id,
        response.created_at,
        Status::Queued,
        None,
        &request,
    );
    store.put(&key, request, Expect::Any, KEPT).await?;
    if streams {
        let opening: Vec<_> = (0..).zip(shape::opening(&shown)).collect();
        response.opened = u64::try_from(opening.len()).unwrap_or(0);
        response.held += response.write(store, opening).await?;
    }
    save(store, &response, Expect::Any).await?;
    if let Err(reject) = response.queued().enter(process, RESPONSE).await {
        // What cannot be removed has an end of life.
        let _ = forget(store, &response).await;
        return Err(reject);
    }
    if streams {
        return Ok(Reply {
            status: 202,
            content_type: EVENTS,
            body: ReplyBody::Stream(stream::events(Arc::clone(store), response, 0)),
        });
    }
    Ok(Reply::json(202, &shown))
}

pub(super) async fn get(
    store: &Arc<Store>,
    owner: &Owner,
    id: &str,
    query: &str,
) -> Result<Reply, Reject> {
    let found = load_for::<Response>(store, owner, id).await;
    if queried(query, "stream") != Some("true") {
        return Ok(Reply::bytes(200, found?.1.shown(store).await?));
    }
    let after = starting_after(query)?;
    if matches!(found, Err(Reject::NotFound { .. }))
        && let Some(events) = resume::of_response(store, owner, id, after).await?
    {
        return Ok(events);
    }
    let (_, response) = found?;
    if !response.streams {
        let expected = "left out: the response was not created with 'stream'";
        return Err(invalid("stream", expected));
    }
    let from = after.map_or(0, |after| after.saturating_add(1));
    Ok(Reply {
        status: 200,
        content_type: EVENTS,
        body: ReplyBody::Stream(stream::events(Arc::clone(store), response, from)),
    })
}

fn starting_after(query: &str) -> Result<Option<u64>, Reject> {
    let text = queried(query, "starting_after");
    let number = text.map(|text| {
        text.parse()
            .map_err(|_| invalid("starting_after", "a number"))
    });
    number.transpose()
}

/// A response that has ended stays as it is.
pub(super) async fn cancel(process: &Process, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let store = process.jobs.store()?;
    load_for::<Response>(store, owner, id).await?;
    let mut cancelled = false;
    let response = change(store, id, |response: &mut Response| {
        cancelled = !response.status.is_over();
        if cancelled {
            response.status = Status::Cancelled;
        }
        cancelled
    });
    let response = response.await?.ok_or_else(|| not_found::<Response>(id))?;
    if cancelled {
        // Whoever runs it sees that it is not theirs any more.
        response.queued().leave(store).await?;
        store.settle().await?;
        process.jobs.metrics.ended(RESPONSE, "cancelled");
    }
    Ok(Reply::bytes(200, response.shown(store).await?))
}

pub(super) async fn delete(store: &Store, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let (_, response) = load_for::<Response>(store, owner, id).await?;
    response.queued().leave(store).await?;
    forget(store, &response).await?;
    Ok(Reply::json(
        200,
        &json!({"id": id, "object": "response", "deleted": true}),
    ))
}

/// Removes everything of a response.
async fn forget(store: &Store, response: &Response) -> Result<(), crate::store::Error> {
    store.remove(&response.id, &PARTS).await?;
    response.share().give_back(store, response.held).await
}
