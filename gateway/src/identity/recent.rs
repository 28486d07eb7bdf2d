//! Tokens that were verified lately: a caller shows the same one for minutes, and a signature takes as long to verify
//! as all else that is done with a request. Bounded.

use std::sync::{Arc, Mutex, PoisonError};

use ring::digest::{SHA256, digest};

use crate::halves::Halves;
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
#[derive(Debug)]
pub(super) struct Recent(Mutex<Halves<Name, Verified>>);

impl Default for Recent {
    fn default() -> Self {
        Self(Mutex::new(Halves::new(PLACES)))
    }
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
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(name)
    }

    pub(super) fn put(&self, name: Name, verified: Verified) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.put(name, verified);
    }
}
