//! (IO) Carries a plan out: server-side apply in the planned order, then deletion of what is no longer planned. A child
//! that is as planned is not written. One child that fails does not keep the others from being written.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::core::DynamicObject;
use kube::{Api, Client};
use penstock_core::ids::Id;
use penstock_core::names;
use serde_json::{Map, Value, json};

use crate::acks;
use crate::compare::{self, Verdict, Written};
use crate::lease::Leadership;
use crate::live::{ChildKind, Live};
use crate::metrics::Metrics;
use crate::observed::Observed;
use crate::plan::{Child, Doomed, MANAGED_BY, MANAGED_BY_LABEL, Plan, PoolReplicas};
use crate::pod::Owner;
use crate::replicas::{HANDOVER, OPERATOR, REPLICAS, Step};
use crate::world::{World, now};

/// A call to the API server that takes longer is given up. Part of the lease's arithmetic (`lease::WRITE_FOR`).
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// A call that did not work.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// Reading.
    #[error("read {what}")]
    Read {
        /// Kind and name.
        what: String,
        /// Why.
        #[source]
        err: Arc<CallError>,
    },
    /// Writing.
    #[error("{operation} {what}")]
    Write {
        /// `apply`, `delete` and the like.
        operation: &'static str,
        /// Kind and name.
        what: String,
        /// Why.
        #[source]
        err: Arc<CallError>,
    },
    /// Another replica may be writing.
    #[error("this replica does not hold the lease")]
    NotLeader,
}

/// Why a call did not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The API server or the way to it.
    #[error("{0}")]
    Api(kube::Error),
    /// No answer within [`CALL_DEADLINE`].
    #[error("no answer within {} s", CALL_DEADLINE.as_secs())]
    Deadline,
}

impl CallError {
    /// The API server's answer, if it gave one.
    pub(crate) fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api(kube::Error::Api(status)) => Some(status),
            _ => None,
        }
    }

    /// Nothing can be made in a namespace that is being deleted (`NamespaceTerminatingCause` of k8s.io/api/core/v1).
    fn is_namespace_going(&self) -> bool {
        let details = self.status().and_then(|status| status.details.as_ref());
        details.is_some_and(|details| {
            let mut causes = details.causes.iter();
            causes.any(|cause| cause.reason == "NamespaceTerminating")
        })
    }

    /// The API server understood and said no, and will say so again: what it said.
    fn refusal(&self) -> Option<&str> {
        let status = self.status()?;
        // 409: somebody was quicker; 404: its namespace or kind is going; 429: later. A webhook's "no" is a 400 or 403.
        let final_ = matches!(status.code, 400 | 403 | 405 | 413 | 422)
            || (status.code == 500 && is_schema(status));
        final_.then_some(status.message.as_str())
    }
}

/// Server-side apply answers with 500 when the kind's schema lacks an applied field.
fn is_schema(status: &kube::core::Status) -> bool {
    status.message.contains("field not declared in schema")
}

impl WriteError {
    fn call(&self) -> Option<&CallError> {
        match self {
            Self::Read { err, .. } | Self::Write { err, .. } => Some(err),
            Self::NotLeader => None,
        }
    }
}

/// Waits at most [`CALL_DEADLINE`].
pub(crate) async fn within_deadline<T>(
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(result) => result.map_err(CallError::Api),
        Err(_) => Err(CallError::Deadline),
    }
}

/// What is remembered of writes, by child.
pub(crate) type Writes = BTreeMap<(ChildKind, String), Written>;

/// How carrying out a plan went.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// The API server refused a child of this owner: what it said.
    pub(crate) refused: Vec<(Owner, ChildKind, String)>,
    /// A child's name is taken.
    pub(crate) taken: Vec<(Owner, String)>,
    /// Something must be tried again.
    pub(crate) failed: bool,
    /// Look again after this time.
    pub(crate) again: Option<Duration>,
}

impl Applied {
    fn note(&mut self, owner: &Owner, kind: ChildKind, err: &WriteError) {
        self.failed = true;
        if let Some(message) = err.call().and_then(CallError::refusal) {
            self.refused.push((owner.clone(), kind, message.to_owned()));
        }
        if err
            .call()
            .and_then(CallError::status)
            .is_some_and(kube::core::Status::is_conflict)
        {
            tracing::debug!(error = %err, "somebody was quicker, trying again");
        } else {
            let cause = err.call().map(ToString::to_string).unwrap_or_default();
            tracing::warn!(error = %err, cause, "child not written");
        }
    }

    fn look_again(&mut self, after: Duration) {
        self.again = Some(self.again.map_or(after, |again| again.min(after)));
    }
}

/// Writes to the API server, if this replica may.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) client: Client,
    pub(crate) leadership: Leadership,
    pub(crate) metrics: Metrics,
    pub(crate) world: Arc<World>,
}

impl Writer {
    /// Carries `plan` out.
    pub(crate) async fn apply(
        &self,
        observed: &Observed,
        plan: &Plan,
        writes: &mut Writes,
    ) -> Result<Applied, WriteError> {
        let mut applied = Applied::default();
        writes.retain(|(kind, name), _| {
            plan.children
                .iter()
                .any(|child| child.kind == *kind && child.name == *name)
        });
        for child in &plan.children {
            if !self.leadership.may_write() {
                return Err(WriteError::NotLeader);
            }
            let replicas = match (&child.owner, child.kind) {
                (Owner::Backend(backend), ChildKind::Deployment) => plan.replicas.get(backend),
                _ => None,
            };
            let result = match replicas {
                Some(replicas) => {
                    self.pool_deployment(observed, child, replicas, writes, &mut applied)
                        .await
                }
                None => self.ensure(observed, child, writes, &mut applied).await,
            };
            match result {
                Ok(()) => {}
                Err(WriteError::NotLeader) => return Err(WriteError::NotLeader),
                Err(err) if err.call().is_some_and(CallError::is_namespace_going) => {
                    // Its objects go with it; each one's end comes through the watch.
                    tracing::debug!(namespace = %observed.namespace, "being deleted: nothing more is made in it");
                    return Ok(applied);
                }
                Err(err) => applied.note(&child.owner, child.kind, &err),
            }
        }
        for doomed in &plan.prune {
            if let Err(err) = self.delete(&observed.namespace, doomed).await {
                tracing::warn!(error = %err, "child not deleted");
                applied.failed = true;
            }
        }
        self.drop_orphaned_acks(observed, plan, &mut applied).await;
        Ok(applied)
    }

    /// Writes one child if it is not as planned.
    async fn ensure(
        &self,
        observed: &Observed,
        child: &Child,
        writes: &mut Writes,
        applied: &mut Applied,
    ) -> Result<(), WriteError> {
        let found;
        let live = if let Some(live) = observed.child(child.kind, &child.name) {
            Some(live)
        } else {
            // Not labelled as ours: it is new, or somebody else's, or was stripped of its labels.
            found = self
                .read(child.kind, &observed.namespace, &child.name)
                .await?;
            found.as_ref()
        };
        if let Some(live) = live {
            if !is_ours(live, child) {
                let what = format!("{} {}", child.kind.name(), child.name);
                let message = format!(
                    "{what} exists and is not Penstock's: delete it, or give this object another name"
                );
                applied.taken.push((child.owner.clone(), message));
                return Ok(());
            }
            if live.is_terminating() {
                // The watch says when it is gone.
                return Ok(());
            }
        }
        let key = (child.kind, child.name.clone());
        match compare::decide(
            &child.object,
            live.map(|live| &live.object),
            writes.get(&key),
            now(),
        ) {
            Verdict::Keep => Ok(()),
            Verdict::Wait(wait) => {
                applied.look_again(wait);
                Ok(())
            }
            Verdict::Write => {
                let answer = self
                    .patch(
                        child.kind,
                        &observed.namespace,
                        &child.name,
                        OPERATOR,
                        &child.object,
                    )
                    .await?;
                let written =
                    compare::remember(&child.object, &answer.object, writes.get(&key), now());
                writes.insert(key, written);
                Ok(())
            }
        }
    }

    /// The Deployment of a pool, whose number of replicas has its own owner (see `replicas`).
    async fn pool_deployment(
        &self,
        observed: &Observed,
        child: &Child,
        replicas: &PoolReplicas,
        writes: &mut Writes,
        applied: &mut Applied,
    ) -> Result<(), WriteError> {
        let (namespace, name) = (&observed.namespace, &replicas.deployment);
        let live = observed.child(ChildKind::Deployment, name);
        let version = live.and_then(|live| live.resource_version.as_deref());
        if live.is_some_and(|live| live.is_terminating() || !is_ours(live, child)) {
            return self.ensure(observed, child, writes, applied).await;
        }
        let disown = live.is_some_and(|live| {
            [OPERATOR, REPLICAS]
                .iter()
                .all(|owner| live.replicas_owners.contains(*owner))
        });
        if disown {
            self.patch(child.kind, namespace, name, OPERATOR, &child.object)
                .await?;
        }
        match replicas.step {
            Step::Create(count) => {
                let found = self.read(child.kind, namespace, name).await?;
                if found.is_none() {
                    // The default would start one pod even where none is wanted: the first apply holds the number,
                    // until the next pass disowns it.
                    let mut with_count = child.object.clone();
                    with_count["spec"]["replicas"] = json!(count);
                    self.patch(child.kind, namespace, name, OPERATOR, &with_count)
                        .await?;
                    self.patch_replicas(namespace, name, REPLICAS, Some(count), None)
                        .await?;
                }
            }
            Step::Hold(count) => {
                self.patch_replicas(namespace, name, REPLICAS, Some(count), None)
                    .await?;
            }
            Step::Adopt(count) => {
                self.patch_replicas(namespace, name, REPLICAS, Some(count), version)
                    .await?;
            }
            Step::HandOver(count) => {
                self.patch_replicas(namespace, name, HANDOVER, Some(count), version)
                    .await?;
                self.patch_replicas(namespace, name, REPLICAS, None, None)
                    .await?;
                tracing::info!(deployment = %name, namespace, replicas = count, "the autoscaler owns replicas now");
            }
            Step::Release => {
                self.patch_replicas(namespace, name, REPLICAS, None, None)
                    .await?;
            }
            Step::Leave => {}
        }
        if let Some(doomed) = &replicas.then_remove {
            self.delete(namespace, doomed).await?;
        }
        self.ensure(observed, child, writes, applied).await
    }

    /// Applies `spec.replicas` alone, or drops it, as `manager`. With `version`, only to that state.
    async fn patch_replicas(
        &self,
        namespace: &str,
        name: &str,
        manager: &str,
        count: Option<i32>,
        version: Option<&str>,
    ) -> Result<(), WriteError> {
        let kind = ChildKind::Deployment;
        let mut object = json!({
            "apiVersion": kind.api_version(),
            "kind": kind.name(),
            "metadata": { "name": name, "namespace": namespace },
        });
        if let Some(count) = count {
            object["spec"] = json!({ "replicas": count });
        }
        if let Some(version) = version {
            object["metadata"]["resourceVersion"] = json!(version);
        }
        self.patch(kind, namespace, name, manager, &object)
            .await
            .map(|_| ())
    }

    fn api(&self, kind: ChildKind, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &kind.resource())
    }

    async fn read(
        &self,
        kind: ChildKind,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Live>, WriteError> {
        let found = within_deadline(self.api(kind, namespace).get_opt(name)).await;
        found
            .map(|object| object.map(Live::new))
            .map_err(|err| WriteError::Read {
                what: format!("{} {namespace}/{name}", kind.name()),
                err: Arc::new(err),
            })
    }

    async fn patch(
        &self,
        kind: ChildKind,
        namespace: &str,
        name: &str,
        manager: &str,
        object: &Value,
    ) -> Result<Live, WriteError> {
        if !self.leadership.may_write() {
            return Err(WriteError::NotLeader);
        }
        let parameters = PatchParams::apply(manager).force();
        self.metrics.wrote(kind.name(), "apply");
        let api = self.api(kind, namespace);
        let answer = within_deadline(api.patch(name, &parameters, &Patch::Apply(object))).await;
        let live = answer.map(Live::new).map_err(|err| WriteError::Write {
            operation: "apply",
            what: format!("{} {namespace}/{name}", kind.name()),
            err: Arc::new(err),
        })?;
        tracing::info!(kind = kind.name(), namespace, name, manager, "applied");
        // Known before the watch tells, so that the next pass does not write it again.
        if live.label(MANAGED_BY_LABEL) == Some(MANAGED_BY) {
            self.world
                .put_child(kind, Id::new(namespace, name), live.clone());
        }
        Ok(live)
    }

    async fn delete(&self, namespace: &str, doomed: &Doomed) -> Result<(), WriteError> {
        if !self.leadership.may_write() {
            return Err(WriteError::NotLeader);
        }
        let exactly = Preconditions {
            uid: Some(doomed.uid.clone()),
            resource_version: None,
        };
        let parameters = DeleteParams::background().preconditions(exactly);
        self.metrics.wrote(doomed.kind.name(), "delete");
        let api = self.api(doomed.kind, namespace);
        match within_deadline(api.delete(&doomed.name, &parameters)).await {
            Ok(_) => {
                tracing::info!(
                    kind = doomed.kind.name(),
                    namespace,
                    name = doomed.name,
                    "deleted"
                );
                Ok(())
            }
            // Gone already, or another one of the same name is there now.
            Err(err)
                if err
                    .status()
                    .is_some_and(|status| matches!(status.code, 404 | 409)) =>
            {
                Ok(())
            }
            Err(err) => Err(WriteError::Write {
                operation: "delete",
                what: format!("{} {namespace}/{}", doomed.kind.name(), doomed.name),
                err: Arc::new(err),
            }),
        }
    }

    /// Takes entries of pods that are gone out of the acks. The pods are read from the API server itself: the watch may
    /// not have seen yet the pod that has just written its first ack.
    async fn drop_orphaned_acks(&self, observed: &Observed, plan: &Plan, applied: &mut Applied) {
        for gateway in plan.gateways.keys() {
            let owner = Owner::Gateway(gateway.clone());
            let name = names::gateway_acks(gateway);
            let live = observed.child(ChildKind::ConfigMap, &name);
            let known: BTreeSet<&str> = observed
                .pods_of(&owner)
                .map(|pod| pod.uid.as_str())
                .collect();
            if acks::orphans(live, &known).is_empty() {
                continue;
            }
            if let Err(err) = self
                .null_orphans(&observed.namespace, gateway, &name, live)
                .await
            {
                tracing::warn!(error = %err, "acks of gone gateway replicas not removed");
                applied.failed = true;
            }
        }
    }

    async fn null_orphans(
        &self,
        namespace: &str,
        gateway: &str,
        name: &str,
        live: Option<&Live>,
    ) -> Result<(), WriteError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let selector = ListParams::default().labels(&format!("{}={gateway}", names::GATEWAY_LABEL));
        let pods = within_deadline(pods.list_metadata(&selector))
            .await
            .map_err(|err| WriteError::Read {
                what: format!("pods of gateway {namespace}/{gateway}"),
                err: Arc::new(err),
            })?;
        let uids: Vec<String> = pods
            .items
            .iter()
            .filter_map(kube::ResourceExt::uid)
            .collect();
        let known = uids.iter().map(String::as_str).collect();
        let nulls: Map<String, Value> = acks::orphans(live, &known)
            .into_iter()
            .map(|uid| (uid.to_owned(), Value::Null))
            .collect();
        if nulls.is_empty() {
            return Ok(());
        }
        if !self.leadership.may_write() {
            return Err(WriteError::NotLeader);
        }
        self.metrics.wrote(ChildKind::ConfigMap.name(), "acks");
        let parameters = PatchParams {
            field_manager: Some(OPERATOR.to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(json!({ "data": nulls }));
        let api = self.api(ChildKind::ConfigMap, namespace);
        let answer = within_deadline(api.patch(name, &parameters, &patch)).await;
        answer.map(|_| ()).map_err(|err| WriteError::Write {
            operation: "patch",
            what: format!("ConfigMap {namespace}/{name}"),
            err: Arc::new(err),
        })
    }
}

/// Whether a live object may be written: it carries our labels for this owner, or one of the owners owns it.
fn is_ours(live: &Live, child: &Child) -> bool {
    let (key, name) = match &child.owner {
        Owner::Gateway(name) => (names::GATEWAY_LABEL, name),
        Owner::Backend(name) => (names::BACKEND_LABEL, name),
    };
    let labelled =
        live.label(MANAGED_BY_LABEL) == Some(MANAGED_BY) && live.label(key) == Some(name);
    labelled
        || live
            .owners()
            .any(|(_, _, uid)| child.owner_uids.iter().any(|owner| owner == uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> CallError {
        let status = kube::core::Status {
            code,
            message: message.into(),
            ..kube::core::Status::default()
        };
        CallError::Api(kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn refusals_are_told_from_what_may_work_later() {
        for code in [400, 403, 413, 422] {
            assert_eq!(status(code, "no").refusal(), Some("no"), "{code}");
        }
        for code in [404, 409, 429, 500, 503] {
            assert_eq!(status(code, "later").refusal(), None, "{code}");
        }
        assert!(
            status(500, ".spec.x: field not declared in schema")
                .refusal()
                .is_some()
        );
        assert_eq!(CallError::Deadline.refusal(), None);
    }

    #[test]
    fn namespace_that_is_being_deleted_is_known_by_its_cause() {
        // As a kube-apiserver 1.35 answers a create.
        let answer = json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403, "reason": "Forbidden",
            "message": "services \"s\" is forbidden: unable to create new content in namespace n because it is being terminated",
            "details": {
                "name": "s", "kind": "services",
                "causes": [{"reason": "NamespaceTerminating", "message": "namespace n is being terminated", "field": "metadata.namespace"}],
            },
        });
        let going = serde_json::from_value(answer).unwrap();
        assert!(CallError::Api(kube::Error::Api(Box::new(going))).is_namespace_going());
        assert!(!status(403, "is forbidden").is_namespace_going());
    }

    #[test]
    fn object_of_the_same_name_is_ours_only_by_label_or_owner() {
        let child = Child {
            kind: ChildKind::Service,
            name: "blue-pool".into(),
            owner: Owner::Backend("blue".into()),
            owner_uids: vec!["u1".into()],
            object: json!({}),
        };
        let live = |labels: Value, owners: Value| {
            let object = json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "blue-pool", "labels": labels, "ownerReferences": owners},
            });
            Live::new(serde_json::from_value(object).unwrap())
        };
        let owner = |uid: &str| json!([{"apiVersion": "penstock.dev/v1alpha1", "kind": "LLMBackend", "name": "blue", "uid": uid}]);
        let labels = json!({MANAGED_BY_LABEL: "penstock", "penstock.dev/backend": "blue"});
        assert!(is_ours(&live(labels, json!([])), &child));
        assert!(is_ours(&live(json!({}), owner("u1")), &child));
        assert!(!is_ours(&live(json!({}), owner("u2")), &child));
        assert!(!is_ours(
            &live(json!({MANAGED_BY_LABEL: "penstock"}), json!([])),
            &child
        ));
        assert!(!is_ours(
            &live(json!({"penstock.dev/backend": "blue"}), json!([])),
            &child
        ));
    }
}
