//! (IO) `run`: the whole gateway. Starts workers, hands them connections, turns what the sources publish into
//! snapshots, serves the admin port, and drains when told to stop.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use penstock_core::config::Enforcement;
use penstock_core::ids::BackendId;
use penstock_shell::admin::{self, Readiness};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::budgets;
use crate::budgets::books::Books;
use crate::certificates::Certificates;
use crate::identity::follow;
use crate::jobs::{self, Jobs};
use crate::metrics::Metrics;
use crate::probe;
use crate::process::{Process, Stored, Worker};
use crate::resume::{self, Streams};
use crate::scrape;
use crate::settings::Settings;
use crate::snapshot::Snapshot;
use crate::source::{Applied, Sources};
use crate::store::{OpenError, Store};
use crate::stored_keys::{self, StoredKeys};
use crate::trust::{TlsError, Trust, Unsecured};
use crate::usage::export::{self, Export};
use crate::usage::{self, Usage};
use crate::worker::{self, Arrival, Signals};

/// After the limit of a drain streams have this long to tell their callers that they end.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Callers who come before the first config wait for it, for so long: a gateway that starts again has it in an instant.
const FIRST_CONFIG: Duration = Duration::from_secs(2);
/// Between two reports of how limits stand, which become a write of each replica and one of the operator.
const REPORT_EVERY: Duration = Duration::from_mins(1);
/// After an accept that failed, for instance for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a gateway cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// TLS towards backends cannot be set up.
    #[error("set up connections to backends")]
    Tls(#[source] TlsError),
    /// The store cannot be opened.
    #[error("open the store")]
    Store(#[source] OpenError),
    /// A worker's thread or runtime cannot be started.
    #[error("start a worker")]
    StartWorker(#[source] std::io::Error),
    /// Nothing can be sent to where usage goes.
    #[error("send usage")]
    Usage(#[source] usage::OpenError),
    /// A worker ended though nothing told it to.
    #[error("a worker ended by itself")]
    WorkerEnded,
    /// The admin port failed.
    #[error("serve the admin port")]
    Admin(#[source] std::io::Error),
}

/// Where a gateway is reached.
#[derive(Debug)]
pub struct Listeners {
    /// Requests in the clear.
    pub http: TcpListener,
    /// Requests over TLS, with the certificates of [`Settings::tls`].
    pub https: Option<TcpListener>,
    /// `/healthz`, `/readyz`, `/metrics`, `/config` and `/load`.
    pub admin: TcpListener,
}

/// Serves until `shutdown`, then drains.
///
/// Dropping the future stops accepting and aborts what is in progress.
pub async fn run(
    settings: Settings,
    sources: Sources,
    listeners: Listeners,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let trust = Trust::new(settings.upstream_ca.as_deref()).map_err(Error::Tls)?;
    let store = open_store(&settings)?.map(Arc::new);
    let budgets = budgets::metrics::Metrics::register(&mut registry);
    let export = open_export(&settings, store.as_ref(), &trust, &mut registry)?;
    let stored = Stored {
        books: Books::new(store.clone(), &settings.replica, budgets),
        usage: Usage::new(store.clone(), export),
        keys: StoredKeys::new(store.clone(), &settings.gateway.namespace),
        jobs: Jobs::new(store, jobs::Metrics::register(&mut registry)),
    };
    let streams = Streams::register(&mut registry);
    let process = Process::new(settings, metrics, trust, stored, streams);
    let readiness = Readiness::default();
    let signals = Signals {
        drain: CancellationToken::new(),
        abort: CancellationToken::new(),
    };
    let _abort = signals.abort.clone().drop_guard();
    let (mut workers, handed) = start_workers(&process, &signals)?;

    let stopped = CancellationToken::new();
    let _stop = stopped.clone().drop_guard();
    let mut tasks: JoinSet<Result<(), Error>> = JoinSet::new();
    let router =
        admin::router(readiness.clone(), Arc::new(registry)).merge(crate::admin::routes(&process));
    tasks.spawn({
        let stopped = stopped.clone();
        async move {
            admin::serve(listeners.admin, router, stopped)
                .await
                .map_err(Error::Admin)
        }
    });
    tasks.spawn(follow(
        Arc::clone(&process),
        sources,
        readiness.clone(),
        shutdown.clone(),
    ));
    look_around(&process, &mut tasks);
    let accepting = CancellationToken::new();
    let (http, https) = (listeners.http, listeners.https);
    open(&process, http, https, handed, &accepting, &mut tasks);

    let failed = tokio::select! {
        () = shutdown.cancelled() => None,
        Some(ended) = tasks.join_next() => ended.ok().and_then(Result::err),
        Some(_) = workers.join_next() => Some(Error::WorkerEnded),
    };
    process.draining.store(true, Ordering::Relaxed);
    readiness.set(false);
    if failed.is_none() {
        drain(&process, &accepting, &signals, &mut workers).await;
    }
    accepting.cancel();
    signals.abort.cancel();
    while workers.join_next().await.is_some() {}
    stopped.cancel();
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
    process.books.close().await;
    process.usage.close().await;
    failed.map_or(Ok(()), Err)
}

/// What goes on beside requests.
fn look_around(process: &Arc<Process>, tasks: &mut JoinSet<Result<(), Error>>) {
    tasks.spawn({
        let process = Arc::clone(process);
        async move {
            scrape::run(process).await;
            Ok(())
        }
    });
    tasks.spawn({
        let process = Arc::clone(process);
        async move {
            probe::run(process).await;
            Ok(())
        }
    });
    tasks.spawn({
        let process = Arc::clone(process);
        async move {
            follow::run(process).await;
            Ok(())
        }
    });
    tasks.spawn({
        let process = Arc::clone(process);
        async move {
            stored_keys::run(process).await;
            Ok(())
        }
    });
    tasks.spawn({
        let books = Arc::clone(&process.books);
        async move {
            books.run().await;
            Ok(())
        }
    });
    tasks.spawn({
        let usage = Arc::clone(&process.usage);
        async move {
            usage.run().await;
            Ok(())
        }
    });
    tasks.spawn({
        let usage = Arc::clone(&process.usage);
        async move {
            usage.send().await;
            Ok(())
        }
    });
}

fn open_store(settings: &Settings) -> Result<Option<Store>, Error> {
    let store = settings.store.as_ref();
    let store = store.map(|spec| Store::open(spec, &settings.gateway.to_string()));
    store.transpose().map_err(Error::Store)
}

/// Where a line for each request is sent.
fn open_export(
    settings: &Settings,
    store: Option<&Arc<Store>>,
    trust: &Trust,
    registry: &mut Registry,
) -> Result<Option<Export>, Error> {
    let Some((target, store)) = settings.usage_export.as_ref().zip(store) else {
        return Ok(None);
    };
    let metrics = export::Metrics::register(registry);
    let store = Arc::clone(store);
    let export = Export::open(store, target, trust.usual(), &settings.replica, metrics);
    export.map(Some).map_err(Error::Usage)
}

/// Begins to accept.
fn open(
    process: &Arc<Process>,
    http: TcpListener,
    https: Option<TcpListener>,
    workers: Handed,
    stop: &CancellationToken,
    tasks: &mut JoinSet<Result<(), Error>>,
) {
    let most = process.settings.limits.connections;
    let door = Door {
        permits: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))),
        workers,
        snapshots: process.version.subscribe(),
        stop: stop.clone(),
    };
    if let Some(https) = https {
        let certificates = Arc::new(Certificates::new());
        let (process, followed) = (Arc::clone(process), Arc::clone(&certificates));
        tasks.spawn(async move {
            let settings = process.settings.tls.clone();
            followed.follow(settings, &process.metrics).await;
            Ok(())
        });
        tasks.spawn(accept(door.clone(), https, Some(certificates)));
    }
    tasks.spawn(accept(door, http, None));
}

/// Waits for the connections in the order that keeps every request: first nobody new is sent here, then nobody new
/// is let in, then those inside may finish.
async fn drain(
    process: &Process,
    accepting: &CancellationToken,
    signals: &Signals,
    workers: &mut JoinSet<()>,
) {
    let settings = &process.settings;
    tracing::info!(
        requests = process.metrics.in_flight.get(),
        delay_ms = u64::try_from(settings.drain_delay.as_millis()).unwrap_or(u64::MAX),
        limit_ms = u64::try_from(settings.drain.as_millis()).unwrap_or(u64::MAX),
        "draining"
    );
    tokio::time::sleep(settings.drain_delay).await;
    accepting.cancel();
    signals.drain.cancel();
    let mut all = pin!(async { while workers.join_next().await.is_some() {} });
    if tokio::time::timeout(settings.drain, &mut all)
        .await
        .is_err()
    {
        tracing::warn!(
            requests = process.metrics.in_flight.get(),
            "drain limit reached: requests are cut"
        );
        process.stop_streams();
        let _all_ended = tokio::time::timeout(LAST_WORDS, all).await;
    }
}

type Handed = Vec<(Arc<Worker>, mpsc::UnboundedSender<Arrival>)>;

/// Threads of their own, so that the runtime of the caller stays free for everything else.
fn start_workers(
    process: &Arc<Process>,
    signals: &Signals,
) -> Result<(JoinSet<()>, Handed), Error> {
    let mut ends = JoinSet::new();
    let mut handed = Vec::new();
    for index in 0..process.settings.workers.max(1) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::StartWorker)?;
        let worker = Worker::new(process, index);
        // Bounded by the permits that arrivals carry.
        let (sender, arrivals) = mpsc::unbounded_channel();
        handed.push((Arc::clone(&worker), sender));
        let (end, ended) = oneshot::channel::<()>();
        let signals = signals.clone();
        std::thread::Builder::new()
            .name(format!("gateway-{index}"))
            .spawn(move || {
                let _end = end;
                runtime.block_on(worker::run(worker, arrivals, signals));
            })
            .map_err(Error::StartWorker)?;
        ends.spawn(async move {
            // The sender is dropped, never used: that is the end.
            let _ = ended.await;
        });
    }
    Ok((ends, handed))
}

/// What listeners share.
#[derive(Clone)]
struct Door {
    /// One a connection.
    permits: Arc<Semaphore>,
    workers: Handed,
    /// Counts snapshots.
    snapshots: watch::Receiver<u64>,
    stop: CancellationToken,
}

/// Accepts connections and gives each to the worker with the fewest. With `certificates`, they speak TLS.
async fn accept(
    door: Door,
    listener: TcpListener,
    certificates: Option<Arc<Certificates>>,
) -> Result<(), Error> {
    let Door {
        permits,
        workers,
        mut snapshots,
        stop,
    } = door;
    let configured = snapshots.wait_for(|count| *count > 0);
    tokio::select! {
        _ = tokio::time::timeout(FIRST_CONFIG, configured) => {}
        () = stop.cancelled() => {}
    }
    loop {
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
            Some((listener.accept().await, permit))
        };
        let (accepted, permit) = tokio::select! {
            next = next => match next {
                Some(next) => next,
                None => break,
            },
            () = stop.cancelled() => break,
        };
        let accepted = accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer)));
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(err) => {
                tracing::warn!(error = %err, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let tls = match &certificates {
            None => None,
            // Without a certificate there is nothing to say to a caller who wants one.
            Some(certificates) => match certificates.current() {
                None => continue,
                Some(tls) => Some(tls),
            },
        };
        let least = workers
            .iter()
            .min_by_key(|(worker, _)| worker.connections.load(Ordering::Relaxed));
        let Some((worker, sender)) = least else { break };
        worker.connections.fetch_add(1, Ordering::Relaxed);
        if sender
            .send(Arrival {
                stream,
                peer,
                permit,
                tls,
            })
            .is_err()
        {
            break;
        }
    }
    // Workers learn from the closed channels that nobody else comes.
    drop(workers);
    stop.cancelled().await;
    Ok(())
}

/// Turns what the sources publish into snapshots.
async fn follow(
    process: Arc<Process>,
    mut sources: Sources,
    readiness: Readiness,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut open = (true, true, true);
    let mut stopping = false;
    let mut durability = process.books.durability();
    let mut reports = tokio::time::interval(REPORT_EVERY);
    let mut is_new = true;
    loop {
        if std::mem::replace(&mut is_new, true) {
            apply(&process, &mut sources);
        }
        // Endpoints still come and go while requests finish; only readiness stays off.
        readiness.set(!stopping && process.snapshot.load().is_some());
        // A source that is gone leaves what it said last.
        tokio::select! {
            changed = sources.config.changed(), if open.0 => open.0 = changed.is_ok(),
            changed = sources.endpoints.changed(), if open.1 => open.1 = changed.is_ok(),
            changed = sources.credentials.changed(), if open.2 => open.2 = changed.is_ok(),
            Ok(()) = durability.changed() => {}
            _ = reports.tick() => {
                report(&process, &sources);
                is_new = false;
            }
            () = shutdown.cancelled(), if !stopping => stopping = true,
            else => std::future::pending().await,
        }
    }
}

fn apply(process: &Process, sources: &mut Sources) {
    let Some(config) = sources.config.borrow_and_update().clone() else {
        return;
    };
    let endpoints = Arc::clone(&sources.endpoints.borrow_and_update());
    let credentials = Arc::clone(&sources.credentials.borrow_and_update());
    let previous = process.snapshot.load_full();
    let digest = match &previous {
        Some(previous) if Arc::ptr_eq(&previous.config, &config) => previous.digest.clone(),
        _ => match config.digest() {
            Ok(digest) => digest,
            Err(err) => {
                tracing::error!(error = %err, "the config has no digest and is not applied");
                return;
            }
        },
    };
    let mut next = Snapshot::build(
        config,
        digest,
        &endpoints,
        &credentials,
        previous.as_deref(),
        process.parts(),
    );
    let (has_store, is_durable) = (process.jobs.has_store(), process.books.is_durable());
    let budgets = next.config.budgets.iter().filter(|(_, budget)| {
        // Without a store nobody knows what others spent, nor what was before a restart.
        !has_store || !is_durable && budget.enforcement == Enforcement::Hard
    });
    let rejected: Vec<String> = budgets.map(|(id, _)| format!("TokenBudget/{id}")).collect();
    next.rejected.extend(rejected);
    let next = Arc::new(next);
    tell_unsecured(process, &next, previous.as_deref());
    resume::tell_unkept(process, &next, previous.as_deref());
    process.snapshot.store(Some(Arc::clone(&next)));
    process.version.send_modify(|version| *version += 1);
    if previous
        .as_ref()
        .is_none_or(|previous| previous.digest != next.digest)
    {
        process.metrics.config(&next.digest);
        process
            .ledger
            .retain(|id| next.config.backends.contains_key(id));
        process.metrics.retain(&next.known());
        process.books.metrics.keep(&next.budgets);
        tracing::info!(
            config.digest = %next.digest,
            rules = next.config.rules.len(),
            backends = next.config.backends.len(),
            "config applied"
        );
    }
    sources.applied.send_if_modified(|before| {
        let limits = before.as_ref().map(|before| before.limits.clone());
        let applied = Applied {
            digest: next.digest.clone(),
            rejected: next.rejected.clone(),
            limits: limits.unwrap_or_default(),
        };
        let changed = before.as_ref() != Some(&applied);
        *before = Some(applied);
        changed
    });
}

/// Says how limits stand.
fn report(process: &Process, sources: &Sources) {
    let limits = process.books.report();
    sources.applied.send_if_modified(|applied| {
        let Some(applied) = applied else { return false };
        let changed = applied.limits != limits;
        applied.limits = limits;
        changed
    });
}

/// Says of which backends TLS cannot be spoken as the config says, once for each reason.
fn tell_unsecured(process: &Process, next: &Snapshot, previous: Option<&Snapshot>) {
    let of = |snapshot: &Snapshot| -> BTreeMap<BackendId, (Unsecured, bool)> {
        let backends = snapshot.backends();
        let unsecured = backends.filter_map(|backend| {
            let why = backend.unsecured.clone()?;
            Some((backend.id.clone(), (why, backend.secured.is_some())))
        });
        unsecured.collect()
    };
    let (now, before) = (of(next), previous.map(of).unwrap_or_default());
    let count = i64::try_from(now.len()).unwrap_or(i64::MAX);
    process.metrics.unsecured_backends.set(count);
    for (id, (why, is_served)) in &now {
        if before.get(id).is_none_or(|(before, _)| before != why) {
            let cause = std::error::Error::source(why).map(ToString::to_string);
            let cause = cause.unwrap_or_default();
            tracing::error!(backend.id = %id, error = %why, error.cause = cause, tls.served = is_served,
                "TLS with a backend cannot be spoken as it says; the last good form, if there is one, stays");
        }
    }
}
