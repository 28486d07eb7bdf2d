//! `TokenBudget`: how much callers may take, and what becomes of requests beyond that.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::policy::default_gateway;
use crate::text::DurationText;

/// Limits of what callers of a gateway may take, in requests, tokens, money or requests at one time.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "penstock.dev",
    version = "v1alpha1",
    kind = "TokenBudget",
    plural = "tokenbudgets",
    shortname = "tbudget",
    category = "penstock",
    namespaced,
    status = "TokenBudgetStatus",
    derive = "PartialEq",
    doc = "Limits of what callers of a gateway may take, in requests, tokens, money or requests at one time. A request counts in every TokenBudget that selects it: an organisation's, its team's and its key's are three of them. Gateways that carry one need a store (`--store`).",
    printcolumn = r#"{"name":"Gateway","type":"string","jsonPath":".spec.gateway"}"#,
    printcolumn = r#"{"name":"Enforcement","type":"string","jsonPath":".spec.enforcement"}"#,
    printcolumn = r#"{"name":"Spent","type":"integer","jsonPath":".status.limits[0].spent"}"#,
    printcolumn = r#"{"name":"Remaining","type":"integer","jsonPath":".status.limits[0].remaining"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct TokenBudgetSpec {
    /// The gateway whose callers it is about: the `gateway` of RoutingPolicies. Default `default`.
    #[serde(default = "default_gateway")]
    #[schemars(
        length(min = 1, max = 40),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub gateway: String,
    /// Which requests count: those of which everything holds that is written here. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<SelectorSpec>,
    /// Who has the limits alone: `Budget` (nobody: all callers share them), each `Team`, each `User` of a team, each
    /// `Key` (VirtualKey). Callers without a key are one. Default `Budget`.
    #[serde(default)]
    pub per: PerSpec,
    /// All of them hold.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub limits: Vec<LimitSpec>,
    /// `Hard`: room is reserved for the longest possible answer before a request is sent, so that gateways together
    /// never give out more than a limit has. `Soft`: requests are refused once a limit is reached; what is under way
    /// then goes on. `Shadow`: requests are counted and never refused. Default `Hard`.
    #[serde(default)]
    pub enforcement: EnforcementSpec,
    /// `Hard`: the longest answer, in tokens, to a request that does not bound it (`max_tokens` and the like); it goes
    /// upstream with the request. 1 to 1048576, default 4096.
    #[serde(default = "default_max_output_tokens")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_output_tokens: i32,
    /// Where money is counted: what a request costs at a backend whose LLMBackend has no `price`, in micro-USD.
    /// Default: such backends are not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub unpriced_micro_usd: Option<i64>,
    /// What an answer out of a cache counts, in percent of the tokens that it has: 0 to 100, default 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(range(min = 0, max = 100))]
    pub cache_hit_percent: i32,
}

fn default_max_output_tokens() -> i32 {
    4096
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(value: &i32) -> bool {
    *value == 0
}

/// Which requests count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SelectorSpec {
    /// Teams of callers: exact (`search`), by prefix (`search-*`), or any (`*`). Default: any, and callers without a
    /// key too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 64)))]
    pub teams: Vec<String>,
    /// Users, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 254)))]
    pub users: Vec<String>,
    /// VirtualKeys of its namespace. Default: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253)))]
    pub keys: Vec<String>,
    /// Models as callers ask for them: exact, by prefix (`gpt-*`), or any. Default: any, and requests that are no
    /// calls of a model too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 256)))]
    pub models: Vec<String>,
    /// LLMBackends of its namespace. A request that another backend can answer goes there when the limit is reached.
    /// Default: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 253)))]
    pub backends: Vec<String>,
}

/// Who has limits alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PerSpec {
    /// Nobody.
    #[default]
    Budget,
    /// Each team.
    Team,
    /// Each user of a team.
    User,
    /// Each VirtualKey.
    Key,
}

/// What becomes of requests beyond a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EnforcementSpec {
    /// They are not sent.
    #[default]
    Hard,
    /// They are not sent, once it is known.
    Soft,
    /// They are sent.
    Shadow,
}

/// One limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "(self.unit == 'Concurrency') == !has(self.window)",
    "give it a window; only Concurrency, which counts what is under way, has none"
))]
pub struct LimitSpec {
    /// What messages, headers and status call it.
    #[schemars(
        length(min = 1, max = 40),
        regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,
    /// What is counted: `Requests`, `Tokens` (of prompts and answers), `InputTokens`, `OutputTokens`, `MicroUsd`
    /// (millionths of a US dollar, by the `price` of LLMBackends), `Concurrency` (requests at one time).
    pub unit: UnitSpec,
    /// The most of it.
    #[schemars(range(min = 1, max = 1_000_000_000_000_000_i64))]
    pub max: i64,
    /// In which time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowSpec>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UnitSpec {
    /// Requests that are answered.
    Requests,
    /// Tokens of prompts and answers.
    Tokens,
    /// Tokens of prompts.
    InputTokens,
    /// Tokens of answers.
    OutputTokens,
    /// Money.
    MicroUsd,
    /// Requests at one time.
    Concurrency,
}

/// A time in which something may be taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = (
    "has(self.rolling) != has(self.calendar)",
    "write either rolling or calendar"
))]
#[x_kube(validation = (
    "!has(self.timeZone) || has(self.calendar)",
    "timeZone is about calendar: remove it"
))]
pub struct WindowSpec {
    /// So long back from any moment, such as `1m`, `1h`, `24h`; `1s` to `8784h`. It is kept in 60 parts, and a part
    /// counts until all of it is out of the window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolling: Option<DurationText>,
    /// From one midnight to another: a `Day`, a `Week` from Monday, a `Month`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calendar: Option<CalendarSpec>,
    /// Whose midnight, such as `Europe/Berlin`. Default `UTC`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub time_zone: Option<String>,
}

/// A part of a calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CalendarSpec {
    /// From midnight.
    Day,
    /// From Monday.
    Week,
    /// From the first.
    Month,
}

/// What the operator found.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenBudgetStatus {
    /// `Accepted`, `ResolvedRefs`, `Programmed`, `Ready`.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// How the limits stand, as the gateways say; at most a minute old while there are requests. Of a budget per team,
    /// user or key those who have used most of theirs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub limits: Vec<LimitStatus>,
}

/// How one limit stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitStatus {
    /// The limit's.
    pub name: String,
    /// The team, user or VirtualKey that has it; none where all share it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub of: String,
    /// In the window.
    pub spent: i64,
    /// For requests under way, and what gateways hold for the next ones.
    pub reserved: i64,
    /// What is left.
    pub remaining: i64,
    /// What of `spent` gateways had that died, and may not have used; ever.
    #[serde(default, skip_serializing_if = "is_none")]
    pub estimated: i64,
    /// The most of `reserved` that gateways hold for requests to come, all of them together: 2 % of the limit.
    #[serde(default, skip_serializing_if = "is_none")]
    pub idle_bound: i64,
    /// When the window ends, or the first part of a rolling one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub resets_at: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_none(value: &i64) -> bool {
    *value == 0
}
