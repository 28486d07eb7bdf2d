//! (IO) A line for each request, for who pays: written into the store within a second, and from there sent where
//! `--usage-export` says. What is in the store outlives the gateway: another replica sends it. Lines come at least
//! once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use rustls::ClientConfig;

use super::destination::{Destination, OpenError, Target, Trouble};
use super::line::Line;
use super::outbox::Outbox;
use crate::store::{Error, Expect, Key, Store};

/// Between two writes into the store: what a gateway that dies may lose.
const WRITE: Duration = Duration::from_secs(1);
/// Writes between two times that something is sent; the first lines after a rest are sent at once.
const SEND_EVERY: u32 = 10;
/// What another replica wrote is hers for so long, and then anybody's.
const ORPHAN_MS: u64 = 60_000;
/// A place that is away for longer loses lines.
const KEPT: Duration = Duration::from_hours(7 * 24);
/// Batches that are looked at, and what one object may hold.
const MAX_BATCHES: usize = 256;
const MAX_OBJECT_BYTES: usize = 8 << 20;
/// Lines of one batch: a store takes larger values, and others wait behind them.
const MAX_BATCH_BYTES: usize = 1 << 20;

const LINES: &str = "lines";
const CLAIM: &str = "claim";

/// What is counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    sent_bytes: Counter,
    failures: Counter,
    lost: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let usage = registry.sub_registry_with_prefix("penstock_gateway_usage_export");
        let (sent, failures) = (metrics.sent_bytes.clone(), metrics.failures.clone());
        usage.register("bytes", "Lines of usage that were sent, in bytes", sent);
        usage.register(
            "failures",
            "Objects or requests that could not be sent yet",
            failures,
        );
        let lost = metrics.lost.clone();
        usage.register(
            "lost",
            "Requests whose line found no room while the store was away",
            lost,
        );
        metrics
    }
}

/// See the module.
pub(crate) struct Export {
    store: Arc<Store>,
    destination: Destination,
    replica: String,
    outbox: Outbox,
    batches: AtomicU64,
    metrics: Metrics,
}

/// Why nothing was sent.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Store(#[from] Error),
    #[error(transparent)]
    Destination(#[from] Trouble),
}

fn listed() -> Key {
    Key::new("usage", "batches")
}

fn tag(batch: &str) -> String {
    format!("usage-{batch}")
}

/// When a batch was written, in Unix ms, and by whom.
fn origin(batch: &str) -> Option<(u64, &str)> {
    let (at_ms, rest) = batch.split_once('_')?;
    let (replica, _) = rest.rsplit_once('_')?;
    Some((at_ms.parse().ok()?, replica))
}

impl Export {
    pub(crate) fn open(
        store: Arc<Store>,
        target: &Target,
        tls: &ClientConfig,
        replica: &str,
        metrics: Metrics,
    ) -> Result<Self, OpenError> {
        let is_kept = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        Ok(Self {
            store,
            destination: Destination::open(target, tls)?,
            replica: replica.replace(|c: char| !is_kept(c), "-"),
            outbox: Outbox::default(),
            batches: AtomicU64::new(0),
            metrics,
        })
    }

    pub(super) fn push(&self, line: &Line) {
        self.outbox.push(line);
    }

    /// Writes and sends, for as long as the process runs.
    pub(super) async fn run(&self) {
        let mut since = SEND_EVERY;
        loop {
            tokio::time::sleep(WRITE).await;
            since += 1;
            self.write().await;
            if since < SEND_EVERY {
                continue;
            }
            match self.send().await {
                Ok(false) => {}
                Ok(true) => since = 0,
                Err(err) => {
                    since = 0;
                    self.metrics.failures.inc();
                    tracing::warn!(error = %err, "lines of usage could not be sent yet");
                }
            }
        }
    }

    /// Writes what waits into the store.
    pub(super) async fn write(&self) {
        let (mut lines, lost) = self.outbox.take();
        self.metrics.lost.inc_by(lost);
        if lost > 0 {
            tracing::error!(
                lost,
                "requests have no line of usage: the store is away for too long"
            );
        }
        let any = !lines.is_empty();
        while !lines.is_empty() {
            let rest = lines.split_off(end(&lines, MAX_BATCH_BYTES));
            if let Err(err) = self.write_batch(&lines).await {
                tracing::debug!(error = %err, "lines of usage could not be stored yet");
                lines.extend(rest);
                return self.outbox.put_back(lines);
            }
            lines = rest;
        }
        if any && let Err(err) = self.store.settle().await {
            tracing::debug!(error = %err, "whether lines of usage are on the store's disk is not known");
        }
    }

    async fn write_batch(&self, lines: &[u8]) -> Result<(), Error> {
        let now_ms = penstock_shell::clock::unix_ms();
        let number = self.batches.fetch_add(1, Ordering::Relaxed);
        let batch = format!("{now_ms:013}_{}_{number}", self.replica);
        let (key, value) = (Key::new(tag(&batch), LINES), Bytes::copy_from_slice(lines));
        self.store.put(&key, value, Expect::Any, KEPT).await?;
        self.store.enlist(&listed(), &batch, now_ms, KEPT).await
    }

    /// Sends what this replica wrote, and what nobody has sent who ought to. Returns whether there was anything.
    async fn send(&self) -> Result<bool, Failure> {
        let mut any = false;
        loop {
            let batches = self
                .store
                .listed(&listed(), None, false, MAX_BATCHES)
                .await?;
            let (mut taken, mut lines) = (Vec::new(), Vec::new());
            for batch in batches {
                if !self.may_send(&batch).await? {
                    continue;
                }
                let found = self.store.get(&Key::new(tag(&batch), LINES)).await?;
                let found = found.map(|found| found.value).unwrap_or_default();
                if lines.len() + found.len() > MAX_OBJECT_BYTES && !lines.is_empty() {
                    break;
                }
                lines.extend_from_slice(&found);
                taken.push(batch);
            }
            let Some(first) = taken.first() else {
                return Ok(any);
            };
            any = true;
            let bytes = u64::try_from(lines.len()).unwrap_or(u64::MAX);
            if bytes > 0 {
                let name = object(first);
                let put = self.destination.put(&name, lines.into(), &self.replica);
                put.await?;
            }
            for batch in &taken {
                self.store.remove(&tag(batch), &[LINES, CLAIM]).await?;
                self.store.unlist(&listed(), batch).await?;
            }
            self.metrics.sent_bytes.inc_by(bytes);
        }
    }

    async fn may_send(&self, batch: &str) -> Result<bool, Error> {
        let Some((at_ms, replica)) = origin(batch) else {
            return Ok(true);
        };
        if replica == self.replica {
            return Ok(true);
        }
        if penstock_shell::clock::unix_ms() < at_ms.saturating_add(ORPHAN_MS) {
            return Ok(false);
        }
        // One of those who see it first; another one after a while, should that one die too.
        let (key, value) = (Key::new(tag(batch), CLAIM), Bytes::from_static(b"1"));
        let ttl = Duration::from_millis(ORPHAN_MS);
        let claimed = self.store.put(&key, value, Expect::Version(0), ttl).await?;
        Ok(claimed.is_some())
    }
}

/// Where the last whole line ends within `most` bytes, or the first one if it is longer.
fn end(lines: &[u8], most: usize) -> usize {
    if lines.len() <= most {
        return lines.len();
    }
    let within = memchr::memrchr(b'\n', &lines[..most]);
    let at = within.or_else(|| memchr::memchr(b'\n', lines));
    at.map_or(lines.len(), |at| at + 1)
}

/// The object for batches of which this is the first: in a folder for each day, in UTC.
fn object(batch: &str) -> String {
    let at_ms = origin(batch).map_or(0, |(at_ms, _)| at_ms);
    let at = i64::try_from(at_ms)
        .ok()
        .map(jiff::Timestamp::from_millisecond);
    let at = at
        .and_then(Result::ok)
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let day = at.to_zoned(jiff::tz::TimeZone::UTC).date();
    format!("date={day}/{batch}.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Spec;
    use crate::trust::Trust;
    use crate::usage::line::tests::line;

    #[test]
    fn batches_are_whole_lines() {
        assert_eq!(end(b"ab\ncd\n", 100), 6);
        assert_eq!(end(b"ab\ncd\n", 5), 3);
        assert_eq!(end(b"ab\ncd\n", 3), 3);
        assert_eq!(end(b"abcdef\ng\n", 3), 7);
        assert_eq!(end(b"abcdef", 3), 6);
    }

    #[test]
    fn a_batch_says_when_it_was_written_and_by_whom() {
        let batch = "1795000000123_default-gateway-5d9c_7";
        assert_eq!(
            origin(batch),
            Some((1_795_000_000_123, "default-gateway-5d9c"))
        );
        assert_eq!(origin("x"), None);
        assert_eq!(object(batch), format!("date=2026-11-18/{batch}.jsonl"));
    }

    fn sent(folder: &std::path::Path) -> Vec<String> {
        let mut ids = Vec::new();
        for day in std::fs::read_dir(folder).unwrap() {
            for object in std::fs::read_dir(day.unwrap().path()).unwrap() {
                let text = std::fs::read_to_string(object.unwrap().path()).unwrap();
                ids.extend(text.lines().map(|line| {
                    let line: Line = serde_json::from_str(line).unwrap();
                    line.id
                }));
            }
        }
        ids.sort_unstable();
        ids
    }

    #[tokio::test]
    async fn lines_of_a_gateway_that_is_gone_are_sent_by_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let spec: Spec = format!("file:{}", folder.path().join("store.redb").display())
            .parse()
            .unwrap();
        let store = Arc::new(Store::open(&spec, "").unwrap());
        let usage = folder.path().join("usage");
        let trust = Trust::new(None).unwrap();
        let open = |replica: &str| {
            let target = Target::Folder(usage.clone());
            let (store, metrics) = (Arc::clone(&store), Metrics::default());
            Export::open(store, &target, trust.usual(), replica, metrics).unwrap()
        };
        let (own, other) = (open("127.0.0.1:80"), open("other_1"));
        own.push(&line("own"));
        own.write().await;
        other.push(&line("others"));
        other.write().await;
        let mut text = Vec::new();
        line("gone").write(&mut text);
        let (batch, at) = (
            "0000000000001_gone_0",
            Key::new(tag("0000000000001_gone_0"), LINES),
        );
        store
            .put(&at, text.into(), Expect::Any, KEPT)
            .await
            .unwrap();
        let now_ms = penstock_shell::clock::unix_ms();
        store.enlist(&listed(), batch, now_ms, KEPT).await.unwrap();
        assert!(own.send().await.unwrap());
        assert_eq!(sent(&usage), ["gone", "own"]);
        assert!(!own.send().await.unwrap());
        assert!(other.send().await.unwrap());
        assert_eq!(sent(&usage), ["gone", "others", "own"]);
        let left = store.listed(&listed(), None, false, 10).await.unwrap();
        assert_eq!(left, [] as [String; 0]);
    }

    #[test]
    fn what_waits_is_bounded_and_counted() {
        let outbox = Outbox::default();
        for _ in 0..100_000 {
            outbox.push(&line("x"));
        }
        let (lines, lost) = outbox.take();
        assert!(lost > 0 && lines.len() < (17 << 20));
        outbox.put_back(lines);
        outbox.push(&line("x"));
        assert_eq!(outbox.take().1, 1);
    }
}
