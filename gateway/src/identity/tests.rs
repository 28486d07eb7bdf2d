use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use penstock_core::config::{Access, Claim, Team};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::json;

use super::*;

const NOW_S: u64 = 1_800_000_000;
const ISSUER: &str = "https://login.example.com";

fn base64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Somebody who signs tokens.
struct Signer {
    id: &'static str,
    pair: Ed25519KeyPair,
}

impl Signer {
    fn new(id: &'static str) -> Self {
        let mut seed = [7; 32];
        seed[..id.len()].copy_from_slice(id.as_bytes());
        Self {
            id,
            pair: Ed25519KeyPair::from_seed_unchecked(&seed).unwrap(),
        }
    }

    fn jwk(&self) -> Value {
        let x = base64(self.pair.public_key());
        json!({"kty": "OKP", "crv": "Ed25519", "kid": self.id, "use": "sig", "x": x})
    }

    fn token(&self, header: &Value, claims: &Value) -> String {
        let message = format!(
            "{}.{}",
            base64(header.to_string()),
            base64(claims.to_string())
        );
        let signature = self.pair.sign(message.as_bytes());
        format!("{message}.{}", base64(signature))
    }

    fn good(&self, change: impl FnOnce(&mut Value)) -> String {
        let mut claims = json!({"iss": ISSUER, "aud": "penstock", "sub": "u1", "exp": NOW_S + 60});
        change(&mut claims);
        self.token(
            &json!({"alg": "EdDSA", "kid": self.id, "typ": "at+jwt"}),
            &claims,
        )
    }
}

fn provider(keys: KeySource) -> IdentityProvider {
    IdentityProvider {
        proof: Proof::Jwt(Jwt {
            issuer: ISSUER.to_owned(),
            audiences: BTreeSet::from(["penstock".to_owned()]),
            algorithms: BTreeSet::from([config::Algorithm::EdDsa, config::Algorithm::Rs256]),
            clock_skew_s: 30,
            keys,
        }),
        team: Team::Named("search".to_owned()),
        user: None,
        attributes: BTreeMap::new(),
        access: Vec::new(),
    }
}

fn inline(signers: &[&Signer]) -> KeySource {
    let keys: Vec<Value> = signers.iter().map(|signer| signer.jwk()).collect();
    KeySource::Inline(json!({"keys": keys}).to_string())
}

fn knowing(provider: IdentityProvider) -> Identities {
    let all = BTreeMap::from([(Id::new("ns", "idp"), provider)]);
    Identities::new(&all, &Arc::default())
}

fn of(identities: &Identities, token: &str) -> Result<Option<String>, Reject> {
    let found = identities.of_token(token.as_bytes(), NOW_S)?;
    Ok(found.map(|principal| principal.name()))
}

#[test]
fn a_good_token_is_its_caller_the_second_time_too() {
    let signer = Signer::new("a");
    let identities = knowing(provider(inline(&[&Signer::new("b"), &signer])));
    let token = signer.good(|_| {});
    for _ in 0..2 {
        assert_eq!(of(&identities, &token), Ok(Some("ns/idp#u1".to_owned())));
    }
    let other = signer.good(|claims| claims["aud"] = json!(["x", "penstock"]));
    assert!(of(&identities, &other).unwrap().is_some());
    // Without a name of its key, all are tried.
    let claims = json!({"iss": ISSUER, "aud": "penstock", "sub": "u2", "exp": NOW_S + 60});
    let unnamed = signer.token(&json!({"alg": "EdDSA"}), &claims);
    assert!(of(&identities, &unnamed).unwrap().is_some());
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn a_token_that_is_not_good_is_refused_and_says_why() {
    let signer = Signer::new("a");
    let identities = knowing(provider(inline(&[&signer])));
    let claims = json!({"iss": ISSUER, "aud": "penstock", "sub": "u1", "exp": NOW_S + 60});
    let header = |change: fn(&mut Value)| {
        let mut header = json!({"alg": "EdDSA", "kid": "a"});
        change(&mut header);
        signer.token(&header, &claims)
    };
    let good = signer.good(|_| {});
    let (message, _) = good.rsplit_once('.').unwrap();
    let (head, rest) = good.split_once('.').unwrap();
    let other = base64(
        json!({"iss": ISSUER, "aud": "penstock", "sub": "u2", "exp": NOW_S + 60}).to_string(),
    );
    let (_, signature) = rest.split_once('.').unwrap();
    let thief = Signer::new("thief");
    for (what, token, why) in [
        (
            "other audience",
            signer.good(|claims| claims["aud"] = json!("x")),
            "aud",
        ),
        (
            "no audience",
            signer.good(|claims| claims["aud"] = json!(null)),
            "aud",
        ),
        (
            "no end",
            signer.good(|claims| claims["exp"] = json!(null)),
            "exp",
        ),
        (
            "text as end",
            signer.good(|claims| claims["exp"] = json!("2999")),
            "exp",
        ),
        (
            "not yet",
            signer.good(|claims| claims["nbf"] = json!(NOW_S + 31)),
            "nbf",
        ),
        ("none", header(|header| header["alg"] = json!("none")), ""),
        (
            "HMAC with a public key",
            header(|header| header["alg"] = json!("HS256")),
            "alg",
        ),
        (
            "not allowed",
            header(|header| header["alg"] = json!("ES256")),
            "alg",
        ),
        (
            "of another family",
            header(|header| header["alg"] = json!("RS256")),
            "kid",
        ),
        (
            "critical",
            header(|header| header["crit"] = json!(["b64"])),
            "crit",
        ),
        (
            "unknown key",
            header(|header| header["kid"] = json!("z")),
            "kid",
        ),
        ("no signature", format!("{message}."), "signature"),
        (
            "other signature",
            format!("{message}.{}", base64([1; 64])),
            "signature",
        ),
        (
            "other claims",
            format!("{head}.{other}.{signature}"),
            "signature",
        ),
        (
            "a key of its own",
            thief.token(
                &json!({"alg": "EdDSA", "kid": "a", "jwk": thief.jwk(),
            "jku": "https://thief.example.com"}),
                &claims,
            ),
            "signature",
        ),
    ] {
        match of(&identities, &token) {
            Err(Reject::TokenInvalid { why: told }) => {
                assert!(told.contains(why), "{what}: {told}");
            }
            // What cannot be read is no token.
            Ok(None) if why.is_empty() => {}
            found => panic!("{what}: {found:?}"),
        }
    }
}

#[test]
fn clocks_may_be_apart_as_far_as_is_said() {
    let signer = Signer::new("a");
    let identities = knowing(provider(inline(&[&signer])));
    let ends = |at_s: u64| {
        of(
            &identities,
            &signer.good(|claims| claims["exp"] = json!(at_s)),
        )
    };
    assert!(ends(NOW_S - 29).is_ok());
    assert_eq!(ends(NOW_S - 30), Err(Reject::TokenExpired));
    let begins = |at_s: u64| {
        of(
            &identities,
            &signer.good(|claims| claims["nbf"] = json!(at_s)),
        )
    };
    assert!(begins(NOW_S + 30).is_ok());
    // A token that was good ends too.
    let token = signer.good(|_| {});
    assert!(identities.of_token(token.as_bytes(), NOW_S).is_ok());
    let end = identities.of_token(token.as_bytes(), NOW_S + 90);
    assert_eq!(end.unwrap_err(), Reject::TokenExpired);
}

#[test]
fn what_is_no_token_of_a_known_provider_is_left_to_others() {
    let signer = Signer::new("a");
    let identities = knowing(provider(inline(&[&signer])));
    let stranger = signer.good(|claims| claims["iss"] = json!("https://login.example.com/"));
    let long = signer.good(|claims| claims["x"] = json!("x".repeat(MAX_TOKEN_BYTES)));
    for text in ["", "ey", "ey.ey.ey", "sk-penstock-x", &stranger, &long] {
        assert_eq!(
            of(&identities, text),
            Ok(None),
            "{}",
            &text[..text.len().min(40)]
        );
    }
}

#[test]
fn scopes_open_what_their_entries_allow_and_nothing_else() {
    let signer = Signer::new("a");
    let mut limited = provider(inline(&[&signer]));
    let access = |scope: &str, model: &str, policy: &str| Access {
        scopes: BTreeSet::from([scope.to_owned()]),
        models: vec![NameMatch::Exact(model.to_owned())],
        policies: BTreeSet::from([Id::new("ns", policy)]),
    };
    limited.access = vec![access("read", "small", "p"), access("write", "large", "q")];
    let identities = knowing(limited);
    let who = |scope: &str| {
        let token = signer.good(|claims| claims["scope"] = json!(scope));
        identities.of_token(token.as_bytes(), NOW_S)
    };
    assert_eq!(who("openid").unwrap_err(), Reject::ScopeMissing);
    let both = crate::principal::Who::Known(who("read write").unwrap().unwrap());
    let may = |policy: &str, model: &str| both.may_call(&Id::new("ns", policy), false, model);
    assert!(may("p", "small").is_ok() && may("q", "large").is_ok());
    // One entry's model is not another one's.
    let model = "large".to_owned();
    assert_eq!(may("p", "large"), Err(Reject::ModelNotAllowed { model }));
    assert_eq!(may("r", "small"), Err(Reject::PolicyNotAllowed));
}

#[test]
fn keys_that_are_not_known_are_asked_for_once_and_old_ones_end_with_their_set() {
    let url = KeySource::Url {
        url: None,
        refresh_s: 300,
    };
    let all = BTreeMap::from([(Id::new("ns", "idp"), provider(url))]);
    let sets: Arc<Sets> = Arc::default();
    let identities = Identities::new(&all, &sets);
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    let awaited = Err(Reject::IdentityUnavailable { is_awaited: true });
    let read = |signers: &[&Signer], now_s: u64| {
        let due = sets.due(identities.sources(), now_s);
        for source in due {
            let KeySource::Inline(json) = inline(signers) else {
                unreachable!("it is made so");
            };
            sets.tried(&source, KeySet::read(json.as_bytes()), now_s);
        }
    };
    let token = old.good(|_| {});
    assert_eq!(of(&identities, &token), awaited);
    read(&[&old], NOW_S - 20);
    assert!(of(&identities, &token).unwrap().is_some());
    assert_eq!(
        of(&identities, &new.good(|_| {})),
        awaited,
        "it is asked for"
    );
    read(&[&new], NOW_S);
    assert!(of(&identities, &new.good(|_| {})).unwrap().is_some());
    let gone = of(&identities, &token);
    assert!(matches!(gone, Err(Reject::TokenInvalid { .. })), "{gone:?}");
}

#[test]
fn a_certificate_is_known_by_its_longest_name() {
    let of_names = |names: &[NameMatch], team: &str| IdentityProvider {
        proof: Proof::Certificate(names.to_vec()),
        team: Team::Named(team.to_owned()),
        user: None,
        attributes: BTreeMap::new(),
        access: Vec::new(),
    };
    let prefix = |text: &str| NameMatch::Prefix(text.to_owned());
    let exact = |text: &str| NameMatch::Exact(text.to_owned());
    let all = BTreeMap::from([
        (
            Id::new("ns", "a"),
            of_names(&[prefix("spiffe://x/")], "all"),
        ),
        (
            Id::new("ns", "b"),
            of_names(&[prefix("spiffe://x/ads/")], "ads"),
        ),
        (
            Id::new("ns", "c"),
            of_names(&[exact("spiffe://x/ads/one")], "one"),
        ),
    ]);
    let identities = Identities::new(&all, &Arc::default());
    let team = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let found = identities.of_names(&names).unwrap();
        found.map(|of| (of.team.clone(), of.user.clone().unwrap()))
    };
    let told = |team: &str, user: &str| Some((team.to_owned(), user.to_owned()));
    assert_eq!(team(&["spiffe://x/s"]), told("all", "spiffe://x/s"));
    assert_eq!(
        team(&["x.dns", "spiffe://x/ads/two"]),
        told("ads", "spiffe://x/ads/two")
    );
    assert_eq!(
        team(&["spiffe://x/ads/one"]),
        told("one", "spiffe://x/ads/one")
    );
    assert_eq!(team(&["spiffe://y/s"]), None);
    assert_eq!(team(&[]), None);
}

#[test]
fn who_left_a_job_is_known_as_long_as_its_provider_is() {
    let signer = Signer::new("a");
    let mut limited = provider(inline(&[&signer]));
    limited.user = Some(Claim("mail".to_owned()));
    let identities = knowing(limited);
    let token = signer.good(|claims| claims["mail"] = json!("a@x"));
    let found = identities
        .of_token(token.as_bytes(), NOW_S)
        .unwrap()
        .unwrap();
    let claimed = found.claims().unwrap();
    assert_eq!(identities.again(claimed).unwrap(), *found);
    let none = Identities::new(&BTreeMap::new(), &Arc::default());
    assert_eq!(none.again(claimed).unwrap_err(), Reject::KeyUnknown);
}

/// RFC 7515, A.2 and A.3.
#[test]
fn published_signatures_are_verified() {
    verify::install();
    let rsa = json!({"kty": "RSA", "e": "AQAB", "n": concat!(
        "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMs",
        "D1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdV",
        "MTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ")});
    let ec = json!({"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"});
    let payload = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let by_rsa = format!(
        "eyJhbGciOiJSUzI1NiJ9.{payload}.{}",
        concat!(
            "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZ",
            "cAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-e",
            "OkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
        )
    );
    let by_ec = format!(
        "eyJhbGciOiJFUzI1NiJ9.{payload}.{}",
        "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
    );
    let set = json!({"keys": [rsa, ec, {"kty": "oct", "k": "AAAA"}, {"kty": "new"}, 7]});
    let set = KeySet::read(set.to_string().as_bytes()).unwrap();
    for (token, algorithm) in [(by_rsa, Algorithm::RS256), (by_ec, Algorithm::ES256)] {
        let keys: Vec<_> = set.of(None, algorithm).collect();
        assert_eq!(keys.len(), 1, "{algorithm:?}");
        assert!(
            is_signed(token.as_bytes(), keys[0], algorithm),
            "{algorithm:?}"
        );
        let mut other = token.into_bytes();
        other[30] ^= 1;
        assert!(!is_signed(&other, keys[0], algorithm), "{algorithm:?}");
    }
    assert_eq!(set.of(None, Algorithm::HS256).count(), 0);
}
