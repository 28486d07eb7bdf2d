//! (IO) One request to several backends at once. Here they are chosen, and, where the rule wants all of their answers,
//! put into one JSON document (decision 0020); where it wants the first one, `hedge` lets them race. Bounded in
//! backends, bytes and time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use penstock_core::config::FanOutMode;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::attempt::{Answer, candidate_of, note};
use crate::choose::{Pass, choose};
use crate::decisions::{Made, Purpose};
use crate::failure::{self, Failure};
use crate::fallback::Failed;
use crate::hedge::{Beside, Lane, attempt};
use crate::job::Job;
use crate::meter::Usage;
use crate::outcome;
use crate::record::{OK, Record, count_usage, sums};
use crate::reject::Reject;
use crate::snapshot::Rule;
use crate::upstream::Exchange;
use crate::usage::Taken;
use crate::wish::{BackendModel, Unfit};

/// What one backend may answer to a rule that wants all answers; those of eight have 8 MiB.
const MAX_PART_BYTES: usize = 1 << 20;

/// Other backends than that of `first`, or other models of it, to send the request to: those that work, each once, by
/// priority and strategy.
pub(crate) fn beside(
    job: &Job<'_>,
    rule: &Rule,
    record: &mut Record,
    first: &Lane,
    unfit: &Unfit,
) -> Vec<Beside> {
    let most = rule.fan_out.map_or(1, |fan_out| fan_out.max);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut unfit = Unfit {
        failed: Failed::NOTHING,
        ..unfit.clone()
    };
    let candidate = candidate_of(rule, &first.choice);
    unfit.models.extend(candidate.map(BackendModel::of));
    let mut lanes = Vec::new();
    while lanes.len() + 1 < most {
        let wish = job.wish(penstock_shell::clock::now(), &unfit);
        let found = choose(rule, &record.tried, wish, &mut rand::rng());
        // Those that fail are for requests that have no other: they come out of the budget of retries.
        let Some(choice) = found.ok().filter(|choice| choice.pass == Pass::Fresh) else {
            break;
        };
        let Some(candidate) = candidate_of(rule, &choice) else {
            break;
        };
        let misfit = job.misfit(candidate, &choice, rule.rest, &mut unfit);
        if let Some(decisions) = record.decisions.as_mut().filter(|_| misfit.is_none()) {
            let made = Made {
                purpose: Purpose::FanOut,
                unfit: &unfit,
                tried: &record.tried,
                found: Ok(&choice),
                changes: &record.changes,
            };
            decisions.note(job, rule, &made);
        }
        unfit.models.push(BackendModel::of(candidate));
        if misfit.is_none() {
            lanes.push(Beside::enter(job, rule, choice, Some(candidate)));
        }
    }
    lanes
}

/// How the attempt at one backend ended.
enum End {
    Answered {
        status: StatusCode,
        bytes: Bytes,
        usage: Option<Usage>,
        took: Duration,
    },
    Refused {
        head: Response<()>,
        bytes: Bytes,
    },
    Failed(Failure),
    TooLarge,
}

/// Sends the request to further backends, and waits until all have answered, failed, or are too late. `first` is under
/// way in the record. Without one good answer the caller gets what a usual rule would tell.
pub(crate) async fn all(
    job: &Job<'_>,
    record: &mut Record,
    rule: &Rule,
    first: Lane,
    unfit: &Unfit,
) -> Result<Answer, Reject> {
    let within = Duration::from_millis(rule.fan_out.map_or(0, |fan_out| fan_out.within_ms));
    let deadline = first.entered + within;
    let others = beside(job, rule, record, &first, unfit);
    record.attempts += others.len();
    record.fan_out = Some((FanOutMode::All, others.len() + 1));
    let (lanes, mut places): (Vec<Lane>, Vec<_>) = std::iter::once((first, None))
        .chain(others.into_iter().map(|one| (one.lane, Some(one.place))))
        .unzip();
    let running = lanes.iter().enumerate();
    let mut running: FuturesUnordered<_> = running
        .map(|(index, lane)| Box::pin(async move { (index, run(job, rule, lane).await) }))
        .collect();
    let mut ends: Vec<Option<End>> = lanes.iter().map(|_| None).collect();
    while let Ok(Some((index, end))) =
        tokio::time::timeout_at(deadline.into(), running.next()).await
    {
        if index == 0 {
            record.in_flight = None;
        }
        places[index] = None;
        ends[index] = Some(end);
    }
    drop(running);
    drop(places);
    record.in_flight = None;
    for (lane, end) in lanes.iter().zip(&ends) {
        if let Some(End::Failed(failure)) = end {
            note(job, rule, lane, failure, record);
        }
    }
    let good = |end: &Option<End>| matches!(end, Some(End::Answered { .. }));
    let Some(main) = ends.iter().position(good) else {
        return match ends.into_iter().flatten().next() {
            Some(End::Refused { head, bytes }) => Ok(Answer::Refused { head, bytes }),
            Some(End::Failed(failure)) => failure.conclude(),
            _ => Err(Reject::UpstreamTimeout),
        };
    };
    let choice = &lanes[main].choice;
    record.choose(choice.tier, choice.candidate, choice.pass);
    for (index, (lane, end)) in lanes.iter().zip(&ends).enumerate() {
        // The record counts that one.
        if index != main {
            count(job, rule, lane, end.as_ref(), record);
        }
    }
    let usage = match &ends[main] {
        Some(End::Answered { usage, .. }) => *usage,
        _ => None,
    };
    let mut head = Response::new(());
    let json = HeaderValue::from_static("application/json");
    head.headers_mut().insert(CONTENT_TYPE, json);
    let bytes = document(job, rule, &lanes, ends);
    Ok(Answer::Whole { head, bytes, usage })
}

async fn run(job: &Job<'_>, rule: &Rule, lane: &Lane) -> End {
    let (answer, reservation) = match attempt(job, rule, &lane.choice).await {
        Ok(answered) => answered,
        Err(failure) => return End::Failed(failure),
    };
    outcome::answered(job, rule, lane, &answer);
    let (head, read, usage) = match answer {
        Answer::Whole { head, bytes, usage } => (head, Some(bytes), usage),
        Answer::Stream { head, begun } => {
            let mut exchange = begun.exchange;
            exchange.set_deadline(job.started + rule.total);
            (head, rest(begun.first.bytes, exchange).await, None)
        }
        Answer::Refused { head, bytes } => {
            if let Some(reservation) = reservation {
                reservation.refused();
            }
            return End::Refused { head, bytes };
        }
    };
    if let Some(reservation) = reservation {
        reservation.ended(usage, None);
    }
    match read {
        None => End::Failed(Failure::Broken),
        Some(bytes) if bytes.len() > MAX_PART_BYTES => End::TooLarge,
        Some(bytes) => End::Answered {
            status: head.status(),
            bytes,
            usage,
            took: penstock_shell::clock::now().saturating_duration_since(lane.entered),
        },
    }
}

/// What has come and what follows, up to a little more than is wanted; `None` if it breaks off.
async fn rest(first: Bytes, mut exchange: Exchange) -> Option<Bytes> {
    let mut all = BytesMut::from(first);
    while !exchange.is_over() && all.len() <= MAX_PART_BYTES {
        match exchange.frame().await {
            Ok(Some(bytes)) => all.extend_from_slice(&bytes),
            Ok(None) => break,
            Err(_) => return None,
        }
    }
    Some(all.freeze())
}

/// Counts an answer beside the one that the record counts.
fn count(job: &Job<'_>, rule: &Rule, lane: &Lane, end: Option<&End>, record: &Record) {
    let (Some(candidate), Some(End::Answered { usage, took, .. })) =
        (candidate_of(rule, &lane.choice), end)
    else {
        return;
    };
    let metrics = &job.worker.process.metrics;
    metrics.ended(Some(&candidate.metrics), &rule.label, OK);
    let call = candidate.metrics.call(job.api);
    call.duration.observe(took.as_secs_f64());
    if let Some(usage) = usage {
        count_usage(metrics, candidate, job.api, *usage);
        let sums = sums(candidate, *usage);
        let ledger = &candidate.backend.ledger;
        ledger.count(sums.input_tokens, sums.output_tokens);
        job.worker.process.usage.note(&Taken {
            sums,
            ..record.taken_from(candidate)
        });
    }
}

#[derive(Serialize)]
struct Document<'a> {
    object: &'static str,
    data: Vec<Part<'a>>,
}

/// What one backend said: `body`, or `error`.
#[derive(Serialize)]
struct Part<'a> {
    backend: &'a str,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<Body>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Body {
    /// As the backend wrote it.
    Json(Box<RawValue>),
    Text(String),
}

fn document(job: &Job<'_>, rule: &Rule, lanes: &[Lane], ends: Vec<Option<End>>) -> Bytes {
    let data = lanes.iter().zip(ends).map(|(lane, end)| {
        let candidate = candidate_of(rule, &lane.choice);
        let backend = candidate.map_or("", |candidate| candidate.metrics.backend());
        part(job, backend, end)
    });
    let document = Document {
        object: "list",
        data: data.collect(),
    };
    Bytes::from(serde_json::to_vec(&document).unwrap_or_default())
}

fn part<'a>(job: &Job<'_>, backend: &'a str, end: Option<End>) -> Part<'a> {
    let ended = match end {
        None => Err(Reject::UpstreamTimeout),
        Some(End::Failed(failure)) => failure.conclude(),
        Some(End::Refused { head, bytes }) => Ok(Answer::Refused { head, bytes }),
        Some(End::TooLarge) => {
            let message = format!("The answer is larger than {MAX_PART_BYTES} bytes.");
            let error = json!({"message": message, "type": "server_error", "code": "too_large"});
            return Part::failed(backend, StatusCode::BAD_GATEWAY, error);
        }
        Some(End::Answered { status, bytes, .. }) => {
            let body = match serde_json::from_slice(&bytes) {
                Ok(json) => Body::Json(json),
                Err(_) => Body::Text(String::from_utf8_lossy(&bytes).into_owned()),
            };
            return Part {
                backend,
                status: status.as_u16(),
                body: Some(body),
                error: None,
            };
        }
    };
    let reject = match ended {
        Ok(Answer::Refused { head, bytes }) => match failure::refusal(head.status(), &bytes) {
            None => return Part::failed(backend, head.status(), error_of(&bytes)),
            Some(reject) => reject,
        },
        Err(reject) => reject,
        Ok(_) => Reject::UpstreamBroken,
    };
    let (status, _, bytes) = reject.parts(job.api.dialect());
    Part::failed(backend, status, error_of(bytes.as_ref()))
}

impl<'a> Part<'a> {
    fn failed(backend: &'a str, status: StatusCode, error: Value) -> Self {
        Self {
            backend,
            status: status.as_u16(),
            body: None,
            error: Some(error),
        }
    }
}

/// What an error answer says.
fn error_of(bytes: &[u8]) -> Value {
    let mut value: Value = serde_json::from_slice(bytes).unwrap_or_default();
    value.get_mut("error").map(Value::take).unwrap_or_default()
}
