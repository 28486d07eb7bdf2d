//! (IO) Holding a request while no candidate has a ready endpoint: for a bounded time, a bounded number of requests.
//! Held requests are in the ledger, so the scaler sees the demand.

use std::sync::Arc;

use crate::attempt::Job;
use crate::load::Ticket;
use crate::process::Process;
use crate::record::Record;
use crate::reject::Reject;
use crate::snapshot::{Candidate, Rule};

/// One of the places for held requests.
struct Place<'a>(&'a Process);

impl<'a> Place<'a> {
    fn take(process: &'a Process) -> Option<Self> {
        let limit = i64::try_from(process.settings.limits.held).unwrap_or(i64::MAX);
        let before = process.metrics.held.inc();
        let place = Self(process);
        (before < limit).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.metrics.held.dec();
    }
}

/// Waits until the rule, as the newest snapshot has it, has a ready endpoint of a candidate that `fits`, and returns it
/// in that form.
pub(crate) async fn until_ready(
    job: &Job<'_>,
    rule: &Rule,
    record: &mut Record,
    fits: impl Fn(&Candidate) -> bool,
) -> Result<Arc<Rule>, Reject> {
    let process = &*job.worker.process;
    let Some(_place) = Place::take(process) else {
        return Err(Reject::NoEndpoint);
    };
    let first = rule
        .tiers
        .first()
        .and_then(|tier| tier.candidates.first())
        .ok_or(Reject::NoEndpoint)?;
    let now = penstock_shell::clock::now();
    record
        .ticket
        .get_or_insert_with(|| {
            Ticket::enter(
                &first.backend.ledger,
                job.worker.index,
                job.body.len(),
                job.call.stream,
                now,
            )
        })
        .hold();
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
