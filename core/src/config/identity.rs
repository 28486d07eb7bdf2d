//! Callers that somebody else vouches for: an OpenID provider with tokens, an authority with certificates.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::NameMatch;
use crate::ids::Id;

/// One IdentityProvider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct IdentityProvider {
    /// What its callers show.
    pub proof: Proof,
    /// Whose they are.
    pub team: Team,
    /// The claim with who they are within the team; `None`: `sub`, or the name in the certificate.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub user: Option<Claim>,
    /// What else rules may ask of them, and the claim with it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub attributes: BTreeMap<String, Claim>,
    /// What they may do: what any of these allows that they have the scopes of; none: everything.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub access: Vec<Access>,
}

/// What callers show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Proof {
    /// A token (RFC 7519, RFC 9068) in `Authorization: Bearer`.
    Jwt(Jwt),
    /// A client certificate with one of these names.
    Certificate(Vec<NameMatch>),
}

/// Which tokens are good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Jwt {
    /// Their `iss`.
    pub issuer: String,
    /// One of these is in their `aud`.
    pub audiences: BTreeSet<String>,
    /// What they are signed with.
    pub algorithms: BTreeSet<Algorithm>,
    /// How far clocks may be apart, in seconds.
    pub clock_skew_s: u64,
    /// Where the keys are that they are signed with.
    pub keys: KeySource,
}

/// What a token is signed with (RFC 7518, 3.1; RFC 8037). None of them has a secret that the gateway would have to
/// know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    #[serde(rename = "RS256")]
    Rs256,
    /// The same with SHA-384.
    #[serde(rename = "RS384")]
    Rs384,
    /// The same with SHA-512.
    #[serde(rename = "RS512")]
    Rs512,
    /// RSASSA-PSS with SHA-256.
    #[serde(rename = "PS256")]
    Ps256,
    /// The same with SHA-384.
    #[serde(rename = "PS384")]
    Ps384,
    /// The same with SHA-512.
    #[serde(rename = "PS512")]
    Ps512,
    /// ECDSA on P-256 with SHA-256.
    #[serde(rename = "ES256")]
    Es256,
    /// ECDSA on P-384 with SHA-384.
    #[serde(rename = "ES384")]
    Es384,
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    EdDsa,
}

/// Where the keys of a provider are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum KeySource {
    /// Here: a JWK set (RFC 7517).
    Inline(String),
    /// At a URL.
    #[serde(rename_all = "camelCase")]
    Url {
        /// Of a JWK set; `None`: the one that the issuer names (OpenID Connect Discovery 1.0).
        #[serde(skip_serializing_if = "Option::is_none", default)]
        url: Option<String>,
        /// How often it is looked at, in seconds.
        refresh_s: u64,
    },
}

/// A member of a token: by name, or by JSON pointer (RFC 6901) where it begins with `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Claim(pub String);

/// Whose callers are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub enum Team {
    /// All of them this one's.
    Named(String),
    /// As they are told to be.
    Claimed(Claim),
}

/// What some callers may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Access {
    /// Those who have all of these scopes.
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub scopes: BTreeSet<String>,
    /// The models that they may ask for; none: any.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub models: Vec<NameMatch>,
    /// The policies whose rules they may use; none: any.
    #[serde(skip_serializing_if = "BTreeSet::is_empty", default)]
    pub policies: BTreeSet<Id>,
}
