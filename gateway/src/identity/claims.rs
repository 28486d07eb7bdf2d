//! What a token says of its caller, by the claims that its provider's object names. Pure.

use std::collections::{BTreeMap, BTreeSet};

use penstock_core::config::{Claim, IdentityProvider, Team};
use penstock_core::ids::Id;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longer texts name nobody.
const MAX_BYTES: usize = 253;
/// Longer ones are no teams: as in the schema of VirtualKeys.
const MAX_TEAM_BYTES: usize = 63;
/// Where scopes stand (RFC 8693, 4.2; Microsoft's and Okta's name).
const SCOPES: [&str; 2] = ["scope", "scp"];

/// A caller as somebody vouches for it. Kept with its jobs, which run on its behalf when its token is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claimed {
    /// Who vouches for it.
    pub(crate) provider: Id,
    /// What the provider calls it: `sub`, or the name in the certificate.
    pub(crate) subject: String,
    pub(crate) team: String,
    pub(crate) user: String,
    pub(crate) attributes: BTreeMap<String, String>,
    /// Those that its provider's object asks for.
    pub(crate) scopes: BTreeSet<String>,
}

/// The claim that says nothing which can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lacking(pub(super) String);

/// Reads a token's claims.
pub(super) fn read(
    id: &Id,
    provider: &IdentityProvider,
    claims: &Value,
) -> Result<Claimed, Lacking> {
    let usual = Claim("sub".to_owned());
    let named = |claim: &Claim, most: usize| {
        text(claims, claim)
            .filter(|text| is_name(text, most))
            .ok_or_else(|| Lacking(claim.0.clone()))
    };
    let team = match &provider.team {
        Team::Named(team) => team.clone(),
        Team::Claimed(claim) => named(claim, MAX_TEAM_BYTES)?,
    };
    let attributes = provider.attributes.iter().filter_map(|(name, claim)| {
        let text = text(claims, claim).filter(|text| text.len() <= MAX_BYTES)?;
        Some((name.clone(), text))
    });
    let wanted: BTreeSet<&str> = provider
        .access
        .iter()
        .flat_map(|access| access.scopes.iter().map(String::as_str))
        .collect();
    let scopes = SCOPES.iter().filter_map(|name| claims.get(name));
    let scopes = scopes.flat_map(words).filter(|word| wanted.contains(word));
    Ok(Claimed {
        provider: id.clone(),
        subject: named(&usual, MAX_BYTES)?,
        team,
        user: named(provider.user.as_ref().unwrap_or(&usual), MAX_BYTES)?,
        attributes: attributes.collect(),
        scopes: scopes.map(str::to_owned).collect(),
    })
}

/// A text, or what has one way to be written as such. Of lists and objects nothing is taken: which of them would be
/// meant?
fn text(claims: &Value, Claim(path): &Claim) -> Option<String> {
    let value = if path.starts_with('/') {
        claims.pointer(path)
    } else {
        claims.get(path)
    };
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Bool(is) => Some(is.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn is_name(text: &str, most: usize) -> bool {
    (1..=most).contains(&text.len()) && !text.contains(char::is_control)
}

/// A list of texts, or a text of words.
fn words(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => text.split_ascii_whitespace().collect(),
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use penstock_core::config::{Access, Proof};
    use serde_json::json;

    use super::*;

    fn provider(change: impl FnOnce(&mut IdentityProvider)) -> IdentityProvider {
        let mut provider = IdentityProvider {
            proof: Proof::Certificate(Vec::new()),
            team: Team::Named("search".to_owned()),
            user: None,
            attributes: BTreeMap::new(),
            access: Vec::new(),
        };
        change(&mut provider);
        provider
    }

    fn claimed(
        change: impl FnOnce(&mut IdentityProvider),
        claims: &Value,
    ) -> Result<Claimed, Lacking> {
        read(&Id::new("ns", "idp"), &provider(change), claims)
    }

    fn claim(path: &str) -> Claim {
        Claim(path.to_owned())
    }

    #[test]
    fn a_caller_is_who_its_claims_say() {
        let claims = json!({"sub": "u1", "mail": "a@x", "groups": ["ads", "search"], "level": 3, "https://x/y": {"z": true}});
        let found = claimed(
            |provider| {
                provider.team = Team::Claimed(claim("/groups/0"));
                provider.user = Some(claim("mail"));
                provider.attributes = BTreeMap::from([
                    ("level".to_owned(), claim("level")),
                    ("deep".to_owned(), claim("/https:~1~1x~1y/z")),
                    ("none".to_owned(), claim("none")),
                    ("all".to_owned(), claim("groups")),
                ]);
            },
            &claims,
        );
        let found = found.unwrap();
        assert_eq!((found.subject.as_str(), found.team.as_str()), ("u1", "ads"));
        assert_eq!(found.user, "a@x");
        let attributes: Vec<_> = found.attributes.iter().collect();
        assert_eq!(
            attributes,
            [
                (&"deep".to_owned(), &"true".to_owned()),
                (&"level".to_owned(), &"3".to_owned())
            ]
        );
    }

    #[test]
    fn what_does_not_say_who_it_is_is_nobody() {
        let long = "x".repeat(254);
        for (claims, lacking) in [
            (json!({}), "sub"),
            (json!({"sub": ""}), "sub"),
            (json!({"sub": long}), "sub"),
            (json!({"sub": "a\nb"}), "sub"),
            (json!({"sub": ["a"]}), "sub"),
            (json!({"sub": {"a": "b"}}), "sub"),
        ] {
            let found = claimed(|_| {}, &claims);
            assert_eq!(found, Err(Lacking(lacking.to_owned())), "{claims}");
        }
        let by_claim = |provider: &mut IdentityProvider| {
            provider.team = Team::Claimed(claim("team"));
        };
        for team in [json!(null), json!(""), json!(["a"]), json!("x".repeat(64))] {
            let found = claimed(by_claim, &json!({"sub": "u", "team": team}));
            assert_eq!(found, Err(Lacking("team".to_owned())), "{team}");
        }
    }

    #[test]
    fn scopes_are_words_and_only_those_that_matter_are_kept() {
        let wants = |provider: &mut IdentityProvider| {
            provider.access = vec![Access {
                scopes: ["llm.read", "llm.write"].map(str::to_owned).into(),
                models: Vec::new(),
                policies: BTreeSet::new(),
            }];
        };
        for (claims, expected) in [
            (
                json!({"sub": "u", "scope": "openid llm.read  llm.write"}),
                vec!["llm.read", "llm.write"],
            ),
            (
                json!({"sub": "u", "scp": ["llm.read", "x"]}),
                vec!["llm.read"],
            ),
            (json!({"sub": "u", "scp": "llm.write"}), vec!["llm.write"]),
            (
                json!({"sub": "u", "scope": "llm.readx LLM.read", "roles": ["llm.read"]}),
                vec![],
            ),
            (json!({"sub": "u", "scope": {"llm.read": true}}), vec![]),
        ] {
            let found = claimed(wants, &claims).unwrap().scopes;
            let found: Vec<&str> = found.iter().map(String::as_str).collect();
            assert_eq!(found, expected, "{claims}");
        }
    }
}
