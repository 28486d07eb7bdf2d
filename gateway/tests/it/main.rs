//! The gateway over real sockets: scripted upstreams behind it, plain clients before it.
#![cfg(test)]

mod balance;
mod cache;
mod calls;
mod cluster;
mod deadlines;
mod drain;
mod failover;
mod harness;
mod limits;
mod protocols;
mod reload;
mod report;
mod stream;
mod tls;
mod workers;
