//! Tells KEDA how many replicas a pool of LLM engines needs.
//!
//! Flow: `collect` (engine pods, gateways, Prometheus, the cluster) → `parse` → `window` → `inputs` → `decide` →
//! `service` (gRPC to KEDA). `fleet` holds the windows and what was learned; it, `parse`, `window`, `decide`,
//! `metadata`, `hpa` and `keda` are pure: time and data come in, values go out. CPU load is not read anywhere.

pub mod admin;
pub mod args;
pub mod collect;
pub mod decide;
pub mod drift;
pub mod fleet;
pub mod hpa;
pub mod inputs;
pub mod keda;
pub mod metadata;
pub mod metrics;
pub mod proto;
pub mod run;
pub mod selector;
pub mod service;
pub mod window;
pub mod world;

pub use run::run;
