//! (IO) Accepts connections and carries HTTP/1.1 over them, as vLLM's API server does.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::paths::App;

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Open connections; more wait in the listener's backlog.
    pub(super) connections: usize,
    /// How long answers that have ended may take to reach their clients once the server closes.
    pub(super) flush: Duration,
}

/// Each stream holds a connection, so there are more of them than unfinished requests by default,
/// with room for probes and scrapes.
pub(super) const BOUNDS: Bounds = Bounds {
    connections: 5120,
    flush: Duration::from_secs(5),
};

/// How long a client may take to send a request's head, and how long an idle connection is kept.
const HEADER_READ_TIMEOUT: Duration = Duration::from_mins(1);

/// Pause after a failed accept, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `close`, then stops listening at once and lets each connection finish its current answer.
pub(super) async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    bounds: Bounds,
    close: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(bounds.connections));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = close.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = accept(&listener, &slots) => match accepted {
                Ok((stream, slot)) => {
                    let (app, close) = (Arc::clone(&app), close.clone());
                    connections.spawn(async move {
                        carry(stream, app, close).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(error = %error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let flushed = tokio::time::timeout(bounds.flush, async {
        while connections.join_next().await.is_some() {}
    });
    if flushed.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "clients did not read their answers, connections are cut"
        );
        connections.shutdown().await;
    }
}

/// Waits for a free slot, then for a connection. Cancel safe.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Without it a token may wait 40 ms for the client's delayed ACK.
    stream.set_nodelay(true)?;
    Ok((stream, slot))
}

async fn carry(stream: TcpStream, app: Arc<App>, close: CancellationToken) {
    let service = service_fn(move |request| {
        let app = Arc::clone(&app);
        async move { Ok::<_, Infallible>(app.answer(request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_READ_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = close.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "a connection was cut");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::driver;
    use crate::metrics::Metrics;
    use crate::model::{Model, PROFILES};
    use crate::settings::Settings;

    /// A server on a free port, without an engine behind it.
    struct Bench {
        address: std::net::SocketAddr,
        app: Arc<App>,
        close: CancellationToken,
        tasks: JoinSet<()>,
    }

    impl Bench {
        async fn start(bounds: Bounds) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (app, close) = (
                Arc::new(App::new(Settings::new("m"))),
                CancellationToken::new(),
            );
            let mut tasks = JoinSet::new();
            tasks.spawn(serve(listener, Arc::clone(&app), bounds, close.clone()));
            Self {
                address,
                app,
                close,
                tasks,
            }
        }
    }

    /// Sends a request and reads what comes first.
    async fn ask(stream: &mut TcpStream, method: &str, path: &str, body: &str) -> String {
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
        stream
            .write_all(format!("{head}{body}").as_bytes())
            .await
            .unwrap();
        let mut answer = [0; 1024];
        let read = stream.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    }

    #[tokio::test]
    async fn connection_above_the_limit_waits_for_a_free_slot() {
        let mut bench = Bench::start(Bounds {
            connections: 1,
            ..BOUNDS
        })
        .await;
        let mut first = TcpStream::connect(bench.address).await.unwrap();
        assert!(!ask(&mut first, "GET", "/health", "").await.is_empty());
        let mut second = TcpStream::connect(bench.address).await.unwrap();
        let mut waiting = Box::pin(ask(&mut second, "GET", "/health", ""));
        let early = tokio::time::timeout(Duration::from_millis(100), &mut waiting).await;
        assert!(early.is_err(), "the only slot is taken");
        drop(first);
        assert!(!waiting.await.is_empty());
        bench.close.cancel();
        bench.tasks.join_next().await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn answer_that_outlasts_the_flush_is_cut() {
        let mut bench = Bench::start(Bounds {
            flush: Duration::from_millis(50),
            ..BOUNDS
        })
        .await;
        let limits = Settings::limits_of(&PROFILES[0]);
        let model = Model::new(limits, PROFILES[0].step_time).unwrap();
        let metrics = Metrics::new("m", limits, false, Duration::ZERO);
        let (driver, handle) = driver::engine(model, metrics);
        let mut engine = JoinSet::new();
        engine.spawn(driver.run(CancellationToken::new()));
        bench.app.serve(handle);

        let mut stream = TcpStream::connect(bench.address).await.unwrap();
        let body = r#"{"prompt": "a", "max_tokens": 8000, "stream": true}"#;
        let head = ask(&mut stream, "POST", "/v1/completions", body).await;
        assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        bench.close.cancel();
        bench.tasks.join_next().await.unwrap().unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    }
}
