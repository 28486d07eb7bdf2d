//! Children as the API server has them: which kinds there are, and what of a live object is kept. Pure.

use std::collections::BTreeSet;

use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use penstock_core::names::GROUP;
use serde_json::Value;

/// Kinds of objects that the operator makes. The order is the order of writing: what a pod mounts, reads or may do
/// comes before the pod; what points at a Deployment comes after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ChildKind {
    /// `v1`
    ServiceAccount,
    /// `rbac.authorization.k8s.io/v1`
    Role,
    /// `rbac.authorization.k8s.io/v1`
    RoleBinding,
    /// `v1`
    ConfigMap,
    /// `v1`
    Secret,
    /// `v1`
    Service,
    /// `apps/v1`
    Deployment,
    /// `policy/v1`
    PodDisruptionBudget,
    /// `keda.sh/v1alpha1`, only where KEDA is installed
    ScaledObject,
}

impl ChildKind {
    /// All of them, in the order of writing.
    pub(crate) const ALL: [Self; 9] = [
        Self::ServiceAccount,
        Self::Role,
        Self::RoleBinding,
        Self::ConfigMap,
        Self::Secret,
        Self::Service,
        Self::Deployment,
        Self::PodDisruptionBudget,
        Self::ScaledObject,
    ];

    /// The kind as in YAML.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ServiceAccount => "ServiceAccount",
            Self::Role => "Role",
            Self::RoleBinding => "RoleBinding",
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
            Self::Service => "Service",
            Self::Deployment => "Deployment",
            Self::PodDisruptionBudget => "PodDisruptionBudget",
            Self::ScaledObject => "ScaledObject",
        }
    }

    /// `group/version`, or `version` of the core group.
    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::ServiceAccount | Self::ConfigMap | Self::Secret | Self::Service => "v1",
            Self::Role | Self::RoleBinding => "rbac.authorization.k8s.io/v1",
            Self::Deployment => "apps/v1",
            Self::PodDisruptionBudget => "policy/v1",
            Self::ScaledObject => "keda.sh/v1alpha1",
        }
    }

    /// What the client needs to address objects of this kind.
    pub(crate) fn resource(self) -> ApiResource {
        let (group, version) = self
            .api_version()
            .split_once('/')
            .unwrap_or(("", self.api_version()));
        let plural = format!("{}s", self.name().to_ascii_lowercase());
        ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk(group, version, self.name()),
            &plural,
        )
    }
}

/// A child that exists. Two are equal when nothing differs that the operator acts on.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    /// The object without `managedFields`, `resourceVersion` and hot status fields.
    pub(crate) object: Value,
    /// `metadata.resourceVersion`.
    pub(crate) resource_version: Option<String>,
    /// Field managers that own `spec.replicas`; empty for other kinds than Deployment.
    pub(crate) replicas_owners: BTreeSet<String>,
}

impl PartialEq for Live {
    fn eq(&self, other: &Self) -> bool {
        self.object == other.object && self.replicas_owners == other.replicas_owners
    }
}

impl Live {
    /// Keeps what is needed of an object from a watch or an answer.
    pub(crate) fn new(mut object: DynamicObject) -> Self {
        let replicas_owners = replicas_owners(&object);
        object.metadata.managed_fields = None;
        let resource_version = object.metadata.resource_version.take();
        // KEDA notes the time of every activity in the status of a ScaledObject.
        if object
            .types
            .as_ref()
            .is_some_and(|types| types.kind == ChildKind::ScaledObject.name())
            && let Some(status) = object.data.get_mut("status").and_then(Value::as_object_mut)
        {
            status.retain(|key, _| key == "conditions");
        }
        // A dynamic object is JSON already.
        let object = serde_json::to_value(object).unwrap_or_default();
        Self {
            object,
            resource_version,
            replicas_owners,
        }
    }

    /// Whether `self` is an older state of the same object. Resource versions of one kind count up (KEP-5504).
    pub(crate) fn is_older_than(&self, other: &Self) -> bool {
        let version = |live: &Self| version(live.resource_version.as_deref());
        self.uid() == other.uid() && version(self) < version(other)
    }

    fn text(&self, path: &str) -> Option<&str> {
        self.object.pointer(path).and_then(Value::as_str)
    }

    /// `metadata.uid`.
    pub(crate) fn uid(&self) -> Option<&str> {
        self.text("/metadata/uid")
    }

    /// Whether it is being deleted.
    pub(crate) fn is_terminating(&self) -> bool {
        self.text("/metadata/deletionTimestamp").is_some()
    }

    /// A label's value.
    pub(crate) fn label(&self, key: &str) -> Option<&str> {
        self.object
            .get("metadata")?
            .get("labels")?
            .get(key)?
            .as_str()
    }

    /// An annotation's value.
    pub(crate) fn annotation(&self, key: &str) -> Option<&str> {
        self.object
            .get("metadata")?
            .get("annotations")?
            .get(key)?
            .as_str()
    }

    /// Names of its owners of one of our kinds, with kind and uid.
    pub(crate) fn owners(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        let references = self
            .object
            .pointer("/metadata/ownerReferences")
            .and_then(Value::as_array);
        references.into_iter().flatten().filter_map(|reference| {
            let text = |key: &str| reference.get(key)?.as_str();
            let ours = text("apiVersion")?.split('/').next() == Some(GROUP);
            if ours {
                Some((text("kind")?, text("name")?, text("uid")?))
            } else {
                None
            }
        })
    }

    /// `spec.replicas`.
    pub(crate) fn replicas(&self) -> Option<i32> {
        let replicas = self.object.pointer("/spec/replicas")?.as_i64()?;
        i32::try_from(replicas).ok()
    }
}

/// A resource version as a number; `None` for one that is none.
pub(crate) fn version(text: Option<&str>) -> Option<u64> {
    text.and_then(|text| text.parse().ok())
}

fn replicas_owners(object: &DynamicObject) -> BTreeSet<String> {
    let entries = object.metadata.managed_fields.iter().flatten();
    entries
        .filter(|entry| {
            let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
            fields.is_some_and(|fields| fields.pointer("/f:spec/f:replicas").is_some())
        })
        .filter_map(|entry| entry.manager.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn live(object: Value) -> Live {
        Live::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn owners_of_replicas_are_read_and_managed_fields_dropped() {
        let live = live(json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "x", "managedFields": [
                {"manager": "penstock-operator", "fieldsV1": {"f:spec": {"f:template": {}}}},
                {"manager": "penstock-replicas", "fieldsV1": {"f:spec": {"f:replicas": {}}}},
                {"manager": "kubectl", "fieldsV1": {"f:metadata": {}}},
            ]},
            "spec": {"replicas": 3},
        }));
        assert_eq!(
            live.replicas_owners,
            BTreeSet::from(["penstock-replicas".to_owned()])
        );
        assert_eq!(live.object.pointer("/metadata/managedFields"), None);
        assert_eq!(live.replicas(), Some(3));
    }

    #[test]
    fn hot_status_and_versions_do_not_count_as_changes() {
        let scaled_object = |version: &str, time: &str| {
            live(json!({
                "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject",
                "metadata": {"name": "x", "uid": "u", "resourceVersion": version},
                "status": {"lastActiveTime": time, "conditions": []},
            }))
        };
        let (old, new) = (scaled_object("9", "a"), scaled_object("10", "b"));
        assert_eq!(old, new);
        assert!(old.is_older_than(&new) && !new.is_older_than(&old));
    }

    #[test]
    fn owners_are_only_objects_of_our_group() {
        let live = live(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "x", "ownerReferences": [
                {"apiVersion": "penstock.dev/v1alpha1", "kind": "LLMBackend", "name": "b", "uid": "1"},
                {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d", "uid": "2"},
            ]},
        }));
        assert_eq!(
            live.owners().collect::<Vec<_>>(),
            [("LLMBackend", "b", "1")]
        );
    }

    #[test]
    fn plurals_and_groups_are_the_api_servers() {
        let paths: Vec<String> = ChildKind::ALL
            .iter()
            .map(|kind| format!("{}/{}", kind.resource().api_version, kind.resource().plural))
            .collect();
        assert_eq!(
            paths,
            [
                "v1/serviceaccounts",
                "rbac.authorization.k8s.io/v1/roles",
                "rbac.authorization.k8s.io/v1/rolebindings",
                "v1/configmaps",
                "v1/secrets",
                "v1/services",
                "apps/v1/deployments",
                "policy/v1/poddisruptionbudgets",
                "keda.sh/v1alpha1/scaledobjects",
            ]
        );
    }
}
