//! (IO) The store in a file of this process. One thread has the file: whatever came while it was busy becomes one
//! transaction, so many that wait for the disk wait for one write of it. A file that failed (a full disk) is opened
//! anew for the next call.

mod tables;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use redb::{Database, Durability as Sync, WriteTransaction};
use tokio::sync::oneshot;

use super::{Durability, Error, Expect, HOUR_MS, Key, Leased, OpenError, Piece, Versioned};

/// Calls that wait for the thread; each may hold a piece of 256 KiB.
const MAX_WAITING: usize = 256;
/// Calls in one transaction.
const MAX_TOGETHER: usize = 64;
/// Pages that are kept in memory.
const CACHE_BYTES: usize = 16 << 20;
/// How long what nobody waits for may be in memory only.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Transactions without a look for what has expired, while there is something to do.
const SWEEP_EVERY: u32 = 256;

/// This part of a file is only for what must be written; budgets of a thousand owners take some MiB.
const VITAL_PART: u64 = 20;

/// Tells the caller how its call and its transaction ended.
type Done = Box<dyn FnOnce(Result<(), Error>) + Send>;
type Work = Box<dyn FnOnce(&WriteTransaction) -> (Result<(), redb::Error>, Done) + Send>;

struct Message {
    work: Work,
    effect: Effect,
}

/// What a call leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Effect {
    Nothing,
    /// It may be written later.
    Written,
    /// It must be on the disk before the call ends.
    Settled,
}

/// A file.
pub struct Embedded {
    /// `None` while it closes.
    calls: Option<SyncSender<Message>>,
    thread: Option<JoinHandle<()>>,
    max_bytes: u64,
}

impl Embedded {
    pub(super) fn open(path: &Path, max_bytes: u64) -> Result<Self, OpenError> {
        let name = path.display().to_string();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|err| OpenError::Folder {
                path: name.clone(),
                err,
            })?;
        }
        let path = path.to_owned();
        let open = move || {
            let mut builder = Database::builder();
            prepared(builder.set_cache_size(CACHE_BYTES).create(&path)?)
        };
        Self::start(open, &name, max_bytes)
    }

    fn start(
        open: impl Fn() -> Result<Database, redb::Error> + Send + 'static,
        name: &str,
        max_bytes: u64,
    ) -> Result<Self, OpenError> {
        let first = open().map_err(|err| OpenError::File {
            path: name.to_owned(),
            err: Box::new(err),
        })?;
        let (calls, waiting) = sync_channel(MAX_WAITING);
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || serve(&waiting, first, open))
            .map_err(OpenError::Thread)?;
        Ok(Self {
            calls: Some(calls),
            thread: Some(thread),
            max_bytes,
        })
    }

    /// Has `work` done within a transaction; what it returns counts once that is committed.
    async fn call<T: Send + 'static>(
        &self,
        effect: Effect,
        work: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let work: Work = Box::new(move |transaction| {
            let (value, result) = match work(transaction) {
                Ok(value) => (Some(value), Ok(())),
                Err(err) => (None, Err(err)),
            };
            let done: Done = Box::new(move |ended| {
                // Nobody waits any more if the caller has left.
                let _ = reply.send(ended.and_then(|()| value.ok_or(Error::Away)));
            });
            (result, done)
        });
        let calls = self.calls.as_ref().ok_or(Error::Away)?;
        calls
            .try_send(Message { work, effect })
            .map_err(|err| match err {
                TrySendError::Full(_) => Error::Busy,
                TrySendError::Disconnected(_) => Error::Away,
            })?;
        answer.await.map_err(|_| Error::Away)?
    }

    /// Up to where the file may be filled for `key`.
    fn room(&self, key: &Key) -> u64 {
        if key.is_vital {
            self.max_bytes
        } else {
            self.max_bytes - self.max_bytes / VITAL_PART
        }
    }

    pub(super) async fn get(&self, key: &Key) -> Result<Option<Versioned>, Error> {
        let key = name(key);
        let now_ms = penstock_shell::clock::unix_ms();
        self.call(Effect::Nothing, move |tx| tables::get(tx, &key, now_ms))
            .await
    }

    pub(super) async fn get_at(&self, key: &Key) -> Result<(Option<Versioned>, u64), Error> {
        let value = self.get(key).await?;
        Ok((value, penstock_shell::clock::unix_ms()))
    }

    pub(super) async fn put(
        &self,
        key: &Key,
        value: Bytes,
        expect: Expect,
        ttl: Duration,
    ) -> Result<Option<u64>, Error> {
        let (room, key) = (self.room(key), name(key));
        let now_ms = penstock_shell::clock::unix_ms();
        let ends_ms = now_ms.saturating_add(ms(ttl));
        self.call(Effect::Written, move |tx| {
            if !tables::has_room(tx, value.len(), room)? {
                return Ok(Err(Error::Full));
            }
            tables::put(tx, &key, &value, expect, now_ms, ends_ms).map(Ok)
        })
        .await?
    }

    pub(super) async fn remove(&self, keys: Vec<Key>) -> Result<(), Error> {
        self.call(Effect::Written, move |tx| {
            keys.iter()
                .try_for_each(|key| tables::remove(tx, &name(key)))
        })
        .await
    }

    pub(super) async fn write(
        &self,
        log: &Key,
        pieces: Vec<Piece>,
        ttl: Duration,
    ) -> Result<(), Error> {
        let (room, log) = (self.room(log), name(log));
        let ends_ms = penstock_shell::clock::unix_ms().saturating_add(ms(ttl));
        self.call(Effect::Written, move |tx| {
            let bytes = pieces.iter().map(|(_, piece)| piece.len()).sum();
            if !tables::has_room(tx, bytes, room)? {
                return Ok(Err(Error::Full));
            }
            tables::write(tx, &log, &pieces, ends_ms).map(Ok)
        })
        .await?
    }

    pub(super) async fn pieces(
        &self,
        log: &Key,
        from: u64,
        most: u64,
    ) -> Result<Vec<Piece>, Error> {
        let log = name(log);
        let now_ms = penstock_shell::clock::unix_ms();
        self.call(Effect::Nothing, move |tx| {
            tables::pieces(tx, &log, from, most, now_ms)
        })
        .await
    }

    pub(super) async fn enlist(
        &self,
        list: &Key,
        member: &str,
        at_ms: u64,
        kept: Duration,
    ) -> Result<(), Error> {
        let (list, member) = (name(list), member.to_owned());
        let oldest_ms = at_ms.saturating_sub(ms(kept));
        self.call(Effect::Written, move |tx| {
            tables::enlist(tx, &list, &member, at_ms, oldest_ms)
        })
        .await
    }

    pub(super) async fn unlist(&self, list: &Key, member: &str) -> Result<(), Error> {
        let (list, member) = (name(list), member.to_owned());
        self.call(Effect::Written, move |tx| {
            tables::unlist(tx, &list, &member)
        })
        .await
    }

    pub(super) async fn listed(
        &self,
        list: &Key,
        after: Option<&str>,
        newest_first: bool,
        most: usize,
    ) -> Result<Vec<String>, Error> {
        let (list, after) = (name(list), after.map(str::to_owned));
        self.call(Effect::Nothing, move |tx| {
            tables::listed(tx, &list, after.as_deref(), newest_first, most)
        })
        .await
    }

    pub(super) async fn enqueue(&self, class: &str, job: &str, most: u64) -> Result<(), Error> {
        let (class, job) = (class.to_owned(), job.to_owned());
        let now_ms = penstock_shell::clock::unix_ms();
        let entered = self
            .call(Effect::Written, move |tx| {
                tables::enqueue(tx, &class, &job, most, now_ms)
            })
            .await?;
        if entered { Ok(()) } else { Err(Error::Full) }
    }

    pub(super) async fn classes(&self) -> Result<Vec<String>, Error> {
        self.call(Effect::Nothing, tables::classes).await
    }

    pub(super) async fn lease(
        &self,
        class: &str,
        owner: &str,
        lease: Duration,
    ) -> Result<Option<Leased>, Error> {
        let (class, owner) = (class.to_owned(), owner.to_owned());
        let now_ms = penstock_shell::clock::unix_ms();
        let until_ms = now_ms.saturating_add(ms(lease));
        self.call(Effect::Written, move |tx| {
            tables::lease(tx, &class, &owner, now_ms, until_ms)
        })
        .await
    }

    pub(super) async fn renew(
        &self,
        class: &str,
        job: &str,
        owner: &str,
        lease: Duration,
    ) -> Result<bool, Error> {
        let (class, job, owner) = (class.to_owned(), job.to_owned(), owner.to_owned());
        let until_ms = penstock_shell::clock::unix_ms().saturating_add(ms(lease));
        self.call(Effect::Written, move |tx| {
            tables::hold(tx, &class, &job, &owner, until_ms, tables::Hold::Keep)
        })
        .await
    }

    pub(super) async fn release(
        &self,
        class: &str,
        job: &str,
        owner: &str,
        after: Duration,
        counted: bool,
    ) -> Result<(), Error> {
        let (class, job, owner) = (class.to_owned(), job.to_owned(), owner.to_owned());
        let from_ms = penstock_shell::clock::unix_ms().saturating_add(ms(after));
        let hold = tables::Hold::GiveBack { counted };
        self.call(Effect::Written, move |tx| {
            tables::hold(tx, &class, &job, &owner, from_ms, hold)
        })
        .await?;
        Ok(())
    }

    pub(super) async fn withdraw(&self, class: &str, job: &str) -> Result<bool, Error> {
        let (class, job) = (class.to_owned(), job.to_owned());
        self.call(Effect::Written, move |tx| {
            tables::withdraw(tx, &class, &job)
        })
        .await
    }

    pub(super) async fn claim(
        &self,
        share: &Key,
        amount: u64,
        hour: u64,
        most: u64,
    ) -> Result<bool, Error> {
        let share = name(share);
        let this_hour = penstock_shell::clock::unix_ms() / HOUR_MS;
        self.call(Effect::Written, move |tx| {
            tables::claim(tx, &share, amount, hour, this_hour, most)
        })
        .await
    }

    pub(super) async fn unclaim(&self, share: &Key, amount: u64, hour: u64) -> Result<(), Error> {
        let share = name(share);
        self.call(Effect::Written, move |tx| {
            tables::unclaim(tx, &share, amount, hour)
        })
        .await
    }

    pub(super) async fn settle(&self) -> Result<Durability, Error> {
        self.call(Effect::Settled, tables::mark).await?;
        Ok(Durability::Durable)
    }
}

impl Drop for Embedded {
    /// Waits until the file is closed: the next process, or the next gateway of this one, may open it then.
    fn drop(&mut self) {
        self.calls = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's thread ended early");
        }
    }
}

fn name(key: &Key) -> String {
    format!("{}/{}", key.tag, key.part)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// With all tables.
fn prepared(database: Database) -> Result<Database, redb::Error> {
    let transaction = database.begin_write()?;
    tables::make(&transaction)?;
    transaction.commit()?;
    Ok(database)
}

/// Serves calls until nobody can make any more.
fn serve(
    calls: &Receiver<Message>,
    first: Database,
    open: impl Fn() -> Result<Database, redb::Error>,
) {
    let mut database = Some(first);
    let mut unsynced = false;
    let mut rounds = 0_u32;
    loop {
        let mut batch = Vec::new();
        let mut ended = false;
        match calls.recv_timeout(SYNC_EVERY) {
            Ok(message) => {
                batch.push(message);
                batch.extend(calls.try_iter().take(MAX_TOGETHER - 1));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => ended = true,
        }
        rounds = rounds.wrapping_add(1);
        let sweeps = batch.is_empty() || rounds.is_multiple_of(SWEEP_EVERY);
        if batch.is_empty() && !unsynced && !sweeps {
            continue;
        }
        let usable = match database.take() {
            Some(database) => Ok(database),
            None => open(),
        };
        match usable {
            Ok(open) => {
                let round = Round {
                    batch,
                    unsynced,
                    sweeps,
                };
                match round.run(&open) {
                    Ok(left) => {
                        unsynced = left;
                        database = Some(open);
                    }
                    Err(err) => {
                        tracing::error!(error = %err, "the store's file failed");
                        unsynced = false;
                    }
                }
            }
            // The callers learn from their replies, which are dropped.
            Err(err) => tracing::error!(error = %err, "the store's file cannot be opened"),
        }
        if ended {
            return;
        }
    }
}

/// What becomes one transaction.
struct Round {
    batch: Vec<Message>,
    /// Earlier transactions are in memory only.
    unsynced: bool,
    sweeps: bool,
}

impl Round {
    /// Returns whether something is in memory only. After an error the file must be opened anew.
    fn run(self, database: &Database) -> Result<bool, Error> {
        let idle = self.batch.is_empty();
        let mut effect = if idle && self.unsynced {
            Effect::Settled
        } else {
            Effect::Nothing
        };
        let mut transaction = database.begin_write().map_err(|err| told(err.into()))?;
        let mut dones = Vec::new();
        let mut failed = None;
        for message in self.batch {
            effect = effect.max(message.effect);
            let (result, done) = (message.work)(&transaction);
            dones.push(done);
            if let Err(err) = result {
                failed = Some(told(err));
                break;
            }
        }
        if self.sweeps && failed.is_none() {
            match tables::sweep(&transaction, penstock_shell::clock::unix_ms()) {
                Ok(0) => {}
                Ok(_) => effect = effect.max(Effect::Written),
                Err(err) => failed = Some(told(err)),
            }
        }
        let ended = match (failed, effect) {
            (Some(err), _) => Err(err),
            (None, Effect::Nothing) => transaction.abort().map_err(|err| told(err.into())),
            (None, _) => {
                let sync = if effect == Effect::Settled {
                    Sync::Immediate
                } else {
                    Sync::None
                };
                transaction
                    .set_durability(sync)
                    .map_err(|err| told(err.into()))
                    .and_then(|()| transaction.commit().map_err(|err| told(err.into())))
            }
        };
        for done in dones {
            done(ended.clone());
        }
        ended?;
        Ok(match effect {
            Effect::Nothing => self.unsynced,
            Effect::Written => true,
            Effect::Settled => false,
        })
    }
}

fn told(err: redb::Error) -> Error {
    let is_full = |err: &std::io::Error| {
        matches!(
            err.kind(),
            std::io::ErrorKind::StorageFull
                | std::io::ErrorKind::QuotaExceeded
                | std::io::ErrorKind::FileTooLarge
        )
    };
    match &err {
        redb::Error::Io(io) if is_full(io) => Error::Full,
        _ => Error::File(Arc::new(err)),
    }
}

#[cfg(test)]
mod tests;
