//! A vLLM stand-in: vLLM's API, metric names and behaviour at shutdown, made-up text, modelled step times.
//!
//! [`model`] is one pure step model of vLLM's scheduler. [`run`] drives it with the real clock behind HTTP; a
//! simulation may drive it with a virtual one. Nothing is global: a process may run many engines. Every answer
//! carries `x-penstock-engine: simulated`.

mod args;
mod driver;
mod metrics;
pub mod model;
mod openai;
mod server;
mod settings;
mod text;

pub use args::{Args, InvalidArgs, Problem};
pub use metrics::Metrics;
pub use server::{Error, run};
pub use settings::{DEFAULT_BLOCK_SIZE, DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_QUEUED_REQS, Settings};
