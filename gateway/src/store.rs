//! (IO) The store: what must outlive a connection or a process (jobs, files, their results). One file for one replica
//! ([`embedded`]), or a Redis or Valkey that all replicas share ([`redis`]); callers cannot tell which. Everything in
//! it has an end of life, and every value a bound. What was written is certain only after [`Store::settle`].
//!
//! Five shapes: values with a version, logs of numbered pieces, lists by time, shares of what somebody may have, and
//! one queue of jobs by class whose takers hold leases. What belongs to one job has one tag, and so lies in one slot of
//! a Redis Cluster.

mod breaker;
mod connection;
mod embedded;
mod redis;
mod spec;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use spec::{Spec, SpecError, Target};

/// Largest value, and largest piece of a log: four times what the gateway makes pieces of, and above the largest body
/// that it takes by default.
pub const MAX_VALUE_BYTES: usize = 64 << 20;
const HOUR_MS: u64 = 3_600_000;
/// The queue outlives the longest job by a day.
const QUEUE_KEPT: Duration = Duration::from_hours(8 * 24);

/// Where something is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    tag: String,
    part: &'static str,
    is_vital: bool,
}

impl Key {
    /// `part` of the thing that is named `tag`.
    pub fn new(tag: impl Into<String>, part: &'static str) -> Self {
        Self {
            tag: tag.into(),
            part,
            is_vital: false,
        }
    }

    /// As [`Key::new`]; for what must be written when callers have filled a file, which keeps room for it.
    pub fn vital(tag: impl Into<String>, part: &'static str) -> Self {
        Self {
            is_vital: true,
            ..Self::new(tag, part)
        }
    }
}

/// A value as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// Rises with each write.
    pub version: u64,
    /// What was written.
    pub value: Bytes,
}

/// Under which condition a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// None.
    Any,
    /// The value has this version still.
    Version(u64),
}

/// Part of a log: its number and its bytes. Numbers may be missing.
pub type Piece = (u64, Bytes);

/// A job that was taken from the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased {
    /// Its id.
    pub job: String,
    /// How often it was taken, this time included; what was given back uncounted left out.
    pub attempt: u32,
}

/// Whether what was written outlives the store's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is on the disk.
    Durable,
    /// The store keeps no log, or does not tell when it has written it.
    NotDurable,
}

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No room: the disk, the store's own limit, or the limit of a queue.
    #[error("the store is full")]
    Full,
    /// Not reached, or no answer in time.
    #[error("the store cannot be reached")]
    Away,
    /// More is asked at one time than it may be.
    #[error("the store has too much to do")]
    Busy,
    /// A value is larger than [`MAX_VALUE_BYTES`].
    #[error("a value is too large for the store")]
    TooLarge,
    /// The file failed.
    #[error("use the store's file")]
    File(#[source] Arc<redb::Error>),
    /// The server refused.
    #[error("use the store's server")]
    Server(#[source] Arc<::redis::RedisError>),
}

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its folder cannot be made.
    #[error("make the folder of the store {path}")]
    Folder {
        /// The file's path.
        path: String,
        /// Why.
        #[source]
        err: std::io::Error,
    },
    /// Its file cannot be opened.
    #[error("open the store {path}: one process at a time may have it")]
    File {
        /// The file's path.
        path: String,
        /// Why.
        #[source]
        err: Box<redb::Error>,
    },
    /// Its thread cannot be started.
    #[error("start the store's thread")]
    Thread(#[source] std::io::Error),
    /// Its credential cannot be read.
    #[error("read the store's password from {path}")]
    Password {
        /// The file's path.
        path: String,
        /// Why.
        #[source]
        err: std::io::Error,
    },
    /// Its address cannot be used.
    #[error("connect to the store")]
    Connect(#[source] ::redis::RedisError),
}

/// See the module.
pub enum Store {
    /// A file of this process.
    Embedded(embedded::Embedded),
    /// A server, or a cluster of them, that several processes share.
    Redis(Box<redis::Redis>),
}

/// Hands a call to whichever store it is.
macro_rules! either {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            Self::Embedded($store) => $call,
            Self::Redis($store) => $call,
        }
    };
}

impl Store {
    /// Opens the store. `space` keeps gateways apart that share a server. A server that is away is no error yet.
    pub fn open(spec: &Spec, space: &str) -> Result<Self, OpenError> {
        match &spec.target {
            Target::File(path) => {
                embedded::Embedded::open(path, spec.max_bytes).map(Self::Embedded)
            }
            Target::Redis(url) => redis::Redis::open(url, spec.password_file.as_deref(), space)
                .map(|redis| Self::Redis(Box::new(redis))),
        }
    }

    /// Reads a value.
    pub async fn get(&self, key: &Key) -> Result<Option<Versioned>, Error> {
        either!(self, store => store.get(key).await)
    }

    /// Reads a value, and what the store's clock says, in Unix ms.
    pub async fn get_at(&self, key: &Key) -> Result<(Option<Versioned>, u64), Error> {
        either!(self, store => store.get_at(key).await)
    }

    /// Writes a value that is forgotten after `ttl`; returns its new version, or `None` if `expect` does not hold.
    pub async fn put(
        &self,
        key: &Key,
        value: Bytes,
        expect: Expect,
        ttl: Duration,
    ) -> Result<Option<u64>, Error> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(Error::TooLarge);
        }
        either!(self, store => store.put(key, value, expect, ttl).await)
    }

    /// Forgets values and logs, all of one tag.
    pub async fn remove(&self, tag: &str, parts: &[&'static str]) -> Result<(), Error> {
        let keys: Vec<Key> = parts.iter().map(|part| Key::new(tag, part)).collect();
        either!(self, store => store.remove(keys).await)
    }

    /// Writes pieces of a log that is forgotten after `ttl`. Writing the same number again replaces the piece.
    pub async fn write(&self, log: &Key, pieces: Vec<Piece>, ttl: Duration) -> Result<(), Error> {
        if pieces
            .iter()
            .any(|(_, piece)| piece.len() > MAX_VALUE_BYTES)
        {
            return Err(Error::TooLarge);
        }
        if pieces.is_empty() {
            return Ok(());
        }
        either!(self, store => store.write(log, pieces, ttl).await)
    }

    /// The pieces of a log that exist among the `most` numbers after and with `from`, in order.
    pub async fn pieces(&self, log: &Key, from: u64, most: u64) -> Result<Vec<Piece>, Error> {
        either!(self, store => store.pieces(log, from, most).await)
    }

    /// Puts `member` into a list at a time, in Unix ms. What is older than `kept` leaves the list.
    pub async fn enlist(
        &self,
        list: &Key,
        member: &str,
        at_ms: u64,
        kept: Duration,
    ) -> Result<(), Error> {
        either!(self, store => store.enlist(list, member, at_ms, kept).await)
    }

    /// Takes `member` out of a list.
    pub async fn unlist(&self, list: &Key, member: &str) -> Result<(), Error> {
        either!(self, store => store.unlist(list, member).await)
    }

    /// Members behind `after`, newest or oldest first.
    pub async fn listed(
        &self,
        list: &Key,
        after: Option<&str>,
        newest_first: bool,
        most: usize,
    ) -> Result<Vec<String>, Error> {
        either!(self, store => store.listed(list, after, newest_first, most).await)
    }

    /// Puts a job into the queue, unless `most` are in it: [`Error::Full`].
    pub async fn enqueue(&self, class: &str, job: &str, most: u64) -> Result<(), Error> {
        either!(self, store => store.enqueue(class, job, most).await)
    }

    /// The classes that have jobs, in no order.
    pub async fn classes(&self) -> Result<Vec<String>, Error> {
        either!(self, store => store.classes().await)
    }

    /// Takes the first job of a class that nobody has. It is `owner`'s until `lease` is over, or renewed.
    pub async fn lease(
        &self,
        class: &str,
        owner: &str,
        lease: Duration,
    ) -> Result<Option<Leased>, Error> {
        either!(self, store => store.lease(class, owner, lease).await)
    }

    /// Keeps a job; `false` if it is not `owner`'s any more.
    pub async fn renew(
        &self,
        class: &str,
        job: &str,
        owner: &str,
        lease: Duration,
    ) -> Result<bool, Error> {
        either!(self, store => store.renew(class, job, owner, lease).await)
    }

    /// Gives a job back for others to take after a time; without `counted` as if it had not been taken.
    pub async fn release(
        &self,
        class: &str,
        job: &str,
        owner: &str,
        after: Duration,
        counted: bool,
    ) -> Result<(), Error> {
        either!(self, store => store.release(class, job, owner, after, counted).await)
    }

    /// Takes a job out of the queue, whoever has it; `false` if it was not there.
    pub async fn withdraw(&self, class: &str, job: &str) -> Result<bool, Error> {
        either!(self, store => store.withdraw(class, job).await)
    }

    /// Counts `amount` to `share` until `ends_ms`, in Unix ms; `false`, and nothing changed, if that would make more
    /// than `most` of all that has not come to its end. Ends are rounded up to hours.
    pub async fn claim(
        &self,
        share: &Key,
        amount: u64,
        ends_ms: u64,
        most: u64,
    ) -> Result<bool, Error> {
        let hour = ends_ms.div_ceil(HOUR_MS);
        either!(self, store => store.claim(share, amount, hour, most).await)
    }

    /// Counts `amount` no more, which was claimed until `ends_ms`.
    pub async fn unclaim(&self, share: &Key, amount: u64, ends_ms: u64) -> Result<(), Error> {
        let hour = ends_ms.div_ceil(HOUR_MS);
        either!(self, store => store.unclaim(share, amount, hour).await)
    }

    /// Waits until everything that was written before is on the disk, as far as the store can tell.
    pub async fn settle(&self) -> Result<Durability, Error> {
        either!(self, store => store.settle().await)
    }
}

#[cfg(test)]
pub(crate) mod tests;
