//! `GatewayConfig`: the one artefact between Kubernetes objects and the data plane.
//!
//! Made only by `penstock_crds::compile`, from objects; read only by gateways. References are resolved, defaults are
//! filled, units are typed. It never holds a secret value or the address of a pod.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::endpoints::ServicePort;
use crate::ids::{BackendId, Id};
use crate::key::hexadecimal;

mod budgets;
mod callers;
mod identity;
mod parameters;
mod profile;
mod prompts;
mod retry;
mod tasks;
mod transport;

pub use budgets::{Budget, Enforcement, Limit, Per, Period, Selects, Unit, Window};
pub use callers::{Callers, Key};
pub use identity::{Access, Algorithm, Claim, IdentityProvider, Jwt, KeySource, Proof, Team};
pub use parameters::{Bounds, OnExceed, Parameters};
pub use profile::{Capabilities, HealthCheck, Price, Profile};
pub use prompts::{Part, Prompt, PromptMessage, PromptRef, Role, template};
pub use retry::{FailureClass, Repeat, Retry, usual_failures};
pub use tasks::{Task, Tasks};
pub use transport::{BackendTls, ClientCertificate, Transport};

/// The format that this build writes and reads. A gateway refuses a newer one and keeps its last good config.
pub const FORMAT: u32 = 1;

/// Everything one gateway needs to route: deterministic for the same objects, whatever order they came in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GatewayConfig {
    /// [`FORMAT`] of the writer.
    pub format: u32,
    /// The gateway that this config is for.
    pub gateway: Id,
    /// Which generation of which object is in here: `kind/namespace/name` → version.
    pub objects: BTreeMap<String, ObjectVersion>,
    /// What can answer.
    pub backends: BTreeMap<BackendId, Backend>,
    /// Caches that rules refer to.
    pub caches: BTreeMap<Id, Cache>,
    /// Prompts of the policies that keep some, by name and version.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub prompts: BTreeMap<Id, Vec<Prompt>>,
    /// The tasks of the policies that tell some apart.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub tasks: BTreeMap<Id, Tasks>,
    /// Who may call; `None`: anybody.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub callers: Option<Callers>,
    /// How much callers may take, by TokenBudget.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub budgets: BTreeMap<Id, Budget>,
    /// In match order: the first rule that matches a request decides.
    pub rules: Vec<Rule>,
}

/// One object's state inside a config.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectVersion {
    /// `metadata.generation` of the object that was compiled; 0 where objects come from files.
    pub generation: i64,
    /// SHA-256 of the object's compiled fragment, hexadecimal. Equal hashes mean equal behaviour.
    pub hash: String,
}

/// Something that answers requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Backend {
    /// Where it is.
    pub target: Target,
    /// What it speaks.
    #[serde(skip_serializing_if = "is_default", default)]
    pub protocol: Protocol,
    /// The model's name at the backend, sent in the request body. `None` sends the caller's name unchanged.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model: Option<String>,
    /// The version of Azure's API. `None`: the form that needs none (`/openai/v1`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub api_version: Option<String>,
    /// The AWS region for which requests to Bedrock are signed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub region: Option<String>,
    /// Sent as the protocol wants it: `Authorization: Bearer …`, `x-api-key`, `api-key`, `x-goog-api-key`. The caller's
    /// own never goes upstream.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub credential: Option<CredentialRef>,
    /// What it is like.
    #[serde(skip_serializing_if = "is_default", default)]
    pub profile: Profile,
    /// What becomes of the caller's own credentials; [`Protocol::Http`] only.
    #[serde(skip_serializing_if = "is_default", default)]
    pub caller_credentials: CallerCredentials,
    /// How it is connected to.
    #[serde(skip_serializing_if = "is_default", default)]
    pub transport: Transport,
}

/// What becomes of a caller's own credentials: `Authorization`, `Cookie`, API keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallerCredentials {
    /// They never go upstream.
    #[default]
    Dropped,
    /// They go upstream, and cookies come back.
    Passed,
}

/// What a backend speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// OpenAI's API, as vLLM, SGLang and most providers have it.
    #[default]
    #[serde(rename = "OpenAI")]
    OpenAi,
    /// Anthropic's Messages API.
    Anthropic,
    /// OpenAI's API as Azure has it: deployments stand in the path.
    #[serde(rename = "AzureOpenAI")]
    AzureOpenAi,
    /// Google's Gemini API.
    Gemini,
    /// AWS Bedrock's Converse API.
    Bedrock,
    /// Any HTTP: an agent or a tool. Requests pass as they are; they name no model.
    #[serde(rename = "HTTP")]
    Http,
}

/// Where a backend is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Target {
    /// Pods behind a Kubernetes Service (a pool or a `service` backend), balanced one by one.
    #[serde(rename_all = "camelCase")]
    Endpoints {
        /// The Service's port.
        service_port: ServicePort,
        /// The port's name in the Service, which is how EndpointSlices know it. `None`: unnamed, or not looked up;
        /// then a slice with exactly one port is used.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        port_name: Option<String>,
        /// There may be no pods for want of requests, and some when a request waits: not so for pools.
        #[serde(skip_serializing_if = "is_default", default)]
        may_sleep: bool,
    },
    /// An absolute base URL such as `https://api.example.com/v1`, without a trailing slash.
    Url(String),
}

/// Names one value of a Secret or ConfigMap without holding it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialRef {
    /// Key in the gateway's `<gateway>-credentials` Secret, see [`crate::names::credential_id`] and
    /// [`crate::names::config_map_value_id`].
    pub id: String,
    /// First 16 hexadecimal digits of the value's SHA-256; empty when the value was not known to the compiler.
    pub version: String,
}

/// An exact response cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Cache {
    /// How long an answer may be served again, in ms.
    pub ttl_ms: u64,
    /// Upper bound of stored bytes in each gateway replica.
    pub max_bytes: u64,
}

/// One routing rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    /// The policy it comes from.
    pub policy: Id,
    /// Its name in the policy.
    pub name: String,
    /// Any of these model names selects the rule. Without one it is a rule for backends of [`Protocol::Http`], selected
    /// by its conditions alone, and never by a call of a model.
    pub models: Vec<NameMatch>,
    /// What else must hold of a request, all of it.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub conditions: Vec<Condition>,
    /// It takes requests of unknown callers too, where the gateway knows some ([`GatewayConfig::callers`]).
    #[serde(skip_serializing_if = "is_default", default)]
    pub anonymous: bool,
    /// Candidates. Lower `priority` first; within one priority by `strategy` and `weight`.
    pub backends: Vec<RuleBackend>,
    /// How to choose among candidates of one priority, and among the endpoints of one backend.
    pub strategy: Strategy,
    /// What [`Strategy::Hash`] and [`Strategy::Sticky`] keep together; `None` is the conversation that the body names,
    /// or else the user.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hash_on: Option<HashOn>,
    /// How much sooner another region must answer to be chosen by [`Strategy::Region`], in ms.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub region_penalty_ms: Option<u64>,
    /// What the rule's callers are to see.
    #[serde(skip_serializing_if = "is_default", default)]
    pub slo: Slo,
    /// When to try again elsewhere. After the first byte of an answer only by [`Retry::rescue_streams`].
    pub retry: Retry,
    /// A second attempt beside one whose first token is slow to come.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hedge: Option<Hedge>,
    /// Requests go to several backends at once.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fan_out: Option<FanOut>,
    /// Limits of waiting.
    pub timeouts: Timeouts,
    /// What callers may ask of a model.
    #[serde(skip_serializing_if = "is_default", default)]
    pub parameters: Parameters,
    /// How often streams on which nothing goes out get a comment, in ms.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub heartbeat_ms: Option<u64>,
    /// Comes before the system prompts of callers: one of the policy's in [`GatewayConfig::prompts`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub prompt: Option<PromptRef>,
    /// What becomes of parts of a request that a backend's protocol cannot carry.
    #[serde(skip_serializing_if = "is_default", default)]
    pub on_unsupported: OnUnsupported,
    /// What becomes of event streams.
    #[serde(skip_serializing_if = "is_default", default)]
    pub streaming: Streaming,
    /// How long an event stream goes on without its caller, and is kept for the caller to come back, in ms.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub resumable_ms: Option<u64>,
    /// Small calls for embeddings that come together are made as one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub join_embeddings: Option<JoinEmbeddings>,
    /// Who goes first while backends have more to do than they answer in time.
    #[serde(skip_serializing_if = "is_default", default)]
    pub urgency: Urgency,
    /// A cache in [`GatewayConfig::caches`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cache: Option<Id>,
}

/// Small calls for embeddings that come together are made as one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct JoinEmbeddings {
    /// How long the first of them waits for others, in ms.
    pub within_ms: u64,
    /// Inputs of one joined call, 2..=2048.
    pub max_inputs: u32,
}

/// Who goes first while backends have more to do than they answer in time. Ordered: the most urgent is the greatest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Urgency {
    /// After all others.
    Low,
    /// In between.
    #[default]
    Normal,
    /// Before all others.
    High,
}

/// One thing that must hold of a request. Equal conditions take the same requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Condition {
    /// The path is one of these.
    Paths(Vec<NameMatch>),
    /// The method is one of these.
    Methods(BTreeSet<String>),
    /// A header of this name, in lower case, has a value like this.
    Header(String, NameMatch),
    /// The prompt has about this many tokens.
    #[serde(rename_all = "camelCase")]
    PromptTokens {
        /// At least.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        min: Option<u32>,
        /// At most.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        max: Option<u32>,
    },
    /// Prompt and answer take about this many tokens of a context.
    #[serde(rename_all = "camelCase")]
    ContextTokens {
        /// At least.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        min: Option<u32>,
        /// At most.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        max: Option<u32>,
    },
    /// The request needs all of these.
    Needs(BTreeSet<Need>),
    /// An event stream is asked for, or is not.
    Stream(bool),
    /// The region that it came from is one like this.
    Region(NameMatch),
    /// The caller is of a team like this.
    Team(NameMatch),
    /// The caller is a user like this.
    User(NameMatch),
    /// The caller's key has an attribute of this name with a value like this.
    Attribute(String, NameMatch),
    /// The last message of the user matches this regular expression.
    Text(String),
    /// It is about this one of a policy's tasks.
    Task(Id, String),
}

/// What a request needs of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Need {
    /// It holds a picture.
    Vision,
    /// It holds sound.
    Audio,
    /// It offers tools.
    Tools,
    /// It asks for an answer that keeps to a JSON schema.
    JsonSchema,
}

/// How a name selects a rule: a model's, a path, a header's value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum NameMatch {
    /// The whole name.
    Exact(String),
    /// The beginning of the name; written `gpt-*` in a policy. The empty prefix (`*`) matches any name.
    Prefix(String),
}

impl NameMatch {
    /// A name, or a beginning followed by one star; `None` for other stars.
    pub fn read(text: &str) -> Option<Self> {
        match text.strip_suffix('*') {
            Some(prefix) if !prefix.contains('*') => Some(Self::Prefix(prefix.to_owned())),
            None if !text.contains('*') && !text.is_empty() => Some(Self::Exact(text.to_owned())),
            _ => None,
        }
    }

    /// Whether `model` is selected.
    pub fn matches(&self, model: &str) -> bool {
        match self {
            Self::Exact(name) => model == name,
            Self::Prefix(prefix) => model.starts_with(prefix.as_str()),
        }
    }
}

/// A backend as one rule uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RuleBackend {
    /// A key of [`GatewayConfig::backends`].
    pub backend: BackendId,
    /// Share of requests relative to the others of the same priority, 1..=1000.
    pub weight: u32,
    /// 0 is tried first.
    pub priority: u32,
    /// Replaces [`Backend::model`] for this rule.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub model_override: Option<String>,
    /// If there are some: asked only after one of these failures, which count besides [`Retry::on`].
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub after: BTreeSet<FailureClass>,
}

/// What requests have in common that are kept together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HashOn {
    /// A header, in lower case.
    Header(String),
    /// The conversation that the body names.
    Conversation,
    /// The user that the body names, else the caller's.
    User,
    /// The caller's team.
    Team,
}

/// How one candidate is chosen among equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Strategy {
    /// Smooth weighted round robin (as in nginx: proportional and evenly spread).
    RoundRobin,
    /// The fewest requests in flight per weight; round robin breaks ties.
    LeastRequests,
    /// Of two endpoints drawn by weight the one with fewer requests in flight.
    PowerOfTwo,
    /// Of two endpoints drawn by weight the one that is expected to begin its answer sooner.
    PeakEwma,
    /// The endpoint that the hash of [`Rule::hash_on`] falls to, as long as it has room; `PeakEwma` for requests
    /// without it.
    Hash,
    /// The endpoint that was sent more than half of the prompt, as long as it is not saturated; `PeakEwma` for short
    /// prompts.
    PrefixAffinity,
    /// The endpoint that is expected to begin its answer soonest; others get a small share, so that they can come back.
    Latency,
    /// The cheapest backend by [`Profile::price`]; among equally cheap ones as `PeakEwma`.
    Cost,
    /// The backend that can do the least by [`Profile::capabilities`] and yet what the request needs; among equals as
    /// `PeakEwma`.
    Capability,
    /// The cheapest backend of those that are expected to keep to [`Rule::slo`]; where none is, the quickest.
    CostLatency,
    /// As `PeakEwma`, with what engines say of themselves: their queue and the fill of their KV cache.
    KvAware,
    /// The nearest endpoint, unless another one is expected to begin sooner by [`Rule::region_penalty_ms`].
    Region,
    /// The endpoint that the hash of [`Rule::hash_on`] falls to, however busy it is; `PeakEwma` for requests without
    /// it.
    Sticky,
    /// The endpoint that models learned from its streams predict to serve best, by [`Rule::slo`] where it is set;
    /// `PeakEwma` while they err.
    Adaptive,
}

/// What callers are to see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Slo {
    /// Time to the first token, in ms.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ttft_ms: Option<u64>,
    /// Time between tokens, in ms.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tpot_ms: Option<u64>,
}

/// What becomes of parts of a request that a backend's protocol cannot carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnUnsupported {
    /// The backend is no candidate for the request.
    #[default]
    Refuse,
    /// They are left out.
    Drop,
}

/// What becomes of event streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Streaming {
    /// They go to the caller as they come.
    #[default]
    Passed,
    /// They go to the caller once they are whole; one that breaks is repeated elsewhere.
    Buffered,
}

/// A second attempt beside a slow one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hedge {
    /// After this long without a first token, in ms.
    pub after_ms: u64,
    /// Prompt tokens that hedges may add, in percent of all prompts' tokens, 1..=100.
    pub extra_percent: u32,
}

/// Each request goes to several backends at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct FanOut {
    /// What the caller gets.
    pub mode: FanOutMode,
    /// Backends that are asked at most, 2..=8.
    pub max: u32,
    /// How long answers are waited for with [`FanOutMode::All`], in ms.
    pub within_ms: u64,
}

/// What the caller gets of several answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FanOutMode {
    /// The one that begins first; the others are ended.
    First,
    /// All, in one JSON document.
    All,
}

/// Limits of waiting, in ms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Timeouts {
    /// To connect to one endpoint.
    pub connect_ms: u64,
    /// From sending the request to the first token of a stream, or the first byte of any other answer's body, per
    /// attempt.
    pub first_token_ms: u64,
    /// The same for whole answers of models, of which the first byte comes with the last; `None`: as long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_ms: Option<u64>,
    /// Between two pieces of a body that has begun.
    pub idle_ms: u64,
    /// From the request's head to the end of its answer, all attempts and waits included.
    pub total_ms: u64,
}

impl Timeouts {
    /// From sending the request to the first byte of a whole answer of a model.
    pub fn whole_ms(&self) -> u64 {
        self.whole_ms.unwrap_or(self.first_token_ms)
    }
}

/// Defaults are not written, so that configs of objects which do not use a field stay as they were.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The regular expression of [`Condition::Text`]; `Err` says what is wrong with it. Upper and lower case are alike.
/// Linear time in the text, and at most [`MAX_PATTERN_BYTES`] of memory.
pub fn pattern(text: &str) -> Result<regex::Regex, String> {
    regex::RegexBuilder::new(text)
        .case_insensitive(true)
        .size_limit(MAX_PATTERN_BYTES)
        .build()
        .map_err(|err| err.to_string())
}

/// What a compiled pattern may take.
pub const MAX_PATTERN_BYTES: usize = 1 << 20;

/// A config that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Writing failed: a defect, never a user's fault.
    #[error("write gateway config")]
    Write(#[source] serde_json::Error),
    /// The text is not a config of a known format.
    #[error("read gateway config")]
    Read(#[source] serde_json::Error),
    /// The writer is newer than this reader.
    #[error("gateway config has format {found}, this build reads up to {FORMAT}")]
    NewerFormat {
        /// What the config says.
        found: u32,
    },
}

impl GatewayConfig {
    /// Canonical JSON: struct fields in declaration order, maps sorted, no white space.
    pub fn to_json(&self) -> Result<Vec<u8>, ConfigError> {
        serde_json::to_vec(self).map_err(ConfigError::Write)
    }

    /// Reads what [`Self::to_json`] wrote. Unknown fields and newer formats are refused.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        let FormatOnly { format } = serde_json::from_slice(bytes).map_err(ConfigError::Read)?;
        if format > FORMAT {
            return Err(ConfigError::NewerFormat { found: format });
        }
        serde_json::from_slice(bytes).map_err(ConfigError::Read)
    }

    /// SHA-256 of the canonical JSON, hexadecimal: "is it live?" is an equality of digests.
    pub fn digest(&self) -> Result<String, ConfigError> {
        Ok(sha256_hex(&self.to_json()?))
    }
}

/// SHA-256 of `bytes`, in 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> GatewayConfig {
        GatewayConfig {
            format: FORMAT,
            gateway: Id::new("default", "default"),
            objects: BTreeMap::new(),
            backends: BTreeMap::new(),
            caches: BTreeMap::new(),
            prompts: BTreeMap::new(),
            tasks: BTreeMap::new(),
            callers: None,
            budgets: BTreeMap::new(),
            rules: Vec::new(),
        }
    }

    #[test]
    fn config_round_trips_and_keeps_its_digest() {
        let config = empty();
        let read = GatewayConfig::from_json(&config.to_json().unwrap()).unwrap();
        assert_eq!(read.digest().unwrap(), config.digest().unwrap());
    }

    #[test]
    fn newer_format_is_refused_by_name_even_with_unknown_fields() {
        let error = GatewayConfig::from_json(br#"{"format":2,"new":1}"#).unwrap_err();
        assert!(matches!(error, ConfigError::NewerFormat { found: 2 }));
    }

    #[test]
    fn unknown_field_is_refused() {
        let mut value = serde_json::to_value(empty()).unwrap();
        value["surprise"] = serde_json::json!(1);
        assert!(GatewayConfig::from_json(value.to_string().as_bytes()).is_err());
    }

    #[test]
    fn sha256_of_a_known_text() {
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn prefix_matches_its_beginning_only() {
        assert!(NameMatch::Prefix("gpt-".into()).matches("gpt-5"));
        assert!(!NameMatch::Prefix("gpt-".into()).matches("my-gpt-5"));
        assert!(NameMatch::Prefix(String::new()).matches("anything"));
        assert!(!NameMatch::Exact("a".into()).matches("ab"));
    }
}
