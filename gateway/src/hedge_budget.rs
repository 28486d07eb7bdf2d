//! How many tokens may be asked for twice. Pure.
//!
//! A hedge costs an engine the prompt once more. Each request of a rule earns a share of its own prompt, so that in the
//! long run hedges add at most that share of tokens to the load.

use std::sync::atomic::{AtomicU64, Ordering};

/// What may be saved, in tokens: one of the longest prompts, or a burst of usual ones.
const MOST: u64 = 256 * 1024;
const PERCENT: u64 = 100;

/// One rule's budget.
#[derive(Debug, Default)]
pub struct HedgeBudget(AtomicU64);

impl HedgeBudget {
    /// A request came whose prompt has about `tokens`; hedges may add `percent` of all prompts' tokens.
    pub fn earn(&self, tokens: u32, percent: u32) {
        let earned = u64::from(tokens.max(1)) * u64::from(percent);
        let full = MOST * PERCENT;
        let _full = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| {
                (saved < full).then(|| (saved + earned).min(full))
            });
    }

    /// Pays for a second request with such a prompt, if there is enough.
    pub fn take(&self, tokens: u32) -> bool {
        let cost = u64::from(tokens.max(1)) * PERCENT;
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |saved| {
                saved.checked_sub(cost)
            });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hedges_add_at_most_their_share(prompts in prop::collection::vec(0u32..5_000, 1..400), percent in 1u32..=100) {
            let budget = HedgeBudget::default();
            let (mut asked, mut hedged) = (0, 0);
            for prompt in prompts {
                budget.earn(prompt, percent);
                asked += u64::from(prompt.max(1));
                if budget.take(prompt) {
                    hedged += u64::from(prompt.max(1));
                }
            }
            prop_assert!(hedged * 100 <= asked * u64::from(percent));
        }
    }

    #[test]
    fn savings_are_bounded() {
        let budget = HedgeBudget::default();
        (0..10).for_each(|_| budget.earn(u32::MAX, 100));
        assert!(budget.take(u32::try_from(MOST).unwrap()));
        assert!(!budget.take(1));
    }
}
