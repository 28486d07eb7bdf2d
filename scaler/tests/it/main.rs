//! The scaler over real sockets: a tonic client asks it, scripted engines and gateways feed it.
#![cfg(test)]

mod peers;
mod scripted;
mod service;
mod sources;
