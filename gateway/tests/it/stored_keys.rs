//! Callers whose keys are in the gateway's store, before both kinds of stores.

use std::collections::BTreeMap;
use std::time::Duration;

use penstock_core::config::{Callers, CredentialRef};
use penstock_gateway::{Credential, Credentials};
use serde_json::{Value, json};

use crate::harness::*;
use crate::jobs::{Kept, responded, value};

const TOKEN: &str = "a-token-of-those-who-manage-keys";

fn managed(upstream: &Upstream) -> Plan {
    let reference = |id: &str| CredentialRef {
        id: id.to_owned(),
        version: String::new(),
    };
    let mut plan = Plan::chain(&[upstream.address]);
    plan.config.callers = Some(Callers {
        pepper: reference("pepper"),
        keys: BTreeMap::new(),
        admin: Some(reference("admin")),
        identities: BTreeMap::new(),
    });
    plan
}

/// A gateway whose keys are managed.
async fn office(kept: &Kept, upstream: &Upstream) -> Gateway {
    let gateway = kept.gateway(&managed(upstream)).await;
    let values = [("pepper", "pepper"), ("admin", TOKEN)];
    let values = values.map(|(id, value)| (id.to_owned(), Credential::new(value)));
    gateway.set_credentials(Credentials {
        values: values.into(),
    });
    for _ in 0..500 {
        if gateway.manage("GET", "/keys", "").await.status == 200 {
            return gateway;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("keys are not managed");
}

impl Gateway {
    async fn ask_admin(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let mut client = Client::connect(self.admin).await;
        let length = body.len();
        client
            .send(&format!(
                "{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n{body}"
            ))
            .await;
        client.answer().await
    }

    async fn manage(&self, method: &str, path: &str, body: &str) -> Answer {
        self.ask_admin(method, path, &bearer(TOKEN), body).await
    }

    async fn make(&self, body: Value) -> String {
        let made = self.manage("POST", "/keys", &body.to_string()).await;
        assert_eq!(made.status, 201, "{made:?}");
        value(&made)["key"].as_str().unwrap().to_owned()
    }

    async fn told(&self, key: &str) -> (u16, String) {
        let answer = self.post_with(&bearer(key), &chat(false)).await;
        let code = if answer.status == 200 {
            String::new()
        } else {
            answer.code()
        };
        (answer.status, code)
    }

    /// Within a second.
    async fn soon_tells(&self, key: &str, expected: (u16, &str)) {
        let mut last = (0, String::new());
        for _ in 0..50 {
            last = self.told(key).await;
            if (last.0, last.1.as_str()) == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{last:?} instead of {expected:?}");
    }
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

const GOOD: (u16, &str) = (200, "");

async fn a_key_lives(kept: Kept) {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = office(&kept, &upstream).await;
    let alice = json!({"name": "alice", "team": "search", "models": ["chat"], "attributes": {"tier": "gold"}});
    let key = gateway.make(alice.clone()).await;
    assert!(key.starts_with("sk-penstock-"));
    gateway.soon_tells(&key, GOOD).await;
    let unknown = (401, "key_unknown".to_owned());
    assert_eq!(gateway.told("sk-penstock-of-nobody").await, unknown);
    assert_eq!(gateway.told("none").await, unknown);
    let again = gateway.manage("POST", "/keys", &alice.to_string()).await;
    assert_eq!(again.status, 409, "{}", again.body);
    // What is told of it is what was written, and never a key.
    let shown = gateway.manage("GET", "/keys/alice", "").await;
    assert_eq!(value(&shown)["attributes"]["tier"], "gold");
    assert!(!shown.body.contains("sk-penstock") && !shown.body.contains("hash"));
    // Another key's end, its models, and its being suspended.
    let change = async |body: &str| gateway.manage("PATCH", "/keys/alice", body).await.status;
    assert_eq!(change(r#"{"suspended": true}"#).await, 200);
    assert_eq!(gateway.told(&key).await, (403, "key_suspended".to_owned()));
    assert_eq!(
        change(r#"{"suspended": null, "models": ["gpt-*"]}"#).await,
        200
    );
    assert_eq!(
        gateway.told(&key).await,
        (403, "model_not_allowed".to_owned())
    );
    assert_eq!(
        change(r#"{"models": null, "expiresAt": "2020-01-01T00:00:00Z"}"#).await,
        200
    );
    assert_eq!(gateway.told(&key).await, (401, "key_expired".to_owned()));
    assert_eq!(change(r#"{"expiresAt": null}"#).await, 200);
    assert_eq!(gateway.told(&key).await, (200, String::new()));
    // The next text, beside this one and then without it.
    let rotate = async |body: &str| {
        let next = gateway.manage("POST", "/keys/alice/rotate", body).await;
        assert_eq!(next.status, 200, "{}", next.body);
        value(&next)["key"].as_str().unwrap().to_owned()
    };
    let second = rotate("").await;
    assert_eq!(gateway.told(&key).await.0, 200);
    assert_eq!(gateway.told(&second).await.0, 200);
    let third = rotate(r#"{"overlap": "0s"}"#).await;
    assert_eq!(gateway.told(&second).await.0, 401);
    assert_eq!(gateway.told(&key).await.0, 401);
    assert_eq!(gateway.told(&third).await.0, 200);
    assert_eq!(
        gateway.manage("DELETE", "/keys/alice", "").await.status,
        204
    );
    assert_eq!(gateway.told(&third).await, unknown);
    assert_eq!(gateway.manage("GET", "/keys/alice", "").await.status, 404);
    assert_eq!(
        value(&gateway.manage("GET", "/keys", "").await)["data"],
        json!([])
    );
}

#[tokio::test]
async fn a_key_lives_in_a_file() {
    a_key_lives(Kept::file()).await;
}

#[tokio::test]
async fn a_key_lives_in_redis() {
    if let Some(kept) = Kept::redis() {
        a_key_lives(kept).await;
    }
}

#[tokio::test]
async fn all_gateways_hear_of_changes_within_a_second() {
    let Some(kept) = Kept::redis() else { return };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let (one, other) = (
        office(&kept, &upstream).await,
        office(&kept, &upstream).await,
    );
    let key = one.make(json!({"name": "alice", "team": "search"})).await;
    other.soon_tells(&key, GOOD).await;
    let patch = r#"{"suspended": true}"#;
    assert_eq!(one.manage("PATCH", "/keys/alice", patch).await.status, 200);
    other.soon_tells(&key, (403, "key_suspended")).await;
    let patch = r#"{"suspended": false}"#;
    assert_eq!(
        other.manage("PATCH", "/keys/alice", patch).await.status,
        200
    );
    one.soon_tells(&key, GOOD).await;
    assert_eq!(one.manage("DELETE", "/keys/alice", "").await.status, 204);
    other.soon_tells(&key, (401, "key_unknown")).await;
}

#[tokio::test]
async fn who_has_no_token_manages_nothing() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let gateway = office(&kept, &upstream).await;
    let body = json!({"name": "alice", "team": "search"}).to_string();
    for headers in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: Bearer \r\n",
    ] {
        for (method, path) in [
            ("POST", "/keys"),
            ("GET", "/keys"),
            ("DELETE", "/keys/alice"),
        ] {
            let answer = gateway.ask_admin(method, path, headers, &body).await;
            assert_eq!(answer.status, 401, "{method} {path}: {}", answer.body);
        }
    }
    // A gateway whose keys nobody manages.
    let open = Gateway::start(&Plan::chain(&[upstream.address])).await;
    let answer = open.manage("GET", "/keys", "").await;
    assert_eq!(answer.status, 404);
    assert!(answer.body.contains("Secret"), "{}", answer.body);
}

#[tokio::test]
async fn mistakes_are_named() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let gateway = office(&kept, &upstream).await;
    for (body, word) in [
        ("x", "body"),
        (r#"{"team": "a"}"#, "name"),
        (r#"{"name": "A b", "team": "a"}"#, "name"),
        (r#"{"name": "a"}"#, "team"),
        (r#"{"name": "a", "team": "a", "model": "x"}"#, "model"),
        (r#"{"name": "a", "team": "a", "models": ["a*b"]}"#, "models"),
        (
            r#"{"name": "a", "team": "a", "policies": ["none"]}"#,
            "policies",
        ),
        (
            r#"{"name": "a", "team": "a", "expiresAt": "soon"}"#,
            "expiresAt",
        ),
    ] {
        let answer = gateway.manage("POST", "/keys", body).await;
        assert_eq!(answer.status, 400, "{body}");
        assert!(answer.body.contains(word), "{body}: {}", answer.body);
    }
    gateway.make(json!({"name": "a", "team": "a"})).await;
    for body in [
        r#"{"overlap": "1d"}"#,
        r#"{"overlap": "721h"}"#,
        r#"{"over": 1}"#,
    ] {
        let answer = gateway.manage("POST", "/keys/a/rotate", body).await;
        assert_eq!(answer.status, 400, "{body}");
    }
    assert_eq!(
        gateway
            .manage("PATCH", "/keys/a", r#"{"team": null}"#)
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn a_list_comes_in_pages() {
    let upstream = Upstream::always(|| json_answer("x")).await;
    let kept = Kept::file();
    let gateway = office(&kept, &upstream).await;
    for number in 0..5 {
        gateway
            .make(json!({"name": format!("key-{number}"), "team": "a"}))
            .await;
    }
    let mut names = Vec::new();
    let mut path = "/keys?limit=2".to_owned();
    loop {
        let page = value(&gateway.manage("GET", &path, "").await);
        let data = page["data"].as_array().unwrap();
        assert!(data.len() <= 2);
        names.extend(
            data.iter()
                .map(|key| key["name"].as_str().unwrap().to_owned()),
        );
        if page["hasMore"] != true {
            break;
        }
        path = format!("/keys?limit=2&after={}", names.last().unwrap());
    }
    names.sort_unstable();
    assert_eq!(names, ["key-0", "key-1", "key-2", "key-3", "key-4"]);
}

/// What a gateway knows is good while the store is away; what it has to ask for is not.
#[tokio::test]
async fn a_store_that_is_away_refuses_new_keys_and_no_others() {
    let Some(kept) = Kept::redis() else { return };
    let upstream = Upstream::always(|| json_answer("x")).await;
    let gateway = office(&kept, &upstream).await;
    let known = gateway.make(json!({"name": "known", "team": "a"})).await;
    let other = gateway.make(json!({"name": "other", "team": "a"})).await;
    assert_eq!(gateway.told(&known).await.0, 200);
    let Kept::Redis(server) = kept else { return };
    drop(server);
    assert_eq!(gateway.told(&known).await.0, 200);
    let answer = gateway.post_with(&bearer(&other), &chat(false)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (503, "keys_unavailable")
    );
    assert!(!answer.header("retry-after").is_empty());
}

/// Jobs are carried out on behalf of a key in the store.
#[tokio::test]
async fn jobs_belong_to_it() {
    let upstream = Upstream::always(|| responded("x")).await;
    let kept = Kept::file();
    let gateway = office(&kept, &upstream).await;
    let key = gateway.make(json!({"name": "alice", "team": "a"})).await;
    let headers = bearer(&key);
    let made = gateway.background(&headers, "").await;
    let path = format!("/v1/responses/{}", made["id"].as_str().unwrap());
    let mut last = Value::Null;
    for _ in 0..500 {
        last = value(&gateway.call("GET", &path, &headers, "").await);
        if last["status"] == "completed" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(last["status"], "completed", "{last}");
    assert_eq!(gateway.get(&path).await.status, 404);
}
