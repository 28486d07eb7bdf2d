//! What the operator needs to know of a pod: whose it is, whether it answers, and if not, why. Pure.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use penstock_core::names::{BACKEND_LABEL, GATEWAY_LABEL};

/// Annotation on pods that the operator's Deployments make: which template they come from.
pub(crate) const TEMPLATE_ANNOTATION: &str = "penstock.dev/template";

/// Longest message of the kubelet or scheduler that is passed on.
const MAX_MESSAGE: usize = 256;

/// Whose pod it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A replica of this gateway.
    Gateway(String),
    /// A replica of this LLMBackend's pool.
    Backend(String),
}

/// A pod of a gateway or a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodFacts {
    /// Whose.
    pub(crate) owner: Owner,
    /// `metadata.uid`: its key in the acks.
    pub(crate) uid: String,
    /// Its name.
    pub(crate) name: String,
    /// Which template it was made from.
    pub(crate) template: Option<String>,
    /// Condition `Ready`, and since when (Unix seconds).
    pub(crate) ready_since: Option<i64>,
    /// It is being deleted, or has ended.
    pub(crate) leaving: bool,
    /// When its main container last started (Unix seconds).
    pub(crate) started: Option<i64>,
    /// Why it is not ready, when something is wrong.
    pub(crate) trouble: Option<Trouble>,
}

/// Why a pod does not get ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// One CamelCase word of the kubelet or scheduler, such as `ImagePullBackOff`.
    pub(crate) reason: String,
    /// What they say about it.
    pub(crate) message: String,
}

impl PodFacts {
    /// Reads a pod; `None` for one that belongs to no gateway and no pool.
    pub(crate) fn read(pod: &Pod) -> Option<Self> {
        let labels = pod.metadata.labels.as_ref()?;
        let owner = match (labels.get(GATEWAY_LABEL), labels.get(BACKEND_LABEL)) {
            (Some(gateway), None) => Owner::Gateway(gateway.clone()),
            (None, Some(backend)) => Owner::Backend(backend.clone()),
            _ => return None,
        };
        let status = pod.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        let ready = conditions
            .iter()
            .find(|condition| condition.type_ == "Ready" && condition.status == "True");
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let containers = status.container_statuses.unwrap_or_default();
        let main = containers.first();
        let started = main
            .and_then(|container| {
                container
                    .state
                    .as_ref()?
                    .running
                    .as_ref()?
                    .started_at
                    .as_ref()
            })
            .map(|time| time.0.as_second());
        let unschedulable = conditions
            .iter()
            .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
            .map(|condition| Trouble {
                reason: condition
                    .reason
                    .clone()
                    .unwrap_or_else(|| "Unschedulable".to_owned()),
                message: shorten(
                    condition
                        .message
                        .as_deref()
                        .unwrap_or("no node takes the pod"),
                ),
            });
        let trouble = if ready.is_some() {
            None
        } else {
            unschedulable.or_else(|| main.and_then(trouble))
        };
        Some(Self {
            owner,
            uid: pod.metadata.uid.clone()?,
            name: pod.metadata.name.clone()?,
            template: pod
                .metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(TEMPLATE_ANNOTATION).cloned()),
            ready_since: ready.map(|ready| {
                ready
                    .last_transition_time
                    .as_ref()
                    .map_or(0, |time| time.0.as_second())
            }),
            leaving: pod.metadata.deletion_timestamp.is_some() || ended,
            started,
            trouble,
        })
    }

    /// Whether it takes requests.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready_since.is_some() && !self.leaving
    }
}

/// The same trouble must read the same while the kubelet goes round its retry loop (`ErrImagePull` ⇄
/// `ImagePullBackOff`, running ⇄ `CrashLoopBackOff`): each change of text would be a status write.
fn trouble(container: &ContainerStatus) -> Option<Trouble> {
    let state = container.state.as_ref()?;
    let last = container
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    if let Some(ended) = state.terminated.as_ref().or(last) {
        if ended.reason.as_deref() == Some("OOMKilled") {
            let message =
                "the container needed more memory than its limit: raise resources.limits.memory"
                    .to_owned();
            return Some(Trouble {
                reason: "OOMKilled".to_owned(),
                message,
            });
        }
        let message = format!(
            "the container ended with exit code {}: see its log",
            ended.exit_code
        );
        return Some(Trouble {
            reason: "CrashLoopBackOff".to_owned(),
            message,
        });
    }
    let waiting = state.waiting.as_ref()?;
    let reason = waiting.reason.clone()?;
    match reason.as_str() {
        "ContainerCreating" | "PodInitializing" => None,
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" => {
            let message = format!(
                "image {} cannot be pulled: correct its name or the node's access",
                container.image
            );
            Some(Trouble {
                reason: "ImagePullBackOff".to_owned(),
                message,
            })
        }
        _ => Some(Trouble {
            reason,
            message: shorten(waiting.message.as_deref().unwrap_or_default()),
        }),
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(status: Value) -> PodFacts {
        let pod = json!({
            "metadata": {"name": "p", "uid": "u", "labels": {"penstock.dev/backend": "blue"}},
            "status": status,
        });
        PodFacts::read(&serde_json::from_value(pod).unwrap()).unwrap()
    }

    fn container(state: Value, last: Value) -> Value {
        json!({"containerStatuses": [{
            "name": "engine", "image": "i", "imageID": "", "ready": false, "restartCount": 1,
            "state": state, "lastState": last,
        }]})
    }

    #[test]
    fn reasons_are_lifted_from_containers() {
        let waiting = |reason: &str| json!({"waiting": {"reason": reason, "message": "why"}});
        let ended = |reason: &str| json!({"terminated": {"reason": reason, "exitCode": 1}});
        let none = json!({});
        let reason = |state: Value, last: &Value| {
            read(container(state, last.clone()))
                .trouble
                .map(|t| t.reason)
        };
        assert_eq!(
            reason(waiting("ImagePullBackOff"), &none).as_deref(),
            Some("ImagePullBackOff")
        );
        assert_eq!(
            reason(waiting("CreateContainerConfigError"), &none).as_deref(),
            Some("CreateContainerConfigError")
        );
        assert_eq!(
            reason(waiting("CrashLoopBackOff"), &ended("Error")).as_deref(),
            Some("CrashLoopBackOff")
        );
        assert_eq!(
            reason(waiting("CrashLoopBackOff"), &ended("OOMKilled")).as_deref(),
            Some("OOMKilled")
        );
        assert_eq!(
            reason(ended("OOMKilled"), &none).as_deref(),
            Some("OOMKilled")
        );
        assert_eq!(reason(waiting("ContainerCreating"), &none), None);
    }

    #[test]
    fn trouble_reads_the_same_through_the_kubelets_retry_loop() {
        let none = json!({});
        let waiting = |reason: &str, message: &str| json!({"waiting": {"reason": reason, "message": message}});
        let ended = json!({"terminated": {"reason": "Error", "exitCode": 2}});
        let trouble =
            |state: Value, last: &Value| read(container(state, last.clone())).trouble.unwrap();
        assert_eq!(
            trouble(waiting("ErrImagePull", "not found"), &none),
            trouble(waiting("ImagePullBackOff", "Back-off pulling image"), &none),
        );
        let crashed = trouble(ended.clone(), &none);
        assert_eq!(
            crashed,
            trouble(waiting("CrashLoopBackOff", "back-off 10s"), &ended)
        );
        assert_eq!(
            crashed,
            trouble(
                json!({"running": {"startedAt": "1970-01-01T00:00:07Z"}}),
                &ended
            )
        );
    }

    #[test]
    fn unschedulable_comes_with_the_schedulers_words() {
        let pod = read(json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"},
        ]}));
        assert_eq!(
            pod.trouble.unwrap(),
            Trouble {
                reason: "Unschedulable".into(),
                message: "0/2 nodes".into()
            }
        );
    }

    #[test]
    fn ready_pod_that_is_being_deleted_does_not_count() {
        let ready = json!({"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "1970-01-01T00:00:07Z"},
        ]});
        let mut pod = read(ready);
        assert_eq!((pod.ready_since, pod.is_ready()), (Some(7), true));
        pod.leaving = true;
        assert!(!pod.is_ready());
    }

    #[test]
    fn pod_with_both_labels_or_none_belongs_to_nobody() {
        for labels in [
            json!({}),
            json!({"penstock.dev/backend": "b", "penstock.dev/gateway": "g"}),
        ] {
            let pod = json!({"metadata": {"name": "p", "uid": "u", "labels": labels}});
            assert_eq!(PodFacts::read(&serde_json::from_value(pod).unwrap()), None);
        }
    }

    #[test]
    fn long_message_is_cut_between_characters() {
        assert_eq!(shorten(&"ü".repeat(1000)).chars().count(), MAX_MESSAGE + 1);
    }
}
