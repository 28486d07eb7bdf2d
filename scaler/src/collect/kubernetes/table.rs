//! `Table`: objects of one kind as a watch tells of them, cut down and bounded. Pure. A listing that is under way
//! changes nothing until it is complete.

use std::collections::BTreeMap;

use kube::Resource;
use kube::runtime::watcher;
use penstock_core::ids::Id;

use super::id;

/// Objects of one kind, cut down, by namespace and name.
pub(super) struct Table<T> {
    what: &'static str,
    max: usize,
    pub(super) live: BTreeMap<Id, T>,
    listing: Option<BTreeMap<Id, T>>,
    pub(super) synced: bool,
    full: bool,
}

impl<T: PartialEq> Table<T> {
    pub(super) fn new(what: &'static str, max: usize) -> Self {
        Self {
            what,
            max,
            live: BTreeMap::new(),
            listing: None,
            synced: false,
            full: false,
        }
    }

    /// Takes in an event; an object that `cut` does not want is not kept. True if anything changed.
    pub(super) fn take<K: Resource>(
        &mut self,
        event: watcher::Event<K>,
        cut: impl Fn(K) -> Option<T>,
    ) -> bool {
        match event {
            watcher::Event::Init => {
                self.listing = Some(BTreeMap::new());
                false
            }
            watcher::Event::InitApply(object) => {
                let mut listing = self.listing.take().unwrap_or_default();
                self.put(&mut listing, object, cut);
                self.listing = Some(listing);
                false
            }
            watcher::Event::InitDone => {
                self.live = self.listing.take().unwrap_or_default();
                self.synced = true;
                true
            }
            watcher::Event::Apply(object) => {
                let mut live = std::mem::take(&mut self.live);
                let changed = self.put(&mut live, object, cut);
                self.live = live;
                changed
            }
            watcher::Event::Delete(object) => self.live.remove(&id(&object)).is_some(),
        }
    }

    fn put<K: Resource>(
        &mut self,
        table: &mut BTreeMap<Id, T>,
        object: K,
        cut: impl Fn(K) -> Option<T>,
    ) -> bool {
        let id = id(&object);
        let Some(kept) = cut(object) else {
            return table.remove(&id).is_some();
        };
        if table.len() >= self.max && !table.contains_key(&id) {
            if !self.full {
                tracing::warn!(
                    what = self.what,
                    max = self.max,
                    "more objects than are kept: some are not seen"
                );
            }
            self.full = true;
            return false;
        }
        let changed = table.get(&id) != Some(&kept);
        table.insert(id, kept);
        changed
    }
}
