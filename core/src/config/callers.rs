//! Who may call: the keys that a gateway knows, and what each may do.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{CredentialRef, IdentityProvider, NameMatch, is_default};
use crate::ids::Id;

/// The callers that a gateway knows. Where it knows some, a request must come from one of them, unless its rule takes
/// anonymous ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Callers {
    /// What keys are hashed with, see [`crate::key::Hasher`].
    pub pepper: CredentialRef,
    /// Keys by the VirtualKey that they belong to.
    pub keys: BTreeMap<Id, Key>,
    /// What those show who manage the keys in the gateway's store; `None`: nobody does, and none are looked for there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub admin: Option<CredentialRef>,
    /// Who vouches for callers without a key.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub identities: BTreeMap<Id, IdentityProvider>,
}

/// One VirtualKey.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Key {
    /// Whose it is.
    pub team: String,
    /// Whose it is within the team.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user: Option<String>,
    /// What else rules may ask of its owner.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub attributes: BTreeMap<String, String>,
    /// The models that it may ask for; none: any.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub models: Vec<NameMatch>,
    /// The policies whose rules it may use; none: any.
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub policies: BTreeSet<Id>,
    /// It is refused from then on, in Unix seconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires_s: Option<u64>,
    /// It is refused for the time being.
    #[serde(skip_serializing_if = "is_default", default)]
    pub suspended: bool,
    /// Hashes of the texts that stand for it, in hexadecimal digits, and until when each does, in Unix seconds. None
    /// while it is not made.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub hashes: BTreeMap<String, Option<u64>>,
}
