//! Callers for whom somebody else vouches: by tokens, by certificates.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use penstock_core::config::{
    Access, Algorithm, Callers, Condition, CredentialRef, IdentityProvider, Jwt, KeySource,
    NameMatch, Proof, Team,
};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};

use crate::harness::*;
use crate::jobs::{Kept, value};

/// Somebody who signs tokens, under a name that changes with its key.
struct Issuer {
    url: String,
    number: u8,
}

impl Issuer {
    fn pair(&self) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[self.number; 32]).unwrap()
    }

    fn keys(&self) -> Value {
        let x = URL_SAFE_NO_PAD.encode(self.pair().public_key());
        let id = self.number.to_string();
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": id, "x": x}]})
    }

    /// A header with a token.
    fn token(&self, subject: &str, scope: &str) -> String {
        let end_s = penstock_shell::clock::since_epoch().as_secs() + 60;
        let header = json!({"alg": "EdDSA", "kid": self.number.to_string()});
        let claims = json!({"iss": self.url, "aud": "penstock", "sub": subject, "exp": end_s,
            "scope": scope, "team": "search"});
        let [header, claims] =
            [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
        let message = format!("{header}.{claims}");
        let signature = URL_SAFE_NO_PAD.encode(self.pair().sign(message.as_bytes()));
        format!("authorization: Bearer {message}.{signature}\r\n")
    }
}

fn provider(proof: Proof, team: Team) -> IdentityProvider {
    IdentityProvider {
        proof,
        team,
        user: None,
        attributes: BTreeMap::new(),
        access: Vec::new(),
    }
}

fn of_tokens(issuer: &str, keys: KeySource) -> IdentityProvider {
    let jwt = Jwt {
        issuer: issuer.to_owned(),
        audiences: BTreeSet::from(["penstock".to_owned()]),
        algorithms: BTreeSet::from([Algorithm::EdDsa]),
        clock_skew_s: 30,
        keys,
    };
    let team = penstock_core::config::Claim("team".to_owned());
    provider(Proof::Jwt(jwt), Team::Claimed(team))
}

fn known(mut plan: Plan, provider: IdentityProvider) -> Plan {
    plan.config.callers = Some(Callers {
        pepper: CredentialRef {
            id: "pepper".to_owned(),
            version: String::new(),
        },
        keys: BTreeMap::new(),
        admin: None,
        identities: BTreeMap::from([(id("idp"), provider)]),
    });
    plan
}

fn inline(issuer: &Issuer) -> KeySource {
    KeySource::Inline(issuer.keys().to_string())
}

#[tokio::test]
async fn a_token_is_a_caller_and_goes_no_further() {
    let issuer = Issuer {
        url: "https://login.example.com".to_owned(),
        number: 1,
    };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]).rule(|rule| {
        let team = NameMatch::Exact("search".to_owned());
        rule.conditions = vec![Condition::Team(team)];
    });
    let mut limited = of_tokens(&issuer.url, inline(&issuer));
    limited.access = vec![Access {
        scopes: BTreeSet::from(["llm".to_owned()]),
        models: vec![NameMatch::Exact("chat".to_owned())],
        policies: BTreeSet::new(),
    }];
    let gateway = Gateway::start(&known(plan, limited.clone())).await;
    let answer = gateway
        .post_with(&issuer.token("u1", "llm"), &chat(false))
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let plan = Plan::chain(&[upstream.address]).rule(|rule| {
        rule.models.push(NameMatch::Exact("other".to_owned()));
    });
    let gateway = Gateway::start(&known(plan, limited)).await;
    let received = upstream.requests().remove(0);
    assert!(!received.headers.contains_key("authorization"));
    let other = chat(false).replace("\"chat\"", "\"other\"");
    let thief = Issuer {
        url: issuer.url.clone(),
        number: 2,
    };
    let stranger = Issuer {
        url: "https://x".to_owned(),
        number: 1,
    };
    let header = |text: &str| format!("authorization: Bearer {text}\r\n");
    for (headers, body, status, code) in [
        (String::new(), chat(false), 401, "key_missing"),
        (header("x"), chat(false), 401, "key_unknown"),
        (stranger.token("u1", "llm"), chat(false), 401, "key_unknown"),
        (thief.token("u1", "llm"), chat(false), 401, "token_invalid"),
        (issuer.token("u1", "x"), chat(false), 403, "scope_missing"),
        (issuer.token("u1", "llm"), other, 403, "model_not_allowed"),
    ] {
        let answer = gateway.post_with(&headers, &body).await;
        let told = (answer.status, answer.code());
        assert_eq!(told, (status, code.to_owned()), "{}", answer.body);
    }
    assert_eq!(upstream.count(), 1);
}

#[tokio::test]
async fn a_provider_may_change_its_keys_and_nobody_is_refused() {
    let published = std::sync::Arc::new(std::sync::Mutex::new(Value::Null));
    let provider = Upstream::start({
        let published = std::sync::Arc::clone(&published);
        move |_, request| {
            let all = published.lock().unwrap();
            if request.line.contains("openid-configuration") {
                Reply::Json(200, all["discovery"].to_string())
            } else {
                Reply::Json(200, all["keys"].to_string())
            }
        }
    })
    .await;
    let url = format!("http://{}", provider.address);
    let mut issuer = Issuer {
        url: url.clone(),
        number: 1,
    };
    let publish = |issuer: &Issuer| {
        *published.lock().unwrap() = json!({"keys": issuer.keys(),
            "discovery": {"issuer": url, "jwks_uri": format!("{url}/keys")}});
    };
    publish(&issuer);
    let upstream = Upstream::always(|| json_answer("x")).await;
    let keys = KeySource::Url {
        url: None,
        refresh_s: 300,
    };
    let plan = known(Plan::chain(&[upstream.address]), of_tokens(&url, keys));
    let gateway = Gateway::start(&plan).await;
    let status = async |issuer: &Issuer| {
        let answer = gateway
            .post_with(&issuer.token("u", ""), &chat(false))
            .await;
        let refusal = (answer.status != 200).then(|| answer.code());
        (answer.status, refusal.unwrap_or_default())
    };
    assert_eq!(
        status(&issuer).await.0,
        200,
        "the first request waits for the keys"
    );
    assert_eq!(provider.count(), 2);
    // What has just been read is not read again for a key that somebody made up.
    let other = Issuer {
        url: issuer.url.clone(),
        number: 9,
    };
    assert_eq!(status(&other).await, (401, "token_invalid".to_owned()));
    assert_eq!(provider.count(), 2);
    tokio::time::sleep(std::time::Duration::from_secs(11)).await;
    issuer.number = 2;
    publish(&issuer);
    assert_eq!(
        status(&issuer).await.0,
        200,
        "a new key is looked for at once"
    );
    issuer.number = 1;
    assert_eq!(
        status(&issuer).await,
        (401, "token_invalid".to_owned()),
        "the old one has ended"
    );
}

#[tokio::test]
async fn without_the_keys_of_its_issuer_no_token_is_believed() {
    let issuer = Issuer {
        url: format!("http://{}", nobody()),
        number: 1,
    };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let keys = KeySource::Url {
        url: None,
        refresh_s: 300,
    };
    let provider = of_tokens(&issuer.url, keys);
    let gateway = Gateway::start(&known(Plan::chain(&[upstream.address]), provider)).await;
    for _ in 0..2 {
        let answer = gateway
            .post_with(&issuer.token("u", ""), &chat(false))
            .await;
        let told = (answer.status, answer.code());
        assert_eq!(told, (503, "identity_unavailable".to_owned()));
    }
    assert_eq!(upstream.count(), 0);
}

#[tokio::test]
async fn a_certificate_is_a_caller() {
    let (servers, callers) = (Authority::new(), Authority::new());
    let folder = tempfile::tempdir().unwrap();
    servers.sign(&["gateway.example"]).mount(folder.path(), "1");
    let roots = folder.path().join("callers.crt");
    std::fs::write(&roots, &callers.pem).unwrap();
    let mut settings = settings();
    settings.tls.folders = vec![folder.path().to_owned()];
    settings.tls.client_ca = Some(roots);
    let upstream = Upstream::always(|| json_answer("x")).await;
    let names = vec![NameMatch::Prefix("indexer.".to_owned())];
    let provider = provider(Proof::Certificate(names), Team::Named("search".to_owned()));
    let plan = known(Plan::chain(&[upstream.address]), provider);
    let gateway = Gateway::start_with(&plan, settings).await;
    let address = gateway.tls_address.unwrap();
    for (name, status) in [("indexer.search.example", 200), ("other.example", 401)] {
        let shown = callers.sign(&[name]);
        let config = servers.client(&["h2"], Some(&shown));
        let stream = tls(address, config, "gateway.example").await.unwrap();
        let mut client = H2Client::over(stream).await.unwrap();
        let (found, body) = client.post("/v1/chat/completions", &chat(false)).await;
        assert_eq!(found, status, "{name}: {body}");
    }
}

/// What one leaves, another one of the same provider does not find.
#[tokio::test]
async fn jobs_belong_to_the_callers_of_a_provider() {
    let issuer = Issuer {
        url: "https://login.example.com".to_owned(),
        number: 1,
    };
    let kept = Kept::file();
    let upstream = Upstream::always(|| json_answer("x")).await;
    let plan = Plan::chain(&[upstream.address]);
    let plan = known(plan, of_tokens(&issuer.url, inline(&issuer)));
    let gateway = kept.gateway(&plan).await;
    let (alice, bob) = (issuer.token("alice", ""), issuer.token("bob", ""));
    let body = r#"{"model":"chat","input":"hi","background":true}"#;
    let accepted = gateway.call("POST", "/v1/responses", &alice, body).await;
    assert_eq!(accepted.status, 202, "{}", accepted.body);
    let name = value(&accepted)["id"].as_str().unwrap().to_owned();
    for (who, status) in [(&bob, 404), (&alice, 200)] {
        let path = format!("/v1/responses/{name}");
        let answer = gateway.call("GET", &path, who, "").await;
        assert_eq!(answer.status, status);
    }
    until("it is made on her behalf", || upstream.count() == 1).await;
}
