//! (IO) The runner: takes jobs from the store while there is room, keeps their leases while they run, and gives them
//! back when the gateway stops. One for each process, on its first worker's thread. A job whose lease is gone
//! (cancelled, or taken by another replica after this one was away for too long) is dropped, and its call with it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::batch::Batch;
use super::call::{self, MAX_ATTEMPTS, Verdict};
use super::room::Place;
use super::run_response::{End, conclude};
use super::shape::{self, Status};
use super::share::Queued;
use super::stored::{load, new_id, now_s};
use super::{batches, metrics, responses, run_batch, run_response};
use crate::openai::{Call, Dialect};
use crate::process::Worker;
use crate::reject::Reject;
use crate::store::{Error, Store};

/// A job is another replica's to take when it was not renewed for this long.
const LEASE: Duration = Duration::from_secs(15);
/// Also how long a cancelled job's call may go on.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// Between two looks for jobs of other replicas.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Jobs of this replica at one time.
const MAX_RUNNING: usize = 256;
/// Batches among them, and those for one model.
const MAX_BATCHES: usize = 32;
const MAX_BATCHES_OF_CLASS: usize = 2;
/// Before a job without room is looked at again.
const NO_ROOM: Duration = Duration::from_millis(500);
/// Before a job is tried again that the store failed.
const STORE_FAILED: Duration = Duration::from_secs(5);
/// To give a job back when the gateway stops.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// Runs jobs until `stop`.
pub(crate) async fn run(worker: Arc<Worker>, stop: CancellationToken) {
    let Some(store) = worker.process.jobs.store.clone() else {
        return;
    };
    let mut runner = Runner {
        worker: Arc::clone(&worker),
        store,
        owner: new_id(""),
        stop: stop.clone(),
        running: JoinSet::new(),
        batches: HashMap::new(),
        paused: HashMap::new(),
        away: false,
    };
    loop {
        let wait = LOOK_EVERY.mul_f64(rand::rng().random_range(0.75..1.25));
        tokio::select! {
            () = stop.cancelled() => break,
            () = worker.process.jobs.came.notified() => {}
            Some(ended) = runner.running.join_next(), if !runner.running.is_empty() => {
                runner.ended(ended.ok());
            }
            () = tokio::time::sleep(wait) => {}
        }
        match runner.take().await {
            Ok(()) => runner.away = false,
            Err(err) if runner.away => tracing::debug!(error = %err, "no jobs can be taken"),
            Err(err) => {
                runner.away = true;
                tracing::warn!(error = %err, "no jobs can be taken while the store is away");
            }
        }
    }
    while runner.running.join_next().await.is_some() {}
}

struct Runner {
    worker: Arc<Worker>,
    store: Arc<Store>,
    /// This process, in leases.
    owner: String,
    stop: CancellationToken,
    /// Each returns its class.
    running: JoinSet<String>,
    /// Batches that run, by class.
    batches: HashMap<String, usize>,
    /// Classes without room, and until when they are left alone.
    paused: HashMap<String, Instant>,
    away: bool,
}

/// Whether more of a class may be taken at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum More {
    Yes,
    No,
}

impl Runner {
    fn ended(&mut self, class: Option<String>) {
        let Some(class) = class else { return };
        if let Some(count) = self.batches.get_mut(&class) {
            *count -= 1;
            if *count == 0 {
                self.batches.remove(&class);
            }
        }
    }

    /// Takes what there is room for.
    async fn take(&mut self) -> Result<(), Error> {
        while let Some(ended) = self.running.try_join_next() {
            self.ended(ended.ok());
        }
        let now = penstock_shell::clock::now();
        self.paused.retain(|_, until| *until > now);
        if self.worker.process.snapshot.load().is_none() {
            return Ok(());
        }
        for class in self.store.classes().await? {
            while self.running.len() < MAX_RUNNING
                && !self.paused.contains_key(&class)
                && !self.stop.is_cancelled()
            {
                let more = if class.starts_with(responses::CLASS) {
                    self.take_response(&class).await?
                } else if class.starts_with(batches::CLASS) {
                    self.take_batch(&class).await?
                } else {
                    // A newer version's.
                    More::No
                };
                if more == More::No {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn take_batch(&mut self, class: &str) -> Result<More, Error> {
        let of_class = self.batches.get(class).copied().unwrap_or(0);
        let all: usize = self.batches.values().sum();
        if of_class >= MAX_BATCHES_OF_CLASS || all >= MAX_BATCHES {
            return Ok(More::No);
        }
        let Some(leased) = self.store.lease(class, &self.owner, LEASE).await? else {
            return Ok(More::No);
        };
        let Some((_, batch)) = load::<Batch>(&self.store, &leased.job).await? else {
            // Whose it was is not known any more: it counts until its window is over.
            self.store.withdraw(class, &leased.job).await?;
            return Ok(More::Yes);
        };
        *self.batches.entry(class.to_owned()).or_default() += 1;
        let (worker, store) = (Arc::clone(&self.worker), Arc::clone(&self.store));
        let attempt = leased.attempt;
        self.spawn(batch.queued(), None, async move {
            run_batch::run(&worker, &store, batch, attempt).await
        });
        Ok(More::Yes)
    }

    async fn take_response(&mut self, class: &str) -> Result<More, Error> {
        let store = Arc::clone(&self.store);
        let Some(leased) = store.lease(class, &self.owner, LEASE).await? else {
            return Ok(More::No);
        };
        let record = load::<responses::Response>(&store, &leased.job).await?;
        let Some((_, response)) = record else {
            store.withdraw(class, &leased.job).await?;
            return Ok(More::Yes);
        };
        let queued = response.queued();
        if response.status.is_over() {
            queued.leave(&store).await?;
            return Ok(More::Yes);
        }
        let body = response.request(&store).await?;
        let head = call::head("/v1/responses", &response.headers, &response.id);
        let behalf = response.owner.behalf();
        let placed = match Call::parse(&body) {
            Ok(call) => call::place(&self.worker, &head, &call, &behalf).await,
            Err(err) => Err(Reject::from(err)),
        };
        let is_late = now_s() >= response.created_at + responses::WINDOW.as_secs();
        let reject = match placed {
            Ok(Some(place)) if leased.attempt <= MAX_ATTEMPTS => {
                let worker = Arc::clone(&self.worker);
                let attempt = leased.attempt;
                self.spawn(queued, Some(place), async move {
                    run_response::run(&worker, &store, response, body, attempt).await
                });
                return Ok(More::Yes);
            }
            Ok(Some(_)) => Some(Reject::UpstreamBroken),
            Ok(None) if is_late => Some(Reject::NoEndpoint),
            Ok(None) => None,
            Err(reject) => {
                let (status, ..) = reject.parts(Dialect::OpenAi);
                let verdict = call::verdict(status.as_u16(), Some(reject.label()));
                (is_late || verdict != Verdict::Later).then_some(reject)
            }
        };
        let Some(reject) = reject else {
            let until = penstock_shell::clock::now() + NO_ROOM;
            self.paused.insert(class.to_owned(), until);
            store
                .release(class, &leased.job, &self.owner, NO_ROOM, false)
                .await?;
            return Ok(More::No);
        };
        let (_, _, told) = reject.parts(Dialect::OpenAi);
        let error = Some(shape::error(&told));
        conclude(&store, &leased.job, Status::Failed, error).await?;
        queued.leave(&store).await?;
        self.worker
            .process
            .jobs
            .metrics
            .ended(metrics::RESPONSE, "failed");
        Ok(More::Yes)
    }

    /// Runs `work` beside the renewal of its lease.
    fn spawn(
        &mut self,
        queued: Queued,
        place: Option<Place>,
        work: impl Future<Output = Result<End, Error>> + Send + 'static,
    ) {
        let lease = Lease {
            store: Arc::clone(&self.store),
            queued,
            owner: self.owner.clone(),
        };
        let stop = self.stop.clone();
        self.running.spawn(async move {
            let ended = {
                let work = Box::pin(work);
                tokio::select! {
                    ended = work => Some(ended),
                    () = lease.keep() => None,
                    () = stop.cancelled() => Some(Ok(End::Again {
                        after: Duration::ZERO,
                        counted: false,
                    })),
                }
            };
            drop(place);
            lease.end(ended).await;
            lease.queued.class
        });
    }
}

struct Lease {
    store: Arc<Store>,
    queued: Queued,
    owner: String,
}

impl Lease {
    /// Returns when the job is not this replica's any more.
    async fn keep(&self) {
        let mut renewed = penstock_shell::clock::now();
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            let kept = self
                .store
                .renew(&self.queued.class, &self.queued.id, &self.owner, LEASE)
                .await;
            let now = penstock_shell::clock::now();
            match kept {
                Ok(true) => renewed = now,
                Ok(false) => return,
                Err(_) if now.saturating_duration_since(renewed) < LEASE => {}
                Err(_) => return,
            }
        }
    }

    async fn end(&self, ended: Option<Result<End, Error>>) {
        let (store, class, id) = (&self.store, &self.queued.class, &self.queued.id);
        let told = match ended {
            None => {
                tracing::info!(job.id = id, "a job was cancelled or taken over");
                return;
            }
            Some(Ok(End::Over)) => self.queued.leave(store).await,
            Some(Ok(End::Again { after, counted })) => {
                let back = store.release(class, id, &self.owner, after, counted);
                tokio::time::timeout(GIVE_BACK, back)
                    .await
                    .unwrap_or(Err(Error::Away))
            }
            Some(Err(err)) => {
                tracing::warn!(job.id = id, error = %err, "the store failed a job");
                let after = STORE_FAILED;
                store.release(class, id, &self.owner, after, false).await
            }
        };
        if let Err(err) = told {
            tracing::warn!(job.id = id, error = %err, "a job stays leased until its lease ends");
        }
    }
}
