//! Contracts that two or more crates share: identifiers, the gateway's configuration, keys, endpoints, the load report,
//! metric names, a mergeable histogram.
//!
//! Nothing in this crate is async, opens a socket or reads a clock.

pub mod acks;
pub mod config;
pub mod duration;
pub mod endpoints;
pub mod engine_page;
pub mod histogram;
pub mod ids;
pub mod key;
pub mod load;
pub mod names;
