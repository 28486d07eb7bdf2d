//! (IO) Connections to a Redis or Valkey, or to a cluster of them: made again when they break, with limits of time and
//! of calls at once, and left alone for a moment while the server fails.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig};
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{MultipleNodeRoutingInfo, RoutingInfo};
use redis::{
    Cmd, ConnectionInfo, ErrorKind, FromRedisValue, IntoConnectionInfo as _, Pipeline, RedisError,
    ScriptInvocation, Value,
};
use tokio::sync::{OnceCell, Semaphore};

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
/// Attempts of one call at a cluster: a slot may have moved, and move again.
const CLUSTER_RETRIES: u32 = 3;
/// Between two of them, in ms.
const CLUSTER_PAUSE_MS: u64 = 100;

/// A server, or a cluster.
pub(super) struct Connection {
    /// For everything that is answered at once.
    calls: Link,
    /// For the one call that waits for the disk: everything behind it on its connection waits as well.
    waits: Link,
    permits: Semaphore,
    breaker: Mutex<Breaker>,
}

/// Something to ask a server.
#[derive(Clone, Copy)]
pub(super) enum Ask<'a> {
    Command(&'a Cmd),
    Pipeline(&'a Pipeline),
    Script(&'a ScriptInvocation<'a>),
    /// Each server that has keys of its own; the answer is a list.
    Each(&'a Cmd),
}

/// See [`Connection`].
enum Link {
    Server(ConnectionManager),
    Cluster(Box<Cluster>),
}

struct Cluster {
    client: ClusterClient,
    /// Made when it is first needed.
    connection: OnceCell<ClusterConnection>,
}

impl Connection {
    /// Connects when first asked.
    pub(super) fn open(url: &str, password: Option<&Path>) -> Result<Self, OpenError> {
        let password = match password {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|err| OpenError::Password {
                    path: path.display().to_string(),
                    err,
                })?;
                Some(text.trim_end().to_owned())
            }
        };
        let open = |answer| Link::open(url, password.as_deref(), answer);
        Ok(Self {
            calls: open(ANSWER).map_err(OpenError::Connect)?,
            waits: open(SETTLED).map_err(OpenError::Connect)?,
            permits: Semaphore::new(MAX_CALLS),
            breaker: Mutex::default(),
        })
    }

    /// Whether it is a cluster.
    pub(super) fn is_cluster(&self) -> bool {
        matches!(self.calls, Link::Cluster(_))
    }

    /// Asks; once more if the connection turns out to be gone, so every call must bear to be made twice.
    pub(super) async fn ask<T: FromRedisValue>(&self, what: Ask<'_>) -> Result<T, Error> {
        self.ask_on(&self.calls, what).await
    }

    /// Asks what waits for the server's disk.
    pub(super) async fn wait<T: FromRedisValue>(&self, what: Ask<'_>) -> Result<T, Error> {
        self.ask_on(&self.waits, what).await
    }

    async fn ask_on<T: FromRedisValue>(&self, link: &Link, what: Ask<'_>) -> Result<T, Error> {
        let Ok(_permit) = self.permits.try_acquire() else {
            return Err(Error::Busy);
        };
        if !self.breaker().may_pass(penstock_shell::clock::now()) {
            return Err(Error::Away);
        }
        let mut result = link.send(what).await;
        if result.as_ref().is_err_and(is_gone) {
            result = link.send(what).await;
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

impl Link {
    fn open(url: &str, password: Option<&str>, answer: Duration) -> Result<Self, RedisError> {
        let with_password = |info: ConnectionInfo| match password {
            None => info,
            Some(password) => {
                let redis = info.redis_settings().clone();
                info.set_redis_settings(redis.set_password(password))
            }
        };
        let Some((scheme, hosts)) = url.split_once("-cluster://") else {
            let client = redis::Client::open(with_password(url.into_connection_info()?))?;
            let config = ConnectionManagerConfig::new()
                .set_connection_timeout(Some(CONNECT))
                .set_response_timeout(Some(answer))
                .set_number_of_retries(CONNECT_RETRIES);
            let manager = ConnectionManager::new_lazy_with_config(client, config)?;
            return Ok(Self::Server(manager));
        };
        let (user, hosts) = hosts.split_once('@').unwrap_or(("", hosts));
        let nodes = hosts.split(',').map(|host| {
            let at = if user.is_empty() { "" } else { "@" };
            let url = format!("{scheme}://{user}{at}{host}");
            Ok(with_password(url.into_connection_info()?))
        });
        let nodes: Result<Vec<ConnectionInfo>, RedisError> = nodes.collect();
        let client = ClusterClientBuilder::new(nodes?)
            .connection_timeout(CONNECT)
            .response_timeout(answer)
            .retries(CLUSTER_RETRIES)
            .max_retry_wait(CLUSTER_PAUSE_MS)
            .build()?;
        Ok(Self::Cluster(Box::new(Cluster {
            client,
            connection: OnceCell::new(),
        })))
    }

    async fn send<T: FromRedisValue>(&self, what: Ask<'_>) -> Result<T, RedisError> {
        match self {
            Self::Server(manager) => {
                let mut connection = manager.clone();
                if let Ask::Each(command) = what {
                    let value: Value = command.query_async(&mut connection).await?;
                    return Ok(redis::from_redis_value(Value::Array(vec![value]))?);
                }
                send(&mut connection, what).await
            }
            Self::Cluster(cluster) => {
                let connect = || cluster.client.get_async_connection();
                let connection = cluster.connection.get_or_try_init(connect);
                let mut connection = connection.await?.clone();
                if let Ask::Each(command) = what {
                    let all = (MultipleNodeRoutingInfo::AllMasters, None);
                    let routing = RoutingInfo::MultiNode(all);
                    let told = connection.route_command(command.clone(), routing).await?;
                    return of_each(told);
                }
                send(&mut connection, what).await
            }
        }
    }
}

/// The answers of a cluster's servers, without who gave which.
fn of_each<T: FromRedisValue>(told: Value) -> Result<T, RedisError> {
    let Value::Map(told) = told else {
        let kind = ErrorKind::UnexpectedReturnType;
        return Err((kind, "a cluster's servers did not answer one by one").into());
    };
    let mut answers = Vec::new();
    for (_, answer) in told {
        match answer {
            Value::ServerError(err) => return Err(err.into()),
            answer => answers.push(answer),
        }
    }
    Ok(redis::from_redis_value(Value::Array(answers))?)
}

async fn send<T: FromRedisValue>(
    connection: &mut impl ConnectionLike,
    what: Ask<'_>,
) -> Result<T, RedisError> {
    match what {
        Ask::Command(command) | Ask::Each(command) => command.query_async(connection).await,
        Ask::Pipeline(pipeline) => pipeline.query_async(connection).await,
        Ask::Script(script) => script.invoke_async(connection).await,
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
        Some("LOADING" | "MASTERDOWN" | "READONLY" | "CLUSTERDOWN" | "TRYAGAIN") => Error::Away,
        _ if err.is_timeout()
            || err.kind() == ErrorKind::ClusterConnectionNotFound
            || err.is_io_error()
            || err.is_connection_dropped()
            || err.is_connection_refusal() =>
        {
            Error::Away
        }
        _ => Error::Server(Arc::new(err)),
    }
}
