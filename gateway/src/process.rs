//! (IO) `Process`: the state that all workers of a gateway share, and what each worker has for itself.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::ArcSwapOption;
use http::{HeaderMap, HeaderValue};
use rustls::ClientConfig;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::balance::prefix_affinity::PrefixIndex;
use crate::budgets::books::Books;
use crate::classifier::Desk;
use crate::identity::sets::Sets;
use crate::jobs::Jobs;
use crate::join::Batches;
use crate::load::Ledger;
use crate::metrics::Metrics;
use crate::queue::Queue;
use crate::resume::Streams;
use crate::settings::Settings;
use crate::snapshot::{Parts, Snapshot};
use crate::stored_keys::StoredKeys;
use crate::suspects::Suspects;
use crate::trust::Trust;
use crate::upstream::Tasks;
use crate::usage::Usage;

/// Bodies up to this size are bounded by the number of requests; only what is above counts against
/// `total_body_bytes`, so that usual requests touch no shared counter.
const UNCOUNTED_BODY_BYTES: usize = 64 << 10;

/// What works with the store, or goes without it.
pub(crate) struct Stored {
    pub(crate) jobs: Jobs,
    pub(crate) books: Books,
    pub(crate) usage: Usage,
    pub(crate) keys: StoredKeys,
}

/// Shared by all workers.
pub(crate) struct Process {
    pub(crate) settings: Settings,
    /// What requests are answered from.
    pub(crate) snapshot: ArcSwapOption<Snapshot>,
    /// Counts snapshots, so that held requests can wait for the next one.
    pub(crate) version: watch::Sender<u64>,
    pub(crate) ledger: Ledger,
    /// Requests that wait for room.
    pub(crate) queue: Arc<Queue>,
    /// Which endpoint was sent which prompts.
    prefixes: Arc<PrefixIndex>,
    /// Requests that ended their backends.
    pub(crate) suspects: Suspects,
    /// What tokens of callers are verified by.
    pub(crate) key_sets: Arc<Sets>,
    /// Callers' keys in the store.
    pub(crate) stored_keys: Arc<StoredKeys>,
    pub(crate) metrics: Metrics,
    /// Whom backends are believed to be by.
    trust: Trust,
    pub(crate) jobs: Jobs,
    /// What this gateway has of budgets.
    pub(crate) books: Arc<Books>,
    /// What callers took.
    pub(crate) usage: Arc<Usage>,
    /// Who wants to know what a text is about asks there.
    pub(crate) desk: Desk,
    /// Streams that callers may come back to.
    pub(crate) streams: Arc<Streams>,
    pub(crate) draining: AtomicBool,
    is_stopping: AtomicBool,
    /// Of it each worker has a child.
    stopping: CancellationToken,
    body_bytes: AtomicUsize,
    /// `1.1 <token>`, added to each request that goes upstream.
    pub(crate) via: HeaderValue,
    /// How this gateway calls itself in `Via`; the same for all its replicas.
    pub(crate) via_token: String,
    started: Instant,
    /// Unix ms.
    pub(crate) process_start_ms: u64,
}

impl Process {
    pub(crate) fn new(
        settings: Settings,
        metrics: Metrics,
        trust: Trust,
        stored: Stored,
        streams: Streams,
    ) -> Arc<Self> {
        let via_token = format!(
            "penstock-{}-{}",
            settings.gateway.namespace, settings.gateway.name
        );
        Arc::new(Self {
            snapshot: ArcSwapOption::empty(),
            version: watch::Sender::new(0),
            ledger: Ledger::new(settings.workers),
            queue: Arc::default(),
            prefixes: Arc::default(),
            suspects: Suspects::default(),
            key_sets: Arc::default(),
            stored_keys: Arc::new(stored.keys),
            metrics,
            trust,
            jobs: stored.jobs,
            books: Arc::new(stored.books),
            usage: Arc::new(stored.usage),
            desk: Desk::default(),
            streams: Arc::new(streams),
            draining: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            stopping: CancellationToken::new(),
            body_bytes: AtomicUsize::new(0),
            via: HeaderValue::from_str(&format!("1.1 {via_token}"))
                .unwrap_or(HeaderValue::from_static("1.1 penstock")),
            via_token,
            started: penstock_shell::clock::now(),
            process_start_ms: penstock_shell::clock::unix_ms(),
            settings,
        })
    }

    /// What builds snapshots.
    pub(crate) fn parts(&self) -> Parts<'_> {
        Parts {
            ledger: &self.ledger,
            metrics: &self.metrics,
            now_ms: self.ms(penstock_shell::clock::now()),
            place: &self.settings.place,
            workers: self.settings.workers,
            queue: &self.queue,
            prefixes: &self.prefixes,
            trust: &self.trust,
            key_sets: &self.key_sets,
            stored_keys: &self.stored_keys,
        }
    }

    /// TLS towards who is nobody's backend.
    pub(crate) fn tls(&self) -> &ClientConfig {
        self.trust.usual()
    }

    /// Ms since the process started.
    pub(crate) fn ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The limit of the drain is reached: streams that are open end.
    pub(crate) fn stop_streams(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        self.stopping.cancel();
    }

    /// Whether the limit of the drain is reached.
    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }

    /// The region that a request of `peer` came from, if that is known.
    pub(crate) fn region_of<'a>(&'a self, peer: IpAddr, headers: &'a HeaderMap) -> Option<&'a str> {
        let told = self.settings.origins.told(peer, headers);
        told.or(self.settings.place.region.as_deref())
    }

    /// That, if it is another region than this gateway's.
    pub(crate) fn elsewhere<'a>(&self, region: Option<&'a str>) -> Option<&'a str> {
        region.filter(|region| self.settings.place.region.as_deref() != Some(region))
    }

    /// Room for a body of this many bytes, if there is any.
    pub(crate) fn lease_body(self: &Arc<Self>, bytes: usize) -> Option<BodyLease> {
        let counted = bytes.saturating_sub(UNCOUNTED_BODY_BYTES);
        if counted == 0 {
            return Some(BodyLease {
                process: None,
                bytes: 0,
            });
        }
        let limit = self.settings.limits.total_body_bytes;
        let before = self.body_bytes.fetch_add(counted, Ordering::AcqRel);
        let lease = BodyLease {
            process: Some(Arc::clone(self)),
            bytes: counted,
        };
        (before.saturating_add(counted) <= limit).then_some(lease)
    }
}

/// Room for one request body; given back when dropped.
pub(crate) struct BodyLease {
    process: Option<Arc<Process>>,
    bytes: usize,
}

impl Drop for BodyLease {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.body_bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        }
    }
}

/// One worker's own state.
pub(crate) struct Worker {
    pub(crate) process: Arc<Process>,
    /// Its number, which selects its pools and ledger shards.
    pub(crate) index: usize,
    /// Ms since the process started, advanced by the worker's ticks.
    pub(crate) clock: Arc<AtomicU64>,
    /// Open connections.
    pub(crate) connections: AtomicUsize,
    /// Calls that are being joined.
    pub(crate) batches: Batches,
    /// What drives its connections to backends.
    pub(crate) tasks: Tasks,
    /// Streams that go on without their callers, and what keeps streams for callers to come back.
    pub(crate) streams: Tasks,
    /// Cancelled when the limit of a drain is reached. Its streams share its lock with no other worker's.
    pub(crate) stopping: CancellationToken,
    id_start: u64,
    ids: AtomicU64,
}

impl Worker {
    pub(crate) fn new(process: &Arc<Process>, index: usize) -> Arc<Self> {
        Arc::new(Self {
            process: Arc::clone(process),
            index,
            clock: Arc::default(),
            connections: AtomicUsize::new(0),
            batches: Batches::default(),
            tasks: Tasks::default(),
            streams: Tasks::default(),
            stopping: process.stopping.child_token(),
            id_start: rand::random(),
            ids: AtomicU64::new(0),
        })
    }

    /// A request id that no other request of any replica has.
    pub(crate) fn request_id(&self) -> HeaderValue {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        let mut text = [0; 32];
        for (index, place) in text.iter_mut().enumerate() {
            let (word, digit) = if index < 16 {
                (self.id_start, index)
            } else {
                (number, index - 16)
            };
            let nibble = usize::try_from((word >> (60 - 4 * digit)) & 15).unwrap_or(0);
            *place = b"0123456789abcdef"[nibble];
        }
        HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("0"))
    }
}
