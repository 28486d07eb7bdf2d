//! IdentityProviders → callers that a gateway knows by what others vouch for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use penstock_core::config::{
    Access, Claim, IdentityProvider, Jwt, KeySource, NameMatch, Proof, Team,
};
use penstock_core::ids::Id;
use serde_json::Value;

use super::backend::url_host;
use super::scope::Scope;
use crate::identity::{AccessSpec, IdentityProviderSpec, JwksSpec, JwtSpec, TeamSpec};
use crate::object::{Kind, Objects, of_gateway};
use crate::problem::Problem;
use crate::text::DurationText;

/// Bounded here too: files are not checked against the schema's maxima.
const MAX_AUDIENCES: usize = 16;
const MAX_ATTRIBUTES: usize = 16;
const MAX_ACCESS: usize = 16;
const MAX_SCOPES: usize = 16;
const MAX_URL: usize = 1024;
const MAX_CLAIM: usize = 253;
const MAX_INLINE: usize = 64 << 10;
const MAX_SKEW: Duration = Duration::from_mins(5);
const LEAST_REFRESH: Duration = Duration::from_secs(10);
const MOST_REFRESH: Duration = Duration::from_hours(24);

/// Those of `gateway`. One with a mistake is left out: nobody is known by it.
pub(super) fn compile(
    gateway: &Id,
    objects: &Objects,
    problems: &mut Vec<Problem>,
) -> BTreeMap<Id, IdentityProvider> {
    let mut compiled: BTreeMap<Id, IdentityProvider> = BTreeMap::new();
    for (id, object) in of_gateway(&objects.identities, gateway) {
        let mut scope = Scope::new(Kind::IdentityProvider, id, problems);
        let provider = one(&object.spec, objects, &mut scope);
        if let Some(provider) = &provider {
            let mut others = compiled.iter();
            let other = others.find_map(|(other, had)| Some((other, twice(had, provider)?)));
            if let Some((other, (path, what))) = other {
                let message = format!(
                    "{what} is IdentityProvider {other}'s already: remove it here or there, so that one of them decides"
                );
                scope.invalid(path, message);
            }
        }
        if let Some(provider) = provider.filter(|_| scope.is_usable()) {
            compiled.insert(id.clone(), provider);
        }
    }
    compiled
}

fn one(
    spec: &IdentityProviderSpec,
    objects: &Objects,
    scope: &mut Scope<'_>,
) -> Option<IdentityProvider> {
    let proof = match (&spec.jwt, &spec.certificate) {
        (Some(jwt), None) => jwt_of(jwt, scope).map(Proof::Jwt),
        (None, Some(certificate)) => {
            if certificate.names.is_empty() {
                scope.invalid("spec.certificate.names", "write at least one name");
            }
            let names = scope.names("spec.certificate.names", &certificate.names);
            Some(Proof::Certificate(names))
        }
        _ => {
            scope.invalid("spec", "write either jwt or certificate");
            None
        }
    };
    let is_jwt = spec.jwt.is_some();
    let team = team(&spec.team, is_jwt, scope);
    if !is_jwt && (spec.user.is_some() || !spec.attributes.is_empty()) {
        let message = "certificates have no claims: leave user and attributes out";
        scope.invalid("spec.user", message);
    }
    scope.at_most("spec.attributes", spec.attributes.len(), MAX_ATTRIBUTES);
    let user = spec.user.as_ref();
    let user = user.and_then(|user| claim("spec.user", user, scope));
    let attributes = spec.attributes.iter().filter_map(|(name, path)| {
        let path = claim(&format!("spec.attributes.{name}"), path, scope)?;
        Some((name.clone(), path))
    });
    let attributes = attributes.collect();
    scope.at_most("spec.access", spec.access.len(), MAX_ACCESS);
    let access = spec.access.iter().enumerate();
    let access = access.map(|(position, access)| {
        let path = format!("spec.access[{position}]");
        access_of(&path, access, spec, objects, scope)
    });
    let access = access.collect();
    Some(IdentityProvider {
        proof: proof?,
        team: team?,
        user,
        attributes,
        access,
    })
    .filter(|_| scope.is_usable())
}

fn jwt_of(spec: &JwtSpec, scope: &mut Scope<'_>) -> Option<Jwt> {
    if spec.issuer.is_empty() || spec.issuer.len() > MAX_URL {
        scope.invalid("spec.jwt.issuer", format!("use 1 to {MAX_URL} bytes"));
    }
    if spec.audiences.is_empty() || spec.audiences.iter().any(String::is_empty) {
        let message = "say whom the tokens are for: what is for others is no proof here";
        scope.invalid("spec.jwt.audiences", message);
    }
    scope.at_most("spec.jwt.audiences", spec.audiences.len(), MAX_AUDIENCES);
    if spec.algorithms.is_empty() {
        scope.invalid("spec.jwt.algorithms", "write at least one, or leave it out");
    }
    let zero = Duration::ZERO;
    let skew = duration(
        "spec.jwt.clockSkew",
        &spec.clock_skew,
        zero..=MAX_SKEW,
        scope,
    );
    let keys = keys(spec, scope);
    Some(Jwt {
        issuer: spec.issuer.clone(),
        audiences: spec.audiences.iter().cloned().collect(),
        algorithms: spec
            .algorithms
            .iter()
            .map(|name| name.algorithm())
            .collect(),
        clock_skew_s: skew?.as_secs(),
        keys: keys?,
    })
}

fn keys(spec: &JwtSpec, scope: &mut Scope<'_>) -> Option<KeySource> {
    let usual = JwksSpec::default();
    let jwks = spec.jwks.as_ref().unwrap_or(&usual);
    let allowed = LEAST_REFRESH..=MOST_REFRESH;
    let refresh = duration("spec.jwt.jwks.refresh", &jwks.refresh, allowed, scope);
    match (&jwks.uri, &jwks.inline) {
        (Some(_), Some(_)) => {
            scope.invalid("spec.jwt.jwks", "write either uri or inline");
            None
        }
        (None, Some(inline)) => {
            let set: Option<Value> = serde_json::from_str(inline).ok();
            let keys = set.as_ref().and_then(|set| set.get("keys")?.as_array());
            if inline.len() > MAX_INLINE || keys.is_none_or(Vec::is_empty) {
                let message = format!(
                    "write a JWK set of at most {MAX_INLINE} bytes, such as {{\"keys\": [{{\"kty\": \"EC\", …}}]}}"
                );
                scope.invalid("spec.jwt.jwks.inline", message);
            }
            Some(KeySource::Inline(inline.clone()))
        }
        (uri, None) => {
            match uri {
                Some(uri) => check_url("spec.jwt.jwks.uri", uri, scope),
                None => check_url("spec.jwt.issuer", &spec.issuer, scope),
            }
            Some(KeySource::Url {
                url: uri.clone(),
                refresh_s: refresh?.as_secs(),
            })
        }
    }
}

/// Whoever changes the keys on their way can be anybody.
fn check_url(path: &str, url: &str, scope: &mut Scope<'_>) {
    // Some providers ask for a query.
    let plain = url.split('?').next().unwrap_or_default();
    let host = url_host(plain).filter(|_| url.len() <= MAX_URL);
    let Some(host) = host else {
        let message = format!("'{url}' is no URL such as https://login.example.com/keys");
        scope.invalid(path, message);
        return;
    };
    let is_near = |host: &str| {
        let ends = [".svc", ".svc.cluster.local"];
        ends.iter().any(|end| host.ends_with(end))
            || matches!(host, "localhost" | "127.0.0.1" | "[::1]" | "::1")
    };
    if url.starts_with("http://") && !is_near(host) {
        let message = "keys that come in the clear can be anybody's: use https, or a name within the cluster (.svc)";
        scope.invalid(path, message);
    }
}

fn duration(
    path: &str,
    text: &DurationText,
    allowed: std::ops::RangeInclusive<Duration>,
    scope: &mut Scope<'_>,
) -> Option<Duration> {
    match text.parse() {
        Ok(duration) if allowed.contains(&duration) => Some(duration),
        Ok(_) => {
            let (least, most) = (allowed.start().as_secs(), allowed.end().as_secs());
            let message = format!("{} is out of range: use {least}s to {most}s", text.0);
            scope.invalid(path, message);
            None
        }
        Err(err) => {
            scope.invalid(path, err.to_string());
            None
        }
    }
}

fn team(spec: &TeamSpec, is_jwt: bool, scope: &mut Scope<'_>) -> Option<Team> {
    match (&spec.value, &spec.claim) {
        (Some(team), None) if !team.is_empty() => Some(Team::Named(team.clone())),
        (None, Some(_)) if !is_jwt => {
            scope.invalid("spec.team", "certificates have no claims: write team.value");
            None
        }
        (None, Some(path)) => claim("spec.team.claim", path, scope).map(Team::Claimed),
        _ => {
            scope.invalid("spec.team", "write either value or claim");
            None
        }
    }
}

/// A name, or a JSON pointer (RFC 6901, 3).
fn claim(path: &str, text: &str, scope: &mut Scope<'_>) -> Option<Claim> {
    let is_pointer = text.starts_with('/');
    let mut escapes = text.split('~').skip(1);
    let is_written = !is_pointer || escapes.all(|rest| rest.starts_with(['0', '1']));
    if text.is_empty() || text.len() > MAX_CLAIM || !is_written {
        let message = format!(
            "'{text}' names no claim: write a name such as email, or a JSON pointer such as /groups/0"
        );
        scope.invalid(path, message);
        return None;
    }
    Some(Claim(text.to_owned()))
}

fn access_of(
    path: &str,
    spec: &AccessSpec,
    provider: &IdentityProviderSpec,
    objects: &Objects,
    scope: &mut Scope<'_>,
) -> Access {
    let at = format!("{path}.scopes");
    scope.at_most(&at, spec.scopes.len(), MAX_SCOPES);
    let is_one = |name: &String| !name.is_empty() && !name.contains(char::is_whitespace);
    if !spec.scopes.iter().all(is_one) {
        scope.invalid(&at, "a scope is a word without spaces");
    }
    if !spec.scopes.is_empty() && provider.jwt.is_none() {
        scope.invalid(&at, "certificates have no scopes: leave them out");
    }
    Access {
        scopes: spec.scopes.iter().cloned().collect(),
        models: scope.names_or_any(&format!("{path}.models"), &spec.models),
        policies: scope.policies(
            &format!("{path}.policies"),
            &spec.policies,
            &provider.gateway,
            objects,
        ),
    }
}

/// What two providers both vouch for, and where.
fn twice(had: &IdentityProvider, provider: &IdentityProvider) -> Option<(&'static str, String)> {
    match (&had.proof, &provider.proof) {
        (Proof::Jwt(had), Proof::Jwt(jwt)) if had.issuer == jwt.issuer => {
            let shared: BTreeSet<_> = had.audiences.intersection(&jwt.audiences).collect();
            let audience = shared.first()?;
            Some((
                "spec.jwt.audiences",
                format!("audience {audience} of this issuer"),
            ))
        }
        (Proof::Certificate(had), Proof::Certificate(names)) => {
            let name = names.iter().find(|name| had.contains(name))?;
            let name = match name {
                NameMatch::Exact(name) => name.clone(),
                NameMatch::Prefix(prefix) => format!("{prefix}*"),
            };
            Some(("spec.certificate.names", name))
        }
        _ => None,
    }
}
