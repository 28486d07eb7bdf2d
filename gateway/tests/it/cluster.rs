//! The gateway's sources in a cluster, before a scripted API server: lists, watches that the test feeds, acks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use penstock_core::acks::Ack;
use penstock_core::config::{GatewayConfig, Target};
use penstock_core::names::CONFIG_KEY;
use penstock_gateway::source::cluster::{self, ClusterSettings};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::harness::*;

const CONFIGS: &str = "configmaps";
const SECRETS: &str = "secrets";
const SLICES: &str = "endpointslices";

/// What lists show, and the open watches.
#[derive(Default)]
struct State {
    objects: BTreeMap<&'static str, Vec<Value>>,
    watches: BTreeMap<&'static str, UnboundedSender<Step>>,
    /// Connections are reset.
    down: bool,
}

/// An API server that knows three kinds and one patch.
struct ApiServer {
    upstream: Upstream,
    state: Arc<Mutex<State>>,
}

impl ApiServer {
    async fn start(objects: Vec<(&'static str, Value)>) -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        for (kind, object) in objects {
            let mut state = state.lock().unwrap();
            state.objects.entry(kind).or_default().push(object);
        }
        let shared = Arc::clone(&state);
        let upstream = Upstream::start(move |_, received| {
            let line = &received.line;
            let kind = [CONFIGS, SECRETS, SLICES]
                .into_iter()
                .find(|kind| line.contains(&format!("/{kind}")))
                .unwrap();
            let mut state = shared.lock().unwrap();
            if state.down {
                return Reply::Reset;
            }
            if line.starts_with("PATCH ") {
                return Reply::Json(
                    200,
                    json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": {"name": "gateway-acks"}}).to_string(),
                );
            }
            if line.contains("watch=true") {
                let (steps, reply) = driven();
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
                steps.send(Step::Write(head.to_owned())).unwrap();
                state.watches.insert(kind, steps);
                return reply;
            }
            let items = state.objects.get(kind).cloned().unwrap_or_default();
            Reply::Json(
                200,
                json!({"metadata": {"resourceVersion": "1"}, "items": items}).to_string(),
            )
        })
        .await;
        Self { upstream, state }
    }

    fn watched(&self, kind: &str) -> bool {
        self.state.lock().unwrap().watches.contains_key(kind)
    }

    /// Tells the watch of a kind.
    async fn push(&self, kind: &'static str, what: &str, object: &Value) {
        until("a watch is open", || self.watched(kind)).await;
        let line = json!({"type": what, "object": object}).to_string() + "\n";
        let state = self.state.lock().unwrap();
        state.watches[kind].send(Step::Chunk(line)).unwrap();
    }

    /// What was acknowledged, in order.
    fn acks(&self) -> Vec<Ack> {
        self.upstream
            .requests()
            .iter()
            .filter(|received| received.line.starts_with("PATCH "))
            .map(|received| {
                assert!(
                    received
                        .line
                        .starts_with("PATCH /api/v1/namespaces/ns/configmaps/gateway-acks?"),
                    "{}",
                    received.line
                );
                let body: Value = serde_json::from_str(&received.body).unwrap();
                serde_json::from_str(body["data"]["uid-1"].as_str().unwrap()).unwrap()
            })
            .collect()
    }

    async fn acknowledged(&self, config: &GatewayConfig) -> Ack {
        let digest = config.digest().unwrap();
        until("the config is acknowledged", || {
            self.acks().last().is_some_and(|ack| ack.digest == digest)
        })
        .await;
        self.acks().pop().unwrap()
    }
}

fn raw_config_map(raw: &[u8]) -> Value {
    let mut map = ConfigMap::default();
    map.metadata.name = Some("gateway-config-f1".to_owned());
    map.metadata.resource_version = Some("2".to_owned());
    let raw = zstd::encode_all(raw, 3).unwrap();
    map.binary_data = Some(BTreeMap::from([(CONFIG_KEY.to_owned(), ByteString(raw))]));
    serde_json::to_value(map).unwrap()
}

fn config_map(config: &GatewayConfig) -> Value {
    raw_config_map(&config.to_json().unwrap())
}

fn secret(id: &str, value: &str) -> Value {
    let mut secret = Secret::default();
    secret.metadata.name = Some("gateway-credentials".to_owned());
    secret.metadata.resource_version = Some("2".to_owned());
    let value = ByteString(value.as_bytes().to_vec());
    secret.data = Some(BTreeMap::from([(id.to_owned(), value)]));
    serde_json::to_value(secret).unwrap()
}

/// One endpoint of the Service `name`.
fn slice(name: &str, address: SocketAddr) -> Value {
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {
            "name": format!("{name}-1"), "namespace": "ns", "resourceVersion": "2",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"port": address.port()}],
        "endpoints": [{"addresses": [address.ip()], "conditions": {"ready": true}}],
    }))
    .unwrap();
    serde_json::to_value(slice).unwrap()
}

/// A gateway that is fed by the API server at `server`, and what feeds it.
async fn start(server: SocketAddr, folder: &Path) -> (Gateway, JoinSet<()>) {
    let mut gateway = Gateway::empty(settings()).await;
    let publisher = gateway.take_publisher();
    let client = kube::Client::try_from(kube::Config::new(
        format!("http://{server}").parse().unwrap(),
    ))
    .unwrap();
    let settings = ClusterSettings {
        gateway: id("gateway"),
        state_dir: folder.join("state"),
        secret_dir: folder.join("secrets"),
        pod_uid: "uid-1".to_owned(),
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(cluster::run(
        client,
        settings,
        publisher,
        CancellationToken::new(),
    ));
    (gateway, tasks)
}

async fn answers(gateway: &Gateway, text: &str) {
    within(text, async {
        loop {
            let answer = gateway.post(&chat(false)).await;
            if answer.body == completion(text) {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_cluster_says_is_served_and_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let old = Upstream::always(|| json_answer("old")).await;
    let new = Upstream::always(|| json_answer("new")).await;
    let plan = Plan::chain(&[old.address]);
    let server = ApiServer::start(vec![
        (CONFIGS, config_map(&plan.config)),
        (SLICES, slice("a", old.address)),
    ])
    .await;
    let (gateway, _tasks) = start(server.upstream.address, folder.path()).await;
    let ack = server.acknowledged(&plan.config).await;
    assert!(ack.rejected.is_empty() && ack.process_start > 0);
    answers(&gateway, "old").await;

    server
        .push(SLICES, "MODIFIED", &slice("a", new.address))
        .await;
    answers(&gateway, "new").await;

    // A config that cannot be served in part.
    let mut partly = plan.clone();
    partly.config.backends.get_mut(&id("a")).unwrap().target = Target::Url("ftp://x".to_owned());
    server
        .push(CONFIGS, "MODIFIED", &config_map(&partly.config))
        .await;
    let ack = server.acknowledged(&partly.config).await;
    assert_eq!(ack.rejected, ["LLMBackend/ns/a"]);
    answers(&gateway, "new").await;

    server
        .push(CONFIGS, "MODIFIED", &config_map(&plan.config))
        .await;
    assert!(server.acknowledged(&plan.config).await.rejected.is_empty());
    assert_eq!(server.acks().len(), 3, "one for each change");
    let fields: Vec<String> = server
        .upstream
        .requests()
        .iter()
        .filter(|received| !received.line.starts_with("PATCH "))
        .map(|received| received.line.clone())
        .collect();
    assert!(
        fields.iter().all(|line| line.contains("/namespaces/ns/")),
        "{fields:?}"
    );
    assert!(
        fields
            .iter()
            .filter(|line| !line.contains(SLICES))
            .all(|line| line.contains("fieldSelector=metadata.name%3Dgateway-")),
        "its own objects by name: {fields:?}"
    );
}

#[tokio::test]
async fn a_config_that_cannot_be_read_leaves_the_last_good_one_in_force() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]);
    let server = ApiServer::start(vec![
        (CONFIGS, config_map(&plan.config)),
        (SLICES, slice("a", upstream.address)),
    ])
    .await;
    let (gateway, _tasks) = start(server.upstream.address, folder.path()).await;
    server.acknowledged(&plan.config).await;

    let mut newer = serde_json::to_value(&plan.config).unwrap();
    newer["format"] = json!(2);
    let mut unknown = serde_json::to_value(&plan.config).unwrap();
    unknown["rules"][0]["surprise"] = json!(1);
    let mut empty = config_map(&plan.config);
    empty.as_object_mut().unwrap().remove("binaryData");
    for bad in [
        raw_config_map(newer.to_string().as_bytes()),
        raw_config_map(unknown.to_string().as_bytes()),
        raw_config_map(b"no JSON"),
        empty,
    ] {
        server.push(CONFIGS, "MODIFIED", &bad).await;
    }
    server
        .push(CONFIGS, "DELETED", &config_map(&plan.config))
        .await;
    // One that can be read shows that the others were seen.
    let mut next = plan.clone();
    next.config.rules[0].retry.attempts = 1;
    server
        .push(CONFIGS, "ADDED", &config_map(&next.config))
        .await;
    server.acknowledged(&next.config).await;
    let digests: Vec<String> = server.acks().into_iter().map(|ack| ack.digest).collect();
    assert_eq!(
        digests,
        [plan.config.digest().unwrap(), next.config.digest().unwrap()]
    );
    answers(&gateway, "x").await;
    gateway
        .metric_is("penstock_gateway_config_reloads_total", 2.0)
        .await;
}

#[tokio::test]
async fn a_restart_without_an_api_server_serves_what_was_seen_last() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]).credential("a", "ns.s.k");
    let server = ApiServer::start(vec![
        (CONFIGS, config_map(&plan.config)),
        (SECRETS, secret("ns.s.k", "sk-one")),
        (SLICES, slice("a", upstream.address)),
    ])
    .await;
    let (gateway, tasks) = start(server.upstream.address, folder.path()).await;
    server.acknowledged(&plan.config).await;
    answers(&gateway, "x").await;
    server
        .push(SECRETS, "MODIFIED", &secret("ns.s.k", "sk-two"))
        .await;
    let sent = || upstream.requests().pop().unwrap().headers["authorization"].clone();
    within("the new credential is in use", async {
        while sent() != "Bearer sk-two" {
            gateway.post(&chat(false)).await;
        }
    })
    .await;
    // Endpoints are written once a second at most.
    let file = folder.path().join("state/endpoints.json");
    let port = upstream.address.port().to_string();
    until("endpoints are kept", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.contains(&port))
    })
    .await;
    drop((gateway, tasks, server));

    let (gateway, _tasks) = start(nobody(), folder.path()).await;
    answers(&gateway, "x").await;
    assert_eq!(sent(), "Bearer sk-two");
    assert_eq!(gateway.admin_get("/readyz").await.status, 200);
}

#[tokio::test]
async fn a_lost_watch_freezes_the_endpoints() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]);
    let server = ApiServer::start(vec![
        (CONFIGS, config_map(&plan.config)),
        (SLICES, slice("a", upstream.address)),
    ])
    .await;
    let (gateway, _tasks) = start(server.upstream.address, folder.path()).await;
    server.acknowledged(&plan.config).await;
    answers(&gateway, "x").await;
    until("a watch is open", || server.watched(SLICES)).await;
    let lost = {
        let mut state = server.state.lock().unwrap();
        state.down = true;
        state.watches.remove(SLICES).unwrap()
    };
    let requests = server.upstream.count();
    // What was watched is too old, so everything is to be listed anew.
    let expired = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"});
    let line = json!({"type": "ERROR", "object": expired}).to_string() + "\n";
    lost.send(Step::Chunk(line)).unwrap();
    lost.send(Step::Reset).unwrap();
    until("it was tried twice in vain", || {
        server.upstream.count() >= requests + 2
    })
    .await;
    answers(&gateway, "x").await;
    assert_eq!(gateway.admin_get("/readyz").await.status, 200);

    server.state.lock().unwrap().down = false;
    let new = Upstream::always(|| json_answer("new")).await;
    server
        .push(SLICES, "MODIFIED", &slice("a", new.address))
        .await;
    answers(&gateway, "new").await;
}
