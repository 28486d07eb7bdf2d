//! Providers whose paths, headers or wire are their own.

use std::collections::BTreeMap;

use penstock_core::config::{NameMatch, Protocol};
use penstock_gateway::{Credential, Credentials};
use serde_json::{Value, json};

use crate::harness::*;

mod azure;
mod bedrock;
mod gemini;

/// A plan with one provider at `url` for all models.
fn plan(protocol: Protocol, url: &str) -> Plan {
    Plan::new()
        .url("a", url)
        .speaking("a", protocol)
        .credential("a", "key")
        .rule(|rule| rule.models = vec![NameMatch::Prefix(String::new())])
}

/// A gateway that has `secret` for its provider from the beginning.
async fn start(plan: &Plan, secret: &str) -> Gateway {
    let gateway = Gateway::empty(settings()).await;
    let values = BTreeMap::from([("key".to_owned(), Credential::new(secret))]);
    gateway.set_credentials(Credentials { values });
    gateway.apply(plan).await;
    gateway
}

async fn post(gateway: &Gateway, path: &str, body: &str) -> Answer {
    let mut client = gateway.client().await;
    client.post_to(path, "", body).await;
    client.answer().await
}
