//! (IO) `InFlight`: a request's place at an endpoint, which counts there until it is dropped.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::snapshot::Endpoint;

/// A request at an endpoint; counted there until dropped.
pub(crate) struct InFlight {
    endpoint: Arc<Endpoint>,
    stream: bool,
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
        stream: bool,
        prompt_tokens: u32,
        entered: Instant,
        entered_ms: u64,
    ) -> Self {
        let live = &endpoint.live;
        live.in_flight.fetch_add(1, Ordering::Relaxed);
        live.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting_tokens = if stream { prompt_tokens } else { 0 };
        if stream {
            live.waiting_tokens
                .fetch_add(waiting_tokens, Ordering::Relaxed);
            live.pulse.enter(entered_ms);
        }
        Self {
            endpoint: Arc::clone(endpoint),
            stream,
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
        if self.stream {
            let elapsed = penstock_shell::clock::now().saturating_duration_since(self.entered);
            let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            let now_ms = self.entered_ms.saturating_add(elapsed_ms);
            self.endpoint.live.pulse.leave(now_ms);
        }
        self.endpoint.live.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
