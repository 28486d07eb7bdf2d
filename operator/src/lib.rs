//! The operator: objects of the three kinds → pools, gateways and conditions.
//!
//! One flow for a namespace: watch → observe → \[plan\] → apply → \[conditions\] → patch status. Files in brackets are
//! pure; files that talk to the API server or read a clock say `(IO)` in their first line.

pub mod args;
pub mod reconcile;
pub mod run;

mod acks;
mod apply;
mod autoscaler;
mod budgets;
mod compare;
mod conditions;
mod events;
mod findings;
mod index;
mod keys;
mod lease;
mod live;
mod metrics;
mod mint;
mod observe;
mod observed;
mod plan;
mod pod;
mod programmed;
mod queue;
mod replicas;
mod status;
mod values;
mod watch;
mod world;

pub use args::{Args, Settings};
pub use run::{Error, connect, run};
