//! (IO) `Books`: the accounts of a gateway. Once a second what requests took is told to the store, and leases are
//! renewed; while the store is away nobody waits for it.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use penstock_core::acks::LimitStand;
use penstock_core::ids::Id;
use tokio::sync::{Notify, oneshot, watch};

use super::account::{Account, Asking, Denied, Reserved, Standing};
use super::metrics::Metrics;
use super::{Limit, Share};
use crate::ledger::holder::Taken;
use crate::store::{Durability, Store};
use crate::upstream::Tasks;

/// Accounts at one time: 100,000 keys with three limits each. Beyond, requests are told that the store is too busy.
const MAX_ACCOUNTS: usize = 300_000;
/// Between two looks at what is to be told.
const EVERY: Duration = Duration::from_secs(1);
/// The same, where somebody may wait for it.
const SOON: Duration = Duration::from_millis(50);
/// Accounts that the store is told of at one time.
const AT_ONCE: usize = 64;
/// A store that did not answer is asked by one request in so many ms.
const AWAY_MS: u64 = 1_000;
/// Between two looks at whether the store keeps what it is told.
const LOOK_EVERY: Duration = Duration::from_mins(1);
/// Those of one limit that are reported; and of all: a ConfigMap has room for 1 MiB of all replicas.
const MAX_OF_LIMIT: usize = 8;
const MAX_REPORTED: usize = 128;
/// At the end the store is told everything within this time.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// A request that waits for what it needs. If it is given up, what it was given meanwhile goes back.
struct Awaited<'a> {
    books: &'a Arc<Books>,
    account: &'a Arc<Account>,
    told: oneshot::Receiver<Result<Taken, Denied>>,
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.told.close();
        if let Ok(Ok(taken)) = self.told.try_recv() {
            self.books.settle(self.account, taken, 0);
        }
    }
}

/// See the module.
pub(crate) struct Books {
    pub(crate) metrics: Metrics,
    store: Option<Arc<Store>>,
    /// This process among those that have leases: no other one has its name, nor this one after a restart.
    holder: String,
    started: Instant,
    accounts: RwLock<HashMap<(u128, u128), Arc<Account>>>,
    /// Until when the store is left alone, in the process's ms.
    away_until_ms: AtomicU64,
    /// Somebody may wait for what is to be told.
    soon: Notify,
    /// Whether the store keeps what it is told; `None`: it has not said so yet.
    durability: watch::Sender<Option<Durability>>,
}

impl Books {
    pub(crate) fn new(store: Option<Arc<Store>>, replica: &str, metrics: Metrics) -> Self {
        Self {
            metrics,
            store,
            holder: format!("{replica}-{:016x}", rand::random::<u64>()),
            started: penstock_shell::clock::now(),
            accounts: RwLock::default(),
            away_until_ms: AtomicU64::new(0),
            soon: Notify::new(),
            durability: watch::Sender::new(None),
        }
    }

    fn now_ms(&self) -> u64 {
        let since = penstock_shell::clock::now().saturating_duration_since(self.started);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// Takes `need` of a limit for a request. Called on the thread that `tasks` belongs to.
    pub(crate) async fn reserve(
        self: &Arc<Self>,
        tasks: &Tasks,
        share: &Share,
        limit: &Arc<Limit>,
        need: u64,
    ) -> Result<(Arc<Account>, Taken), Denied> {
        let now_ms = self.now_ms();
        let account = self.account(share, limit, now_ms).ok_or(Denied::Away)?;
        let may_ask = || self.store.is_some() && self.may_ask(now_ms);
        let (told, must_ask) = match account.reserve(limit, need, now_ms, may_ask) {
            Reserved::Taken(taken) => return Ok((account, taken)),
            Reserved::Denied(denied) => return Err(denied),
            Reserved::Waits { told, must_ask } => (told, must_ask),
        };
        if must_ask {
            let (books, account) = (Arc::clone(self), Arc::clone(&account));
            tasks.spawn(async move { books.ask(&account).await });
        }
        let mut awaited = Awaited {
            books: self,
            account: &account,
            told,
        };
        // Nobody answers where the worker's tasks have ended.
        let taken = (&mut awaited.told).await.unwrap_or(Err(Denied::Away))?;
        drop(awaited);
        Ok((account, taken))
    }

    /// What this gateway has of a limit; `None` if it has as many accounts as it may.
    pub(crate) fn account(
        &self,
        share: &Share,
        limit: &Arc<Limit>,
        now_ms: u64,
    ) -> Option<Arc<Account>> {
        let name = limit.account(&share.of);
        let known = self.accounts.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = known.get(&name) {
            return Some(Arc::clone(account));
        }
        drop(known);
        let mut accounts = self
            .accounts
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if accounts.len() >= MAX_ACCOUNTS {
            return None;
        }
        let account = accounts
            .entry(name)
            .or_insert_with(|| Arc::new(Account::new(limit, &share.of, now_ms)));
        Some(Arc::clone(account))
    }

    /// Counts what was not reserved.
    pub(crate) fn charge(&self, share: &Share, limit: &Arc<Limit>, amount: u64) {
        if let Some(account) = self.account(share, limit, self.now_ms()) {
            account.charge(amount);
        }
    }

    /// A request is over.
    pub(crate) fn settle(&self, account: &Account, taken: Taken, actual: u64) {
        if account.settle(taken, actual) {
            self.soon.notify_one();
        }
    }

    /// Whether the store is worth asking: it answers, or this is the one request that tries.
    fn may_ask(&self, now_ms: u64) -> bool {
        let until_ms = self.away_until_ms.load(Ordering::Relaxed);
        until_ms == 0
            || now_ms >= until_ms
                && self
                    .away_until_ms
                    .compare_exchange(
                        until_ms,
                        now_ms + AWAY_MS,
                        Ordering::Relaxed,
                        Ordering::Relaxed,
                    )
                    .is_ok()
    }

    async fn ask(&self, account: &Account) {
        let Some(store) = &self.store else { return };
        let asking = Asking {
            store,
            holder: &self.holder,
        };
        let until_ms = if account.ask(&asking, || self.now_ms()).await {
            0
        } else {
            self.now_ms() + AWAY_MS
        };
        self.away_until_ms.store(until_ms, Ordering::Relaxed);
    }

    /// Whether hard limits can be kept, as far as is known.
    pub(crate) fn is_durable(&self) -> bool {
        self.store.is_some() && *self.durability.borrow() != Some(Durability::NotDurable)
    }

    /// Tells when that may have changed.
    pub(crate) fn durability(&self) -> watch::Receiver<Option<Durability>> {
        self.durability.subscribe()
    }

    /// Asks whether the store keeps what it is told, if it is time to.
    async fn look(&self, looked: &mut Option<Instant>) {
        let Some(store) = &self.store else { return };
        let now = penstock_shell::clock::now();
        if looked.is_some_and(|at| now.saturating_duration_since(at) < LOOK_EVERY) {
            return;
        }
        if let Ok(found) = store.settle().await {
            *looked = Some(now);
            self.durability
                .send_if_modified(|known| known.replace(found) != Some(found));
        }
    }

    /// Tells the store what requests took, for as long as the process runs.
    pub(crate) async fn run(&self) {
        let mut looked = None;
        loop {
            let soon = async {
                self.soon.notified().await;
                tokio::time::sleep(SOON).await;
            };
            let _either = tokio::time::timeout(EVERY, soon).await;
            self.tell().await;
            self.look(&mut looked).await;
        }
    }

    /// Everything that is to be told now.
    async fn tell(&self) {
        let now_ms = self.now_ms();
        if !self.may_ask(now_ms) {
            return;
        }
        let all: Vec<Arc<Account>> = self.all();
        let due = all.iter().filter(|account| account.is_due(now_ms));
        let asking = futures::stream::iter(due);
        let asking = asking.for_each_concurrent(AT_ONCE, |account| self.ask(account));
        asking.await;
        if all.iter().any(|account| account.is_over(now_ms)) {
            let mut accounts = self
                .accounts
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let is_held = |account: &Arc<Account>| Arc::strong_count(account) > 2;
            accounts.retain(|_, account| is_held(account) || !account.is_over(now_ms));
        }
    }

    /// The process ends: gives everything back that is not used.
    pub(crate) async fn close(&self) {
        if self.store.is_none() {
            return;
        }
        let all = self.all();
        let asking = futures::stream::iter(&all);
        let asking = asking.for_each_concurrent(AT_ONCE, |account| async move {
            account.rest();
            if account.is_due(self.now_ms()) {
                self.ask(account).await;
            }
        });
        if tokio::time::timeout(LAST_WORDS, asking).await.is_err() {
            tracing::warn!("the store was not told of all leases: what is left of them is charged");
        }
    }

    fn all(&self) -> Vec<Arc<Account>> {
        let accounts = self.accounts.read().unwrap_or_else(PoisonError::into_inner);
        accounts.values().map(Arc::clone).collect()
    }

    /// How limits stand whose record was read, of each those who have used most.
    pub(crate) fn report(&self) -> Vec<LimitStand> {
        let mut standings = self.standings();
        standings.retain(|standing| standing.stand.now_ms > 0);
        standings.sort_by_key(|standing| Reverse(standing.used_permille()));
        let mut seen: HashMap<(Id, String), usize> = HashMap::new();
        standings.retain(|Standing { limit, .. }| {
            let name = (limit.budget.clone(), limit.name.clone());
            let count = seen.entry(name).or_default();
            *count += 1;
            *count <= MAX_OF_LIMIT
        });
        standings.truncate(MAX_REPORTED);
        standings.iter().map(Standing::report).collect()
    }

    /// How the accounts stand.
    pub(crate) fn standings(&self) -> Vec<Standing> {
        self.all()
            .iter()
            .map(|account| account.standing())
            .collect()
    }
}
