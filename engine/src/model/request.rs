//! One request as the step model sees it: lengths, the blocks that it holds, and when things happened to it.
//! Times are durations since whatever instant the caller counts from.

use std::time::Duration;

use super::blocks::BlockId;

/// Number of a request within its model, in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Why a request's output ends where it ends. The caller knows it in advance, as the output is made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The model stopped by itself or at a stop string.
    Stop,
    /// The limit on output tokens was reached.
    Length,
}

/// What a caller asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    /// Length of the prompt; at least 1.
    pub prompt_tokens: u32,
    /// Tokens to generate; at least 1.
    pub output_tokens: u32,
    /// Why the output ends after them.
    pub ending: Ending,
    /// The caller's limit on output tokens. Only reported, never acted on.
    pub max_tokens: u32,
    /// Keys of the leading full blocks of prompt and output. Two requests share a block if their keys are equal, so
    /// a key must stand for the whole prefix up to and with its block. Blocks past the end are never shared.
    pub block_hashes: Vec<u64>,
}

/// A finished request, for histograms. All times are spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens that were found in the prefix cache at the first admission.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub generated_tokens: u32,
    /// The caller's limit on them.
    pub max_tokens: u32,
    /// How often it lost its blocks and started again.
    pub preemptions: u32,
    /// Arrival to first step.
    pub queue: Duration,
    /// First step to first token.
    pub prefill: Duration,
    /// First token to last.
    pub decode: Duration,
    /// Arrival to last token.
    pub end_to_end: Duration,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) submission: Submission,
    pub(crate) generated: u32,
    /// Tokens of prompt and output whose KV entries exist.
    pub(crate) computed: u32,
    /// Tokens that the step in flight computes.
    pub(crate) scheduled: u32,
    pub(crate) blocks: Vec<BlockId>,
    /// Leading blocks that were offered to the prefix cache.
    pub(crate) offered: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) preemptions: u32,
    pub(crate) arrived: Duration,
    pub(crate) admitted: Option<Duration>,
    pub(crate) first_token: Duration,
    pub(crate) last_token: Duration,
}

impl Request {
    pub(crate) fn new(id: RequestId, submission: Submission, now: Duration) -> Self {
        Self {
            id,
            submission,
            generated: 0,
            computed: 0,
            scheduled: 0,
            blocks: Vec::new(),
            offered: 0,
            cached_tokens: 0,
            preemptions: 0,
            arrived: now,
            admitted: None,
            first_token: now,
            last_token: now,
        }
    }

    /// Tokens known so far: the prompt and what was generated.
    pub(crate) fn tokens(&self) -> u32 {
        self.submission.prompt_tokens + self.generated
    }

    /// Tokens that still lack KV entries. Never 0: after each token there is that token to compute.
    pub(crate) fn missing(&self) -> u32 {
        self.tokens() - self.computed
    }

    pub(crate) fn summary(&self) -> Summary {
        let admitted = self.admitted.unwrap_or(self.arrived);
        Summary {
            prompt_tokens: self.submission.prompt_tokens,
            cached_tokens: self.cached_tokens,
            generated_tokens: self.generated,
            max_tokens: self.submission.max_tokens,
            preemptions: self.preemptions,
            queue: admitted.saturating_sub(self.arrived),
            prefill: self.first_token.saturating_sub(admitted),
            decode: self.last_token.saturating_sub(self.first_token),
            end_to_end: self.last_token.saturating_sub(self.arrived),
        }
    }
}
