//! (IO) Holding a request while no candidate has a ready endpoint: for a bounded time, a bounded number of requests.
//! Held requests are in the ledger, so the scaler sees the demand.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;

use crate::attempt;
use crate::job::Job;
use crate::process::Process;
use crate::record::Record;
use crate::reject::Reject;
use crate::snapshot::{Candidate, Rule};

/// A request waits for a backend's `Retry-After` up to this age; most callers wait for as long, and a longer wait is
/// theirs to decide on.
const MAX_CLOSED: Duration = Duration::from_secs(3);
/// Added to such a wait by chance, at most.
const MAX_CLOSED_JITTER: Duration = Duration::from_secs(1);
/// As many may wait for it at least, however little is known of what the backends can.
const MIN_WAITING: u32 = 4;

/// One of the places for held requests.
pub(crate) struct Place<'a>(&'a Process);

impl<'a> Place<'a> {
    pub(crate) fn take(process: &'a Process) -> Option<Self> {
        let limit = i64::try_from(process.settings.limits.held).unwrap_or(i64::MAX);
        let before = process.metrics.held.inc();
        let place = Self(process);
        (before < limit).then_some(place)
    }

    /// The place of one who gives way, and leaves in a moment.
    pub(crate) fn take_over(process: &'a Process) -> Self {
        process.metrics.held.inc();
        Self(process)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.metrics.held.dec();
    }
}

/// One of those who wait for a rule's backends to be open again.
struct Herd {
    waiting: Arc<AtomicU32>,
    /// How many there are, this one included.
    count: u32,
}

impl Herd {
    fn join(rule: &Rule) -> Self {
        let waiting = Arc::clone(&rule.waiting);
        let count = waiting.fetch_add(1, Ordering::Relaxed) + 1;
        Self { waiting, count }
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits until the first endpoint may be asked again, if that is soon. Not all come back in the same moment, so that
/// the limit which they met is not met again at once.
pub(crate) async fn until_open(
    job: &Job<'_>,
    rule: &Rule,
    record: &mut Record,
    closed_ms: u64,
) -> bool {
    let wait = Duration::from_millis(closed_ms);
    let now = penstock_shell::clock::now();
    let waited = now.saturating_duration_since(record.started);
    let (Some(first), Some(_place)) = (
        rule.first_tier().and_then(|tier| tier.candidates.first()),
        Place::take(&job.worker.process),
    ) else {
        return false;
    };
    let now_ms = job.worker.process.ms(now);
    let per_s = rule
        .candidates()
        .map(|candidate| candidate.backend.per_s(now_ms));
    let per_s: u32 = per_s.sum();
    // More than that would be a herd when the time has come.
    let most = (per_s / 4).max(MIN_WAITING);
    let herd = Herd::join(rule);
    if waited + wait > MAX_CLOSED.min(rule.total) || herd.count > most {
        return false;
    }
    held(job, first, record, now);
    let jitter = rand::rng().random_range(Duration::ZERO..=MAX_CLOSED_JITTER);
    tokio::time::sleep(wait + jitter).await;
    true
}

/// Puts the request into the ledger as one that waits, so that the scaler sees the demand.
pub(crate) fn held(job: &Job<'_>, first: &Candidate, record: &mut Record, now: Instant) {
    let enter = || attempt::ticket(job, first, now);
    record.ticket.get_or_insert_with(enter).hold();
}

/// Waits until the rule, as the newest snapshot has it, has a ready endpoint of a candidate that `fits`, and returns it
/// in that form. Not where none is to be expected.
pub(crate) async fn until_ready(
    job: &Job<'_>,
    rule: &Rule,
    record: &mut Record,
    fits: impl Fn(&Candidate) -> bool,
) -> Result<Arc<Rule>, Reject> {
    let process = &*job.worker.process;
    let now = penstock_shell::clock::now();
    let now_ms = process.ms(now);
    let hold_ms = u64::try_from(process.settings.hold.as_millis()).unwrap_or(u64::MAX);
    let is_awaited = |one: &Candidate| fits(one) && one.backend.outlook.is_awaited(now_ms, hold_ms);
    if !rule.candidates().any(is_awaited) {
        return Err(Reject::NoEndpoint);
    }
    let Some(_place) = Place::take(process) else {
        return Err(Reject::NoEndpoint);
    };
    let first = rule
        .first_tier()
        .and_then(|tier| tier.candidates.first())
        .ok_or(Reject::NoEndpoint)?;
    held(job, first, record, now);
    let mut version = process.version.subscribe();
    // From the request's start, so that endpoints that come and go do not make it wait for ever.
    let limit = process.settings.hold.min(rule.total);
    let deadline = tokio::time::Instant::from_std(record.started + limit);
    loop {
        let newest = process
            .snapshot
            .load()
            .as_ref()
            .and_then(|snapshot| snapshot.rule_named(&rule.label).cloned());
        if let Some(newest) = newest
            && newest
                .candidates()
                .any(|candidate| candidate.has_endpoint() && fits(candidate))
        {
            return Ok(newest);
        }
        match tokio::time::timeout_at(deadline, version.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return Err(Reject::NoEndpoint),
        }
    }
}
