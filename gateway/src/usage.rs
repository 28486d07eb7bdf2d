//! (IO) What callers took, summed up by day, caller, model and backend, for people who pay for it. Each gateway sums up
//! for itself and adds to the store's sums every few seconds; what a gateway had not added yet is lost with it, which
//! budgets are not (see `ledger`). The access log has a line for each request, and [`export`] sends one to where it is
//! wanted.

mod destination;
pub(crate) mod export;
mod line;
mod outbox;
pub(crate) mod sums;

pub use destination::{OpenError, Target};

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3Default;

use self::export::Export;
use self::line::Line;
use self::sums::{Day, Row, Sums};
use crate::openai::Api;
use crate::principal::Principal;
use crate::snapshot::Candidate;
use crate::store::{Error, Expect, Key, Store};

/// Between two additions to the store.
const EVERY: Duration = Duration::from_secs(10);
/// At the end they are added within this time.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How long a day's sums are kept: a quarter of a year, and the day after it.
const KEPT: Duration = Duration::from_hours(93 * 24);
/// The longest time that is told of at once.
pub(crate) const MAX_DAYS: u32 = 93;
/// Rows that wait to be added: callers times models times backends. What is beyond is summed up without its model.
const MAX_PENDING: usize = 10_000;
/// Writes of one day in a row that others were before in.
const MAX_RACES: usize = 32;
const DAY_MS: u64 = 86_400_000;

/// A request that took something.
pub(crate) struct Taken<'a> {
    /// The request's.
    pub(crate) id: &'a str,
    pub(crate) who: Option<&'a Principal>,
    /// As its caller called it.
    pub(crate) model: &'a str,
    pub(crate) api: Option<Api>,
    pub(crate) rule: &'a str,
    pub(crate) candidate: &'a Candidate,
    pub(crate) status: u16,
    pub(crate) outcome: &'a str,
    pub(crate) sums: Sums,
}

impl Taken<'_> {
    fn row(&self, model: &str) -> Row {
        let who = self.who;
        Row {
            team: who.map(|of| of.team.clone()).unwrap_or_default(),
            user: who.and_then(|of| of.user.clone()).unwrap_or_default(),
            key: who.map(|of| of.id.to_string()).unwrap_or_default(),
            model: model.to_owned(),
            backend: self.candidate.metrics.backend().to_owned(),
        }
    }

    fn line(&self) -> Line {
        Line {
            id: self.id.to_owned(),
            at_ms: penstock_shell::clock::unix_ms(),
            operation: self.api.map_or("", Api::operation).to_owned(),
            row: self.row(self.model),
            rule: self.rule.to_owned(),
            status: self.status,
            outcome: self.outcome.to_owned(),
            sums: self.sums,
            price: self.candidate.backend.profile.price,
        }
    }
}

/// See the module.
pub(crate) struct Usage {
    store: Option<Arc<Store>>,
    export: Option<Export>,
    pending: Mutex<HashMap<u128, (u32, Row, Sums)>>,
}

/// Today, in days since 1970 (UTC).
pub(crate) fn today() -> u32 {
    u32::try_from(penstock_shell::clock::unix_ms() / DAY_MS).unwrap_or(u32::MAX)
}

impl Usage {
    pub(crate) fn new(store: Option<Arc<Store>>, export: Option<Export>) -> Self {
        Self {
            store,
            export,
            pending: Mutex::default(),
        }
    }

    /// Whether sums are kept.
    pub(crate) fn is_kept(&self) -> bool {
        self.store.is_some()
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<u128, (u32, Row, Sums)>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is over that took something.
    pub(crate) fn note(&self, taken: &Taken<'_>) {
        if self.store.is_none() {
            return;
        }
        if let Some(export) = &self.export {
            export.push(&taken.line());
        }
        let day = today();
        let (who, backend) = (taken.who, taken.candidate.metrics.backend());
        let mut pending = self.pending();
        let mut model = taken.model;
        let mut name = named(day, who, model, backend);
        if pending.len() >= MAX_PENDING && !pending.contains_key(&name) {
            model = "";
            name = named(day, who, model, backend);
        }
        let entry = pending
            .entry(name)
            .or_insert_with(|| (day, taken.row(model), Sums::default()));
        entry.2.add(taken.sums);
    }

    /// Sends a line for each request where they are wanted, for as long as the process runs.
    pub(crate) async fn send(&self) {
        match &self.export {
            Some(export) => export.run().await,
            None => std::future::pending().await,
        }
    }

    /// Adds to the store every few seconds, for as long as the process runs.
    pub(crate) async fn run(&self) {
        loop {
            tokio::time::sleep(EVERY).await;
            self.add().await;
        }
    }

    /// The process ends.
    pub(crate) async fn close(&self) {
        let last = async {
            if let Some(export) = &self.export {
                export.write().await;
            }
            self.add().await;
        };
        if tokio::time::timeout(LAST_WORDS, last).await.is_err() {
            tracing::warn!("the store did not take the sums of what callers took last");
        }
    }

    async fn add(&self) {
        let Some(store) = &self.store else { return };
        let mut days: BTreeMap<u32, Day> = BTreeMap::new();
        for (day, row, sums) in std::mem::take(&mut *self.pending()).into_values() {
            days.entry(day).or_default().add(row, sums);
        }
        let any = !days.is_empty();
        for (number, day) in days {
            if let Err(err) = add_to(store, number, &day).await {
                tracing::debug!(error = %err, "sums of what callers took could not be stored yet");
                self.put_back(number, day);
            }
        }
        if any && let Err(err) = store.settle().await {
            tracing::debug!(error = %err, "whether sums are on the store's disk is not known");
        }
    }

    /// What could not be added comes with the next ones.
    fn put_back(&self, number: u32, day: Day) {
        let mut pending = self.pending();
        for (row, sums) in day.into_rows() {
            let mut hash = Xxh3Default::new();
            row.feed(|part| hash.update(part.as_bytes()));
            hash.update(&number.to_le_bytes());
            let name = hash.digest128();
            if pending.len() < 2 * MAX_PENDING || pending.contains_key(&name) {
                let entry = pending
                    .entry(name)
                    .or_insert_with(|| (number, row, Sums::default()));
                entry.2.add(sums);
            }
        }
    }

    /// The sums of these days, those that are still to be added included.
    pub(crate) async fn of(&self, from: u32, to: u32) -> Result<BTreeMap<u32, Day>, Error> {
        let mut days = BTreeMap::new();
        let Some(store) = &self.store else {
            return Ok(days);
        };
        self.add().await;
        for number in from..=to {
            if let Some(found) = store.get(&key(number)).await? {
                days.insert(number, read(&found.value));
            }
        }
        Ok(days)
    }
}

fn named(day: u32, who: Option<&Principal>, model: &str, backend: &str) -> u128 {
    let mut hash = Xxh3Default::new();
    hash.update(&day.to_le_bytes());
    if let Some(who) = who {
        for part in [&who.id.namespace, &who.id.name, &who.team] {
            hash.update(part.as_bytes());
            hash.update(&[0]);
        }
        hash.update(who.user.as_deref().unwrap_or("").as_bytes());
    }
    for part in [model, backend] {
        hash.update(&[0]);
        hash.update(part.as_bytes());
    }
    hash.digest128()
}

fn key(day: u32) -> Key {
    Key::new(format!("usage:{day}"), "sums")
}

/// Sums that cannot be read are as none; what is added from then on counts.
fn read(value: &Bytes) -> Day {
    serde_json::from_slice(value).unwrap_or_else(|err| {
        tracing::error!(error = %err, "the sums of a day cannot be read, and begin anew");
        Day::default()
    })
}

async fn add_to(store: &Store, number: u32, day: &Day) -> Result<(), Error> {
    let key = key(number);
    for _ in 0..MAX_RACES {
        let found = store.get(&key).await?;
        let version = found.as_ref().map_or(0, |found| found.version);
        let mut sums = found.map_or_else(Day::default, |found| read(&found.value));
        sums.extend(day);
        // Maps with text keys and integers always have a JSON form.
        let value = serde_json::to_vec(&sums).unwrap_or_default();
        let put = store.put(&key, value.into(), Expect::Version(version), KEPT);
        if put.await?.is_some() {
            return Ok(());
        }
    }
    Err(Error::Busy)
}
