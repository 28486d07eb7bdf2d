//! Tokens that were verified lately: a caller shows the same one for minutes, and a signature takes as long to verify
//! as all else that is done with a request. Bounded: when half of the places are taken anew, the older half goes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use ring::digest::{SHA256, digest};

use crate::principal::Principal;

/// Tokens of so many callers at a time; what is beyond that is verified at each request.
const PLACES: usize = 16_384;

/// A token that was good.
#[derive(Clone, Debug)]
pub(super) struct Verified {
    pub(super) principal: Arc<Principal>,
    /// Position of its provider.
    pub(super) provider: usize,
    /// The keys that it was verified by, see [`super::keys::KeySet`].
    pub(super) set: u64,
    /// It is good until then, in Unix seconds.
    pub(super) until_s: u64,
}

type Name = [u8; 32];

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Halves>);

#[derive(Debug, Default)]
struct Halves {
    new: HashMap<Name, Verified>,
    old: HashMap<Name, Verified>,
}

/// What a token is kept by: who reads the memory of a gateway does not find tokens there.
pub(super) fn name(token: &[u8]) -> Name {
    let mut name = Name::default();
    // SHA-256 is as long.
    name.copy_from_slice(digest(&SHA256, token).as_ref());
    name
}

impl Recent {
    pub(super) fn get(&self, name: &Name) -> Option<Verified> {
        let mut halves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = halves.new.get(name) {
            return Some(found.clone());
        }
        let found = halves.old.remove(name)?;
        halves.keep(*name, found.clone());
        Some(found)
    }

    pub(super) fn put(&self, name: Name, verified: Verified) {
        let mut halves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        halves.keep(name, verified);
    }
}

impl Halves {
    fn keep(&mut self, name: Name, verified: Verified) {
        if self.new.len() >= PLACES / 2 {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(name, verified);
    }
}

#[cfg(test)]
mod tests {
    use penstock_core::ids::Id;

    use super::*;

    fn verified(provider: usize) -> Verified {
        let principal = Principal::named(Id::new("ns", "idp"), "search", None);
        Verified {
            principal: Arc::new(principal),
            provider,
            set: 1,
            until_s: 100,
        }
    }

    #[test]
    fn it_is_bounded_and_who_comes_again_stays() {
        let recent = Recent::default();
        let often = name(b"often");
        recent.put(often, verified(7));
        for number in 0..10 * PLACES {
            recent.put(name(&number.to_le_bytes()), verified(0));
            if number % 1_000 == 0 {
                assert_eq!(recent.get(&often).unwrap().provider, 7, "{number}");
            }
        }
        assert!(recent.get(&name(&0_usize.to_le_bytes())).is_none());
        let halves = recent.0.lock().unwrap();
        assert!(halves.new.len() + halves.old.len() <= PLACES);
    }
}
