//! (IO) `InFlight`: a request's place at an endpoint, which counts there until it is dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::snapshot::Endpoint;

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Tokens of a model, as they come.
    Stream,
    /// Another answer of a model.
    Whole,
    /// What is no model's.
    Passed,
}

/// A request at an endpoint; counted there until dropped.
pub(crate) struct InFlight {
    endpoint: Arc<Endpoint>,
    kind: Kind,
    /// Its answer has not begun.
    waits: bool,
    /// Prompt tokens that count as waiting there.
    waiting_tokens: u32,
    entered: Instant,
    entered_ms: u64,
}

impl InFlight {
    /// A stream's `prompt_tokens` count as waiting until its first token.
    pub(crate) fn enter(
        endpoint: &Arc<Endpoint>,
        kind: Kind,
        prompt_tokens: u32,
        entered: Instant,
        entered_ms: u64,
    ) -> Self {
        let live = &endpoint.live;
        live.in_flight.fetch_add(1, Ordering::Relaxed);
        live.waiting.fetch_add(1, Ordering::Relaxed);
        let is_stream = kind == Kind::Stream;
        let waiting_tokens = if is_stream { prompt_tokens } else { 0 };
        match kind {
            Kind::Stream => {
                live.waiting_tokens
                    .fetch_add(waiting_tokens, Ordering::Relaxed);
                live.pulse.enter(entered_ms);
            }
            Kind::Whole => live.pulse.doubt.enter(entered_ms),
            Kind::Passed => {}
        }
        Self {
            endpoint: Arc::clone(endpoint),
            kind,
            waits: true,
            waiting_tokens,
            entered,
            entered_ms,
        }
    }

    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Tokens of its answer came.
    pub(crate) fn heard(&mut self, now_ms: u64) {
        self.endpoint.live.pulse.hear(now_ms);
        self.begun();
    }

    fn begun(&mut self) {
        let live = &self.endpoint.live;
        if std::mem::take(&mut self.waits) {
            live.waiting.fetch_sub(1, Ordering::Relaxed);
            if !live.queue.is_empty() {
                live.queue.room(&live.backend, penstock_shell::clock::now());
            }
        }
        if self.waiting_tokens > 0 {
            let tokens = std::mem::take(&mut self.waiting_tokens);
            live.waiting_tokens.fetch_sub(tokens, Ordering::Relaxed);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.begun();
        match self.kind {
            Kind::Stream => {
                let elapsed = penstock_shell::clock::now().saturating_duration_since(self.entered);
                let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
                let now_ms = self.entered_ms.saturating_add(elapsed_ms);
                self.endpoint.live.pulse.leave(now_ms);
            }
            Kind::Whole => self.endpoint.live.pulse.doubt.leave(),
            Kind::Passed => {}
        }
        self.endpoint.live.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
