//! (IO) KEDA's five RPCs, answered from memory: the newest decisions, or the world where a target is too new to have
//! one. No call waits for a network, a lock or a tick.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use penstock_core::ids::Id;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::decide::Decision;
use crate::fleet::TargetKey;
use crate::metadata::{self, TargetSpec};
use crate::metrics::Metrics;
use crate::proto::external_scaler_server::ExternalScaler;
use crate::proto::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec,
    MetricValue, ScaledObjectRef,
};
use crate::world::World;

/// The one metric: replicas wanted, with target 1, so that the HPA's answer is the value itself.
pub const METRIC: &str = "desired-replicas";
/// Longest namespace or name that Kubernetes has.
const MAX_NAME_BYTES: usize = 253;

/// The newest decision of each target; none where nothing is known yet.
pub type Board = BTreeMap<Arc<TargetKey>, Option<Decision>>;

/// Somebody asked about a target.
#[derive(Debug)]
pub struct Asked {
    /// Which.
    pub key: TargetKey,
    /// What its metadata means.
    pub spec: TargetSpec,
}

/// Behind the RPCs.
#[derive(Debug)]
pub struct Service {
    /// Newest decisions.
    pub board: watch::Receiver<Arc<Board>>,
    /// Newest world.
    pub world: watch::Receiver<Arc<World>>,
    /// Towards the fleet.
    pub asked: mpsc::Sender<Asked>,
    /// Prometheus servers that metadata may name.
    pub allowed_prometheus: Vec<String>,
    /// As [`crate::fleet::Limits::targets`].
    pub max_targets: usize,
    /// Open streams, over all connections.
    pub streams: Arc<Semaphore>,
    /// The scaler's metrics.
    pub metrics: Metrics,
    /// Ends streams with OK, after which KEDA reconnects without back-off.
    pub shutdown: CancellationToken,
}

/// What the streams are.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// The target that a call is about. Notes for the fleet that somebody asks.
    fn target(&self, object: Option<ScaledObjectRef>) -> Result<TargetKey, Status> {
        let object =
            object.ok_or_else(|| Status::invalid_argument("scaledObjectRef is missing"))?;
        for (field, text) in [("name", &object.name), ("namespace", &object.namespace)] {
            if text.is_empty() || text.len() > MAX_NAME_BYTES {
                return Err(Status::invalid_argument(format!(
                    "scaledObjectRef.{field} must have 1 to {MAX_NAME_BYTES} bytes"
                )));
            }
        }
        let spec = metadata::parse(&object.scaler_metadata, &self.allowed_prometheus)
            .map_err(|problems| Status::invalid_argument(metadata::describe(&problems)))?;
        let metadata = metadata::own(&object.scaler_metadata);
        let key = TargetKey {
            object: Id::new(object.namespace, object.name),
            metadata,
        };
        let board = self.board.borrow();
        if !board.contains_key(&key) && board.len() >= self.max_targets {
            return Err(Status::resource_exhausted(format!(
                "{} targets are watched already (--max-targets)",
                board.len()
            )));
        }
        drop(board);
        // A full queue loses this note; the next call, seconds later, makes another.
        let _later = self.asked.try_send(Asked {
            key: key.clone(),
            spec,
        });
        Ok(key)
    }

    fn decision(&self, key: &TargetKey) -> Option<Decision> {
        self.board.borrow().get(key).cloned().flatten()
    }

    fn metrics_of(&self, key: &TargetKey) -> Result<f64, Status> {
        if let Some(decision) = self.decision(key) {
            return Ok(decision.value);
        }
        match self.spec_replicas(key) {
            Some(replicas) => Ok(f64::from(replicas.max(1))),
            None => Err(unknown(key)),
        }
    }

    fn active(&self, key: &TargetKey) -> Result<bool, Status> {
        known_active(&self.board.borrow(), &self.world.borrow(), key).ok_or_else(|| unknown(key))
    }

    fn spec_replicas(&self, key: &TargetKey) -> Option<u32> {
        self.world.borrow().targets.get(&key.object)?.spec_replicas
    }

    fn stream_permit(&self) -> Result<OwnedSemaphorePermit, Status> {
        Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted("too many open streams"))
    }

    fn answered<T>(
        &self,
        rpc: &'static str,
        result: Result<T, Status>,
    ) -> Result<Response<T>, Status> {
        let code = match &result {
            Ok(_) => "OK",
            Err(status) => code_name(status.code()),
        };
        self.metrics.called(rpc, code);
        if let Err(status) = &result {
            tracing::debug!(rpc, code, message = status.message(), "call refused");
        }
        result.map(Response::new)
    }
}

fn unknown(key: &TargetKey) -> Status {
    Status::unavailable(format!(
        "neither load nor replicas of ScaledObject {} are known yet; the HPA should hold what it has",
        key.object
    ))
}

/// What can be said about activity; none if nothing.
fn known_active(board: &Board, world: &World, key: &TargetKey) -> Option<bool> {
    if let Some(Some(decision)) = board.get(key) {
        return Some(decision.active);
    }
    let target = world.targets.get(&key.object)?;
    Some(target.min >= 1 || target.spec_replicas? > 0)
}

fn code_name(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::InvalidArgument => "INVALID_ARGUMENT",
        tonic::Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        tonic::Code::Unavailable => "UNAVAILABLE",
        _ => "OTHER",
    }
}

/// The answer to GetMetricSpec, which never changes.
fn metric_spec() -> GetMetricSpecResponse {
    let spec = MetricSpec {
        metric_name: METRIC.to_owned(),
        target_size: 1,
        target_size_float: 1.0,
    };
    GetMetricSpecResponse {
        metric_specs: vec![spec],
    }
}

/// The integer is for KEDA before 2.17, which reads nothing else. Rounded up, it leads to the same replicas.
#[expect(
    clippy::cast_possible_truncation,
    reason = "at most 10,000 replicas and the tolerance on top"
)]
fn metric_value(value: f64) -> GetMetricsResponse {
    let value = MetricValue {
        metric_name: METRIC.to_owned(),
        metric_value: value.ceil() as i64,
        metric_value_float: value,
    };
    GetMetricsResponse {
        metric_values: vec![value],
    }
}

struct Activity {
    key: TargetKey,
    board: watch::Receiver<Arc<Board>>,
    world: watch::Receiver<Arc<World>>,
    sent: Option<bool>,
    shutdown: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

impl Activity {
    /// Waits for the next change of activity; none at shutdown. Cancel safe.
    async fn next(mut self) -> Option<(Result<IsActiveResponse, Status>, Self)> {
        loop {
            let active = known_active(
                &self.board.borrow_and_update(),
                &self.world.borrow(),
                &self.key,
            );
            if let Some(result) = active.filter(|active| self.sent != Some(*active)) {
                self.sent = Some(result);
                return Some((Ok(IsActiveResponse { result }), self));
            }
            tokio::select! {
                changed = self.board.changed() => changed.ok()?,
                () = self.shutdown.cancelled() => return None,
            }
        }
    }
}

#[tonic::async_trait]
impl ExternalScaler for Service {
    type StreamIsActiveStream = Answers<IsActiveResponse>;
    type StreamMetricSpecStream = Answers<GetMetricSpecResponse>;

    async fn is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<IsActiveResponse>, Status> {
        let active = self
            .target(Some(request.into_inner()))
            .and_then(|key| self.active(&key));
        self.answered("IsActive", active.map(|result| IsActiveResponse { result }))
    }

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let opened = self.target(Some(request.into_inner())).and_then(|key| {
            let activity = Activity {
                key,
                board: self.board.clone(),
                world: self.world.clone(),
                sent: None,
                shutdown: self.shutdown.clone(),
                _permit: self.stream_permit()?,
            };
            Ok(Box::pin(futures::stream::unfold(activity, Activity::next))
                as Self::StreamIsActiveStream)
        });
        self.answered("StreamIsActive", opened)
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        let spec = self
            .target(Some(request.into_inner()))
            .map(|_| metric_spec());
        self.answered("GetMetricSpec", spec)
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let request = request.into_inner();
        let value = self.target(request.scaled_object_ref).and_then(|key| {
            match request.metric_name.as_str() {
                METRIC => self.metrics_of(&key),
                _ => Err(Status::invalid_argument(format!(
                    "the only metric is {METRIC}"
                ))),
            }
        });
        self.answered("GetMetrics", value.map(metric_value))
    }

    async fn stream_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamMetricSpecStream>, Status> {
        let opened = self.target(Some(request.into_inner())).and_then(|_| {
            let (shutdown, permit) = (self.shutdown.clone(), self.stream_permit()?);
            // Sent once, on opening; it never changes, and the stream ends with OK at shutdown.
            let stream = futures::stream::unfold(Some((shutdown, permit, false)), |state| async {
                let (shutdown, permit, sent) = state?;
                if sent {
                    shutdown.cancelled().await;
                    return None;
                }
                Some((Ok(metric_spec()), Some((shutdown, permit, true))))
            });
            Ok(Box::pin(stream) as Self::StreamMetricSpecStream)
        });
        self.answered("StreamMetricSpec", opened)
    }
}
