//! A map that forgets. Bounded: when half of its places are taken anew, the older half goes; who is asked for stays.
//! Pure.

use std::collections::HashMap;
use std::hash::Hash;

/// See the module.
#[derive(Debug)]
pub(crate) struct Halves<K, V> {
    half: usize,
    new: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K: Copy + Eq + Hash, V: Clone> Halves<K, V> {
    /// An empty one with so many places.
    pub(crate) fn new(places: usize) -> Self {
        Self {
            half: places / 2,
            new: HashMap::new(),
            old: HashMap::new(),
        }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        if let Some(found) = self.new.get(key) {
            return Some(found.clone());
        }
        let found = self.old.remove(key)?;
        self.put(*key, found.clone());
        Some(found)
    }

    pub(crate) fn put(&mut self, key: K, value: V) {
        if self.new.len() >= self.half {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_who_comes_again_stays() {
        const PLACES: usize = 1_024;
        let mut halves = Halves::new(PLACES);
        halves.put(usize::MAX, "often");
        for number in 0..10 * PLACES {
            halves.put(number, "once");
            if number % 100 == 0 {
                assert_eq!(halves.get(&usize::MAX), Some("often"), "{number}");
            }
        }
        assert_eq!(halves.get(&0), None);
        assert!(halves.new.len() + halves.old.len() <= PLACES);
    }
}
