//! Lines that wait to be written into the store. Pure but for its lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::line::Line;

/// What waits at most: while the store is away, and no longer.
const MAX_BYTES: usize = 16 << 20;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outbox(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    lost: u64,
}

impl Outbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, unless too much waits.
    pub(crate) fn push(&self, line: &Line) {
        let mut waiting = self.waiting();
        if waiting.lines.len() >= MAX_BYTES {
            waiting.lost += 1;
        } else {
            line.write(&mut waiting.lines);
        }
    }

    /// All that wait, and how many were lost since the last time.
    pub(crate) fn take(&self) -> (Vec<u8>, u64) {
        let mut waiting = self.waiting();
        let lost = std::mem::take(&mut waiting.lost);
        (std::mem::take(&mut waiting.lines), lost)
    }

    /// What could not be written waits on, before those that came meanwhile.
    pub(crate) fn put_back(&self, mut lines: Vec<u8>) {
        let mut waiting = self.waiting();
        lines.append(&mut waiting.lines);
        waiting.lines = lines;
    }
}
