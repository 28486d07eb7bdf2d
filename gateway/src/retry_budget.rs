//! How many attempts may be repeated at endpoints that fail anyway. Pure.
//!
//! Going on to an endpoint that works costs nothing extra and is always allowed. What is bounded is asking endpoints
//! again that failed lately: when all of them fail, repeats only add load to what is down. As in Finagle, requests earn
//! repeats: one for each ten, up to [`MOST`], and a process starts with as many.

use std::sync::atomic::{AtomicU32, Ordering};

/// What a request earns, in thousandths of a repeat. Finagle's `RetryBudget` and Envoy's have 20 %; an attempt at a
/// model costs more than one at a usual service.
const EARNED: u32 = 100;
const REPEAT: u32 = 1_000;
/// Repeats that a rule may have saved: enough for the first requests and for a burst, too few for a storm.
const MOST: u32 = 10;

/// One rule's budget.
#[derive(Debug)]
pub struct RetryBudget(AtomicU32);

impl Default for RetryBudget {
    fn default() -> Self {
        Self(AtomicU32::new(MOST * REPEAT))
    }
}

impl RetryBudget {
    /// A request came.
    pub fn earn(&self) {
        let full = MOST * REPEAT;
        // A load first: a full budget, the usual case, costs no write.
        if self.0.load(Ordering::Relaxed) < full {
            let _full = self
                .0
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| {
                    (saved < full).then(|| (saved + EARNED).min(full))
                });
        }
    }

    /// Takes one repeat, if there is one.
    pub fn take(&self) -> bool {
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| {
                saved.checked_sub(REPEAT)
            });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_requests_may_be_repeated_in_the_long_run() {
        let budget = RetryBudget::default();
        let mut repeated = 0;
        for _ in 0..10_000 {
            budget.earn();
            repeated += u32::from(budget.take());
        }
        assert_eq!(repeated, 1_000 + MOST - 1);
    }

    #[test]
    fn savings_are_bounded() {
        let budget = RetryBudget::default();
        (0..10_000).for_each(|_| budget.earn());
        let repeats = (0..10_000).filter(|_| budget.take()).count();
        assert_eq!(repeats, usize::try_from(MOST).unwrap());
    }
}
