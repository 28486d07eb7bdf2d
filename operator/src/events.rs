//! (IO) Kubernetes Events about what changed, for `kubectl describe`. One for each change of a condition that people
//! act on; repeated ones become a series; a storm is cut off and counted.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use penstock_crds::ObjectRef;
use penstock_crds::condition::Condition;

use crate::apply::within_deadline;
use crate::metrics::Metrics;
use crate::world::{lock, now};

/// Events that may follow one another at once, and per [`REFILL`]. More help nobody to read them and load etcd.
const BURST: u32 = 60;
const REFILL: Duration = Duration::from_mins(1);

/// Reasons that are steps on the way, not faults.
const STEPS: [&str; 4] = ["Starting", "Pending", "RollingOut", "GatewayNotReady"];

/// Writes events.
pub(crate) struct Events {
    recorder: Recorder,
    budget: Mutex<Budget>,
    metrics: Metrics,
}

impl Events {
    /// Events come from `identity`.
    pub(crate) fn new(client: Client, identity: &str, metrics: Metrics) -> Self {
        let reporter = Reporter {
            controller: "penstock-operator".into(),
            instance: Some(identity.to_owned()),
        };
        let budget = Mutex::new(Budget {
            left: BURST,
            since: now(),
        });
        Self {
            recorder: Recorder::new(client, reporter),
            budget,
            metrics,
        }
    }

    /// Tells of the change from `before` to `after`. A failure is logged: an event is never worth a retry.
    pub(crate) async fn tell(
        &self,
        object: &ObjectRef,
        uid: &str,
        before: &[Condition],
        after: &[Condition],
    ) {
        let reference = ObjectReference {
            api_version: Some("penstock.dev/v1alpha1".to_owned()),
            kind: Some(object.kind.name().to_owned()),
            namespace: Some(object.id.namespace.clone()),
            name: Some(object.id.name.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        for event in changes(before, after) {
            if !lock(&self.budget).take(now()) {
                self.metrics.events_dropped.inc();
                continue;
            }
            self.metrics.wrote("Event", "event");
            if let Err(err) = within_deadline(self.recorder.publish(&event, &reference)).await {
                tracing::debug!(object = %object, error = %err, "event not written");
            }
        }
    }
}

#[derive(Debug)]
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    fn take(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= REFILL {
            *self = Self {
                left: BURST,
                since: now,
            };
        }
        let granted = self.left > 0;
        self.left = self.left.saturating_sub(1);
        granted
    }
}

/// An event for `Ready` whenever its reason changes, and for the others when they turn false.
fn changes(before: &[Condition], after: &[Condition]) -> Vec<Event> {
    after
        .iter()
        .filter(|condition| {
            let known = before.iter().find(|known| known.type_ == condition.type_);
            let changed = known.is_none_or(|known| {
                known.status != condition.status || known.reason != condition.reason
            });
            let matters = match condition.type_.as_str() {
                "Ready" => true,
                "Accepted" | "ResolvedRefs" | "ScalingActive" => condition.status == "False",
                _ => false,
            };
            changed && matters
        })
        .map(|condition| {
            let fault = condition.status == "False" && !STEPS.contains(&condition.reason.as_str());
            Event {
                type_: if fault {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: condition.reason.clone(),
                // The API server's bound is 1024 bytes.
                note: Some(condition.message.chars().take(250).collect()),
                action: condition.type_.clone(),
                secondary: None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn condition(type_: &str, status: &str, reason: &str) -> Condition {
        Condition {
            type_: type_.into(),
            status: status.into(),
            reason: reason.into(),
            message: "m".into(),
            observed_generation: None,
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        }
    }

    fn reasons(before: &[Condition], after: &[Condition]) -> Vec<(String, bool)> {
        changes(before, after)
            .into_iter()
            .map(|e| (e.reason, matches!(e.type_, EventType::Warning)))
            .collect()
    }

    #[test]
    fn only_changes_are_told() {
        let (starting, ready) = (
            condition("Ready", "False", "Starting"),
            condition("Ready", "True", "Ready"),
        );
        assert_eq!(
            reasons(&[], from_ref(&starting)),
            [("Starting".to_owned(), false)]
        );
        assert_eq!(reasons(from_ref(&starting), from_ref(&starting)), []);
        assert_eq!(
            reasons(&[starting], &[ready]),
            [("Ready".to_owned(), false)]
        );
    }

    #[test]
    fn faults_are_warnings() {
        let broken = condition("Accepted", "False", "InvalidValue");
        assert_eq!(reasons(&[], &[broken]), [("InvalidValue".to_owned(), true)]);
        assert_eq!(
            reasons(&[], &[condition("Programmed", "False", "Rejected")]),
            []
        );
    }

    #[test]
    fn storm_is_cut_off_until_the_next_minute() {
        let start = now();
        let mut budget = Budget {
            left: BURST,
            since: start,
        };
        let granted = (0..BURST * 3).filter(|_| budget.take(start)).count();
        assert_eq!(granted, BURST as usize);
        assert!(budget.take(start + REFILL));
    }
}
