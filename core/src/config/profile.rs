//! What a backend is like, besides where it is and what it speaks: what it can take, what it costs,
//! where it stands.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Need, is_default};

/// What a backend is like. All of it is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Profile {
    /// What it can take.
    #[serde(skip_serializing_if = "is_default", default)]
    pub capabilities: Capabilities,
    /// What it costs; `None` is nothing.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub price: Option<Price>,
    /// How long an endpoint that comes gets less than its share, in ms.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub slow_start_ms: Option<u64>,
    /// Where it is; `None` is where the gateway is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub region: Option<String>,
    /// How its endpoints are asked whether they are well; `None`: they are not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub health_check: Option<HealthCheck>,
}

/// How endpoints are asked whether they are well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HealthCheck {
    /// Of a GET request: a path, perhaps with a query.
    pub path: String,
    /// Between two checks, in ms.
    pub interval_ms: u64,
    /// For an answer, in ms; at most the interval.
    pub timeout_ms: u64,
    /// Failed checks in a row after which an endpoint is down.
    pub unhealthy_threshold: u32,
    /// Good ones in a row after which it is well again.
    pub healthy_threshold: u32,
}

/// What a backend can take. What is not said, it can.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Capabilities {
    /// Tokens of a prompt and its answer together.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub context_tokens: Option<u32>,
    /// What it cannot do.
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub lacks: BTreeSet<Need>,
    /// It refuses to be asked for the count of a stream's tokens.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub lacks_stream_usage: bool,
    /// It goes on with an answer that is given to it (`continue_final_message`).
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub continue_final_message: bool,
    /// It counts the tokens of a conversation as vLLM does (`POST /tokenize`).
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub tokenize: bool,
}

/// What a million tokens cost, in micro-USD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Price {
    /// Of a prompt.
    pub input: u64,
    /// Of a prompt, as far as the backend's cache held it; as `input` where it is not said.
    pub cached_input: u64,
    /// Of an answer.
    pub output: u64,
}

impl Price {
    /// What a request costs, in pico-USD: `cached` of its `prompt` tokens came out of the backend's cache.
    pub fn of(self, prompt: u64, cached: u64, answer: u64) -> u128 {
        let cached = cached.min(prompt);
        u128::from(self.input) * u128::from(prompt - cached)
            + u128::from(self.cached_input) * u128::from(cached)
            + u128::from(self.output) * u128::from(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_costs_what_its_tokens_cost() {
        // 2.50 USD, 1.25 USD and 10 USD a million.
        let price = Price {
            input: 2_500_000,
            cached_input: 1_250_000,
            output: 10_000_000,
        };
        let micro_usd = |pico: u128| pico / 1_000_000;
        assert_eq!(micro_usd(price.of(1_000, 0, 100)), 2_500 + 1_000);
        assert_eq!(micro_usd(price.of(1_000, 400, 100)), 1_500 + 500 + 1_000);
        assert_eq!(price.of(10, 99, 0), price.of(10, 10, 0));
    }

    #[test]
    fn what_is_not_said_is_not_written() {
        assert_eq!(serde_json::to_string(&Profile::default()).unwrap(), "{}");
    }
}
