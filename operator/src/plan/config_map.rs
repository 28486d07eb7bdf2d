//! The ConfigMaps of a gateway: its config, compressed, and the empty one that its replicas write their acks into.

use k8s_openapi::ByteString;
use penstock_core::config::{ConfigError, GatewayConfig};
use penstock_core::names;
use serde_json::{Map, Value, json};

use super::{Child, Draft};
use crate::live::Live;

/// Largest compressed config. The API server takes 1 MiB of data in a ConfigMap; etcd takes 1.5 MiB of everything
/// (base64 included).
pub(crate) const MAX_CONFIG_BYTES: usize = 900 * 1024;
/// zstd's default level: a config of 1 MB takes milliseconds.
const ZSTD_LEVEL: i32 = 3;
/// Largest config that is unpacked from a live ConfigMap; a bound against zip bombs, far above what can be published.
const MAX_UNPACKED_BYTES: usize = 64 * 1024 * 1024;

/// A config that cannot be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    /// See [`ConfigError`].
    #[error("convert gateway config")]
    Config(#[source] ConfigError),
    /// zstd refused.
    #[error("compress or expand gateway config")]
    Zstd(#[source] std::io::Error),
    /// The ConfigMap has no config under the expected key.
    #[error("ConfigMap holds no config")]
    Absent,
}

/// The config as it goes into `binaryData`.
pub(crate) fn pack(config: &GatewayConfig) -> Result<Vec<u8>, PackError> {
    let json = config.to_json().map_err(PackError::Config)?;
    zstd::bulk::compress(&json, ZSTD_LEVEL).map_err(PackError::Zstd)
}

/// The config that a live ConfigMap holds.
pub(crate) fn unpack(live: &Live) -> Result<GatewayConfig, PackError> {
    let text = live
        .object
        .get("binaryData")
        .and_then(|data| data.get(names::CONFIG_KEY))
        .ok_or(PackError::Absent)?;
    let ByteString(packed) = serde_json::from_value(text.clone()).map_err(|_| PackError::Absent)?;
    let json = zstd::bulk::decompress(&packed, MAX_UNPACKED_BYTES).map_err(PackError::Zstd)?;
    GatewayConfig::from_json(&json).map_err(PackError::Config)
}

/// The ConfigMap that gateways read.
pub(super) fn config(draft: Draft<'_>, packed: Vec<u8>, digest: &str) -> Child {
    let mut annotations = Map::new();
    annotations.insert(names::DIGEST_ANNOTATION.to_owned(), json!(digest));
    let data = serde_json::to_value(ByteString(packed)).unwrap_or(Value::Null);
    draft.finish(
        annotations,
        json!({ "binaryData": { names::CONFIG_KEY: data } }),
    )
}

/// The ConfigMap that gateways write. Its `data` is theirs alone.
pub(super) fn acks(draft: Draft<'_>) -> Child {
    draft.finish(Map::new(), json!({}))
}
