//! `Index`: what a watch has seen, by namespace and name. Pure. A listing in progress is kept apart and swapped in when
//! it is complete, so a broken watch freezes the index and never empties it.

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::ids::Id;

/// What one watch covers: one namespace, or all of them (`None`).
pub(crate) type Scope = Option<String>;

/// Items of one kind from one or more watches.
#[derive(Debug)]
pub(crate) struct Index<V> {
    items: BTreeMap<Id, V>,
    listing: BTreeMap<Scope, BTreeMap<Id, V>>,
    complete: BTreeSet<Scope>,
}

impl<V> Default for Index<V> {
    fn default() -> Self {
        Self {
            items: BTreeMap::new(),
            listing: BTreeMap::new(),
            complete: BTreeSet::new(),
        }
    }
}

impl<V: PartialEq> Index<V> {
    /// A listing of `scope` begins.
    pub(crate) fn begin(&mut self, scope: &Scope) {
        self.listing.insert(scope.clone(), BTreeMap::new());
    }

    /// One item of a listing.
    pub(crate) fn stage(&mut self, scope: &Scope, id: Id, value: V) {
        self.listing
            .entry(scope.clone())
            .or_default()
            .insert(id, value);
    }

    /// The listing is complete: it replaces what was known of its scope. Returns the namespaces where that changes
    /// anything.
    pub(crate) fn finish(&mut self, scope: &Scope) -> BTreeSet<String> {
        let listed = self.listing.remove(scope).unwrap_or_default();
        let mut changed = BTreeSet::new();
        self.items.retain(|id, _| {
            let gone = scope
                .as_ref()
                .is_none_or(|namespace| *namespace == id.namespace)
                && !listed.contains_key(id);
            if gone {
                changed.insert(id.namespace.clone());
            }
            !gone
        });
        for (id, value) in listed {
            let namespace = id.namespace.clone();
            if self.put(id, value) {
                changed.insert(namespace);
            }
        }
        self.complete.insert(scope.clone());
        changed
    }

    /// An item appeared or changed. Returns whether anything that counts is different now.
    pub(crate) fn put(&mut self, id: Id, value: V) -> bool {
        let changed = self.items.get(&id) != Some(&value);
        self.items.insert(id, value);
        changed
    }

    /// [`Self::put`], unless `is_older(new, known)`: a watch may lag behind an answer that was put in already.
    pub(crate) fn put_unless_older(
        &mut self,
        id: Id,
        value: V,
        is_older: impl Fn(&V, &V) -> bool,
    ) -> bool {
        if self
            .items
            .get(&id)
            .is_some_and(|known| is_older(&value, known))
        {
            return false;
        }
        self.put(id, value)
    }

    /// An item is gone. Returns whether it was known.
    pub(crate) fn remove(&mut self, id: &Id) -> bool {
        self.items.remove(id).is_some()
    }

    /// One item.
    pub(crate) fn get(&self, id: &Id) -> Option<&V> {
        self.items.get(id)
    }

    /// All items of one namespace, in order of name.
    pub(crate) fn of_namespace<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a Id, &'a V)> {
        self.items
            .range(Id::new(namespace, "")..)
            .take_while(move |(id, _)| id.namespace == namespace)
    }

    /// Every namespace that has an item.
    pub(crate) fn namespaces(&self) -> BTreeSet<String> {
        self.items.keys().map(|id| id.namespace.clone()).collect()
    }

    /// Whether each of `scopes` was listed at least once.
    pub(crate) fn is_complete(&self, scopes: &[Scope]) -> bool {
        scopes.iter().all(|scope| self.complete.contains(scope))
    }

    /// Forgets everything of `scope`, as for a kind that no longer exists. Returns the namespaces that had items.
    pub(crate) fn clear(&mut self, scope: &Scope) -> BTreeSet<String> {
        self.begin(scope);
        let gone = self.finish(scope);
        self.complete.remove(scope);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(namespace: &str, name: &str) -> Id {
        Id::new(namespace, name)
    }

    fn names(changed: BTreeSet<String>) -> Vec<String> {
        changed.into_iter().collect()
    }

    #[test]
    fn items_stay_while_a_listing_is_incomplete() {
        let mut index = Index::default();
        index.put(id("a", "x"), 1);
        index.begin(&None);
        assert_eq!(index.get(&id("a", "x")), Some(&1));
        assert!(!index.is_complete(&[None]));
    }

    #[test]
    fn complete_listing_replaces_and_names_only_changed_namespaces() {
        let mut index = Index::default();
        for (namespace, name) in [("a", "x"), ("b", "x"), ("c", "x")] {
            index.put(id(namespace, name), 1);
        }
        index.begin(&None);
        index.stage(&None, id("a", "x"), 1);
        index.stage(&None, id("b", "x"), 2);
        assert_eq!(names(index.finish(&None)), ["b", "c"]);
        assert!(index.is_complete(&[None]));
        assert_eq!(index.get(&id("c", "x")), None);
    }

    #[test]
    fn listing_of_one_namespace_leaves_the_others() {
        let mut index = Index::default();
        index.put(id("a", "x"), 1);
        index.put(id("b", "x"), 1);
        let scope = Some("a".to_owned());
        index.begin(&scope);
        assert_eq!(names(index.finish(&scope)), ["a"]);
        assert_eq!(index.get(&id("b", "x")), Some(&1));
        assert!(!index.is_complete(&[scope, Some("b".to_owned())]));
    }

    #[test]
    fn cleared_scope_is_empty_and_not_complete() {
        let mut index = Index::default();
        let scopes = [Some("a".to_owned()), Some("b".to_owned())];
        for scope in &scopes {
            index.begin(scope);
            index.stage(scope, id(scope.as_deref().unwrap(), "x"), 1);
            index.finish(scope);
        }
        assert_eq!(names(index.clear(&scopes[0])), ["a"]);
        assert!(!index.is_complete(&scopes) && index.is_complete(&scopes[1..]));
        assert_eq!(names(index.namespaces()), ["b"]);
    }

    #[test]
    fn namespace_range_excludes_longer_names() {
        let mut index = Index::default();
        for namespace in ["a", "a-b", "ab", "b"] {
            index.put(id(namespace, "x"), 1);
        }
        assert_eq!(index.of_namespace("a").count(), 1);
    }

    #[test]
    fn older_item_is_ignored() {
        let mut index = Index::default();
        index.put(id("a", "x"), 5);
        assert!(!index.put_unless_older(id("a", "x"), 4, |new, known| new < known));
        assert_eq!(index.get(&id("a", "x")), Some(&5));
        assert!(index.put_unless_older(id("a", "x"), 6, |new, known| new < known));
    }

    #[test]
    fn equal_item_is_no_change() {
        let mut index = Index::default();
        assert!(index.put(id("a", "x"), 1));
        assert!(!index.put(id("a", "x"), 1));
        assert!(index.put(id("a", "x"), 2));
        assert!(index.remove(&id("a", "x")));
        assert!(!index.remove(&id("a", "x")));
    }
}
