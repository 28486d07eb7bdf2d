//! When a job may run: the lowest priority there is. A rule's pool has room for jobs while nobody waits for it and its
//! endpoints are below their limits, by what this gateway sent there and by what the engines say of all gateways; a
//! pool without an endpoint gets one job, which waits as a caller's request would and so asks for a replica. Arithmetic
//! is pure; [`Rooms`] counts.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use crate::choose::Standing;
use crate::process::Process;
use crate::settings::JobLimits;
use crate::snapshot::Rule;

/// Prompt tokens of streams without a first token: an endpoint that has more before it gets no jobs.
const MAX_WAITING_TOKENS: u32 = 4_096;

/// What counts of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct View {
    standing: Standing,
    /// From this gateway, or from all as the engine says.
    in_flight: u32,
    /// Whether some wait before the engine's batch.
    has_queue: bool,
    waiting_tokens: u32,
}

/// How many jobs may be in progress at a pool at one time. `held` requests wait for a ready endpoint.
fn places(held: u64, endpoints: &[View], limits: JobLimits) -> usize {
    if held > 0 {
        return 0;
    }
    if endpoints.is_empty() {
        return 1;
    }
    let with_room = endpoints.iter().filter(|endpoint| {
        matches!(endpoint.standing, Standing::Good | Standing::Worse)
            && !endpoint.has_queue
            && usize::try_from(endpoint.in_flight).is_ok_and(|count| count < limits.busy_at)
            && endpoint.waiting_tokens <= MAX_WAITING_TOKENS
    });
    with_room.count().saturating_mul(limits.per_endpoint)
}

/// Jobs in progress, by rule.
#[derive(Default)]
pub(super) struct Rooms(Mutex<HashMap<String, usize>>);

/// A job's place; given back when dropped.
pub(super) struct Place {
    process: Arc<Process>,
    rule: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let jobs = &self.process.jobs;
        jobs.metrics.calls.dec();
        let mut counts = jobs.rooms.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.rule) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.rule);
            }
        }
    }
}

/// A place for one more job under this rule, if there is room.
pub(super) fn take(process: &Arc<Process>, rule: &Rule) -> Option<Place> {
    let limits = process.settings.jobs;
    let busy = process.settings.limits.requests / 2;
    let in_flight = process.metrics.in_flight.get();
    let waits = process.is_draining() || !process.queue.is_empty();
    if waits || usize::try_from(in_flight).is_ok_and(|count| count >= busy) {
        return None;
    }
    let now_ms = process.ms(penstock_shell::clock::now());
    let mut held = 0;
    let mut endpoints = Vec::new();
    // A job does not overflow into a dearer tier: it waits.
    for tier in &rule.tiers {
        for candidate in tier.candidates.iter().filter(|one| !one.is_fallback()) {
            held += candidate.backend.ledger.held();
            endpoints.extend(candidate.backend.endpoints.iter().map(|endpoint| {
                let live = &endpoint.live;
                // Read from now on; until then what this gateway knows counts.
                live.engine.want(now_ms);
                let queue = live.engine.at(now_ms).queue.unwrap_or_default();
                let in_flight = live.in_flight.load(Ordering::Relaxed);
                View {
                    // A job is not urgent: it waits while any model is over a limit.
                    standing: Standing::of(live, live.limits.of_any(now_ms), now_ms),
                    in_flight: in_flight.max(queue.running.saturating_add(queue.waiting)),
                    has_queue: queue.waiting > 0,
                    waiting_tokens: live.waiting_tokens.load(Ordering::Relaxed),
                }
            }));
        }
        if !endpoints.is_empty() {
            break;
        }
    }
    let places = places(held, &endpoints, limits);
    let mut counts = process
        .jobs
        .rooms
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let count = counts.entry(rule.label.clone()).or_insert(0);
    if *count >= places {
        if *count == 0 {
            counts.remove(&rule.label);
        }
        return None;
    }
    *count += 1;
    process.jobs.metrics.calls.inc();
    Some(Place {
        process: Arc::clone(process),
        rule: rule.label.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: JobLimits = JobLimits {
        per_endpoint: 8,
        busy_at: 16,
    };

    fn idle() -> View {
        View {
            standing: Standing::Good,
            in_flight: 0,
            has_queue: false,
            waiting_tokens: 0,
        }
    }

    #[test]
    fn endpoints_with_room_have_places() {
        assert_eq!(places(0, &[idle(), idle()], LIMITS), 16);
        for busy in [
            View {
                in_flight: 16,
                ..idle()
            },
            View {
                has_queue: true,
                ..idle()
            },
            View {
                waiting_tokens: 5_000,
                ..idle()
            },
            View {
                standing: Standing::Quiet,
                ..idle()
            },
            View {
                standing: Standing::Failing,
                ..idle()
            },
            View {
                standing: Standing::Aside,
                ..idle()
            },
        ] {
            assert_eq!(places(0, &[idle(), busy], LIMITS), 8, "{busy:?}");
            assert_eq!(places(0, &[busy], LIMITS), 0, "{busy:?}");
        }
    }

    #[test]
    fn jobs_wait_while_callers_do() {
        assert_eq!(places(1, &[idle()], LIMITS), 0);
    }

    #[test]
    fn one_job_wakes_a_pool_that_sleeps() {
        assert_eq!(places(0, &[], LIMITS), 1);
        assert_eq!(places(1, &[], LIMITS), 0);
    }
}
