//! The operator against a real API server, with exactly the rights that the chart gives. Tests look at the
//! world, not at calls: objects, conditions, owners of fields, and the audit log.
#![cfg(test)]

mod budgets;
mod children;
mod cluster;
mod gateways;
mod keys;
mod scaling;
mod world;

use serde_json::{Value, json};

const OWN: &str = "penstock.dev/v1alpha1";
const RBAC: &str = "rbac.authorization.k8s.io/v1";

fn simulated() -> Value {
    json!({"pool": {"model": "tiny", "engine": "Simulated"}})
}
