//! (IO) Runs one step model against the real clock, in one task.
//!
//! Submissions flow in through a bounded channel; each answer's progress flows out through a cell that only keeps the
//! latest value, so a slow client costs no memory and never holds the engine up. The task is the model's only owner.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::{Event, Model, Refusal, RequestId, StepPlan, Submission};
use crate::openai::answer::Progress;

/// Submissions on their way to the engine. Beyond it, handlers wait their turn; the engine takes all of them between
/// two steps.
const SUBMISSIONS: usize = 256;

/// How far the steps may lag behind the clock and still catch up. A timer fires up to a millisecond late, and steps
/// follow one another without a gap; a process that was not scheduled for longer than this has simply been slow.
const MAX_LAG: Duration = Duration::from_millis(50);

/// Why a request is not in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotTaken {
    /// The model refused it.
    Refused(Refusal),
    /// All requests have been aborted, and no new one is taken.
    Stopped,
}

/// A request in the engine. Dropping it aborts the request, unless it has ended.
#[derive(Debug)]
pub(crate) struct Ticket {
    id: RequestId,
    progress: watch::Receiver<Progress>,
    gone: mpsc::UnboundedSender<RequestId>,
    ended: bool,
}

impl Ticket {
    /// Where the request's progress is seen.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Nothing is left to abort.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.ended {
            // Fails only when the engine has stopped.
            let _ = self.gone.send(self.id);
        }
    }
}

#[derive(Debug)]
struct Submit {
    submission: Submission,
    reply: oneshot::Sender<Result<Ticket, NotTaken>>,
}

/// The way to one engine. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    submissions: mpsc::Sender<Submit>,
    metrics: Arc<Mutex<Metrics>>,
}

impl Handle {
    /// Hands a request over. Cancel safe: a request that is in the engine by then is aborted.
    pub(crate) async fn submit(&self, submission: Submission) -> Result<Ticket, NotTaken> {
        let (reply, answer) = oneshot::channel();
        let sent = self.submissions.send(Submit { submission, reply }).await;
        if sent.is_err() {
            return Err(NotTaken::Stopped);
        }
        answer.await.unwrap_or(Err(NotTaken::Stopped))
    }

    /// The engine's figures as Prometheus text.
    pub(crate) fn metrics(&self) -> String {
        let snapshot = self
            .metrics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        snapshot.render()
    }
}

/// One engine's task.
#[derive(Debug)]
pub(crate) struct Driver {
    model: Model,
    metrics: Arc<Mutex<Metrics>>,
    submissions: mpsc::Receiver<Submit>,
    // Unbounded, yet never longer than the number of unfinished requests: each of them is dropped once.
    gone: mpsc::UnboundedReceiver<RequestId>,
    gone_sender: mpsc::UnboundedSender<RequestId>,
    answers: HashMap<RequestId, watch::Sender<Progress>>,
    events: Vec<Event>,
    /// The model's time 0.
    epoch: Instant,
    stopped: bool,
}

/// An idle engine and the way to it.
pub(crate) fn engine(model: Model, metrics: Metrics) -> (Driver, Handle) {
    let metrics = Arc::new(Mutex::new(metrics));
    let (submit, submissions) = mpsc::channel(SUBMISSIONS);
    let (gone_sender, gone) = mpsc::unbounded_channel();
    let handle = Handle {
        submissions: submit,
        metrics: Arc::clone(&metrics),
    };
    let driver = Driver {
        model,
        metrics,
        submissions,
        gone,
        gone_sender,
        answers: HashMap::new(),
        events: Vec::new(),
        epoch: now(),
        stopped: false,
    };
    (driver, handle)
}

impl Driver {
    /// Works until every [`Handle`] is dropped. Once `abort` is cancelled, all requests end as aborted and new ones
    /// are refused. Not cancel safe: dropping it cuts every answer.
    pub(crate) async fn run(mut self, abort: CancellationToken) {
        let mut step: Option<(StepPlan, Instant)> = None;
        loop {
            let ends = step.as_ref().map(|(_, ends)| *ends);
            let mut ended = None;
            tokio::select! {
                biased;
                () = abort.cancelled(), if !self.stopped => self.abort_all(),
                () = sleep_until(ends), if ends.is_some() => {
                    if let Some((plan, due)) = step.take() {
                        self.finish(&plan);
                        ended = Some(due);
                    }
                }
                Some(id) = self.gone.recv() => self.abort(id, step.is_some()),
                submit = self.submissions.recv() => match submit {
                    Some(submit) => self.take(submit),
                    None => return,
                },
            }
            if step.is_none() {
                // All that has arrived meanwhile shares the next step; and steps that lag must not keep it out.
                while let Ok(id) = self.gone.try_recv() {
                    self.abort(id, false);
                }
                while let Ok(submit) = self.submissions.try_recv() {
                    self.take(submit);
                }
                step = self.begin(ended);
            }
        }
    }

    fn since_epoch(&self) -> Duration {
        now().saturating_duration_since(self.epoch)
    }

    /// Begins a step, if there is something to do. It follows without a gap on one that was due at `earlier`.
    fn begin(&mut self, earlier: Option<Instant>) -> Option<(StepPlan, Instant)> {
        let now = now();
        let start = earlier.map_or(now, |earlier| {
            earlier.max(now.checked_sub(MAX_LAG).unwrap_or(earlier))
        });
        let plan = self
            .model
            .begin_step(now.saturating_duration_since(self.epoch))?;
        Some((plan, start + plan.duration))
    }

    fn finish(&mut self, plan: &StepPlan) {
        let mut events = std::mem::take(&mut self.events);
        let now = self.since_epoch();
        self.model.finish_step(now, &mut events);
        for event in &events {
            match *event {
                Event::FirstToken {
                    id, cached_tokens, ..
                } => {
                    self.show(
                        id,
                        Progress {
                            generated: 1,
                            cached_tokens,
                            aborted: false,
                        },
                    );
                }
                Event::Token { id, generated, .. } => {
                    if let Some(answer) = self.answers.get(&id) {
                        answer.send_modify(|progress| progress.generated = generated);
                    }
                }
                Event::Finished { id, .. } => {
                    self.answers.remove(&id);
                }
            }
        }
        let load = self.model.load();
        self.metrics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .step(plan, &events, load);
        events.clear();
        self.events = events;
    }

    fn show(&self, id: RequestId, progress: Progress) {
        if let Some(answer) = self.answers.get(&id) {
            // Fails when the client has gone; its abort is on the way.
            let _ = answer.send(progress);
        }
    }

    fn take(&mut self, Submit { submission, reply }: Submit) {
        if self.stopped {
            let _ = reply.send(Err(NotTaken::Stopped));
            return;
        }
        let now = self.since_epoch();
        let taken = match self.model.submit(submission, now) {
            Ok(id) => {
                let (sender, progress) = watch::channel(Progress::default());
                self.answers.insert(id, sender);
                Ok(Ticket {
                    id,
                    progress,
                    gone: self.gone_sender.clone(),
                    ended: false,
                })
            }
            Err(refusal) => {
                self.metrics
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .refused(refusal);
                Err(NotTaken::Refused(refusal))
            }
        };
        // Fails when the client has gone; the ticket inside then aborts the request.
        let _ = reply.send(taken);
    }

    fn abort(&mut self, id: RequestId, stepping: bool) {
        self.answers.remove(&id);
        if self.model.abort(id) {
            let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
            metrics.aborted();
            // The step in flight sets the gauges itself when it ends.
            if !stepping {
                metrics.set_load(self.model.load());
            }
        }
    }

    fn abort_all(&mut self) {
        self.stopped = true;
        let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, answer) in self.answers.drain() {
            if self.model.abort(id) {
                metrics.aborted();
                answer.send_modify(|progress| progress.aborted = true);
            }
        }
        metrics.set_load(self.model.load());
    }
}

#[expect(clippy::disallowed_methods, reason = "(IO) file")]
fn now() -> Instant {
    Instant::now()
}

/// Sleeps until `when`; for ever without one.
async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Ending, Limits, StepTime};

    const STEP: StepTime = StepTime {
        base_ns: 10_000_000,
        prefill_token_ns: 0,
        kv_token_ns: 0,
        sequence_ns: 0,
    };

    struct Bench {
        handle: Handle,
        abort: CancellationToken,
        task: tokio::task::JoinSet<()>,
    }

    fn bench(max_num_queued_reqs: u32) -> Bench {
        let limits = Limits {
            block_size: 16,
            num_gpu_blocks: 64,
            max_num_seqs: 2,
            max_num_batched_tokens: 64,
            max_model_len: 512,
            max_num_queued_reqs,
            prefix_caching: true,
        };
        let metrics = Metrics::new("tiny", limits, false, Duration::ZERO);
        let (driver, handle) = engine(Model::new(limits, STEP).unwrap(), metrics);
        let abort = CancellationToken::new();
        let mut task = tokio::task::JoinSet::new();
        task.spawn(driver.run(abort.clone()));
        Bench {
            handle,
            abort,
            task,
        }
    }

    fn request(output_tokens: u32) -> Submission {
        let (ending, max_tokens) = (Ending::Length, output_tokens);
        Submission {
            prompt_tokens: 16,
            output_tokens,
            ending,
            max_tokens,
            block_hashes: Vec::new(),
        }
    }

    /// The value of the first series whose text begins so.
    fn value(handle: &Handle, series: &str) -> String {
        let text = handle.metrics();
        let line = text.lines().find(|line| line.starts_with(series)).unwrap();
        line.rsplit_once(' ').unwrap().1.to_owned()
    }

    const ABORTS: &str = "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\"";

    #[tokio::test(start_paused = true)]
    async fn tokens_come_at_the_models_pace() {
        let bench = bench(8);
        let start = now();
        let ticket = bench.handle.submit(request(5)).await.unwrap();
        let mut progress = ticket.progress();
        let mut times = Vec::new();
        while progress.changed().await.is_ok() {
            times.push((
                progress.borrow_and_update().generated,
                start.elapsed().as_millis(),
            ));
        }
        assert_eq!(times, [(1, 10), (2, 20), (3, 30), (4, 40), (5, 50)]);
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_ticket_aborts_a_waiting_request_and_a_running_one() {
        let bench = bench(8);
        let mut tickets = Vec::new();
        for _ in 0..3 {
            tickets.push(bench.handle.submit(request(400)).await.unwrap());
        }
        tokio::time::sleep(Duration::from_millis(35)).await;
        assert_eq!(value(&bench.handle, "vllm:num_requests_running{"), "2.0");
        assert_eq!(value(&bench.handle, "vllm:num_requests_waiting{"), "1.0");
        drop(tickets);
        tokio::time::sleep(Duration::from_millis(15)).await;
        assert_eq!(value(&bench.handle, "vllm:num_requests_running{"), "0.0");
        assert_eq!(value(&bench.handle, "vllm:num_requests_waiting{"), "0.0");
        assert_eq!(value(&bench.handle, "vllm:kv_cache_usage_perc{"), "0.0");
        assert_eq!(value(&bench.handle, ABORTS), "3.0");
    }

    #[tokio::test(start_paused = true)]
    async fn ended_ticket_aborts_nothing() {
        let bench = bench(8);
        let mut ticket = bench.handle.submit(request(1)).await.unwrap();
        let mut progress = ticket.progress();
        while progress.changed().await.is_ok() {}
        ticket.end();
        drop(ticket);
        let next = bench.handle.submit(request(1)).await.unwrap();
        let mut progress = next.progress();
        while progress.changed().await.is_ok() {}
        assert_eq!(value(&bench.handle, ABORTS), "0.0");
    }

    #[tokio::test(start_paused = true)]
    async fn full_queue_refuses_and_counts_it() {
        let bench = bench(1);
        let _first = bench.handle.submit(request(400)).await.unwrap();
        let refused = bench.handle.submit(request(1)).await.unwrap_err();
        assert_eq!(refused, NotTaken::Refused(Refusal::QueueFull));
        assert_eq!(
            value(&bench.handle, "vllm:admission_rejections_total{"),
            "1.0"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn abort_ends_every_answer_and_takes_no_more() {
        let mut bench = bench(8);
        let ticket = bench.handle.submit(request(400)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(25)).await;
        bench.abort.cancel();
        let mut progress = ticket.progress();
        let last = *progress
            .wait_for(|progress| progress.aborted)
            .await
            .unwrap();
        assert_eq!(last.generated, 2);
        assert_eq!(
            bench.handle.submit(request(1)).await.unwrap_err(),
            NotTaken::Stopped
        );
        drop(bench.handle);
        bench.task.join_next().await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn lagging_engine_catches_up_by_no_more_than_the_limit() {
        let bench = bench(8);
        let ticket = bench.handle.submit(request(400)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        // The process loses a second in one go: five steps of 10 ms are caught up, and the one that was due.
        tokio::time::advance(Duration::from_secs(1)).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        let generated = ticket.progress().borrow().generated;
        assert!((5..=7).contains(&generated), "{generated}");
    }
}
