//! (IO) A batch: its input checked, its lines called, their answers kept by line number. A replica that takes over
//! goes on behind the last place before which everything was done; answers that are there already stay.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use super::batch::{Batch, Progress, Status, WINDOW};
use super::call::{self, MAX_ATTEMPTS, Verdict};
use super::files::{CONTENT, File, LIST, MAX_KEPT};
use super::input::{Input, InputError, Line};
use super::lines::{self, Check, LineError};
use super::metrics::BATCH;
use super::run_response::End;
use super::stored::{change, load, new_id, now_s, save};
use crate::openai::Call;
use crate::own_call::{self, Outcome};
use crate::process::Worker;
use crate::store::{Error, Expect, Key, Store};

/// Lines of one batch that wait or are called at one time; rooms decide which.
const MAX_LINES_AT_ONCE: usize = 32;
/// Between two looks for room.
const NO_ROOM: Duration = Duration::from_millis(200);
/// Before a line that nothing could take is tried again.
const LATER: Duration = Duration::from_secs(2);
/// Between two writings of how far the batch is.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// Replicas that may die of one batch.
const MAX_TAKEN: u32 = 10;

/// Runs a batch to its end, or as far as it comes. Cancel safe: see the module.
pub(super) async fn run(
    worker: &Arc<Worker>,
    store: &Store,
    mut batch: Batch,
    attempt: u32,
) -> Result<End, Error> {
    let ended = |status| worker.process.jobs.metrics.ended(BATCH, status);
    if batch.status.is_over() {
        return Ok(End::Over);
    }
    if batch.status == Status::Cancelling {
        ended("cancelled");
        return finish(store, batch, Status::Cancelled).await;
    }
    let Some((_, input)) = load::<File>(store, &batch.input).await? else {
        ended("failed");
        return fail(store, batch, vec![gone()]).await;
    };
    if attempt > MAX_TAKEN {
        let message = "Every gateway that ran the batch ended before it did.";
        let error = LineError::new("server_error", None, None, message);
        ended("failed");
        return fail(store, batch, vec![error]).await;
    }
    let resumed = batch.status == Status::InProgress;
    if !resumed {
        batch = match begin(store, batch, &input).await? {
            Some(batch) if batch.status == Status::InProgress => batch,
            Some(batch) if batch.status == Status::Failed => {
                ended("failed");
                return finish(store, batch, Status::Failed).await;
            }
            // Cancelled just now: by whoever takes it next.
            Some(_) => {
                return Ok(End::Again {
                    after: Duration::ZERO,
                    counted: false,
                });
            }
            None => return Ok(End::Over),
        };
    }
    let batch = Arc::new(batch);
    let run = Run {
        worker,
        store,
        batch: &batch,
        resumed,
        progress: batch.progress,
        done: BTreeMap::new(),
    };
    let (status, progress) = run.run(&input).await?;
    let mut batch = Arc::unwrap_or_clone(batch);
    batch.progress = progress;
    match status {
        Err(error) => {
            ended("failed");
            fail(store, batch, vec![error]).await
        }
        Ok(status) => {
            ended(match status {
                Status::Cancelled => "cancelled",
                Status::Expired => "expired",
                _ => "completed",
            });
            finish(store, batch, status).await
        }
    }
}

/// Checks the lines. Returns the batch in progress, or failed with what is wrong; `None` if it is gone.
async fn begin(store: &Store, mut batch: Batch, input: &File) -> Result<Option<Batch>, Error> {
    let total = match check(store, &batch, input).await? {
        Ok(total) => total,
        Err(errors) => {
            batch.status = Status::Failed;
            batch.errors = errors;
            return Ok(Some(batch));
        }
    };
    change(store, &batch.id, |record: &mut Batch| {
        let goes = record.status == Status::Validating;
        if goes {
            record.status = Status::InProgress;
            record.times.in_progress = Some(now_s());
            record.total = total;
        }
        goes
    })
    .await
}

fn gone() -> LineError {
    let message = "The input file does not exist any more.";
    LineError::new("file_not_found", None, Some("input_file_id"), message)
}

/// Checks all lines; returns how many requests there are, or what is wrong.
async fn check(
    store: &Store,
    batch: &Batch,
    file: &File,
) -> Result<Result<u64, Vec<LineError>>, Error> {
    let mut input = Input::new(store, file, 0, 0);
    let mut check = Check::new(&batch.endpoint);
    loop {
        match input.next().await {
            Ok(Some(line)) if line.bytes.trim_ascii().is_empty() => {}
            Ok(Some(line)) => {
                if !check.take(&line.bytes, line.number) {
                    break;
                }
                // A long file must not keep the worker's callers waiting.
                tokio::task::yield_now().await;
            }
            Ok(None) => break,
            Err(InputError::Store(err)) => return Err(err),
            Err(InputError::Gone) => return Ok(Err(vec![gone()])),
            Err(InputError::TooLong) => return Ok(Err(vec![too_long()])),
        }
    }
    check.finish();
    Ok(if check.errors.is_empty() {
        Ok(check.total)
    } else {
        Err(check.errors)
    })
}

fn too_long() -> LineError {
    let message = "A line is larger than 4 MiB.";
    LineError::new("line_too_long", None, None, message)
}

async fn fail(store: &Store, mut batch: Batch, errors: Vec<LineError>) -> Result<End, Error> {
    batch.errors = errors;
    finish(store, batch, Status::Failed).await
}

/// Writes down how the batch ended, and makes files of what it has.
async fn finish(store: &Store, batch: Batch, status: Status) -> Result<End, Error> {
    let outputs = [
        (&batch.output, batch.progress.output_bytes, "output"),
        (&batch.error, batch.progress.error_bytes, "error"),
    ];
    for (id, bytes, name) in outputs.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
        let created_at = now_s();
        let file = File {
            id: id.clone(),
            owner: batch.owner.clone(),
            bytes,
            created_at,
            expires_at: created_at + batch.files_kept_s,
            filename: format!("{}_{name}.jsonl", batch.id),
            purpose: "batch_output".to_owned(),
            // Lines are numbered from 1.
            pieces: batch.progress.lines + 1,
        };
        file.share().add(store, file.held()).await?;
        save(store, &file, Expect::Any).await?;
        let list = batch.owner.list(LIST);
        store
            .enlist(&list, id, created_at * 1_000, MAX_KEPT)
            .await?;
    }
    change(store, &batch.id, |record: &mut Batch| {
        let now_s = Some(now_s());
        record.status = status;
        record.progress = batch.progress;
        record.errors.clone_from(&batch.errors);
        match status {
            Status::Failed => record.times.failed = now_s,
            Status::Expired => record.times.expired = now_s,
            Status::Cancelled => record.times.cancelled = now_s,
            _ => record.times.completed = now_s,
        }
        true
    })
    .await?;
    store.settle().await?;
    Ok(End::Over)
}

/// How a line went.
#[derive(Clone, Copy)]
enum Kind {
    Blank,
    Completed,
    Failed,
}

/// A line that is done.
struct Done {
    number: u64,
    ends_at: u64,
    kind: Kind,
    bytes: u64,
    expired: bool,
}

struct Run<'a> {
    worker: &'a Arc<Worker>,
    store: &'a Store,
    batch: &'a Arc<Batch>,
    /// Another replica began.
    resumed: bool,
    progress: Progress,
    /// Lines behind one that is not done.
    done: BTreeMap<u64, Done>,
}

impl Run<'_> {
    /// All lines that are left. Returns what the batch ends as, and how far it came.
    async fn run(mut self, file: &File) -> Result<(Result<Status, LineError>, Progress), Error> {
        let (batch, store, worker) = (self.batch, self.store, self.worker);
        let mut input = Input::new(store, file, self.progress.lines, self.progress.offset);
        let mut calls = FuturesUnordered::new();
        let mut ticks = tokio::time::interval(SAVE_EVERY);
        let mut reads = true;
        let mut expired = false;
        loop {
            while reads && calls.len() < MAX_LINES_AT_ONCE {
                match input.next().await {
                    Ok(Some(line)) => {
                        let one = One {
                            worker,
                            store,
                            batch,
                            resumed: self.resumed,
                        };
                        calls.push(Box::pin(one.run(line)));
                    }
                    Ok(None) => reads = false,
                    Err(InputError::Store(err)) => return Err(err),
                    Err(InputError::Gone) => return Ok((Err(gone()), self.progress)),
                    Err(InputError::TooLong) => return Ok((Err(too_long()), self.progress)),
                }
            }
            if calls.is_empty() {
                let status = if expired {
                    Status::Expired
                } else {
                    Status::Completed
                };
                return Ok((Ok(status), self.progress));
            }
            tokio::select! {
                Some(done) = calls.next() => {
                    let done: Done = done?;
                    expired |= done.expired;
                    self.take(done);
                }
                _ = ticks.tick() => {
                    if self.save().await? != Status::InProgress {
                        return Ok((Ok(Status::Cancelled), self.progress));
                    }
                }
            }
        }
    }

    /// Counts a line, as soon as all before it are done.
    fn take(&mut self, done: Done) {
        self.done.insert(done.number, done);
        while let Some(done) = self.done.remove(&(self.progress.lines + 1)) {
            let progress = &mut self.progress;
            progress.lines = done.number;
            progress.offset = done.ends_at;
            match done.kind {
                Kind::Blank => {}
                Kind::Completed => {
                    progress.completed += 1;
                    progress.output_bytes += done.bytes;
                }
                Kind::Failed => {
                    progress.failed += 1;
                    progress.error_bytes += done.bytes;
                }
            }
        }
    }

    /// Writes down how far the batch is; returns where it stands.
    async fn save(&self) -> Result<Status, Error> {
        let saved = change(self.store, &self.batch.id, |record: &mut Batch| {
            let changes = record.progress != self.progress;
            record.progress = self.progress;
            changes
        });
        Ok(saved
            .await?
            .map_or(Status::Cancelling, |batch| batch.status))
    }
}

/// One line.
struct One<'a> {
    worker: &'a Arc<Worker>,
    store: &'a Store,
    batch: &'a Arc<Batch>,
    resumed: bool,
}

impl One<'_> {
    async fn run(self, line: Line) -> Result<Done, Error> {
        let mut done = Done {
            number: line.number,
            ends_at: line.ends_at,
            kind: Kind::Blank,
            bytes: 0,
            expired: false,
        };
        if line.bytes.trim_ascii().is_empty() {
            return Ok(done);
        }
        if self.resumed {
            for (id, kind) in [
                (&self.batch.output, Kind::Completed),
                (&self.batch.error, Kind::Failed),
            ] {
                let log = Key::new(id, CONTENT);
                if let Some((_, piece)) = self.store.pieces(&log, line.number, 1).await?.first() {
                    done.kind = kind;
                    done.bytes = u64::try_from(piece.len()).unwrap_or(0);
                    return Ok(done);
                }
            }
        }
        let (written, kind, expired) = self.call(&line).await;
        done.kind = kind;
        done.bytes = u64::try_from(written.len()).unwrap_or(0);
        done.expired = expired;
        let id = match kind {
            Kind::Completed => &self.batch.output,
            Kind::Blank | Kind::Failed => &self.batch.error,
        };
        // Outlives the file that is made of it.
        let kept = Duration::from_secs(self.batch.files_kept_s) + WINDOW;
        let log = Key::new(id, CONTENT);
        self.store
            .write(&log, vec![(line.number, written)], kept)
            .await?;
        Ok(done)
    }

    /// Calls until there is an answer that stays.
    async fn call(&self, line: &Line) -> (Bytes, Kind, bool) {
        let id = new_id("batch_req_");
        let batch = self.batch;
        let request = match lines::read(&line.bytes, line.number, &batch.endpoint) {
            Ok(request) => request,
            Err(error) => {
                let written = lines::not_made(&id, "", &error.code, &error.message);
                return (written, Kind::Failed, false);
            }
        };
        let custom_id = &request.custom_id;
        let answered = |outcome: &Outcome, kind| {
            let written = lines::answered(&id, custom_id, outcome.status, &id, &outcome.body);
            (written, kind, false)
        };
        let mut attempt = 1;
        loop {
            if now_s() >= batch.expires_at() {
                let message =
                    "This request could not be executed before the completion window expired.";
                let written = lines::not_made(&id, custom_id, "batch_expired", message);
                return (written, Kind::Failed, true);
            }
            let Some(outcome) = self.attempt(&request.body, &id).await else {
                tokio::time::sleep(NO_ROOM).await;
                continue;
            };
            match call::verdict(outcome.status, outcome.reason.as_deref()) {
                Verdict::Done => return answered(&outcome, Kind::Completed),
                Verdict::Later => tokio::time::sleep(LATER).await,
                Verdict::Again if attempt < MAX_ATTEMPTS => {
                    tokio::time::sleep(call::pause(attempt)).await;
                    attempt += 1;
                }
                Verdict::Again | Verdict::Refused => return answered(&outcome, Kind::Failed),
            }
        }
    }

    /// One call, if there is room.
    async fn attempt(&self, body: &Bytes, id: &str) -> Option<Outcome> {
        let batch = self.batch;
        let head = call::head(&batch.endpoint, &batch.headers, id);
        let behalf = batch.owner.behalf();
        let placed = match Call::parse(body) {
            Ok(call) => call::place(self.worker, &head, &call, &behalf).await,
            Err(err) => Err(err.into()),
        };
        match placed {
            Ok(None) => None,
            Ok(Some(_place)) => {
                let answer = own_call::send(self.worker, head, body.clone(), behalf).await;
                Some(own_call::collect(answer).await)
            }
            Err(reject) => {
                let (status, _, body) = reject.parts(lines::dialect(&batch.endpoint));
                Some(Outcome {
                    status: status.as_u16(),
                    reason: Some(reject.label().to_owned()),
                    body: Bytes::from(body),
                })
            }
        }
    }
}
