//! (IO) Watches pods, ScaledObjects and HPAs of the whole cluster, reads `/scale` of what is scaled, and publishes the
//! [`World`]. Objects are cut down to the needed fields as they arrive; a lost watch freezes the picture, never empties
//! it. Rights: list and watch pods, scaledobjects.keda.sh and horizontalpodautoscalers; get scale. Nothing is written.

mod table;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, FuturesUnordered, StreamExt, select_all};
use k8s_openapi::api::autoscaling::v1::Scale;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use penstock_core::ids::Id;
use penstock_core::names::{ADMIN_PORT, GATEWAY_LABEL};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::table::Table;

use crate::decide::DEFAULT_TOLERANCE_PERCENT;
use crate::world::{Gateway, Pod, Target, World};

/// On gateway pods: their admin port, where it is not 9090.
pub const ADMIN_PORT_ANNOTATION: &str = "penstock.dev/admin-port";
/// Changes are published together, this long after the first.
const GATHER: Duration = Duration::from_millis(200);
/// `/scale` of each target is read this often, and at once when its HPA says something.
const SCALE_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked which ones are due.
const SCALE_ROUND: Duration = Duration::from_millis(500);
/// Reads of `/scale` under way at once, and how long one may take.
const SCALE_CONCURRENCY: usize = 8;
const SCALE_DEADLINE: Duration = Duration::from_secs(5);
/// KEDA's defaults for a ScaledObject that names no bounds.
const DEFAULT_MAX: u32 = 100;

/// How much of the cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Pods.
    pub pods: usize,
    /// ScaledObjects with an external trigger, and HPAs of ScaledObjects, each.
    pub objects: usize,
}

#[expect(clippy::large_enum_variant, reason = "one exists at a time")]
enum Change {
    Pod(watcher::Event<ApiPod>),
    ScaledObject(watcher::Event<DynamicObject>),
    Hpa(watcher::Event<HorizontalPodAutoscaler>),
    Failed {
        what: &'static str,
        err: watcher::Error,
    },
}

/// Watches until `shutdown`. Cancel safe.
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
pub async fn watch(
    client: Client,
    sender: watch::Sender<Arc<World>>,
    bounds: Bounds,
    shutdown: CancellationToken,
) {
    let mut changes = changes(&client);
    let mut cluster = Cluster::new(bounds);
    let mut publish_at: Option<Instant> = None;
    let mut round = tokio::time::interval(SCALE_ROUND);
    round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut reads = FuturesUnordered::new();
    loop {
        let publish = async {
            match publish_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let changed = tokio::select! {
            () = shutdown.cancelled() => return,
            Some(change) = changes.next() => cluster.take(change),
            Some((object, scale)) = reads.next(), if !reads.is_empty() => cluster.take_scale(object, scale),
            _ = round.tick() => {
                while reads.len() < SCALE_CONCURRENCY {
                    let Some((object, reference)) = cluster.next_due(Instant::now()) else { break };
                    reads.push(read_scale(client.clone(), object, reference));
                }
                false
            }
            () = publish => {
                publish_at = None;
                sender.send_replace(Arc::new(cluster.world()));
                false
            }
        };
        if changed && publish_at.is_none() {
            publish_at = Some(Instant::now() + GATHER);
        }
    }
}

fn changes(client: &Client) -> BoxStream<'static, Change> {
    let alive = watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
    let pods = watcher(Api::<ApiPod>::all(client.clone()), alive).default_backoff();
    let hpas = watcher(
        Api::<HorizontalPodAutoscaler>::all(client.clone()),
        watcher::Config::default(),
    )
    .default_backoff();
    let kind = GroupVersionKind::gvk("keda.sh", "v1alpha1", "ScaledObject");
    let resource = ApiResource::from_gvk_with_plural(&kind, "scaledobjects");
    let objects = Api::<DynamicObject>::all_with(client.clone(), &resource);
    let objects = watcher(objects, watcher::Config::default()).default_backoff();
    select_all([
        pods.map(|event| {
            event.map_or_else(|err| Change::Failed { what: "pods", err }, Change::Pod)
        })
        .boxed(),
        objects
            .map(|event| {
                event.map_or_else(
                    |err| Change::Failed {
                        what: "scaledobjects",
                        err,
                    },
                    Change::ScaledObject,
                )
            })
            .boxed(),
        hpas.map(|event| {
            event.map_or_else(
                |err| Change::Failed {
                    what: "horizontalpodautoscalers",
                    err,
                },
                Change::Hpa,
            )
        })
        .boxed(),
    ])
    .boxed()
}

/// Where a ScaledObject's target has its `/scale`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ScaleReference {
    resource: ApiResource,
    name: String,
}

async fn read_scale(client: Client, object: Id, reference: ScaleReference) -> (Id, Option<Scale>) {
    let api = Api::<DynamicObject>::namespaced_with(client, &object.namespace, &reference.resource);
    let scale = match tokio::time::timeout(SCALE_DEADLINE, api.get_scale(&reference.name)).await {
        Ok(Ok(scale)) => Some(scale),
        Ok(Err(err)) => {
            tracing::debug!(scaled_object = %object, %err, "scale not read");
            None
        }
        Err(_) => None,
    };
    (object, scale)
}

/// What is kept of the cluster.
struct Cluster {
    pods: Table<PodOrGateway>,
    objects: Table<ScaledObject>,
    hpas: Table<Hpa>,
    scales: BTreeMap<Id, Scale>,
    due: VecDeque<Id>,
    read_at: BTreeMap<Id, Instant>,
    answered: BTreeSet<Id>,
    synced: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct PodOrGateway {
    pod: Arc<Pod>,
    gateway: Option<Gateway>,
}

#[derive(Clone, Debug, PartialEq)]
struct ScaledObject {
    target: Target,
    reference: Option<ScaleReference>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hpa {
    object: Id,
    tolerance_percent: u32,
}

impl Cluster {
    fn new(bounds: Bounds) -> Self {
        Self {
            pods: Table::new("pods", bounds.pods),
            objects: Table::new("ScaledObjects", bounds.objects),
            hpas: Table::new("HPAs", bounds.objects),
            scales: BTreeMap::new(),
            due: VecDeque::new(),
            read_at: BTreeMap::new(),
            answered: BTreeSet::new(),
            synced: false,
        }
    }

    /// Takes in one change; true if the world may have changed.
    fn take(&mut self, change: Change) -> bool {
        match change {
            Change::Pod(event) => self.pods.take(event, cut_pod),
            Change::ScaledObject(event) => self.objects.take(event, cut_scaled_object),
            Change::Hpa(event) => {
                if let watcher::Event::Apply(hpa) = &event
                    && let Some(cut) = cut_hpa(hpa)
                    && !self.due.contains(&cut.object)
                {
                    self.due.push_back(cut.object);
                }
                self.hpas.take(event, |hpa| cut_hpa(&hpa))
            }
            Change::Failed { what, err } => {
                // Without KEDA there is nothing to scale, which is knowledge too.
                if what == "scaledobjects" && is_not_found(&err) && !self.objects.synced {
                    tracing::info!("KEDA's ScaledObject is not installed in this cluster");
                    self.objects.synced = true;
                    return true;
                }
                tracing::warn!(what, %err, "watch interrupted: the last picture stays");
                false
            }
        }
    }

    fn take_scale(&mut self, object: Id, scale: Option<Scale>) -> bool {
        if !self.objects.live.contains_key(&object) {
            return false;
        }
        let first = self.answered.insert(object.clone());
        match scale {
            Some(scale) => self.scales.insert(object, scale.clone()) != Some(scale),
            // A scale that cannot be read now keeps its last value.
            None => first,
        }
    }

    /// The next target whose `/scale` should be read.
    fn next_due(&mut self, now: Instant) -> Option<(Id, ScaleReference)> {
        if self.due.is_empty() {
            self.scales
                .retain(|object, _| self.objects.live.contains_key(object));
            self.read_at
                .retain(|object, _| self.objects.live.contains_key(object));
            self.answered
                .retain(|object| self.objects.live.contains_key(object));
            let is_due = |object: &&Id| {
                self.read_at
                    .get(*object)
                    .is_none_or(|at| now.duration_since(*at) >= SCALE_EVERY)
            };
            self.due = self.objects.live.keys().filter(is_due).cloned().collect();
        }
        while let Some(object) = self.due.pop_front() {
            let reference = self
                .objects
                .live
                .get(&object)
                .and_then(|kept| kept.reference.clone());
            if let Some(reference) = reference {
                self.read_at.insert(object.clone(), now);
                return Some((object, reference));
            }
        }
        None
    }

    fn world(&mut self) -> World {
        // A ScaledObject that comes later must not make the process unready.
        self.synced =
            self.synced || (self.pods.synced && self.objects.synced && self.scales_known());
        let tolerances: BTreeMap<&Id, u32> = self
            .hpas
            .live
            .values()
            .map(|hpa| (&hpa.object, hpa.tolerance_percent))
            .collect();
        let target = |(object, kept): (&Id, &ScaledObject)| {
            let scale = self.scales.get(object);
            let spec = scale.and_then(|scale| scale.spec.as_ref()?.replicas);
            let status = scale.and_then(|scale| scale.status.as_ref());
            let target = Target {
                // `/scale` leaves a zero out.
                spec_replicas: scale.map(|_| count(spec)),
                status_replicas: scale.map(|_| count(status.map(|status| status.replicas))),
                selector: status.and_then(|status| status.selector.clone()),
                tolerance_percent: tolerances.get(object).copied(),
                ..kept.target.clone()
            };
            (object.clone(), target)
        };
        World {
            synced: self.synced,
            pods: self
                .pods
                .live
                .values()
                .map(|kept| Arc::clone(&kept.pod))
                .collect(),
            gateways: self
                .pods
                .live
                .values()
                .filter_map(|kept| kept.gateway.clone())
                .collect(),
            targets: self.objects.live.iter().map(target).collect(),
        }
    }

    /// Whether each scale was answered once, or refused, so that a process says "ready" when it can answer.
    fn scales_known(&self) -> bool {
        self.objects
            .live
            .iter()
            .all(|(object, kept)| kept.reference.is_none() || self.answered.contains(object))
    }
}

/// Replicas as Kubernetes writes them: absent means 0.
fn count(replicas: Option<i32>) -> u32 {
    u32::try_from(replicas.unwrap_or(0)).unwrap_or(0)
}

fn is_not_found(err: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(err) | watcher::Error::WatchStartFailed(err)) = err
    else {
        return false;
    };
    matches!(err, kube::Error::Api(status) if status.code == 404)
}

fn id(object: &impl Resource) -> Id {
    Id::new(
        object.meta().namespace.clone().unwrap_or_default(),
        object.meta().name.clone().unwrap_or_default(),
    )
}

fn cut_pod(pod: ApiPod) -> Option<PodOrGateway> {
    let status = pod.status.as_ref();
    if status.is_some_and(|status| matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")))
    {
        return None;
    }
    let is_ready = |condition: &k8s_openapi::api::core::v1::PodCondition| {
        condition.type_ == "Ready" && condition.status == "True"
    };
    let ready = status
        .and_then(|status| status.conditions.as_ref())
        .is_some_and(|all| all.iter().any(is_ready));
    let ip = status.and_then(|status| status.pod_ip.as_deref()?.parse().ok());
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let created = pod
        .metadata
        .creation_timestamp
        .as_ref()
        .map_or(0, |time| time.0.as_millisecond());
    let Id { namespace, name } = id(&pod);
    let gateway = match (pod.labels().contains_key(GATEWAY_LABEL), ip) {
        (true, Some(ip)) if ready && !terminating => {
            let port = pod
                .annotations()
                .get(ADMIN_PORT_ANNOTATION)
                .and_then(|port| port.parse().ok());
            let admin = SocketAddr::new(ip, port.unwrap_or(ADMIN_PORT));
            Some(Gateway {
                namespace: namespace.clone(),
                id: format!("{namespace}/{name}"),
                admin,
            })
        }
        _ => None,
    };
    let pod = Pod {
        namespace,
        name,
        labels: pod.metadata.labels.unwrap_or_default(),
        ip,
        metrics: None,
        ready,
        terminating,
        created_ms: u64::try_from(created).unwrap_or(0),
    };
    Some(PodOrGateway {
        pod: Arc::new(pod),
        gateway,
    })
}

/// The fields of KEDA's ScaledObject that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ScaledObjectBody {
    #[serde(default)]
    spec: ScaledObjectSpec,
    #[serde(default)]
    status: ScaledObjectStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ScaledObjectSpec {
    #[serde(default)]
    scale_target_ref: ScaleTargetRef,
    min_replica_count: Option<i32>,
    idle_replica_count: Option<i32>,
    max_replica_count: Option<i32>,
    #[serde(default)]
    triggers: Vec<Trigger>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ScaleTargetRef {
    #[serde(default)]
    name: String,
    kind: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Trigger {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Default, Deserialize)]
struct ScaledObjectStatus {
    #[serde(rename = "scaleTargetGVKR")]
    resource: Option<ScaleTargetResource>,
}

#[derive(Debug, Deserialize)]
struct ScaleTargetResource {
    group: String,
    version: String,
    kind: String,
    resource: String,
}

fn cut_scaled_object(object: DynamicObject) -> Option<ScaledObject> {
    let body: ScaledObjectBody = serde_json::from_value(object.data).ok()?;
    let ours = |trigger: &Trigger| matches!(trigger.kind.as_str(), "external" | "external-push");
    if !body.spec.triggers.iter().any(ours) {
        return None;
    }
    let name = body.spec.scale_target_ref.name;
    let kind = body
        .spec
        .scale_target_ref
        .kind
        .unwrap_or_else(|| "Deployment".to_owned());
    let resource = match body.status.resource {
        Some(known) => {
            let kind = GroupVersionKind::gvk(&known.group, &known.version, &known.kind);
            Some(ApiResource::from_gvk_with_plural(&kind, &known.resource))
        }
        None if kind == "Deployment" => {
            let kind = GroupVersionKind::gvk("apps", "v1", "Deployment");
            Some(ApiResource::from_gvk_with_plural(&kind, "deployments"))
        }
        // KEDA resolves other kinds and writes the result into the status.
        None => None,
    };
    let target = Target {
        scale_target: format!("{kind}/{name}"),
        // Below the minimum KEDA keeps the idle count while the scaler says "not active".
        min: count(body.spec.idle_replica_count.or(body.spec.min_replica_count)),
        max: body
            .spec
            .max_replica_count
            .map_or(DEFAULT_MAX, |max| count(Some(max))),
        ..Target::default()
    };
    Some(ScaledObject {
        target,
        reference: resource.map(|resource| ScaleReference { resource, name }),
    })
}

fn cut_hpa(hpa: &HorizontalPodAutoscaler) -> Option<Hpa> {
    let owner = hpa
        .owner_references()
        .iter()
        .find(|owner| owner.kind == "ScaledObject")?;
    let object = Id::new(hpa.metadata.namespace.clone()?, &owner.name);
    let scale_up = hpa.spec.as_ref().and_then(|spec| {
        spec.behavior
            .as_ref()?
            .scale_up
            .as_ref()?
            .tolerance
            .as_ref()
    });
    let tolerance_percent = scale_up
        .and_then(|quantity| percent(&quantity.0))
        .unwrap_or(DEFAULT_TOLERANCE_PERCENT);
    Some(Hpa {
        object,
        tolerance_percent,
    })
}

/// A tolerance as a Kubernetes quantity, `0`, `0.05` or `50m`, rounded up to whole percent.
fn percent(quantity: &str) -> Option<u32> {
    let ratio = match quantity.strip_suffix('m') {
        Some(milli) => milli.parse::<f64>().ok()? / 1000.0,
        None => quantity.parse::<f64>().ok()?,
    };
    (0..=100).find(|percent| f64::from(*percent) + 1e-9 >= ratio * 100.0)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "(IO) file")]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, change: impl FnOnce(&mut serde_json::Value)) -> ApiPod {
        let mut value = json!({
            "metadata": {"namespace": "team", "name": name, "labels": {"app": "vllm"}, "creationTimestamp": "2026-11-21T10:00:00Z"},
            "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}]}
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn pod_is_cut_to_what_is_needed() {
        let kept = cut_pod(pod("a", |_| {})).unwrap();
        assert!(kept.pod.ready && !kept.pod.terminating && kept.gateway.is_none());
        assert_eq!(kept.pod.ip, Some("10.0.0.7".parse().unwrap()));
        assert_eq!(kept.pod.created_ms, 1_795_255_200_000);
        assert!(cut_pod(pod("a", |pod| pod["status"]["phase"] = json!("Failed"))).is_none());
        let deleted = cut_pod(pod("a", |pod| {
            pod["metadata"]["deletionTimestamp"] = json!("2026-11-21T10:00:00Z");
        }))
        .unwrap();
        assert!(deleted.pod.terminating);
    }

    #[test]
    fn ready_pod_with_the_gateway_label_is_a_gateway() {
        let label = |pod: &mut serde_json::Value| {
            pod["metadata"]["labels"]["penstock.dev/gateway"] = json!("default");
        };
        let kept = cut_pod(pod("g", label)).unwrap();
        assert_eq!(
            kept.gateway.unwrap().admin,
            "10.0.0.7:9090".parse().unwrap()
        );
        let annotated = cut_pod(pod("g", |pod| {
            label(pod);
            pod["metadata"]["annotations"] = json!({ADMIN_PORT_ANNOTATION: "7000"});
        }));
        assert_eq!(annotated.unwrap().gateway.unwrap().admin.port(), 7000);
        let not_ready = cut_pod(pod("g", |pod| {
            label(pod);
            pod["status"]["conditions"][0]["status"] = json!("False");
        }));
        assert_eq!(not_ready.unwrap().gateway, None);
    }

    fn scaled_object(spec: serde_json::Value, status: serde_json::Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject",
            "metadata": {"namespace": "team", "name": "chat"}, "spec": spec, "status": status
        }))
        .unwrap()
    }

    #[test]
    fn scaled_object_gets_kedas_defaults_and_finds_its_scale() {
        let spec = json!({"scaleTargetRef": {"name": "chat"}, "triggers": [{"type": "external-push", "metadata": {}}]});
        let kept = cut_scaled_object(scaled_object(spec, json!({}))).unwrap();
        assert_eq!((kept.target.min, kept.target.max), (0, 100));
        assert_eq!(kept.target.scale_target, "Deployment/chat");
        assert_eq!(kept.reference.unwrap().resource.plural, "deployments");

        let spec = json!({"scaleTargetRef": {"name": "chat", "kind": "LeaderWorkerSet"}, "minReplicaCount": 2,
            "maxReplicaCount": 9, "triggers": [{"type": "cron"}, {"type": "external"}]});
        let status = json!({"scaleTargetGVKR": {"group": "leaderworkerset.x-k8s.io", "version": "v1", "kind": "LeaderWorkerSet", "resource": "leaderworkersets"}});
        let kept = cut_scaled_object(scaled_object(spec.clone(), status)).unwrap();
        assert_eq!((kept.target.min, kept.target.max), (2, 9));
        assert_eq!(kept.reference.unwrap().resource.plural, "leaderworkersets");
        assert_eq!(
            cut_scaled_object(scaled_object(spec, json!({})))
                .unwrap()
                .reference,
            None
        );
    }

    #[test]
    fn scaled_object_without_external_trigger_is_not_kept() {
        let spec =
            json!({"scaleTargetRef": {"name": "chat"}, "triggers": [{"type": "prometheus"}]});
        assert!(cut_scaled_object(scaled_object(spec, json!({}))).is_none());
    }

    #[test]
    fn tolerance_is_read_from_the_hpa_and_defaults_to_ten_percent() {
        let hpa = |behavior: serde_json::Value| {
            let hpa = json!({"metadata": {"namespace": "team", "name": "keda-hpa-chat", "ownerReferences": [
                {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "name": "chat", "uid": "u"}]},
                "spec": {"maxReplicas": 3, "scaleTargetRef": {"kind": "Deployment", "name": "chat"}, "behavior": behavior}});
            cut_hpa(&serde_json::from_value(hpa).unwrap()).unwrap()
        };
        assert_eq!(
            hpa(json!({"scaleUp": {"tolerance": "0"}})),
            Hpa {
                object: Id::new("team", "chat"),
                tolerance_percent: 0
            }
        );
        assert_eq!(
            hpa(json!({"scaleUp": {"tolerance": "50m"}})).tolerance_percent,
            5
        );
        assert_eq!(hpa(json!({"scaleUp": {}})).tolerance_percent, 10);
        assert_eq!(percent("0.001"), Some(1));
        assert_eq!(percent("2"), None);
    }

    #[test]
    fn relist_replaces_and_a_lost_watch_keeps_the_picture() {
        let mut cluster = Cluster::new(Bounds {
            pods: 2,
            objects: 2,
        });
        let mut feed = |event| cluster.take(Change::Pod(event));
        feed(watcher::Event::Init);
        feed(watcher::Event::InitApply(pod("a", |_| {})));
        assert!(feed(watcher::Event::InitDone));
        feed(watcher::Event::Init);
        feed(watcher::Event::InitApply(pod("b", |_| {})));
        assert_eq!(
            cluster.world().pods[0].name,
            "a",
            "a list that is under way does not show"
        );
        cluster.take(Change::Failed {
            what: "pods",
            err: watcher::Error::NoResourceVersion,
        });
        assert_eq!(cluster.world().pods.len(), 1);
        cluster.take(Change::Pod(watcher::Event::InitDone));
        assert_eq!(cluster.world().pods[0].name, "b");
    }

    #[test]
    fn objects_beyond_the_limit_are_not_kept() {
        let mut cluster = Cluster::new(Bounds {
            pods: 2,
            objects: 2,
        });
        for name in ["a", "b", "c"] {
            cluster.take(Change::Pod(watcher::Event::Apply(pod(name, |_| {}))));
        }
        assert_eq!(cluster.world().pods.len(), 2);
    }

    #[test]
    fn world_is_synced_once_lists_are_in_and_every_scale_was_answered() {
        let mut cluster = Cluster::new(Bounds {
            pods: 9,
            objects: 9,
        });
        let spec = json!({"scaleTargetRef": {"name": "chat"}, "triggers": [{"type": "external"}]});
        cluster.take(Change::Pod(watcher::Event::InitDone));
        cluster.take(Change::ScaledObject(watcher::Event::Apply(scaled_object(
            spec,
            json!({}),
        ))));
        assert!(!cluster.world().synced);
        cluster.objects.synced = true;
        assert!(!cluster.world().synced);
        let (object, reference) = cluster.next_due(Instant::now()).unwrap();
        assert_eq!(
            (object.to_string().as_str(), reference.name.as_str()),
            ("team/chat", "chat")
        );
        assert!(!cluster.world().synced);
        let scale = json!({"metadata": {}, "spec": {"replicas": 2}, "status": {"replicas": 3, "selector": "app=vllm"}});
        assert!(cluster.take_scale(object.clone(), serde_json::from_value(scale).unwrap()));
        let world = cluster.world();
        assert!(world.synced);
        let target = &world.targets[&object];
        assert_eq!(
            (
                target.spec_replicas,
                target.status_replicas,
                target.selector.as_deref()
            ),
            (Some(2), Some(3), Some("app=vllm"))
        );
        assert!(
            !cluster.take_scale(object.clone(), None),
            "a failed read changes nothing"
        );
        assert_eq!(cluster.world().targets[&object].spec_replicas, Some(2));
        assert!(
            cluster.next_due(Instant::now()).is_none(),
            "not due again so soon"
        );
    }
}
