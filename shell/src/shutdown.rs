//! (IO) Shutdown: the first SIGTERM or SIGINT cancels a token that every task of the process watches.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Waits for SIGTERM or SIGINT, then cancels `token`. Returns early when the token is cancelled elsewhere.
/// Cancel safe.
pub async fn on_signal(token: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("signal handlers could not be installed; only SIGKILL stops this process");
        return token.cancelled().await;
    };
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        () = token.cancelled() => return,
    };
    tracing::info!(signal = name, "stopping");
    token.cancel();
}
