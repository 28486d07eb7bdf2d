//! How much callers may take: what is counted, for whom, and the most of it in which time.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{NameMatch, is_default};
use crate::ids::{BackendId, Id};

/// Limits of some requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Budget {
    /// Which requests count.
    #[serde(skip_serializing_if = "is_default", default)]
    pub selects: Selects,
    /// Who has limits of their own.
    #[serde(skip_serializing_if = "is_default", default)]
    pub per: Per,
    /// By name, none twice.
    pub limits: Vec<Limit>,
    /// What becomes of requests beyond a limit.
    #[serde(skip_serializing_if = "is_default", default)]
    pub enforcement: Enforcement,
    /// The most tokens of an answer whose request does not bound it; [`Enforcement::Hard`] only.
    pub max_output_tokens: u32,
    /// What a request costs at a backend without a price, in micro-USD; `None`: it does not go there, where money is
    /// counted.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unpriced_micro_usd: Option<u64>,
    /// What an answer out of a cache counts, in percent of what it took when it was stored.
    #[serde(skip_serializing_if = "is_default", default)]
    pub cache_hit_percent: u32,
    /// Its limits cannot be told: what it selects is refused.
    #[serde(skip_serializing_if = "is_default", default)]
    pub is_broken: bool,
}

/// Which requests count: those of which everything holds that is written here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Selects {
    /// Their caller is of one of these teams; none: any, strangers too.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub teams: Vec<NameMatch>,
    /// Their caller is one of these users; none: any.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub users: Vec<NameMatch>,
    /// Their caller has one of these VirtualKeys; none: any.
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub keys: BTreeSet<Id>,
    /// They ask for one of these models; none: any, and what is no call of a model too.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub models: Vec<NameMatch>,
    /// One of these backends answers them; none: any.
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub backends: BTreeSet<BackendId>,
}

/// Who has limits of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Per {
    /// Nobody: all have them together.
    #[default]
    Budget,
    /// Each team.
    Team,
    /// Each user of a team.
    User,
    /// Each VirtualKey.
    Key,
}

/// One limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Limit {
    /// Unique in the budget.
    pub name: String,
    /// What is counted.
    pub unit: Unit,
    /// The most of it.
    pub max: u64,
    /// In which time; `None` for [`Unit::Concurrency`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub window: Option<Window>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Unit {
    /// Requests that are answered.
    Requests,
    /// Tokens of prompts and answers.
    Tokens,
    /// Tokens of prompts.
    InputTokens,
    /// Tokens of answers.
    OutputTokens,
    /// What they cost, in millionths of a US dollar.
    MicroUsd,
    /// Requests at one time.
    Concurrency,
}

impl Unit {
    /// As configs spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "Requests",
            Self::Tokens => "Tokens",
            Self::InputTokens => "InputTokens",
            Self::OutputTokens => "OutputTokens",
            Self::MicroUsd => "MicroUsd",
            Self::Concurrency => "Concurrency",
        }
    }

    /// Whether it depends on how much is said.
    pub fn is_of_tokens(self) -> bool {
        !matches!(self, Self::Requests | Self::Concurrency)
    }
}

/// A time in which something may be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Window {
    /// So long back from any moment, in ms.
    SlidingMs(u64),
    /// From one midnight to another.
    #[serde(rename_all = "camelCase")]
    Calendar {
        /// How many days.
        period: Period,
        /// A name of the IANA time zone database.
        time_zone: String,
    },
}

/// A part of a calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Period {
    /// From midnight.
    Day,
    /// From Monday (ISO 8601).
    Week,
    /// From the first.
    Month,
}

/// What becomes of requests beyond a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Enforcement {
    /// Room for them is reserved before they are sent, and there is never more taken than the limit.
    #[default]
    Hard,
    /// They are refused once the limit is reached; what is under way then goes on.
    Soft,
    /// They are counted.
    Shadow,
}
