//! The gateway over real sockets: scripted upstreams behind it, plain clients before it.
#![cfg(test)]

mod balance;
mod batches;
mod buffered;
mod cache;
mod callers_tls;
mod calls;
mod capabilities;
mod cluster;
mod corpus;
mod deadlines;
mod drain;
mod failover;
mod fan_out;
mod harness;
mod hedge;
mod http2;
mod jobs;
mod join;
mod limits;
mod overload;
mod parameters;
mod prompts;
mod protocols;
mod providers;
mod refusals;
mod reload;
mod report;
mod rules;
mod services;
mod smuggling;
mod strategies;
mod stream;
mod tls;
mod tls_backends;
mod workers;
