//! How many answers an endpoint can begin in a second. Pure: times come in.
//!
//! The best second of the last [`SECONDS`] counts: while callers give up in masses few answers begin, and that says
//! nothing of what the endpoint could do for those who stay.

use std::sync::atomic::{AtomicU64, Ordering};

/// Long enough to outlast a collapse, short enough to notice that an endpoint has become slower.
const SECONDS: usize = 10;
/// A second's number and its count share a word.
const COUNT_BITS: u32 = 24;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;

/// One endpoint's answers, counted by second.
#[derive(Debug, Default)]
pub struct Pace {
    seconds: [AtomicU64; SECONDS],
}

impl Pace {
    /// An answer has begun: a stream its first token, any other its end.
    pub fn begun(&self, now_ms: u64) {
        let second = now_ms / 1000;
        let Some(place) = self.seconds.get(place_of(second)) else {
            return;
        };
        let add = |word: u64| match (word >> COUNT_BITS == second, word & MAX_COUNT) {
            (true, MAX_COUNT) => None,
            (true, _) => Some(word + 1),
            (false, _) => Some(second << COUNT_BITS | 1),
        };
        // `None` only at the bound of the count.
        let _ = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Answers a second, in the best of the last seconds; 0 if none has begun.
    pub fn per_s(&self, now_ms: u64) -> u32 {
        let second = now_ms / 1000;
        let oldest = second.saturating_sub(u64::try_from(SECONDS).unwrap_or(0) - 1);
        let counts = self.seconds.iter().map(|place| {
            let word = place.load(Ordering::Relaxed);
            match word >> COUNT_BITS {
                at if (oldest..=second).contains(&at) => word & MAX_COUNT,
                _ => 0,
            }
        });
        u32::try_from(counts.max().unwrap_or(0)).unwrap_or(u32::MAX)
    }
}

fn place_of(second: u64) -> usize {
    usize::try_from(second).unwrap_or(0) % SECONDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_second_counts_until_it_is_old() {
        let pace = Pace::default();
        assert_eq!(pace.per_s(0), 0);
        (0..30).for_each(|step| pace.begun(5_000 + step));
        pace.begun(7_000);
        assert_eq!(pace.per_s(7_500), 30);
        assert_eq!(pace.per_s(14_999), 30);
        assert_eq!(pace.per_s(15_000), 1);
        assert_eq!(pace.per_s(60_000), 0);
    }

    #[test]
    fn a_second_takes_the_place_of_one_that_is_ten_older() {
        let pace = Pace::default();
        (0..9).for_each(|_| pace.begun(1_000));
        pace.begun(11_000);
        assert_eq!(pace.per_s(11_000), 1);
    }
}
