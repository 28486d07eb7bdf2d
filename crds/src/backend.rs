//! `LLMBackend`: something that answers. A pool of engines that Penstock runs, a Service that is there already, or a
//! provider outside the cluster.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::profile::{CapabilitiesSpec, HealthCheckSpec, PriceSpec};
use crate::text::{DurationText, QuantityText};
use crate::tls::{AppProtocol, BackendTlsSpec};

/// Exactly one of `pool`, `service` and `external`.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "penstock.dev",
    version = "v1alpha1",
    kind = "LLMBackend",
    plural = "llmbackends",
    shortname = "llmb",
    category = "penstock",
    namespaced,
    status = "LLMBackendStatus",
    derive = "PartialEq",
    doc = "Something that answers requests: a pool of vLLM engines that Penstock runs, a Service that is there already, or a provider outside the cluster.",
    printcolumn = r#"{"name":"Model","type":"string","jsonPath":".spec.pool.model"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[x_kube(validation = (
    "[has(self.pool), has(self.service), has(self.external)].filter(x, x).size() == 1",
    "set exactly one of pool, service and external"
))]
#[serde(rename_all = "camelCase")]
pub struct LLMBackendSpec {
    /// Engines that Penstock runs and scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
    /// An engine that is in the cluster already, behind a Service of the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceTarget>,
    /// A provider outside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
    /// What it can take. Requests that need what it lacks go to other candidates of their rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<CapabilitiesSpec>,
    /// How long an endpoint that becomes ready gets less than its share: a tenth at first, then more in proportion to
    /// time. Not with one endpoint, and not when all have just come. At most `1h`. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_start: Option<DurationText>,
    /// Asks endpoints whether they are well. Default: none; what requests meet tells enough where there are some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheckSpec>,
    /// Where it is, such as `eu-west-1`, for the strategy `Region`. Default: where the gateway is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub region: Option<String>,
    /// What it costs: for the strategies `Cost` and `CostLatency`, and for the metric of what was spent. Default:
    /// nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<PriceSpec>,
}

/// Engines that Penstock runs: a Deployment, a Service, a PodDisruptionBudget and, with `scaling`, a ScaledObject.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = (
    "!(has(self.replicas) && has(self.scaling))",
    "set replicas or scaling, not both: with scaling, the autoscaler owns the number of replicas"
))]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// What the engine loads, as it takes it: `hf://org/name`, a bare `org/name`, or a path in the image.
    #[schemars(length(min = 1, max = 512))]
    pub model: String,
    /// Which engine runs. `Simulated` is Penstock's stand-in: vLLM's API and metrics, no model, no GPU.
    #[serde(default)]
    pub engine: Engine,
    /// The engine's container image. Default: the operator's image for the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Arguments that are added to the engine's command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 1024)))]
    pub args: Vec<String>,
    /// Environment variables of the engine.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Devices that each replica gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// CPU and memory of each replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// A fixed number of replicas. Default 1, when there is no `scaling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub replicas: Option<i32>,
    /// Lets KEDA choose the number of replicas by what users feel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<Scaling>,
    /// How long a replica that is stopping may finish its streams; `0s` cuts them. At most `24h`. Default `10m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DurationText>,
}

/// Which program answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Engine {
    /// vLLM (<https://docs.vllm.ai>).
    #[default]
    #[serde(rename = "vLLM")]
    Vllm,
    /// Penstock's stand-in, for tests and trials.
    Simulated,
}

/// A device resource of the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Accelerator {
    /// The extended resource's name, such as `nvidia.com/gpu`.
    #[schemars(length(min = 1, max = 253))]
    pub resource: String,
    /// How many each replica gets; for vLLM also its tensor-parallel size.
    #[schemars(range(min = 1, max = 64))]
    pub count: i32,
}

/// Kubernetes quantities by resource name, as in a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler reserves.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, QuantityText>,
    /// What the container may use at most.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, QuantityText>,
}

/// When replicas are added and taken away.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = (
    "self.minReplicas <= self.maxReplicas",
    "minReplicas must not be above maxReplicas"
))]
#[x_kube(validation = ("self.ttftP90 != '0s'", "ttftP90 must be above 0s, such as 500ms"))]
#[serde(rename_all = "camelCase")]
pub struct Scaling {
    /// Never fewer replicas than this.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 10_000))]
    pub min_replicas: i32,
    /// Never more replicas than this.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_replicas: i32,
    /// KV-cache use, in percent of a replica's blocks, that the pool should stay below. Default 75.
    #[serde(default = "seventy_five")]
    #[schemars(range(min = 1, max = 100))]
    pub kv_cache_utilization_percent: i32,
    /// Nine in ten requests should see their first token within this. Default `500ms`.
    #[serde(default = "half_a_second")]
    pub ttft_p90: DurationText,
    /// For how long fewer replicas must be enough before one is taken away (the HPA's scale-down stabilization window,
    /// at most `1h`). Default `5m`.
    #[serde(default = "five_minutes")]
    pub scale_down_delay: DurationText,
}

fn one() -> i32 {
    1
}

fn seventy_five() -> i32 {
    75
}

fn half_a_second() -> DurationText {
    "500ms".into()
}

fn five_minutes() -> DurationText {
    "5m".into()
}

/// A Service of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceTarget {
    /// The Service's name. Its pods are balanced one by one, through its EndpointSlices.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// The Service's port.
    #[schemars(range(min = 1, max = 65_535))]
    pub port: i32,
    /// What it speaks. Default `OpenAI`.
    #[serde(default)]
    pub protocol: ProtocolSpec,
    /// The model's name at this backend. Default: the name that the caller asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub model: Option<String>,
    /// API key, sent as `Authorization: Bearer`, or as `x-api-key` where the protocol is `Anthropic`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<SecretKey>,
    /// What becomes of the caller's own `Authorization`, `Cookie` and API keys; only where the protocol is `HTTP`.
    /// Default `Drop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller_credentials: Option<CallerCredentialsSpec>,
    /// What its pods speak in the clear. Over TLS, HTTP/2 is spoken if they offer it. Default `http`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<AppProtocol>,
    /// Its pods speak TLS, and this is whom to believe; `{}` will do for a public certificate. Default: they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<BackendTlsSpec>,
}

/// What becomes of a caller's own credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CallerCredentialsSpec {
    /// They never go upstream.
    Drop,
    /// They go upstream as they came, and cookies come back: for a service that looks at them itself.
    Pass,
}

/// What a backend speaks. Callers of models may speak either of the first two: docs/protocols.md says what is
/// translated, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProtocolSpec {
    /// OpenAI's API, as vLLM, SGLang and most providers have it.
    #[default]
    OpenAI,
    /// Anthropic's Messages API.
    Anthropic,
    /// Any HTTP: an agent or a tool. Requests pass as they are, by rules that match paths and no models.
    HTTP,
}

/// What a provider speaks. Callers speak OpenAI's API or Anthropic's: docs/protocols.md says what is translated, and
/// how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProviderProtocol {
    /// OpenAI's API, as most providers have it.
    #[default]
    OpenAI,
    /// Anthropic's Messages API.
    Anthropic,
    /// OpenAI's API as Azure has it. `model` is the deployment's name.
    AzureOpenAI,
    /// Google's Gemini API.
    Gemini,
    /// AWS Bedrock's Converse API.
    Bedrock,
}

/// A provider's API.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = (
    "!has(self.apiVersion) || self.protocol == 'AzureOpenAI'",
    "only protocol AzureOpenAI has an apiVersion"
))]
#[x_kube(validation = (
    "has(self.region) == (self.protocol == 'Bedrock')",
    "protocol Bedrock needs a region, and no other has one"
))]
#[x_kube(validation = (
    "!has(self.tls) || self.url.startsWith('https://')",
    "TLS is spoken with https:// URLs only"
))]
#[serde(rename_all = "camelCase")]
pub struct External {
    /// Base URL with its version, such as `https://api.example.com/v1`; for `AzureOpenAI` the resource's, such as
    /// `https://name.openai.azure.com`.
    #[schemars(
        length(min = 8, max = 2048),
        regex(pattern = "^https?://[^/?#@\\s]+(/[^?#\\s]*)?$")
    )]
    pub url: String,
    /// What it speaks. Default `OpenAI`.
    #[serde(default)]
    pub protocol: ProviderProtocol,
    /// The `api-version` that is asked of Azure, such as `2024-10-21`. Default: none, and the paths of Azure's v1 API,
    /// which needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[A-Za-z0-9.-]+$"))]
    pub api_version: Option<String>,
    /// The AWS region of Bedrock, such as `eu-central-1`: requests are signed for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = "^[a-z0-9-]+$"))]
    pub region: Option<String>,
    /// The model's name at this provider. Default: the name that the caller asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub model: Option<String>,
    /// API key, sent as the protocol wants it: as `Authorization: Bearer` (`OpenAI`), `x-api-key` (`Anthropic`),
    /// `api-key` (`AzureOpenAI`) or `x-goog-api-key` (`Gemini`). For `Bedrock` the text of AWS's own `credentials`
    /// file, whose first profile signs, or an API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<SecretKey>,
    /// Whom to believe and whom to be, for `https` URLs. Default: a certificate for the URL's host by a public
    /// authority or one of the gateway's `--upstream-ca`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<BackendTlsSpec>,
}

/// One key of a Secret in the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub secret: String,
    /// The key in its `data`.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LLMBackendStatus {
    /// `Accepted`, `ResolvedRefs`, `Programmed`, `Ready`, for pools with `scaling` also `ScalingActive`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
