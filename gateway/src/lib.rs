//! The gateway: every request to the backend that shall answer it, and the answer back as it comes.
//!
//! `handle` tells the life of a request; each stage has its file. Pure stages take what they need and give a value
//! back; files that read clocks or sockets say (IO). `server::run` is the whole program without its command line.

pub mod args;
pub mod balance;
pub mod cache;
pub mod capability;
pub mod choose;
pub mod conditions;
pub mod cooldown;
pub mod edits;
pub mod embeddings;
pub mod engine_load;
pub mod events;
pub mod explain;
pub mod hedge_budget;
pub mod load;
pub mod meter;
pub mod metrics;
pub mod multipart;
pub mod openai;
pub mod outbound;
pub mod outlier;
pub mod pace;
pub mod parameters;
pub mod patience;
pub mod pick;
pub mod provider;
pub mod pulse;
pub mod queue;
pub mod quota;
pub mod reject;
pub mod reshape;
pub mod retry_budget;
pub mod settings;
pub mod snapshot;
pub mod source;
pub mod sse;
pub mod store;
pub mod suspects;
pub mod vitals;
pub mod wish;

mod admin;
mod attempt;
mod begin;
mod body;
mod certificates;
mod failure;
mod framing;
mod guard;
mod handle;
mod hedge;
mod hold;
mod job;
mod jobs;
mod join;
mod outcome;
mod overload;
mod pem;
mod process;
mod record;
mod request;
mod scrape;
mod server;
mod service;
mod socket;
mod stream;
mod trust;
mod upstream;
mod worker;

pub use args::{Args, GatewayArgs};
pub use certificates::TlsSettings;
pub use server::{Error, Listeners, run};
pub use settings::{JobLimits, Limits, Place, Settings};
pub use source::{Credential, Credentials, Publisher, Sources};
