//! `Queue`: which namespace is reconciled when. Pure: time comes in. A burst of changes becomes one pass, a namespace
//! is never in work twice at once, and one that fails waits longer each time without holding up the others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How long a first change waits for others of the same burst.
pub(crate) const DEBOUNCE: Duration = Duration::from_millis(20);
/// First wait after a failure.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Longest wait after repeated failures.
const BACKOFF_MAX: Duration = Duration::from_mins(1);

/// How a pass over one namespace ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Everything is as planned; look again after this time even if nothing changes.
    Done(Option<Duration>),
    /// Something could not be read or written; try again later.
    Failed,
}

/// Namespaces that wait or are in work.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    due: BTreeMap<String, Instant>,
    working: BTreeSet<String>,
    failures: BTreeMap<String, u32>,
}

impl Queue {
    /// Something in `namespace` changed. A failing namespace is tried again at most once in [`BACKOFF_MIN`], however
    /// many events come: the change may be what mends it, or no more than its own echo.
    pub(crate) fn wake(&mut self, namespace: &str, now: Instant) {
        let wait = if self.failures.contains_key(namespace) {
            BACKOFF_MIN
        } else {
            DEBOUNCE
        };
        let due = self.due.entry(namespace.to_owned()).or_insert(now + wait);
        *due = (*due).min(now + wait);
    }

    /// The next namespace whose time has come; it counts as in work until [`Self::finish`].
    pub(crate) fn pop(&mut self, now: Instant) -> Option<String> {
        let (namespace, _) = self
            .due
            .iter()
            .filter(|(namespace, due)| **due <= now && !self.working.contains(*namespace))
            .min_by_key(|(_, due)| **due)?;
        let namespace = namespace.clone();
        self.due.remove(&namespace);
        self.working.insert(namespace.clone());
        Some(namespace)
    }

    /// When [`Self::pop`] can next return something.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due
            .iter()
            .filter(|(namespace, _)| !self.working.contains(*namespace))
            .map(|(_, due)| *due)
            .min()
    }

    /// A pass ended.
    pub(crate) fn finish(&mut self, namespace: &str, outcome: Outcome, now: Instant) {
        self.working.remove(namespace);
        match outcome {
            Outcome::Done(again) => {
                self.failures.remove(namespace);
                if let Some(again) = again {
                    let due = self.due.entry(namespace.to_owned()).or_insert(now + again);
                    *due = (*due).min(now + again);
                }
            }
            Outcome::Failed => {
                let failures = self.failures.entry(namespace.to_owned()).or_default();
                let wait = BACKOFF_MIN
                    .saturating_mul(1 << (*failures).min(10))
                    .min(BACKOFF_MAX);
                *failures = failures.saturating_add(1);
                self.due.insert(namespace.to_owned(), now + wait);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "a test needs some instant to count from"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn burst_becomes_one_pass() {
        let (start, mut queue) = (start(), Queue::default());
        for ms in 0..10 {
            queue.wake("a", at(start, ms));
        }
        assert_eq!(queue.pop(at(start, 19)), None);
        assert_eq!(queue.pop(at(start, 20)).as_deref(), Some("a"));
        assert_eq!(queue.pop(at(start, 1000)), None);
    }

    #[test]
    fn change_during_a_pass_causes_another_pass_after_it() {
        let (start, mut queue) = (start(), Queue::default());
        queue.wake("a", start);
        queue.pop(at(start, 20)).unwrap();
        queue.wake("a", at(start, 30));
        assert_eq!(queue.pop(at(start, 100)), None, "never in work twice");
        assert_eq!(queue.next_due(), None);
        queue.finish("a", Outcome::Done(None), at(start, 100));
        assert_eq!(queue.pop(at(start, 100)).as_deref(), Some("a"));
    }

    #[test]
    fn failing_namespace_backs_off_and_others_go_on() {
        let (start, mut queue) = (start(), Queue::default());
        let mut now = start;
        let mut waits = Vec::new();
        queue.wake("bad", now);
        for _ in 0..9 {
            now = now.max(queue.next_due().unwrap());
            assert_eq!(queue.pop(now).as_deref(), Some("bad"));
            queue.finish("bad", Outcome::Failed, now);
            queue.wake("good", now);
            assert_eq!(queue.pop(now + DEBOUNCE).as_deref(), Some("good"));
            queue.finish("good", Outcome::Done(None), now);
            waits.push(queue.next_due().unwrap().duration_since(now).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }

    #[test]
    fn change_brings_a_failing_namespace_forward_but_not_at_once() {
        let (start, mut queue) = (start(), Queue::default());
        queue.wake("bad", start);
        for _ in 0..5 {
            let now = queue.next_due().unwrap();
            queue.pop(now).unwrap();
            queue.finish("bad", Outcome::Failed, now);
        }
        let now = queue
            .next_due()
            .unwrap()
            .checked_sub(Duration::from_secs(10))
            .unwrap();
        queue.wake("bad", now);
        assert_eq!(queue.next_due(), Some(now + BACKOFF_MIN));
    }

    #[test]
    fn success_ends_the_backoff() {
        let (start, mut queue) = (start(), Queue::default());
        queue.wake("a", start);
        queue.pop(at(start, 20)).unwrap();
        queue.finish("a", Outcome::Failed, at(start, 20));
        let due = queue.next_due().unwrap();
        queue.pop(due).unwrap();
        queue.finish("a", Outcome::Done(Some(Duration::from_mins(10))), due);
        assert_eq!(queue.next_due(), Some(due + Duration::from_mins(10)));
        queue.wake("a", due);
        assert_eq!(queue.next_due(), Some(due + DEBOUNCE));
    }
}
