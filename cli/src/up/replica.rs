//! (IO) One simulated engine: from its port to its end, with the readiness probe that a kubelet would make.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::fleet::Event;

/// Time between two probes, and limit of one.
const PROBE_EVERY: Duration = Duration::from_millis(200);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Name of a replica, unique in the process.
pub(super) type ReplicaName = String;

/// Runs an engine until `stop`, then until it has drained. Tells `events` once, when it is ready.
pub(super) async fn run(
    name: ReplicaName,
    address: SocketAddr,
    engine: impl Future<Output = Result<(), penstock_engine::Error>>,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
) -> (ReplicaName, Result<(), penstock_engine::Error>) {
    let probe = async {
        tokio::select! {
            () = until_ok(address, "/health") => {
                // Nobody listens any more once the fleet has ended.
                let _ = events.send(Event::Ready(name.clone())).await;
            }
            () = stop.cancelled() => {}
        }
        std::future::pending::<()>().await;
    };
    let result = tokio::select! {
        result = engine => result,
        () = probe => Ok(()),
    };
    (name, result)
}

/// Returns when `GET path` answers 200. Cancel safe.
pub(super) async fn until_ok(address: SocketAddr, path: &str) {
    let client: Client<HttpConnector, Empty<Bytes>> =
        Client::builder(TokioExecutor::new()).build_http();
    let Ok(uri) = format!("http://{address}{path}").parse::<http::Uri>() else {
        return;
    };
    loop {
        if let Ok(Ok(response)) = tokio::time::timeout(PROBE_TIMEOUT, client.get(uri.clone())).await
            && response.status() == http::StatusCode::OK
        {
            return;
        }
        tokio::time::sleep(PROBE_EVERY).await;
    }
}
