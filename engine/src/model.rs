//! The step model: what a vLLM engine schedules in each step and how long the step takes.
//!
//! Requests and the time flow in, step plans and events flow out. It follows vLLM V1's scheduler: one token budget per
//! step shared by running requests (decodes, then a chunked prefill) and new ones in order of arrival; KV blocks with
//! a prefix cache; when blocks run out the youngest running request loses its own and starts again. It never reads a
//! clock: the server drives it with the real one, a simulation with a virtual one. A step costs O(running sequences),
//! plus the blocks that change hands, plus one cache look-up per cached block of the request at the head of the queue.

mod blocks;
mod profile;
mod request;

use std::collections::BTreeMap;
use std::time::Duration;

use blocks::BlockPool;
pub use profile::{PROFILES, Profile, StepTime};
use request::Request;
pub use request::{Ending, RequestId, Submission, Summary};

/// The limits of one engine; the names are vLLM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens per KV block.
    pub block_size: u32,
    /// KV blocks. One of them is vLLM's null block and is never used.
    pub num_gpu_blocks: u32,
    /// Sequences that can run at once.
    pub max_num_seqs: u32,
    /// Tokens computed in one step, over all sequences.
    pub max_num_batched_tokens: u32,
    /// Tokens of prompt and output of one request.
    pub max_model_len: u32,
    /// Unfinished requests, waiting and running together; above it a request is refused.
    pub max_num_queued_reqs: u32,
    /// Whether requests share the blocks of equal prefixes.
    pub prefix_caching: bool,
}

/// Limits under which an engine could not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// A limit of nothing.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The longest request would never fit.
    #[error(
        "the KV cache holds {kv_tokens} tokens, fewer than max-model-len {max_model_len}: raise \
         num-gpu-blocks-override or lower max-model-len"
    )]
    LongestRequest {
        /// Tokens that all usable blocks hold.
        kv_tokens: u64,
        /// The limit that does not fit.
        max_model_len: u32,
    },
    /// Not even one token per running sequence.
    #[error("max-num-batched-tokens {tokens} must be at least max-num-seqs {sequences}")]
    Budget {
        /// The token budget.
        tokens: u32,
        /// The sequence slots.
        sequences: u32,
    },
}

impl Limits {
    /// Tokens that the KV cache holds: all blocks but the null block.
    pub fn kv_tokens(&self) -> u64 {
        u64::from(self.num_gpu_blocks.saturating_sub(1)) * u64::from(self.block_size)
    }

    /// Whether an engine can work with these limits; vLLM refuses to start otherwise, too.
    pub fn check(&self) -> Result<(), LimitsError> {
        for (name, value) in [
            ("block-size", self.block_size),
            ("max-num-seqs", self.max_num_seqs),
            ("max-model-len", self.max_model_len),
            ("max-num-queued-reqs", self.max_num_queued_reqs),
        ] {
            if value == 0 {
                return Err(LimitsError::Zero(name));
            }
        }
        let kv_tokens = self.kv_tokens();
        if kv_tokens < u64::from(self.max_model_len) {
            return Err(LimitsError::LongestRequest {
                kv_tokens,
                max_model_len: self.max_model_len,
            });
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(LimitsError::Budget {
                tokens: self.max_num_batched_tokens,
                sequences: self.max_num_seqs,
            });
        }
        Ok(())
    }
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `max_num_queued_reqs` unfinished requests are here already.
    QueueFull,
    /// No prompt, no output, or both together longer than `max_model_len`.
    Length,
}

/// A step that has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// How long it takes.
    pub duration: Duration,
    /// Sequences in its batch.
    pub sequences: u32,
    /// Tokens computed for prompts, and for outputs that are computed again after a preemption.
    pub prefill_tokens: u32,
    /// Tokens computed for sequences that have their prompt behind them, one each.
    pub decode_tokens: u32,
    /// KV tokens that attention reads.
    pub kv_tokens_read: u64,
    /// Requests that lost their blocks when this step was planned.
    pub preempted: u32,
    /// Tokens of requests admitted for the first time that were looked up in the prefix cache.
    pub cache_queries: u64,
    /// How many of those were found.
    pub cache_hits: u64,
}

/// What a step brought about, in the order of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request's first token.
    FirstToken {
        /// The request.
        id: RequestId,
        /// Its prompt's length.
        prompt_tokens: u32,
        /// How much of the prompt came from the prefix cache.
        cached_tokens: u32,
        /// Time since the request arrived.
        after: Duration,
    },
    /// Any later token.
    Token {
        /// The request.
        id: RequestId,
        /// Tokens generated so far.
        generated: u32,
        /// Time since the token before.
        after: Duration,
    },
    /// The end of a request; follows its last token.
    Finished {
        /// The request.
        id: RequestId,
        /// Why the output ends.
        ending: Ending,
        /// What is known of it.
        summary: Summary,
    },
}

/// What an engine has in hand.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Sequences that hold blocks.
    pub running: u32,
    /// Requests without blocks, preempted ones included.
    pub waiting: u32,
    /// Share of the KV blocks that is held, 0 to 1. Cached blocks that nobody holds count as free.
    pub kv_usage: f64,
}

/// One engine.
#[derive(Clone, Debug)]
pub struct Model {
    limits: Limits,
    step_time: StepTime,
    pool: BlockPool,
    /// In order of arrival, as only the youngest is ever preempted and only the oldest is admitted.
    running: Vec<Request>,
    waiting: BTreeMap<RequestId, Request>,
    next_id: u64,
    stepping: bool,
}

impl Model {
    /// An idle engine.
    pub fn new(limits: Limits, step_time: StepTime) -> Result<Self, LimitsError> {
        limits.check()?;
        Ok(Self {
            limits,
            step_time,
            pool: BlockPool::new(limits.num_gpu_blocks, limits.prefix_caching),
            running: Vec::new(),
            waiting: BTreeMap::new(),
            next_id: 0,
            stepping: false,
        })
    }

    /// The limits it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What it has in hand now.
    pub fn load(&self) -> Load {
        Load {
            running: u32::try_from(self.running.len()).unwrap_or(u32::MAX),
            waiting: u32::try_from(self.waiting.len()).unwrap_or(u32::MAX),
            kv_usage: self.pool.usage(),
        }
    }

    /// Unfinished requests.
    pub fn unfinished(&self) -> usize {
        self.running.len() + self.waiting.len()
    }

    /// Takes a request at time `now`; it waits for the next step that has room. Numbers rise with each call.
    pub fn submit(&mut self, submission: Submission, now: Duration) -> Result<RequestId, Refusal> {
        let total = u64::from(submission.prompt_tokens) + u64::from(submission.output_tokens);
        if submission.prompt_tokens == 0
            || submission.output_tokens == 0
            || total > u64::from(self.limits.max_model_len)
        {
            return Err(Refusal::Length);
        }
        if self.unfinished() >= self.limits.max_num_queued_reqs as usize {
            return Err(Refusal::QueueFull);
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.waiting.insert(id, Request::new(id, submission, now));
        Ok(id)
    }

    /// Forgets a request, wherever it is, and frees its blocks at once. False if it had ended already.
    pub fn abort(&mut self, id: RequestId) -> bool {
        if let Ok(index) = self.running.binary_search_by_key(&id, |request| request.id) {
            let mut request = self.running.remove(index);
            self.pool.release(&mut request.blocks);
            return true;
        }
        self.waiting.remove(&id).is_some()
    }

    /// Plans a step that begins at `now`. `None` if there is nothing to do or a step has begun and not finished.
    pub fn begin_step(&mut self, now: Duration) -> Option<StepPlan> {
        if self.stepping {
            return None;
        }
        let mut plan = StepPlan::default();
        let mut budget = self.limits.max_num_batched_tokens;
        self.schedule_running(&mut budget, &mut plan);
        if plan.preempted == 0 {
            self.admit(&mut budget, &mut plan, now);
        }
        if plan.sequences == 0 {
            return None;
        }
        plan.duration = self.step_time.of(
            u64::from(plan.prefill_tokens),
            plan.kv_tokens_read,
            u64::from(plan.sequences),
        );
        self.stepping = true;
        Some(plan)
    }

    fn schedule_running(&mut self, budget: &mut u32, plan: &mut StepPlan) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let tokens = self.running[index].missing().min(*budget);
            while !self.grow(index, tokens) {
                self.preempt_youngest();
                plan.preempted += 1;
                if index == self.running.len() {
                    return;
                }
            }
            *budget -= tokens;
            plan.count(&self.running[index]);
            index += 1;
        }
    }

    /// Gives the running request the blocks for `tokens` more tokens; false if too few are free.
    fn grow(&mut self, index: usize, tokens: u32) -> bool {
        let request = &mut self.running[index];
        let end = request.computed + tokens;
        let held = u32::try_from(request.blocks.len()).unwrap_or(u32::MAX);
        let fresh = end.div_ceil(self.limits.block_size).saturating_sub(held);
        if fresh > 0 && !self.pool.allocate(fresh, &mut request.blocks) {
            return false;
        }
        request.scheduled = tokens;
        // As in vLLM, a block is shared from the moment that the step which fills it is planned.
        let full = end / self.limits.block_size;
        while request.offered < full {
            let offered = request.offered as usize;
            if let Some(&hash) = request.submission.block_hashes.get(offered) {
                self.pool.cache(request.blocks[offered], hash);
            }
            request.offered += 1;
        }
        true
    }

    fn preempt_youngest(&mut self) {
        if let Some(mut request) = self.running.pop() {
            self.pool.release(&mut request.blocks);
            request.computed = 0;
            request.scheduled = 0;
            request.offered = 0;
            request.preemptions += 1;
            self.waiting.insert(request.id, request);
        }
    }

    fn admit(&mut self, budget: &mut u32, plan: &mut StepPlan, now: Duration) {
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs as usize {
            let Some(first) = self.waiting.first_entry() else {
                return;
            };
            let request = first.get();
            // The last token is always computed, as its result is what the step is for.
            let reusable = (request.tokens() - 1) / self.limits.block_size;
            let hashes = &request.submission.block_hashes;
            let hashes = &hashes[..hashes.len().min(reusable as usize)];
            let hits = self.pool.lookup(hashes);
            // The whole sequence must fit, not only the first chunk (vLLM's scheduler_reserve_full_isl, on by default).
            let needed =
                request.tokens().div_ceil(self.limits.block_size) - hits.blocks + hits.free;
            if needed > self.pool.free() {
                return;
            }
            let mut request = first.remove();
            self.pool.reuse(
                &request.submission.block_hashes[..hits.blocks as usize],
                &mut request.blocks,
            );
            request.computed = hits.blocks * self.limits.block_size;
            request.offered = hits.blocks;
            if request.admitted.is_none() {
                request.admitted = Some(now);
                request.cached_tokens = request.computed;
                plan.cache_queries += u64::from(request.tokens());
                plan.cache_hits += u64::from(request.computed);
            }
            let tokens = request.missing().min(*budget);
            self.running.push(request);
            let index = self.running.len() - 1;
            let fits = self.grow(index, tokens);
            debug_assert!(
                fits,
                "a sequence that fits whole has room for its first chunk"
            );
            if !fits {
                return self.preempt_youngest();
            }
            *budget -= tokens;
            plan.count(&self.running[index]);
        }
    }

    /// Ends the step that [`begin_step`](Self::begin_step) began, at time `now`, and appends what it brought about.
    pub fn finish_step(&mut self, now: Duration, events: &mut Vec<Event>) {
        self.stepping = false;
        let pool = &mut self.pool;
        self.running.retain_mut(|request| {
            request.computed += std::mem::take(&mut request.scheduled);
            if request.computed < request.tokens() {
                return true;
            }
            request.generated += 1;
            events.push(request.token(now));
            let finished = request.generated >= request.submission.output_tokens;
            if finished {
                pool.release(&mut request.blocks);
                events.push(Event::Finished {
                    id: request.id,
                    ending: request.submission.ending,
                    summary: request.summary(),
                });
            }
            !finished
        });
    }
}

impl StepPlan {
    fn count(&mut self, request: &Request) {
        self.sequences += 1;
        self.kv_tokens_read += u64::from(request.computed);
        if request.generated > 0 && request.missing() == 1 {
            self.decode_tokens += request.scheduled;
        } else {
            self.prefill_tokens += request.scheduled;
        }
    }
}

impl Request {
    /// Notes the token that was just generated.
    fn token(&mut self, now: Duration) -> Event {
        let before = std::mem::replace(&mut self.last_token, now);
        if self.generated == 1 {
            self.first_token = now;
            let after = now.saturating_sub(self.arrived);
            let (prompt_tokens, cached_tokens) =
                (self.submission.prompt_tokens, self.cached_tokens);
            Event::FirstToken {
                id: self.id,
                prompt_tokens,
                cached_tokens,
                after,
            }
        } else {
            Event::Token {
                id: self.id,
                generated: self.generated,
                after: now.saturating_sub(before),
            }
        }
    }
}

#[cfg(test)]
mod tests;
