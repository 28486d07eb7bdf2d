//! What the scaler knows about its surroundings: pods, gateways, and what each ScaledObject scales.
//!
//! In a cluster `collect::kubernetes` makes it; the embedded form fills it by hand. Plain data.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use penstock_core::ids::Id;

/// One consistent picture. The receiver always reads the newest.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Whether every source was listed once. Until then the process is not ready and an absent target means nothing.
    pub synced: bool,
    /// Pods that may belong to a target.
    pub pods: Vec<Arc<Pod>>,
    /// Gateway replicas that serve `GET /load`.
    pub gateways: Vec<Gateway>,
    /// By ScaledObject.
    pub targets: BTreeMap<Id, Target>,
}

/// A pod, as far as the scaler needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name, unique in the namespace.
    pub name: String,
    /// Labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// Its address; none until it has one.
    pub ip: Option<IpAddr>,
    /// Where `/metrics` is served, if not on `ip` and the target's port.
    pub metrics: Option<SocketAddr>,
    /// Whether it takes requests.
    pub ready: bool,
    /// Whether it is being deleted.
    pub terminating: bool,
    /// When it was created, Unix ms.
    pub created_ms: u64,
}

impl Pod {
    /// Namespace and name.
    pub fn id(&self) -> Id {
        Id::new(&self.namespace, &self.name)
    }
}

/// A gateway replica.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gateway {
    /// Namespace; its load counts for the backends of the same one, and for others once it names them.
    pub namespace: String,
    /// Unique name: `namespace/pod`, or any text without a cluster.
    pub id: String,
    /// Its admin port, which serves `GET /load`.
    pub admin: SocketAddr,
}

/// What a ScaledObject scales, and between which bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// For people: `Deployment/chat`.
    pub scale_target: String,
    /// The ScaledObject's `minReplicaCount`; KEDA's default is 0.
    pub min: u32,
    /// The ScaledObject's `maxReplicaCount`; KEDA's default is 100.
    pub max: u32,
    /// `.spec.replicas` of the target; none until read.
    pub spec_replicas: Option<u32>,
    /// `.status.replicas` of the target; none until read. The HPA compares with this number.
    pub status_replicas: Option<u32>,
    /// Label selector of the target's pods, as `/scale` reports it.
    pub selector: Option<String>,
    /// The HPA's tolerance on both sides, percent; none if unknown. Metadata `toleranceEffective` wins.
    pub tolerance_percent: Option<u32>,
}
