//! (IO) A gateway's sources in a cluster: its ConfigMap, its Secret, the EndpointSlices of its namespace; and its
//! acks, written back. It starts from what the last run left in its folders, so it serves without an API server;
//! a watch that is lost freezes what was seen and never empties it.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt as _};
use penstock_core::acks::Ack;
use penstock_core::config::{ConfigError, FORMAT, GatewayConfig};
use penstock_core::ids::Id;
use penstock_core::names::{CONFIG_KEY, gateway_acks, gateway_config_map, gateway_credentials};
use rand::RngExt as _;
use serde_json::json;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;

use super::state::StateDir;
use super::{Applied, Credential, Credentials, Publisher, slices};

/// Largest config after decompression. A ConfigMap holds 1 MiB; JSON of this kind shrinks at most about 30-fold.
const MAX_CONFIG_BYTES: u64 = 64 << 20;
/// Between two tries to reach the API server: short enough that a gateway is back within seconds of it.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(3);
/// Replicas that apply one config do not write their acks at one moment.
const ACK_JITTER: Duration = Duration::from_millis(200);
/// Endpoints are written to the state folder at most this often.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// What a gateway in a cluster is told.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// Its name and its pod's namespace.
    pub gateway: Id,
    /// Folder for the last good config and the last seen endpoints.
    pub state_dir: PathBuf,
    /// Folder for the last seen credentials.
    pub secret_dir: PathBuf,
    /// Its pod's UID, the key of its acks. Empty: no acks are written.
    pub pod_uid: String,
}

/// A config that cannot be served.
#[derive(Debug, thiserror::Error)]
enum DecodeError {
    #[error("the ConfigMap has no key {CONFIG_KEY}")]
    NoKey,
    #[error("decompress the config")]
    Decompress(#[source] std::io::Error),
    #[error("the config is larger than {MAX_CONFIG_BYTES} bytes")]
    TooLarge,
    #[error("read the config")]
    Read(#[source] ConfigError),
}

fn decode(raw: &[u8]) -> Result<GatewayConfig, DecodeError> {
    let mut json = Vec::new();
    zstd::Decoder::new(raw)
        .map_err(DecodeError::Decompress)?
        .take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut json)
        .map_err(DecodeError::Decompress)?;
    if u64::try_from(json.len()).unwrap_or(u64::MAX) > MAX_CONFIG_BYTES {
        return Err(DecodeError::TooLarge);
    }
    GatewayConfig::from_json(&json).map_err(DecodeError::Read)
}

/// Publishes until `shutdown`. Never fails: without an API server it publishes what the state folders hold and keeps
/// trying.
pub async fn run(
    client: Client,
    settings: ClusterSettings,
    publisher: Publisher,
    shutdown: CancellationToken,
) {
    let namespace = settings.gateway.namespace.clone();
    let name = settings.gateway.name.clone();
    let config_map = gateway_config_map(&name, FORMAT);
    let configs = watched::<ConfigMap>(
        Api::namespaced(client.clone(), &namespace),
        Some(config_map),
    );
    let secrets = watched::<Secret>(
        Api::namespaced(client.clone(), &namespace),
        Some(gateway_credentials(&name)),
    );
    let slices = watched::<EndpointSlice>(Api::namespaced(client.clone(), &namespace), None);
    let acks = acknowledge(
        Api::namespaced(client, &namespace),
        gateway_acks(&name),
        settings.pod_uid,
        publisher.applied.clone(),
    );
    let state = StateDir::new(settings.state_dir, settings.secret_dir);
    let mut seen = Seen::new(state, publisher);
    seen.restore();
    tokio::select! {
        () = seen.follow(configs, secrets, slices) => {}
        () = acks => {}
        () = shutdown.cancelled() => {}
    }
}

/// Waits longer after each failure in a row, up to [`RETRY_MAX`].
#[derive(Default)]
struct Retry {
    failures: u32,
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = RETRY_MIN
            .saturating_mul(2_u32.saturating_pow(self.failures))
            .min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        Some(wait.mul_f64(rand::rng().random_range(0.8..1.0)))
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

type Events<K> = BoxStream<'static, Event<K>>;

/// Events of one object, or of all; failures are logged once in a row and retried.
fn watched<K>(api: Api<K>, name: Option<String>) -> Events<K>
where
    K: kube::Resource<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let config = match &name {
        Some(name) => watcher::Config::default().fields(&format!("metadata.name={name}")),
        None => watcher::Config::default(),
    };
    let mut failing = false;
    let kind = K::kind(&()).into_owned();
    watcher(api, config)
        .backoff(Retry::default())
        .inspect(move |event| match event {
            Ok(Event::Init) => {}
            Ok(_) if failing => {
                failing = false;
                tracing::info!(kind, "watching again");
            }
            Err(err) if !failing => {
                failing = true;
                tracing::warn!(kind, error = %err, "watch is lost; what was seen stays in force");
            }
            Ok(_) | Err(_) => {}
        })
        .map_err(drop)
        .filter_map(|event| std::future::ready(event.ok()))
        .boxed()
}

/// What was seen so far.
struct Seen {
    state: StateDir,
    publisher: Publisher,
    /// The config's bytes as they came.
    raw: Vec<u8>,
    config: Option<Arc<GatewayConfig>>,
    slices: BTreeMap<String, EndpointSlice>,
    /// A list of slices that is not complete yet.
    listing: BTreeMap<String, EndpointSlice>,
    listed: bool,
    /// Published endpoints were not kept yet.
    unkept: bool,
}

impl Seen {
    fn new(state: StateDir, publisher: Publisher) -> Self {
        Self {
            state,
            publisher,
            raw: Vec::new(),
            config: None,
            slices: BTreeMap::new(),
            listing: BTreeMap::new(),
            listed: false,
            unkept: false,
        }
    }

    /// Publishes what the last run left.
    fn restore(&mut self) {
        if let Some(credentials) = self.state.credentials() {
            self.publisher
                .credentials
                .send_replace(Arc::new(credentials));
        }
        if let Some((endpoints, seen_at_ms)) = self.state.endpoints() {
            let age_ms = penstock_shell::clock::unix_ms().saturating_sub(seen_at_ms);
            tracing::info!(
                services = endpoints.services.len(),
                age_ms,
                "starting from the last seen endpoints"
            );
            self.publisher.endpoints.send_replace(Arc::new(endpoints));
        }
        if let Some(raw) = self.state.config() {
            match decode(&raw) {
                Ok(config) => {
                    tracing::info!("starting from the last good config");
                    self.raw = raw;
                    let config = Arc::new(config);
                    self.config = Some(Arc::clone(&config));
                    self.publisher.config.send_replace(Some(config));
                }
                Err(err) => {
                    tracing::warn!(error = %chain(&err), "the last good config cannot be read");
                }
            }
        }
    }

    async fn follow(
        &mut self,
        mut configs: Events<ConfigMap>,
        mut secrets: Events<Secret>,
        mut slices: Events<EndpointSlice>,
    ) {
        let mut keep = tokio::time::interval(KEEP_EVERY);
        loop {
            tokio::select! {
                Some(event) = configs.next() => match event {
                    Event::Apply(map) | Event::InitApply(map) => self.take_config(&map),
                    Event::Delete(_) => tracing::warn!("the config is gone; the last one stays in force"),
                    Event::Init | Event::InitDone => {}
                },
                Some(event) = secrets.next() => match event {
                    Event::Apply(secret) | Event::InitApply(secret) => self.take_credentials(&secret),
                    Event::Delete(_) => tracing::warn!("the credentials are gone; the last ones stay in use"),
                    Event::Init | Event::InitDone => {}
                },
                Some(event) = slices.next() => self.take_slices(event),
                _ = keep.tick(), if self.unkept => {
                    self.unkept = false;
                    let endpoints = Arc::clone(&self.publisher.endpoints.borrow());
                    self.state.keep_endpoints(&endpoints, penstock_shell::clock::unix_ms());
                }
                else => return,
            }
        }
    }

    fn take_config(&mut self, map: &ConfigMap) {
        let raw = map
            .binary_data
            .as_ref()
            .and_then(|data| data.get(CONFIG_KEY))
            .map(|value| value.0.as_slice());
        if raw.is_some_and(|raw| raw == self.raw) {
            return;
        }
        let config = match raw.ok_or(DecodeError::NoKey).and_then(decode) {
            Ok(config) => Arc::new(config),
            Err(err) => {
                tracing::error!(error = %chain(&err), "a config cannot be served; the last good one stays in force");
                return;
            }
        };
        self.raw = raw.unwrap_or_default().to_vec();
        self.state.keep_config(&self.raw);
        let before = self.config.replace(Arc::clone(&config));
        // Endpoints of both configs first: at no moment is one in force without its endpoints.
        self.publish_endpoints(before.as_deref());
        self.publisher.config.send_replace(Some(config));
        self.publish_endpoints(None);
    }

    fn take_credentials(&mut self, secret: &Secret) {
        let mut values = BTreeMap::new();
        for (id, value) in secret.data.iter().flatten() {
            match std::str::from_utf8(&value.0) {
                Ok(value) => {
                    values.insert(id.clone(), Credential::new(value));
                }
                Err(_) => {
                    tracing::warn!(credential = %id, "a credential is not text and is not used");
                }
            }
        }
        let credentials = Credentials { values };
        if **self.publisher.credentials.borrow() != credentials {
            self.state.keep_credentials(&credentials);
            self.publisher
                .credentials
                .send_replace(Arc::new(credentials));
        }
    }

    fn take_slices(&mut self, event: Event<EndpointSlice>) {
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(slice) => {
                self.listing.insert(slice.name_any(), slice);
                return;
            }
            Event::InitDone => {
                self.slices = std::mem::take(&mut self.listing);
                self.listed = true;
            }
            Event::Apply(slice) => {
                self.slices.insert(slice.name_any(), slice);
            }
            Event::Delete(slice) => {
                self.slices.remove(&slice.name_any());
            }
        }
        self.publish_endpoints(None);
    }

    /// Publishes the endpoints of the config, and of `besides`. Before the first complete list those of the last run
    /// stay.
    fn publish_endpoints(&mut self, besides: Option<&GatewayConfig>) {
        if !self.listed {
            return;
        }
        let endpoints = slices::endpoints(
            self.config.as_deref().into_iter().chain(besides),
            &self.slices,
        );
        let changed = self.publisher.endpoints.send_if_modified(|published| {
            let changed = **published != endpoints;
            if changed {
                *published = Arc::new(endpoints);
            }
            changed
        });
        self.unkept = self.unkept || changed;
    }
}

/// An error and its causes, for one log line.
fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text.push_str(": ");
        text.push_str(&err.to_string());
        cause = err.source();
    }
    text
}

/// Writes what the gateway serves into the acks, at start and on each change, until it is written.
async fn acknowledge(
    acks: Api<ConfigMap>,
    name: String,
    pod_uid: String,
    mut applied: channel::Receiver<Option<Applied>>,
) {
    if pod_uid.is_empty() {
        tracing::warn!("no pod UID: what this gateway serves is not acknowledged");
        return std::future::pending().await;
    }
    let process_start = penstock_shell::clock::since_epoch().as_secs();
    loop {
        let Some(Applied {
            digest,
            rejected,
            limits,
        }) = applied.borrow_and_update().clone()
        else {
            if applied.changed().await.is_err() {
                return std::future::pending().await;
            }
            continue;
        };
        let ack = Ack {
            digest,
            process_start,
            rejected,
            limits,
        };
        let jitter = ACK_JITTER.mul_f64(rand::rng().random_range(0.0..1.0));
        tokio::time::sleep(jitter).await;
        let mut retry = Retry::default();
        while let Err(err) = write_ack(&acks, &name, &pod_uid, &ack).await {
            tracing::debug!(error = %err, "the ack could not be written yet");
            tokio::time::sleep(retry.next().unwrap_or(RETRY_MAX)).await;
            if applied.has_changed().unwrap_or(false) {
                break;
            }
        }
        if !applied.has_changed().unwrap_or(false) && applied.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

async fn write_ack(
    acks: &Api<ConfigMap>,
    name: &str,
    pod_uid: &str,
    ack: &Ack,
) -> Result<(), kube::Error> {
    let text = serde_json::to_string(ack).map_err(kube::Error::SerdeError)?;
    let patch = json!({"data": {pod_uid: text}});
    acks.patch_metadata(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::config;

    #[test]
    fn a_config_that_decompresses_without_end_is_refused() {
        let bomb = zstd::encode_all(std::io::repeat(b' ').take(MAX_CONFIG_BYTES + 10), 3).unwrap();
        assert!(bomb.len() < 100_000);
        assert!(matches!(decode(&bomb), Err(DecodeError::TooLarge)));
    }

    #[test]
    fn what_the_operator_writes_is_read() {
        let config = config(&["a"], Vec::new());
        let raw = zstd::encode_all(config.to_json().unwrap().as_slice(), 3).unwrap();
        assert_eq!(decode(&raw).unwrap(), config);
        assert!(matches!(
            decode(b"not zstd"),
            Err(DecodeError::Decompress(_))
        ));
    }

    #[test]
    fn retries_stay_within_seconds() {
        let mut retry = Retry::default();
        let waits: Vec<Duration> = retry.by_ref().take(50).collect();
        assert!(waits.iter().all(|wait| *wait <= RETRY_MAX));
        retry.reset();
        assert!(retry.next().unwrap() <= RETRY_MIN);
    }
}
