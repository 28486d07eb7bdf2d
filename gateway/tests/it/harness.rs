//! What the tests are made of: an upstream that does what a script says, a client that sees every segment, a gateway
//! on loopback.

use std::time::Duration;

mod client;
mod gateway;
mod hyper_upstream;
mod log;
mod plan;
mod redis;
mod tls;
mod upstream;

pub(crate) use client::*;
pub(crate) use gateway::*;
pub(crate) use hyper_upstream::*;
pub(crate) use log::*;
pub(crate) use plan::*;
pub(crate) use redis::*;
pub(crate) use tls::*;
pub(crate) use upstream::*;

/// Everything that should happen happens within this, on a busy machine too.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Waits until `check` holds; panics with `what` after [`SOON`].
pub(crate) async fn until(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = tokio::time::timeout(SOON, async {
        while !check() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(deadline.await.is_ok(), "not in time: {what}");
}

/// Bounds a wait that should be short.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"))
}
