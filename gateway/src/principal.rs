//! Who a request comes from: by the key that it shows, or by what somebody else vouches for. Pure.
//!
//! Keys are found by their hash, which nobody who does not know the pepper can aim at: how long that takes says nothing
//! of keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_core::config::{Callers, Key, NameMatch};
use penstock_core::ids::Id;
use penstock_core::key::{self, Hash, Hasher, MAX_BYTES, MIN_FOREIGN_BYTES};
use penstock_core::names::KEY_HEADER;

use crate::identity::sets::Sets;
use crate::identity::{Claimed, Identities};
use crate::outbound::API_KEYS;
use crate::reject::Reject;
use crate::source::Credentials;
use crate::stored_keys::{Owner, StoredKeys};

/// Where only a key of the gateway can be.
pub(crate) const KEY: HeaderName = HeaderName::from_static(KEY_HEADER);
const BEARER: &[u8] = b"bearer ";

/// What a caller may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// The models that it may ask for; none: any.
    pub(crate) models: Vec<NameMatch>,
    /// The policies whose rules it may use; none: any.
    pub(crate) policies: BTreeSet<Id>,
}

impl Grant {
    fn has_model(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|known| known.matches(model))
    }

    fn has_policy(&self, policy: &Id) -> bool {
        self.policies.is_empty() || self.policies.contains(policy)
    }
}

/// A caller that the gateway knows.
#[derive(Debug, PartialEq, Eq)]
pub struct Principal {
    /// Its VirtualKey, or the IdentityProvider that vouches for it.
    pub id: Id,
    /// Its team.
    pub team: String,
    /// Who it is within the team.
    pub user: Option<String>,
    /// What else is known of it.
    pub attributes: BTreeMap<String, String>,
    /// As a provider vouches for it.
    claimed: Option<Box<Claimed>>,
    /// It may do what any of these allows.
    grants: Vec<Grant>,
    expires_s: Option<u64>,
    is_suspended: bool,
}

impl Principal {
    /// Whether it may ask for a model of this name.
    pub fn may_ask_for(&self, model: &str) -> bool {
        self.grants.iter().any(|grant| grant.has_model(model))
    }

    /// Whether it may use the rules of a policy.
    pub fn may_use(&self, policy: &Id) -> bool {
        self.grants.iter().any(|grant| grant.has_policy(policy))
    }

    /// Whether it may ask for a model by the rules of a policy.
    fn may_call(&self, policy: &Id, model: &str) -> bool {
        let mut grants = self.grants.iter();
        grants.any(|grant| grant.has_policy(policy) && grant.has_model(model))
    }

    /// As a provider vouches for it.
    pub(crate) fn claims(&self) -> Option<&Claimed> {
        self.claimed.as_deref()
    }

    /// What tells it from all others: the VirtualKey, or the provider and what that calls it.
    pub(crate) fn name(&self) -> String {
        match &self.claimed {
            None => self.id.to_string(),
            Some(claimed) => format!("{}#{}", self.id, claimed.subject),
        }
    }

    /// One with a key.
    pub(crate) fn of_key(id: &Id, spec: &Key) -> Self {
        Self {
            id: id.clone(),
            team: spec.team.clone(),
            user: spec.user.clone(),
            attributes: spec.attributes.clone(),
            claimed: None,
            grants: vec![Grant {
                models: spec.models.clone(),
                policies: spec.policies.clone(),
            }],
            expires_s: spec.expires_s,
            is_suspended: spec.suspended,
        }
    }

    /// One that a provider vouches for.
    pub(crate) fn claimed(claimed: Claimed, grants: Vec<Grant>) -> Self {
        Self {
            id: claimed.provider.clone(),
            team: claimed.team.clone(),
            user: Some(claimed.user.clone()),
            attributes: claimed.attributes.clone(),
            claimed: Some(Box::new(claimed)),
            grants,
            expires_s: None,
            is_suspended: false,
        }
    }

    /// One that may do everything.
    #[cfg(test)]
    pub(crate) fn named(id: Id, team: &str, user: Option<&str>) -> Self {
        Self {
            id,
            team: team.to_owned(),
            user: user.map(str::to_owned),
            attributes: BTreeMap::new(),
            claimed: None,
            grants: vec![Grant::default()],
            expires_s: None,
            is_suspended: false,
        }
    }

    /// Whether it may call now.
    pub(crate) fn check(&self, now_s: u64) -> Result<(), Reject> {
        if self.is_suspended {
            return Err(Reject::KeySuspended);
        }
        if self.expires_s.is_some_and(|end| end <= now_s) {
            return Err(Reject::KeyExpired);
        }
        Ok(())
    }
}

/// Who a request comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Who {
    /// The gateway knows nobody, so anybody may be it; or it is the gateway itself.
    #[default]
    Anyone,
    /// Nobody that the gateway knows.
    Stranger {
        /// It showed something that could be a key.
        shows_key: bool,
    },
    /// Somebody that it knows.
    Known(Arc<Principal>),
}

impl Who {
    /// The caller, if it is known.
    pub fn principal(&self) -> Option<&Principal> {
        match self {
            Self::Known(principal) => Some(principal),
            Self::Anyone | Self::Stranger { .. } => None,
        }
    }

    /// Whether it may use what no rule is about.
    pub fn is_let_in(&self) -> Result<(), Reject> {
        match self {
            Self::Anyone | Self::Known(_) => Ok(()),
            Self::Stranger { shows_key: true } => Err(Reject::KeyUnknown),
            Self::Stranger { shows_key: false } => Err(Reject::KeyMissing),
        }
    }

    /// Whether it may use a rule of `policy`, which takes anonymous callers or not.
    pub fn may_use(&self, policy: &Id, takes_anonymous: bool) -> Result<(), Reject> {
        match self {
            Self::Known(principal) if !principal.may_use(policy) => Err(Reject::PolicyNotAllowed),
            Self::Stranger { .. } if takes_anonymous => Ok(()),
            _ => self.is_let_in(),
        }
    }

    /// The same of a call of `model`.
    pub fn may_call(&self, policy: &Id, takes_anonymous: bool, model: &str) -> Result<(), Reject> {
        self.may_use(policy, takes_anonymous)?;
        match self.principal() {
            Some(principal) if !principal.may_call(policy, model) => Err(Reject::ModelNotAllowed {
                model: model.to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

/// Whom a text stands for.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) principal: Arc<Principal>,
    /// Until when, in Unix seconds.
    pub(crate) until_s: Option<u64>,
}

/// Everybody that a gateway knows.
#[derive(Debug)]
pub struct Principals {
    /// `None`: the pepper has not arrived, and no key can be told.
    hasher: Option<Hasher>,
    by_hash: HashMap<Hash, Known>,
    by_id: HashMap<Id, Arc<Principal>>,
    /// There are keys in the store.
    is_managed: bool,
    /// Those, and the hash of what those show who manage them.
    stored: Option<(Arc<StoredKeys>, Hash)>,
    pub(crate) identities: Identities,
}

impl Principals {
    /// Those of a config.
    pub(crate) fn new(
        callers: &Callers,
        credentials: &Credentials,
        sets: &Arc<Sets>,
        stored: &Arc<StoredKeys>,
    ) -> Self {
        let pepper = credentials.values.get(&callers.pepper.id);
        let hasher = pepper.map(|pepper| Hasher::new(pepper.value.expose().as_bytes()));
        let (mut by_hash, mut by_id) = (HashMap::new(), HashMap::new());
        for (id, spec) in &callers.keys {
            let principal = Arc::new(Principal::of_key(id, spec));
            for (hash, until_s) in &spec.hashes {
                if let Some(hash) = key::read_hash(hash) {
                    by_hash.entry(hash).or_insert(Known {
                        principal: Arc::clone(&principal),
                        until_s: *until_s,
                    });
                }
            }
            by_id.insert(id.clone(), principal);
        }
        let admin = callers.admin.as_ref();
        let token = admin.and_then(|admin| credentials.values.get(&admin.id));
        let token = token.map(|token| token.value.expose().trim().as_bytes());
        let token = token.filter(|token| token.len() >= MIN_FOREIGN_BYTES);
        let stored = hasher
            .as_ref()
            .zip(token)
            .map(|(hasher, token)| (Arc::clone(stored), hasher.hash(token)));
        Self {
            hasher,
            by_hash,
            by_id,
            is_managed: admin.is_some(),
            stored,
            identities: Identities::new(&callers.identities, sets),
        }
    }

    /// Who shows one of these headers, and in which, or a certificate with these names. A key or token that is wrong is
    /// never taken for none.
    pub fn identify(
        &self,
        headers: &HeaderMap,
        names: &[String],
        now_s: u64,
    ) -> Result<(Who, Option<HeaderName>), Reject> {
        let places = [KEY, AUTHORIZATION].into_iter().chain(API_KEYS);
        let mut stranger = Who::Stranger { shows_key: false };
        for name in places {
            let Some(text) = headers.get(&name).and_then(|value| shown(&name, value)) else {
                continue;
            };
            let known = match &self.hasher {
                // No key is so long: tokens of others are.
                _ if text.len() > MAX_BYTES => None,
                Some(hasher) => self.owner(&hasher.hash(text), text, now_s)?,
                None if self.by_hash.is_empty() && !self.is_managed => None,
                None => return Err(Reject::NotConfigured),
            };
            match known {
                Some(known) => {
                    if known.until_s.is_some_and(|end| end <= now_s) {
                        return Err(Reject::KeyExpired);
                    }
                    known.principal.check(now_s)?;
                    return Ok((Who::Known(known.principal), Some(name)));
                }
                None if name == KEY || text.starts_with(key::PREFIX.as_bytes()) => {
                    return Err(Reject::KeyUnknown);
                }
                None => {
                    if name == AUTHORIZATION
                        && let Some(principal) = self.identities.of_token(text, now_s)?
                    {
                        return Ok((Who::Known(principal), Some(name)));
                    }
                    stranger = Who::Stranger { shows_key: true };
                }
            }
        }
        Ok(match self.identities.of_names(names)? {
            Some(principal) => (Who::Known(Arc::new(principal)), None),
            None => (stranger, None),
        })
    }

    /// Whose this text is.
    fn owner(&self, hash: &Hash, text: &[u8], now_s: u64) -> Result<Option<Known>, Reject> {
        if let Some(known) = self.by_hash.get(hash) {
            return Ok(Some(known.clone()));
        }
        // The store has no other texts than those that gateways make.
        let is_made_here = text.starts_with(key::PREFIX.as_bytes());
        let Some((stored, _)) = self.stored.as_ref().filter(|_| is_made_here) else {
            return Ok(None);
        };
        match stored.find(hash, now_s) {
            Owner::Caller(known) => Ok(Some(known)),
            Owner::Nobody => Ok(None),
            Owner::Unread => Err(Reject::KeysUnavailable {
                unread: Some(*hash),
            }),
        }
    }

    /// Whether this is what those show who manage the keys in the store; `None` where there is no such token.
    pub(crate) fn is_admin(&self, token: &[u8]) -> Option<bool> {
        let (hasher, (_, admin)) = self.hasher.as_ref().zip(self.stored.as_ref())?;
        Some(hasher.hash(token) == *admin)
    }

    /// The hash of a key.
    pub(crate) fn hash(&self, text: &[u8]) -> Option<Hash> {
        self.hasher.as_ref().map(|hasher| hasher.hash(text))
    }

    /// A caller for whom a provider vouched, as long as that one is known.
    pub(crate) fn again(&self, claimed: &Claimed) -> Result<Who, Reject> {
        let principal = self.identities.again(claimed)?;
        Ok(Who::Known(Arc::new(principal)))
    }

    /// The caller of this VirtualKey, as long as it may call.
    pub fn of(&self, id: &Id, now_s: u64) -> Result<Who, Reject> {
        let principal = self.by_id.get(id).ok_or(Reject::KeyUnknown)?;
        principal.check(now_s)?;
        Ok(Who::Known(Arc::clone(principal)))
    }
}

/// What may be a key in a header.
fn shown<'a>(name: &HeaderName, value: &'a HeaderValue) -> Option<&'a [u8]> {
    let bytes = value.as_bytes();
    let text = if *name == AUTHORIZATION {
        let (scheme, text) = bytes.split_at_checked(BEARER.len())?;
        scheme.eq_ignore_ascii_case(BEARER).then_some(text)?
    } else {
        bytes
    };
    let text = text.trim_ascii();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use penstock_core::config::{CredentialRef, Key};
    use penstock_core::names;

    use super::*;
    use crate::source::Credential;

    const ALICE: &str = "sk-penstock-alice-alice-alice";
    const BEFORE: &str = "sk-penstock-before-before-before";

    fn principals(change: impl FnOnce(&mut Key), has_pepper: bool) -> Principals {
        let id = names::credential_id("default-pepper", "pepper");
        let hash = |text: &str| key::hexadecimal(&Hasher::new(b"p").hash(text.as_bytes()));
        let mut alice = Key {
            team: "search".to_owned(),
            user: None,
            attributes: BTreeMap::new(),
            models: Vec::new(),
            policies: BTreeSet::new(),
            expires_s: None,
            suspended: false,
            hashes: BTreeMap::from([(hash(ALICE), None), (hash(BEFORE), Some(100))]),
        };
        change(&mut alice);
        let callers = Callers {
            pepper: CredentialRef {
                id: id.clone(),
                version: String::new(),
            },
            keys: BTreeMap::from([(Id::new("ns", "alice"), alice)]),
            admin: None,
            identities: BTreeMap::new(),
        };
        let mut credentials = Credentials::default();
        if has_pepper {
            credentials.values.insert(id, Credential::new("p"));
        }
        Principals::new(
            &callers,
            &credentials,
            &Arc::default(),
            &Arc::new(StoredKeys::new(None, "ns")),
        )
    }

    fn shows(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| {
                let value = HeaderValue::from_str(value).unwrap();
                (HeaderName::from_static(name), value)
            })
            .collect()
    }

    #[test]
    fn a_key_is_known_in_every_header_that_sdks_put_it_in() {
        let principals = principals(|_| {}, true);
        let bearer = format!("Bearer {ALICE}");
        for (name, value) in [
            ("authorization", bearer.as_str()),
            ("authorization", &bearer.to_lowercase()),
            ("x-api-key", ALICE),
            ("api-key", ALICE),
            ("x-goog-api-key", ALICE),
            ("x-penstock-key", ALICE),
        ] {
            let (who, shown_in) = principals
                .identify(&shows(&[(name, value)]), &[], 0)
                .unwrap();
            assert_eq!(who.principal().unwrap().team, "search");
            assert_eq!(shown_in.unwrap(), name);
        }
    }

    #[test]
    fn a_key_that_is_wrong_is_not_taken_for_none() {
        let principals = principals(|_| {}, true);
        let identify = |pairs: &[(&'static str, &str)]| principals.identify(&shows(pairs), &[], 0);
        let stranger = |shows_key| Ok((Who::Stranger { shows_key }, None));
        assert_eq!(identify(&[]), stranger(false));
        assert_eq!(
            identify(&[("authorization", "Basic eDp5")]),
            stranger(false)
        );
        let long = format!("Bearer {}", "x".repeat(MAX_BYTES + 1));
        for text in ["Bearer none", &long] {
            assert_eq!(identify(&[("authorization", text)]), stranger(true));
        }
        for wrong in [
            ("authorization", "Bearer sk-penstock-nobody"),
            ("x-api-key", "sk-penstock-nobody"),
            ("x-penstock-key", "anything"),
        ] {
            assert_eq!(identify(&[wrong]), Err(Reject::KeyUnknown), "{wrong:?}");
        }
        // What is meant for a backend does not hide a key.
        let both = [
            ("authorization", "Bearer of-a-tool"),
            ("x-penstock-key", ALICE),
        ];
        assert!(identify(&both).unwrap().0.principal().is_some());
    }

    #[test]
    fn keys_end_when_they_should() {
        let plain = principals(|_| {}, true);
        let show = |key| shows(&[("x-api-key", key)]);
        assert!(plain.identify(&show(BEFORE), &[], 99).is_ok());
        assert_eq!(
            plain.identify(&show(BEFORE), &[], 100),
            Err(Reject::KeyExpired)
        );
        assert!(plain.identify(&show(ALICE), &[], u64::MAX).is_ok());
        let ends = principals(|key| key.expires_s = Some(50), true);
        assert!(ends.identify(&show(ALICE), &[], 49).is_ok());
        assert_eq!(
            ends.identify(&show(ALICE), &[], 50),
            Err(Reject::KeyExpired)
        );
        assert_eq!(
            ends.of(&Id::new("ns", "alice"), 50),
            Err(Reject::KeyExpired)
        );
        let suspended = principals(|key| key.suspended = true, true);
        assert_eq!(
            suspended.identify(&show(ALICE), &[], 0),
            Err(Reject::KeySuspended)
        );
        assert_eq!(plain.of(&Id::new("ns", "bob"), 0), Err(Reject::KeyUnknown));
    }

    #[test]
    fn without_the_pepper_nobody_is_let_in() {
        let principals = principals(|_| {}, false);
        let identify = |pairs| principals.identify(&shows(pairs), &[], 0);
        assert_eq!(
            identify(&[("x-api-key", ALICE)]),
            Err(Reject::NotConfigured)
        );
        assert_eq!(
            identify(&[]),
            Ok((Who::Stranger { shows_key: false }, None))
        );
    }

    #[test]
    fn who_may_use_what() {
        let policy = Id::new("ns", "policy");
        let other = Id::new("ns", "other");
        let restricted = principals(
            |key| {
                key.models = vec![
                    NameMatch::Exact("chat".into()),
                    NameMatch::Prefix("gpt-".into()),
                ];
                key.policies = BTreeSet::from([policy.clone()]);
            },
            true,
        );
        let alice = restricted.of(&Id::new("ns", "alice"), 0).unwrap();
        for model in ["chat", "gpt-5"] {
            assert_eq!(alice.may_call(&policy, false, model), Ok(()));
        }
        let model = "chat-2".to_owned();
        assert_eq!(
            alice.may_call(&policy, false, "chat-2"),
            Err(Reject::ModelNotAllowed { model })
        );
        assert_eq!(alice.may_use(&other, true), Err(Reject::PolicyNotAllowed));
        let stranger = |shows_key| Who::Stranger { shows_key };
        assert_eq!(stranger(false).may_use(&policy, true), Ok(()));
        assert_eq!(
            stranger(false).may_use(&policy, false),
            Err(Reject::KeyMissing)
        );
        assert_eq!(
            stranger(true).may_use(&policy, false),
            Err(Reject::KeyUnknown)
        );
        assert_eq!(Who::Anyone.may_call(&policy, false, "x"), Ok(()));
    }
}
