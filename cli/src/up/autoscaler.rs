//! (IO) What KEDA and the HPA controller do for one pool: ask the scaler over gRPC, do their arithmetic
//! (`penstock_scaler::{keda, hpa}`), and say how many replicas there should be.
//!
//! The pool is set up as the operator's ScaledObject sets it up on Kubernetes 1.34, where an HPA cannot be given a
//! tolerance of its own.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use penstock_core::ids::{BackendId, Id};
use penstock_core::names;
use penstock_crds::backend::Scaling;
use penstock_scaler::hpa::{
    Behavior, DEFAULT_TOLERANCE, Hpa, Limit, Metric, Rules, Scale, Spec, Sync, Target,
};
use penstock_scaler::keda::{self, Keda, Look, ScaledObject};
use penstock_scaler::proto::external_scaler_client::ExternalScalerClient;
use penstock_scaler::proto::{GetMetricsRequest, ScaledObjectRef};
use penstock_scaler::world::World;
use penstock_shell::clock;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::fleet::Event;
use super::narrator::say;

/// How long one question may take; KEDA sets no limit of its own, the HPA's request has one of 30 s.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the scaler is and how often the HPA looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// The scaler's gRPC address.
    pub(super) scaler: SocketAddr,
    /// The HPA controller's sync period.
    pub(super) sync_period: Duration,
}

/// A pool as its ScaledObject would describe it.
pub(super) struct Scaled {
    pool: BackendId,
    reference: ScaledObjectRef,
    keda: Keda,
    hpa: Hpa,
}

/// The ScaledObject's name.
pub(super) fn scaled_object(pool: &BackendId) -> Id {
    Id::new(&pool.namespace, names::pool_object(&pool.name))
}

impl Scaled {
    /// The same metadata, bounds and behaviour that the operator would write.
    pub(super) fn new(pool: &BackendId, scaling: &Scaling) -> Self {
        let metadata = [
            ("backend", pool.name.clone()),
            (
                "kvCacheUtilizationPercent",
                scaling.kv_cache_utilization_percent.to_string(),
            ),
            ("ttftP90", scaling.ttft_p90.0.clone()),
            ("toleranceEffective", "10".to_owned()),
        ];
        let id = scaled_object(pool);
        let reference = ScaledObjectRef {
            name: id.name,
            namespace: id.namespace,
            scaler_metadata: metadata
                .map(|(key, value)| (key.to_owned(), value))
                .into_iter()
                .collect::<HashMap<_, _>>(),
        };
        let object = ScaledObject {
            min: scaling.min_replicas,
            max: scaling.max_replicas,
            ..ScaledObject::default()
        };
        let keda = Keda::new(object, clock::unix_ms());
        let (min, max) = keda.hpa_bounds();
        let window = scaling
            .scale_down_delay
            .parse()
            .unwrap_or_default()
            .as_secs();
        let default = Behavior::default();
        let down = Rules {
            window_s: u32::try_from(window).unwrap_or(u32::MAX),
            ..default.down
        };
        let behavior = Some(Behavior { down, ..default });
        let hpa = Hpa::new(Spec {
            min,
            max,
            behavior,
            tolerance: DEFAULT_TOLERANCE,
        });
        Self {
            pool: pool.clone(),
            reference,
            keda,
            hpa,
        }
    }
}

/// Asks and decides every sync period, until `stop`.
pub(super) async fn run(
    settings: Settings,
    mut scaled: Scaled,
    world: watch::Receiver<Arc<World>>,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) {
    let Ok(endpoint) = Endpoint::from_shared(format!("http://{}", settings.scaler)) else {
        return;
    };
    let mut client = ExternalScalerClient::new(endpoint.timeout(ASK_TIMEOUT).connect_lazy());
    let mut silent = false;
    loop {
        tokio::select! {
            () = tokio::time::sleep(settings.sync_period) => {}
            () = stop.cancelled() => return,
        }
        let Some(scale) = scale_of(&world.borrow(), &scaled.pool) else {
            continue;
        };
        let answer = ask(&mut client, &scaled.reference).await;
        if let Err(status) = &answer
            && !silent
        {
            say(&format!(
                "pool {}: the scaler gives no number, replicas stay: {}",
                scaled.pool,
                status.message()
            ));
        }
        silent = answer.is_err();
        let Some((replicas, why)) = decide(&mut scaled, scale, answer.ok(), clock::unix_ms())
        else {
            continue;
        };
        if events
            .send(Event::Scale {
                pool: scaled.pool.clone(),
                replicas,
                why,
            })
            .await
            .is_err()
        {
            return;
        }
    }
}

/// What the scaler said: activity, and a metric with its target in thousandths.
#[derive(Clone, Copy, Debug)]
struct Answer {
    active: bool,
    target: i64,
    value: i64,
}

/// One pass as KEDA makes it: the metric's spec, its value, activity.
async fn ask(
    client: &mut ExternalScalerClient<Channel>,
    reference: &ScaledObjectRef,
) -> Result<Answer, tonic::Status> {
    let missing = || tonic::Status::internal("the scaler named no metric");
    let specs = client
        .get_metric_spec(reference.clone())
        .await?
        .into_inner()
        .metric_specs;
    let spec = specs.into_iter().next().ok_or_else(missing)?;
    let request = GetMetricsRequest {
        scaled_object_ref: Some(reference.clone()),
        metric_name: spec.metric_name.clone(),
    };
    let values = client
        .get_metrics(request)
        .await?
        .into_inner()
        .metric_values;
    let value = values.into_iter().next().ok_or_else(missing)?;
    let active = client
        .is_active(reference.clone())
        .await?
        .into_inner()
        .result;
    let (target, value) = (
        keda::target_milli(spec.target_size_float, spec.target_size),
        keda::metric_milli(value.metric_value_float, value.metric_value),
    );
    Ok(Answer {
        active,
        target,
        value,
    })
}

/// The number to write and why, if it differs from the present one.
fn decide(
    scaled: &mut Scaled,
    scale: Scale,
    answer: Option<Answer>,
    now_ms: u64,
) -> Option<(u32, String)> {
    let look = Look {
        replicas: scale.spec_replicas,
        active: answer.is_some_and(|answer| answer.active),
        error: answer.is_none(),
    };
    if let Some(replicas) = scaled.keda.look(now_ms, look) {
        return Some((u32::try_from(replicas).ok()?, "KEDA: activation".to_owned()));
    }
    let metric = Metric {
        target: Target::AverageValue(answer.map_or(1000, |answer| answer.target)),
        value: answer.map(|answer| answer.value),
    };
    let Sync::Scale {
        replicas,
        wanted,
        limit,
    } = scaled.hpa.sync(now_ms, scale, &[metric])
    else {
        return None;
    };
    if replicas == scale.spec_replicas {
        return None;
    }
    let why = match limit {
        Limit::None => format!("the scaler asks for {wanted}"),
        Limit::ScaleUpRate | Limit::ScaleDownRate => {
            format!("the scaler asks for {wanted}; the HPA limits the step")
        }
        Limit::Max => format!("the scaler asks for {wanted}; maxReplicas"),
        Limit::Min => format!("the scaler asks for {wanted}; minReplicas"),
    };
    Some((u32::try_from(replicas).ok()?, why))
}

fn scale_of(world: &World, pool: &BackendId) -> Option<Scale> {
    let target = world.targets.get(&scaled_object(pool))?;
    let label = Some(&pool.name);
    let ready = world.pods.iter().filter(|pod| {
        pod.namespace == pool.namespace
            && pod.labels.get(names::BACKEND_LABEL) == label
            && pod.ready
            && !pod.terminating
    });
    Some(Scale {
        spec_replicas: i32::try_from(target.spec_replicas?).ok()?,
        status_replicas: i32::try_from(target.status_replicas?).ok()?,
        ready_pods: i32::try_from(ready.count()).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled() -> Scaled {
        let scaling = Scaling {
            min_replicas: 1,
            max_replicas: 4,
            kv_cache_utilization_percent: 75,
            ttft_p90: "500ms".into(),
            scale_down_delay: "30s".into(),
        };
        Scaled::new(&Id::new("default", "chat"), &scaling)
    }

    fn scale(replicas: i32) -> Scale {
        Scale {
            spec_replicas: replicas,
            status_replicas: replicas,
            ready_pods: replicas,
        }
    }

    fn wants(replicas: i64) -> Answer {
        Answer {
            active: true,
            target: 1000,
            value: replicas * 1000,
        }
    }

    #[test]
    fn wish_for_more_is_followed_at_once_and_for_less_after_the_delay() {
        let mut scaled = scaled();
        assert_eq!(
            decide(&mut scaled, scale(1), Some(wants(3)), 0).unwrap().0,
            3
        );
        assert!(decide(&mut scaled, scale(3), Some(wants(1)), 15_000).is_none());
        assert_eq!(
            decide(&mut scaled, scale(3), Some(wants(1)), 46_000)
                .unwrap()
                .0,
            1
        );
    }

    #[test]
    fn silence_of_the_scaler_changes_nothing() {
        let mut scaled = scaled();
        for second in 0..100 {
            assert!(decide(&mut scaled, scale(3), None, second * 15_000).is_none());
        }
    }

    #[test]
    fn maximum_holds() {
        assert_eq!(
            decide(&mut scaled(), scale(3), Some(wants(50)), 0)
                .unwrap()
                .0,
            4
        );
    }
}
