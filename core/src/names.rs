//! Names that several processes must spell alike: metrics, labels, annotations, headers, ports.

/// API group of the kinds.
pub const GROUP: &str = "penstock.dev";
/// Label on every child of a gateway: the gateway's name.
pub const GATEWAY_LABEL: &str = "penstock.dev/gateway";
/// Label on every child of a pool: the LLMBackend's name.
pub const BACKEND_LABEL: &str = "penstock.dev/backend";
/// Label on gateway pods: the config formats that they read, joined by `.`.
pub const CONFIG_FORMATS_LABEL: &str = "penstock.dev/config-formats";
/// Annotation on a gateway's ConfigMap: the config's digest.
pub const DIGEST_ANNOTATION: &str = "penstock.dev/config-digest";
/// Key in the ConfigMap's `binaryData`: zstd of the canonical JSON.
pub const CONFIG_KEY: &str = "config.json.zst";

/// `x-penstock-cache: hit | miss | bypass`.
pub const CACHE_HEADER: &str = "x-penstock-cache";
/// `x-penstock-backend: namespace/name` of the backend that answered.
pub const BACKEND_HEADER: &str = "x-penstock-backend";
/// `x-penstock-key`: a caller's key, where `Authorization` and the like are for a backend. Never goes upstream.
pub const KEY_HEADER: &str = "x-penstock-key";
/// Sent by a caller who wants [`ATTEMPTS_HEADER`] and [`DECISION_HEADER`] on the answer; any value.
pub const EXPLAIN_HEADER: &str = "x-penstock-explain";
/// `x-penstock-attempts`: how often the request was sent, hedges included.
pub const ATTEMPTS_HEADER: &str = "x-penstock-attempts";
/// `x-penstock-decision`: strategy, priority and what was tried before, in words.
pub const DECISION_HEADER: &str = "x-penstock-decision";
/// `x-penstock-reason`: why the gateway itself refused a request, one of a closed list.
pub const REASON_HEADER: &str = "x-penstock-reason";
/// `x-penstock-engine: simulated` on everything that the stand-in engine answers.
pub const ENGINE_HEADER: &str = "x-penstock-engine";
/// `x-request-id`, made if the caller sent none, on every answer and in the access log.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// Paths of calls of models.
pub const CALL_PATHS: [&str; 14] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
];
/// Below these each path is one of a call of a model, unless a rule for HTTP backends takes it.
pub const OPEN_CALL_PATHS: [&str; 2] = ["/v1/audio/", "/v1/images/"];

/// Paths that gateways answer themselves, besides those below them.
pub const OWN_PATHS: [&str; 3] = ["/v1/models", "/v1/files", "/v1/batches"];

/// Port of the gateway's data plane.
pub const GATEWAY_PORT: u16 = 8080;
/// Port of the gateway's data plane with TLS.
pub const GATEWAY_TLS_PORT: u16 = 8443;
/// Port of `/healthz`, `/readyz`, `/metrics` and each process's own admin paths.
pub const ADMIN_PORT: u16 = 9090;
/// Port of the scaler's gRPC service.
pub const SCALER_PORT: u16 = 6000;
/// Port of an engine, vLLM's default.
pub const ENGINE_PORT: u16 = 8000;

/// The name of a gateway's Deployment, Service, ServiceAccount and Role.
pub fn gateway_object(gateway: &str) -> String {
    format!("{gateway}-gateway")
}

/// The name of the ConfigMap that holds a gateway's config in one format.
pub fn gateway_config_map(gateway: &str, format: u32) -> String {
    format!("{gateway}-config-f{format}")
}

/// The name of the ConfigMap into which a gateway's replicas write their acks.
pub fn gateway_acks(gateway: &str) -> String {
    format!("{gateway}-acks")
}

/// The name of the Secret with the credentials that a gateway's config refers to.
pub fn gateway_credentials(gateway: &str) -> String {
    format!("{gateway}-credentials")
}

/// The name of the Secret with what a gateway hashes keys with.
pub fn gateway_pepper(gateway: &str) -> String {
    format!("{gateway}-pepper")
}

/// The key of the value in [`gateway_pepper`].
pub const PEPPER_KEY: &str = "pepper";

/// The name of the Secret with what those show who manage the keys in a gateway's store.
pub fn gateway_admin(gateway: &str) -> String {
    format!("{gateway}-admin")
}

/// The key of the value in [`gateway_admin`].
pub const ADMIN_KEY: &str = "token";

/// The name of the Secret with a VirtualKey's key, where the object names none.
pub fn key_secret(virtual_key: &str) -> String {
    format!("{virtual_key}-key")
}

/// The key of the key in its Secret.
pub const SECRET_KEY: &str = "key";
/// The key of the one before it, while that may still be used.
pub const SECRET_PREVIOUS: &str = "previous";
/// The key of the number of its rotation, which only keys have that the operator made.
pub const SECRET_REVISION: &str = "revision";
/// The key of the time until which the one before it may be used, in Unix seconds.
pub const SECRET_PREVIOUS_UNTIL: &str = "previous-until";

/// The name of a pool's Deployment, Service, PodDisruptionBudget and ScaledObject.
pub fn pool_object(backend: &str) -> String {
    format!("{backend}-pool")
}

/// Key of one credential in a gateway's `<gateway>-credentials` Secret. Secret names have no underscore, so the two
/// parts cannot run together.
pub fn credential_id(secret: &str, key: &str) -> String {
    format!("{secret}_{key}")
}

/// Key of one value of a ConfigMap in a gateway's `<gateway>-credentials` Secret. No Secret has an empty name, so it is
/// no [`credential_id`].
pub fn config_map_value_id(config_map: &str, key: &str) -> String {
    format!("_{config_map}_{key}")
}
