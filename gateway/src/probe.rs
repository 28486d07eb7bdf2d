//! (IO) Health checks: asks the endpoints of backends that have one whether they are well, each replica for itself.
//! Bounded in checks at one time; a check ends before the next one of its endpoint begins.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use penstock_core::config::HealthCheck;
use rand::RngExt as _;
use tokio::time::MissedTickBehavior;

use crate::process::Process;
use crate::snapshot::Endpoint;
use crate::upstream::{self, Tasks};

/// Between two looks at who is due. The shortest interval is four times as long.
const TICK: Duration = Duration::from_millis(250);
/// Checks at one time; who is due beyond that waits for the next tick.
const AT_ONCE: usize = 64;

/// Runs until it is dropped.
pub(crate) async fn run(process: Arc<Process>) {
    let tasks = Tasks::default();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut running = FuturesUnordered::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                for (endpoint, check) in due(&process, AT_ONCE - running.len().min(AT_ONCE)) {
                    running.push(check_one(&process, &tasks, endpoint, check));
                }
            }
            Some(()) = running.next(), if !running.is_empty() => {}
        }
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

/// As Kubernetes counts it: a status from 200 to 399.
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
    answer.is_some_and(|(head, _)| (200..400).contains(&head.status().as_u16()))
}
