//! (IO) One attempt at a background response.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use super::call::{self, Verdict};
use super::metrics::RESPONSE;
use super::responses::{Response, WINDOW};
use super::shape::{self, Event, Status};
use super::stored::{change, now_s};
use super::stream::{MAX_EVENTS, first_number};
use crate::media_type::is_event_stream;
use crate::own_call::{self, Outcome};
use crate::process::Worker;
use crate::sse::Decoder;
use crate::store::{Error, Store};

/// Events that are written together, and how long one may wait for others.
const MAX_TOGETHER: usize = 32;
const TOGETHER: Duration = Duration::from_millis(50);
/// Before a call that nothing could take is tried again.
const LATER: Duration = Duration::from_secs(2);

/// What is to become of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It is over.
    Over,
    /// Another attempt after a time; whether this one counts.
    Again { after: Duration, counted: bool },
}

/// How the call went.
enum Went {
    /// With this answer.
    Well(Value),
    /// The caller's request is wrong, or the backend failed in a way that may pass.
    Badly(Verdict, Value),
}

/// Makes the call and keeps its answer. `body` is the request as it goes to the backend. Cancel safe: what was not
/// kept is done again by whoever takes the job next.
pub(super) async fn run(
    worker: &Arc<Worker>,
    store: &Store,
    mut response: Response,
    body: Bytes,
    attempt: u32,
) -> Result<End, Error> {
    let begun = change(store, &response.id, |record: &mut Response| {
        let goes = !record.status.is_over();
        if goes {
            record.status = Status::InProgress;
            record.attempt = attempt;
        }
        goes
    });
    match begun.await? {
        Some(record) if !record.status.is_over() => response = record,
        _ => return Ok(End::Over),
    }
    let head = call::head("/v1/responses", &response.headers, &response.id);
    let mut held = 0;
    let answer = own_call::send(worker, head, body, response.owner.behalf()).await;
    let went = if is_event_stream(answer.headers()) {
        follow(store, &response, answer, &mut held).await?
    } else {
        of_whole(own_call::collect(answer).await, &response)
    };
    let metrics = &worker.process.jobs.metrics;
    let (status, error) = match went {
        Went::Well(answer) => {
            held += response.answer(store, &answer).await?;
            let error = answer.get("error").filter(|error| !error.is_null());
            (Status::of(&answer), error.cloned())
        }
        Went::Badly(verdict, error) => {
            match again(verdict, attempt, response.created_at, now_s()) {
                Some(end) => {
                    keep_count(store, &response.id, held).await?;
                    return Ok(end);
                }
                None => (Status::Failed, Some(error)),
            }
        }
    };
    keep_count(store, &response.id, held).await?;
    conclude(store, &response.id, status, error).await?;
    metrics.ended(
        RESPONSE,
        if status == Status::Failed {
            "failed"
        } else {
            "completed"
        },
    );
    Ok(End::Over)
}

/// Writes down that `held` more bytes count for the owner, which are given back with the response.
async fn keep_count(store: &Store, id: &str, held: u64) -> Result<(), Error> {
    change(store, id, |record: &mut Response| {
        record.held += held;
        held > 0
    })
    .await?;
    Ok(())
}

/// Writes down how a response ended.
pub(super) async fn conclude(
    store: &Store,
    id: &str,
    status: Status,
    error: Option<Value>,
) -> Result<(), Error> {
    change(store, id, |record: &mut Response| {
        let goes = !record.status.is_over();
        if goes {
            record.status = status;
            record.error.clone_from(&error);
        }
        goes
    })
    .await?;
    store.settle().await?;
    Ok(())
}

/// Whether there is another attempt, and when.
fn again(verdict: Verdict, attempt: u32, created_at: u64, now_s: u64) -> Option<End> {
    if now_s >= created_at + WINDOW.as_secs() {
        return None;
    }
    match verdict {
        Verdict::Later => Some(End::Again {
            after: LATER,
            counted: false,
        }),
        Verdict::Again if attempt < call::MAX_ATTEMPTS => Some(End::Again {
            after: call::pause(attempt),
            counted: true,
        }),
        Verdict::Again | Verdict::Refused | Verdict::Done => None,
    }
}

fn of_whole(outcome: Outcome, response: &Response) -> Went {
    let verdict = call::verdict(outcome.status, outcome.reason.as_deref());
    if verdict != Verdict::Done {
        return Went::Badly(verdict, shape::error(&outcome.body));
    }
    match serde_json::from_slice(&outcome.body) {
        Ok(answer @ Value::Object(_)) => {
            Went::Well(shape::answer(answer, &response.id, response.created_at))
        }
        _ => Went::Badly(Verdict::Again, shape::error(b"")),
    }
}

/// Keeps the events of a stream as they come; `held` counts their bytes.
async fn follow(
    store: &Store,
    response: &Response,
    answer: http::Response<crate::stream::AnswerBody>,
    held: &mut u64,
) -> Result<Went, Error> {
    let broken = || {
        let error = json!({"code": "upstream_broken", "message": "The backend broke off."});
        Ok(Went::Badly(Verdict::Again, error))
    };
    let first = first_number(response.opened, response.attempt);
    let mut number = first;
    let mut body = answer.into_body();
    let mut decoder = Decoder::default();
    let mut waiting: Vec<(u64, Bytes)> = Vec::new();
    let mut bytes = 0_usize;
    loop {
        let frame = if waiting.is_empty() {
            Some(body.frame().await)
        } else {
            tokio::time::timeout(TOGETHER, body.frame()).await.ok()
        };
        let Some(frame) = frame else {
            *held += response.write(store, std::mem::take(&mut waiting)).await?;
            continue;
        };
        let Some(Ok(frame)) = frame else {
            return broken();
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        bytes = bytes.saturating_add(data.len());
        let mut ended = None;
        let mut is_broken = bytes > own_call::MAX_ANSWER_BYTES || number - first >= MAX_EVENTS / 2;
        let fed = decoder.feed(&data, |event, _| {
            let event = shape::event(event, number, &response.id, response.created_at);
            let (text, whole) = match event {
                _ if ended.is_some() => return,
                Event::Goes(text) => (text, None),
                Event::Ends(text, whole) => (text, Some(whole)),
                Event::Dropped => return,
                Event::Broken => {
                    is_broken = true;
                    return;
                }
            };
            waiting.push((number, text));
            number += 1;
            ended = whole;
        });
        if let Some(whole) = ended {
            *held += response.write(store, waiting).await?;
            return Ok(Went::Well(whole));
        }
        if fed.is_err() || is_broken {
            return broken();
        }
        if waiting.len() >= MAX_TOGETHER {
            *held += response.write(store, std::mem::take(&mut waiting)).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_tried_again_a_few_times_and_not_for_ever() {
        let day = WINDOW.as_secs();
        let counted = |after| {
            let after = Duration::from_secs(after);
            Some(End::Again {
                after,
                counted: true,
            })
        };
        let later = Some(End::Again {
            after: LATER,
            counted: false,
        });
        assert_eq!(again(Verdict::Again, 1, 0, 5), counted(1));
        assert_eq!(again(Verdict::Again, 3, 0, 5), counted(4));
        assert_eq!(again(Verdict::Again, call::MAX_ATTEMPTS, 0, 5), None);
        assert_eq!(again(Verdict::Later, 100, 0, day - 1), later);
        assert_eq!(again(Verdict::Later, 1, 0, day), None);
        assert_eq!(again(Verdict::Refused, 1, 0, 5), None);
    }
}
