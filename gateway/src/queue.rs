//! Who waits for room at endpoints that have more to do than they answer in time, and whose turn it is. Pure but for
//! the wake-ups, which are handed out with the places; times come in.
//!
//! Order: higher urgency first; within one urgency a turn for each tenant, the one who was served least lately first;
//! within a tenant the oldest, or the newest once the oldest has lost half of its time: then the queue is too long for
//! all, and those who came last still have the best chance to be answered in time. Under [`Queue::ahead`] a request can
//! tell its wait before it joins.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use penstock_core::config::Urgency;
use penstock_core::ids::BackendId;
use tokio::sync::Notify;

/// Whose turn it is to be counted against others; 0 are those who show no key.
pub type Tenant = u64;

/// One who waits.
pub struct Waiter {
    /// How urgent it is.
    pub urgency: Urgency,
    /// Whose it is.
    pub tenant: Tenant,
    /// Since when it waits.
    pub since: Instant,
    /// Until when.
    pub until: Instant,
    /// Where it could go.
    pub backends: Vec<BackendId>,
    /// Called when it is its turn to look for room.
    pub wake: Arc<Notify>,
}

struct Place {
    number: u64,
    /// Woken, and not back from looking yet.
    looking: bool,
    waiter: Waiter,
}

/// All who wait in a process. Bounded by whoever lets them in.
#[derive(Default)]
pub struct Queue {
    len: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    places: Vec<Place>,
    next: u64,
    /// When a tenant was served last, as a count of turns; only while somebody waits.
    served: HashMap<Tenant, u64>,
    turns: u64,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many would be served before a newcomer of this urgency and tenant who could go to any of `backends`: all
    /// more urgent ones, and of each tenant as many as the newcomer's own has, one more included.
    pub fn ahead(&self, urgency: Urgency, tenant: Tenant, backends: &[BackendId]) -> usize {
        if self.is_empty() {
            return 0;
        }
        let state = self.state();
        let mut more_urgent = 0;
        let mut equal: HashMap<Tenant, usize> = HashMap::new();
        for place in &state.places {
            let waiter = &place.waiter;
            if !waiter.backends.iter().any(|id| backends.contains(id)) {
                continue;
            }
            match waiter.urgency.cmp(&urgency) {
                std::cmp::Ordering::Greater => more_urgent += 1,
                std::cmp::Ordering::Equal => *equal.entry(waiter.tenant).or_default() += 1,
                std::cmp::Ordering::Less => {}
            }
        }
        let own = equal.get(&tenant).copied().unwrap_or(0);
        let others = equal.iter().filter(|(other, _)| **other != tenant);
        more_urgent
            + own
            + others
                .map(|(_, count)| *count.min(&(own + 1)))
                .sum::<usize>()
    }

    /// Lets one in; the number is what it leaves with.
    pub fn join(&self, waiter: Waiter) -> u64 {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.places.push(Place {
            number,
            looking: false,
            waiter,
        });
        self.len.store(state.places.len(), Ordering::Relaxed);
        number
    }

    /// One who was woken found no room and waits on.
    pub fn stays(&self, number: u64) {
        let mut state = self.state();
        let place = state.places.iter_mut().find(|place| place.number == number);
        if let Some(place) = place {
            place.looking = false;
        }
    }

    /// One goes, served or not.
    pub fn leave(&self, number: u64, served: bool) {
        let mut state = self.state();
        let Some(index) = state.places.iter().position(|place| place.number == number) else {
            return;
        };
        let gone = state.places.swap_remove(index);
        if served {
            state.turns += 1;
            let turn = state.turns;
            state.served.insert(gone.waiter.tenant, turn);
        }
        if state.places.is_empty() {
            state.served.clear();
        }
        self.len.store(state.places.len(), Ordering::Relaxed);
    }

    /// There may be room at this backend: wakes the one whose turn it is.
    pub fn room(&self, backend: &BackendId, now: Instant) {
        if self.is_empty() {
            return;
        }
        let mut state = self.state();
        let Some(index) = state.next(backend, now) else {
            return;
        };
        if let Some(place) = state.places.get_mut(index) {
            place.looking = true;
            place.waiter.wake.notify_one();
        }
    }
}

impl State {
    fn next(&self, backend: &BackendId, now: Instant) -> Option<usize> {
        let waits = |place: &&Place| !place.looking && place.waiter.backends.contains(backend);
        let waiting = || self.places.iter().filter(waits);
        let turn_of = |place: &Place| {
            let served = self.served.get(&place.waiter.tenant).copied().unwrap_or(0);
            (std::cmp::Reverse(place.waiter.urgency), served)
        };
        let first = waiting().min_by_key(|place| (turn_of(place), place.number))?;
        let alike = |place: &&Place| {
            place.waiter.urgency == first.waiter.urgency
                && place.waiter.tenant == first.waiter.tenant
        };
        let Waiter { since, until, .. } = first.waiter;
        let waited = now.saturating_duration_since(since);
        let is_late = waited * 2 > until.saturating_duration_since(since);
        let chosen = if is_late {
            waiting().filter(alike).max_by_key(|place| place.number)?
        } else {
            first
        };
        self.places
            .iter()
            .position(|place| place.number == chosen.number)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;
    use std::time::Duration;

    use super::*;

    fn backend() -> BackendId {
        BackendId::new("ns", "a")
    }

    fn at(ms: u64) -> Instant {
        static START: LazyLock<Instant> = LazyLock::new(penstock_shell::clock::now);
        *START + Duration::from_millis(ms)
    }

    fn waiter(urgency: Urgency, tenant: Tenant, since_ms: u64) -> Waiter {
        Waiter {
            urgency,
            tenant,
            since: at(since_ms),
            until: at(since_ms + 1_000),
            backends: vec![backend()],
            wake: Arc::default(),
        }
    }

    /// The numbers in the order in which they are served at `now_ms`.
    fn order(queue: &Queue, now_ms: u64) -> Vec<u64> {
        let mut order = Vec::new();
        loop {
            let next = {
                let state = queue.state();
                let next = state.next(&backend(), at(now_ms));
                next.map(|index| state.places[index].number)
            };
            let Some(number) = next else {
                return order;
            };
            queue.leave(number, true);
            order.push(number);
        }
    }

    #[test]
    fn the_urgent_come_first_and_tenants_take_turns() {
        let queue = Queue::default();
        for _ in 0..3 {
            queue.join(waiter(Urgency::Normal, 1, 0));
        }
        queue.join(waiter(Urgency::Low, 2, 0));
        queue.join(waiter(Urgency::Normal, 2, 0));
        queue.join(waiter(Urgency::High, 1, 0));
        assert_eq!(order(&queue, 0), [5, 4, 0, 1, 2, 3]);
        assert!(queue.is_empty());
        assert!(queue.state().served.is_empty(), "nothing is kept");
    }

    #[test]
    fn once_the_oldest_are_late_the_newest_come_first() {
        let queue = Queue::default();
        (0..3).for_each(|step| {
            queue.join(waiter(Urgency::Normal, 1, step));
        });
        assert_eq!(order(&queue, 400), [0, 1, 2]);
        (0..3).for_each(|step| {
            queue.join(waiter(Urgency::Normal, 1, step));
        });
        assert_eq!(order(&queue, 600), [5, 4, 3]);
    }

    #[test]
    fn a_newcomer_can_tell_its_wait() {
        let queue = Queue::default();
        let ahead = |urgency, tenant| queue.ahead(urgency, tenant, &[backend()]);
        assert_eq!(ahead(Urgency::Normal, 1), 0);
        for _ in 0..10 {
            queue.join(waiter(Urgency::Normal, 1, 0));
        }
        assert_eq!(ahead(Urgency::Normal, 1), 10);
        assert_eq!(ahead(Urgency::Normal, 2), 1, "the tenants take turns");
        assert_eq!(ahead(Urgency::High, 1), 0);
        assert_eq!(ahead(Urgency::Low, 1), 10);
        assert_eq!(
            queue.ahead(Urgency::Normal, 1, &[BackendId::new("ns", "b")]),
            0,
            "they wait for another backend"
        );
    }

    #[test]
    fn who_was_woken_is_not_woken_again_before_it_has_looked() {
        let queue = Queue::default();
        let (first, second) = (waiter(Urgency::Normal, 1, 0), waiter(Urgency::Normal, 1, 0));
        let wakes = [Arc::clone(&first.wake), Arc::clone(&second.wake)];
        let number = queue.join(first);
        queue.join(second);
        queue.room(&backend(), at(0));
        queue.room(&backend(), at(0));
        let woken = |wake: &Arc<Notify>| {
            use futures::FutureExt as _;
            wake.notified().now_or_never().is_some()
        };
        assert!(wakes.iter().all(woken));
        queue.stays(number);
        queue.room(&backend(), at(0));
        assert!(
            woken(&wakes[0]),
            "the first found nothing and is still the first"
        );
        queue.room(&BackendId::new("ns", "b"), at(0));
        assert!(!woken(&wakes[1]));
    }
}
