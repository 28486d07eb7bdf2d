//! (IO) Shutdown: the first SIGTERM or SIGINT cancels a token that every task of the process watches; the second one
//! ends the process, whatever is still under way.

use std::future::pending;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What shells add to the number of the signal that ended a process.
const KILLED: u8 = 128;
const SIGINT: u8 = 2;
const SIGTERM: u8 = 15;

/// Waits for SIGTERM or SIGINT and cancels `token`; then returns at the next of them, with the exit code of a process
/// that this signal killed. Cancel safe.
pub async fn on_signals(token: CancellationToken) -> u8 {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("signal handlers could not be installed; only SIGKILL stops this process");
        return pending().await;
    };
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => ("SIGTERM", SIGTERM),
            _ = interrupt.recv() => ("SIGINT", SIGINT),
        }
    };
    let (name, _) = next().await;
    tracing::info!(
        signal = name,
        "stopping; the next signal ends what is still under way"
    );
    token.cancel();
    let (name, number) = next().await;
    tracing::warn!(signal = name, "ended before everything was finished");
    KILLED + number
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::process::{Command, id};
    use std::task::Poll;
    use std::time::Duration;

    use super::*;

    fn kill(signal: &str) {
        let status = Command::new("kill")
            .args([signal, &id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }

    #[tokio::test]
    async fn the_first_signal_stops_and_the_second_ends() {
        let stop = CancellationToken::new();
        let mut signals = pin!(on_signals(stop.clone()));
        // The handlers are there once it was polled.
        assert!(once(signals.as_mut()).await.is_pending());
        assert!(!stop.is_cancelled());
        kill("-INT");
        let limit = Duration::from_secs(20);
        tokio::select! {
            _ = signals.as_mut() => panic!("one signal is no end"),
            stopped = tokio::time::timeout(limit, stop.cancelled()) => stopped.unwrap(),
        }
        kill("-TERM");
        let code = tokio::time::timeout(limit, signals).await.unwrap();
        assert_eq!(code, 143);
    }

    /// Polls once.
    async fn once<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
    }
}
