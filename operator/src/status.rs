//! (IO) Writes conditions, and only those that changed. The API server is asked as field manager `penstock-status`.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::{Api, Resource};
use penstock_core::ids::Id;
use penstock_crds::{
    IdentityProvider, Kind, LLMBackend, ObjectRef, RoutingPolicy, SemanticCache, TokenBudget,
    VirtualKey,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::apply::{WriteError, Writer, within_deadline};
use crate::budgets;
use crate::conditions::{conditions, differ};
use crate::events::Events;
use crate::findings::Found;
use crate::index::Index;
use crate::observed::Observed;
use crate::world::{Readable, lock, put_own};

/// Field manager of conditions.
const STATUS: &str = "penstock-status";
/// Between two writes of how limits stand.
const LIMITS_EVERY: Duration = Duration::from_secs(55);
/// Unreadable objects that are remembered as reported; beyond that each is reported once more.
const MAX_REPORTED: usize = 1024;

/// Now, as conditions spell it: whole seconds, as the API server stores them.
pub(crate) fn now() -> Time {
    let second = Timestamp::now().as_second();
    Time(Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH))
}

impl Writer {
    /// Brings the conditions of every object up to date. Returns whether something must be tried again.
    pub(crate) async fn report(
        &self,
        observed: &Observed,
        found: &[Found<'_>],
        events: &Events,
    ) -> Result<bool, WriteError> {
        let mut failed = false;
        for found in found {
            let previous = observed.conditions(&found.object);
            let wanted = conditions(&found.findings, previous, found.generation, &now());
            let unreadable = observed.unreadable.contains_key(&found.object);
            if unreadable && self.was_reported(found) {
                continue;
            }
            let limits = budgets::limits_of(observed, &found.object);
            let is_same = !differ(previous, &wanted);
            if is_same && !limits.as_ref().is_some_and(|_| self.may_tell(found)) {
                continue;
            }
            let mut status = json!({ "conditions": wanted });
            if let Some(limits) = limits.or_else(|| budgets::told(observed, &found.object)) {
                status["limits"] = json!(limits);
            }
            match self.patch_status_of(&found.object, status).await {
                Ok(()) => {
                    if unreadable {
                        self.note_reported(found);
                    }
                    events
                        .tell(&found.object, &found.uid, previous, &wanted)
                        .await;
                }
                Err(WriteError::NotLeader) => return Err(WriteError::NotLeader),
                Err(err) if is_gone(&err) => {}
                Err(err) => {
                    let cause = std::error::Error::source(&err)
                        .map(ToString::to_string)
                        .unwrap_or_default();
                    tracing::warn!(error = %err, cause, "conditions not written");
                    failed = true;
                }
            }
        }
        Ok(failed)
    }

    /// Whether it is long enough ago that a status was written for no other reason than its limits.
    fn may_tell(&self, found: &Found<'_>) -> bool {
        let now = penstock_shell::clock::now();
        let mut told = lock(&self.world.limits_told);
        let last = told.get(&found.uid);
        if last.is_some_and(|last| now.saturating_duration_since(*last) < LIMITS_EVERY) {
            return false;
        }
        if told.len() >= MAX_REPORTED {
            told.clear();
        }
        told.insert(found.uid.clone(), now);
        true
    }

    /// The conditions of an object that cannot be read cannot be read either, so what was said is remembered.
    fn was_reported(&self, found: &Found<'_>) -> bool {
        lock(&self.world.unreadable_reported).contains(&(found.uid.clone(), found.generation))
    }

    fn note_reported(&self, found: &Found<'_>) {
        let mut reported = lock(&self.world.unreadable_reported);
        if reported.len() >= MAX_REPORTED {
            reported.clear();
        }
        reported.insert((found.uid.clone(), found.generation));
    }

    async fn patch_status_of(&self, object: &ObjectRef, wanted: Value) -> Result<(), WriteError> {
        if !self.leadership.may_write() {
            return Err(WriteError::NotLeader);
        }
        let world = &self.world;
        match object.kind {
            Kind::LLMBackend => {
                self.patch_status::<LLMBackend>(object, wanted, &world.backends)
                    .await
            }
            Kind::RoutingPolicy => {
                self.patch_status::<RoutingPolicy>(object, wanted, &world.policies)
                    .await
            }
            Kind::SemanticCache => {
                self.patch_status::<SemanticCache>(object, wanted, &world.caches)
                    .await
            }
            Kind::VirtualKey => {
                self.patch_status::<VirtualKey>(object, wanted, &world.keys)
                    .await
            }
            Kind::TokenBudget => {
                self.patch_status::<TokenBudget>(object, wanted, &world.budgets)
                    .await
            }
            Kind::IdentityProvider => {
                self.patch_status::<IdentityProvider>(object, wanted, &world.identities)
                    .await
            }
        }
    }

    async fn patch_status<K>(
        &self,
        object: &ObjectRef,
        wanted: Value,
        index: &std::sync::Mutex<Index<Readable<K>>>,
    ) -> Result<(), WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + DeserializeOwned
            + Clone
            + PartialEq
            + std::fmt::Debug,
    {
        let Id { namespace, name } = &object.id;
        let body = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": { "name": name, "namespace": namespace },
            "status": wanted,
        });
        self.metrics.wrote(object.kind.name(), "status");
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let parameters = PatchParams::apply(STATUS).force();
        let answer =
            within_deadline(api.patch_status::<Value>(name, &parameters, &Patch::Apply(body)))
                .await;
        let mut answer = match answer {
            Ok(answer) => answer,
            // It was written; the object as a whole cannot be read, which is what the conditions say.
            Err(crate::apply::CallError::Api(kube::Error::SerdeError(_))) => return Ok(()),
            Err(err) => {
                let what = object.to_string();
                return Err(WriteError::Write {
                    operation: "write the status of",
                    what,
                    err: Arc::new(err),
                });
            }
        };
        answer.meta_mut().managed_fields = None;
        // Known before the watch tells, so that the next pass sees these conditions.
        put_own(index, object.id.clone(), Ok(Arc::new(answer)));
        Ok(())
    }
}

fn is_gone(err: &WriteError) -> bool {
    matches!(err, WriteError::Write { err, .. } if err.status().is_some_and(kube::core::Status::is_not_found))
}
