//! `Bell`: whether a connection that its user drives has something to do. What it does to its user and the other way
//! round rings, but wakes nobody, because the user looks again anyway; only what comes from outside, of the socket,
//! wakes who waits. Without it each piece of a stream would wake the task that is just taking it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use futures::task::AtomicWaker;

#[derive(Debug)]
pub(super) struct Bell {
    rung: AtomicBool,
    waits: AtomicWaker,
}

impl Bell {
    /// It has rung: what is new has something to do.
    pub(super) fn new() -> Self {
        Self {
            rung: AtomicBool::new(true),
            waits: AtomicWaker::new(),
        }
    }

    /// Whether it rang since the last time. From now on it wakes nobody.
    pub(super) fn answer(&self) -> bool {
        self.waits.take();
        self.rung.swap(false, Ordering::AcqRel)
    }

    /// Whether it has rung.
    pub(super) fn has_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    /// Wakes `task` when it rings, at once if it has.
    pub(super) fn wait(&self, task: &Waker) {
        self.waits.register(task);
        if self.has_rung() {
            self.waits.wake();
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.waits.wake();
    }
}

#[cfg(test)]
mod tests {
    use futures::task::noop_waker;

    use super::*;

    /// Counts how often it is woken, which is what another bell does.
    fn listener() -> (Arc<Bell>, Waker) {
        let bell = Arc::new(Bell::new());
        bell.answer();
        let waker = Waker::from(Arc::clone(&bell));
        (bell, waker)
    }

    #[test]
    fn what_is_new_has_something_to_do_once() {
        let bell = Bell::new();
        assert!(bell.answer());
        assert!(!bell.answer());
    }

    #[test]
    fn it_wakes_who_waits_and_nobody_who_looks() {
        let (woken, task) = listener();
        let bell = Arc::new(Bell::new());
        let rings = Waker::from(Arc::clone(&bell));
        bell.answer();
        bell.wait(&task);
        assert!(!woken.has_rung());
        rings.wake_by_ref();
        assert!(woken.answer());

        bell.answer();
        rings.wake_by_ref();
        assert!(bell.has_rung() && !woken.has_rung());
    }

    #[test]
    fn who_begins_to_wait_too_late_is_woken_at_once() {
        let (woken, task) = listener();
        let bell = Bell::new();
        bell.wait(&noop_waker());
        bell.wait(&task);
        assert!(woken.has_rung());
    }
}
