//! (IO) Keys in the gateway's store, for those who have too many for objects of a cluster: made, changed and taken back
//! on the admin port ([`api`]), and known by every replica within a second. Of a key the store has the hash, as a
//! config has it; a replica asks for one when it is shown and remembers what it is told.
//!
//! Who changes a key writes down that it was changed, behind the change itself. Each replica reads those notes four
//! times a second, and what was read before a change counts no more from then on.

pub(crate) mod api;
mod news;
mod record;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use penstock_core::ids::Id;
use penstock_core::key::{Hash, hexadecimal};

use self::news::{Heard, Mark, Told};
use self::record::Record;
use crate::halves::Halves;
use crate::principal::{Known, Principal};
use crate::process::Process;
use crate::reject::Reject;
use crate::store::{Error, Expect, Key, Store};

/// What stands for a namespace in the ids of these keys; none of a cluster's is called so.
pub(crate) const NAMESPACE: &str = "_store";
/// Between two looks at what was changed.
const EVERY: Duration = Duration::from_millis(250);
/// Keys that are remembered.
const PLACES: usize = 131_072;
/// Their locks, and reads of the store at one time.
const SHARDS: usize = 16;
/// Without news of the store for so long, what is remembered counts no more: a key may have been taken back.
const TRUSTED_S: u64 = 300;
/// What is no key may be one soon, where a store was filled from a backup.
const NOBODY_S: u64 = 5;
/// How long a request waits for the store.
const WAIT: Duration = Duration::from_secs(2);
/// As good as for ever: who wants an end says so in the key.
const KEPT: Duration = Duration::from_hours(10 * 365 * 24);
/// Notes of one change in a row that others were before in.
const MAX_RACES: usize = 64;

/// Whose a text is.
#[derive(Clone, Debug)]
pub(crate) enum Owner {
    Caller(Known),
    Nobody,
    /// Nobody knows yet: see [`StoredKeys::read`].
    Unread,
}

#[derive(Clone, Debug)]
struct Entry {
    /// `None` for what is nobody's.
    of: Option<Known>,
    read: Mark,
    read_s: u64,
}

/// See the module.
pub(crate) struct StoredKeys {
    store: Option<Arc<Store>>,
    /// Of the policies that keys name.
    namespace: String,
    shards: [Mutex<Halves<Hash, Entry>>; SHARDS],
    /// One read of a shard at a time, so that many requests with the same key ask once.
    reads: [tokio::sync::Mutex<()>; SHARDS],
    heard: RwLock<Heard>,
    /// When the store told what was changed last, in Unix seconds; 0: never.
    heard_s: AtomicU64,
}

const RECORD: &str = "record";
const NAME: &str = "name";

/// What belongs to the key of this name.
fn tag(name: &str) -> String {
    format!("key-{name}")
}

/// What belongs to a text with this hash.
fn tag_of_hash(hash: &str) -> String {
    format!("key-hash-{hash}")
}

fn record_key(name: &str) -> Key {
    Key::new(tag(name), RECORD)
}

/// Where the name of the key with this hash is.
fn name_key(hash: &str) -> Key {
    Key::new(tag_of_hash(hash), NAME)
}

fn all_names() -> Key {
    Key::new("keys", "names")
}

fn changes() -> Key {
    Key::new("keys", "changes")
}

fn now_s() -> u64 {
    penstock_shell::clock::since_epoch().as_secs()
}

fn read<T: serde::de::DeserializeOwned + Default>(value: &[u8]) -> T {
    serde_json::from_slice(value).unwrap_or_else(|err| {
        tracing::error!(error = %err, "what the store has of keys cannot be read");
        T::default()
    })
}

impl fmt::Debug for StoredKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoredKeys")
    }
}

impl StoredKeys {
    pub(crate) fn new(store: Option<Arc<Store>>, namespace: &str) -> Self {
        Self {
            store,
            namespace: namespace.to_owned(),
            shards: std::array::from_fn(|_| Mutex::new(Halves::new(PLACES / SHARDS))),
            reads: std::array::from_fn(|_| tokio::sync::Mutex::default()),
            heard: RwLock::default(),
            heard_s: AtomicU64::new(0),
        }
    }

    /// Whose the text with this hash is, as far as it is known now.
    pub(crate) fn find(&self, hash: &Hash, now_s: u64) -> Owner {
        if self.store.is_none() {
            return Owner::Nobody;
        }
        if !self.is_trusted(now_s) {
            return Owner::Unread;
        }
        let Some(entry) = self.shard(hash).get(hash) else {
            return Owner::Unread;
        };
        match entry.of {
            Some(known) if self.heard().may_be(&known.principal.id.name, entry.read) => {
                Owner::Caller(known)
            }
            None if now_s < entry.read_s.saturating_add(NOBODY_S) => Owner::Nobody,
            _ => Owner::Unread,
        }
    }

    /// Asks the store whose the text with this hash is; then [`Self::find`] knows.
    pub(crate) async fn read(&self, hash: &Hash) -> Result<(), Reject> {
        let read = tokio::time::timeout(WAIT, self.read_once(hash)).await;
        match read {
            Ok(Ok(())) => Ok(()),
            Ok(Err(err)) => {
                tracing::debug!(error = %err, "a key could not be read");
                Err(Reject::KeysUnavailable { unread: None })
            }
            Err(_) => Err(Reject::KeysUnavailable { unread: None }),
        }
    }

    async fn read_once(&self, hash: &Hash) -> Result<(), Error> {
        let Some(store) = &self.store else {
            return Ok(());
        };
        let _alone = self.reads[place(hash)].lock().await;
        if !self.is_trusted(now_s()) {
            self.listen(store).await?;
        }
        if !matches!(self.find(hash, now_s()), Owner::Unread) {
            return Ok(());
        }
        let read = self.heard().mark();
        let text = hexadecimal(hash);
        let mut of = None;
        if let Some(name) = store.get(&name_key(&text)).await? {
            let name = String::from_utf8_lossy(&name.value).into_owned();
            let found = record(store, &name).await?;
            // Else a text that it had once, or that was made for nothing.
            of = found.and_then(|found| {
                let until_s = *found.hashes.get(&text)?;
                let principal = Arc::new(self.principal(&name, &found)?);
                Some(Known { principal, until_s })
            });
        }
        let entry = Entry {
            of,
            read,
            read_s: now_s(),
        };
        self.shard(hash).put(*hash, entry);
        Ok(())
    }

    /// The caller of this name, as long as it may call.
    pub(crate) async fn of(&self, id: &Id) -> Result<Arc<Principal>, Reject> {
        let store = self.store.as_ref().ok_or(Reject::KeyUnknown)?;
        let unavailable = Reject::KeysUnavailable { unread: None };
        let found = record(store, &id.name).await.map_err(|_| unavailable)?;
        let principal = found.and_then(|found| self.principal(&id.name, &found));
        let principal = principal.ok_or(Reject::KeyUnknown)?;
        principal.check(now_s())?;
        Ok(Arc::new(principal))
    }

    fn principal(&self, name: &str, record: &Record) -> Option<Principal> {
        let key = record.spec.read(&self.namespace).inspect_err(|err| {
            tracing::error!(key = name, error = %err, "a key in the store cannot be used");
        });
        Some(Principal::of_key(&Id::new(NAMESPACE, name), &key.ok()?))
    }

    fn is_trusted(&self, now_s: u64) -> bool {
        let heard_s = self.heard_s.load(Ordering::Relaxed);
        heard_s > 0 && now_s <= heard_s.saturating_add(TRUSTED_S)
    }

    fn shard(&self, hash: &Hash) -> MutexGuard<'_, Halves<Hash, Entry>> {
        let shard = &self.shards[place(hash)];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self) -> std::sync::RwLockReadGuard<'_, Heard> {
        self.heard.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears what was changed.
    async fn listen(&self, store: &Store) -> Result<(), Error> {
        let asked_s = now_s();
        let found = store.get(&changes()).await?;
        let number = found.as_ref().map_or(0, |found| found.version);
        let told: Told = found.map_or_else(Told::default, |found| read(&found.value));
        let is_news = number != self.heard().number();
        if is_news {
            let mut heard = self.heard.write().unwrap_or_else(PoisonError::into_inner);
            heard.hear(number, &told);
        }
        self.heard_s.store(asked_s, Ordering::Relaxed);
        Ok(())
    }

    /// Tells all gateways that a key was changed, this one at once.
    async fn tell(&self, store: &Store, name: &str) -> Result<(), Error> {
        let at = changes();
        for _ in 0..MAX_RACES {
            let found = store.get(&at).await?;
            let version = found.as_ref().map_or(0, |found| found.version);
            let mut told: Told = found.map_or_else(Told::default, |found| read(&found.value));
            told.add(version + 1, name);
            // A list of numbers and names always has a JSON form.
            let value = Bytes::from(serde_json::to_vec(&told).unwrap_or_default());
            let put = store.put(&at, value, Expect::Version(version), KEPT);
            if put.await?.is_some() {
                return self.listen(store).await;
            }
        }
        Err(Error::Busy)
    }
}

/// Which lock is a hash's.
fn place(hash: &Hash) -> usize {
    usize::from(hash[0]) % SHARDS
}

async fn record(store: &Store, name: &str) -> Result<Option<Record>, Error> {
    let found = store.get(&record_key(name)).await?;
    Ok(found.and_then(|found| read(&found.value)))
}

/// Listens for changes where keys are managed, for as long as the process runs.
pub(crate) async fn run(process: Arc<Process>) {
    let keys = &process.stored_keys;
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(store) = &keys.store else { continue };
        let is_managed = {
            let snapshot = process.snapshot.load();
            let callers = snapshot.as_ref().and_then(|of| of.config.callers.as_ref());
            callers.is_some_and(|callers| callers.admin.is_some())
        };
        if is_managed && let Err(err) = keys.listen(store).await {
            tracing::debug!(error = %err, "the store does not say which keys were changed");
        }
    }
}
