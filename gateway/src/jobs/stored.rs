//! (IO) Records in the store: as JSON, each the property of whoever made it.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use penstock_core::ids::Id;
use penstock_core::key::hexadecimal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::share::count;
use crate::behalf::Behalf;
use crate::identity::Claimed;
use crate::outbound::API_KEYS;
use crate::principal::Who;
use crate::reject::Reject;
use crate::store::{Error, Expect, Key, Store};

/// Attempts to write a record that others write at the same time.
const MAX_CLASHES: usize = 16;

/// Who made something.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Owner {
    /// A VirtualKey, or a hash of the credential that came with the request; empty if none came.
    Named(String),
    /// Somebody for whom a provider vouched.
    Claimed(Box<Claimed>),
}

/// Of one who is vouched for, what else is said may change from token to token.
impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Owner {}

impl Owner {
    pub(crate) fn of(who: &Who, headers: &HeaderMap) -> Self {
        if let Some(principal) = who.principal() {
            return match principal.claims() {
                Some(claimed) => Self::Claimed(Box::new(claimed.clone())),
                // It outlives each of its keys. No hash has a slash.
                None => Self::Named(principal.id.to_string()),
            };
        }
        let keys = API_KEYS.iter().find_map(|name| headers.get(name));
        let credential = headers.get(AUTHORIZATION).or(keys);
        Self::Named(credential.map_or_else(String::new, |credential| {
            let hash = Sha256::digest(credential.as_bytes());
            hexadecimal(&hash[..16])
        }))
    }

    /// On whose behalf its jobs run.
    pub(super) fn behalf(&self) -> Behalf {
        match self {
            Self::Claimed(claimed) => Behalf::Claimed(claimed.clone()),
            Self::Named(name) => {
                let key: Option<Id> = name.parse().ok();
                key.map_or(Behalf::Gateway, Behalf::Key)
            }
        }
    }

    fn name(&self) -> Cow<'_, str> {
        match self {
            Self::Named(name) => Cow::Borrowed(name),
            // What a provider calls its callers may be anything, and long.
            Self::Claimed(claimed) => {
                let hash = Sha256::digest(claimed.subject.as_bytes());
                Cow::Owned(format!("{}#{}", claimed.provider, hexadecimal(&hash[..16])))
            }
        }
    }

    /// What was made without a credential is whoever's who knows its id.
    pub(crate) fn may_see(&self, of: &Self) -> bool {
        of.name().is_empty() || self == of
    }

    /// Where it is kept what the owner has of one kind.
    pub(super) fn list(&self, kind: &'static str) -> Key {
        Key::new(format!("owner-{}", self.name()), kind)
    }
}

/// A record in the store.
pub(super) trait Record: Serialize + DeserializeOwned + Send {
    /// Its part of the key.
    const PART: &'static str;
    /// What it is called in messages.
    const WHAT: &'static str;
    /// How long it is kept after each change.
    const KEPT: Duration;

    fn id(&self) -> &str;
    fn owner(&self) -> &Owner;
}

/// A new id that nobody can guess.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

/// Unix seconds.
pub(super) fn now_s() -> u64 {
    penstock_shell::clock::since_epoch().as_secs()
}

/// Reads a record and its version, whoever's it is.
pub(super) async fn load<T: Record>(store: &Store, id: &str) -> Result<Option<(u64, T)>, Error> {
    let Some(found) = store.get(&Key::new(id, T::PART)).await? else {
        return Ok(None);
    };
    Ok(serde_json::from_slice(&found.value)
        .inspect_err(|err| tracing::error!(job.id = id, error = %err, "a record cannot be read"))
        .ok()
        .map(|record| (found.version, record)))
}

/// Reads a record that `owner` may see.
pub(super) async fn load_for<T: Record>(
    store: &Store,
    owner: &Owner,
    id: &str,
) -> Result<(u64, T), Reject> {
    match load::<T>(store, id).await? {
        Some((version, record)) if owner.may_see(record.owner()) => Ok((version, record)),
        _ => Err(not_found::<T>(id)),
    }
}

pub(super) fn not_found<T: Record>(id: &str) -> Reject {
    Reject::NotFound {
        what: T::WHAT,
        id: id.to_owned(),
    }
}

/// What a record takes in the store.
pub(super) fn record_bytes<T: Record>(record: &T) -> u64 {
    serde_json::to_vec(record).map_or(0, |bytes| count(bytes.len()))
}

/// Writes a record; `false` if `expect` does not hold.
pub(super) async fn save<T: Record>(
    store: &Store,
    record: &T,
    expect: Expect,
) -> Result<bool, Error> {
    let bytes = serde_json::to_vec(record).unwrap_or_default();
    let key = Key::new(record.id(), T::PART);
    let version = store.put(&key, Bytes::from(bytes), expect, T::KEPT).await?;
    Ok(version.is_some())
}

/// Changes a record, whatever others do with it at the same time. `change` says whether there is something to change.
/// Returns the record as it is then, or `None` if it is gone.
pub(super) async fn change<T: Record>(
    store: &Store,
    id: &str,
    mut change: impl FnMut(&mut T) -> bool + Send,
) -> Result<Option<T>, Error> {
    for _ in 0..MAX_CLASHES {
        let Some((version, mut record)) = load::<T>(store, id).await? else {
            return Ok(None);
        };
        if !change(&mut record) || save(store, &record, Expect::Version(version)).await? {
            return Ok(Some(record));
        }
    }
    Err(Error::Busy)
}

/// A page of what `owner` has of one kind, as the API lists it.
pub(super) async fn page<T: Record>(
    store: &Store,
    list: &Key,
    after: Option<&str>,
    newest_first: bool,
    most: usize,
    shown: impl Fn(&T) -> Option<serde_json::Value>,
) -> Result<serde_json::Value, Reject> {
    let mut ids = store.listed(list, after, newest_first, most + 1).await?;
    let has_more = ids.len() > most;
    ids.truncate(most);
    let mut data = Vec::new();
    for id in &ids {
        match load::<T>(store, id).await? {
            Some((_, record)) => data.extend(shown(&record)),
            // It came to its end before its list did.
            None => store.unlist(list, id).await?,
        }
    }
    let id_of = |entry: Option<&serde_json::Value>| {
        entry.map_or(serde_json::Value::Null, |entry| entry["id"].clone())
    };
    Ok(serde_json::json!({
        "object": "list",
        "first_id": id_of(data.first()),
        "last_id": id_of(data.last()),
        "has_more": has_more,
        "data": data,
    }))
}

impl From<Error> for Reject {
    fn from(err: Error) -> Self {
        match err {
            Error::Full => Self::StoreFull,
            Error::TooLarge => Self::StoreFull,
            Error::Away | Error::Busy => Self::StoreAway,
            Error::File(_) | Error::Server(_) => {
                tracing::error!(error = %err, "the store failed");
                Self::StoreAway
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn what_has_an_owner_is_seen_by_the_owner_only() {
        let owner = |key: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(key) = key {
                headers.insert(AUTHORIZATION, HeaderValue::from_static(key));
            }
            Owner::of(&Who::Anyone, &headers)
        };
        let (alice, bob, nobody) = (
            owner(Some("Bearer a")),
            owner(Some("Bearer b")),
            owner(None),
        );
        assert!(alice.may_see(&alice) && !bob.may_see(&alice) && !nobody.may_see(&alice));
        assert!(bob.may_see(&nobody) && nobody.may_see(&nobody));
        assert_eq!(alice.name().len(), 32);
    }

    #[test]
    fn ids_have_128_bits() {
        let id = new_id("file-");
        assert_eq!(id.len(), 5 + 32);
        assert_ne!(id, new_id("file-"));
    }
}
