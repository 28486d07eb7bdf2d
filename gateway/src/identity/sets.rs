//! The keys of all providers, as they were read last, and which are to be read next. Pure: time comes in, in Unix
//! seconds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use penstock_core::config::{Jwt, KeySource};
use tokio::sync::{Notify, watch};

use super::keys::KeySet;

/// Between two reads of one provider, whatever asks for them.
const COOLDOWN_S: u64 = 10;
/// The same while its keys have never been read: it may start together with the gateway.
const FIRST_S: u64 = 1;
/// After so many reads in vain requests no longer wait for the next one.
const PATIENCE: u32 = 5;
/// Keys that could not be read again for so long are forgotten: who took them back would wait for ever otherwise.
const KEPT_S: u64 = 24 * 3_600;

/// Where keys are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    /// Whose they are.
    pub(super) issuer: String,
    /// `None`: where the issuer says.
    pub(super) url: Option<String>,
}

impl Source {
    /// Of a provider whose keys are not in the config, and how often they are to be read, in seconds.
    pub(crate) fn of(jwt: &Jwt) -> Option<(Self, u64)> {
        let KeySource::Url { url, refresh_s } = &jwt.keys else {
            return None;
        };
        let source = Self {
            issuer: jwt.issuer.clone(),
            url: url.clone(),
        };
        Some((source, *refresh_s))
    }
}

/// How the keys of a provider stand.
#[derive(Clone, Debug)]
pub(crate) enum Standing {
    Known(Arc<KeySet>),
    /// They are being read for the first time.
    Awaited,
    /// They could not be read.
    Failed,
}

#[derive(Debug, Default)]
struct Entry {
    set: Option<Arc<KeySet>>,
    /// When they were read last.
    read_s: u64,
    /// When that was tried last, if it ever was.
    tried_s: Option<u64>,
    /// Reads in vain, since they were never read.
    failures: u32,
    is_asked: bool,
}

impl Entry {
    fn rests(&self, now_s: u64) -> bool {
        let rest_s = if self.set.is_some() {
            COOLDOWN_S
        } else {
            FIRST_S
        };
        self.tried_s
            .is_some_and(|tried_s| now_s.abs_diff(tried_s) < rest_s)
    }

    fn is_due(&self, refresh_s: u64, now_s: u64) -> bool {
        let is_old = self
            .tried_s
            .is_none_or(|tried_s| now_s.abs_diff(tried_s) >= refresh_s);
        (is_old || self.is_asked || self.set.is_none()) && !self.rests(now_s)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Sets {
    entries: Mutex<HashMap<Source, Entry>>,
    /// Somebody asks.
    pub(super) wake: Notify,
    /// Counts reads, also those in vain.
    pub(crate) reads: watch::Sender<u64>,
}

impl Default for Sets {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            wake: Notify::new(),
            reads: watch::Sender::new(0),
        }
    }
}

impl Sets {
    fn entries(&self) -> MutexGuard<'_, HashMap<Source, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn of(&self, source: &Source) -> Standing {
        match self.entries().get(source) {
            Some(Entry { set: Some(set), .. }) => Standing::Known(Arc::clone(set)),
            Some(Entry {
                failures: PATIENCE..,
                ..
            }) => Standing::Failed,
            _ => Standing::Awaited,
        }
    }

    /// The keys of a provider seem to be old. Whether they are read once more, soon.
    pub(super) fn ask(&self, source: &Source, now_s: u64) -> bool {
        let mut entries = self.entries();
        let entry = entries.entry(source.clone()).or_default();
        if !entry.is_asked {
            if entry.rests(now_s) {
                return false;
            }
            entry.is_asked = true;
            self.wake.notify_one();
        }
        true
    }

    /// Whose turn it is, of all that there are; others are forgotten.
    pub(super) fn due(
        &self,
        sources: impl Iterator<Item = (Source, u64)>,
        now_s: u64,
    ) -> Vec<Source> {
        let mut entries = self.entries();
        let mut before = std::mem::take(&mut *entries);
        let mut due = Vec::new();
        for (source, refresh_s) in sources {
            let mut entry = before.remove(&source).unwrap_or_default();
            if entry.is_due(refresh_s, now_s) {
                due.push(source.clone());
            }
            if now_s.saturating_sub(entry.read_s) > KEPT_S {
                entry.set = None;
            }
            entries.insert(source, entry);
        }
        due
    }

    /// They were looked at.
    pub(super) fn tried(&self, source: &Source, found: Option<KeySet>, now_s: u64) {
        if let Some(entry) = self.entries().get_mut(source) {
            entry.tried_s = Some(now_s);
            entry.is_asked = false;
            entry.failures = entry.failures.saturating_add(1);
            if let Some(set) = found {
                entry.failures = 0;
                entry.set = Some(Arc::new(set));
                entry.read_s = now_s;
            }
        }
        self.reads.send_modify(|reads| *reads += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: &[u8] = br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

    fn source(issuer: &str) -> Source {
        Source {
            issuer: issuer.to_owned(),
            url: None,
        }
    }

    fn due(sets: &Sets, now_s: u64) -> usize {
        sets.due([(source("a"), 300)].into_iter(), now_s).len()
    }

    #[test]
    fn keys_are_read_at_once_then_now_and_then_and_when_somebody_asks() {
        let (sets, a) = (Sets::default(), source("a"));
        assert!(matches!(sets.of(&a), Standing::Awaited));
        assert_eq!(due(&sets, 1_000), 1);
        sets.tried(&a, KeySet::read(SET), 1_000);
        assert!(matches!(sets.of(&a), Standing::Known(_)));
        assert_eq!(due(&sets, 1_299), 0);
        assert_eq!(due(&sets, 1_300), 1);
        sets.tried(&a, KeySet::read(SET), 1_300);
        assert!(!sets.ask(&a, 1_309), "just read");
        assert!(sets.ask(&a, 1_310));
        assert!(sets.ask(&a, 1_310), "all who come meanwhile wait for it");
        assert_eq!(due(&sets, 1_310), 1);
        sets.tried(&a, None, 1_310);
        assert!(!sets.ask(&a, 1_311), "it was in vain");
        assert!(
            matches!(sets.of(&a), Standing::Known(_)),
            "the last good ones stay"
        );
    }

    #[test]
    fn keys_that_cannot_be_read_are_tried_again_soon_and_old_ones_end() {
        let (sets, a) = (Sets::default(), source("a"));
        for second in 0..5 {
            assert!(matches!(sets.of(&a), Standing::Awaited), "{second}");
            assert_eq!(due(&sets, 1_000 + second), 1);
            sets.tried(&a, None, 1_000 + second);
            assert_eq!(due(&sets, 1_000 + second), 0);
        }
        assert!(matches!(sets.of(&a), Standing::Failed));
        assert_eq!(due(&sets, 1_010), 1);
        sets.tried(&a, KeySet::read(SET), 1_010);
        due(&sets, 1_010 + KEPT_S);
        assert!(matches!(sets.of(&a), Standing::Known(_)));
        due(&sets, 1_011 + KEPT_S);
        assert!(matches!(sets.of(&a), Standing::Awaited));
    }

    #[test]
    fn providers_that_are_gone_are_forgotten() {
        let (sets, a) = (Sets::default(), source("a"));
        due(&sets, 1_000);
        sets.tried(&a, KeySet::read(SET), 1_000);
        sets.due([(source("b"), 300)].into_iter(), 1_001);
        assert!(matches!(sets.of(&a), Standing::Awaited));
        assert_eq!(sets.entries().len(), 1);
    }
}
