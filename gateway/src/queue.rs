//! Who waits for room at endpoints that have more to do than they answer in time, and whose turn it is. Pure but for
//! the wake-ups, which are handed out with the places; times come in.
//!
//! Order: higher urgency first; within one urgency a turn for each tenant, the one who was served least lately first;
//! within a tenant the oldest, or the newest once the oldest has lost half of its time: then the queue is too long for
//! all, and those who came last still have the best chance to be answered in time. Under [`Queue::ahead`] a request can
//! tell its wait before it joins. Where there is no place left, one who is less urgent, or of the tenant with the most
//! places, gives way to a newcomer ([`Queue::give_way`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use penstock_core::config::Urgency;
use penstock_core::ids::BackendId;
use tokio::sync::Notify;

/// Tenants of whom is known when they were served last; of more, those served longest ago count as never served. A
/// tenant is what a caller shows as its key, so there may be any number.
const MAX_SERVED: usize = 1024;

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
    /// Woken because there may be room at this backend, and not back from looking yet.
    looking: Option<BackendId>,
    /// There was room again meanwhile, and nobody else to look.
    missed: bool,
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
            looking: None,
            missed: false,
            waiter,
        });
        self.len.store(state.places.len(), Ordering::Relaxed);
        number
    }

    /// Takes the place of one who should come after a newcomer, if there is one: that one is woken, and finds that it
    /// cannot stay.
    pub fn give_way(&self, urgency: Urgency, tenant: Tenant, now: Instant) -> bool {
        let mut state = self.state();
        let Some(index) = state.last(urgency, tenant) else {
            return false;
        };
        let gone = state.places.swap_remove(index);
        self.len.store(state.places.len(), Ordering::Relaxed);
        gone.waiter.wake.notify_one();
        if let Some(backend) = gone.looking {
            state.room(&backend, now);
        }
        true
    }

    /// One who was woken found no room and waits on, if it still has its place. Room that came while it looked it may
    /// have overlooked: it looks again.
    pub fn stays(&self, number: u64) -> bool {
        let mut state = self.state();
        let place = state.places.iter_mut().find(|place| place.number == number);
        let Some(place) = place else { return false };
        if std::mem::take(&mut place.missed) {
            place.waiter.wake.notify_one();
        } else {
            place.looking = None;
        }
        true
    }

    /// One goes, `served` at a backend or not. Room that it was woken for and did not take is the next one's, and so is
    /// what is left where it was served.
    pub fn leave(&self, number: u64, served: Option<&BackendId>, now: Instant) {
        let mut state = self.state();
        let Some(index) = state.places.iter().position(|place| place.number == number) else {
            return;
        };
        let gone = state.places.swap_remove(index);
        if served.is_some() {
            state.note(gone.waiter.tenant);
        }
        if state.places.is_empty() {
            state.served.clear();
        }
        self.len.store(state.places.len(), Ordering::Relaxed);
        let woken_for = gone.looking.filter(|backend| served != Some(backend));
        for backend in woken_for.iter().chain(served) {
            state.room(backend, now);
        }
    }

    /// There may be room at this backend: wakes the one whose turn it is.
    pub fn room(&self, backend: &BackendId, now: Instant) {
        if self.is_empty() {
            return;
        }
        self.state().room(backend, now);
    }
}

impl State {
    fn room(&mut self, backend: &BackendId, now: Instant) {
        if let Some(place) = self
            .next(backend, now)
            .and_then(|at| self.places.get_mut(at))
        {
            place.looking = Some(backend.clone());
            place.waiter.wake.notify_one();
            return;
        }
        let waits = |place: &&mut Place| place.waiter.backends.contains(backend);
        if let Some(place) = self.places.iter_mut().find(waits) {
            place.missed = true;
        }
    }

    /// Who would give way to a newcomer: the newest of the least urgent ones, or of the tenant with the most places if
    /// it has more than the newcomer's would.
    fn last(&self, urgency: Urgency, tenant: Tenant) -> Option<usize> {
        let least = self.places.iter().map(|place| place.waiter.urgency).min()?;
        let equal = || {
            let places = self.places.iter().enumerate();
            places.filter(move |(_, place)| place.waiter.urgency == least)
        };
        let of = |wanted: Tenant| equal().filter(move |(_, place)| place.waiter.tenant == wanted);
        let newest = |(_, place): &(usize, &Place)| place.number;
        if least < urgency {
            return equal().max_by_key(newest).map(|(index, _)| index);
        }
        let mut counts: HashMap<Tenant, usize> = HashMap::new();
        for (_, place) in equal() {
            *counts.entry(place.waiter.tenant).or_default() += 1;
        }
        let (largest, count) = counts.iter().max_by_key(|(_, count)| **count)?;
        let own = counts.get(&tenant).copied().unwrap_or(0);
        if least > urgency || *count <= own + 1 {
            return None;
        }
        of(*largest).max_by_key(newest).map(|(index, _)| index)
    }

    /// One of this tenant's was served.
    fn note(&mut self, tenant: Tenant) {
        self.turns += 1;
        let turns = self.turns;
        self.served.insert(tenant, turns);
        if self.served.len() > MAX_SERVED {
            let most = u64::try_from(MAX_SERVED).unwrap_or(u64::MAX);
            // No two tenants have the same turn.
            self.served.retain(|_, turn| *turn + most > turns);
        }
    }

    fn next(&self, backend: &BackendId, now: Instant) -> Option<usize> {
        let waits =
            |place: &&Place| place.looking.is_none() && place.waiter.backends.contains(backend);
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

    fn woken(wake: &Arc<Notify>) -> bool {
        use futures::FutureExt as _;
        wake.notified().now_or_never().is_some()
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
            queue.leave(number, Some(&backend()), at(now_ms));
            // Whoever was woken by that finds nothing.
            queue
                .state()
                .places
                .iter_mut()
                .for_each(|place| place.looking = None);
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
    fn the_less_urgent_and_those_who_have_most_give_way() {
        let queue = Queue::default();
        assert!(!queue.give_way(Urgency::High, 1, at(0)), "nobody is there");
        let many: Vec<u64> = (0..3)
            .map(|_| queue.join(waiter(Urgency::Normal, 1, 0)))
            .collect();
        let low = waiter(Urgency::Low, 2, 0);
        let wake = Arc::clone(&low.wake);
        let low = queue.join(low);
        assert!(!queue.give_way(Urgency::Low, 3, at(0)), "one place each");
        assert!(queue.give_way(Urgency::Normal, 3, at(0)));
        assert!(woken(&wake) && !queue.stays(low), "it is less urgent");
        assert!(!queue.give_way(Urgency::Normal, 1, at(0)), "its own");
        assert!(
            !queue.give_way(Urgency::Low, 3, at(0)),
            "all are more urgent"
        );
        assert!(queue.give_way(Urgency::Normal, 3, at(0)));
        let stay: Vec<bool> = many.iter().map(|number| queue.stays(*number)).collect();
        assert_eq!(stay, [true, true, false]);
        assert_eq!(queue.len(), 2);
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

    #[test]
    fn who_leaves_without_having_looked_passes_the_wake_on() {
        let other = BackendId::new("ns", "b");
        for served in [None, Some(&other)] {
            let queue = Queue::default();
            let waiters = [0, 1, 2].map(|since| waiter(Urgency::Normal, 1, since));
            let wakes = waiters.each_ref().map(|waiter| Arc::clone(&waiter.wake));
            let numbers = waiters.map(|waiter| queue.join(waiter));
            queue.room(&backend(), at(0));
            assert!(woken(&wakes[0]));
            queue.leave(numbers[0], served, at(0));
            assert!(woken(&wakes[1]), "the room is still there: {served:?}");
            assert!(!woken(&wakes[2]));
            // Who was not woken has nothing to pass on.
            queue.leave(numbers[2], None, at(0));
            assert!(!woken(&wakes[1]));
        }
    }

    #[test]
    fn where_one_was_served_the_next_one_looks() {
        let queue = Queue::default();
        let waiters = [0, 1].map(|since| waiter(Urgency::Normal, 1, since));
        let wakes = waiters.each_ref().map(|waiter| Arc::clone(&waiter.wake));
        let numbers = waiters.map(|waiter| queue.join(waiter));
        queue.leave(numbers[0], Some(&backend()), at(0));
        assert!(woken(&wakes[1]));
    }

    #[test]
    fn room_that_comes_while_one_looks_is_looked_for_again() {
        let queue = Queue::default();
        let waiter = waiter(Urgency::Normal, 1, 0);
        let wake = Arc::clone(&waiter.wake);
        let number = queue.join(waiter);
        queue.room(&backend(), at(0));
        assert!(woken(&wake));
        queue.room(&backend(), at(0));
        queue.stays(number);
        assert!(woken(&wake));
        queue.stays(number);
        assert!(!woken(&wake), "once for each time");
        queue.room(&backend(), at(0));
        assert!(woken(&wake));
    }

    #[test]
    fn tenants_beyond_the_limit_are_forgotten_oldest_first() {
        let queue = Queue::default();
        // Somebody always waits, as under overload.
        queue.join(waiter(Urgency::Low, 0, 0));
        let most = u64::try_from(MAX_SERVED).unwrap();
        for tenant in 1..=3 * most {
            let number = queue.join(waiter(Urgency::Normal, tenant, 0));
            queue.leave(number, Some(&backend()), at(0));
            assert!(queue.state().served.len() <= MAX_SERVED);
        }
        let state = queue.state();
        assert!(
            state.served.contains_key(&(2 * most + 1)) && !state.served.contains_key(&(2 * most))
        );
    }
}
