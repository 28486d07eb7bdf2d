//! What tests do to a namespace: objects in, children out, and the parts of the kubelet, KEDA and the HPA.

use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use penstock_crds::yaml;
use penstock_operator::Args;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, OPERATOR};

/// Longest wait for anything: long enough for a busy machine.
const WITHIN: Duration = Duration::from_mins(1);

/// One test's namespace.
pub(crate) struct World {
    pub(crate) cluster: &'static Cluster,
    pub(crate) admin: Client,
    pub(crate) namespace: String,
}

/// An operator that runs until it is stopped.
pub(crate) struct Operator {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Operator {
    /// SIGTERM.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn chart(file: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/penstock/files")
        .join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    yaml::documents(&text).unwrap().remove(0)
}

/// CRDs and the operator's rights, once for all tests.
async fn install(admin: &Client) {
    let crds = dynamic(
        admin,
        None,
        "apiextensions.k8s.io/v1",
        "CustomResourceDefinition",
    );
    for definition in penstock_crds::definition::all().unwrap() {
        for crd in yaml::documents(&definition.text).unwrap() {
            let name = crd["metadata"]["name"].as_str().unwrap().to_owned();
            crds.patch(
                &name,
                &PatchParams::apply("test").force(),
                &Patch::Apply(&crd),
            )
            .await
            .unwrap();
            established(&crds, &name).await;
        }
    }
    let rbac = "rbac.authorization.k8s.io/v1";
    let role = json!({
        "apiVersion": rbac, "kind": "ClusterRole", "metadata": {"name": "penstock-operator"},
        "rules": chart("operator-rules.yaml"),
    });
    let binding = json!({
        "apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": {"name": "penstock-operator"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "penstock-operator"},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": OPERATOR}],
    });
    for object in [role, binding] {
        let kind = object["kind"].as_str().unwrap();
        let api = dynamic(admin, None, rbac, kind);
        api.patch(
            "penstock-operator",
            &PatchParams::apply("test").force(),
            &Patch::Apply(&object),
        )
        .await
        .unwrap();
    }
}

/// Waits until the API server serves a CRD's kind.
pub(crate) async fn established(crds: &Api<DynamicObject>, name: &str) {
    until("the CRD to be served", async || {
        let crd = crds.get(name).await.unwrap();
        let conditions = crd.data["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions
            .iter()
            .any(|c| c["type"] == "Established" && c["status"] == "True")
            .then_some(())
    })
    .await;
}

/// Any kind by its API version, of one namespace or cluster-wide.
pub(crate) fn dynamic(
    client: &Client,
    namespace: Option<&str>,
    api_version: &str,
    kind: &str,
) -> Api<DynamicObject> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let plural = match kind {
        "RoutingPolicy" => "routingpolicies".to_owned(),
        _ => format!("{}s", kind.to_lowercase()),
    };
    let resource =
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural);
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

/// Waits until `look` returns something.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    };
    tokio::time::timeout(WITHIN, looking)
        .await
        .unwrap_or_else(|_| panic!("waited {} s for {what}", WITHIN.as_secs()))
}

impl World {
    /// A fresh namespace; `None` where there is no API server to test against.
    pub(crate) async fn new(cluster: Option<&'static Cluster>, namespace: &str) -> Option<Self> {
        static INSTALLED: OnceCell<()> = OnceCell::const_new();
        let cluster = cluster?;
        let admin = cluster.admin().await;
        INSTALLED.get_or_init(async || install(&admin).await).await;
        let world = Self {
            cluster,
            admin,
            namespace: namespace.to_owned(),
        };
        let object = serde_json::from_value(json!({"metadata": {"name": namespace}})).unwrap();
        let namespaces: Api<Namespace> = Api::all(world.admin.clone());
        namespaces
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
        world.grant_home().await;
        Some(world)
    }

    /// What the chart grants in the operator's own namespace: here it is the test's.
    async fn grant_home(&self) {
        let rbac = "rbac.authorization.k8s.io/v1";
        self.apply(json!({
            "apiVersion": rbac, "kind": "Role", "metadata": {"name": "home"},
            "rules": chart("operator-home-rules.yaml"),
        }))
        .await;
        self.apply(json!({
            "apiVersion": rbac, "kind": "RoleBinding", "metadata": {"name": "home"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "home"},
            "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": OPERATOR}],
        }))
        .await;
    }

    /// Starts an operator for this namespace, with the rights that the chart gives.
    pub(crate) async fn operator(&self, identity: &str) -> Operator {
        let scaler = format!("scaler.{}:6000", self.namespace);
        let flags = [
            "operator",
            "--namespace",
            &self.namespace,
            "--lease-namespace",
            &self.namespace,
        ];
        let more = [
            "--identity",
            identity,
            "--scaler-address",
            &scaler,
            "--self-image",
            "self:1",
        ];
        let settings = Cli::parse_from(flags.iter().chain(&more))
            .args
            .settings()
            .unwrap();
        let client = self.cluster.operator().await;
        let admin = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stop = CancellationToken::new();
        let run = penstock_operator::run(settings, client, admin, stop.clone());
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(run);
        let task = async move {
            tasks.join_next().await.unwrap().unwrap().unwrap();
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "joined by `stop`; a test that panics ends the runtime"
        )]
        let task = tokio::spawn(task);
        Operator { stop, task }
    }

    pub(crate) fn api(&self, api_version: &str, kind: &str) -> Api<DynamicObject> {
        dynamic(&self.admin, Some(&self.namespace), api_version, kind)
    }

    /// Applies an object as a person would.
    pub(crate) async fn apply(&self, object: Value) -> DynamicObject {
        self.try_apply(object).await.unwrap()
    }

    pub(crate) async fn try_apply(&self, object: Value) -> Result<DynamicObject, kube::Error> {
        let text = |path: &str| {
            object
                .pointer(path)
                .and_then(Value::as_str)
                .unwrap()
                .to_owned()
        };
        let api = self.api(&text("/apiVersion"), &text("/kind"));
        api.patch(
            &text("/metadata/name"),
            &PatchParams::apply("person").force(),
            &Patch::Apply(&object),
        )
        .await
    }

    /// An object of our kinds.
    pub(crate) async fn own(&self, kind: &str, name: &str, spec: Value) -> DynamicObject {
        self.apply(own(kind, name, spec)).await
    }

    pub(crate) async fn exists(&self, api_version: &str, kind: &str, name: &str) -> DynamicObject {
        let api = self.api(api_version, kind);
        until(&format!("{kind} {name}"), async || {
            api.get_opt(name).await.unwrap()
        })
        .await
    }

    pub(crate) async fn gone(&self, api_version: &str, kind: &str, name: &str) {
        let api = self.api(api_version, kind);
        until(&format!("{kind} {name} to go"), async || {
            api.get_opt(name).await.unwrap().is_none().then_some(())
        })
        .await;
    }

    pub(crate) async fn delete(&self, api_version: &str, kind: &str, name: &str) {
        self.api(api_version, kind)
            .delete(name, &kube::api::DeleteParams::default())
            .await
            .unwrap();
    }

    pub(crate) async fn delete_namespace(&self) {
        let namespaces: Api<Namespace> = Api::all(self.admin.clone());
        namespaces
            .delete(&self.namespace, &kube::api::DeleteParams::default())
            .await
            .unwrap();
    }

    /// A condition of one of our objects as (status, reason, message).
    pub(crate) async fn condition(
        &self,
        kind: &str,
        name: &str,
        type_: &str,
    ) -> Option<(String, String, String)> {
        let object = self
            .api("penstock.dev/v1alpha1", kind)
            .get(name)
            .await
            .unwrap();
        let conditions = object
            .data
            .pointer("/status/conditions")?
            .as_array()?
            .clone();
        let condition = conditions
            .into_iter()
            .find(|condition| condition["type"] == type_)?;
        assert_eq!(
            condition["observedGeneration"].as_i64(),
            object.metadata.generation,
            "of an older generation"
        );
        let text = |key: &str| condition[key].as_str().unwrap().to_owned();
        Some((text("status"), text("reason"), text("message")))
    }

    /// Waits until a condition has this status and reason.
    pub(crate) async fn condition_is(
        &self,
        kind: &str,
        name: &str,
        type_: &str,
        status: &str,
        reason: &str,
    ) -> String {
        let what = format!("{kind} {name} to be {type_}={status}/{reason}");
        let api = self.api("penstock.dev/v1alpha1", kind);
        until(&what, async || {
            let object = api.get(name).await.unwrap();
            let conditions = object
                .data
                .pointer("/status/conditions")?
                .as_array()?
                .clone();
            let found = conditions.into_iter().find(|condition| {
                condition["type"] == type_
                    && condition["status"] == status
                    && condition["reason"] == reason
                    && condition["observedGeneration"].as_i64() == object.metadata.generation
            })?;
            Some(found["message"].as_str().unwrap().to_owned())
        })
        .await
    }

    pub(crate) async fn deployment(&self, name: &str) -> Deployment {
        let api: Api<Deployment> = Api::namespaced(self.admin.clone(), &self.namespace);
        until(&format!("Deployment {name}"), async || {
            api.get_opt(name).await.unwrap()
        })
        .await
    }

    /// Managers of `spec.replicas`.
    pub(crate) async fn replicas_owners(&self, name: &str) -> Vec<String> {
        let deployment = self.deployment(name).await;
        let mut owners: Vec<String> = deployment
            .managed_fields()
            .iter()
            .filter(|entry| {
                entry
                    .fields_v1
                    .as_ref()
                    .is_some_and(|fields| fields.0.pointer("/f:spec/f:replicas").is_some())
            })
            .filter_map(|entry| entry.manager.clone())
            .collect();
        owners.sort();
        owners
    }

    /// Plays kubelet and controllers: one ready pod from a Deployment's template. Returns its uid.
    pub(crate) async fn ready_pod(&self, deployment: &str, name: &str) -> String {
        let template = self.deployment(deployment).await.spec.unwrap().template;
        let pods: Api<Pod> = Api::namespaced(self.admin.clone(), &self.namespace);
        let mut metadata = template.metadata.unwrap();
        metadata.name = Some(name.to_owned());
        let pod = Pod {
            metadata,
            spec: template.spec,
            status: None,
        };
        let pod = pods.create(&PostParams::default(), &pod).await.unwrap();
        let container = pod.spec.as_ref().unwrap().containers[0].name.clone();
        let status = json!({"status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2020-01-01T00:00:10Z"}],
            "containerStatuses": [{
                "name": container, "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
                "state": {"running": {"startedAt": "2020-01-01T00:00:00Z"}},
            }],
        }});
        pods.patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .unwrap();
        pod.uid().unwrap()
    }

    /// Digest of the config that a gateway should serve.
    pub(crate) async fn digest(&self, gateway: &str) -> String {
        let api: Api<ConfigMap> = Api::namespaced(self.admin.clone(), &self.namespace);
        let config = api.get(&format!("{gateway}-config-f1")).await.unwrap();
        config.annotations()["penstock.dev/config-digest"].clone()
    }

    /// Plays a gateway replica: acks the current config, with the rights of the gateway's own account.
    pub(crate) async fn ack(&self, gateway: &str, uid: &str) {
        self.ack_with(gateway, uid, json!({})).await;
    }

    /// The same, saying more.
    pub(crate) async fn ack_with(&self, gateway: &str, uid: &str, more: Value) {
        let digest = self.digest(gateway).await;
        let mut ack = json!({"digest": digest, "processStart": 1_577_836_801_u64});
        let more = more.as_object().cloned().unwrap_or_default();
        ack.as_object_mut().unwrap().extend(more);
        let patch = json!({"data": {uid: ack.to_string()}});
        let api: Api<ConfigMap> = Api::namespaced(self.admin.clone(), &self.namespace);
        let name = format!("{gateway}-acks");
        api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
            .unwrap();
    }

    /// Resource versions of everything in the namespace that Penstock writes.
    pub(crate) async fn versions(&self) -> Vec<String> {
        let mut versions = Vec::new();
        for (api_version, kind) in [
            ("v1", "ServiceAccount"),
            ("v1", "ConfigMap"),
            ("v1", "Secret"),
            ("v1", "Service"),
            ("apps/v1", "Deployment"),
            ("policy/v1", "PodDisruptionBudget"),
            ("rbac.authorization.k8s.io/v1", "Role"),
            ("rbac.authorization.k8s.io/v1", "RoleBinding"),
            ("penstock.dev/v1alpha1", "LLMBackend"),
            ("penstock.dev/v1alpha1", "RoutingPolicy"),
            ("penstock.dev/v1alpha1", "SemanticCache"),
        ] {
            for object in self
                .api(api_version, kind)
                .list(&ListParams::default())
                .await
                .unwrap()
            {
                versions.push(format!(
                    "{kind} {} {}",
                    object.name_any(),
                    object.resource_version().unwrap()
                ));
            }
        }
        versions
    }

    /// Writes of the operator in this namespace so far.
    pub(crate) fn writes(&self) -> Vec<String> {
        self.cluster.writes(OPERATOR, &self.namespace)
    }

    /// Waits until the operator has written nothing for a second, and returns what it wrote so far.
    pub(crate) async fn settled(&self) -> Vec<String> {
        let mut before = self.writes();
        until("the operator to come to rest", async || {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = self.writes();
            let same = now.len() == before.len();
            before = now;
            same.then(|| before.clone())
        })
        .await
    }
}

/// An object of our kinds.
pub(crate) fn own(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "penstock.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// A policy with one rule.
pub(crate) fn policy(gateway: &str, backend: &str) -> Value {
    json!({"gateway": gateway, "rules": [
        {"name": "all", "match": {"models": [backend]}, "backends": [{"name": backend}]},
    ]})
}

/// The two are equal, or what differs.
pub(crate) fn assert_same<T: PartialEq + Debug>(before: &[T], after: &[T]) {
    let new: Vec<_> = after.iter().filter(|item| !before.contains(item)).collect();
    let gone: Vec<_> = before.iter().filter(|item| !after.contains(item)).collect();
    assert!(
        before == after,
        "new: {new:#?}\ngone: {gone:#?}\nnow: {after:#?}"
    );
}
