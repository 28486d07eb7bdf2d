//! `RoutingPolicy`: which backends answer for which model, in which order.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::text::DurationText;

mod fan_out;
mod parameters;
mod prompts;
mod tasks;

pub use fan_out::{FanOutModeSpec, FanOutSpec};
pub use parameters::{
    ChoiceLimitSpec, DecimalLimitSpec, OnExceedSpec, ParametersSpec, TokenLimitSpec,
};
pub use prompts::{PromptMessageSpec, PromptRefSpec, PromptSpec, RoleSpec};
pub use tasks::{TaskEmbeddingSpec, TaskSpec};

/// Rules of one gateway. All policies that name the same gateway in one namespace are merged: exact model names
/// before prefixes before `*`, longer prefixes first, then rules with more conditions, then by policy name, then in the
/// order written.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "penstock.dev",
    version = "v1alpha1",
    kind = "RoutingPolicy",
    plural = "routingpolicies",
    shortname = "rpol",
    category = "penstock",
    namespaced,
    status = "RoutingPolicyStatus",
    derive = "PartialEq",
    doc = "Which backends answer for which model, in which order. Each gateway that a policy names becomes a gateway Deployment and Service.",
    printcolumn = r#"{"name":"Gateway","type":"string","jsonPath":".spec.gateway"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct RoutingPolicySpec {
    /// The gateway that carries these rules; its Service is `<gateway>-gateway`. Default `default`.
    #[serde(default = "default_gateway")]
    #[schemars(
        length(min = 1, max = 40),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub gateway: String,
    /// Whether its rules take callers without a key (VirtualKey). `Refuse`, and the gateway answers nobody without one,
    /// except by rules of policies that say `Allow`. Default: `Refuse` while the gateway knows a key, else `Allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anonymous: Option<AnonymousSpec>,
    /// At least one rule.
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub rules: Vec<RuleSpec>,
    /// Prompts that rules add, or that callers ask for with OpenAI's member `prompt`. Several versions of one may be
    /// used at a time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into(), "version".into()]))]
    pub prompts: Vec<PromptSpec>,
    /// What requests may be about, for `match.task`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub tasks: Vec<TaskSpec>,
    /// How a request's task is found: by the embedding of the user's last message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_embedding: Option<TaskEmbeddingSpec>,
}

pub(crate) fn default_gateway() -> String {
    "default".to_owned()
}

/// What becomes of callers without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AnonymousSpec {
    /// They are answered as others.
    Allow,
    /// They are refused with status 401.
    Refuse,
}

/// Requests that match go to one of `backends`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleSpec {
    /// Unique in the policy; appears in logs and metrics.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,
    /// Which requests.
    #[serde(rename = "match")]
    pub matches: MatchSpec,
    /// Candidates, at least one.
    #[schemars(length(min = 1, max = 16))]
    pub backends: Vec<RuleBackendSpec>,
    /// How one of several equal candidates is chosen. Default `PeakEwma`.
    #[serde(default)]
    pub strategy: StrategySpec,
    /// What the strategies `Hash` and `Sticky` keep together. Default: what the body names as `conversation`, else as
    /// `prompt_cache_key`, `user`, `safety_identifier`, `metadata.user_id` or `previous_response_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash_on: Option<HashOnSpec>,
    /// How much sooner another region must be expected to answer before the strategy `Region` takes it. Default
    /// `100ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region_penalty: Option<DurationText>,
    /// What callers are to see; the strategy `CostLatency` takes the cheapest candidate that keeps to it, `Adaptive`
    /// the one that keeps the farthest from missing it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slo: Option<SloSpec>,
    /// When a failed attempt is repeated elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetrySpec>,
    /// A second attempt beside one whose first token is slow to come. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hedge: Option<HedgeSpec>,
    /// Sends each request to several backends at once. Default: to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fan_out: Option<FanOutSpec>,
    /// Limits of waiting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<TimeoutsSpec>,
    /// Bounds of what callers may ask of a model, and what counts where they say nothing. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<ParametersSpec>,
    /// A prompt of this policy that comes before the system prompts of callers. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<PromptRefSpec>,
    /// What becomes of parts of a request that a backend's protocol cannot carry. Default `Refuse`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_unsupported: Option<OnUnsupportedSpec>,
    /// How often a stream gets a comment while nothing else goes out, `1s` to `5m`, so that nobody in between takes the
    /// connection for dead. Its head goes out before it is known who answers: refusals after the first one come as
    /// error events. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<DurationText>,
    /// What becomes of event streams. Default `Passed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streaming: Option<StreamingSpec>,
    /// Lets callers come back to an event stream that they lost: each event has an `id`, and `Last-Event-ID` gets what
    /// follows it, from any replica. So long, `1s` to `10m`, a stream goes on without its caller, and is kept after its
    /// end. Needs a store of the gateway. Default: a stream ends with its caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumable: Option<DurationText>,
    /// Makes small calls for embeddings that come together as one, so that backends compute them in one batch.
    /// Default: each by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join_embeddings: Option<JoinEmbeddingsSpec>,
    /// Who goes first while backends have more to do than they answer before callers give up. Default `Normal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub urgency: Option<UrgencySpec>,
    /// A cache that answers repeated requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheRef>,
}

/// Which requests a rule takes: those of which everything holds that is written here.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = (
    "(has(self.models) && size(self.models) > 0) || (has(self.paths) && size(self.paths) > 0)",
    "name at least one model, '*' for any, or the paths of HTTP backends"
))]
#[serde(rename_all = "camelCase")]
pub struct MatchSpec {
    /// Model names: exact (`chat`), by prefix (`gpt-*`), or any (`*`). One of them must match. None: the rule is for
    /// backends that speak `HTTP`, and `paths` says which requests are theirs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub models: Vec<String>,
    /// Paths: exact (`/v1/embeddings`) or by prefix (`/v1/chat/*`). One of them must match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 256)))]
    pub paths: Vec<String>,
    /// Methods such as `GET`, for backends that speak `HTTP`. One of them must match. Default: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 32)))]
    pub methods: Vec<String>,
    /// Headers of the request; all of them must match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub headers: Vec<HeaderMatchSpec>,
    /// About how many tokens a model reads: 4 bytes of text are one, a picture, sound or file in the body counts as
    /// 765.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens: Option<TokenRangeSpec>,
    /// About how much of a model's context the request takes: its prompt, at 4 bytes a token, and the most that its
    /// answer may have, if it says so. Prompts with pictures, sound or files are not measured, and are in no range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<TokenRangeSpec>,
    /// What the request needs of a model; it must need all of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    pub needs: Vec<NeedSpec>,
    /// `true`: only requests for a stream; `false`: only others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// The caller's region: exact (`eu-west-1`), by prefix (`eu-*`), or any that is known (`*`). What a trusted proxy
    /// says in a header (docs/routing.md), else the gateway's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub region: Option<String>,
    /// The team of the caller's VirtualKey: exact (`search`), by prefix (`search-*`), or any (`*`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub team: Option<String>,
    /// The user of the caller's VirtualKey, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub user: Option<String>,
    /// Attributes of the caller's VirtualKey and their values, likewise; all of them must match.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub attributes: BTreeMap<String, String>,
    /// A regular expression that the user's last message must match somewhere, upper and lower case alike, such as
    /// `\b(sql|join|index)\b`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub text: Option<String>,
    /// One of this policy's `tasks`, which the user's last message is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub task: Option<String>,
}

/// A header that a request must have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeaderMatchSpec {
    /// Its name; upper and lower case are alike.
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
    )]
    pub name: String,
    /// Its value: exact (`research`), by prefix (`team-*`), or any (`*`).
    #[schemars(length(min = 1, max = 256))]
    pub value: String,
}

/// A range of tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRangeSpec {
    /// At least this many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000_000))]
    pub min: Option<i32>,
    /// At most this many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000_000))]
    pub max: Option<i32>,
}

/// What a request needs of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NeedSpec {
    /// It holds a picture.
    Vision,
    /// It holds sound.
    Audio,
    /// It offers tools.
    Tools,
    /// It asks for an answer that keeps to a JSON schema.
    JsonSchema,
}

/// An `LLMBackend` of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleBackendSpec {
    /// The LLMBackend's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Share of requests relative to other candidates of the same priority. Default 1.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: i32,
    /// Candidates with the lowest number are tried first; the next ones when those fail. Default 0.
    #[serde(default)]
    #[schemars(range(min = 0, max = 15))]
    pub priority: i32,
    /// The model's name to send to this backend in this rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub model_override: Option<String>,
    /// Asked only after another candidate failed in one of these ways, whether `retry.on` names them or not: such as a
    /// model with a longer context after `ContextLength`. Where `retry.on` does not, only candidates that name it here
    /// follow. Default: asked first, and after what `retry.on` names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 6))]
    pub after: Vec<FailureClassSpec>,
}

fn one() -> i32 {
    1
}

/// How one candidate is chosen among those of equal priority, and one pod among those of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StrategySpec {
    /// The endpoint that is expected to begin its answer soonest, by its recent latency and the work that waits there;
    /// one that was sent most of the prompt before, up to twice as late. Slow endpoints get little.
    #[default]
    PeakEwma,
    /// Of two endpoints drawn by weight, the one with fewer requests in flight.
    PowerOfTwo,
    /// The fewest requests in flight, relative to weight.
    LeastRequests,
    /// The endpoint that the hash of `hashOn` falls to, as long as it has at most 1.25 times its share of the requests
    /// in flight; `PeakEwma` for requests without it.
    Hash,
    /// The endpoint that was sent more than half of the prompt before and so holds it in its KV cache, as long as it is
    /// not saturated; `PeakEwma` for prompts under 64 tokens.
    PrefixAffinity,
    /// In turn, exactly proportional to weight (smooth weighted round robin).
    RoundRobin,
    /// The same, for policies that are about weights: canaries, fixed splits.
    Weighted,
    /// The endpoint that is expected to begin its answer soonest. Two in a hundred requests go anywhere by weight, so
    /// that endpoints which were slow can come back.
    Latency,
    /// The backend with the lowest `price` for such a request; among equally cheap ones as `PeakEwma`.
    Cost,
    /// The backend whose `capabilities` are the least of those that suffice, so that those which can do more are free
    /// for requests that need it; among equal ones as `PeakEwma`.
    Capability,
    /// The cheapest backend whose first token is expected within `slo.ttft`; where none is, the quickest one.
    CostLatency,
    /// Of two endpoints drawn by weight, the one that is expected to begin its answer sooner, with what engines say of
    /// themselves every second (`/metrics` of vLLM and SGLang): requests of others there, and the fill of their KV
    /// cache.
    KvAware,
    /// The nearest endpoint, seen from the caller's region: in the gateway's zone, then its region, then elsewhere. One
    /// that is farther is taken when it is expected to answer sooner by `regionPenalty`.
    Region,
    /// The endpoint that the hash of `hashOn` falls to, however busy it is, as long as the same endpoints are there and
    /// work; `PeakEwma` for requests without it.
    Sticky,
    /// The endpoint that is predicted to serve a stream best, by a small model that learns from each endpoint's
    /// streams what its queue, prompts, KV cache and known prefixes mean for the time to the first token and between
    /// tokens. With `slo` the one that keeps the farthest from missing it. `PeakEwma` while the model errs, and for
    /// answers that are not streamed.
    Adaptive,
}

/// What callers are to see.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SloSpec {
    /// Time to the first token.
    pub ttft: DurationText,
    /// Time between tokens, for the strategy `Adaptive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpot: Option<DurationText>,
}

/// What is kept together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.header) != has(self.of)", "write either header or of"))]
pub struct HashOnSpec {
    /// Requests with the same value of this header, such as `x-session-id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
    )]
    pub header: Option<String>,
    /// Requests of the same one: of a `Conversation` (`conversation`, `prompt_cache_key` or `previous_response_id` of
    /// the body), of a `User` (`user`, `safety_identifier` or `metadata.user_id`, else the user of the caller's key),
    /// of a `Team` (of the caller's key).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<HashOfSpec>,
}

/// To whom requests belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HashOfSpec {
    /// What goes on turn by turn.
    Conversation,
    /// A person.
    User,
    /// Several of them.
    Team,
}

/// Attempts that failed with 429, 5xx or a connection error before the first byte of the answer are repeated on
/// another candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetrySpec {
    /// Attempts in all, the first one included. Default 3.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 10))]
    pub attempts: i32,
    /// What is followed by another attempt. Default `[Connection, Timeout, RateLimit, ServerError]`. After a refusal
    /// (`ContextLength`, `ContentPolicy`) the next attempt goes to another backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 6))]
    pub on: Option<Vec<FailureClassSpec>>,
    /// Which requests to backends that speak `HTTP` may be sent again though they, or part of them, went upstream.
    /// Default `Safe`. One of which not a byte went upstream is always sent again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeat: Option<RepeatSpec>,
    /// Lets another endpoint of the same backend and pod template go on with a stream that is cut: once a request, for
    /// texts whose backend has `capabilities.continueFinalMessage`. What follows is sampled anew. Default `false`: the
    /// stream ends in an error event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rescue_streams: Option<bool>,
}

/// Which requests do no harm when they are carried out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RepeatSpec {
    /// GET, HEAD, OPTIONS and TRACE.
    Safe,
    /// Also those with an `Idempotency-Key`, which the service then must heed.
    Keyed,
    /// All.
    Always,
}

fn three() -> i32 {
    3
}

/// Why an attempt gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailureClassSpec {
    /// No connection, or one that ended before the answer began.
    Connection,
    /// No connection or no first token in time.
    Timeout,
    /// Status 429.
    RateLimit,
    /// Status 5xx, an answer that begins with an error, or a refusal that is the backend's own fault: 401 to 404, 408.
    ServerError,
    /// A refusal because the request is longer than the model can take.
    ContextLength,
    /// A refusal because of what the request says.
    ContentPolicy,
}

/// A stream that has no first token after some time is asked for a second time, of another endpoint that has no queue;
/// the first one to answer is the answer, the other one is ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HedgeSpec {
    /// How long to wait for the first token before: above what nine in ten requests need.
    pub after: DurationText,
    /// Prompt tokens that hedges may add, in percent of all prompts' tokens. Default 5.
    #[serde(default = "five")]
    #[schemars(range(min = 1, max = 100))]
    pub max_extra_percent: i32,
}

fn five() -> i32 {
    5
}

/// Which calls for embeddings are made as one: those that differ in `input` only, and whose inputs are texts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JoinEmbeddingsSpec {
    /// How long the first one waits for others, at most `100ms`. Default `5ms`.
    #[serde(default = "five_milliseconds")]
    pub within: DurationText,
    /// Inputs of one joined call. Default 64.
    #[serde(default = "sixty_four")]
    #[schemars(range(min = 2, max = 2048))]
    pub max_inputs: i32,
}

fn five_milliseconds() -> DurationText {
    "5ms".into()
}

fn sixty_four() -> i32 {
    64
}

/// What becomes of parts of a request that a backend's protocol cannot carry; docs/protocols.md lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnUnsupportedSpec {
    /// The backend is no candidate for the request; where no other is left, the request is refused with status 400.
    Refuse,
    /// They are left out.
    Drop,
}

/// Who goes first while backends have more to do than they answer before callers give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UrgencySpec {
    /// After all others.
    Low,
    /// In between.
    Normal,
    /// Before all others.
    High,
}

/// What becomes of event streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StreamingSpec {
    /// They go to the caller as they come.
    Passed,
    /// They go to the caller once they are whole, so that one that breaks can be repeated elsewhere: for callers that
    /// are not people.
    Buffered,
}

/// Limits of waiting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TimeoutsSpec {
    /// To connect to one endpoint. Default `2s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<DurationText>,
    /// From sending a request to the first token of a stream, or to the first byte of any other answer, per attempt.
    /// Default `5m`; for answers of models that are no streams, and so come as a whole, as long as `total`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token: Option<DurationText>,
    /// Between two pieces of an answer that has begun. Default `2m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<DurationText>,
    /// From the arrival of a request to the end of its answer, all attempts and waits included. Default `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<DurationText>,
}

/// A `SemanticCache` of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CacheRef {
    /// The SemanticCache's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoutingPolicyStatus {
    /// `Accepted`, `ResolvedRefs`, `Programmed`, `Ready`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
