//! (IO) The gateway's own paths on the admin port: `GET /config` says what is in force, `GET /budgets` how much of the
//! budgets is left that this replica has asked for, `GET /usage` what callers of all replicas took, `GET /load` tells
//! the scaler what every backend has to do, `POST /explain` where a request would go and why, `/keys` are those in the
//! store.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use jiff::ToSpan as _;
use jiff::civil::{Date, date};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::behalf;
use crate::budgets::account::Standing;
use crate::classifier::match_told;
use crate::conditions::Asked;
use crate::explain;
use crate::handle::{match_rule, read_call};
use crate::load::Demand;
use crate::openai::{Api, Call};
use crate::process::Process;
use crate::reject::Reject;
use crate::reshape::reshape;
use crate::stored_keys;
use crate::tasks::TaskSet;
use crate::usage::MAX_DAYS;
use crate::usage::sums::{Row, Sums};

/// Scalers that listen at one time: two replicas, a rollout's worth more, and a person or two.
pub(crate) const MAX_LOAD_LISTENERS: usize = 16;
/// One line at least this often.
const EVERY: Duration = Duration::from_secs(1);
/// Lines for new demand are at least this far apart: at one request at a time each one would be such a moment, and each
/// line takes time from requests.
const APART: Duration = Duration::from_millis(250);

/// `/config`, `/budgets`, `/usage`, `/load`, `/explain` and `/keys`.
pub(crate) fn routes(process: &Arc<Process>) -> Router {
    Router::new()
        .route("/config", get(config))
        .route("/budgets", get(budgets))
        .route("/usage", get(usage))
        .route("/load", get(load))
        .route("/explain", post(explain))
        .with_state(Arc::clone(process))
        .merge(stored_keys::api::routes(process))
}

async fn config(State(process): State<Arc<Process>>) -> Response {
    let Some(snapshot) = process.snapshot.load_full() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "no config yet\n").into_response();
    };
    let body = json!({
        "digest": snapshot.digest,
        "rejected": snapshot.rejected,
        "config": *snapshot.config,
    });
    (
        [(header::CONTENT_TYPE, "application/json")],
        format!("{body}\n"),
    )
        .into_response()
}

/// Those who have used most come first.
const MAX_STANDINGS: usize = 1_000;

async fn budgets(State(process): State<Arc<Process>>) -> Response {
    let mut standings = process.books.standings();
    standings.sort_by_key(|standing| std::cmp::Reverse(standing.used_permille()));
    standings.truncate(MAX_STANDINGS);
    let standings: Vec<_> = standings.iter().map(Standing::report).collect();
    let body = json!({ "data": standings });
    (
        [(header::CONTENT_TYPE, "application/json")],
        format!("{body}\n"),
    )
        .into_response()
}

/// Days, such as `2026-11-23`.
#[derive(Deserialize)]
struct Days {
    from: Date,
    to: Date,
}

/// What one caller took of one model of one backend on one day.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    day: Option<String>,
    #[serde(flatten)]
    row: Row,
    #[serde(flatten)]
    sums: Sums,
}

/// What was taken on these days, in UTC.
async fn usage(State(process): State<Arc<Process>>, Query(days): Query<Days>) -> Response {
    let refuse = |status: StatusCode, text: &str| (status, format!("{text}\n")).into_response();
    let (Some(from), Some(to)) = (number_of(days.from), number_of(days.to)) else {
        return refuse(StatusCode::BAD_REQUEST, "days begin with 1970-01-01");
    };
    if to < from || to - from >= MAX_DAYS {
        let text = format!("to must not be before from, and {MAX_DAYS} days are told at once");
        return refuse(StatusCode::BAD_REQUEST, &text);
    }
    if !process.usage.is_kept() {
        return refuse(
            StatusCode::NOT_FOUND,
            "this gateway has no store: nothing is summed up",
        );
    }
    let Ok(found) = process.usage.of(from, to).await else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the store does not answer");
    };
    let mut data = Vec::new();
    for (number, day) in found {
        let date = i32::try_from(number - from).ok();
        let date = date.and_then(|since| days.from.checked_add(since.days()).ok());
        let date = date.map(|date| date.to_string());
        for (row, sums) in day.into_rows() {
            let day = date.clone();
            data.push(Line { day, row, sums });
        }
    }
    let body = json!({ "data": data });
    (
        [(header::CONTENT_TYPE, "application/json")],
        format!("{body}\n"),
    )
        .into_response()
}

/// Days since 1970.
fn number_of(day: Date) -> Option<u32> {
    let since = day.since(date(1970, 1, 1)).ok()?;
    u32::try_from(since.get_days()).ok()
}

/// Where the body of `POST /explain` would be sent; its headers are taken to be the request's.
#[derive(Deserialize)]
struct Target {
    #[serde(default = "chat_completions")]
    path: String,
    #[serde(default = "usual_method")]
    method: String,
}

fn usual_method() -> String {
    "POST".to_owned()
}

fn chat_completions() -> String {
    "/v1/chat/completions".to_owned()
}

/// Answers as the request itself would be refused, or with an [`crate::explain::Explanation`].
async fn explain(
    State(process): State<Arc<Process>>,
    Query(target): Query<Target>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    match explained(&process, &target, &headers, &body).await {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(reject) => {
            let (status, headers, body) = reject.parts(crate::openai::Dialect::OpenAi);
            (status, headers, body).into_response()
        }
    }
}

async fn explained(
    process: &Process,
    Target { path, method }: &Target,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<String, Reject> {
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| Reject::PathNotFound)?;
    let snapshot = process.snapshot.load_full().ok_or(Reject::NotConfigured)?;
    // Who asks here stands for the proxy in front.
    let settings = &process.settings;
    let region = settings.origins.said(headers);
    // Who shows no key is told of rules for anybody, whatever they want of callers.
    let (who, _) = behalf::shown_to(process, headers, &[]).await?;
    let asked = Asked {
        method: &method,
        path,
        headers,
        region: region.or(settings.place.region.as_deref()),
        principal: who.principal(),
        call: &Call::NONE,
        tasks: &[],
    };
    let api = Api::of_path(path);
    if api.is_none()
        && let Some(rule) = snapshot.service_for(&asked)
    {
        if who.principal().is_some() {
            who.may_use(&rule.policy, rule.anonymous)?;
        }
        let explanation = explain::ask(process, rule, Api::Http, &asked, &[], &[]);
        return Ok(format!("{}\n", json!(explanation)));
    }
    let beside = || Api::beside(path).map(|(api, _)| api);
    let api = api.or_else(beside).ok_or(Reject::PathNotFound)?;
    if method != Method::POST {
        return Err(Reject::MethodNotAllowed { allowed: "POST" });
    }
    let call = read_call(headers, body)?;
    let asked = Asked {
        call: &call,
        ..asked
    };
    let look = |asked: &Asked<'_>| match_rule(Some(&snapshot), asked);
    let prompt = call.prompt;
    let ask = |set: Arc<TaskSet>| async move { process.desk.ask(&set, prompt).await };
    let (rule, tasks) = match_told(&asked, look, ask).await?;
    if who.principal().is_some() {
        who.may_call(&rule.policy, rule.anonymous, &call.model)?;
    }
    let reshaped = reshape(&rule, api, &call, body)?;
    let (body, changes) = reshaped
        .as_ref()
        .map_or((body, &[][..]), |new| (&new.body, &new.changes));
    let call = read_call(headers, body)?;
    let asked = Asked {
        call: &call,
        tasks: &tasks,
        ..asked
    };
    let explanation = explain::ask(process, &rule, api, &asked, body, changes);
    Ok(format!("{}\n", json!(explanation)))
}

/// A place among the listeners; given back when dropped.
struct Listener(Arc<Demand>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.leave();
    }
}

async fn load(State(process): State<Arc<Process>>) -> Response {
    let demand = Arc::clone(process.ledger.demand());
    if !demand.join(MAX_LOAD_LISTENERS) {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many listeners\n").into_response();
    }
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let moments = demand.subscribe();
    let feed = Feed {
        process,
        moments,
        ticks,
        last: None,
        _listener: Listener(demand),
    };
    let lines = futures::stream::unfold(feed, |mut feed| async move {
        feed.wait().await;
        Some((Ok::<_, Infallible>(line(&feed.process)), feed))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response()
}

/// One listener's lines.
struct Feed {
    process: Arc<Process>,
    moments: watch::Receiver<u64>,
    ticks: Interval,
    last: Option<Instant>,
    _listener: Listener,
}

impl Feed {
    /// Until the next line is due.
    async fn wait(&mut self) {
        let last = self.last;
        let soon = async {
            if self.moments.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Some(last) = last {
                tokio::time::sleep_until(last + APART).await;
            }
        };
        tokio::select! {
            _ = self.ticks.tick() => {}
            () = soon => {}
        }
        self.moments.mark_unchanged();
        self.last = Some(tokio_now());
    }
}

fn tokio_now() -> Instant {
    penstock_shell::clock::now().into()
}

fn line(process: &Process) -> Bytes {
    let now = penstock_shell::clock::now();
    let at_ms = penstock_shell::clock::unix_ms();
    let report = process.ledger.report(
        &process.settings.replica,
        process.process_start_ms,
        at_ms,
        now,
    );
    // Maps with text keys and numbers always have a JSON form.
    let mut line = serde_json::to_vec(&report).unwrap_or_default();
    line.push(b'\n');
    Bytes::from(line)
}
