//! How long the answers of a rule are, as its last ones were: what is set aside for a request where nothing bounds what
//! it may take, or need not. Pure. Bounded: so many numbers for each rule.

use std::sync::atomic::{AtomicU32, Ordering};

/// What an answer is taken to have where nothing is known of a rule's: the mean of conversations in Azure's trace of
/// 2023 (Patel et al., *Splitwise*, 2024).
pub const USUAL_TOKENS: u32 = 211;
/// Answers are counted in so many parts of each power of two: a length that is told is at most 25 % too long.
const PARTS: u32 = 4;
/// Up to 2^20 tokens; longer ones are counted with the longest.
const BUCKETS: usize = 80;
/// Of fewer nothing is told.
const LEAST: u32 = 20;
/// Where there are so many, each counts half from then on.
const MANY: u32 = 1_024;
/// Of a hundred answers so many are no longer than what is told.
const PERCENT: u32 = 95;

/// See the module.
#[derive(Debug)]
pub struct Lengths {
    buckets: [AtomicU32; BUCKETS],
    count: AtomicU32,
}

impl Default for Lengths {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU32::new(0) }; BUCKETS],
            count: AtomicU32::new(0),
        }
    }
}

impl Lengths {
    /// An answer had so many tokens.
    pub fn note(&self, tokens: u64) {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let Some(bucket) = bucket(tokens).and_then(|bucket| self.buckets.get(bucket)) else {
            return;
        };
        bucket.fetch_add(1, Ordering::Relaxed);
        if self.count.fetch_add(1, Ordering::Relaxed) + 1 == MANY {
            let mut left = 0;
            for bucket in &self.buckets {
                let half = bucket.load(Ordering::Relaxed) / 2;
                bucket.store(half, Ordering::Relaxed);
                left += half;
            }
            self.count.store(left, Ordering::Relaxed);
        }
    }

    /// How long an answer is likely to be at most; `None` while few are known.
    pub fn likely(&self) -> Option<u32> {
        let count = self.count.load(Ordering::Relaxed);
        if count < LEAST {
            return None;
        }
        let enough = (count * PERCENT).div_ceil(100);
        let mut seen = 0;
        let found = self.buckets.iter().position(|bucket| {
            seen += bucket.load(Ordering::Relaxed);
            seen >= enough
        });
        found.map(longest)
    }
}

/// Where an answer of so many tokens is counted; one without tokens is none.
fn bucket(tokens: u32) -> Option<usize> {
    let power = tokens.checked_ilog2()?;
    let part = (u64::from(tokens) * u64::from(PARTS)) >> power;
    let bucket = u64::from(power * PARTS) + part - u64::from(PARTS);
    Some(usize::try_from(bucket).map_or(BUCKETS - 1, |bucket| bucket.min(BUCKETS - 1)))
}

/// The longest answer that is counted in a bucket.
fn longest(bucket: usize) -> u32 {
    let bucket = u32::try_from(bucket).unwrap_or(0);
    let (power, part) = (bucket / PARTS, bucket % PARTS);
    ((PARTS + part + 1) << power).div_ceil(PARTS) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_tells_what_few_answers_exceed() {
        let lengths = Lengths::default();
        for _ in 0..LEAST - 1 {
            lengths.note(100);
        }
        assert_eq!(lengths.likely(), None);
        lengths.note(0);
        assert_eq!(lengths.likely(), None, "no answer");
        for _ in 0..80 {
            lengths.note(100);
        }
        // One of a hundred is longer.
        lengths.note(4_000);
        assert_eq!(lengths.likely(), Some(111));
    }

    #[test]
    fn what_is_new_counts_for_more() {
        let lengths = Lengths::default();
        (0..5_000).for_each(|_| lengths.note(1_000));
        (0..2_000).for_each(|_| lengths.note(10));
        assert!(lengths.likely() > Some(900));
        (0..4_000).for_each(|_| lengths.note(10));
        assert_eq!(lengths.likely(), Some(11));
        assert!(lengths.count.load(Ordering::Relaxed) < MANY);
    }

    proptest! {
        #[test]
        fn no_answer_is_taken_for_a_shorter_one(tokens in 1_u32..1_048_576) {
            let told = longest(bucket(tokens).unwrap());
            prop_assert!(told >= tokens && u64::from(told) <= u64::from(tokens) * 5 / 4 + 1, "{told}");
        }

        #[test]
        fn any_length_is_counted(tokens in 1..u64::MAX) {
            let lengths = Lengths::default();
            (0..LEAST).for_each(|_| lengths.note(tokens));
            prop_assert!(lengths.likely().is_some());
        }
    }
}
