//! (IO) Health checks: asks the endpoints of backends that have one whether they are well, each replica for itself; and
//! asks engines that are doubtful (see `doubt`) for any answer at all. Bounded in checks at one time; a check ends
//! before the next one of its endpoint begins, and so does a question.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::Uri;
use penstock_core::config::HealthCheck;
use rand::RngExt as _;
use tokio::time::MissedTickBehavior;

use crate::doubt::LIMIT;
use crate::process::Process;
use crate::snapshot::{Address, Endpoint};
use crate::upstream::{self, Tasks};

/// Between two looks at who is due. The shortest interval is four times as long.
pub(crate) const TICK: Duration = Duration::from_millis(250);
/// Checks at one time; who is due beyond that waits for the next tick. As many questions.
const AT_ONCE: usize = 64;
/// What an engine is asked that is doubtful and has no health check. All of them have it, and give it without work; any
/// answer will do.
const QUESTION: &str = "/v1/models";

/// Runs until it is dropped.
pub(crate) async fn run(process: Arc<Process>) {
    let tasks = Tasks::default();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut running = FuturesUnordered::new();
    let mut asking = FuturesUnordered::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                for (endpoint, check) in due(&process, AT_ONCE - running.len().min(AT_ONCE)) {
                    running.push(check_one(&process, &tasks, endpoint, check));
                }
                for (endpoint, path) in doubtful(&process, AT_ONCE - asking.len().min(AT_ONCE)) {
                    asking.push(ask_one(&process, &tasks, endpoint, path));
                }
            }
            Some(()) = running.next(), if !running.is_empty() => {}
            Some(()) = asking.next(), if !asking.is_empty() => {}
        }
    }
}

/// Who is to be asked whether it answers anything, and for what; at most so many.
fn doubtful(process: &Process, most: usize) -> Vec<(Arc<Endpoint>, Uri)> {
    let snapshot = process.snapshot.load();
    let Some(snapshot) = snapshot.as_deref() else {
        return Vec::new();
    };
    let now_ms = process.ms(penstock_shell::clock::now());
    // Providers are not asked: they have no peers, and would not like it.
    let pods = snapshot
        .health_checks()
        .filter(|(endpoint, _)| matches!(endpoint.address, Address::Socket(_)));
    let due = pods.filter(|(endpoint, _)| endpoint.live.pulse.doubt.is_due(now_ms));
    let asked = due.filter_map(|(endpoint, check)| {
        let path = check.map_or(QUESTION, |check| &check.path);
        Some((Arc::clone(endpoint), path.parse().ok()?))
    });
    asked.take(most).collect()
}

async fn ask_one(process: &Process, tasks: &Tasks, endpoint: Arc<Endpoint>, uri: Uri) {
    let asked = tokio::time::timeout(LIMIT, upstream::get(&endpoint, uri, tasks, LIMIT)).await;
    let is_answered = matches!(asked, Ok(Some(_)));
    let live = &endpoint.live;
    let now_ms = process.ms(penstock_shell::clock::now());
    if !live.pulse.doubt.probed(is_answered, now_ms) {
        return;
    }
    if is_answered {
        tracing::info!(backend.id = %live.backend, endpoint = %endpoint.address, "endpoint answers again");
    } else {
        tracing::warn!(
            backend.id = %live.backend,
            endpoint = %endpoint.address,
            "endpoint holds requests and answers nothing, not even whether it is there"
        );
    }
}

/// Whose turn it is, at most so many.
fn due(process: &Process, most: usize) -> Vec<(Arc<Endpoint>, HealthCheck)> {
    let snapshot = process.snapshot.load();
    let Some(snapshot) = snapshot.as_deref() else {
        return Vec::new();
    };
    let now_ms = process.ms(penstock_shell::clock::now());
    let mut due = Vec::new();
    for (endpoint, check) in snapshot.health_checks() {
        let Some(check) = check else {
            endpoint.live.health.forget();
            continue;
        };
        // So that replicas do not ask together.
        let jitter = rand::rng().random_range(0..=check.interval_ms / 10);
        let interval_ms = check.interval_ms + jitter;
        if due.len() < most && endpoint.live.health.is_due(now_ms, interval_ms) {
            due.push((Arc::clone(endpoint), check.clone()));
        }
    }
    due
}

async fn check_one(process: &Process, tasks: &Tasks, endpoint: Arc<Endpoint>, check: HealthCheck) {
    let limit = Duration::from_millis(check.timeout_ms);
    let asked = tokio::time::timeout(limit, is_well(tasks, &endpoint, &check, limit)).await;
    let is_well = asked.unwrap_or(false);
    let live = &endpoint.live;
    if !live.health.note(is_well, &check) {
        return;
    }
    if is_well {
        let now_ms = process.ms(penstock_shell::clock::now());
        live.ready_ms
            .store(now_ms, std::sync::atomic::Ordering::Relaxed);
        tracing::info!(backend.id = %live.backend, endpoint = %endpoint.address, "endpoint passes its health check again");
    } else {
        tracing::warn!(backend.id = %live.backend, endpoint = %endpoint.address, "endpoint fails its health check");
    }
}

/// As Kubernetes counts it: a status from 200 to 399. Who is too busy to say so, 429, is not ill.
async fn is_well(
    tasks: &Tasks,
    endpoint: &Arc<Endpoint>,
    check: &HealthCheck,
    limit: Duration,
) -> bool {
    let Ok(uri) = check.path.parse() else {
        return false;
    };
    let answer = upstream::get(endpoint, uri, tasks, limit).await;
    answer.is_some_and(|(head, _)| matches!(head.status().as_u16(), 200..400 | 429))
}
