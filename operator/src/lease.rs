//! (IO) Which replica of the operator writes: the holder of a Lease.
//!
//! Clocks of different machines are never compared. A lease counts as expired when this replica has seen it unchanged
//! for the lease's own duration. A holder that cannot renew stops writing before that time can have passed elsewhere.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;

use crate::apply::within_deadline;
use crate::metrics::Metrics;
use crate::world::{lock, now};

/// Name of the Lease.
pub(crate) const NAME: &str = "penstock-operator";
/// A lease that nobody renewed for this long may be taken.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder renews and the others look.
const PERIOD: Duration = Duration::from_secs(1);
/// How old a renewal may be for writes to begin. With the deadline of a call ([`crate::apply::CALL_DEADLINE`], 5 s) the
/// last write ends before [`DURATION`] has passed.
const WRITE_FOR: Duration = Duration::from_secs(9);

/// Whether this replica may write now. Clones share the answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leadership(Arc<Mutex<Option<Instant>>>);

impl Leadership {
    /// True from a renewal until [`WRITE_FOR`] later.
    pub(crate) fn may_write(&self) -> bool {
        lock(&self.0).is_some_and(|renewed| now().saturating_duration_since(renewed) < WRITE_FOR)
    }

    fn set(&self, renewed: Option<Instant>) {
        *lock(&self.0) = renewed;
    }
}

/// What a Lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Record {
    holder: Option<String>,
    duration: Duration,
    /// Changes with every renewal.
    renewed: Option<String>,
    transitions: i32,
}

impl Record {
    fn read(lease: &Lease) -> Self {
        let spec = lease.spec.clone().unwrap_or_default();
        let seconds = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok());
        Self {
            holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
            duration: seconds.map_or(DURATION, Duration::from_secs),
            renewed: spec.renew_time.map(|time| time.0.to_string()),
            transitions: spec.lease_transitions.unwrap_or(0),
        }
    }
}

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Create,
    Renew,
    TakeOver,
    Wait,
}

/// Decides. `unchanged` is for how long this replica has seen the record as it is.
fn decide(record: Option<&Record>, me: &str, unchanged: Duration) -> Step {
    let Some(record) = record else {
        return Step::Create;
    };
    match &record.holder {
        Some(holder) if holder == me => Step::Renew,
        Some(_) if unchanged < record.duration => Step::Wait,
        _ => Step::TakeOver,
    }
}

fn spec(
    me: &str,
    previous: &Record,
    step: Step,
    acquired: Option<MicroTime>,
    now: Timestamp,
) -> LeaseSpec {
    let taken = step != Step::Renew;
    LeaseSpec {
        acquire_time: if taken {
            Some(MicroTime(now))
        } else {
            acquired
        },
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        lease_transitions: Some(
            previous
                .transitions
                .saturating_add(i32::from(step == Step::TakeOver)),
        ),
        renew_time: Some(MicroTime(now)),
        ..LeaseSpec::default()
    }
}

/// Takes part until `shutdown`, then gives the Lease up so that another replica need not wait.
pub(crate) async fn run(
    client: Client,
    namespace: String,
    me: String,
    leadership: Leadership,
    metrics: Metrics,
    gained: impl Fn(),
    shutdown: CancellationToken,
) {
    let leases: Api<Lease> = Api::namespaced(client, &namespace);
    let mut seen: Option<(Record, Instant)> = None;
    let mut was_leader = false;
    while !shutdown.is_cancelled() {
        let asked = now();
        match within_deadline(attempt(&leases, &me, &mut seen)).await {
            Ok(true) => leadership.set(Some(asked)),
            Ok(false) => leadership.set(None),
            Err(err) => tracing::warn!(error = %err, "cannot reach the operator's lease"),
        }
        let is_leader = leadership.may_write();
        if is_leader != was_leader {
            metrics.leader.set(i64::from(is_leader));
            let message = if is_leader {
                "this replica writes now"
            } else {
                "this replica stops writing"
            };
            tracing::info!(lease.namespace = namespace, identity = me, "{message}");
            was_leader = is_leader;
            if is_leader {
                gained();
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = shutdown.cancelled() => {}
        }
    }
    leadership.set(None);
    if was_leader && let Err(err) = within_deadline(release(&leases, &me)).await {
        tracing::warn!(error = %err, "cannot give up the operator's lease; it expires by itself");
    }
}

/// One look at the Lease. Returns whether this replica holds it now.
async fn attempt(
    leases: &Api<Lease>,
    me: &str,
    seen: &mut Option<(Record, Instant)>,
) -> Result<bool, kube::Error> {
    let lease = leases.get_opt(NAME).await?;
    let record = lease.as_ref().map(Record::read);
    let since = match (&record, seen.as_ref()) {
        (Some(record), Some((known, since))) if known == record => *since,
        _ => now(),
    };
    *seen = record.clone().map(|record| (record, since));
    let step = decide(record.as_ref(), me, now().saturating_duration_since(since));
    if step == Step::Wait {
        return Ok(false);
    }
    let mut lease = lease.unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    let acquired = lease.spec.take().and_then(|spec| spec.acquire_time);
    lease.spec = Some(spec(
        me,
        &record.unwrap_or_default(),
        step,
        acquired,
        Timestamp::now(),
    ));
    // The resource version makes the API server refuse it when somebody else was quicker.
    let parameters = PostParams {
        field_manager: Some(NAME.to_owned()),
        ..PostParams::default()
    };
    let written = if step == Step::Create {
        leases.create(&parameters, &lease).await
    } else {
        leases.replace(NAME, &parameters, &lease).await
    };
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
            Ok(false)
        }
        Err(err) => Err(err),
    }
}

async fn release(leases: &Api<Lease>, me: &str) -> Result<(), kube::Error> {
    let Some(mut lease) = leases.get_opt(NAME).await? else {
        return Ok(());
    };
    let Some(spec) = lease
        .spec
        .as_mut()
        .filter(|spec| spec.holder_identity.as_deref() == Some(me))
    else {
        return Ok(());
    };
    spec.holder_identity = None;
    spec.lease_duration_seconds = Some(1);
    leases.replace(NAME, &PostParams::default(), &lease).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: Option<&str>) -> Record {
        Record {
            holder: holder.map(str::to_owned),
            duration: DURATION,
            renewed: None,
            transitions: 4,
        }
    }

    #[test]
    fn decision_table() {
        let fresh = DURATION.checked_sub(Duration::from_millis(1)).unwrap();
        let table = [
            ("no lease", None, Duration::ZERO, Step::Create),
            (
                "mine",
                Some(held_by(Some("me"))),
                Duration::ZERO,
                Step::Renew,
            ),
            (
                "mine, however old",
                Some(held_by(Some("me"))),
                DURATION * 9,
                Step::Renew,
            ),
            (
                "another's, fresh",
                Some(held_by(Some("other"))),
                fresh,
                Step::Wait,
            ),
            (
                "another's, seen unchanged too long",
                Some(held_by(Some("other"))),
                DURATION,
                Step::TakeOver,
            ),
            (
                "given up",
                Some(held_by(None)),
                Duration::ZERO,
                Step::TakeOver,
            ),
        ];
        for (case, record, unchanged, step) in table {
            assert_eq!(decide(record.as_ref(), "me", unchanged), step, "{case}");
        }
    }

    #[test]
    fn writes_end_before_another_replica_may_begin() {
        assert!(WRITE_FOR + crate::apply::CALL_DEADLINE < DURATION);
        assert!(
            PERIOD * 2 + crate::apply::CALL_DEADLINE < WRITE_FOR,
            "one lost renewal is survived"
        );
    }

    #[test]
    fn taking_over_counts_and_renewing_keeps_the_time_of_acquisition() {
        let (then, now) = (
            Timestamp::from_second(1).unwrap(),
            Timestamp::from_second(9).unwrap(),
        );
        let taken = spec(
            "me",
            &held_by(Some("other")),
            Step::TakeOver,
            Some(MicroTime(then)),
            now,
        );
        assert_eq!(
            (taken.lease_transitions, taken.acquire_time),
            (Some(5), Some(MicroTime(now)))
        );
        let renewed = spec(
            "me",
            &held_by(Some("me")),
            Step::Renew,
            Some(MicroTime(then)),
            now,
        );
        assert_eq!(
            (renewed.lease_transitions, renewed.acquire_time),
            (Some(4), Some(MicroTime(then)))
        );
    }

    #[test]
    fn empty_holder_reads_as_given_up() {
        let spec = LeaseSpec {
            holder_identity: Some(String::new()),
            ..LeaseSpec::default()
        };
        let lease = Lease {
            spec: Some(spec),
            ..Lease::default()
        };
        assert_eq!(Record::read(&lease).holder, None);
    }

    #[test]
    fn nobody_may_write_before_the_first_renewal() {
        assert!(!Leadership::default().may_write());
    }
}
