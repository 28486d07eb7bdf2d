//! Answers by key, bounded in bytes and in age; the least recently used go first. One per `SemanticCache`.
//!
//! An answer is served only while the backend that made it is still what it was: the caller of [`ExactCache::get`]
//! says which makers are acceptable, and an answer by another one is dropped.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_core::ids::BackendId;
use sha2::{Digest as _, Sha256};

use super::canonical::canonical;
use crate::meter::Usage;

/// Larger requests are not looked up: hashing them costs more than it brings, and they hardly repeat.
pub const MAX_KEYED_BYTES: usize = 1 << 20;
/// Larger answers are not stored: one must not push out thousands of usual ones (4 KiB).
pub const MAX_ENTRY_BYTES: usize = 1 << 20;
/// Counted for each answer besides its bytes: key, order, map slots and headers.
const ENTRY_OVERHEAD_BYTES: usize = 512;

/// Headers of callers that go on to backends and change what they answer.
const ASKING: [HeaderName; 3] = [
    HeaderName::from_static("anthropic-beta"),
    HeaderName::from_static("anthropic-version"),
    HeaderName::from_static("openai-beta"),
];

/// Names a request.
pub type Key = [u8; 32];
/// Names what a backend was when it answered: its target and the model asked of it.
pub type Maker = [u8; 32];

/// The key of a request body that `team` sent to `path` through the cache `cache`, with the headers that ask for
/// another answer; `None` if it is too large or nested too deep. What one team was answered is no other's to see.
pub fn key(cache: &str, team: &str, path: &str, headers: &HeaderMap, body: &[u8]) -> Option<Key> {
    if body.len() > MAX_KEYED_BYTES {
        return None;
    }
    let canonical = canonical(body)?;
    let mut hash = Sha256::new();
    for part in [cache.as_bytes(), team.as_bytes(), path.as_bytes()] {
        hash.update(part);
        hash.update([0]);
    }
    for name in ASKING {
        for value in headers.get_all(&name) {
            hash.update(name.as_str());
            hash.update([0]);
            hash.update(value);
            hash.update([0]);
        }
    }
    hash.update(&canonical);
    Some(hash.finalize().into())
}

/// A complete 200 answer.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Who answered.
    pub backend: BackendId,
    /// What the backend was then.
    pub maker: Maker,
    /// Headers that belong to the body.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// What it took then, if its backend counted.
    pub usage: Option<Usage>,
    /// The bytes as they came.
    pub body: Bytes,
}

/// The store.
#[derive(Debug)]
pub struct ExactCache {
    max_bytes: usize,
    ttl_ms: u64,
    stored: Mutex<Stored>,
}

#[derive(Debug, Default)]
struct Stored {
    entries: HashMap<Key, Slot>,
    /// Use number → key; the smallest was used longest ago.
    order: BTreeMap<u64, Key>,
    uses: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    entry: Arc<Entry>,
    stored_ms: u64,
    used: u64,
}

impl Stored {
    fn remove(&mut self, key: &Key) {
        if let Some(slot) = self.entries.remove(key) {
            self.order.remove(&slot.used);
            self.bytes -= cost(&slot.entry);
        }
    }
}

fn cost(entry: &Entry) -> usize {
    entry.body.len() + ENTRY_OVERHEAD_BYTES
}

impl ExactCache {
    /// An empty cache.
    pub fn new(max_bytes: u64, ttl_ms: u64) -> Self {
        let max_bytes = usize::try_from(max_bytes).unwrap_or(usize::MAX);
        Self {
            max_bytes,
            ttl_ms,
            stored: Mutex::default(),
        }
    }

    /// The answer for `key`, unless it is older than the time to live at `now_ms` or its maker is not acceptable.
    pub fn get(
        &self,
        key: &Key,
        now_ms: u64,
        acceptable: impl FnOnce(&Entry) -> bool,
    ) -> Option<Arc<Entry>> {
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = &mut *stored;
        let slot = stored.entries.get_mut(key)?;
        if now_ms.saturating_sub(slot.stored_ms) >= self.ttl_ms || !acceptable(&slot.entry) {
            stored.remove(key);
            return None;
        }
        stored.uses += 1;
        stored.order.remove(&slot.used);
        slot.used = stored.uses;
        stored.order.insert(slot.used, *key);
        Some(Arc::clone(&slot.entry))
    }

    /// Stores an answer, pushing out the least recently used. One that is too large alone is not stored.
    pub fn put(&self, key: Key, entry: Entry, now_ms: u64) {
        let size = cost(&entry);
        if size > self.max_bytes || entry.body.len() > MAX_ENTRY_BYTES {
            return;
        }
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        stored.remove(&key);
        while stored.bytes + size > self.max_bytes {
            let Some(oldest) = stored.order.first_key_value().map(|(_, key)| *key) else {
                break;
            };
            stored.remove(&oldest);
        }
        stored.uses += 1;
        let used = stored.uses;
        stored.bytes += size;
        stored.order.insert(used, key);
        stored.entries.insert(
            key,
            Slot {
                entry: Arc::new(entry),
                stored_ms: now_ms,
                used,
            },
        );
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.stored
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(size: usize) -> Entry {
        Entry {
            backend: BackendId::new("a", "b"),
            maker: [1; 32],
            headers: Vec::new(),
            usage: None,
            body: Bytes::from(vec![b'x'; size]),
        }
    }

    #[test]
    fn key_covers_cache_path_headers_and_meaning_of_the_body() {
        let key = |cache, team, path, body: &[u8]| key(cache, team, path, &HeaderMap::new(), body);
        let base = key("a/c", "t", "/chat", br#"{"model":"m","n":1}"#);
        assert_eq!(base, key("a/c", "t", "/chat", br#"{ "n":1, "model":"m"}"#));
        assert_ne!(base, key("a/c", "u", "/chat", br#"{"model":"m","n":1}"#));
        assert_ne!(base, key("a/d", "t", "/chat", br#"{"model":"m","n":1}"#));
        assert_ne!(base, key("a/c", "t", "/comp", br#"{"model":"m","n":1}"#));
        assert_ne!(base, key("a/c", "t", "/chat", br#"{"model":"m","n":2}"#));
        assert_eq!(key("a", "t", "b", &vec![b' '; MAX_KEYED_BYTES + 1]), None);
        let with = |name, value| {
            let value = HeaderValue::from_static(value);
            let headers = HeaderMap::from_iter([(HeaderName::from_static(name), value)]);
            super::key("a/c", "t", "/chat", &headers, br#"{"model":"m","n":1}"#)
        };
        assert_ne!(base, with("anthropic-beta", "x"));
        assert_ne!(with("anthropic-beta", "x"), with("anthropic-version", "x"));
        assert_eq!(base, with("x-request-id", "x"), "it asks for nothing");
    }

    #[test]
    fn answers_age_out_and_a_changed_maker_is_dropped() {
        let cache = ExactCache::new(1 << 20, 1000);
        cache.put([1; 32], entry(10), 5000);
        assert!(cache.get(&[1; 32], 5999, |_| true).is_some());
        assert!(cache.get(&[1; 32], 6000, |_| true).is_none());
        cache.put([1; 32], entry(10), 5000);
        assert!(
            cache
                .get(&[1; 32], 5000, |entry| entry.maker == [2; 32])
                .is_none()
        );
        assert!(
            cache.get(&[1; 32], 5000, |_| true).is_none(),
            "dropped for good"
        );
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn least_recently_used_goes_first() {
        let cache = ExactCache::new(3 * (ENTRY_OVERHEAD_BYTES as u64 + 10), 1000);
        for number in 1..=3 {
            cache.put([number; 32], entry(10), 0);
        }
        assert!(cache.get(&[1; 32], 0, |_| true).is_some());
        cache.put([4; 32], entry(10), 0);
        assert!(cache.get(&[2; 32], 0, |_| true).is_none());
        assert!(cache.get(&[1; 32], 0, |_| true).is_some());
    }

    #[test]
    fn an_answer_above_the_limit_is_not_stored() {
        let cache = ExactCache::new(8 << 20, 1000);
        cache.put([1; 32], entry(MAX_ENTRY_BYTES + 1), 0);
        assert_eq!(cache.bytes(), 0);
    }

    proptest! {
        #[test]
        fn bytes_never_exceed_the_limit(puts in prop::collection::vec((0_u8..20, 0_usize..3000, any::<bool>()), 1..100)) {
            let cache = ExactCache::new(8000, 1000);
            for (number, size, is_put) in puts {
                if is_put {
                    cache.put([number; 32], entry(size), 0);
                } else {
                    cache.get(&[number; 32], 0, |_| true);
                }
                prop_assert!(cache.bytes() <= 8000);
                let stored = cache.stored.lock().unwrap();
                prop_assert_eq!(stored.order.len(), stored.entries.len());
                prop_assert_eq!(stored.bytes, stored.entries.values().map(|slot| cost(&slot.entry)).sum::<usize>());
            }
        }
    }
}
