//! What an `LLMBackend` says of itself, whichever form it has: what it can take, what it costs.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::DurationText;

/// What a backend can take. What is not said, it can: a request goes there, and its own refusal is what the caller
/// sees.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapabilitiesSpec {
    /// Tokens of a prompt and its answer together (vLLM's `--max-model-len`). Longer requests go to backends that have
    /// more, as long as there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub context_tokens: Option<i32>,
    /// Takes pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<bool>,
    /// Takes sound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio: Option<bool>,
    /// Calls tools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<bool>,
    /// Keeps to a JSON schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<bool>,
    /// Counts the tokens of a stream when asked (`stream_options.include_usage`). The gateway asks every backend that
    /// speaks OpenAI's protocol, unless this is `false`: for those that refuse the member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_usage: Option<bool>,
    /// Goes on with an answer whose beginning is the last message of a request (`continue_final_message`, as vLLM and
    /// SGLang have it), and its model's chat template allows for it: for `retry.rescueStreams` of rules. Default
    /// `false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continue_final_message: Option<bool>,
    /// Counts the tokens of a conversation as vLLM does, with `POST /tokenize` beside `/v1`: for Anthropic's
    /// `/v1/messages/count_tokens`. Default `true` for a `pool`, else `false`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenize: Option<bool>,
}

/// How endpoints are asked whether they are well, by each gateway replica. Without a credential.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheckSpec {
    /// Where a GET request is answered with a status from 200 to 399, or 429, by an endpoint that is well. Default
    /// `/health`, as vLLM and SGLang have it.
    #[serde(default = "health")]
    #[schemars(length(min = 1, max = 256), regex(pattern = "^/"))]
    pub path: String,
    /// Between two checks, `1s` to `10m`. Default `10s`.
    #[serde(default = "ten_seconds")]
    pub interval: DurationText,
    /// For an answer, `100ms` to `interval`. Default `1s`.
    #[serde(default = "one_second")]
    pub timeout: DurationText,
    /// Failed checks in a row after which an endpoint comes after all others. Default 3.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 100))]
    pub unhealthy_threshold: i32,
    /// Good checks in a row after which it comes back. Default 1.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 100))]
    pub healthy_threshold: i32,
}

fn health() -> String {
    "/health".to_owned()
}

fn ten_seconds() -> DurationText {
    "10s".into()
}

fn one_second() -> DurationText {
    "1s".into()
}

fn three() -> i32 {
    3
}

fn one() -> i32 {
    1
}

/// What a backend costs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.perMillionTokens) != has(self.catalogue)",
    "write either perMillionTokens or catalogue"
))]
pub struct PriceSpec {
    /// What a million tokens cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_million_tokens: Option<TokenPriceSpec>,
    /// A model of the built-in catalogue, such as `openai/gpt-5-mini`: `penstock prices` lists it. What it costs is
    /// what the catalogue of the running version says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub catalogue: Option<String>,
}

/// What a million tokens cost, in micro-USD: 2.50 USD is 2500000.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenPriceSpec {
    /// Of a prompt.
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub input_micro_usd: i64,
    /// Of a prompt, as far as the backend's own cache held it. Default: as `inputMicroUsd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub cached_input_micro_usd: Option<i64>,
    /// Of an answer. Default 0, for embeddings.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000_000_000_i64))]
    pub output_micro_usd: i64,
}
