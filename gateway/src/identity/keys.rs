//! The keys that a provider signs tokens with (RFC 7517). Pure.

use std::sync::atomic::{AtomicU64, Ordering};

use jsonwebtoken::jwk::{Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Keys of one provider. Google and Microsoft have up to eight at a time.
const MAX_KEYS: usize = 64;

/// The keys of one provider at one time.
#[derive(Debug)]
pub(crate) struct KeySet {
    /// Different for each set that this process has read.
    pub(super) number: u64,
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// What it is used with alone, if that is said.
    algorithm: Option<String>,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct Set<'a> {
    #[serde(borrow)]
    keys: Vec<&'a RawValue>,
}

impl KeySet {
    /// Reads a JWK set. Keys of a kind that is not known, and those for encryption, are left out; `None` for what is no
    /// set, and for one without a key that can be used.
    pub(crate) fn read(json: &[u8]) -> Option<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let set: Set<'_> = serde_json::from_slice(json).ok()?;
        let keys = set.keys.into_iter().take(MAX_KEYS).filter_map(|raw| {
            let jwk: Jwk = serde_json::from_str(raw.get()).ok()?;
            let common = &jwk.common;
            let is_for_signatures =
                matches!(common.public_key_use, None | Some(PublicKeyUse::Signature));
            let key = DecodingKey::from_jwk(&jwk).ok()?;
            // A secret has no place in public.
            let is_public = key.family() != AlgorithmFamily::Hmac;
            (is_for_signatures && is_public).then(|| Key {
                id: common.key_id.clone(),
                algorithm: common.key_algorithm.map(|name| name.to_string()),
                key,
            })
        });
        let keys: Vec<Key> = keys.collect();
        (!keys.is_empty()).then(|| Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            keys,
        })
    }

    /// Those that may have signed a token which names `id`, or none, and `algorithm`.
    pub(super) fn of<'a>(
        &'a self,
        id: Option<&'a str>,
        algorithm: Algorithm,
    ) -> impl Iterator<Item = &'a DecodingKey> {
        let name = format!("{algorithm:?}");
        let fitting = self.keys.iter().filter(move |key| {
            let is_named = id.is_none() || key.id.as_deref() == id;
            let is_used_so = key.algorithm.as_ref().is_none_or(|own| *own == name);
            is_named && is_used_so && key.key.family().algorithms().contains(&algorithm)
        });
        fitting.map(|key| &key.key)
    }
}
