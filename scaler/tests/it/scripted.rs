//! Scripted peers and a running scaler.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use penstock_core::ids::Id;
use penstock_core::load::{BackendLoad, LoadReport};
use penstock_scaler::args::Settings;
use penstock_scaler::proto::external_scaler_client::ExternalScalerClient;
use penstock_scaler::proto::{GetMetricsRequest, ScaledObjectRef};
use penstock_scaler::world::{Gateway, Pod, Target, World};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// Longer than any wait that succeeds, even on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Servers that end with the test.
#[derive(Default)]
pub(crate) struct Servers(JoinSet<()>);

impl Servers {
    async fn serve(&mut self, router: axum::Router) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = axum::serve(listener, router).into_future();
        self.0.spawn(async move { served.await.unwrap() });
        address
    }

    pub(crate) async fn engine(&mut self, engine: &Engine) -> SocketAddr {
        let engine = engine.clone();
        self.serve(axum::Router::new().route("/metrics", get(async move || engine.answer())))
            .await
    }

    pub(crate) async fn gateway(&mut self, gateway: &ScriptedGateway) -> SocketAddr {
        let gateway = gateway.clone();
        self.serve(axum::Router::new().route("/load", get(async move || gateway.answer())))
            .await
    }

    /// Answers every path with this text.
    pub(crate) async fn text(&mut self, text: String) -> SocketAddr {
        self.serve(axum::Router::new().fallback(any(async move || text)))
            .await
    }
}

/// An engine whose page is written by the test.
#[derive(Clone, Default)]
pub(crate) struct Engine {
    page: Arc<Mutex<String>>,
    broken: Arc<AtomicBool>,
}

impl Engine {
    pub(crate) fn set(&self, kv_use: f64, running: u32, waiting: u32) {
        *self.page.lock().unwrap() = format!(
            "# TYPE vllm:num_requests_running gauge\n\
             vllm:num_requests_running{{engine=\"0\",model_name=\"m\"}} {running}.0\n\
             vllm:num_requests_waiting{{engine=\"0\",model_name=\"m\"}} {waiting}.0\n\
             vllm:kv_cache_usage_perc{{engine=\"0\",model_name=\"m\"}} {kv_use}\n"
        );
    }

    pub(crate) fn set_page(&self, page: &str) {
        page.clone_into(&mut self.page.lock().unwrap());
    }

    pub(crate) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
    }

    fn answer(&self) -> Response {
        if self.broken.load(Ordering::Acquire) {
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        }
        self.page.lock().unwrap().clone().into_response()
    }
}

/// A gateway whose lines are written by the test: the newest one at once, then each change.
#[derive(Clone)]
pub(crate) struct ScriptedGateway(watch::Sender<BackendLoad>);

impl ScriptedGateway {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(BackendLoad::default()))
    }

    pub(crate) fn set(&self, load: BackendLoad) {
        self.0.send_replace(load);
    }

    fn answer(&self) -> Response {
        let lines =
            futures::stream::unfold((self.0.subscribe(), true), |(mut load, first)| async move {
                if !first {
                    // A line a second, as a gateway sends, or at once on a change.
                    let _second_is_over =
                        tokio::time::timeout(Duration::from_secs(1), load.changed()).await;
                }
                let backends =
                    BTreeMap::from([(Id::new("team", "chat"), load.borrow_and_update().clone())]);
                let report = LoadReport {
                    gateway: "g".into(),
                    process_start_ms: 1,
                    at_ms: 0,
                    backends,
                };
                let line = format!("{}\n", serde_json::to_string(&report).unwrap());
                Some((Ok::<_, Infallible>(Bytes::from(line)), (load, false)))
            });
        Body::from_stream(lines).into_response()
    }
}

pub(crate) fn pod(name: &str, metrics: SocketAddr) -> Pod {
    Pod {
        namespace: "team".into(),
        name: name.into(),
        labels: BTreeMap::from([
            ("penstock.dev/backend".into(), "chat".into()),
            ("app".into(), "vllm".into()),
        ]),
        ip: None,
        metrics: Some(metrics),
        ready: true,
        terminating: false,
        created_ms: 0,
    }
}

pub(crate) fn world(min: u32, replicas: u32, pods: Vec<Pod>, gateways: &[SocketAddr]) -> World {
    let target = Target {
        scale_target: "Deployment/chat".into(),
        min,
        max: 8,
        spec_replicas: Some(replicas),
        status_replicas: Some(replicas),
        selector: None,
        tolerance_percent: Some(0),
    };
    let gateway = |(number, admin): (usize, &SocketAddr)| Gateway {
        namespace: "team".into(),
        id: format!("g{number}"),
        admin: *admin,
    };
    World {
        synced: true,
        pods: pods.into_iter().map(Arc::new).collect(),
        gateways: gateways.iter().enumerate().map(gateway).collect(),
        targets: BTreeMap::from([(Id::new("team", "chat"), target)]),
    }
}

/// A running scaler.
pub(crate) struct Scaler {
    pub(crate) client: ExternalScalerClient<Channel>,
    pub(crate) admin: SocketAddr,
    pub(crate) world: watch::Sender<Arc<World>>,
    pub(crate) shutdown: CancellationToken,
    task: JoinSet<Result<(), penstock_scaler::run::Error>>,
}

pub(crate) fn reference(metadata: &[(&str, &str)]) -> ScaledObjectRef {
    ScaledObjectRef {
        name: "chat".into(),
        namespace: "team".into(),
        scaler_metadata: metadata
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect(),
    }
}

pub(crate) const BACKEND: &[(&str, &str)] =
    &[("backend", "chat"), ("scalerAddress", "scaler:6000")];

impl Scaler {
    pub(crate) async fn start(settings: Settings, world: World) -> Self {
        let bind = || TcpListener::bind("127.0.0.1:0");
        let (grpc, admin) = (bind().await.unwrap(), bind().await.unwrap());
        let (grpc_address, admin_address) =
            (grpc.local_addr().unwrap(), admin.local_addr().unwrap());
        let (sender, receiver) = watch::channel(Arc::new(world));
        let shutdown = CancellationToken::new();
        let mut task = JoinSet::new();
        task.spawn(penstock_scaler::run(
            settings,
            receiver,
            grpc,
            admin,
            shutdown.clone(),
        ));
        let channel = Channel::from_shared(format!("http://{grpc_address}"))
            .unwrap()
            .connect_lazy();
        Self {
            client: ExternalScalerClient::new(channel),
            admin: admin_address,
            world: sender,
            shutdown,
            task,
        }
    }

    pub(crate) async fn metric(&mut self, metadata: &[(&str, &str)]) -> Result<f64, tonic::Status> {
        let request = GetMetricsRequest {
            scaled_object_ref: Some(reference(metadata)),
            metric_name: "desired-replicas".into(),
        };
        let values = self
            .client
            .get_metrics(request)
            .await?
            .into_inner()
            .metric_values;
        assert_eq!(values.len(), 1);
        assert_eq!(values[0].metric_name, "desired-replicas");
        let (whole, exact) = (values[0].metric_value, values[0].metric_value_float);
        assert_eq!(whole.to_string(), format!("{}", exact.ceil()));
        Ok(values[0].metric_value_float)
    }

    pub(crate) async fn active(
        &mut self,
        metadata: &[(&str, &str)],
    ) -> Result<bool, tonic::Status> {
        Ok(self
            .client
            .is_active(reference(metadata))
            .await?
            .into_inner()
            .result)
    }

    /// Asks until the metric has this value; panics with the last one at the deadline.
    pub(crate) async fn wait_for_metric(&mut self, metadata: &[(&str, &str)], wanted: f64) {
        let mut last = None;
        let reached = async {
            loop {
                let value = self.metric(metadata).await.unwrap();
                last = Some(value);
                if value == wanted {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        assert!(
            tokio::time::timeout(DEADLINE, reached).await.is_ok(),
            "metric stays {last:?}, not {wanted}"
        );
    }

    /// Reads the first decision until it satisfies `holds`.
    pub(crate) async fn wait_for_decision(
        &mut self,
        metadata: &[(&str, &str)],
        holds: impl Fn(&serde_json::Value) -> bool,
    ) {
        self.metric(metadata).await.unwrap();
        let mut last = None;
        let reached = async {
            loop {
                let page = self.admin_page("/decisions").await.1;
                let all: serde_json::Value = serde_json::from_str(&page).unwrap();
                if holds(&all[0]["decision"]) {
                    return;
                }
                last = Some(all);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        assert!(
            tokio::time::timeout(DEADLINE, reached).await.is_ok(),
            "decision stays {last:?}"
        );
    }

    pub(crate) async fn admin_page(&self, path: &str) -> (u16, String) {
        let client = penstock_scaler::collect::http::client();
        let uri = format!("http://{}{path}", self.admin);
        let response = client.get(uri.parse().unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let body = http_body_util::BodyExt::collect(response.into_body())
            .await
            .unwrap()
            .to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Stops it and checks that it ended in order.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(DEADLINE, self.task.join_next()).await;
        ended.expect("ends in time").unwrap().unwrap().unwrap();
    }
}
