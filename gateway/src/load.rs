//! The ledger of load per backend, from which `GET /load` reports to the scaler.
//!
//! Requests hold a [`Ticket`] from the moment a backend is meant to answer them until their last byte; dropping it is
//! the only way out, so nothing is counted for ever. Time to first token and token gaps come from streams only: of
//! other answers the first byte is the last, and their generation time would look like a queue. For the same reason
//! only streams (and held requests) count as waiting. Nothing here reads a clock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use penstock_core::histogram::Histogram;
use penstock_core::ids::BackendId;
use penstock_core::load::{BackendLoad, LoadReport, MAX_AGES};
use tokio::sync::watch;

/// Bytes of a request body that count as one prompt token: English text in common tokenizers, JSON included.
pub const BYTES_PER_TOKEN: u32 = 4;
/// A frame with more tokens than this counts as this many gaps.
const MAX_GAPS_PER_FRAME: u32 = 64;

/// Tells listeners that some backend went from no request to one.
#[derive(Debug, Default)]
pub struct Demand {
    /// Counts such moments.
    moments: watch::Sender<u64>,
    listeners: AtomicUsize,
}

impl Demand {
    /// Sees each moment from now on.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.moments.subscribe()
    }

    /// Counts a listener in, unless there are `limit` already.
    pub fn join(&self, limit: usize) -> bool {
        self.listeners
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count < limit).then_some(count + 1)
            })
            .is_ok()
    }

    /// Counts a listener out.
    pub fn leave(&self) {
        self.listeners.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All backends.
#[derive(Debug)]
pub struct Ledger {
    shards: usize,
    demand: Arc<Demand>,
    backends: Mutex<BTreeMap<BackendId, Arc<BackendLedger>>>,
}

/// One backend.
#[derive(Debug)]
pub struct BackendLedger {
    arrivals: AtomicU64,
    prompt_tokens: AtomicU64,
    counted_input: AtomicU64,
    counted_output: AtomicU64,
    in_flight: AtomicU64,
    held: AtomicU64,
    /// One for each worker, so that workers do not wait for one another on each token.
    shards: Box<[Mutex<Shard>]>,
    demand: Arc<Demand>,
}

#[derive(Debug, Default)]
struct Shard {
    /// Since when a request waits for its first token; slots are reused, so the length is the most that ever waited.
    waiting: Vec<Option<Instant>>,
    free: Vec<usize>,
    ttft: Histogram,
    itl: Histogram,
}

impl Shard {
    fn enter(&mut self, since: Instant) -> usize {
        if let Some(slot) = self.free.pop() {
            if let Some(place) = self.waiting.get_mut(slot) {
                *place = Some(since);
            }
            slot
        } else {
            self.waiting.push(Some(since));
            self.waiting.len() - 1
        }
    }

    fn leave(&mut self, slot: usize) {
        if let Some(place) = self.waiting.get_mut(slot) {
            *place = None;
            self.free.push(slot);
        }
    }
}

impl Ledger {
    /// An empty ledger for `shards` workers.
    pub fn new(shards: usize) -> Self {
        Self {
            shards: shards.max(1),
            demand: Arc::default(),
            backends: Mutex::default(),
        }
    }

    /// The moments of new demand.
    pub fn demand(&self) -> &Arc<Demand> {
        &self.demand
    }

    /// The ledger of one backend, made when first asked for.
    pub fn backend(&self, id: &BackendId) -> Arc<BackendLedger> {
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ledger) = backends.get(id) {
            return Arc::clone(ledger);
        }
        let ledger = Arc::new(BackendLedger {
            arrivals: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            counted_input: AtomicU64::new(0),
            counted_output: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            held: AtomicU64::new(0),
            shards: (0..self.shards).map(|_| Mutex::default()).collect(),
            demand: Arc::clone(&self.demand),
        });
        backends.insert(id.clone(), Arc::clone(&ledger));
        ledger
    }

    /// Forgets backends that `keep` does not know. Requests in progress end as usual, unreported.
    pub fn retain(&self, keep: impl Fn(&BackendId) -> bool) {
        self.backends
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|id, _| keep(id));
    }

    /// The state at `now`.
    pub fn report(
        &self,
        gateway: &str,
        process_start_ms: u64,
        at_ms: u64,
        now: Instant,
    ) -> LoadReport {
        let ledgers: Vec<(BackendId, Arc<BackendLedger>)> = {
            let backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
            backends
                .iter()
                .map(|(id, ledger)| (id.clone(), Arc::clone(ledger)))
                .collect()
        };
        let backends = ledgers
            .into_iter()
            .map(|(id, ledger)| (id, ledger.load(now)))
            .collect();
        LoadReport {
            gateway: gateway.to_owned(),
            process_start_ms,
            at_ms,
            backends,
        }
    }
}

impl BackendLedger {
    /// Requests without their last byte, held ones included.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// A request is over that took so many tokens.
    pub(crate) fn count(&self, input: u64, output: u64) {
        self.counted_input.fetch_add(input, Ordering::Relaxed);
        self.counted_output.fetch_add(output, Ordering::Relaxed);
    }

    /// Requests that wait for a ready endpoint.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn shard(&self, shard: usize) -> Option<std::sync::MutexGuard<'_, Shard>> {
        self.shards
            .get(shard)
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn load(&self, now: Instant) -> BackendLoad {
        let mut load = BackendLoad {
            arrivals: self.arrivals.load(Ordering::Relaxed),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            counted_input: self.counted_input.load(Ordering::Relaxed),
            counted_output: self.counted_output.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            held: self.held.load(Ordering::Relaxed),
            ..BackendLoad::default()
        };
        let mut ages = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            load.ttft.merge(&shard.ttft);
            load.itl.merge(&shard.itl);
            ages.extend(shard.waiting.iter().flatten().map(|since| {
                u64::try_from(now.saturating_duration_since(*since).as_millis()).unwrap_or(u64::MAX)
            }));
        }
        load.waiting = u64::try_from(ages.len()).unwrap_or(u64::MAX);
        ages.sort_unstable_by(|a, b| b.cmp(a));
        ages.truncate(MAX_AGES);
        load.waiting_ages_ms = ages;
        load
    }
}

/// One request's presence in one backend's ledger.
#[derive(Debug)]
pub struct Ticket {
    ledger: Arc<BackendLedger>,
    shard: usize,
    since: Instant,
    streams: bool,
    slot: Option<usize>,
    held: bool,
    last_token: Option<Instant>,
}

impl Ticket {
    /// A request of `body_bytes` is meant for this backend from `now` on.
    pub fn enter(
        ledger: &Arc<BackendLedger>,
        shard: usize,
        body_bytes: usize,
        streams: bool,
        now: Instant,
    ) -> Self {
        ledger.arrivals.fetch_add(1, Ordering::Relaxed);
        let tokens = u64::try_from(body_bytes).unwrap_or(u64::MAX) / u64::from(BYTES_PER_TOKEN);
        ledger.prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
        let before = ledger.in_flight.fetch_add(1, Ordering::Relaxed);
        if before == 0 && ledger.demand.listeners.load(Ordering::Relaxed) > 0 {
            ledger
                .demand
                .moments
                .send_modify(|moments| *moments = moments.wrapping_add(1));
        }
        let mut ticket = Self {
            ledger: Arc::clone(ledger),
            shard,
            since: now,
            streams,
            slot: None,
            held: false,
            last_token: None,
        };
        if streams {
            ticket.wait();
        }
        ticket
    }

    fn wait(&mut self) {
        if self.slot.is_none() {
            self.slot = self
                .ledger
                .shard(self.shard)
                .map(|mut shard| shard.enter(self.since));
        }
    }

    fn stop_waiting(&mut self) {
        if let Some(slot) = self.slot.take()
            && let Some(mut shard) = self.ledger.shard(self.shard)
        {
            shard.leave(slot);
        }
    }

    /// Whether it is a ticket of this ledger.
    pub fn is_of(&self, ledger: &Arc<BackendLedger>) -> bool {
        Arc::ptr_eq(&self.ledger, ledger)
    }

    /// No endpoint can take the request yet.
    pub fn hold(&mut self) {
        if !self.held {
            self.held = true;
            self.ledger.held.fetch_add(1, Ordering::Relaxed);
            self.wait();
        }
    }

    /// An endpoint takes the request.
    pub fn release(&mut self) {
        if self.held {
            self.held = false;
            self.ledger.held.fetch_sub(1, Ordering::Relaxed);
            if !self.streams {
                self.stop_waiting();
            }
        }
    }

    /// `count` tokens arrived at `now`.
    pub fn tokens(&mut self, count: u32, now: Instant) {
        if count == 0 || !self.streams {
            return;
        }
        let Some(mut shard) = self.ledger.shard(self.shard) else {
            return;
        };
        if let Some(last) = self.last_token.replace(now) {
            let count = count.min(MAX_GAPS_PER_FRAME);
            let gap = now.saturating_duration_since(last) / count;
            (0..count).for_each(|_| shard.itl.record(gap));
        } else {
            shard.ttft.record(now.saturating_duration_since(self.since));
            if let Some(slot) = self.slot.take() {
                shard.leave(slot);
            }
        }
    }

    /// How long the request has been with this backend.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.release();
        self.stop_waiting();
        self.ledger.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a starting point for arithmetic")]
    fn start() -> Instant {
        Instant::now()
    }

    fn load(ledger: &Ledger, id: &BackendId, now: Instant) -> BackendLoad {
        ledger.report("g", 1, 2, now).backends[id].clone()
    }

    #[test]
    fn a_stream_waits_until_its_first_token_and_is_in_flight_until_dropped() {
        let (ledger, id, t0) = (Ledger::new(2), BackendId::new("a", "b"), start());
        let backend = ledger.backend(&id);
        let ms = |ms| t0 + Duration::from_millis(ms);
        let mut ticket = Ticket::enter(&backend, 1, 4000, true, t0);
        let mut other = Ticket::enter(&backend, 0, 40, true, ms(100));
        let now = load(&ledger, &id, ms(300));
        assert_eq!(
            (now.arrivals, now.prompt_tokens, now.in_flight, now.waiting),
            (2, 1010, 2, 2)
        );
        assert_eq!(now.waiting_ages_ms, [300, 200]);
        ticket.tokens(1, ms(400));
        ticket.tokens(1, ms(450));
        other.tokens(1, ms(500));
        let now = load(&ledger, &id, ms(500));
        assert_eq!((now.waiting, now.in_flight), (0, 2));
        assert_eq!((now.ttft.count(), now.itl.count()), (2, 1));
        drop((ticket, other));
        assert_eq!(load(&ledger, &id, ms(600)).in_flight, 0);
    }

    #[test]
    fn a_whole_answer_does_not_look_like_a_queue() {
        let (ledger, id, t0) = (Ledger::new(1), BackendId::new("a", "b"), start());
        let mut ticket = Ticket::enter(&ledger.backend(&id), 0, 4, false, t0);
        assert_eq!(load(&ledger, &id, t0).waiting, 0);
        ticket.tokens(1, t0 + Duration::from_secs(20));
        assert_eq!(load(&ledger, &id, t0).ttft.count(), 0);
    }

    #[test]
    fn held_requests_wait_whether_they_stream_or_not() {
        let (ledger, id, t0) = (Ledger::new(1), BackendId::new("a", "b"), start());
        let mut ticket = Ticket::enter(&ledger.backend(&id), 0, 4, false, t0);
        ticket.hold();
        ticket.hold();
        let now = load(&ledger, &id, t0);
        assert_eq!((now.held, now.waiting), (1, 1));
        ticket.release();
        let now = load(&ledger, &id, t0);
        assert_eq!((now.held, now.waiting, now.in_flight), (0, 0, 1));
        ticket.hold();
        drop(ticket);
        assert_eq!(
            load(&ledger, &id, t0),
            BackendLoad {
                arrivals: 1,
                prompt_tokens: 1,
                ..BackendLoad::default()
            }
        );
    }

    #[test]
    fn ages_are_listed_up_to_the_limit_and_counted_beyond() {
        let (ledger, id, t0) = (Ledger::new(1), BackendId::new("a", "b"), start());
        let backend = ledger.backend(&id);
        let tickets: Vec<Ticket> = (0..MAX_AGES + 10)
            .map(|_| Ticket::enter(&backend, 0, 4, true, t0))
            .collect();
        let now = load(&ledger, &id, t0 + Duration::from_secs(1));
        assert_eq!(now.waiting_ages_ms.len(), MAX_AGES);
        assert_eq!(now.waiting, MAX_AGES as u64 + 10);
        drop(tickets);
        assert_eq!(load(&ledger, &id, t0).waiting, 0);
    }

    #[test]
    fn slots_are_reused() {
        let (ledger, id, t0) = (Ledger::new(1), BackendId::new("a", "b"), start());
        let backend = ledger.backend(&id);
        for _ in 0..100 {
            drop(Ticket::enter(&backend, 0, 4, true, t0));
        }
        assert_eq!(backend.shard(0).unwrap().waiting.len(), 1);
    }

    #[test]
    fn demand_is_told_when_the_first_request_comes() {
        let ledger = Ledger::new(1);
        let backend = ledger.backend(&BackendId::new("a", "b"));
        let demand = Arc::clone(ledger.demand());
        assert!(demand.join(1));
        assert!(!demand.join(1), "listeners are bounded");
        let mut moments = demand.subscribe();
        let first = Ticket::enter(&backend, 0, 4, true, start());
        assert!(moments.has_changed().unwrap());
        moments.mark_unchanged();
        let second = Ticket::enter(&backend, 0, 4, true, start());
        assert!(
            !moments.has_changed().unwrap(),
            "the second request is no news"
        );
        drop((first, second));
        demand.leave();
        assert!(demand.join(1));
    }
}
