//! (IO) What one owner may have in the store, so that nobody fills what all share: bytes of files and responses, and
//! jobs that have not ended. What was counted and never given back (a process died) counts until its end of life.

use super::stored::Owner;
use crate::process::Process;
use crate::reject::Reject;
use crate::store::{Error, Key, Store};

/// Jobs of one gateway that have not ended.
const MAX_JOBS: u64 = 10_000;
/// Those of one owner.
const MAX_JOBS_OF_OWNER: u64 = 1_000;
/// A job that is older counts for nobody: its window is over.
const JOB_COUNTS_S: u64 = 25 * 3_600;

/// Bytes that count for an owner until an end of life.
#[derive(Clone, Debug)]
pub(super) struct Bytes {
    share: Key,
    ends_ms: u64,
}

impl Bytes {
    /// Until `ends_at`, in Unix seconds.
    pub(super) fn until(owner: &Owner, ends_at: u64) -> Self {
        Self {
            share: owner.list("bytes"),
            ends_ms: ends_at * 1_000,
        }
    }

    /// Counts `bytes` more, if the owner may have them.
    pub(super) async fn claim(
        &self,
        process: &Process,
        store: &Store,
        bytes: u64,
    ) -> Result<(), Reject> {
        let most = process.settings.limits.owner_bytes;
        if store.claim(&self.share, bytes, self.ends_ms, most).await? {
            Ok(())
        } else {
            Err(Reject::StorageQuota { max_bytes: most })
        }
    }

    /// Counts what was made already.
    pub(super) async fn add(&self, store: &Store, bytes: u64) -> Result<(), Error> {
        let most = u64::MAX;
        store.claim(&self.share, bytes, self.ends_ms, most).await?;
        Ok(())
    }

    /// Counts `bytes` no more.
    pub(super) async fn give_back(&self, store: &Store, bytes: u64) -> Result<(), Error> {
        store.unclaim(&self.share, bytes, self.ends_ms).await
    }
}

pub(super) fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// A job's place in the queue.
#[derive(Clone, Debug)]
pub(super) struct Queued {
    pub(super) class: String,
    pub(super) id: String,
    share: Key,
    ends_ms: u64,
}

impl Queued {
    pub(super) fn new(owner: &Owner, class: &str, id: &str, created_at: u64) -> Self {
        Self {
            class: class.to_owned(),
            id: id.to_owned(),
            share: owner.list("jobs"),
            ends_ms: (created_at + JOB_COUNTS_S) * 1_000,
        }
    }

    /// Puts a job into the queue and makes sure of everything about it.
    pub(super) async fn enter(&self, process: &Process, kind: &'static str) -> Result<(), Reject> {
        let store = process.jobs.store()?;
        let (share, ends_ms) = (&self.share, self.ends_ms);
        if !store.claim(share, 1, ends_ms, MAX_JOBS_OF_OWNER).await? {
            return Err(Reject::TooManyJobs);
        }
        if let Err(err) = store.enqueue(&self.class, &self.id, MAX_JOBS).await {
            store.unclaim(share, 1, ends_ms).await?;
            return Err(match err {
                Error::Full => Reject::TooManyJobs,
                err => err.into(),
            });
        }
        let durability = store.settle().await?;
        if process.jobs.metrics.settled(durability) {
            tracing::warn!(
                "the store does not say that it writes to a disk: jobs may be lost with it"
            );
        }
        process.jobs.metrics.accepted(kind);
        process.jobs.came.notify_one();
        Ok(())
    }

    /// Takes it out of the queue, if it is there.
    pub(super) async fn leave(&self, store: &Store) -> Result<(), Error> {
        if store.withdraw(&self.class, &self.id).await? {
            store.unclaim(&self.share, 1, self.ends_ms).await?;
        }
        Ok(())
    }
}
