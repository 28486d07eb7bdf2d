//! What every Penstock process has: logs, an admin port, shutdown on a signal, the TLS provider, listeners whose
//! errors say what to change. Small on purpose; nothing about routing or Kubernetes belongs here.

pub mod admin;
pub mod clock;
pub mod listen;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
