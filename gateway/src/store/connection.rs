//! (IO) Connections to a Redis or Valkey: made again when they break, with limits of time and of calls at once, and
//! left alone for a moment while the server fails.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Cmd, FromRedisValue, IntoConnectionInfo as _, Pipeline, RedisError, ScriptInvocation};
use tokio::sync::Semaphore;

use super::breaker::Breaker;
use super::{Error, OpenError};

/// Calls at one time; each may hold a piece of 256 KiB.
const MAX_CALLS: usize = 256;
/// To connect, within a cluster or a region.
const CONNECT: Duration = Duration::from_secs(2);
/// For an answer.
const ANSWER: Duration = Duration::from_secs(3);
/// What waits for the server's disk on purpose takes up to a second, and as long again behind another one.
const SETTLED: Duration = Duration::from_secs(5);
/// Attempts to connect in a row before callers are told.
const CONNECT_RETRIES: usize = 1;

/// A server.
pub(super) struct Connection {
    /// For everything that is answered at once.
    calls: ConnectionManager,
    /// For the one call that waits for the disk: everything behind it on its connection waits as well.
    waits: ConnectionManager,
    permits: Semaphore,
    breaker: Mutex<Breaker>,
}

/// Something to ask a server.
#[derive(Clone, Copy)]
pub(super) enum Ask<'a> {
    Command(&'a Cmd),
    Pipeline(&'a Pipeline),
    Script(&'a ScriptInvocation<'a>),
}

impl Connection {
    /// Connects when first asked.
    pub(super) fn open(url: &str, password: Option<&Path>) -> Result<Self, OpenError> {
        let mut info = url.into_connection_info().map_err(OpenError::Connect)?;
        if let Some(path) = password {
            let text = std::fs::read_to_string(path).map_err(|err| OpenError::Password {
                path: path.display().to_string(),
                err,
            })?;
            let redis = info.redis_settings().clone();
            info = info.set_redis_settings(redis.set_password(text.trim_end()));
        }
        let manager = |answer: Duration| {
            let client = redis::Client::open(info.clone())?;
            let config = ConnectionManagerConfig::new()
                .set_connection_timeout(Some(CONNECT))
                .set_response_timeout(Some(answer))
                .set_number_of_retries(CONNECT_RETRIES);
            ConnectionManager::new_lazy_with_config(client, config)
        };
        Ok(Self {
            calls: manager(ANSWER).map_err(OpenError::Connect)?,
            waits: manager(SETTLED).map_err(OpenError::Connect)?,
            permits: Semaphore::new(MAX_CALLS),
            breaker: Mutex::default(),
        })
    }

    /// Asks; once more if the connection turns out to be gone, so every call must bear to be made twice.
    pub(super) async fn ask<T: FromRedisValue>(&self, what: Ask<'_>) -> Result<T, Error> {
        self.ask_on(&self.calls, what).await
    }

    /// Asks what waits for the server's disk.
    pub(super) async fn wait<T: FromRedisValue>(&self, what: Ask<'_>) -> Result<T, Error> {
        self.ask_on(&self.waits, what).await
    }

    async fn ask_on<T: FromRedisValue>(
        &self,
        connection: &ConnectionManager,
        what: Ask<'_>,
    ) -> Result<T, Error> {
        let Ok(_permit) = self.permits.try_acquire() else {
            return Err(Error::Busy);
        };
        if !self.breaker().may_pass(penstock_shell::clock::now()) {
            return Err(Error::Away);
        }
        let mut result = send(connection.clone(), what).await;
        if result.as_ref().is_err_and(is_gone) {
            result = send(connection.clone(), what).await;
        }
        match result {
            Ok(value) => {
                self.breaker().succeeded();
                Ok(value)
            }
            Err(err) => {
                let err = told(err);
                match err {
                    Error::Away => {
                        if self.breaker().failed(penstock_shell::clock::now()) {
                            tracing::warn!("the store cannot be reached");
                        }
                    }
                    _ => self.breaker().succeeded(),
                }
                Err(err)
            }
        }
    }

    fn breaker(&self) -> std::sync::MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn send<T: FromRedisValue>(
    mut connection: ConnectionManager,
    what: Ask<'_>,
) -> Result<T, RedisError> {
    match what {
        Ask::Command(command) => command.query_async(&mut connection).await,
        Ask::Pipeline(pipeline) => pipeline.query_async(&mut connection).await,
        Ask::Script(script) => script.invoke_async(&mut connection).await,
    }
}

/// The connection was gone before, or broke: a new one may do.
fn is_gone(err: &RedisError) -> bool {
    !err.is_timeout() && (err.is_connection_dropped() || err.is_io_error())
}

fn told(err: RedisError) -> Error {
    match err.code() {
        // maxmemory, or a disk to which the log cannot be written.
        Some("OOM" | "MISCONF") => Error::Full,
        Some("LOADING" | "MASTERDOWN" | "READONLY" | "CLUSTERDOWN") => Error::Away,
        _ if err.is_timeout()
            || err.is_io_error()
            || err.is_connection_dropped()
            || err.is_connection_refusal() =>
        {
            Error::Away
        }
        _ => Error::Server(Arc::new(err)),
    }
}
