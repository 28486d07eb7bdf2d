//! Callers that somebody else vouches for: by tokens of an OpenID provider (RFC 7519, RFC 9068), or by certificates
//! that TLS has verified. Pure, but for keys of providers, which are read elsewhere ([`follow`]), and for what is
//! remembered of tokens.
//!
//! Of a token's own header only the name of its key is used, to find it among the provider's; where a key could be had
//! (`jku`, `jwk`, `x5u`, `x5c`) is never looked at.

mod claims;
pub(crate) mod follow;
pub(crate) mod keys;
mod recent;
pub(crate) mod sets;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;

use jsonwebtoken::dangerous::insecure_decode_claims;
use jsonwebtoken::{Algorithm, DecodingKey, crypto, decode_header};
use penstock_core::config::{self, IdentityProvider, Jwt, KeySource, NameMatch, Proof};
use penstock_core::ids::Id;
use serde_json::Value;

pub(crate) use self::claims::Claimed;
use self::keys::KeySet;
use self::recent::{Recent, Verified};
use self::sets::{Sets, Source, Standing};
use crate::principal::{Grant, Principal};
use crate::reject::Reject;

/// Keys without a name that a signature is tried with.
const MAX_TRIES: usize = 8;
/// Longer texts are no tokens.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// Those who vouch for a gateway's callers.
#[derive(Debug)]
pub(crate) struct Identities {
    providers: Vec<Provider>,
    sets: Arc<Sets>,
    recent: Recent,
}

#[derive(Debug)]
struct Provider {
    id: Id,
    spec: IdentityProvider,
    /// Keys that stand in the config.
    inline: Option<Arc<KeySet>>,
    /// Where else they are, and how often they are to be read, in seconds.
    source: Option<(Source, u64)>,
}

impl Provider {
    fn jwt(&self) -> Option<&Jwt> {
        match &self.spec.proof {
            Proof::Jwt(jwt) => Some(jwt),
            Proof::Certificate(_) => None,
        }
    }

    /// How a name of a certificate is meant: exactly, or by how much of it.
    fn takes(&self, name: &str) -> Option<usize> {
        let Proof::Certificate(names) = &self.spec.proof else {
            return None;
        };
        let matching = names.iter().filter(|own| own.matches(name));
        let lengths = matching.map(|own| match own {
            NameMatch::Exact(_) => usize::MAX,
            NameMatch::Prefix(prefix) => prefix.len(),
        });
        lengths.max()
    }

    /// What its caller may do; nothing is an error.
    fn principal(&self, claimed: Claimed) -> Result<Principal, Reject> {
        let allowed = self
            .spec
            .access
            .iter()
            .filter(|access| access.scopes.is_subset(&claimed.scopes));
        let mut grants: Vec<Grant> = allowed
            .map(|access| Grant {
                models: access.models.clone(),
                policies: access.policies.clone(),
            })
            .collect();
        if self.spec.access.is_empty() {
            grants.push(Grant::default());
        }
        if grants.is_empty() {
            return Err(Reject::ScopeMissing);
        }
        Ok(Principal::claimed(claimed, grants))
    }
}

impl Identities {
    pub(crate) fn new(providers: &BTreeMap<Id, IdentityProvider>, sets: &Arc<Sets>) -> Self {
        verify::install();
        let providers = providers.iter().map(|(id, spec)| Provider {
            id: id.clone(),
            spec: spec.clone(),
            inline: match &spec.proof {
                Proof::Jwt(Jwt {
                    keys: KeySource::Inline(json),
                    ..
                }) => KeySet::read(json.as_bytes()).map(Arc::new),
                _ => None,
            },
            source: match &spec.proof {
                Proof::Jwt(jwt) => Source::of(jwt),
                Proof::Certificate(_) => None,
            },
        });
        Self {
            providers: providers.collect(),
            sets: Arc::clone(sets),
            recent: Recent::default(),
        }
    }

    /// Where keys are to be read, and how often, in seconds.
    pub(crate) fn sources(&self) -> impl Iterator<Item = (Source, u64)> {
        self.providers
            .iter()
            .filter_map(|provider| provider.source.clone())
    }

    /// Who shows this token; `None` for what is no token, and for one of a provider that is not known.
    pub(crate) fn of_token(
        &self,
        token: &[u8],
        now_s: u64,
    ) -> Result<Option<Arc<Principal>>, Reject> {
        let is_token = token.len() <= MAX_TOKEN_BYTES && token.starts_with(b"ey");
        if !is_token || !self.providers.iter().any(|one| one.jwt().is_some()) {
            return Ok(None);
        }
        let name = recent::name(token);
        if let Some(verified) = self.recent.get(&name)
            && let Some(provider) = self.providers.get(verified.provider)
            && let Ok(set) = self.set_of(provider)
            && set.number == verified.set
        {
            if now_s >= verified.until_s {
                return Err(Reject::TokenExpired);
            }
            return Ok(Some(verified.principal));
        }
        let Some(found) = self.read(token, now_s)? else {
            return Ok(None);
        };
        let principal = Arc::clone(&found.principal);
        self.recent.put(name, found);
        Ok(Some(principal))
    }

    fn read(&self, token: &[u8], now_s: u64) -> Result<Option<Verified>, Reject> {
        let (Ok(header), Ok(claims)) =
            (decode_header(token), insecure_decode_claims::<Value>(token))
        else {
            return Ok(None);
        };
        let issuer = claims.get("iss").and_then(Value::as_str);
        let mut of_issuer = self.providers.iter().enumerate().filter_map(|(at, one)| {
            let jwt = one
                .jwt()
                .filter(|jwt| Some(jwt.issuer.as_str()) == issuer)?;
            Some((at, one, jwt))
        });
        let Some(first) = of_issuer.next() else {
            return Ok(None);
        };
        let mut all = std::iter::once(first).chain(of_issuer);
        let Some((at, provider, jwt)) = all.find(|(_, _, jwt)| is_for(&claims, jwt)) else {
            return Err(invalid("it is for somebody else (aud)"));
        };
        if header.crit.is_some() {
            return Err(invalid("it demands what is not known here (crit)"));
        }
        if !jwt.algorithms.iter().any(|own| named(*own) == header.alg) {
            return Err(invalid("it is signed in a way that is not taken (alg)"));
        }
        let set = self.set_of(provider)?;
        let mut keys = set.of(header.kid.as_deref(), header.alg).peekable();
        if keys.peek().is_none() {
            return Err(self.unknown_key(provider, now_s));
        }
        if !keys
            .take(MAX_TRIES)
            .any(|key| is_signed(token, key, header.alg))
        {
            return Err(invalid("its signature is wrong"));
        }
        let until_s = check_times(&claims, jwt.clock_skew_s, now_s)?;
        let claimed = claims::read(&provider.id, &provider.spec, &claims);
        let claimed = claimed.map_err(|lacking| Reject::IdentityIncomplete { claim: lacking.0 })?;
        Ok(Some(Verified {
            principal: Arc::new(provider.principal(claimed)?),
            provider: at,
            set: set.number,
            until_s,
        }))
    }

    fn set_of(&self, provider: &Provider) -> Result<Arc<KeySet>, Reject> {
        if let Some(inline) = &provider.inline {
            return Ok(Arc::clone(inline));
        }
        let Some((source, _)) = &provider.source else {
            return Err(Reject::IdentityUnavailable { is_awaited: false });
        };
        match self.sets.of(source) {
            Standing::Known(set) => Ok(set),
            Standing::Awaited => Err(Reject::IdentityUnavailable { is_awaited: true }),
            Standing::Failed => Err(Reject::IdentityUnavailable { is_awaited: false }),
        }
    }

    /// Providers change their keys: they are looked at once more, not too often.
    fn unknown_key(&self, provider: &Provider, now_s: u64) -> Reject {
        match &provider.source {
            Some((source, _)) if self.sets.ask(source, now_s) => {
                Reject::IdentityUnavailable { is_awaited: true }
            }
            _ => invalid("it is signed with a key that its issuer does not have (kid)"),
        }
    }

    /// Who shows a certificate with these names.
    pub(crate) fn of_names(&self, names: &[String]) -> Result<Option<Principal>, Reject> {
        let taken = names.iter().flat_map(|name| {
            let takers = self.providers.iter();
            takers.filter_map(move |one| Some((one.takes(name)?, one, name)))
        });
        let Some((_, provider, name)) = taken.max_by_key(|(length, ..)| *length) else {
            return Ok(None);
        };
        let config::Team::Named(team) = &provider.spec.team else {
            return Ok(None);
        };
        let claimed = Claimed {
            provider: provider.id.clone(),
            subject: name.clone(),
            team: team.clone(),
            user: name.clone(),
            attributes: BTreeMap::new(),
            scopes: std::collections::BTreeSet::new(),
        };
        provider.principal(claimed).map(Some)
    }

    /// A caller who was known before, as long as its provider is.
    pub(crate) fn again(&self, claimed: &Claimed) -> Result<Principal, Reject> {
        let mut providers = self.providers.iter();
        let provider = providers.find(|provider| provider.id == claimed.provider);
        let provider = provider.ok_or(Reject::KeyUnknown)?;
        provider.principal(claimed.clone())
    }
}

fn invalid(why: &'static str) -> Reject {
    Reject::TokenInvalid { why }
}

/// `aud` is a text or a list of texts (RFC 7519, 4.1.3).
fn is_for(claims: &Value, jwt: &Jwt) -> bool {
    match claims.get("aud") {
        Some(Value::String(one)) => jwt.audiences.contains(one),
        Some(Value::Array(all)) => {
            let mut all = all.iter().filter_map(Value::as_str);
            all.any(|one| jwt.audiences.contains(one))
        }
        _ => false,
    }
}

/// Until when it is good, in Unix seconds. A token without an end is none.
fn check_times(claims: &Value, skew_s: u64, now_s: u64) -> Result<u64, Reject> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast to integers keeps to their range"
    )]
    let time = |name: &str| Some(claims.get(name)?.as_f64()?.max(0.0) as u64);
    let Some(end_s) = time("exp") else {
        return Err(invalid("it has no end (exp)"));
    };
    let until_s = end_s.saturating_add(skew_s);
    if now_s >= until_s {
        return Err(Reject::TokenExpired);
    }
    let begins_s = match claims.get("nbf") {
        None => 0,
        Some(_) => time("nbf").ok_or_else(|| invalid("its beginning is no time (nbf)"))?,
    };
    if now_s.saturating_add(skew_s) < begins_s {
        return Err(invalid("it is not good yet (nbf)"));
    }
    Ok(until_s)
}

fn is_signed(token: &[u8], key: &DecodingKey, algorithm: Algorithm) -> bool {
    let dot = memchr::memrchr(b'.', token);
    let Some((message, signature)) = dot.and_then(|dot| token.split_at_checked(dot)) else {
        return false;
    };
    let signature = signature.get(1..).map(std::str::from_utf8);
    let Some(Ok(signature)) = signature else {
        return false;
    };
    crypto::verify(signature, message, key, algorithm).unwrap_or(false)
}

fn named(algorithm: config::Algorithm) -> Algorithm {
    match algorithm {
        config::Algorithm::Rs256 => Algorithm::RS256,
        config::Algorithm::Rs384 => Algorithm::RS384,
        config::Algorithm::Rs512 => Algorithm::RS512,
        config::Algorithm::Ps256 => Algorithm::PS256,
        config::Algorithm::Ps384 => Algorithm::PS384,
        config::Algorithm::Ps512 => Algorithm::PS512,
        config::Algorithm::Es256 => Algorithm::ES256,
        config::Algorithm::Es384 => Algorithm::ES384,
        config::Algorithm::EdDsa => Algorithm::EdDSA,
    }
}

#[cfg(test)]
mod tests;
