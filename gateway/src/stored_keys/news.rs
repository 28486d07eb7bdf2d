//! What was changed of the keys in the store: what is written there for all gateways to hear, and what one of them has
//! heard. Pure.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// Changes that are told of at one time: who has missed more forgets all keys that it knows.
const MAX_TOLD: usize = 256;
/// Keys whose changes are remembered; beyond, all that is known is forgotten.
const MAX_HEARD: usize = 4_096;

/// The last changes, by their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Told(Vec<(u64, String)>);

impl Told {
    /// The change with `number` was of this key.
    pub(super) fn add(&mut self, number: u64, name: &str) {
        let surplus = (self.0.len() + 1).saturating_sub(MAX_TOLD);
        self.0.drain(..surplus);
        self.0.push((number, name.to_owned()));
    }
}

/// When something was read: what had been heard by then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    epoch: u64,
    number: u64,
}

/// What one gateway has heard.
#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    /// Rises when all that was known before is worth nothing.
    epoch: u64,
    /// Of the last change.
    number: u64,
    /// The last change of each key in this epoch.
    changed: HashMap<String, u64>,
}

impl Heard {
    /// Of the last change.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What is read from now on is as of this.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            epoch: self.epoch,
            number: self.number,
        }
    }

    /// The last change in the store has `number`. Returns whether that is news.
    pub(super) fn hear(&mut self, number: u64, told: &Told) -> bool {
        if number == self.number {
            return false;
        }
        let first = told.0.first().map(|(first, _)| *first);
        let is_gapless = first.is_some_and(|first| first <= self.number.saturating_add(1));
        for (at, name) in &told.0 {
            if *at > self.number {
                self.changed.insert(name.clone(), *at);
            }
        }
        // A number that falls is one of a store that has lost what it had.
        if number < self.number || !is_gapless || self.changed.len() > MAX_HEARD {
            self.epoch += 1;
            self.changed.clear();
        }
        self.number = number;
        true
    }

    /// Whether what was read of a key then may still be so.
    pub(super) fn may_be(&self, name: &str, read: Mark) -> bool {
        let last = self.changed.get(name);
        read.epoch == self.epoch && last.is_none_or(|at| *at <= read.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_changed_is_read_again_and_others_are_not() {
        let (mut told, mut heard) = (Told::default(), Heard::default());
        let before = heard.mark();
        told.add(1, "alice");
        assert!(heard.hear(1, &told));
        assert!(!heard.hear(1, &told));
        assert!(!heard.may_be("alice", before));
        assert!(heard.may_be("bob", before));
        let after = heard.mark();
        assert!(heard.may_be("alice", after));
        told.add(2, "bob");
        told.add(3, "alice");
        heard.hear(3, &told);
        assert!(!heard.may_be("alice", after) && !heard.may_be("bob", after));
        assert!(heard.may_be("carol", before));
    }

    #[test]
    fn who_may_have_missed_something_forgets_all() {
        let (mut told, mut heard) = (Told::default(), Heard::default());
        for number in 1..=MAX_TOLD as u64 + 1 {
            told.add(number, &format!("key-{number}"));
        }
        assert_eq!(told.0.len(), MAX_TOLD);
        let before = heard.mark();
        heard.hear(MAX_TOLD as u64 + 1, &told);
        assert!(!heard.may_be("key-1", before) && !heard.may_be("other", before));
        // The store has begun anew.
        let before = heard.mark();
        assert!(heard.may_be("other", before));
        let mut told = Told::default();
        told.add(1, "alice");
        heard.hear(1, &told);
        assert!(!heard.may_be("other", before));
        let before = heard.mark();
        heard.hear(0, &Told::default());
        assert!(!heard.may_be("other", before));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut told, mut heard) = (Told::default(), Heard::default());
        for number in 1..=3 * MAX_HEARD as u64 {
            told.add(number, &format!("key-{number}"));
            let before = heard.mark();
            heard.hear(number, &told);
            assert!(heard.changed.len() <= MAX_HEARD);
            assert!(!heard.may_be(&format!("key-{number}"), before));
        }
    }
}
