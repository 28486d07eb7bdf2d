//! (IO) One engine as a server: start-up, serving, and vLLM 0.32's two ways to stop.
//!
//! With no shutdown timeout, answers in flight end at once with HTTP 200 and `finish_reason: abort`. With one, they may
//! finish within it; meanwhile `/health` stays 200 and new requests get 500, exactly as a real vLLM misleads its
//! callers. The one difference: while a real vLLM loads it does not listen, this one answers 503 on every path.

mod body;
mod connections;
mod paths;

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::driver;
use crate::metrics::Metrics;
use crate::model::{LimitsError, Model};
use crate::settings::Settings;
use connections::BOUNDS;
use paths::App;

/// Why an engine did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings do not fit together.
    #[error("start the engine")]
    Limits(#[source] LimitsError),
    /// A task of the engine ended before shutdown.
    #[error("a task of the engine ended before shutdown")]
    Task,
}

/// Serves on `listener` until `shutdown` is cancelled, then drains or aborts as the settings say and returns. Not
/// cancel safe: dropping it cuts every answer.
pub async fn run(
    settings: Settings,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let step_time = settings.profile.step_time.slowed(settings.slowdown);
    let model = Model::new(settings.limits, step_time).map_err(Error::Limits)?;
    let app = Arc::new(App::new(settings.clone()));
    let (abort, close) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(connections::serve(
        listener,
        Arc::clone(&app),
        BOUNDS,
        close.clone(),
    ));
    let spinning = CancellationToken::new();
    let _stop_spinning = spinning.clone().drop_guard();

    let loaded = tokio::select! {
        () = shutdown.cancelled() => false,
        () = tokio::time::sleep(settings.startup_delay) => true,
    };
    if loaded {
        let created = penstock_shell::clock::since_epoch();
        let metrics = Metrics::new(
            &settings.served_model_name,
            settings.limits,
            settings.blocks_overridden,
            created,
        );
        let (driver, handle) = driver::engine(model, metrics);
        tasks.spawn(driver.run(abort.clone()));
        app.serve(handle);
        if settings.busy_loop {
            let spinning = spinning.clone();
            tasks.spawn_blocking(move || spin(&spinning));
        }
        tracing::info!(
            model.name = settings.served_model_name,
            profile.name = settings.profile.name,
            "engine serves"
        );
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = tasks.join_next() => return Err(Error::Task),
        }
        drain(&app, &settings).await;
    }

    abort.cancel();
    close.cancel();
    spinning.cancel();
    // The driver ends when the last way to it is gone.
    drop(app);
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        if ended.is_err() {
            result = Err(Error::Task);
        }
    }
    tracing::info!(model.name = settings.served_model_name, "engine stopped");
    result
}

/// Takes no more requests and waits for those in flight, no longer than the settings allow.
async fn drain(app: &App, settings: &Settings) {
    let idle = app.drain();
    if settings.shutdown_timeout.is_zero() {
        return;
    }
    tracing::info!(model.name = settings.served_model_name, "engine drains");
    if tokio::time::timeout(settings.shutdown_timeout, idle)
        .await
        .is_err()
    {
        tracing::warn!(
            model.name = settings.served_model_name,
            "shutdown timeout is over, requests are aborted"
        );
    }
}

/// Keeps one core busy until told to stop.
fn spin(stop: &CancellationToken) {
    // Often enough to stop within a millisecond, rarely enough not to be about the token.
    const SPINS_PER_CHECK: u32 = 1 << 16;
    while !stop.is_cancelled() {
        for _ in 0..SPINS_PER_CHECK {
            std::hint::spin_loop();
        }
    }
}
