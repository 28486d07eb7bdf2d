//! The Secrets, or ConfigMaps, that backends refer to, and no others. Pure: reads are asked for and handed in.
//!
//! One watch sees the metadata of all of them and keeps none of it; it only says which kept value is out of date. So
//! thousands of foreign Secrets cost no memory, and no value is read that nothing refers to.

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::ids::Id;

use crate::index::Scope;

/// An object's values by key.
pub(crate) type Values = BTreeMap<String, Vec<u8>>;

/// Values of what is referred to. As many entries as there are references.
#[derive(Debug, Default)]
pub(crate) struct ValueCache {
    entries: BTreeMap<Id, Entry>,
    listing: BTreeMap<Scope, BTreeSet<Id>>,
}

#[derive(Debug)]
enum Entry {
    /// Somebody reads it; `stale` when it changed meanwhile.
    Reading { stale: bool },
    /// As of `version`; `None` when there is no such object.
    Known { found: Option<(String, Values)> },
}

impl ValueCache {
    /// The watch of `scope` saw `id` at `version`. Returns whether a kept value is out of date.
    pub(crate) fn seen(&mut self, scope: &Scope, id: &Id, version: &str) -> bool {
        if let Some(listing) = self.listing.get_mut(scope)
            && self.entries.contains_key(id)
        {
            listing.insert(id.clone());
        }
        self.invalidate(id, |found| {
            found.as_ref().is_none_or(|(known, _)| known != version)
        })
    }

    /// The watch saw that `id` is gone. Returns whether a kept value is out of date.
    pub(crate) fn gone(&mut self, id: &Id) -> bool {
        self.invalidate(id, Option::is_some)
    }

    fn invalidate(
        &mut self,
        id: &Id,
        outdated: impl Fn(&Option<(String, Values)>) -> bool,
    ) -> bool {
        match self.entries.get_mut(id) {
            Some(Entry::Reading { stale }) => {
                *stale = true;
                false
            }
            Some(Entry::Known { found }) if outdated(found) => self.entries.remove(id).is_some(),
            _ => false,
        }
    }

    /// The watch of `scope` lists everything anew.
    pub(crate) fn begin(&mut self, scope: &Scope) {
        self.listing.insert(scope.clone(), BTreeSet::new());
    }

    /// The listing is complete. Returns the kept ones of its scope that were not in it.
    pub(crate) fn finish(&mut self, scope: &Scope) -> Vec<Id> {
        let listed = self.listing.remove(scope).unwrap_or_default();
        let covered = |id: &Id| {
            scope
                .as_ref()
                .is_none_or(|namespace| *namespace == id.namespace)
        };
        let missing = self
            .entries
            .keys()
            .filter(|id| covered(id) && !listed.contains(*id));
        let missing: Vec<Id> = missing.cloned().collect();
        missing.into_iter().filter(|id| self.gone(id)).collect()
    }

    /// References of `namespace` are exactly `wanted`: forgets the others and returns those that must be read.
    pub(crate) fn want(&mut self, namespace: &str, wanted: &BTreeSet<Id>) -> Vec<Id> {
        self.entries
            .retain(|id, _| id.namespace != namespace || wanted.contains(id));
        let missing: Vec<Id> = wanted
            .iter()
            .filter(|id| !self.entries.contains_key(*id))
            .cloned()
            .collect();
        for id in &missing {
            self.entries
                .insert(id.clone(), Entry::Reading { stale: false });
        }
        missing
    }

    /// A read ended. Returns whether it was out of date before it ended: then read again.
    pub(crate) fn learn(&mut self, id: &Id, found: Option<(String, Values)>) -> bool {
        if let Some(Entry::Reading { stale: true }) = self.entries.get(id) {
            self.entries.remove(id).is_some()
        } else {
            self.entries.insert(id.clone(), Entry::Known { found });
            false
        }
    }

    /// A read failed: nothing is known.
    pub(crate) fn forget(&mut self, id: &Id) {
        self.entries.remove(id);
    }

    /// What is known of `namespace`; what does not exist is left out.
    pub(crate) fn values(&self, namespace: &str) -> BTreeMap<Id, Values> {
        self.entries
            .iter()
            .filter(|(id, _)| id.namespace == namespace)
            .filter_map(|(id, entry)| match entry {
                Entry::Known {
                    found: Some((_, values)),
                } => Some((id.clone(), values.clone())),
                _ => None,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> Id {
        Id::new("ns", name)
    }

    fn values(text: &str) -> Values {
        Values::from([("key".to_owned(), text.as_bytes().to_vec())])
    }

    fn cache_with(name: &str, version: &str) -> ValueCache {
        let mut cache = ValueCache::default();
        assert_eq!(cache.want("ns", &BTreeSet::from([id(name)])), [id(name)]);
        assert!(!cache.learn(&id(name), Some((version.to_owned(), values("old")))));
        cache
    }

    #[test]
    fn foreign_secrets_leave_no_trace() {
        let mut cache = ValueCache::default();
        for number in 0..20_000 {
            assert!(!cache.seen(&None, &id(&number.to_string()), "1"));
        }
        assert!(cache.entries.is_empty());
    }

    #[test]
    fn changed_secret_is_read_again() {
        let mut cache = cache_with("a", "1");
        assert!(!cache.seen(&None, &id("a"), "1"));
        assert!(cache.seen(&None, &id("a"), "2"));
        assert_eq!(cache.want("ns", &BTreeSet::from([id("a")])), [id("a")]);
    }

    #[test]
    fn change_during_a_read_is_not_lost() {
        let mut cache = ValueCache::default();
        cache.want("ns", &BTreeSet::from([id("a")]));
        assert!(!cache.seen(&None, &id("a"), "2"));
        assert!(cache.learn(&id("a"), Some(("1".to_owned(), values("old")))));
        assert_eq!(cache.want("ns", &BTreeSet::from([id("a")])), [id("a")]);
    }

    #[test]
    fn missing_secret_is_known_as_missing_until_it_appears() {
        let mut cache = ValueCache::default();
        cache.want("ns", &BTreeSet::from([id("a")]));
        cache.learn(&id("a"), None);
        assert!(cache.want("ns", &BTreeSet::from([id("a")])).is_empty());
        assert!(cache.values("ns").is_empty());
        assert!(cache.seen(&None, &id("a"), "1"));
    }

    #[test]
    fn deletion_is_noticed_by_event_and_by_listing() {
        let mut cache = cache_with("a", "1");
        assert!(cache.gone(&id("a")));
        let mut cache = cache_with("a", "1");
        cache.begin(&None);
        assert_eq!(cache.finish(&None), [id("a")]);
        let mut cache = cache_with("a", "1");
        cache.begin(&None);
        cache.seen(&None, &id("a"), "1");
        assert!(cache.finish(&None).is_empty());
        let other = Some("other".to_owned());
        cache.begin(&other);
        assert!(
            cache.finish(&other).is_empty(),
            "a listing of another namespace says nothing about this one"
        );
    }

    #[test]
    fn value_that_nothing_refers_to_any_more_is_forgotten() {
        let mut cache = cache_with("a", "1");
        assert!(cache.want("ns", &BTreeSet::new()).is_empty());
        assert!(cache.entries.is_empty());
    }
}
